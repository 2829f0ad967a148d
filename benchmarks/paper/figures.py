"""The study's figures; every network of a figure on the same axes and scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import measurement
import numpy as np
import torch
from drawing import Asinh, curves, epoch_axis, finish, legend
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from records import Quantity, Table, accuracy, top, trace

import hessfunc as hf
from hessfunc import _canvas

COLOURS = _canvas.CYCLE
WHOLES = ("resnet", "no-norm", "no-residual")
VITS = ("vit-pre", "vit-post", "vit-none")
PARTS = ("stem", "stage1", "stage2", "stage3", "head")


def draw(table: Table, epochs: Sequence[int]) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure, one after the other."""
    thin = "Thin lines are single seeds, thick ones their medians"
    through = [("trace", "trace of the Hessian", trace), ("eigenvalue", "largest eigenvalue", top)]
    for name, label, quantity in through:
        caption = f"The {label} through training, by depth. {thin}."
        yield name, caption, _through_training(table, epochs, WHOLES, table.depths, label, quantity)
    yield (
        "accuracy",
        f"Test accuracy through training, by depth. {thin}.",
        _through_training(table, epochs, WHOLES, table.depths, "test accuracy", accuracy, log=False),
    )
    for depth in table.depths:
        caption = (
            f"Spectral density at depth {depth} through training (seed {table.seeds[0]}), on an eigenvalue axis that "
            "is linear around 0 and logarithmic beyond. The floor is a tenth of one eigenvalue."
        )
        yield f"density-{depth}", caption, _densities(table, epochs, WHOLES, depth)
    caption = f"Trace of each part of the network through training, at depth {table.depths[-1]}. {thin}."
    yield "stages", caption, _stages(table, epochs)
    yield (
        "lines",
        "Loss along the first eigenvector after training, less that at the centre, for all seeds and on one scale.",
        _lines(table),
    )
    for depth in table.depths:
        caption = (
            f"Loss along the first two eigenvectors at depth {depth} after training (seed {table.seeds[0]}); one scale "
            "of colours and heights for the three networks."
        )
        yield f"surface-{depth}", caption, _surfaces(table, depth)
    caption = "Trace against test accuracy after training, one point for each network and seed; by depth."
    yield "trace-accuracy", caption, _scatter(table)
    if table.depths_of("vit-pre"):
        (depth,) = table.depths_of("vit-pre")
        caption = f"Vision transformers with their norms before the branches, after them, or without. {thin}."
        yield "vit", caption, _transformers(table, epochs, depth)
        caption = (
            "The eigenvalues of largest magnitude of mini-batches' own Hessians after training: the largest of each "
            f"batch, and all five (seed {table.seeds[0]})."
        )
        yield "vit-minibatch", caption, _minibatches(table, depth)


def _through_training(
    table: Table,
    epochs: Sequence[int],
    variants: Sequence[str],
    depths: Sequence[int],
    label: str,
    quantity: Quantity,
    *,
    log: bool = True,
) -> Figure:
    figure = Figure(figsize=(3.3 * len(depths) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for ax, depth in zip(panels, depths, strict=True):
        for variant, colour in zip(variants, COLOURS, strict=False):
            curves(ax, table, epochs, variant, depth, quantity, colour, log=log)
        epoch_axis(ax, epochs)
        finish(ax, f"depth {depth}", "epoch", label if ax is panels[0] else "")
    legend(figure, panels[0])
    return figure


def _densities(table: Table, epochs: Sequence[int], variants: Sequence[str], depth: int) -> Figure:
    seed = table.seeds[0]
    found = {
        (variant, epoch): measurement.quadrature(measured)
        for variant in variants
        for epoch in epochs
        if (measured := table.measured(variant, depth, seed, epoch)) is not None
    }
    figure = Figure(figsize=(3.3 * len(variants) + 1.2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(variants), sharex=True, sharey=True, squeeze=False)[0]
    scale = Asinh(found.values())
    ranks = dict(zip(epochs, np.linspace(0.0, 0.9, len(epochs)), strict=True))
    for ax, variant in zip(panels, variants, strict=True):
        for epoch in epochs:
            if (variant, epoch) in found:
                scale.plot(ax, found[variant, epoch], color=colormaps["viridis"](ranks[epoch]), label=f"epoch {epoch}")
        scale.finish(ax)
        finish(ax, table.label(variant), "eigenvalue", "density (asinh units)" if ax is panels[0] else "")
        if not any(name == variant for name, _ in found):
            ax.text(0.5, 0.5, "diverged", transform=ax.transAxes, ha="center", color="0.4")
    legend(figure, max(panels, key=lambda ax: len(ax.lines)))
    return figure


def _stages(table: Table, epochs: Sequence[int]) -> Figure:
    depth = table.depths[-1]
    figure = Figure(figsize=(2.7 * len(PARTS) + 0.6, 3.3), layout="constrained")
    panels = figure.subplots(1, len(PARTS), sharey=True)
    for ax, part in zip(panels, PARTS, strict=True):
        share = _share(part)
        for variant, colour in zip(WHOLES, COLOURS, strict=False):
            curves(ax, table, epochs, variant, depth, share, colour, log=True)
        epoch_axis(ax, epochs)
        finish(ax, part, "epoch", "trace" if part == PARTS[0] else "")
    legend(figure, panels[0])
    return figure


def _share(part: str) -> Quantity:
    return lambda measured: measured["stages"][part]["value"]


def _lines(table: Table) -> Figure:
    figure = Figure(figsize=(3.3 * len(table.depths) + 0.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(table.depths), sharey=True, squeeze=False)[0]
    for ax, depth in zip(panels, table.depths, strict=True):
        for variant, colour in zip(WHOLES, COLOURS, strict=False):
            for seed in table.seeds:
                measured = table.measured(variant, depth, seed)
                if measured is not None:
                    line = measured["surfaces"]["line"]
                    losses = np.array(line["losses"], dtype=float)
                    label = table.label(variant) if seed == table.seeds[0] else None
                    ax.plot(line["steps"], losses - losses[len(losses) // 2], color=colour, linewidth=1.2, label=label)
        ax.set_yscale("symlog", linthresh=0.1)
        finish(ax, f"depth {depth}", "step along the first eigenvector", "rise of the loss" if ax is panels[0] else "")
    legend(figure, panels[0])
    return figure


def _surfaces(table: Table, depth: int) -> Figure:
    seed = table.seeds[0]
    found = {v: m for v in WHOLES if (m := table.measured(v, depth, seed)) is not None}
    planes = {variant: measurement.plane(measured["surfaces"]) for variant, measured in found.items()}
    losses = {variant: np.ma.masked_invalid(plane.losses.numpy()) for variant, plane in planes.items()}
    low = min((float(z.min()) for z in losses.values()), default=1.0)
    high = min(max((float(z.max()) for z in losses.values()), default=10.0), 1e4 * low)
    levels = np.geomspace(low, high if high > low else 2 * low, 25)
    norm = LogNorm(levels[0], levels[-1])
    figure = Figure(figsize=(10.2, 6.6), layout="constrained")
    filled, flat = None, []
    for column, variant in enumerate(WHOLES):
        ax = figure.add_subplot(2, 3, column + 1)
        flat.append(ax)
        if variant not in planes:
            finish(ax, f"{table.label(variant)}: diverged", "", "", grid=False)
            continue
        x, y = (axis.numpy() for axis in planes[variant].coordinates)
        z = losses[variant].T
        filled = ax.contourf(x, y, z, levels=levels, norm=norm, cmap="viridis", extend="max")
        ax.contour(x, y, z, levels=levels, colors="white", linewidths=0.35, alpha=0.6)
        ax.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=1.6)
        first, second = (f"{value:.3g}" for value in found[variant]["eigenvalues"])
        labels = f"eigenvector 1 ($\\lambda$ = {first})", f"eigenvector 2 ($\\lambda$ = {second})"
        finish(ax, table.label(variant), *labels, grid=False)
        solid = figure.add_subplot(2, 3, column + 4, projection="3d")
        heights = np.log10(np.minimum(z, levels[-1]).filled(np.nan))
        colours = {"cmap": "viridis", "vmin": np.log10(levels[0]), "vmax": np.log10(levels[-1])}
        solid.plot_surface(
            *np.meshgrid(x, y), heights, **colours, linewidth=0.15, edgecolor="0.35", rstride=1, cstride=1
        )
        solid.set_zlim(colours["vmin"], colours["vmax"])
        solid.set_zlabel("log10 of the loss", fontsize=8)
        solid.tick_params(labelsize=7, pad=0)
        solid.view_init(elev=30, azim=-55)
        solid.set_box_aspect((1, 1, 0.7), zoom=0.85)
    if filled is not None:
        bar = figure.colorbar(filled, ax=flat, pad=0.01, fraction=0.03)
        ticks = [tick for d in range(-4, 7) for tick in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= tick <= high]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_label("loss", fontsize=9)
    return figure


def _scatter(table: Table) -> Figure:
    figure = Figure(figsize=(3.3 * len(table.depths) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(table.depths), sharex=True, sharey=True, squeeze=False)[0]
    variants = [variant for variant in table.variants if not variant.startswith("vit")]
    kinds = {"no-norm": COLOURS[1], "no-residual": COLOURS[2], "resnet": COLOURS[0]}
    for ax, depth in zip(panels, table.depths, strict=True):
        for variant in variants:
            traces = table.values(variant, depth, trace)
            rights = table.values(variant, depth, accuracy)
            stage = variant[-1] if variant[-1].isdigit() else ""
            colour = kinds[variant[:-2] if stage else variant]
            style = {"color": colour, "linestyle": "none", "markersize": 6, "label": table.label(variant)}
            marker = {"": "o", "1": "^", "2": "s", "3": "D"}[stage]
            ax.plot(list(traces.values()), list(rights.values()), marker=marker, **style)
        ax.set_xscale("log")
        finish(ax, f"depth {depth}", "trace of the Hessian", "test accuracy" if ax is panels[0] else "")
    legend(figure, panels[0], columns=5)
    return figure


def _transformers(table: Table, epochs: Sequence[int], depth: int) -> Figure:
    figure = Figure(figsize=(13.4, 3.5), layout="constrained")
    panels = figure.subplots(1, 4)
    shown: list[tuple[str, Quantity, bool]] = [
        ("test accuracy", accuracy, False),
        ("trace of the Hessian", trace, True),
        ("largest eigenvalue", top, True),
    ]
    for ax, (label, quantity, log) in zip(panels[:3], shown, strict=True):
        for variant, colour in zip(VITS, COLOURS, strict=False):
            curves(ax, table, epochs, variant, depth, quantity, colour, log=log)
        epoch_axis(ax, epochs)
        finish(ax, label, "epoch", "")
    seed = table.seeds[0]
    found = {v: measurement.quadrature(m) for v in VITS if (m := table.measured(v, depth, seed)) is not None}
    scale = Asinh(found.values())
    for variant, colour in zip(VITS, COLOURS, strict=False):
        if variant in found:
            scale.plot(panels[3], found[variant], color=colour, label=table.label(variant))
    scale.finish(panels[3])
    finish(panels[3], f"spectral density after training (seed {seed})", "eigenvalue", "density (asinh units)")
    legend(figure, panels[0])
    return figure


def _minibatches(table: Table, depth: int) -> Figure:
    figure = Figure(figsize=(10.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for ax, variant in zip(panels, VITS, strict=True):
        measured = table.measured(variant, depth, table.seeds[0])
        if measured is None:
            continue
        stored = measured["minibatch"]
        values, residuals = (
            torch.tensor(_numbers(stored[name]), dtype=torch.float64) for name in ("eigenvalues", "residuals")
        )
        source = hf.MinibatchEigenvalues(values, residuals, stored["num_steps"])
        hf.plot.minibatch(source, title=table.label(variant), ax=ax)
    return figure


def _numbers(rows: Any) -> list[list[float]]:
    return [[float("nan") if value is None else value for value in row] for row in rows]
