"""What was measured along a training, record by record and stacked into a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hessfunc._estimate import Estimate
from hessfunc._typing import Tensor


@dataclass(frozen=True)
class TrackRecord:
    """The numbers of one step, without vectors; tensors are float64 and on the CPU.

    Attributes:
        eigenvalues: as [`eigsh`][hessfunc.eigsh] returns them, shape ``(k,)``.
        residuals: ``|H v - lambda v|``, shape ``(k,)``.
        converged: whether each residual is within the tolerance, shape ``(k,)``, bool.
        overlaps: squared length of each eigenvector's projection onto the span of those of the step before, between 0
            and 1, shape ``(k,)``; NaN in the first step.
        trace: the trace with its standard error, or ``None`` without probes.
        num_matvecs: products spent.
        seconds: wall-clock time spent.
        seconds_between: time from the end of the step before to the beginning of this one, in which the training
            went on: known to [`track`][hessfunc.track] alone, and NaN otherwise.
    """

    eigenvalues: Tensor
    residuals: Tensor
    converged: Tensor
    overlaps: Tensor
    trace: Estimate | None
    num_matvecs: int
    seconds: float
    seconds_between: float = float("nan")


@dataclass(frozen=True)
class Trajectory:
    """Records stacked, one row for each; tensors are on the CPU.

    Attributes:
        steps: position of each record in training, shape ``(num_records,)``.
        eigenvalues: shape ``(num_records, k)``.
        residuals: shape ``(num_records, k)``.
        converged: shape ``(num_records, k)``, bool.
        overlaps: shape ``(num_records, k)``.
        trace: shape ``(num_records,)``; NaN without probes.
        trace_stderr: shape ``(num_records,)``.
        num_matvecs: shape ``(num_records,)``.
        seconds: time spent on each record, shape ``(num_records,)``.
        seconds_between: time of the training before each, shape ``(num_records,)``.
    """

    steps: Tensor
    eigenvalues: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    converged: Tensor = field(repr=False)
    overlaps: Tensor = field(repr=False)
    trace: Tensor = field(repr=False)
    trace_stderr: Tensor = field(repr=False)
    num_matvecs: Tensor = field(repr=False)
    seconds: Tensor = field(repr=False)
    seconds_between: Tensor = field(repr=False)

    @classmethod
    def of(cls, records: Iterable[TrackRecord], *, steps: Sequence[float] | None = None) -> Trajectory:
        """Stack records, which are consumed here if they come from a generator.

        Args:
            records: from [`track`][hessfunc.track] or [`track_step`][hessfunc.track_step].
            steps: position of each in training; by default 0, 1, 2 and so on.

        Raises:
            ValueError: there are no records, or not as many as steps.
        """
        rows = list(records)
        if not rows:
            raise ValueError("records is empty: points yielded no parameters.")
        position = list(range(len(rows)) if steps is None else steps)
        if len(position) != len(rows):
            raise ValueError(f"steps has {len(position)} entries for {len(rows)} records; give one for each.")
        vectors = ("eigenvalues", "residuals", "converged", "overlaps")
        numbers = ("num_matvecs", "seconds", "seconds_between")
        return cls(
            steps=torch.tensor(position, device="cpu"),
            trace=_column([float("nan") if row.trace is None else float(row.trace) for row in rows]),
            trace_stderr=_column([float("nan") if row.trace is None else float(row.trace.stderr) for row in rows]),
            **{name: torch.stack([getattr(row, name) for row in rows]) for name in vectors},
            **{name: torch.tensor([getattr(row, name) for row in rows], device="cpu") for name in numbers},
        )

    @property
    def share(self) -> float:
        """Time spent on all records but the first, over that of the training between them: 0.1 is 10 % more.

        The first record is left out, since it traces the product and starts at random.
        """
        return float(self.seconds[1:].sum() / self.seconds_between[1:].sum())

    def columns(self) -> dict[str, list[float]]:
        """The table that ``save`` writes, column by column; ``eigenvalue_1`` is the first."""
        table = {"step": self.steps.tolist()}
        for name in ("eigenvalue", "residual", "converged", "overlap"):
            values = getattr(self, name if name == "converged" else name + "s")
            table |= {f"{name}_{i}": column.tolist() for i, column in enumerate(values.unbind(1), start=1)}
        names = ("trace", "trace_stderr", "num_matvecs", "seconds", "seconds_between")
        return table | {name: getattr(self, name).tolist() for name in names}

    def save(self, path: str | Path) -> Path:
        """Write the table as CSV, with a line of names; returns the path."""
        table = self.columns()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
        return Path(path)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
