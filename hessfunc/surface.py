"""The loss along one or two directions from a point: lines and surfaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from hessfunc import tree
from hessfunc._checks import (
    check_count,
    check_generator,
    check_like,
    check_loss_value,
    check_params,
    check_positive,
)
from hessfunc._data import Batches
from hessfunc._probes import normal
from hessfunc._typing import Batch, Loss, Params, Tensor

Ticker: TypeAlias = Callable[[int, "int | None"], None]
"""``ticker(done, total)``; ``total`` is None where it is not known."""


@dataclass(frozen=True)
class Surface:
    """Losses on a grid around a point.

    Attributes:
        coordinates: one float64 tensor of grid positions per direction, ascending and symmetric about 0.
        losses: float64 on the CPU, shape ``(P,)`` for one direction and ``(P, Q)`` for two: ``losses[i, j]`` is the
            loss at ``params + coordinates[0][i] * first + coordinates[1][j] * second``. Where the loss overflows
            it is infinite or NaN.
        directions: the directions, a pytree like the parameters with a leading axis of length 1 or 2.
    """

    coordinates: tuple[Tensor, ...]
    losses: Tensor
    directions: Params = field(repr=False)


def loss_surface(
    loss: Loss,
    params: Params,
    directions: Params,
    data: Any = (),
    *,
    span: float | Sequence[float] = 0.5,
    num_points: int | Sequence[int] = 21,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    chunk_size: int = 1,
    progress: Ticker | None = None,
) -> Surface:
    """Evaluate ``loss(params + a * first + b * second)`` on a grid of ``a`` and ``b``.

    Along a unit eigenvector of the Hessian with eigenvalue ``lambda`` at a stationary point the loss starts out as
    ``loss(params) + lambda / 2 * a**2``, so the second difference of the line is the eigenvalue. Batches are weighted
    as in [`hessian`][hessfunc.hessian]: ragged last batches are exact.

    Cost: one loss (forward pass, no gradient) for every grid point and batch, in one pass over the data.
    Memory: ``chunk_size`` copies of the parameters and of the activations.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: pytree of floating-point tensors, the centre of the grid; not changed.
        directions: one or two pytrees like ``params`` in a list, or one pytree whose leaves carry a leading axis of
            length 1 or 2 (the eigenvectors of ``eigsh``, for example). Used as they are, without normalization.
        data: as in [`hessian`][hessfunc.hessian].
        span: the grid reaches from ``-span`` to ``span``; a pair gives each direction its own.
        num_points: grid points per direction, at least 3; a pair gives each direction its own. An odd number puts one
            at the centre.
        reduction: ``"mean"`` or ``"sum"``: how ``loss`` reduces over a batch.
        count: what a batch weighs under ``"mean"``, as in [`hessian`][hessfunc.hessian].
        chunk_size: grid points to evaluate at a time under ``torch.func.vmap``; 1, the default, is a plain loop,
            which every model can do and which is faster for convolutions on a CPU.
        progress: called as ``progress(done, total)`` after every chunk, in losses; ``total`` is None where the data
            has no length.

    Raises:
        ValueError: directions that are not like ``params`` or more than two, an option out of range, empty data.
        TypeError: an integer leaf, an exhausted iterator, a dtype that differs.

    Source: Li et al. 2018 (random directions); Yao et al. 2020 (eigenvectors).

    Example:
        >>> import torch, hessfunc as hf
        >>> from hessfunc.surface import loss_surface
        >>> bowl = lambda p: (p * p * torch.tensor([1.0, 3.0])).sum() / 2
        >>> line = loss_surface(bowl, torch.zeros(2), [torch.tensor([0.0, 1.0])], span=1.0, num_points=3)
        >>> line.losses
        tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    check_params(params)
    stacked, dimensions = _stacked_directions(directions, params)
    spans = _per_direction(span, dimensions, name="span")
    counts = _per_direction(num_points, dimensions, name="num_points")
    for value in spans:
        check_positive(value, name="span")
    for number in counts:
        check_count(number, name="num_points", minimum=3)
    check_count(chunk_size, name="chunk_size")

    centre, stacked = tree.detach(params), tree.detach(stacked)
    batches = Batches.of(data, reduction=reduction, count=count, device=tree.leaves(centre)[0].device)
    # Not linspace, whose middle point is off 0 by rounding.
    steps = [torch.arange(1 - n, n, 2, dtype=torch.float64, device="cpu") / (n - 1) for n in counts]
    coordinates = tuple(extent * step for extent, step in zip(spans, steps, strict=True))
    points = torch.cartesian_prod(*coordinates).reshape(-1, dimensions)
    total = _num_batches(data, single=batches.single)
    total = None if total is None else total * len(points)

    def evaluate(chunk: Tensor, batch: tuple[Any, ...]) -> Tensor:
        moved = tree.map_leaves(lambda p, d: p + torch.tensordot(chunk.to(d), d, dims=1), centre, stacked)
        if len(chunk) == 1:
            return _checked_loss(loss, tree.index(moved, 0), batch).reshape(1)
        return torch.func.vmap(lambda p: _checked_loss(loss, p, batch))(moved)

    losses = torch.zeros(len(points), dtype=torch.float64, device="cpu")
    weights: list[float] = []
    done = 0
    with torch.no_grad():
        for batch, weight in batches:
            values = []
            for chunk in points.split(chunk_size):
                values.append(evaluate(chunk, batch))
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            losses += weight * torch.cat(values).cpu().double()
            weights.append(weight)
    losses /= batches.total(weights)
    return Surface(coordinates, losses.reshape(counts), stacked)


def filter_normalized(params: Params, *, freeze_vectors: bool = True, generator: torch.Generator) -> Params:
    """A random direction in which every filter has the norm of the parameters' filter (Li et al. 2018).

    Formula: ``d[i] <- d[i] / |d[i]| * |params[i]|`` for each index ``i`` of the leading axis of each leaf (the output
    channels of a convolution, the rows of a linear layer), from standard normal ``d``. It takes out the arbitrary
    scale of layers that are followed by a normalization, so that surfaces of different networks compare.

    Args:
        params: pytree of floating-point tensors.
        generator: source of randomness.
        freeze_vectors: whether leaves of fewer than two dimensions (biases, the scales of normalization layers) get
            a zero direction, as in the paper; otherwise each gets a direction with the norm of the whole leaf.

    Returns:
        Pytree like ``params``.

    Example:
        >>> import torch
        >>> from hessfunc.surface import filter_normalized
        >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "bias": torch.ones(2)}
        >>> direction = filter_normalized(params, generator=torch.Generator().manual_seed(0))
        >>> direction["weight"].norm(dim=1).round(decimals=4), direction["bias"]
        (tensor([5., 2.]), tensor([0., 0.]))
    """
    check_params(params)
    check_generator(generator)
    layout = tree.Layout.of(params)
    flat = normal(1, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)[0]

    def rescaled(direction: Tensor, leaf: Tensor) -> Tensor:
        leaf = leaf.detach()
        if leaf.dim() < 2:
            return torch.zeros_like(leaf) if freeze_vectors else _with_norms(direction, leaf, rows=1)
        return _with_norms(direction, leaf, rows=leaf.shape[0])

    return tree.map_leaves(rescaled, layout.unravel(flat), params)


def _with_norms(direction: Tensor, leaf: Tensor, *, rows: int) -> Tensor:
    if leaf.numel() == 0:
        return torch.zeros_like(leaf)
    flat = direction.reshape(rows, -1)
    wanted = leaf.reshape(rows, -1).norm(dim=1, keepdim=True)
    norms = flat.norm(dim=1, keepdim=True)
    return (flat * (wanted / torch.where(norms == 0, torch.ones_like(norms), norms))).reshape(leaf.shape)


def _stacked_directions(directions: Params, params: Params) -> tuple[Params, int]:
    """Directions as one pytree with a leading axis, and their number."""
    # A list of pytrees nests deeper than one stacked pytree, so the structures tell them apart.
    if isinstance(directions, list | tuple) and tree.flatten(directions)[1] != tree.flatten(params)[1]:
        if not directions:
            raise ValueError("directions is empty; pass one pytree like params for a line, two for a surface.")
        for position, direction in enumerate(directions):
            check_like(direction, params, name=f"directions[{position}]", reference="params")
        directions = tree.stack(directions)
    dimensions = check_like(directions, params, name="directions", reference="params", rows=True)
    if dimensions not in (1, 2):
        raise ValueError(
            f"directions holds {dimensions} directions, expected 1 or 2; select with "
            "hessfunc.tree.map_leaves(lambda leaf: leaf[:2], directions)."
        )
    return directions, dimensions


def _per_direction(value: Any, dimensions: int, *, name: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * dimensions
    if len(values) != dimensions:
        raise ValueError(f"{name}={value!r} has {len(values)} entries, but there are {dimensions} direction(s).")
    return values


def _checked_loss(loss: Loss, params: Params, batch: tuple[Any, ...]) -> Tensor:
    value = loss(params, *batch)
    check_loss_value(value)
    return value


def _num_batches(data: Any, *, single: bool) -> int | None:
    if single:
        return 1
    try:
        return len(data)
    except TypeError:
        return None
