"""When an estimate from random probes is good enough: a fixed number of probes, or a confidence interval to reach."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from hessfunc._checks import ConvergenceWarning, check_count, check_positive
from hessfunc._estimate import Estimate, check_confidence

FIRST = 8
"""Probes before the first look at the interval: fewer give no usable standard error."""

SAFETY = 1.1
"""Part by which the next batch overshoots the predicted need, so that one more look is seldom needed."""


@dataclass(frozen=True)
class Stopping:
    """Either ``num_probes``, or the half-width of the confidence interval to reach within ``max_probes``."""

    num_probes: int | None
    rtol: float | None
    atol: float | None
    confidence: float
    max_probes: int

    @classmethod
    def of(
        cls,
        num_probes: int | None,
        rtol: float | None,
        atol: float | None,
        confidence: float,
        max_probes: int,
        *,
        minimum: int = 1,
    ) -> Stopping:
        """Check the options; ``minimum`` is the least number of probes the method can do with.

        Raises:
            ValueError: both a number of probes and a tolerance are given, or neither, or one is out of range.
        """
        if num_probes is None and rtol is None and atol is None:
            raise ValueError(
                "num_probes, rtol and atol are all None; pass num_probes=100 for a fixed number of probes, or "
                "rtol=0.05 (or atol) to stop once the confidence interval is that narrow."
            )
        if num_probes is not None and (rtol is not None or atol is not None):
            raise ValueError(
                f"num_probes={num_probes} fixes the number of probes, so rtol={rtol}, atol={atol} would do nothing; "
                "pass one or the other, and max_probes to bound the number of probes under a tolerance."
            )
        if num_probes is not None:
            check_count(num_probes, name="num_probes", minimum=minimum)
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None:
                check_positive(tolerance, name=name)
        check_confidence(confidence)
        check_count(max_probes, name="max_probes", minimum=2)
        return cls(num_probes, rtol, atol, confidence, max_probes)

    def starting(self, adaptive: int) -> int:
        """Probes in the first batch: that many if there is a tolerance."""
        return min(adaptive, self.max_probes) if self.num_probes is None else self.num_probes

    def following(self, estimate: Estimate, count: int, *, growth: float = 2.0) -> int | None:
        """Number of probes in all to go on to, or ``None`` to stop.

        The standard error falls as ``1 / sqrt(count)``, which predicts the need; a batch as large as that makes few
        passes over the data and few looks at the interval, each of which is a chance to stop on luck. Early standard
        errors are rough, hence the bound on ``growth``.
        """
        if self.met(estimate) or count >= self.max_probes or self.num_probes is not None:
            return None
        goal = self._goal(estimate)
        ratio = estimate.half_width(self.confidence) / goal if goal > 0 else math.inf
        return math.ceil(min(SAFETY * count * ratio**2, growth * count, self.max_probes))

    def met(self, estimate: Estimate) -> bool:
        """Whether the interval is as narrow as was asked; always so without a tolerance."""
        return self.num_probes is not None or estimate.half_width(self.confidence) <= self._goal(estimate)

    def warn_unless_met(self, estimate: Estimate, *, method: str, advice: str, stacklevel: int) -> None:
        """Say what was reached where the probes ran out before the tolerance was met."""
        if self.met(estimate):
            return
        half, value = estimate.half_width(self.confidence), abs(float(estimate.value))
        relative = f" ({half / value:.2g} of the value)" if value > 0 else ""
        asked = " or ".join(f"{n}={t:g}" for n, t in (("rtol", self.rtol), ("atol", self.atol)) if t is not None)
        warnings.warn(
            f"{method}: the {self.confidence:.0%} interval is {float(estimate.value):.6g} ± {half:.2g}{relative} after "
            f"max_probes={self.max_probes}, wider than {asked}. {advice}",
            ConvergenceWarning,
            stacklevel=stacklevel + 1,
        )

    def _goal(self, estimate: Estimate) -> float:
        return max((self.rtol or 0.0) * abs(float(estimate.value)), self.atol or 0.0)
