"""How the cost of a product and of a density grows: with parameters, probes, batches and Lanczos steps.

Claim: the cost of a product stays about the same multiple of a gradient from 10^4 to 10^8 parameters; per batch it does
not rise with the number of batches, nor per probe with that of probes where activations are not small next to the
parameters; a density costs its products, so time is linear in the steps (with full reorthogonalization it is not). All
in gradients of one batch timed in the same run.

    python benchmarks/bench_scaling.py --out results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import _harness as harness
import _models as models
import torch

import hessfunc as hf

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
PROBES = (1, 2, 4, 8, 16, 32)
BATCHES = (1, 2, 4, 8, 16)
STEPS = (12, 25, 50, 100, 200)

Point = tuple[str, float, harness.Call, float, harness.Call]
"""Curve, position on it, the call, what to divide its time by, and the gradient to compare with."""


def _rows(problem: models.Problem, num: int) -> torch.Tensor:
    like = next(iter(problem.params.values()))
    return torch.randn(num, problem.size, generator=torch.Generator().manual_seed(0)).to(like)


def over_sizes(options: harness.Settings) -> Iterable[Point]:
    """One product and four at once, on networks of two hidden layers and a batch of 32."""
    for size in SIZES[:2] if options.quick else SIZES:
        problem = models.mlp_of_size(size, dtype=options.torch_dtype, device=options.device)
        H = hf.hessian(problem.loss, problem.params, problem.batch)
        for num in (1, 4):
            rows = _rows(problem, num)
            curve = "product" if num == 1 else "four products at once, each"
            yield curve, problem.size, lambda H=H, rows=rows: H.rows(rows), num, problem.gradient


def over_probes(options: harness.Settings) -> Iterable[Point]:
    """Products at once, per product."""
    for name in options.models:
        problem = _build(name, 1, options)
        H = hf.hessian(problem.loss, problem.params, problem.batch)
        for num in PROBES[:2] if options.quick else PROBES:
            rows = _rows(problem, num)
            yield name, num, lambda H=H, rows=rows: H.rows(rows), num, problem.gradient


def over_batches(options: harness.Settings) -> Iterable[Point]:
    """One product over several batches, per batch."""
    for name in options.models:
        counts = BATCHES[:2] if options.quick else BATCHES
        problem = _build(name, counts[-1], options)
        row = _rows(problem, 1)
        for num in counts:
            H = hf.hessian(problem.loss, problem.params, problem.batches[:num])
            yield name, num, lambda H=H, row=row: H.rows(row), num, problem.gradient


def over_steps(options: harness.Settings) -> Iterable[Point]:
    """Density with four probes, in all, with and without reorthogonalization."""
    for name in options.models[:1]:
        problem = _build(name, 1, options)
        H = hf.hessian(problem.loss, problem.params, problem.batch)
        for kind in ("none", "full"):
            for steps in (4, 8) if options.quick else STEPS:

                def call(kind: str = kind, steps: int = steps, H: hf.Operator = H) -> None:
                    generator = torch.Generator().manual_seed(0)
                    how = {"reorthogonalize": kind, "exact_outliers": False}
                    hf.slq(H, num_steps=steps, num_probes=4, generator=generator, **how)

                yield f"{name}, reorthogonalize={kind!r}", steps, call, 1, problem.gradient


def _build(name: str, num_batches: int, options: harness.Settings) -> models.Problem:
    where = {"dtype": options.torch_dtype, "device": options.device}
    return models.build(name, num_batches=num_batches, quick=options.quick, **where)


SWEEPS: dict[str, tuple[Callable[[harness.Settings], Iterable[Point]], str]] = {
    "parameters": (over_sizes, "gradients per product"),
    "probes": (over_probes, "gradients per probe"),
    "batches": (over_batches, "gradients per batch"),
    "steps": (over_steps, "gradients"),
}


def sweep(axis: str, options: harness.Settings) -> list[harness.Record]:
    """Time one point after the other, each in turns with its gradient."""
    records = []
    for curve, position, call, per, gradient in SWEEPS[axis][0](options):
        calls = {"gradient": gradient, "call": call}
        # Enough that a program for as many lanes is made before the first round
        times = harness.interleaved(calls, repeats=options.repeats, device=options.device, burn_in=6)
        gradients = harness.multiples(times["call"], times["gradient"], per=per)
        seconds = harness.Spread.of(times["call"])
        records.append({"axis": axis, "curve": curve, axis: position, "gradients": gradients, "seconds": seconds})
    return records


def plot(records: list[harness.Record], path: Path) -> None:
    """One panel for each axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(record["axis"] for record in records))
    figure, panels = plt.subplots(1, len(axes), figsize=(5 * len(axes), 4), layout="constrained", squeeze=False)
    for panel, axis in zip(panels.flat, axes, strict=True):
        of_axis = [record for record in records if record["axis"] == axis]
        for curve in dict.fromkeys(record["curve"] for record in of_axis):
            points = [record for record in of_axis if record["curve"] == curve]
            middle = [record["gradients"].median for record in points]
            low = [record["gradients"].median - record["gradients"].low for record in points]
            high = [record["gradients"].high - record["gradients"].median for record in points]
            positions = [record[axis] for record in points]
            panel.errorbar(positions, middle, [low, high], marker="o", markersize=4, capsize=2, label=curve)
        panel.set(xscale="log", xlabel=axis, ylabel=SWEEPS[axis][1])
        if axis != "parameters":
            ticks = sorted({record[axis] for record in of_axis})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
        panel.set_yscale("log") if axis == "steps" else panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; with ``--out`` also draw ``bench_scaling.png``."""
    parser = harness.parser(__doc__, models=models.NAMES, repeats=7)
    parser.add_argument("--axes", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="which curves")
    arguments: argparse.Namespace = parser.parse_args(argv)
    options = harness.settings(arguments)
    tables, records = [], []
    for axis in arguments.axes:
        of_axis = sweep(axis, options)
        records += of_axis
        tables.append(harness.Table(f"Cost against {axis}", of_axis, ["curve", axis, "gradients", "seconds"]))
        print(f"{axis}: done", file=sys.stderr)
    harness.report("bench_scaling", tables, records, options)
    if options.out is not None:
        plot(records, Path(options.out) / "bench_scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
