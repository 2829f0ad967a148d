"""Figures without pyplot: canvases, axes and their looks. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.interpolate import RectBivariateSpline

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, on a canvas of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "hessfunc.plot draws with matplotlib, which is not installed; run: pip install 'hessfunc[cli]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes(ax: Any, width: float, height: float) -> tuple[Any, Any]:
    """The figure of ``ax`` and ``ax``; both new if it is None."""
    if ax is not None:
        return ax.figure, ax
    figure = new_figure(width, height)
    return figure, figure.subplots()


def finish(ax: Any, *, xlabel: str, ylabel: str, grid: str = "both") -> None:
    """Labels, a quiet grid along ``"x"``, ``"y"``, ``"both"`` or none (``""``), and no box."""
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(axis=grid, color="0.88", linewidth=0.6)
        ax.set_axisbelow(True)


def legend(ax: Any, **options: Any) -> None:
    """A legend without a frame that the grid does not run through."""
    box = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.85, "fancybox": False}
    ax.legend(fontsize=8, **box, **options)


def bin_edges(values: np.ndarray, bins: int | str) -> np.ndarray:
    """Edges of a histogram, moved so that no bin holds values on both sides of zero."""
    edges = np.histogram_bin_edges(values, bins=bins)
    if not edges[0] < 0 < edges[-1]:
        return edges
    width = edges[1] - edges[0]
    return width * np.arange(np.floor(edges[0] / width), np.ceil(edges[-1] / width) + 1)


def per_parameter_scale(ax: Any, values: np.ndarray, errors: np.ndarray) -> None:
    """A logarithmic x axis, for values that differ by orders of magnitude; symmetric if noise makes some negative."""
    magnitudes = np.abs(values)
    if not magnitudes.max() > 0:
        return
    largest, smallest = float((magnitudes + errors).max()), float(magnitudes[magnitudes > 0].min())
    smallest = max(smallest, 1e-6 * largest)
    if values.min() > 0:
        ax.set_xscale("log", nonpositive="clip")
        ax.set_xlim(smallest / 2, 2 * largest)
        return
    threshold = max(smallest, 1e-3 * largest)
    ax.set_xscale("symlog", linthresh=threshold, linscale=0.5)
    ax.set_xlim(min(2 * float((values - errors).min()), -threshold / 2), 2 * largest)


def levels_of(z: Any) -> np.ndarray:
    """Contour levels over the finite values of ``z``; geometric where these span more than two decades, over four."""
    low, high = (float(z.min()), float(z.max())) if z.count() else (0.0, 0.0)
    if low > 0 and high / low > 100:
        return np.geomspace(max(low, high / 1e4), high, 25)
    return np.linspace(low, high if high > low else low + (abs(low) or 1.0), 25)


def refined(x: np.ndarray, y: np.ndarray, z: Any, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Eight times as many points by cubic splines, of logarithms for geometric levels; unless some are masked."""
    if np.ma.getmaskarray(z).any() or min(z.shape) < 4:
        return x, y, z
    logarithmic = _geometric(levels)
    values = np.log(z.filled()) if logarithmic else z.filled()
    dense_x, dense_y = (np.linspace(axis[0], axis[-1], 8 * len(axis)) for axis in (x, y))
    spline = RectBivariateSpline(y, x, values)(dense_y, dense_x)
    return dense_x, dense_y, np.exp(spline) if logarithmic else spline


def level_norm(levels: np.ndarray) -> Any:
    """Colours in step with contour levels: logarithmic where these are geometric."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if _geometric(levels) else Normalize)(levels[0], levels[-1])


def level_ticks(levels: np.ndarray) -> np.ndarray:
    """Round numbers within the levels for a colour bar: 1, 2 and 5 times powers of ten where these are geometric."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = float(levels[0]), float(levels[-1])
    decades = np.log10(high / low) if _geometric(levels) else 0.0
    locator = LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)) if decades else MaxNLocator(6)
    ticks = np.asarray(locator.tick_values(low, high))
    return ticks[(ticks >= low) & (ticks <= high)]


def _geometric(levels: np.ndarray) -> bool:
    return levels[0] > 0 and levels[-1] / levels[0] > 100


def relief(ax: Any, x: np.ndarray, y: np.ndarray, z: Any, labels: Sequence[str], norm: Any) -> None:
    """A surface over the plane in axes of three dimensions; masked points stay empty."""
    from matplotlib.ticker import MaxNLocator

    columns, rows = np.meshgrid(x, y)
    filled = z.filled(np.nan)
    ax.plot_surface(
        columns, rows, filled, cmap="viridis", norm=norm, rstride=1, cstride=1, linewidth=0.15, edgecolor="0.35"
    )
    ax.view_init(elev=32, azim=-55)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(labels[0], fontsize=8, labelpad=4)
    ax.set_ylabel(labels[1], fontsize=8, labelpad=4)
    ax.set_zlabel("loss", fontsize=9, labelpad=2)
    ax.tick_params(labelsize=7, pad=0)
    ax.set_box_aspect((1, 1, 0.72), zoom=0.84)
