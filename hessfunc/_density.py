"""Spectral density: quadrature nodes smoothed by a Gaussian, with an error band over the probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessfunc._checks import check_finite, check_positive
from hessfunc._typing import Tensor

_PADDING = 6.0
"""Bandwidths by which a default grid reaches beyond the outermost node: 1e-9 of a Gaussian lies further out."""

_POINTS_PER_SIGMA = 4
_MAX_POINTS = 2**18
_BLOCK = 2**20
"""Grid points times nodes evaluated at a time."""


@dataclass(frozen=True)
class Density:
    """A smoothed spectral density; all tensors are float64 and on the CPU.

    Attributes:
        grid: points of evaluation, increasing, shape ``(num_points,)``.
        values: density at these points, the mean over the probes, shape ``(num_points,)``. Integrates to 1 over a
            default grid (``torch.trapezoid(values, grid)``).
        stderr: standard error of ``values`` over the probes, shape ``(num_points,)``; infinite for one probe. It
            covers the probes' noise, not the smoothing.
        sigma: standard deviation of the Gaussian, in units of the eigenvalues; with ``linthresh`` in units of
            ``asinh(x / linthresh)``.
        linthresh: where the smoothing turns from linear to logarithmic; ``None`` for an even bandwidth.
    """

    grid: Tensor
    values: Tensor
    stderr: Tensor
    sigma: float
    linthresh: float | None = None


def smooth(
    nodes: Tensor,
    weights: Tensor,
    *,
    resolution: float,
    grid: Tensor | None = None,
    sigma: float | None = None,
    linthresh: float | None = None,
) -> Density:
    """Smooth the measures given by rows of ``nodes`` and ``weights``; what ``Quadrature.density`` calls.

    Args:
        nodes: shape ``(num_probes, num_nodes)``.
        weights: the same shape.
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
    rows = torch.stack([_gaussians(positions, n, w, width) for n, w in zip(stretched, weights, strict=True)])
    if linthresh is not None:
        rows = rows / (points.square() + linthresh**2).sqrt()
    count = rows.shape[0]
    stderr = rows.std(dim=0) / count**0.5 if count > 1 else torch.full_like(points, torch.inf)
    return Density(grid=points, values=rows.mean(dim=0), stderr=stderr, sigma=width, linthresh=linthresh)


def _default_positions(nodes: Tensor, sigma: float) -> Tensor:
    low, high = float(nodes.min()) - _PADDING * sigma, float(nodes.max()) + _PADDING * sigma
    steps = (high - low) / sigma * _POINTS_PER_SIGMA
    if steps > _MAX_POINTS:
        raise ValueError(
            f"sigma={sigma:.3g} is too small for a default grid from {low:.3g} to {high:.3g}, which would take "
            f"{steps:.0f} points; expected at most {_MAX_POINTS}. Raise sigma, or pass grid= with the points you need."
        )
    return torch.linspace(low, high, int(steps) + 2, dtype=torch.float64)


def _checked_grid(grid: Tensor) -> Tensor:
    points = torch.as_tensor(grid).detach().cpu().double()
    if points.dim() != 1 or points.shape[0] == 0:
        raise ValueError(f"grid has shape {tuple(points.shape)}, expected a vector of points, (num_points,).")
    check_finite(points, what="grid", remedy="pass finite points of evaluation.")
    return points


def _gaussians(positions: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    height = weights / (sigma * (2 * torch.pi) ** 0.5)
    chunks = positions.split(max(1, _BLOCK // nodes.shape[0]))
    return torch.cat([torch.exp(-0.5 * ((c.unsqueeze(1) - nodes) / sigma).square()) @ height for c in chunks])
