"""The diagonal and the trace of the Gauss-Newton matrix without error, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hessfunc import tree
from hessfunc._batched import checked_point
from hessfunc._checks import check_count, check_finite
from hessfunc._data import Batches
from hessfunc._estimate import Estimate
from hessfunc._fisher import checked_loss
from hessfunc._gauss_newton import Criterion, ModelFn
from hessfunc._samples import Samples
from hessfunc._typing import Batch, Params


@dataclass(frozen=True)
class ExactDiagonal:
    """The diagonal of a matrix, but for rounding.

    Attributes:
        value: the diagonal, a pytree like the parameters.
        trace: its sum, with ``per_leaf``; the standard errors are 0, and no products were spent.
        num_pullbacks: gradients of single samples that it took.
    """

    value: Params = field(repr=False)
    trace: Estimate
    num_pullbacks: int


def ggn_diagonal(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    data: Any,
    *,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    chunk_size: int | None = None,
) -> ExactDiagonal:
    """Diagonal and trace of the Gauss-Newton matrix, exactly, for models with few outputs.

    Formula: ``diag G = sum_n c_n sum_j (J_n^T s_nj)^2`` over samples ``n`` with the Jacobian ``J_n`` of their outputs,
    their weight ``c_n`` in the loss and the columns ``s_nj`` of a square root of the Hessian of the negative
    log-likelihood at the outputs, ``diag(p) - p p^T`` for cross-entropy (Dangel, Kunstner and Hennig 2020, as
    "DiagGGNExact"). It is that of the matrix of [`ggn`][hessfunc.ggn] and of [`fisher`][hessfunc.fisher] with
    ``kind="type2"``, for the criteria that the latter knows. In a piecewise-linear network with BatchNorm in eval mode
    the Hessian has the same trace, also leaf by leaf; [`split_trace`][hessfunc.split_trace] looks whether that is so.

    The samples of a batch lie along the leading axis of its tensors. What has another length there (a mask, a scalar)
    goes to each sample as it is. Nothing may couple the samples: each is run on its own, and its outputs are compared
    with those it has in its batch.

    Cost: for each sample one run of the model and one backward pass for each of its outputs, all of these together
    under ``vmap``: about 11 gradients of the batch for ResNet-20 and ten classes. Where all parameters are weights and
    biases of linear layers, one row for each sample, the batch runs as a whole and no gradient is formed: 6 gradients
    instead of 120 for an MLP of 670k parameters. Outputs at each position count as well: too many for most language
    models. Memory: three vectors, and ``chunk_size`` more.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``.
        criterion: ``criterion(outputs, target) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``.
        params: pytree of floating-point tensors.
        data: batches ``(*inputs, target)``: a tuple is one, a list, DataLoader or other re-iterable many.
        reduction: ``"mean"`` or ``"sum"``: how ``criterion`` reduces over a batch.
        count: what a batch weighs under ``"mean"``.
        chunk_size: gradients of one sample to hold at a time; by default as many as 256 MiB have room for.

    Raises:
        ValueError: empty data, a criterion that is no known log-likelihood or whose own reduction is not ``reduction``,
            samples that cannot be told apart or depend on one another, an option out of range.
        TypeError: an integer leaf, an exhausted iterator, batches that do not fit the model.
        NonFiniteError: the loss of the first batch, or later the diagonal, is NaN or infinite.

    Example:
        >>> import torch, hessfunc as hf
        >>> model_fn = lambda w, x: x @ w
        >>> batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2))
        >>> exact = hf.ggn_diagonal(model_fn, torch.nn.functional.mse_loss, torch.ones(2), batch)
        >>> exact.value.round(decimals=4), exact.trace, exact.num_pullbacks
        (tensor([10.,  4.]), Estimate(14 ± 0, num_samples=2, num_matvecs=0), 2)
    """
    if chunk_size is not None:
        check_count(chunk_size, name="chunk_size")
    loss = checked_loss(model_fn, criterion, reduction)
    params, batches = checked_point(
        loss, params, data, reduction=reduction, count=count, chunk_size=chunk_size, memory_budget=None
    )
    return exact_diagonal(model_fn, criterion, params, batches, chunk_size=chunk_size)


def exact_diagonal(
    model_fn: ModelFn, criterion: Criterion, params: Params, batches: Batches, *, chunk_size: int | None = None
) -> ExactDiagonal:
    """[`ggn_diagonal`][hessfunc.ggn_diagonal] at a point and on data that have been looked at."""
    layout = tree.Layout.of(params)
    diagonal = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    shares = torch.zeros(len(layout.sizes), dtype=torch.float64, device="cpu")
    weights, num_pullbacks = [], 0
    for position, (batch, weight) in enumerate(batches):
        samples = Samples.of(model_fn, criterion, params, batch, where=f"batch {position}")
        squares = samples.squares(layout, chunk_size)
        check_finite(
            squares,
            what=f"the diagonal on batch {position}",
            remedy="look at the model and its gradient there (log of 0, sqrt at 0, overflow in low precision).",
        )
        factor = weight * float(samples.whole.weight)
        diagonal.add_(squares, alpha=factor)
        shares += factor * torch.stack([part.sum() for part in squares.split(layout.sizes)]).cpu().double()
        weights.append(weight)
        num_pullbacks += samples.whole.outputs.numel()
    total = batches.total(weights) if not batches.single else 1.0
    # Twice the same sample: the error is 0, also by leaf
    leaf_samples = (shares / total).repeat(2, 1)
    trace = Estimate.of(leaf_samples.sum(1), num_matvecs=0, leaf_samples=leaf_samples, leaf_names=layout.names)
    return ExactDiagonal(layout.unravel(diagonal.div_(total)), trace, num_pullbacks)
