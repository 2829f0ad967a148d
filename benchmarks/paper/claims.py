"""The paper's claims, each against what was measured: ratios and differences, paired by seed, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

from records import Interval, Quantity, Row, Table, accuracy, log, rise, support, top, trace
from scipy import stats

SHALLOW = 20
"""Up to this depth the paper calls a network shallow: at 20 the effect of BatchNorm has the other sign."""


def rows(table: Table) -> list[Row]:
    """All claims."""
    return [
        _against_baseline(
            table,
            "Removing BatchNorm lowers the trace of shallow networks and raises that of deeper ones",
            "depth 20: lower; depth 32: about 10,000 against 2,000",
            trace,
            "no-norm",
            raises=lambda depth: depth > SHALLOW,
        ),
        *(
            _against_baseline(
                table, f"Removing residual connections raises {what} at every depth", "raised", quantity, "no-residual"
            )
            for what, quantity in (
                ("the trace", trace),
                ("the largest eigenvalue", top),
                ("the support of the spectral density", support),
            )
        ),
        *(_with_depth(table, what, quantity) for what, quantity in (("trace", trace), ("largest eigenvalue", top))),
        *_collapse(table),
        _accuracy(table, "no-norm", "92.01 to 87.27 (20), 92.05 to 66.57 (32), 92.37 to 53.65 (38)"),
        _accuracy(table, "no-residual", "92.01 to 90.66 (20), 92.05 to 89.80 (32), 92.37 to 88.92 (38)"),
        *_stages(table),
        _against_baseline(
            table,
            "The loss rises more steeply along the eigenvectors without residual connections",
            "corners at depth 38: about 15 against 10",
            rise,
            "no-residual",
        ),
        _against_baseline(
            table,
            "The loss rises more steeply along the eigenvectors without BatchNorm, in deeper networks",
            "corners at depth 38: above 30 against 10",
            rise,
            "no-norm",
            concerns=lambda depth: depth > SHALLOW,
        ),
        _rank_correlation(table),
    ]


def _against_baseline(
    table: Table,
    claim: str,
    paper: str,
    quantity: Quantity,
    variant: str,
    *,
    raises: Callable[[int], bool] = lambda _depth: True,
    concerns: Callable[[int], bool] = lambda _depth: True,
) -> Row:
    cells = []
    for depth in filter(concerns, table.depths):
        ratio = table.compared(log(quantity), (variant, depth, None), ("resnet", depth, None))
        verdict = ratio.verdict(above=0.0) if raises(depth) else ratio.verdict(below=0.0)
        cells.append((f"depth {depth}", _known(ratio, ratio.times()), verdict))
    return Row(claim, paper, tuple(cells))


def _with_depth(table: Table, what: str, quantity: Quantity) -> Row:
    """Whether taking the shortcuts out does more in the deepest network than in the shallowest."""
    low, high = table.depths[0], table.depths[-1]
    by_depth = []
    for depth in (low, high):
        ours, base = (table.values(name, depth, log(quantity)) for name in ("no-residual", "resnet"))
        by_depth.append({seed: ours[seed] - base[seed] for seed in ours if seed in base})
    growth = Interval.of([by_depth[1][s] - by_depth[0][s] for s in by_depth[1] if s in by_depth[0]])
    cell = (f"depth {high} over {low}", _known(growth, growth.times()), growth.verdict(above=0.0))
    return Row(f"Removing residual connections raises the {what} the more, the deeper the network", "yes", (cell,))


def _collapse(table: Table) -> list[Row]:
    """Early: support against that with BatchNorm. Later: support at the end against the early one."""
    early = min((epoch for epoch in _epochs(table) if epoch > 0), default=table.last)
    narrow, spread = [], []
    for depth in table.depths:
        first = table.compared(log(support), ("no-norm", depth, early), ("resnet", depth, early))
        later = table.compared(log(support), ("no-norm", depth, None), ("no-norm", depth, early))
        narrow.append((f"depth {depth}", _known(first, first.times()), first.verdict(below=0.0)))
        spread.append((f"depth {depth}", _known(later, later.times()), later.verdict(above=0.0)))
    claim = "Without BatchNorm the spectrum "
    return [
        Row(f"{claim}is narrow early in training (epoch {early}, against the ResNet)", "near 0", tuple(narrow)),
        Row(f"{claim}spreads later (last epoch against epoch {early})", "outliers appear", tuple(spread)),
    ]


def _accuracy(table: Table, variant: str, paper: str) -> Row:
    cells = []
    for depth in table.depths:
        loss = table.compared(accuracy, (variant, depth, None), ("resnet", depth, None))
        cells.append((f"depth {depth}", _known(loss, loss.plain(100, " points")), loss.verdict(below=0.0)))
    what = {"no-norm": "BatchNorm", "no-residual": "residual connections"}[variant]
    return Row(f"Removing {what} costs test accuracy", paper, tuple(cells))


def _stages(table: Table) -> list[Row]:
    """Stage 3 against the dearer of the other two, and the three without shortcuts against the ResNet."""
    worst_trace, worst_accuracy, little = [], [], []
    for depth in table.depths:
        traces, rights = (
            {stage: table.values(f"no-norm-{stage}", depth, quantity) for stage in (1, 2, 3)}
            for quantity in (log(trace), accuracy)
        )
        common = [seed for seed in table.seeds if all(seed in traces[stage] for stage in traces)]
        rest = Interval.of([traces[3][s] - max(traces[1][s], traces[2][s]) for s in common])
        cost = Interval.of([rights[3][s] - min(rights[1][s], rights[2][s]) for s in common])
        worst_trace.append((f"depth {depth}", _known(rest, rest.times()), rest.verdict(above=0.0)))
        worst_accuracy.append((f"depth {depth}", _known(cost, cost.plain(100, " points")), cost.verdict(below=0.0)))
        for stage in (1, 2, 3):
            change = table.compared(accuracy, (f"no-residual-{stage}", depth, None), ("resnet", depth, None))
            text = _known(change, change.plain(100, " points"))
            little.append((f"depth {depth}, stage {stage}", text, change.verdict(above=-0.025)))
    return [
        Row(
            "Of the stages, the third without BatchNorm has the largest trace (against the larger of the others)",
            "most growth in stage 3",
            tuple(worst_trace),
        ),
        Row(
            "Of the stages, the third without BatchNorm costs most accuracy (against the worse of the others)",
            "depth 32: 88.57 against 91.94",
            tuple(worst_accuracy),
        ),
        Row(
            "Removing one stage's residual connections costs little (less than 2.5 points)",
            "at most 2.3 points",
            tuple(little),
        ),
    ]


def _rank_correlation(table: Table) -> Row:
    """Spearman's coefficient over all networks of a depth, and over all depths, for each seed."""
    cells = []
    groups = [([depth], f"depth {depth}") for depth in table.depths] + [(table.depths, "all depths")]
    for depths, name in groups:
        found = []
        for seed in table.seeds:
            pairs = [
                (trace(measured), accuracy(measured))
                for variant in table.variants
                for depth in depths
                if not variant.startswith("vit") and (measured := table.measured(variant, depth, seed)) is not None
            ]
            if len(pairs) > 2:
                found.append(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
        correlation = Interval.of([value for value in found if math.isfinite(value)])
        cells.append((name, _known(correlation, correlation.plain()), correlation.verdict(below=0.0)))
    claim = "A larger trace goes with a lower accuracy (Spearman's rank correlation over the networks)"
    return Row(claim, "trace tracks the loss of accuracy", tuple(cells))


def _epochs(table: Table) -> list[int]:
    found = table.record("resnet", table.depths[0], table.seeds[0])["measured"]
    return sorted(int(epoch) for epoch in found)


def _known(interval: Interval, text: str) -> str:
    return "not measured: training diverged" if math.isnan(interval.mean) else text
