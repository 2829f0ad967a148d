"""Traces as an exact part and a probed one: the control variate by itself, and the split along Gauss-Newton."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, seeded, symmetric
from test_exact_diagonal import IMAGES, LABELS, Attention, convolutional, functional, mlp, randn
from torch import nn

import hessfunc as hf
from hessfunc import tree
from hessfunc._estimate import Estimate

SEEDS = 400
BATCH = (randn(5, 4), LABELS)


@cache
def smooth() -> Any:
    """Model, parameters and dense matrices ``H`` and ``G`` of a net whose two matrices differ."""
    call, params = functional(mlp)
    params = tree.axpy(0.3, randn_like(params, seeded(3)), params)
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, BATCH).dense()
    return call, params, (H + H.T) / 2, hf.ggn(call, F.cross_entropy, params, BATCH).dense()


def exact_estimate(shares: torch.Tensor, names: tuple[str, ...], num_matvecs: int = 0) -> Estimate:
    samples = shares.repeat(2, 1)
    return Estimate.of(samples.sum(1), num_matvecs=num_matvecs, leaf_samples=samples, leaf_names=names)


def holds(estimate: Estimate, value: float) -> bool:
    low, high = estimate.interval(0.95)
    return low <= value <= high


# The control variate


@pytest.mark.parametrize("probes", [{"num_probes": 10}, {"atol": 1.0}])
def test_intervals_of_the_sum_hold_the_trace(probes):
    _, params, H, G = smooth()
    remainder = hf.as_operator(H - G, params)
    sizes = tree.Layout.of(params).sizes
    known = exact_estimate(torch.stack([x.sum() for x in G.diagonal().split(sizes)]), remainder.layout.names)
    held, leaves = 0, torch.zeros(len(sizes))
    for seed in range(SEEDS):
        estimate = hf.hutchinson(remainder, **probes, plus=known, generator=seeded(seed))
        held += holds(estimate, float(H.trace()))
        for i, (share, part) in enumerate(zip(estimate.per_leaf.values(), H.diagonal().split(sizes), strict=True)):
            leaves[i] += holds(share, float(part.sum()))
    assert 0.92 <= held / SEEDS <= 0.98
    assert "atol" in probes or (leaves / SEEDS >= 0.92).all()  # by leaf they are on the safe side


def test_tolerances_are_for_the_sum():
    A = hf.as_operator(symmetric([-1.0, 1.0, 2.0, -2.0, 3.0, -2.5]))
    known = exact_estimate(torch.tensor([1000.0]), A.layout.names, num_matvecs=7)
    estimate = hf.hutchinson(A, rtol=0.02, plus=known, generator=seeded())
    alone = hf.hutchinson(A, num_probes=len(estimate.samples), generator=seeded())
    assert len(estimate.samples) == 8
    assert float(estimate) == pytest.approx(1000 + float(alone))
    assert float(estimate.stderr) == pytest.approx(float(alone.stderr))
    assert estimate.half_width() == pytest.approx(alone.half_width())
    assert torch.allclose(estimate.samples, alone.samples + 1000)
    assert torch.allclose(estimate.leaf_samples.sum(1), estimate.samples)
    assert estimate.num_matvecs == 8 + 7


def test_errors_of_both_join():
    A = hf.as_operator(symmetric([-1.0, 1.0, 2.0, -2.0, 3.0, -2.5]), {"a": torch.ones(2, dtype=F64), "b": randn(4)})
    left, right = (hf.hutchinson(A, num_probes=k, generator=seeded(k)) for k in (10, 20))
    both = hf.hutchinson(A, num_probes=10, plus=right, generator=seeded(10))
    assert float(both.stderr) == pytest.approx(float(torch.hypot(left.stderr, right.stderr)))
    assert min(left.dof, right.dof) <= both.dof <= left.dof + right.dof
    for name, share in both.per_leaf.items():
        expected = torch.hypot(left.per_leaf[name].stderr, right.per_leaf[name].stderr)
        assert float(share.stderr) == pytest.approx(float(expected))
        assert float(share) == pytest.approx(float(left.per_leaf[name]) + float(right.per_leaf[name]))
    swapped = right.plus(left)
    assert float(swapped) == pytest.approx(float(both))
    assert swapped.dof == pytest.approx(both.dof)


def test_what_is_known_stands_in_partial_results_too():
    calls = []

    def product(v: torch.Tensor) -> torch.Tensor:
        calls.append(v)
        return v if len(calls) < 2 else v * torch.nan

    A = hf.as_operator(product, torch.ones(3))
    known = exact_estimate(torch.tensor([5.0]), A.layout.names)
    with pytest.raises(hf.NonFiniteError) as caught:
        hf.hutchinson(A, num_probes=4, chunk_size=2, plus=known, generator=seeded())
    assert float(caught.value.partial) == 8


def test_plus_must_fit():
    A = hf.as_operator(torch.eye(3))
    with pytest.raises(TypeError, match="plus is of type float, expected an Estimate"):
        hf.hutchinson(A, num_probes=2, plus=3.0, generator=seeded())
    with pytest.raises(ValueError, match=r"plus has leaves \['a', 'b'\], but H has \[''\]"):
        hf.hutchinson(A, num_probes=2, plus=exact_estimate(torch.ones(2), ("a", "b")), generator=seeded())
    with pytest.raises(ValueError, match=r"plus has leaves \[\], but"):
        hf.hutchinson(A, num_probes=2, plus=Estimate.of(torch.ones(2), num_matvecs=0), generator=seeded())
    with pytest.raises(ValueError, match=r"to be added have leaves \[\] and \['a'\]; both must be of"):
        exact_estimate(torch.ones(1), ("a",)).plus(Estimate.of(torch.ones(2), num_matvecs=0))


# The split


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = convolutional()[:3]
        self.last = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x))


PIECEWISE: dict[str, Any] = {
    "mlp": (lambda: mlp(nn.ReLU), F.cross_entropy, BATCH),
    "leaky, squares": (lambda: mlp(nn.LeakyReLU), F.mse_loss, (BATCH[0], randn(5, 3))),
    "convolutions": (convolutional, F.cross_entropy, (IMAGES, LABELS)),
    "pooling": (Residual, F.cross_entropy, (IMAGES, LABELS)),
    "linear": (lambda: nn.Linear(4, 3), F.binary_cross_entropy_with_logits, (BATCH[0], randn(5, 3).sigmoid())),
    "one leaf": (lambda: nn.Linear(4, 3, bias=False), F.cross_entropy, BATCH),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_networks_need_no_probes(name, dtype):
    build, criterion, batch = PIECEWISE[name]
    call, params = functional(build)
    truth = hf.hessian(lambda p, x, y: criterion(call(p, x), y), params, batch).dense().diagonal()
    convert = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    call = hf.functionalize(cast(build, dtype))[0]
    params, batch = tree.map_leaves(convert, params), tree.map_leaves(convert, batch)
    trace = hf.split_trace(call, criterion, params, batch, rtol=0.01, generator=seeded())
    eps = torch.finfo(dtype).eps
    assert float(trace) == pytest.approx(float(truth.sum()), rel=20 * eps)
    assert float(trace.stderr) < 20 * eps * float(trace)
    assert trace.num_matvecs == 1
    assert trace.half_width(0.95) < 1e-4 * float(trace)
    for share, part in zip(trace.per_leaf.values(), truth.split(tree.Layout.of(params).sizes), strict=True):
        assert float(share) == pytest.approx(float(part.sum()), rel=20 * eps)
        assert float(share.stderr) < 20 * eps * float(trace)


def cast(build: Any, dtype: torch.dtype) -> nn.Module:
    """The module of ``functional`` with its statistics, in another dtype."""
    kept = []

    def keeping() -> nn.Module:
        kept.append(build())
        return kept[0]

    functional(keeping)
    return kept[0].to(dtype)


@pytest.mark.parametrize("options", [{"num_probes": 20}, {"rtol": 0.2}, {"atol": 0.3}])
def test_smooth_networks_take_probes(options):
    call, params, H, G = smooth()
    trace = hf.split_trace(call, F.cross_entropy, params, BATCH, **options, generator=seeded(1))
    assert abs(float(trace) - float(H.trace())) < 4 * float(trace.stderr)
    assert 0 < float(trace.stderr) < 0.5 * float(H.trace())
    assert trace.num_matvecs == 1 + 2 + 2 * len(trace.samples)
    assert trace.leaf_names == tree.Layout.of(params).names
    if "num_probes" not in options:
        assert trace.half_width() <= max(options.get("rtol", 0) * abs(float(trace)), options.get("atol", 0))
    # Probes of H - G alone make up the spread
    spread = (2 * ((H - G).square().sum() - (H - G).diagonal().square().sum())).sqrt()
    assert 0.3 < float(trace.stderr) * len(trace.samples) ** 0.5 / float(spread) < 3


@pytest.mark.slow
def test_intervals_of_the_split_hold_the_trace():
    call, params, H, _ = smooth()
    held = sum(
        holds(
            hf.split_trace(call, F.cross_entropy, params, BATCH, num_probes=10, check=False, generator=seeded(seed)),
            float(H.trace()),
        )
        for seed in range(SEEDS)
    )
    assert 0.92 <= held / SEEDS <= 0.98


class Late(nn.Module):
    """Linear in its first leaf, and not in its last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.second = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + torch.tanh(self.second(x))


@pytest.mark.parametrize(("build", "looks"), [(Late, 1), (lambda: mlp(nn.GELU), 3), (lambda: mlp(nn.Hardswish), 3)])
def test_curvature_shows_wherever_it_is(build, looks):
    call, params = functional(build)
    trace = hf.split_trace(call, F.cross_entropy, params, BATCH, num_probes=3, generator=seeded())
    assert len(trace.samples) == 3
    assert trace.num_matvecs == looks + 6


@pytest.mark.parametrize("bent", ["first", "second"])
def test_what_rounding_leaves_of_no_curvature_is_no_curvature(bent):
    """``w^3 / w^2`` has the curvature of ``w``, but for what is left of terms that cancel."""
    weights = {"first": randn(4, 5), "second": randn(5, 3)}

    def model(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        p = p | {bent: p[bent] ** 3 / p[bent] ** 2}
        return torch.relu(x @ p["first"]) @ p["second"]

    truth = hf.hessian(lambda p, x, y: F.cross_entropy(model(p, x), y), weights, BATCH).dense().trace()
    trace = hf.split_trace(model, F.cross_entropy, weights, BATCH, rtol=0.1, generator=seeded())
    assert trace.num_matvecs == (3 if bent == "first" else 1)
    assert 0 < float(trace.stderr) < 1e-12 * float(trace)
    assert float(trace) == pytest.approx(float(truth), rel=1e-12)


class Tanh(torch.autograd.Function):
    """Reverse over reverse takes its once differentiable form for a function without curvature."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, _inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        return gradient * (1 - output**2)

    @staticmethod
    def jvp(ctx, tangent):
        (output,) = ctx.saved_tensors
        return tangent * (1 - output**2)


def test_functions_of_the_users_are_looked_at_in_another_order():
    class Once(Tanh):
        backward = staticmethod(torch.autograd.function.once_differentiable(Tanh.backward))

    call, params = functional(lambda: mlp(nn.ReLU))
    for function in (Tanh, Once):
        bent = lambda p, x, f=function: f.apply(call(p, x))  # noqa: E731
        trace = hf.split_trace(bent, F.cross_entropy, params, BATCH, num_probes=3, generator=seeded())
        assert trace.num_matvecs == 3 + 6
    doubled = lambda p, x: Tanh.apply(0 * x[:, :3]) + call(p, x)  # noqa: E731
    trace = hf.split_trace(doubled, F.cross_entropy, params, BATCH, num_probes=3, generator=seeded())
    assert trace.num_matvecs == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_curvature_shows_where_nothing_is_recorded(mode):
    call, params = functional(lambda: mlp(nn.Tanh))
    with mode():
        copies = tree.map_leaves(torch.clone, params)
        trace = hf.split_trace(call, F.cross_entropy, copies, BATCH, num_probes=3, check=False, generator=seeded())
    assert len(trace.samples) == 3
    expected = hf.split_trace(call, F.cross_entropy, params, BATCH, num_probes=3, check=False, generator=seeded())
    assert float(trace) == pytest.approx(float(expected), rel=1e-10)


def test_a_model_that_differentiates_itself():
    weights = {"a": randn(4, 3), "b": randn(3)}

    def model(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: (torch.tanh(x @ p["a"]) * p["b"]).sum())(x)[:, :3]

    H = hf.hessian(lambda p, x, y: F.cross_entropy(model(p, x), y), weights, BATCH).dense()
    trace = hf.split_trace(model, F.cross_entropy, weights, BATCH, num_probes=30, generator=seeded())
    assert abs(float(trace) - float(H.trace())) < 4 * float(trace.stderr)
    assert trace.num_matvecs == 3 + 60


def test_batches_sums_and_ignored_positions():
    call, params = functional(lambda: mlp(nn.ReLU))
    x, y = BATCH
    criterion = nn.CrossEntropyLoss(reduction="sum")
    data = [(x[:2], torch.full((2,), -100)), (x[2:], y[2:])]
    truth = hf.hessian(lambda p, x, y: criterion(call(p, x), y), params, data, reduction="sum").dense().trace()
    trace = hf.split_trace(call, criterion, params, data, reduction="sum", rtol=0.1, generator=seeded())
    assert float(trace) == pytest.approx(float(truth), rel=1e-10)
    # The mean over the first samples is not defined where none of them counts
    batch = (x, y.index_put((torch.tensor([0, 1]),), torch.tensor(-100)))
    truth = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, batch).dense().trace()
    trace = hf.split_trace(call, F.cross_entropy, params, batch, rtol=0.1, generator=seeded())
    assert float(trace) == pytest.approx(float(truth), rel=1e-10)


def test_low_precision_is_probed():
    call, params = functional(lambda: mlp(nn.ReLU))
    call = hf.functionalize(cast(lambda: mlp(nn.ReLU), torch.bfloat16))[0]
    low = tree.map_leaves(lambda p: p.bfloat16(), params)
    batch = (BATCH[0].bfloat16(), LABELS)
    trace = hf.split_trace(call, F.cross_entropy, low, batch, num_probes=2, check=False, generator=seeded())
    assert trace.num_matvecs == 4


def test_same_seed_same_estimate():
    call, params, _, _ = smooth()
    first, second = (
        hf.split_trace(call, F.cross_entropy, params, BATCH, num_probes=5, chunk_size=chunk, generator=seeded(4))
        for chunk in (1, 3)
    )
    assert torch.allclose(first.samples, second.samples, rtol=1e-12)


def test_errors_name_the_remedy():
    call, params = functional(mlp)
    with pytest.raises(ValueError, match="num_probes, rtol and atol are all None"):
        hf.split_trace(call, F.cross_entropy, params, BATCH, generator=seeded())
    with pytest.raises(TypeError, match="generator is of type int"):
        hf.split_trace(call, F.cross_entropy, params, BATCH, rtol=0.1, generator=0)
    with pytest.raises(ValueError, match="max_outputs=0 is out of range"):
        hf.split_trace(call, F.cross_entropy, params, BATCH, rtol=0.1, max_outputs=0, generator=seeded())
    with pytest.raises(ValueError, match="criterion cannot be read as a negative log-likelihood"):
        hf.split_trace(call, nn.HuberLoss(), params, (BATCH[0], randn(5, 3)), rtol=0.1, generator=seeded())
    model, weights = functional(Attention)
    tokens = torch.zeros(3, 4, dtype=torch.long)
    message = "a sample has 24 outputs, so the exact part would take 72 gradients of samples for batch 0 alone, more"
    with pytest.raises(
        ValueError, match=message + ".*use hessfunc.hutchinson on hessfunc.hessian, or raise max_outputs"
    ):
        hf.split_trace(
            model,
            lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
            weights,
            (tokens, tokens),
            rtol=0.1,
            max_outputs=20,
            generator=seeded(),
        )


def test_a_tolerance_out_of_reach_is_told():
    call, params, _, _ = smooth()
    with pytest.warns(hf.ConvergenceWarning, match="max_probes=8") as caught:
        hf.split_trace(call, F.cross_entropy, params, BATCH, rtol=1e-9, max_probes=8, generator=seeded())
    assert caught[0].filename == __file__
