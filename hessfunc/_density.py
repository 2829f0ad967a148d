"""Spectral density: quadrature nodes smoothed by a Gaussian, with an error band over the probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessfunc._checks import check_finite, check_positive
from hessfunc._sphere_law import known_error
from hessfunc._typing import Tensor

_PADDING = 6.0
"""Bandwidths by which a default grid reaches beyond the outermost node: 1e-9 of a Gaussian lies further out."""

_POINTS_PER_SIGMA = 4
_MAX_POINTS = 2**18
_BLOCK, _LEAST = 2**16, 16
"""Grid points times nodes evaluated at a time, few enough for the processor's cache, and the fewest points."""

_REACH = 9.0
"""Bandwidths beyond which a Gaussian is nothing next to its height, in double precision."""

_APART = 2.0
"""Spread over the law's error beyond which the law does not describe the spread; chance alone seldom does that."""


@dataclass(frozen=True)
class Density:
    """A smoothed spectral density; all tensors are float64 and on the CPU.

    Attributes:
        grid: points of evaluation, increasing, shape ``(num_points,)``.
        values: density at these points, the mean over the probes, shape ``(num_points,)``. Integrates to 1 over a
            default grid (``torch.trapezoid(values, grid)``).
        stderr: standard error of ``values``, shape ``(num_points,)``, the larger one of the probes' spread and of what
            the law of the probes says; infinite for one probe. It covers the probes' noise, not the smoothing.
        sigma: standard deviation of the Gaussian, in units of the eigenvalues; with ``linthresh`` in units of
            ``asinh(x / linthresh)``.
        linthresh: where the smoothing turns from linear to logarithmic; ``None`` for an even bandwidth.
        dof: degrees of freedom of ``stderr`` for Student's distribution, shape ``(num_points,)``.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    sigma: float
    linthresh: float | None
    dof: Tensor


def smooth(
    nodes: Tensor,
    weights: Tensor,
    *,
    size: int,
    num_exact: int,
    resolution: float,
    grid: Tensor | None = None,
    sigma: float | None = None,
    linthresh: float | None = None,
) -> Density:
    """Smooth the measures given by rows of ``nodes`` and ``weights``; what ``Quadrature.density`` calls.

    Args:
        nodes: shape ``(num_probes, num_nodes)``.
        weights: the same shape.
        size: number of eigenvalues.
        num_exact: number of leading columns whose nodes are the same for all probes.
        resolution: bandwidth to use if ``sigma`` is ``None``, in the same units.
        grid: points of evaluation; by default evenly spaced, padded so that the mass is complete.
        sigma: bandwidth.
        linthresh: smooth in ``asinh(x / linthresh)`` instead of ``x``.

    Raises:
        ValueError: ``sigma``, ``linthresh`` or ``grid`` is out of range.
    """
    if sigma is not None:
        check_positive(sigma, name="sigma")
    if linthresh is not None:
        check_positive(linthresh, name="linthresh")
    width = float(resolution if sigma is None else sigma)
    stretched = nodes if linthresh is None else torch.asinh(nodes / linthresh)
    if grid is None:
        positions = _default_positions(stretched[weights > 0], width)
        points = positions if linthresh is None else linthresh * torch.sinh(positions)
    else:
        points = _checked_grid(grid)
        positions = points if linthresh is None else torch.asinh(points / linthresh)
    height = 1 / (width * (2 * torch.pi) ** 0.5)
    if linthresh is not None:
        height = height / (points.square() + linthresh**2).sqrt()
    # Not in all rows alike: the one that outliers were found by holds repeated ones among the others.
    exact, shares = stretched[:1, :num_exact], weights[:, :num_exact].mean(0)
    rest, order = stretched[:, num_exact:].sort(dim=1)
    weights = weights[:, num_exact:].gather(1, order)
    mass, parts = float(weights.sum()), []
    for chunk in positions.split(max(_LEAST, _BLOCK // nodes.numel())):
        low, high = float(chunk.min()) - _REACH * width, float(chunk.max()) + _REACH * width
        near = slice(int((rest < low).sum(1).min()), int((rest <= high).sum(1).max()))
        found = _moments(chunk, rest[:, near], weights[:, near], mass, width, size - num_exact)
        parts.append(torch.stack([found[0] + _bumps(chunk, exact, width)[0] @ shares, *found[1:]]))
    values, stderr, dof = torch.cat(parts, dim=1)
    return Density(points, height * values, height * stderr, width, linthresh, dof)


def _moments(
    positions: Tensor, nodes: Tensor, weights: Tensor, mass: float, sigma: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the Gaussians' sums over the probes, its standard error and degrees of freedom.

    ``mass`` is that of all nodes, those included that are too far away to be given.
    """
    bumps, weights = _bumps(positions, nodes, sigma), weights[:, :, None]
    rows, count = (bumps @ weights).squeeze(2), len(weights)
    values = rows.mean(0)
    if count == 1:
        return values, torch.full_like(values, torch.inf), torch.ones_like(values)
    spread = rows.std(0) / count**0.5
    if not mass > 0:
        return values, spread, torch.full_like(values, count - 1.0)
    mean, away = rows.sum(0) / mass, mass - float(weights.sum())
    # In place: a pass over fresh memory takes as long as the Gaussians
    squares = bumps.sub_(mean[:, None]).square_()
    variance = ((squares @ weights).sum((0, 2)) + away * mean.square()) / mass
    fourth = ((squares.square_() @ weights).sum((0, 2)) + away * mean**4) / mass
    known, dof = known_error(variance, fourth, mass=mass / count, size=size, num_probes=count)
    # Gaussians narrower than the nodes' distances see nodes move from probe to probe, of which the law knows nothing.
    return values, spread.maximum(known), torch.where(spread > _APART * known, count - 1.0, dof)


def _bumps(positions: Tensor, nodes: Tensor, sigma: float) -> Tensor:
    """Shape ``(num_probes, num_points, num_nodes)``."""
    return (positions[:, None] - nodes[:, None, :]).div_(sigma).square_().mul_(-0.5).exp_()


def _default_positions(nodes: Tensor, sigma: float) -> Tensor:
    low, high = float(nodes.min()) - _PADDING * sigma, float(nodes.max()) + _PADDING * sigma
    steps = (high - low) / sigma * _POINTS_PER_SIGMA
    if steps > _MAX_POINTS:
        raise ValueError(
            f"sigma={sigma:.3g} is too small for a default grid from {low:.3g} to {high:.3g}, which would take "
            f"{steps:.0f} points; expected at most {_MAX_POINTS}. Raise sigma, or pass grid= with the points you need."
        )
    return torch.linspace(low, high, round(steps) + 2, dtype=torch.float64, device="cpu")


def _checked_grid(grid: Tensor) -> Tensor:
    points = torch.as_tensor(grid, device="cpu").detach().double()
    if points.dim() != 1 or points.shape[0] == 0:
        raise ValueError(f"grid has shape {tuple(points.shape)}, expected a vector of points, (num_points,).")
    check_finite(points, what="grid", remedy="pass finite points of evaluation.")
    return points
