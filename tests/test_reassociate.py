"""Sums and products of tangents with fixed factors, rewritten: the same values from fewer operations."""

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc._linearize import Linearized
from hessfunc._parts import moving_nodes
from hessfunc._reassociate import reassociate
from hessfunc._recorder import record
from hessfunc._simplify import simplify

A, B, C = (torch.randn(4, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
M, N = (torch.randn(5, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3, 5))
ROW, COLUMN = A[0], A[:, :1]
TANGENT = torch.randn(4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

aten = torch.ops.aten


def in_place(b, t):
    s = t * b
    total = s.sum()
    s.mul_(2.0)
    return s * b + total


def read_before_the_write(b, t):
    s = t.clone()
    early = s * b
    s.mul_(3.0)
    return early * b + s


# function of the tangent, and how many operations depend on the tangent before and after
CASES = {
    "chain of factors": (lambda t: ((t * A) * B) / C, 3, 1),
    "factors of one base add up": (lambda t: t * A + t * B - 3.0 * (C * t), 6, 1),
    "two bases": (lambda t: (t * A + t.flip(0) * B) * C, 5, 3),
    "numbers": (lambda t: -(2.0 * t / 4.0), 3, 1),
    "scaled sum": (lambda t: torch.add(t.flip(0), t, alpha=0.5), 2, 2),
    "alpha inside a product": (lambda t: torch.sub(t.flip(0), t, alpha=0.5) * A, 3, 3),
    "derivatives of activations": (
        lambda t: aten.gelu_backward(t, A) + aten.gelu_backward(t, A, approximate="tanh") * B,
        4,
        1,
    ),
    "thresholds": (lambda t: aten.threshold_backward(t, A, 0.1) * B + t, 3, 1),
    "a sum of products of matrices": (lambda t: t @ M + t.flip(0) @ N + A * t, 6, 4),
    "a bias on a product of matrices": (lambda t: t[0] + t @ M, 3, 3),
    "one factor for a sum of products": (lambda t: (t @ M + t.flip(0) @ N) * A, 5, 4),
    "one factor and a sign": (lambda t: -(t.flip(0) @ M - t * B.sum()) * A, 6, 4),
    "one factor for all but one": (lambda t: (t @ M + t.flip(0) @ N) * A + t * B, 7, 6),
    "a factor of more rows than the sum": (lambda t: (t.sum(0) + t[0]) * A, 4, 4),
    "used twice": (lambda t: ((u := t * A * B) * C + u).sum(0) * u, 6, 4),
    "no larger factors": (lambda t: (t[:, :1] * A[:1]) * B[:, :1], 3, 3),
    "broadcast bases": (lambda t: (t - t.mean(1, keepdim=True)) * A * B, 4, 3),
    "views follow": (lambda t: ((t.t() * A.t() + t.flip(0).t()) * B.t()).t().contiguous().view(-1) * 2, 9, 8),
    "zeros": (lambda t: (torch.zeros_like(t) @ M + t @ M) * A + torch.zeros_like(t), 6, 3),
    "the tangent itself": (lambda t: t * 1.0 + 2.0 * t, 3, 1),
}


def operations(function, inputs):
    recording, _ = record(lambda *given: [function(*given)], inputs)
    simplify(recording)
    before = len(moving_nodes(recording))
    reassociate(recording)
    return before, len(moving_nodes(recording))


@pytest.mark.parametrize("name", CASES)
def test_values_stay_and_operations_go(name):
    function, before, after = CASES[name]
    program = Linearized(function, [], torch.ones_like(TANGENT))
    replayed = program.apply([], program.residuals([]), TANGENT)
    torch.testing.assert_close(replayed, function(TANGENT), rtol=1e-13, atol=1e-14)
    assert operations(function, [torch.ones_like(TANGENT)]) == (before, after)


@pytest.mark.parametrize("function", [in_place, read_before_the_write])
def test_memory_that_is_written_to_is_read_at_its_time(function):
    program = Linearized(function, [B], torch.ones_like(TANGENT))
    replayed = program.apply([B], program.residuals([B]), TANGENT)
    torch.testing.assert_close(replayed, function(B, TANGENT))


def test_inputs_are_not_written_to():
    program = Linearized(lambda a, t: (t + t.flip(0) * a) * 1.0 + t @ M, [A], TANGENT)
    kept = [x.clone() for x in (A, M, TANGENT)]
    residuals = program.residuals([A])
    first = program.apply([A], residuals, TANGENT)
    torch.testing.assert_close(program.apply([A], residuals, TANGENT), first, rtol=0, atol=0)
    for now, then in zip((A, M, TANGENT), kept, strict=True):
        assert torch.equal(now, then)


def test_dtypes_are_not_mixed():
    half = A.bfloat16()
    function = lambda a, t: (t.bfloat16() * half).double() * a * a  # noqa: E731
    program = Linearized(function, [A], TANGENT)
    replayed = program.apply([A], program.residuals([A]), TANGENT)
    torch.testing.assert_close(replayed, function(A, TANGENT), rtol=1e-14, atol=0)


def test_a_layer_takes_fewer_operations(generator):
    """Layer norm, GELU and a linear layer: the tangent of the gradient."""
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)

    def product(w, t):
        loss = lambda w: F.gelu(F.layer_norm(F.gelu(x @ w), (8,)) @ w).square().mean()  # noqa: E731
        return torch.func.jvp(torch.func.grad(loss), (w,), (t,))[1]

    tangent = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    before, after = operations(product, [weight, tangent])
    assert after < 0.75 * before
    program = Linearized(product, [weight], torch.ones_like(tangent))
    replayed = program.apply([weight], program.residuals([weight]), tangent)
    torch.testing.assert_close(replayed, product(weight, tangent), rtol=1e-12, atol=1e-13)


ACTIVATIONS = [
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish),
    *(nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh),
    nn.Tanhshrink,
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("budget", [None, 0])
def test_all_activations_of_torch(activation, budget):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3)]
    loss, params = hf.module_loss(nn.Sequential(*layers).double(), nn.CrossEntropyLoss())
    batch = (torch.randn(6, 4, generator=seeded(0), dtype=F64), torch.arange(6) % 3)
    H = hf.hessian(loss, params, batch, memory_budget=budget)
    v = torch.randn(H.size, generator=seeded(1), dtype=F64)
    expected = hf.hvp_double_backward(loss, params, H.layout.unravel(v), *batch)
    for _ in range(2):
        assert relative_error(H.layout.unravel(H.vector(v)), expected) < 1e-12
