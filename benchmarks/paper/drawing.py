"""What the study's figures are made of: curves by seed, an eigenvalue axis for many densities, quiet axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from records import Quantity, Table

import hessfunc as hf
from hessfunc import _canvas


def curves(
    ax: Any,
    table: Table,
    epochs: Sequence[int],
    variant: str,
    depth: int,
    quantity: Quantity,
    colour: str,
    *,
    log: bool,
) -> None:
    """A thin line for each seed and a thick one for their median; a ``log`` axis leaves out what is not positive."""
    by_epoch = [table.values(variant, depth, quantity, epoch) for epoch in epochs]
    lines = np.array([[found.get(seed, np.nan) for found in by_epoch] for seed in table.seeds])
    if log:
        ax.set_yscale("log", nonpositive="mask")
    ax.plot(epochs, lines.T, color=colour, linewidth=0.7, alpha=0.5)
    # Not the mean: a seed that did not train is orders of magnitude off.
    known = ~np.isnan(lines).all(axis=0)
    middle = np.nanmedian(lines[:, known], axis=0)
    style = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 4}
    ax.plot(np.array(epochs)[known], middle, label=table.label(variant), **style)


class Asinh:
    """One eigenvalue axis for several densities: logarithmic from a hundredth of the narrowest one's reach on."""

    def __init__(self, quadratures: Any) -> None:
        found = list(quadratures)
        nodes = torch.cat([q.nodes.flatten() for q in found]) if found else torch.tensor([-1.0, 1.0])
        reaches = torch.stack([q.nodes.abs().max() for q in found]) if found else torch.ones(1)
        self.linthresh = max(1e-2 * float(reaches.min()), 1e-6 * float(reaches.max()))
        ends = torch.stack([nodes.min(), nodes.max()]) / self.linthresh
        low, high = torch.asinh(ends).tolist()
        self.grid = torch.sinh(torch.linspace(low - 1.2, high + 1.2, 700, dtype=torch.float64)) * self.linthresh
        self.sigma = 0.35
        sizes = [q.size for q in found] or [1]
        self.floor = 0.1 / (min(sizes) * self.sigma * (2 * np.pi) ** 0.5)

    def plot(self, ax: Any, quadrature: hf.Quadrature, **style: Any) -> None:
        """Draw the density."""
        curve = quadrature.density(grid=self.grid, sigma=self.sigma, linthresh=self.linthresh)
        # Per unit of asinh, so that equal areas on this axis are equal shares of the eigenvalues.
        heights = curve.values * (curve.grid.square() + self.linthresh**2).sqrt()
        ax.plot(curve.grid.numpy(), np.maximum(heights.numpy(), self.floor / 10), linewidth=1.3, **style)

    def finish(self, ax: Any) -> None:
        """Set the scales."""
        ax.set_xscale("symlog", linthresh=self.linthresh)
        decades = range(int(np.ceil(np.log10(self.linthresh))), int(np.log10(float(self.grid.abs().max()))) + 1)
        ticks = [10.0**d for d in decades][:: 1 + len(decades) // 4]
        ax.xaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0.0, *ticks]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(float(self.grid[0]), float(self.grid[-1]))
        ax.set_yscale("log")
        ax.set_ylim(bottom=self.floor)


def epoch_axis(ax: Any, epochs: Sequence[int]) -> None:
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_locator(FixedLocator(list(epochs)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())


def finish(ax: Any, title: str, xlabel: str, ylabel: str, *, grid: bool = True) -> None:
    ax.set_title(title, fontsize=10)
    _canvas.finish(ax, xlabel=xlabel, ylabel=ylabel, grid="both" if grid else "")


def legend(figure: Figure, ax: Any, columns: int = 6) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
