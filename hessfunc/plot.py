"""Figures: spectral density, trace by layer, loss surface, curves over training, spectra over mini-batches.

Each function returns a ``matplotlib.figure.Figure`` that belongs to nobody else: nothing goes through pyplot or
changes matplotlib's settings, so the functions work without a screen and in threads. Save with
``figure.savefig(path, dpi=200)``. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hessfunc._canvas import (
    BLUE,
    CYCLE,
    ORANGE,
    VERMILION,
    axes,
    bin_edges,
    finish,
    legend,
    level_norm,
    level_ticks,
    levels_of,
    new_figure,
    per_parameter_scale,
    refined,
    relief,
)
from hessfunc._checks import check_choice
from hessfunc._density import Density
from hessfunc._minibatch import MinibatchEigenvalues
from hessfunc._quadrature import Quadrature
from hessfunc._typing import Tensor
from hessfunc.report import Report
from hessfunc.surface import Surface


def density(
    source: Report | Quadrature,
    *,
    sigma: float | None = None,
    linthresh: float | None = None,
    title: str = "Spectral density of the Hessian",
    ax: Any = None,
) -> Any:
    """The spectral density on a logarithmic axis, with its standard error and the outliers.

    The band is one standard error over the probes to either side (absent for a single probe). A stem marks each
    known eigenvalue (the eigenpairs of a report, the exact outliers of a quadrature) at the height that one
    eigenvalue has in this density, ``1 / (size * sigma * sqrt(2 pi))``; hollow if it has not converged. The axis
    ends at a tenth of that height: below lies less than a tenth of one eigenvalue.

    Args:
        source: a report or the quadrature in it.
        sigma: bandwidth, as in ``Quadrature.density``.
        linthresh: draw a symmetric-logarithmic eigenvalue axis that is linear within ``linthresh`` of 0.
        title: first line of the title; the second states size, probes, steps and bandwidth.
        ax: axes to draw into instead of a new figure.

    Returns:
        The figure.
    """
    quadrature = source.quadrature if isinstance(source, Report) else source
    curve = quadrature.density(sigma=sigma, linthresh=linthresh)
    values, converged = _outliers(source)
    floor = 0.1 * float(_height_of_one(curve, quadrature.size, curve.grid[[0, -1]]).min())
    figure, ax = axes(ax, 6.4, 4.0)
    grid, mean = curve.grid.numpy(), curve.values.numpy()
    if bool(torch.isfinite(curve.stderr).all()):
        error = curve.stderr.numpy()
        low, high = np.maximum(mean - error, floor / 10), np.maximum(mean + error, floor / 10)
        ax.fill_between(grid, low, high, color=BLUE, alpha=0.25, linewidth=0, label="one standard error")
    ax.plot(grid, np.maximum(mean, floor / 10), color=BLUE, linewidth=1.3, label="density")
    if len(values):
        heights = _height_of_one(curve, quadrature.size, values).numpy()
        ax.vlines(values.numpy(), floor, heights, color=VERMILION, linewidth=0.9)
        for chosen, face, label in ((converged, VERMILION, "eigenvalue"), (~converged, "white", "not converged")):
            if bool(chosen.any()):
                points = (values[chosen].numpy(), heights[chosen.numpy()])
                ax.plot(*points, "o", markersize=4, color=VERMILION, markerfacecolor=face, label=label)
    ax.set_yscale("log")
    ax.set_ylim(floor, 3 * float(mean.max()))
    if linthresh is not None:
        ax.set_xscale("symlog", linthresh=linthresh)
    finish(ax, xlabel="eigenvalue", ylabel="density")
    unit = " (asinh units)" if linthresh is not None else ""
    ax.set_title(
        f"{title}\nn = {quadrature.size:,}, {_plural(quadrature.num_probes, 'probe')} $\\times$ "
        f"{_plural(quadrature.num_steps, 'Lanczos step')}, $\\sigma$ = {curve.sigma:.3g}{unit}",
        fontsize=10,
    )
    legend(ax, loc="upper right")
    return figure


def layers(report: Report, *, title: str = "Hessian trace by parameter tensor") -> Any:
    """The trace of every parameter tensor's block as bars in the network's order, and the same per parameter.

    Error bars are one standard error; the second panel's axis is logarithmic. The figure grows with the number of
    tensors. Weights (two axes or more) and vectors (biases, scales of normalizations) have colours of their own.

    Returns:
        The figure.
    """
    names = list(report.leaf_shapes)
    shares = [report.trace.per_leaf[name] for name in names]
    sizes = np.array([max(size, 1) for size in report.leaf_sizes.values()])
    value = np.array([float(share.value) for share in shares])
    error = np.array([float(share.stderr) for share in shares])
    error = np.where(np.isfinite(error), error, 0.0)
    weights = np.array([len(shape) > 1 for shape in report.leaf_shapes.values()])
    figure = new_figure(7.2, 1.3 + 0.19 * max(len(names), 4))
    panels = figure.subplots(1, 2, sharey=True)
    position = np.arange(len(names))
    for chosen, colour, kind in ((weights, BLUE, "weights"), (~weights, ORANGE, "biases, norms")):
        if chosen.any():
            style = {"ecolor": "black", "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
            bars = {"xerr": error[chosen], "height": 0.72, "color": colour, "label": kind, "error_kw": style}
            panels[0].barh(position[chosen], value[chosen], **bars)
            points = {"fmt": "o", "markersize": 3.5, "color": colour, "elinewidth": 1.0, "label": kind}
            panels[1].errorbar((value / sizes)[chosen], position[chosen], xerr=(error / sizes)[chosen], **points)
    for ax, label in ((panels[0], "trace"), (panels[1], "trace / number of parameters")):
        ax.axvline(0.0, color="black", linewidth=0.8)
        finish(ax, xlabel=label, ylabel="", grid="x")
    per_parameter_scale(panels[1], value / sizes, error / sizes)
    panels[0].set_yticks(position, names, fontsize=7)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2
    )
    total = f"total {float(report.trace):.4g} ± {float(report.trace.stderr):.2g}"
    figure.suptitle(f"{title}\n{total}, {len(report.trace.samples)} probes, bars: one standard error", fontsize=10)
    return figure


def surface(
    source: Surface | Report,
    *,
    kind: str = "both",
    labels: Sequence[str] | None = None,
    title: str = "Loss around the solution",
) -> Any:
    """The loss along one direction as a curve; along two as contours, as a surface in three dimensions, or both.

    Contours are evenly spaced in the logarithm where the losses span more than two decades; they are drawn through
    cubic splines of the grid's values (of their logarithms in that case). Points where the loss is infinite or NaN stay
    empty, and the contours then join the grid's values by straight lines.

    Args:
        source: a surface, or a report that has one.
        kind: ``"both"``, ``"contour"`` or ``"3d"``; no matter for one direction.
        labels: name of each direction; by default the eigenvalues of a report, "direction 1" otherwise.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: the report has no surface, or an option is not known.
    """
    check_choice(kind, ("both", "contour", "3d"), name="kind")
    if isinstance(source, Report):
        if source.surface is None:
            raise ValueError("source has no surface; pass surface_points= to analyze, or call loss_surface.")
        values = source.eigenpairs.eigenvalues.tolist()
        labels = labels or [
            f"eigenvector {i} ($\\lambda$ = {value:.3g})" for i, value in enumerate(values[:2], start=1)
        ]
        source = source.surface
    labels = labels or [f"direction {i}" for i in (1, 2)]
    if source.losses.dim() == 1:
        return _line(source, labels[0], title)
    x, y = (c.numpy() for c in source.coordinates)
    z = source.losses.numpy().T
    z = np.ma.masked_invalid(z)
    figure = new_figure(9.6 if kind == "both" else 5.2, 4.2)
    columns = 2 if kind == "both" else 1
    levels = levels_of(z)
    if kind != "3d":
        ax = figure.add_subplot(1, columns, 1)
        fine = refined(x, y, z, levels)
        extend = "min" if z.min() < levels[0] else "neither"
        filled = ax.contourf(*fine, levels=levels, cmap="viridis", norm=level_norm(levels), extend=extend)
        ax.contour(*fine, levels=levels, colors="white", linewidths=0.35, alpha=0.6)
        ax.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=1.6)
        bar = figure.colorbar(filled, ax=ax, fraction=0.05, pad=0.02, ticks=level_ticks(levels), format="%g")
        bar.set_label("loss", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        finish(ax, xlabel=f"step along {labels[0]}", ylabel=f"step along {labels[1]}", grid="")
    if kind != "contour":
        relief(figure.add_subplot(1, columns, columns, projection="3d"), x, y, z, labels, level_norm(levels))
    figure.suptitle(title, fontsize=10)
    return figure


def training(
    steps: Sequence[float] | Tensor,
    curves: Mapping[str, Any],
    *,
    xlabel: str = "step",
    ylabel: str = "",
    title: str = "",
    log: bool = False,
    ax: Any = None,
) -> Any:
    """Values against steps, with bands where an error is given.

    Args:
        steps: position of each value.
        curves: by name a sequence of values, or a pair ``(values, stderr)`` for a band of one standard error.
        xlabel: label of the axis of steps.
        ylabel: label of the axis of values.
        title: title of the axes.
        log: whether the axis of values is logarithmic.
        ax: axes to draw into instead of a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: a curve has not as many values as there are steps.
    """
    figure, ax = axes(ax, 6.0, 3.6)
    position = np.asarray(steps, dtype=float)
    for i, (name, curve) in enumerate(curves.items()):
        values, error = curve if isinstance(curve, tuple) else (curve, None)
        values = np.asarray(values, dtype=float)
        if values.shape != position.shape:
            raise ValueError(f"curves[{name!r}] has shape {values.shape}, but steps has {position.shape}.")
        colour = CYCLE[i % len(CYCLE)]
        if error is not None:
            error = np.asarray(error, dtype=float)
            ax.fill_between(position, values - error, values + error, color=colour, alpha=0.25, linewidth=0)
        ax.plot(position, values, color=colour, linewidth=1.4, marker="o", markersize=3, label=name)
    if log:
        ax.set_yscale("log")
    finish(ax, xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    if len(curves) > 1:
        legend(ax)
    return figure


def minibatch(
    source: MinibatchEigenvalues,
    *,
    whole: float | None = None,
    bins: int | str = "auto",
    title: str = "Largest eigenvalue of each mini-batch's Hessian",
    ax: Any = None,
) -> Any:
    """The distribution of the largest eigenvalues over mini-batches, with those below zero set off and counted.

    A histogram of the first of each batch, and behind it one of all k of them if there are several; lines at the mean
    of the first and at the eigenvalue of the whole data set, which is at most that mean for batches of one size.

    Args:
        source: from [`minibatch_eigenvalues`][hessfunc.minibatch_eigenvalues].
        whole: largest eigenvalue of the Hessian over all batches, for comparison.
        bins: number of bins, or a rule that NumPy knows.
        title: first line of the title; the second counts batches and negative values.
        ax: axes to draw into instead of a new figure.

    Returns:
        The figure.
    """
    figure, ax = axes(ax, 6.4, 3.8)
    values = source.eigenvalues.numpy()
    known, first = values[np.isfinite(values)], values[:, 0]
    edges = bin_edges(known, bins)
    if values.shape[1] > 1:
        label = f"the first {values.shape[1]} of each batch"
        ax.hist(known, edges, histtype="stepfilled", color=ORANGE, alpha=0.35, label=label)
    parts = ((first[first >= 0], BLUE, "first of each batch"), (first[first < 0], VERMILION, "below zero"))
    for part, colour, label in parts:
        if len(part):
            ax.hist(part, edges, color=colour, edgecolor="white", linewidth=0.4, label=label)
    ax.axvline(first.mean(), color="black", linewidth=1.2, label=f"mean, {first.mean():.3g}")
    if whole is not None:
        ax.axvline(whole, color="black", linewidth=1.2, linestyle="--", label=f"whole data, {whole:.3g}")
    finish(ax, xlabel="eigenvalue", ylabel="number", grid="y")
    ax.set_title(
        f"{title}\n{len(values):,} batches, {(known < 0).sum()} of {known.size:,} values below zero", fontsize=10
    )
    legend(ax, loc="best")
    return figure


def _outliers(source: Report | Quadrature) -> tuple[Tensor, Tensor]:
    """Known eigenvalues and whether each has converged."""
    if isinstance(source, Report):
        pairs = source.eigenpairs
        return pairs.eigenvalues.double(), pairs.converged
    return source.exact, torch.ones_like(source.exact, dtype=torch.bool)


def _height_of_one(curve: Density, size: int, points: Tensor) -> Tensor:
    """Peak of the density of a single eigenvalue at each of ``points``."""
    height = torch.full_like(points, 1 / (size * curve.sigma * math.sqrt(2 * math.pi)))
    return height if curve.linthresh is None else height / (points.square() + curve.linthresh**2).sqrt()


def _line(source: Surface, label: str, title: str) -> Any:
    figure, ax = axes(None, 5.2, 3.6)
    losses = np.ma.masked_invalid(source.losses.numpy())
    ax.plot(source.coordinates[0].numpy(), losses, color=BLUE, linewidth=1.4, marker="o", markersize=3)
    ax.axvline(0.0, color="black", linewidth=0.6, linestyle=":")
    finish(ax, xlabel=f"step along {label}", ylabel="loss")
    ax.set_title(title, fontsize=10)
    return figure


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
