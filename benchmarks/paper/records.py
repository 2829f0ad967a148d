"""The study's records as a table to ask: a quantity of a network by seed, and differences of two with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

HOLDS, CONTRADICTED, OPEN = "holds", "contradicted", "undecided"

Record = dict[str, Any]
Quantity = Callable[[Record], float]


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval, by Student's t; infinitely wide for a single seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """From one value for each seed."""
        mean = float(np.mean(values)) if len(values) else math.nan
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
        return cls(mean, mean - half, mean + half)

    def verdict(self, *, above: float | None = None, below: float | None = None) -> str:
        """Whether the interval lies on the side that is claimed, on the other, or on both."""
        bound, sign = (above, 1) if above is not None else (below, -1)
        low, high = sorted((sign * (self.low - bound), sign * (self.high - bound)))
        return HOLDS if low > 0 else CONTRADICTED if high < 0 else OPEN

    def times(self) -> str:
        """Text of a ratio, from its logarithm."""
        if math.isinf(self.low):
            return f"{math.exp(self.mean):.2f}x"
        return f"{math.exp(self.mean):.2f}x [{_short(math.exp(self.low))}, {_short(math.exp(self.high))}]"

    def plain(self, scale: float = 1.0, unit: str = "") -> str:
        """Text of a difference."""
        if math.isinf(self.low):
            return f"{scale * self.mean:+.2f}{unit}"
        return f"{scale * self.mean:+.2f}{unit} [{scale * self.low:+.2f}, {scale * self.high:+.2f}]"


@dataclass(frozen=True)
class Row:
    """A claim, the paper's number for it, and what was measured at each depth, with a verdict for each."""

    claim: str
    paper: str
    measured: tuple[tuple[str, str, str], ...]

    @property
    def verdict(self) -> str:
        """That of all depths together: it holds if it holds at each, and is contradicted if at one."""
        found = {verdict for _, _, verdict in self.measured}
        return CONTRADICTED if CONTRADICTED in found else OPEN if OPEN in found or not found else HOLDS


class Table:
    """The records of a study, to be asked for a quantity of a network at an epoch, by seed."""

    def __init__(self, records: Iterable[Record], last_epoch: int) -> None:
        self._records = {(r["variant"], r["depth"], r["seed"]): r for r in records}
        self.last = last_epoch
        self.depths = sorted({depth for variant, depth, _ in self._records if not variant.startswith("vit")})
        self.seeds = sorted({seed for _, _, seed in self._records})
        self.variants = list(dict.fromkeys(variant for variant, _, _ in self._records))

    def depths_of(self, variant: str) -> list[int]:
        """The depths at which there is such a network."""
        return sorted({depth for name, depth, _ in self._records if name == variant})

    def label(self, variant: str) -> str:
        """What figures and tables call it."""
        return next(r["label"] for (name, _, _), r in self._records.items() if name == variant)

    def record(self, variant: str, depth: int, seed: int) -> Record:
        """All about one network."""
        return self._records[variant, depth, seed]

    def measured(self, variant: str, depth: int, seed: int, epoch: int | None = None) -> Record | None:
        """What was measured after ``epoch``, by default the last; None if the loss or a product was not finite."""
        found = self.record(variant, depth, seed)["measured"].get(str(self.last if epoch is None else epoch))
        return None if found is None or "failed" in found else found

    def values(self, variant: str, depth: int, quantity: Quantity, epoch: int | None = None) -> dict[int, float]:
        """By seed, those that were measured."""
        found = {seed: self.measured(variant, depth, seed, epoch) for seed in self.seeds}
        return {seed: quantity(record) for seed, record in found.items() if record is not None}

    def compared(
        self, quantity: Quantity, one: tuple[str, int, int | None], other: tuple[str, int, int | None]
    ) -> Interval:
        """Mean over seeds of the difference of a quantity between two networks, given as variant, depth and epoch."""
        first, second = (self.values(name, depth, quantity, epoch) for name, depth, epoch in (one, other))
        differences = [first[seed] - second[seed] for seed in self.seeds if seed in first and seed in second]
        return Interval.of([value for value in differences if math.isfinite(value)])


def trace(measured: Record) -> float:
    """Trace of the Hessian."""
    return measured["trace"]["value"]


def top(measured: Record) -> float:
    """Largest eigenvalue."""
    return measured["eigenvalues"][0]


def support(measured: Record) -> float:
    """Width of the spectrum, from the smallest to the largest Ritz value."""
    return measured["support"][1] - measured["support"][0]


def accuracy(measured: Record) -> float:
    """Share of the test images that is classified correctly."""
    return measured["accuracy"]["test"]


def rise(measured: Record) -> float:
    """Mean loss on the rim of the surface along two eigenvectors, less that at its centre."""
    losses = np.array(measured["surfaces"]["plane"]["losses"], dtype=float)
    middle = len(losses) // 2
    rim = np.concatenate([losses[0], losses[-1], losses[1:-1, 0], losses[1:-1, -1]])
    return float(np.nanmean(rim) - losses[middle, middle])


def log(quantity: Quantity) -> Quantity:
    """The logarithm of a quantity; NaN where it is not positive."""

    def logarithm(measured: Record) -> float:
        value = quantity(measured)
        return math.log(value) if value > 0 else math.nan

    return logarithm


def _short(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.1g}"
