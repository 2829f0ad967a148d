"""What the command line shows: progress bars and tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from hessfunc._tables import EIGENVALUE_COLUMNS, LEAF_COLUMNS, Rows, eigenvalue_cells, leaf_cells, number
from hessfunc.report import Report

STAGES = {
    "training": ("training", "step"),
    "eigenpairs": ("eigenpairs", "product"),
    "trace": ("trace", "product"),
    "density": ("density", "product"),
    "surface": ("loss surface", "loss"),
}


class Bars:
    """Progress bars on standard error, one a stage; called as ``bars(stage, done, total)``."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self.close()
            label, unit = STAGES[stage]
            self._stage, self._bar = stage, tqdm(desc=f"{label:12}", unit=f" {unit}", total=total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._stage, self._bar = "", None


def print_report(report: Report) -> None:
    """Print eigenvalues, trace, density and cost as tables on standard output."""
    console = Console()
    if not console.is_terminal:  # a log file has no width that a table would have to fit into
        console = Console(width=160)
    console.print(f"Hessian of {report.size:,} parameters in {len(report.leaf_shapes)} tensors")
    console.print(_table("Eigenvalues", EIGENVALUE_COLUMNS, eigenvalue_cells(report.eigenpairs)))
    leaves = leaf_cells(report.trace, report.leaf_shapes)
    console.print(_table("Trace by parameter tensor", LEAF_COLUMNS, leaves))
    low, high = report.trace.interval(0.95)
    console.print(f"Trace {number(report.trace)} (95 % interval {low:.4g} to {high:.4g})")
    console.print(str(report.quadrature), markup=False)
    cost = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    console.print(f"{sum(report.num_matvecs.values())} Hessian-vector products; {cost}")


def _table(title: str, columns: tuple[str, ...], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
