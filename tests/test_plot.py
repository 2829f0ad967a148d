"""Figures: what is drawn, that it is drawn without pyplot, and that it comes out as an image."""

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from example_reports import SHAPES, example_report
from matplotlib import image
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import hessfunc
from hessfunc import plot
from hessfunc.surface import Surface


def drawn(figure, tmp_path, *, width, height):
    """Render, check the size in inches, and return the pixels."""
    path = tmp_path / "figure.png"
    figure.savefig(path, dpi=50)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (round(50 * height), round(50 * width))
    assert pixels[..., :3].std() > 0.05  # not blank
    return pixels


def test_density_draws_curve_band_and_stems(tmp_path):
    report = example_report()
    figure = plot.density(report)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    density = report.quadrature.density()
    curve = ax.lines[0]
    np.testing.assert_allclose(curve.get_xdata(), density.grid)
    one = 1 / (53 * density.sigma * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(curve.get_ydata(), density.values.clamp(min=one / 100))
    band, stems = ax.collections
    inside = density.values > one  # where nothing is clipped
    low, high = density.values - density.stderr, density.values + density.stderr
    drawn_low, drawn_high = band.get_datalim(ax.transData).intervaly
    assert drawn_high == pytest.approx(float(high.max()))
    assert drawn_low == pytest.approx(max(float(low.min()), one / 100))
    assert bool(inside.any())
    assert isinstance(stems, LineCollection)
    assert [segment[0][0] for segment in stems.get_segments()] == [30.0, 12.5, -4.0]
    assert [segment[1][1] for segment in stems.get_segments()] == pytest.approx([one] * 3)
    marks = {line.get_label(): line for line in ax.lines[1:]}
    assert list(marks["eigenvalue"].get_xdata()) == [30.0, 12.5]
    assert list(marks["not converged"].get_xdata()) == [-4.0]
    assert marks["not converged"].get_markerfacecolor() == "white"
    assert ax.get_yscale() == "log"
    assert ax.get_xscale() == "linear"
    assert ax.get_ylim()[0] == pytest.approx(one / 10)
    assert ax.get_xlabel() == "eigenvalue"
    assert ax.get_ylabel() == "density"
    title = ax.get_title()
    assert title.startswith("Spectral density of the Hessian\nn = 53, 4 probes ")
    assert "5 Lanczos steps" in title
    assert f"= {density.sigma:.3g}" in title
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["one standard error", "density", "eigenvalue", "not converged"]
    drawn(figure, tmp_path, width=6.4, height=4.0)


def test_density_of_a_quadrature_marks_its_exact_outliers(tmp_path):
    quadrature = example_report().quadrature
    figure = plot.density(quadrature, sigma=0.5, title="My net")
    (ax,) = figure.axes
    assert [segment[0][0] for segment in ax.collections[1].get_segments()] == [30.0]
    assert ax.get_title().startswith("My net\n")
    assert "= 0.5" in ax.get_title()
    np.testing.assert_allclose(ax.lines[0].get_xdata(), quadrature.density(sigma=0.5).grid)
    drawn(figure, tmp_path, width=6.4, height=4.0)


def test_density_of_one_probe_has_no_band_and_says_one_probe():
    quadrature = example_report().quadrature
    single = dataclasses.replace(
        quadrature, nodes=quadrature.nodes[:1], weights=quadrature.weights[:1], num_exact=0, num_steps=1
    )
    (ax,) = plot.density(single).axes
    assert len(ax.collections) == 0
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["density"]
    assert "1 probe " in ax.get_title()
    assert "1 Lanczos step," in ax.get_title()


def test_density_on_a_symmetric_logarithmic_axis(tmp_path):
    report = example_report()
    figure = plot.density(report, linthresh=0.1)
    (ax,) = figure.axes
    assert ax.get_xscale() == "symlog"
    assert "(asinh units)" in ax.get_title()
    density = report.quadrature.density(linthresh=0.1)
    heights = [segment[1][1] for segment in ax.collections[1].get_segments()]
    expected = [1 / (53 * density.sigma * math.sqrt(2 * math.pi) * math.hypot(x, 0.1)) for x in (30, 12.5, -4)]
    assert heights == pytest.approx(expected)
    drawn(figure, tmp_path, width=6.4, height=4.0)


def test_drawing_into_given_axes():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot.density(example_report(), ax=left) is figure
    assert plot.training([1, 2], {"loss": [2.0, 1.0]}, ax=right) is figure
    assert left.get_title()
    assert len(right.lines) == 1


def test_layers_draws_every_tensor_with_its_error(tmp_path):
    report = example_report()
    figure = plot.layers(report, title="Traces")
    bars, dots = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == list(SHAPES)
    shares = report.trace.per_leaf
    # two groups, each in the network's order: weights, then vectors
    ordered = ["conv.weight", "head.weight", "conv.bias", "scale"]
    assert [patch.get_width() for patch in bars.patches] == pytest.approx([float(shares[n]) for n in ordered])
    assert [patch.get_y() + patch.get_height() / 2 for patch in bars.patches] == pytest.approx([0, 2, 1, 3])
    errors = [
        segment for group in bars.containers if hasattr(group, "lines") for segment in group.lines[2][0].get_segments()
    ]
    assert [(s[1][0] - s[0][0]) / 2 for s in errors] == pytest.approx([float(shares[n].stderr) for n in ordered])
    per_parameter = np.concatenate([line.get_xdata() for group in dots.containers for line in [group.lines[0]]])
    assert list(per_parameter) == pytest.approx([float(shares[n]) / report.leaf_sizes[n] for n in ordered])
    assert dots.get_xscale() == "log"
    assert bars.get_xlabel() == "trace"
    assert dots.get_xlabel() == "trace / number of parameters"
    assert bars.get_ylim()[0] > bars.get_ylim()[1]  # the first tensor is on top
    assert figure.get_suptitle().startswith(f"Traces\ntotal {float(report.trace):.4g} ± ")
    assert "6 probes" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["weights", "biases, norms"]
    drawn(figure, tmp_path, width=7.2, height=1.3 + 0.19 * 4)


def test_layers_grows_with_the_number_of_tensors_and_takes_negative_shares(tmp_path):
    shapes = {f"stage{i // 20}.block{i}.weight": (2, 2) for i in range(70)}
    report = example_report(shapes)
    samples = report.trace.leaf_samples.clone()
    samples[:, 3] *= -1
    samples[:, 4] = 0
    report = dataclasses.replace(report, trace=dataclasses.replace(report.trace, leaf_samples=samples))
    figure = plot.layers(report)
    assert figure.axes[1].get_xscale() == "symlog"
    low, high = figure.axes[1].get_xlim()
    share = report.trace.per_leaf["stage0.block3.weight"]
    assert low <= (float(share) - float(share.stderr)) / 4
    assert high > 0
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == 70
    drawn(figure, tmp_path, width=7.2, height=1.3 + 0.19 * 70)
    # neighbouring labels do not run into each other
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


def test_layers_of_zero_curvature(tmp_path):
    report = example_report()
    zero = torch.zeros_like(report.trace.leaf_samples)
    report = dataclasses.replace(report, trace=dataclasses.replace(report.trace, leaf_samples=zero))
    drawn(plot.layers(report), tmp_path, width=7.2, height=1.3 + 0.19 * 4)


def test_surface_of_two_directions(tmp_path):
    report = example_report()
    figure = plot.surface(report, title="Around")
    contour, bar, relief = sorted(figure.axes, key=lambda ax: ["step", "", "eige"].index(ax.get_xlabel()[:4]))
    assert contour.get_xlabel() == "step along eigenvector 1 ($\\lambda$ = 30)"
    assert contour.get_ylabel() == "step along eigenvector 2 ($\\lambda$ = 12.5)"
    assert contour.get_xlim() == (-1, 1)
    assert contour.get_ylim() == (-2, 2)
    assert bar.get_ylabel() == "loss"
    assert relief.name == "3d"
    assert relief.get_zlabel() == "loss"
    assert figure.get_suptitle() == "Around"
    drawn(figure, tmp_path, width=9.6, height=4.2)


def test_contours_lie_where_the_losses_are(tmp_path):
    x, y = torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 3)
    tilted = Surface((x.double(), y.double()), (x[:, None] + 0 * y[None]).double(), {})
    figure = plot.surface(tilted, kind="contour", labels=["across", "up"])
    pixels = drawn(figure, tmp_path, width=5.2, height=4.2)
    ax = figure.axes[0]
    assert ax.get_xlabel() == "step along across"
    assert ax.get_ylabel() == "step along up"
    box = ax.get_window_extent()
    rows = slice(int(210 - box.y1 * 50 / figure.dpi) + 5, int(210 - box.y0 * 50 / figure.dpi) - 5)
    column = lambda share: int((box.x0 + share * box.width) * 50 / figure.dpi)  # noqa: E731
    left, right = (pixels[rows, column(s), :3].mean(0) for s in (0.06, 0.94))
    assert left[2] > right[2]  # viridis runs from violet to yellow as the loss grows along the first direction
    assert left[1] < right[1]


def test_surface_kinds_and_labels(tmp_path):
    plain = example_report().surface
    solid = plot.surface(plain, kind="3d")
    assert [ax.name for ax in solid.axes] == ["3d"]
    assert solid.axes[0].get_xlabel() == "direction 1"
    drawn(solid, tmp_path, width=5.2, height=4.2)
    with pytest.raises(ValueError, match="kind='solid' is not known"):
        plot.surface(plain, kind="solid")
    with pytest.raises(ValueError, match="source has no surface; pass surface_points= to analyze"):
        plot.surface(example_report(dimensions=0))


def test_surface_levels_are_logarithmic_over_wide_ranges_and_skip_overflow(tmp_path):
    plain = example_report().surface
    losses = (10 ** (plain.losses * 2)).clone()
    losses[0, 0], losses[-1, -1] = math.inf, math.nan
    figure = plot.surface(Surface(plain.coordinates, losses, {}), kind="both")
    bar = next(ax for ax in figure.axes if ax.get_ylabel() == "loss" and ax.name != "3d")
    assert bar.get_yscale() == "log"
    drawn(figure, tmp_path, width=9.6, height=4.2)
    for constant in (torch.zeros_like(losses), torch.full_like(losses, 3.0), torch.full_like(losses, math.nan)):
        drawn(plot.surface(Surface(plain.coordinates, constant, {})), tmp_path, width=9.6, height=4.2)


def test_surface_of_one_direction_is_a_curve(tmp_path):
    report = example_report(dimensions=1)
    figure = plot.surface(report)
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.lines[0].get_xdata(), report.surface.coordinates[0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), report.surface.losses)
    assert ax.get_xlabel() == "step along eigenvector 1 ($\\lambda$ = 30)"
    assert ax.get_ylabel() == "loss"
    assert ax.get_title() == "Loss around the solution"
    drawn(figure, tmp_path, width=5.2, height=3.6)
    (ax,) = plot.surface(report.surface, labels=["gradient"], title="Line").axes
    assert ax.get_xlabel() == "step along gradient"
    assert ax.get_title() == "Line"


def test_training_draws_curves_with_bands(tmp_path):
    steps = torch.tensor([10, 20, 30])
    curves = {"loss": (torch.tensor([3.0, 2.0, 1.0]), [0.5, 0.25, 0.125]), "top eigenvalue": [4.0, 5.0, 6.0]}
    figure = plot.training(steps, curves, xlabel="epoch", ylabel="value", title="Run", log=True)
    (ax,) = figure.axes
    loss, top = ax.lines
    assert list(loss.get_xdata()) == [10, 20, 30]
    assert list(loss.get_ydata()) == [3, 2, 1]
    assert list(top.get_ydata()) == [4, 5, 6]
    assert loss.get_color() != top.get_color()
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).intervaly == pytest.approx([0.875, 3.5])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("epoch", "value", "Run")
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss", "top eigenvalue"]
    drawn(figure, tmp_path, width=6.0, height=3.6)
    (ax,) = plot.training(steps, {"only": [1, 2, 3]}).axes
    assert ax.get_yscale() == "linear"
    assert ax.get_xlabel() == "step"
    assert ax.get_legend() is None
    with pytest.raises(ValueError, match=r"curves\['loss'\] has shape \(2,\), but steps has \(3,\)"):
        plot.training(steps, {"loss": [1.0, 2.0]})


def test_pyplot_and_settings_are_left_alone(tmp_path):
    code = (
        "import matplotlib, sys\n"
        "settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from hessfunc import plot\n"
        "plot.training([1, 2], {'a': [1.0, 2.0]}).savefig(sys.argv[1])\n"
        "assert settings() == before, 'settings changed'\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure.png")], check=True)


def test_missing_matplotlib_is_named(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"draws with matplotlib, which is not installed; run: pip install 'hessfunc\[cli\]'"
    ):
        plot.density(example_report())
    assert hessfunc.__version__  # importing does not need it


def test_minibatch_counts_batches_and_sets_off_negative_ones(tmp_path):
    first = torch.tensor([-1.0, 0.5, 1.0, 1.5, 2.0, 4.0], dtype=torch.float64)
    values = torch.stack([first, torch.full_like(first, -0.25)], dim=1)
    values[0, 1] = math.nan
    result = hessfunc.MinibatchEigenvalues(values, torch.zeros_like(values), 5)
    figure = plot.minibatch(result, whole=1.25, bins=7)
    (ax,) = figure.axes
    bars = {container[0].get_label(): container for container in ax.containers}
    heights = {name: sum(bar.get_height() for bar in bars[name]) for name in ("first of each batch", "below zero")}
    assert heights == {"first of each batch": 5, "below zero": 1}
    assert all(bar.get_x() + bar.get_width() < 1e-12 for bar in bars["below zero"] if bar.get_height())
    assert all(bar.get_x() > -1e-12 for bar in bars["first of each batch"] if bar.get_height())
    assert ax.get_title().endswith("\n6 batches, 6 of 11 values below zero")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "the first 2 of each batch",
        "first of each batch",
        "below zero",
        "mean, 1.33",
        "whole data, 1.25",
    ]
    drawn(figure, tmp_path, width=6.4, height=3.8)


def test_minibatch_of_one_value_each_that_are_all_alike():
    values = torch.full((4, 1), 2.0, dtype=torch.float64)
    (ax,) = plot.minibatch(hessfunc.MinibatchEigenvalues(values, torch.zeros_like(values), 5), title="All alike").axes
    assert ax.get_title() == "All alike\n4 batches, 0 of 4 values below zero"
    assert len(ax.containers) == 1
