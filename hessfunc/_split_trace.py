"""Trace of the Hessian as that of its Gauss-Newton part, which is exact, and of what is left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hessfunc import tree
from hessfunc._batched import checked_point
from hessfunc._checks import check_count, check_finite, check_generator
from hessfunc._chunks import chunk_length
from hessfunc._data import Batches
from hessfunc._estimate import Estimate
from hessfunc._exact_diagonal import exact_diagonal
from hessfunc._fisher import checked_loss
from hessfunc._gauss_newton import Criterion, ModelFn, ggn
from hessfunc._hessian import hessian
from hessfunc._operators import Operator
from hessfunc._probes import signs
from hessfunc._samples import Samples
from hessfunc._stopping import Stopping
from hessfunc._straight import straight
from hessfunc._trace import probed
from hessfunc._typing import Batch, Params, Tensor

ROUNDING = 100
"""Multiples of the dtype's epsilon, relative to ``|H v|``, up to which a block's product counts as rounding. In float32
and float64 that of ReLU networks, ResNet-20 among them, came to less than one such multiple, and that of smooth ones to
more than a thousandth of ``|H v|``."""

FEW_SAMPLES = 2
"""Samples on which to look at leaves other than the first."""


def split_trace(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    data: Any,
    *,
    num_probes: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    confidence: float = 0.95,
    max_probes: int = 1000,
    max_outputs: int = 1000,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    per_batch: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    generator: torch.Generator,
) -> Estimate:
    """Trace of the Hessian, the Gauss-Newton part exactly: without error at all in piecewise-linear networks.

    Formula: ``tr H = tr G + tr(H - G)`` with the Gauss-Newton matrix ``G``. The first is computed from gradients of
    samples ([`ggn_diagonal`][hessfunc.ggn_diagonal]). ``H - G`` is the curvature of the model, weighted by how far off
    it is; its block on a parameter tensor in which the model is piecewise linear is zero, as are all blocks with ReLU
    or max-pooling and BatchNorm in eval mode. A look at the blocks tells, with random signs ``v`` on each leaf in turn
    and ``E`` the projector onto it. Reverse over reverse on the outputs alone, weighted by random signs, gives a zero
    in each entry of the block's product where the model is piecewise linear. Where it does not, ``|E (H - G) v|`` has
    to stay below 100 times the epsilon of the dtype times ``|H v|``. If that holds for all blocks, ``tr G`` is the
    trace of ``H`` as well, with a standard error at the level of rounding that the look has seen. Otherwise, and for
    leaves in less than float32, probes estimate ``tr(H - G)`` ([`hutchinson`][hessfunc.hutchinson] with ``plus``), to
    tolerances for the sum.

    The first leaf is looked at on all of the data, the others on the first two samples: what lies downstream of the
    first leaf shows in its block, and whether a leaf enters twice, or into products with itself, does not depend on the
    sample.

    Cost: that of ``ggn_diagonal``; for the look a product on the data and one for each leaf on two samples, with ``H``
    and ``G`` besides where a block is not zero, and no more where curvature shows; then two products per probe, which
    take about 1.7 times as long as one with ``H`` alone. ``num_matvecs`` counts products on the data.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``, as from [`functionalize`][hessfunc.functionalize].
        criterion: ``criterion(outputs, target) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``; one
            that [`fisher`][hessfunc.fisher] can read.
        params: pytree of floating-point tensors.
        data: batches ``(*inputs, target)``: a tuple is one, a list, DataLoader or other re-iterable many.
        num_probes: number of probes for ``H - G``, if it takes any.
        rtol: half-width of the interval to reach, relative to the estimate.
        atol: half-width to reach.
        confidence: probability with which the interval shall hold the trace.
        max_probes: where to end, with a warning, if the tolerance is not met.
        max_outputs: largest number of outputs of a sample, each of which takes a backward pass through it.
        reduction: ``"mean"`` or ``"sum"``: how ``criterion`` reduces over a batch.
        count: what a batch weighs under ``"mean"``.
        per_batch: whether each batch gets probes of its own, as in [`hutchinson`][hessfunc.hutchinson].
        chunk_size: vectors held at a time.
        memory_budget: bytes for what does not depend on the vector, as in [`hessian`][hessfunc.hessian], for each of
            the two matrices.
        check: look at the first products for randomness, asymmetry and data that change.
        generator: draws the vectors.

    Returns:
        An [`Estimate`][hessfunc.Estimate] with ``per_leaf``; if no probes were needed, with one sample, repeated.

    Raises:
        ValueError: a sample has more outputs than ``max_outputs``, the criterion is no known log-likelihood, samples
            depend on one another, or an option is out of range.
        TypeError: an integer leaf, an exhausted iterator, batches that do not fit the model.
        NonFiniteError: a loss or a product is NaN or infinite.

    Warns:
        ConvergenceWarning: ``max_probes`` did not reach the tolerance.

    Example:
        >>> import torch, hessfunc as hf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> call, params = hf.functionalize(model)
        >>> criterion, batch = torch.nn.functional.cross_entropy, (torch.ones(2, 4), torch.tensor([0, 2]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> trace = hf.split_trace(call, criterion, params, batch, rtol=0.01, generator=generator)
        >>> bool(trace.stderr < 1e-4 * trace.value), trace.num_matvecs
        (True, 1)
    """
    stopping = Stopping.of(num_probes, rtol, atol, confidence, max_probes)
    check_generator(generator)
    check_count(max_outputs, name="max_outputs")
    weighting: dict[str, Any] = {"reduction": reduction, "count": count}
    params, batches = checked_point(
        checked_loss(model_fn, criterion, reduction),
        params,
        data,
        **weighting,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
    )
    some = Samples.of(model_fn, criterion, params, next(iter(batches))[0], where="batch 0")
    if some.outputs_per_sample > max_outputs:
        raise ValueError(
            f"a sample has {some.outputs_per_sample} outputs, so the exact part would take "
            f"{some.outputs_per_sample * some.num_samples} gradients of samples for batch 0 alone, more than "
            f"max_outputs={max_outputs} for each of its {some.num_samples} samples; use hessfunc.hutchinson on "
            "hessfunc.hessian, or raise max_outputs."
        )
    exact = exact_diagonal(model_fn, criterion, params, batches).trace
    ratios, spent = _look(some, batches, weighting, generator)
    exact = replace(exact, num_matvecs=spent)
    if ratios is not None:
        return _rounded(exact, ratios)
    options: dict[str, Any] = {"chunk_size": chunk_size, "memory_budget": memory_budget, "check": check}
    H = hessian(some.loss, params, data, **weighting, **options)
    G = ggn(model_fn, criterion, params, data, **weighting, **options)
    estimate = probed(H - G, stopping, plus=exact, per_batch=per_batch, chunk_size=chunk_size, generator=generator)
    stopping.warn_unless_met(
        estimate,
        method="split_trace",
        advice="Raise max_probes, deflate eigenpairs of the Hessian in hessfunc.hutchinson, or ask for less.",
        stacklevel=2,
    )
    return replace(estimate, num_matvecs=2 * estimate.num_matvecs - spent)


def _look(
    some: Samples, batches: Batches, weighting: dict[str, Any], generator: torch.Generator
) -> tuple[Tensor | None, int]:
    """``|E (H - G) v| / |E G v|`` for each leaf if all of these are rounding, else ``None``; and products spent."""
    layout = tree.Layout.of(some.params)
    if min(torch.finfo(dtype).bits for dtype in layout.dtypes) < 32:
        return None, 0  # rounding would hide what there is
    ratios = torch.zeros(len(layout.sizes), dtype=torch.float64, device="cpu")
    few, spent = some.first(FEW_SAMPLES), 1

    def curved(batch: tuple[Any, ...], leaves: list[int]) -> list[int]:
        likelihood = some.likelihood(batch)
        found = straight(lambda params: likelihood(params).outputs, some.params, leaves, generator)
        return [leaf for leaf, so in zip(leaves, found, strict=True) if not so]

    def rounding(data: Any, weights: dict[str, Any], leaves: list[int]) -> bool:
        # Too few products to pay for tracing them
        way: dict[str, Any] = {"linearize": False, "check": False}
        H = hessian(some.loss, some.params, data, **weights, **way)
        G = ggn(some.model_fn, some.criterion, some.params, data, **weights, **way)
        chunk = chunk_length(H, None)
        for start in range(0, len(leaves), chunk):
            part = leaves[start : start + chunk]
            found = _ratios(H, G, part, generator)
            if found is None:
                return False
            ratios[part] = found
        return True

    if any(curved(batch, [0]) for batch, _ in batches):
        spent += 2
        if not rounding(batches.data, weighting, [0]):
            return None, spent
    others = curved(few, list(range(1, len(ratios))))
    if others and not rounding(few, {"reduction": weighting["reduction"]}, others):
        return None, spent
    return ratios, spent


def _ratios(H: Operator, G: Operator, leaves: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """``|E (H - G) v| / |E G v|`` with signs on each of these leaves in turn, or ``None`` if one is not rounding."""
    layout = H.layout
    starts = [0, *torch.tensor(layout.sizes, device="cpu").cumsum(0).tolist()]
    rows = torch.zeros(len(leaves), H.size, dtype=H.dtype, device=H.device)
    for row, leaf in zip(rows, leaves, strict=True):
        part = row[starts[leaf] : starts[leaf + 1]]
        if len(part):
            part.copy_(signs(1, len(part), generator=generator, dtype=H.dtype, device=H.device)[0])
    images, curvature = H.rows(rows), G.rows(rows)
    check_finite(images, what="H v of a vector v", remedy="the operator overflows or is not defined there.")
    inside = rows.abs()
    block, whole, own = (
        torch.linalg.vector_norm(x, dim=1).cpu().double()
        for x in ((images - curvature) * inside, images, curvature * inside)
    )
    if bool((block > ROUNDING * torch.finfo(H.dtype).eps * whole).any()):
        return None
    return torch.where(own > 0, block / own, 0.0)


def _rounded(exact: Estimate, ratios: Tensor) -> Estimate:
    """With standard errors at the level of rounding: a probe's is at most ``sqrt(2) |B v|`` within a block ``B``.

    ``|B v|`` stands in the same ratio to ``|E G v|`` on few samples, and that is at most ``tr G`` of the leaf.
    """
    shares = torch.stack([share.value for share in exact.per_leaf.values()])
    variances = 2 * (ratios * shares).square()
    total = variances.sum()
    dof = float(total.square() / variances.square().sum()) if float(total) > 0 else None
    return replace(
        exact, stderr=total.sqrt(), dof=dof, leaf_stderr=variances.sqrt(), leaf_dof=torch.ones_like(variances)
    )
