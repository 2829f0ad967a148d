"""What a program writes over: only memory of its own that nothing reads any more."""

import pytest
import random_programs
import torch
from helpers import CASES as MODELS
from helpers import case
from hypothesis import given, settings
from random_programs import TANGENT, A, B
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc._linearize import Linearized
from hessfunc._recorder import _Kind

# The function, and how many of its operations may write over their first argument. Products of matrices keep factors
# from being gathered.
CASES = {
    "one after the other": (lambda a, t: (t @ a).sin().mul(a).exp().div(a).cos().sub(a), 3),
    "needed later": (lambda a, t: (s := (t @ a).sin()) * a + s.exp(), 1),
    "the tangent": (lambda a, t: (t * a).sin(), 0),
    "a parameter": (lambda a, t: (a * (t @ a).sum()).sin() * a, 1),
    "a captured tensor": (lambda a, t: (B * (t @ a).sum()).sin(), 0),
    "a view is needed later": (lambda a, t: (s := (t @ a).sin()).t() @ (s * a), 0),
    "a view is written over": (lambda a, t: (t @ a).sin().t() * a, 1),
    "a view of what is needed": (lambda a, t: (s := (t @ a).sin())[:2] * a[:2] + s[2:], 1),
    "a view that does not say so": (
        lambda a, t: (torch.ops.aten._unsafe_view(s := (t @ a).sin(), [16]) * 3.0).sin().sum() - s.exp().exp() * a,
        1,
    ),
    "parts that do not say so": (
        lambda a, t: (torch.ops.aten.unsafe_split(s := (t @ a).sin(), 2)[0] * a[:2]).sin().sum() - s.exp().exp() * a,
        1,
    ),
    "itself": (lambda a, t: (s := (t @ a).sin()) * s, 1),
    "itself from another side": (lambda a, t: (s := (t @ a).sin()) * s.t(), 0),
    "one number for all": (lambda a, t: (t @ a).sum().sin().expand(4, 4) * a, 0),
    "larger than its first argument": (lambda a, t: (t @ a).sum(1, keepdim=True).sin() * a, 0),
    "another type": (lambda a, t: ((t @ a).float().sin() * a).sum(1), 0),
    "the result": (lambda a, t: (t @ a).sin() * 2.0, 1),
}


class Writes(TorchDispatchMode):
    """Counts the operations that write to an argument."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.is_mutable
        return func(*args, **(kwargs or {}))


def test_the_cases_write_to_nothing_themselves():
    with Writes() as writes:
        for function, _ in CASES.values():
            function(A, TANGENT)
    assert writes.count == 0


@pytest.mark.parametrize("name", CASES)
def test_results_stay_and_what_is_given_is_not_written_to(name):
    function, expected = CASES[name]
    parameter, tangent = A.clone(), TANGENT.clone()
    program = Linearized(function, [parameter], tangent)
    residuals = program.residuals([parameter])
    copies = [residual.clone() for residual in residuals]
    for _ in range(2):
        for result in (program.apply([parameter], residuals, tangent), program.apply_once([parameter], tangent)):
            torch.testing.assert_close(result, function(A, TANGENT), rtol=1e-12, atol=1e-12)
    with Writes() as writes:
        program.apply([parameter], residuals, tangent)
    assert writes.count == expected
    assert torch.equal(parameter, A)
    assert torch.equal(tangent, TANGENT)
    assert all(map(torch.equal, residuals, copies))


def test_programs_that_are_not_rewritten_do_what_was_recorded():
    program = Linearized(CASES["one after the other"][0], [A], TANGENT, rewrite=False)
    residuals = program.residuals([A])
    with Writes() as writes:
        program.apply([A], residuals, TANGENT)
    assert writes.count == 0


@given(random_programs.lines(14), random_programs.results)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_whatever_the_program_is_its_result_is_the_functions(lines, results):
    function = random_programs.function(lines, results)
    given, captured = (A.clone(), TANGENT.clone()), B.clone()
    expected = function(*given)
    program = Linearized(function, given[:1], given[1])
    residuals = program.residuals(given[:1])
    for _ in range(2):
        for result in (program.apply(given[:1], residuals, given[1]), program.apply_once(given[:1], given[1])):
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1))
    assert torch.equal(given[0], A)
    assert torch.equal(given[1], TANGENT)
    assert torch.equal(B, captured)


class Aliases(TorchDispatchMode):
    """Notes operations whose results lie in the memory of an argument without its being known of them."""

    def __init__(self):
        super().__init__()
        self.silent = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))

        def memory(values):
            found = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
            return {x.untyped_storage()._cdata for x in found if isinstance(x, torch.Tensor)}

        if memory([result]) & memory([*args, *(kwargs or {}).values()]) and not _Kind.of(func).views:
            self.silent.add(str(func))
        return result


@pytest.mark.parametrize("name", MODELS)
def test_results_in_the_memory_of_an_argument_are_known(name):
    loss, params, batch = case(name)[:3]
    vector = hf.tree.map_leaves(torch.ones_like, params)
    with Aliases() as aliases:
        for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
            product(loss, params, vector, *batch)
    assert not aliases.silent
