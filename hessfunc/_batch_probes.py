"""Samples of a trace from probes of which each batch of the data has its own."""

from __future__ import annotations

import torch

from hessfunc._chunks import check_samples, draw
from hessfunc._deflation import Deflation
from hessfunc._estimate import Estimate
from hessfunc._operators import Operator
from hessfunc._probe_law import ProbeLaw, Summands, with_errors
from hessfunc._probes import Sampler
from hessfunc._stopping import FIRST
from hessfunc._typing import Tensor


class BatchProbes:
    """Hutchinson's estimator of a sum of matrices, with independent probes for each.

    Formula: with ``H = sum_b w_b H_b`` and independent ``v_b``, ``sum_b w_b <v_b, H_b v_b>`` has the mean ``tr H`` and
    the variance ``sum_b w_b^2 Var <v_b, H_b v_b>``, where one probe for all has ``Var <v, H v>``: for normal probes
    ``2 sum_b w_b^2 |H_b|_F^2`` and ``2 |H|_F^2``, which is larger by twice ``w_a w_b tr(H_a H_b)`` for each pair of
    batches. That is positive where batches curve in the same directions, and never negative for semidefinite matrices.

    Variances are told likewise, each batch's by the law of its probes ([`ProbeLaw`][]), so that all batches together
    tell them well with few probes each.

    Attributes:
        count: probes of each batch so far.
        fewest_at_a_time: number of them at a time that tells a variance with signs.
    """

    fewest_at_a_time = 2

    def __init__(self, H: Operator, known: Deflation, sampler: Sampler, chunk: int, generator: torch.Generator) -> None:
        if H.terms is None:
            raise ValueError(
                "per_batch=True needs an operator that is known as a sum over batches: hessfunc.hessian, ggn or fisher "
                "of a list or loader of batches, or a sum or multiple of such; H has no terms. Leave per_batch out."
            )
        self._H, self._known, self._sampler, self._generator = H, known, sampler, generator
        self._chunk = chunk
        self._samples: list[Tensor] = []
        self._summands: list[list[Summands]] = []
        self._divisor = 1.0
        self.count = 0

    @property
    def fewest(self) -> int:
        """Number of probes of each batch that tell a standard error, as all batches together do."""
        least = -(-FIRST // len(self._summands)) if self._summands else 0
        return max(self.fewest_at_a_time, least)

    def take(self, num_probes: int) -> None:
        """So many probes more for each batch, some in each pass over the data."""
        for start in range(0, num_probes, self._chunk):
            self._pass(min(self._chunk, num_probes - start))

    def _pass(self, num_probes: int) -> None:
        H, terms = self._H, self._H.terms
        assert terms is not None
        total = torch.zeros(num_probes, len(H.layout.sizes), dtype=torch.float64, device="cpu")
        divisor = 0.0
        for position, term in enumerate(terms()):
            (probes,) = draw(H, num_probes, self._sampler, num_probes, self._generator)
            found, products = self._known.remainders(H, term.rows, probes)
            check_samples(found)
            total += term.weight * found
            divisor += term.divisor
            law = ProbeLaw(self._sampler, H)  # anew in each pass, not to hold a vector for each batch
            law.add(probes, products)
            if position == len(self._summands):
                self._summands.append([])
            self._summands[position].append(law.summands().scaled(term.weight**2))
        self._samples.append(total)
        self._divisor = divisor
        self.count += num_probes

    def estimate(self) -> Estimate:
        """The mean over all probes so far."""
        leaf_samples = torch.cat(self._samples) / self._divisor + self._known.leaf_traces
        plain = Estimate.of(
            leaf_samples.sum(1),
            num_matvecs=self.count + self._known.num_matvecs,
            leaf_samples=leaf_samples,
            leaf_names=self._H.layout.names,
        )
        joined = [Summands(*map(torch.cat, zip(*parts, strict=True))) for parts in self._summands]
        return with_errors(plain, [summands.scaled(self._divisor**-2) for summands in joined])
