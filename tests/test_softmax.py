"""The softmax of forward mode's own, and the slopes of activations: what a program has already serves for them too."""

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import _linearize, tree
from hessfunc._linearize import Linearized

aten = torch.ops.aten


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def masked(x: torch.Tensor) -> torch.Tensor:
    """All of the second row, and one entry of the first."""
    mask = torch.zeros(3, 5, dtype=F64)
    mask[1], mask[0, 2] = -torch.inf, -torch.inf
    return torch.ops.aten._safe_softmax(x + mask, -1)


SOFTMAXES = {
    "softmax": lambda x: torch.softmax(x, 1),
    "along the first axis": lambda x: torch.softmax(x, 0),
    "log-softmax": lambda x: torch.log_softmax(x, -1) * torch.softmax(x, -1).exp(),
    "of a transposed matrix": lambda x: torch.log_softmax(x.t(), 0),
    "two of one": lambda x: torch.softmax(x, 0) + torch.softmax(x, 1),
    "all of a row masked": masked,
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_one_softmax_serves(monkeypatch, name):
    def function(x, t):
        def gradient(x):
            return torch.func.grad(lambda x: SOFTMAXES[name](x).square().sum())(x)

        return torch.func.jvp(gradient, (x,), (t.reshape(3, 5),))[1]

    x, t = randn(3, 5), randn(15, seed=1)
    expected = function(x, t)
    assert expected.isfinite().all()
    program = Linearized(function, [x], t)
    monkeypatch.setattr(_linearize, "one_softmax", lambda _: None)
    without = Linearized(function, [x], t)
    for one in (program, without):
        assert relative_error(one.apply([x], one.residuals([x]), t), expected) < 1e-12
        assert relative_error(one.apply_once([x], t), expected) < 1e-12
    assert program.residual_bytes < without.residual_bytes
    assert maxima(program) < maxima(without)


def maxima(program: Linearized) -> int:
    return sum(node.target is aten.amax.default for node in program._recording.graph.nodes)


NOT_THE_SAME = {
    "shifted by another maximum": lambda x: (x - x.amax(1, True)).exp(),
    "of another matrix": lambda x: (2 * x - (2 * x).amax(0, True)).exp(),
    "not shifted by the maximum": lambda x: (x - x.amin(0, True)).exp(),
}


@pytest.mark.parametrize("name", NOT_THE_SAME)
def test_what_is_not_the_softmax_is_left_alone(name):
    def function(x, t):
        e = NOT_THE_SAME[name](x)
        rows = t.reshape(3, 5)
        return (e * rows).sum(0, True) / e.sum(0, True) + torch.softmax(x, 0) * rows

    x, t = randn(3, 5), randn(15, seed=1)
    program = Linearized(function, [x], t)
    assert relative_error(program.apply([x], program.residuals([x]), t), function(x, t)) < 1e-12
    assert any(node.target is aten.exp.default for node in program._recording.graph.nodes)


def test_logits_that_are_written_to_are_left_alone():
    def function(x, t):
        logits = x.clone()
        softmax = torch.softmax(logits, 0)
        logits.mul_(2)
        e = (logits - logits.amax(0, True)).exp()
        return (e * t.reshape(3, 5)).sum(0, True) / e.sum(0, True) * softmax

    x, t = randn(3, 5), randn(15, seed=1)
    program = Linearized(function, [x], t)
    assert relative_error(program.apply([x], program.residuals([x]), t), function(x, t)) < 1e-12


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.Tanh()])
def test_slopes_that_are_held_are_multiplied_by(monkeypatch, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 3)).double()
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    batch = (randn(6, 4), torch.arange(6) % 3)
    programs, results = [], []
    init = Linearized.__init__
    monkeypatch.setattr(Linearized, "__init__", lambda self, *a, **k: (programs.append(self), init(self, *a, **k))[1])
    for _ in range(2):
        H = hf.hessian(loss, params, batch)
        v = randn(H.size, seed=1)
        H.vector(v)
        results.append(H.vector(v))
        monkeypatch.setattr(_linearize, "known_slopes", lambda _: None)
    expected = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(hf.hvp(loss, params, H.layout.unravel(v), *batch))])
    assert all(relative_error(result, expected) < 1e-12 for result in results)
    slopes = [sum("_backward" in str(node.target) for node in program._moving) for program in programs]
    assert slopes[0] <= slopes[1]
    if isinstance(activation, nn.GELU):
        assert slopes[0] == 0 < slopes[1]
        assert programs[0].residual_bytes < programs[1].residual_bytes


def test_a_slope_that_is_taken_once_is_taken_with_its_tangent():
    def function(x, t):
        return F.gelu(x) * 2 + aten.gelu_backward(t @ x, x)

    x, t = randn(4, 4), randn(4, 4, seed=1)
    program = Linearized(function, [x], t)
    assert torch.equal(program.apply([x], program.residuals([x]), t), function(x, t))
    assert sum("gelu_backward" in str(node.target) for node in program._moving) == 1


def test_slopes_of_one_place_come_before_all_that_needs_them():
    def function(x, t):
        y = t @ x
        one = aten.gelu_backward(y.sin(), x, approximate="tanh") + aten.gelu_backward(y.cos(), x) * y
        two = aten.gelu_backward(one.sin(), x)
        return two.exp() + aten.gelu_backward(two.sin(), x) * x + aten.gelu_backward(two, x, approximate="tanh") * 2

    x, t = randn(4, 4), randn(4, 4, seed=1)
    program = Linearized(function, [x], t)
    assert relative_error(program.apply([x], program.residuals([x]), t), function(x, t)) < 1e-12
    assert relative_error(program.apply_once([x], t), function(x, t)) < 1e-12
