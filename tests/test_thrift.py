"""Fewer residuals: the same numbers to the last bit, in less memory."""

import itertools
import math

import numpy as np
import pytest
import random_programs
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hessfunc as hf
from hessfunc import _cut, _linearize, _reassociate, _repeating, _thrift, tree
from hessfunc._linearize import Linearized
from hessfunc._memory import Memory
from hessfunc._steps import needed


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.narrow(F.gelu(self.wide(self.after(x))))).flatten(1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.relu(x + self.other(self.second(x))).mean((2, 3)))


class Writing(nn.Module):
    """Memory that is written to after it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = x.new_zeros(16)
        before = offset + 1
        offset.add_(2)
        return self.last(torch.tanh(self.first(x) * before) * offset)


NETWORKS = {
    "relu": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
        (6, 4),
    ),
    "silu": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)),
        (6, 4),
    ),
    "transformer": (Transformer, (3, 5, 8)),
    "residual": (Residual, (4, 2, 6, 6)),
    "writing": (Writing, (6, 4)),
}


def problem(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    loss, params = hf.module_loss(build().double(), nn.CrossEntropyLoss())
    return loss, params, (randn(*shape), torch.arange(shape[0]) % 3)


def operator(monkeypatch, name, *, thrift, **options):
    """The program of an operator with or without it, a product by way of it, and the error of that."""
    monkeypatch.setattr(_thrift, "_WORTH", 0 if thrift else math.inf)
    monkeypatch.setattr(_thrift, "_CALL", 0)
    made = []
    init = _linearize.Linearized.__init__

    def noted(self, *arguments, **keywords):
        made.append(self)
        init(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(_linearize.Linearized, "__init__", noted)
        loss, params, batch = problem(name)
        H = hf.hessian(loss, params, batch, **options)
        v = randn(H.size, seed=1)
        H.vector(v)
        found = H.vector(v)
        return made[-1], found, relative_error(found, flat(hf.hvp(loss, params, H.layout.unravel(v), *batch)))


def flat(params):
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(params)])


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_product_from_fewer_residuals(monkeypatch, name, product):
    plain, expected, _ = operator(monkeypatch, name, thrift=False, product=product)
    thrifty, found, error = operator(monkeypatch, name, thrift=True, product=product)
    assert torch.equal(found, expected)
    assert error < 1e-12
    assert thrifty.residual_bytes <= plain.residual_bytes
    if product is hf.hvp and name in ("relu", "transformer", "residual"):
        assert thrifty.residual_bytes < 0.85 * plain.residual_bytes


@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_several_vectors_and_batches(monkeypatch, name):
    for module, what, value in ((_thrift, "_WORTH", 0), (_thrift, "_CALL", 0)):
        monkeypatch.setattr(module, what, value)
    loss, params, (x, y) = problem(name)
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    H = hf.hessian(loss, params, data)
    rows = randn(9, H.size, seed=1)
    eager = hf.hessian(loss, params, data, linearize=False).rows(rows)
    for _ in range(2):
        assert relative_error(H.rows(rows), eager) < 1e-12
        assert relative_error(torch.func.vmap(H.vector)(rows), eager) < 1e-12


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_product_with_less_alive(monkeypatch, name, product, budget):
    peaks = {}
    for rounds in (0, 8):
        monkeypatch.setattr(_thrift, "_ROUNDS", rounds)
        program, found, error = operator(monkeypatch, name, thrift=True, product=product, memory_budget=budget)
        peaks[rounds] = peak(program, all_in_one=budget == 0), found
        assert error < 1e-12
    assert torch.equal(peaks[0][1], peaks[8][1])
    assert peaks[8][0] <= peaks[0][0]
    if product is hf.hvp and budget == 0 and name in ("transformer", "residual"):
        assert peaks[8][0] < 0.95 * peaks[0][0]


@given(random_programs.lines(30), random_programs.results, st.integers(0, 3), st.sampled_from([0, 1 << 14]))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_whatever_the_program_is_its_result_is_the_functions(lines, results, near, large):
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            *((_thrift, "_WORTH", 0), (_thrift, "_LESS", 1.0), (_thrift, "_TIMES", 1)),
            *((_thrift, "_CALL", 0), (_cut, "NEAR", near), (_reassociate, "_LARGE", large)),
        ):
            patch.setattr(module, name, value)
        function = random_programs.function(lines, results)
        given = random_programs.A.clone(), random_programs.TANGENT.clone()
        expected = function(*given)
        if not expected.isfinite().all():
            return
        program = Linearized(function, given[:1], given[1])
        residuals = program.residuals(given[:1])
        for _ in range(2):
            for result in (program.apply(given[:1], residuals, given[1]), program.apply_once(given[:1], given[1])):
                torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1))
        assert torch.equal(given[0], random_programs.A)
        assert torch.equal(given[1], random_programs.TANGENT)


def peak(program, *, all_in_one):
    recording = program._recording
    inputs, body = program._tangent_inputs, program._tangent_body
    if all_in_one:
        inputs = recording.inputs
        body = _thrift.lowered(recording, program._memory, inputs, program._body, lean=True)
    return Memory(recording).peak(inputs, needed(body, recording.outputs), recording.outputs)


def test_small_residuals_are_left_as_they_are(monkeypatch):
    loss, params, batch = problem("relu")
    monkeypatch.setattr(_thrift, "least_cut", None)
    H = hf.hessian(loss, params, batch)
    v = randn(H.size)
    for _ in range(2):
        assert relative_error(H.vector(v), flat(hf.hvp(loss, params, H.layout.unravel(v), *batch))) < 1e-12


def capacity(edges, side):
    return sum(weight for tail, head, weight in edges if side[tail] and not side[head])


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_is_less(seed):
    rng = np.random.default_rng(seed)
    inner = 8
    pairs = [(a, b) for a, b in itertools.permutations(range(inner), 2) if rng.random() < 0.3]
    edges = [(a, b, int(rng.integers(1, 9))) for a, b in pairs]
    edges += [(inner, a, int(rng.integers(1, 9))) for a in range(inner) if rng.random() < 0.5]
    edges += [(a, inner + 1, int(rng.integers(1, 9))) for a in range(inner) if rng.random() < 0.5]
    found = _cut._source_side(edges, inner, inner + 1)
    assert found[inner]
    assert not found[inner + 1]
    least = min(capacity(edges, [*side, True, False]) for side in itertools.product([False, True], repeat=inner))
    assert capacity(edges, found) == least


def test_where_there_is_no_cut_all_that_is_wanted_is_held(monkeypatch):
    monkeypatch.setattr(_repeating.Costs, "of", lambda *_, **__: (_repeating.NEVER, _repeating.NEVER))
    plain, expected, _ = operator(monkeypatch, "transformer", thrift=False)
    thrifty, found, _ = operator(monkeypatch, "transformer", thrift=True)
    assert torch.equal(found, expected)
    assert thrifty.residual_bytes == plain.residual_bytes


class Recurrent(nn.Module):
    """A state that is multiplied and added to in each step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.gate, self.last, self.steps = nn.Linear(4, 6), nn.Linear(6, 3), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate(x))
        state = torch.ones_like(gate)
        for _ in range(self.steps):
            state = state * gate + x[:, :1]
        return self.last(state)


def test_long_recurrences_are_not_begun_anew_for_each_state(monkeypatch):
    counts = []
    for steps in (30, 120):
        monkeypatch.setitem(NETWORKS, "recurrent", (lambda n=steps: Recurrent(n), (6, 4)))
        plain, expected, _ = operator(monkeypatch, "recurrent", thrift=False)
        thrifty, found, error = operator(monkeypatch, "recurrent", thrift=True)
        assert torch.equal(found, expected)
        assert error < 1e-12
        assert thrifty.residual_bytes < plain.residual_bytes
        counts.append(len(thrifty._tangent_body) / len(plain._tangent_body))
    assert counts[1] < 1.2 * counts[0]
    assert counts[1] < 3
