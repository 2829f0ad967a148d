"""The variance of a random probe's quadratic form, from the law of the probes and the products at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from hessfunc._deflation import leaf_sums
from hessfunc._estimate import Estimate
from hessfunc._operators import Operator
from hessfunc._probes import Sampler, jittered, normal, signs, sphere
from hessfunc._typing import Tensor

SIGNED = (signs, jittered)

_BLOCK = 2**18
"""Entries to work on at a time: few enough to stay in the cache."""

_RATIOS = torch.linspace(1, 2, 21, dtype=torch.float64, device="cpu")


class Entries:
    """Mean, entry by entry, of rows that come one after the other, by Welford's updates.

    Sums of squares would cancel where the mean is large.
    """

    def __init__(self, H: Operator) -> None:
        self.count = 0
        self.mean = torch.zeros(H.size, dtype=H.dtype, device=H.device)

    def absorb(self, row: Tensor) -> None:
        """Take in a row; it is overwritten by what its squares add to the sum of squared deviations from the mean."""
        row.sub_(self.mean)
        self.count += 1
        self.mean.add_(row, alpha=1 / self.count)
        row.mul_(math.sqrt(1 - 1 / self.count))


class ProbeLaw:
    """Estimates ``Var <v, B v>`` from products with a symmetric ``B``, without bias, for the error of their mean.

    Formula, with ``s`` the sum over entries of the sample variance of ``v * B v``:

    * signs: ``Var = 2 sum over i != j of B_ij^2 = 2 E[s]``, as entry i of ``v * B v`` has variance
      ``sum over j != i of B_ij^2``;
    * normal: ``Var = 2 |B|_F^2 = 2 E[|B v|^2]``;
    * sphere, of dimension n: ``Var = 2 n / (n + 2) |B - tr(B) / n|_F^2 = 2 E[|B v|^2 - <v, B v>^2 / n]``.

    Each is a mean of summands, one for a probe. Where a few eigenvalues make up most of ``B``, ``<v, B v>`` is skewed,
    and few samples of it seldom show their spread; these summands are squares where the spread has fourth powers.
    Other probes have laws of their own, and nothing is known then.

    Summed over the entries of one leaf alone, without the factor 2, they have a mean ``S``, and the variance of the
    leaf's share of ``<v, B v>`` is between ``S``, if ``B`` couples its entries to those of other leaves, and ``2 S``,
    if to one another: see [`leaf_errors`][].

    Cost: a vector with signs, and some passes over each product.
    """

    def __init__(self, sampler: Sampler, H: Operator) -> None:
        self.sampler, self.H = sampler, H
        self.entries: Entries | None = None
        self.leaves: list[Tensor] = []
        self.whole: list[Tensor] = []

    def add(self, probes: Tensor, products: Tensor) -> None:
        """Take in probes and their products with ``B``, rows of shape ``(k, n)``."""
        for some, images in blocks(probes, products):
            if self.sampler in SIGNED:
                self.entries = self.entries or Entries(self.H)
                terms = some * images
                for row in terms:
                    self.entries.absorb(row)
                self.take(terms)
            elif self.sampler in (normal, sphere):
                squares = leaf_sums(images.square(), self.H)
                values = leaf_sums(some * images, self.H) * (self.sampler is sphere)
                self.leaves.append(squares - values.square() / self.H.size)
                self.whole.append(squares.sum(1) - values.sum(1).square() / self.H.size)

    def take(self, deviations: Tensor) -> None:
        """Take in what [`Entries`][] make of ``v * B v`` for further probes ``v``; overwritten."""
        self.leaves.append(leaf_sums(deviations.square_(), self.H))
        self.whole.append(self.leaves[-1].sum(1))

    def applied(self, plain: Estimate) -> Estimate:
        """With the larger of the standard errors by the law and by the spread of the samples.

        The spread remains as a floor since it also sees what is not the probes' noise, such as products that are not
        those of one symmetric matrix.
        """
        first = int(self.sampler in SIGNED)  # one probe tells no variance
        if len(plain.samples) == 1 or not self.whole or plain.leaf_samples is None:
            return plain
        mean, dof = law_mean(torch.cat(self.whole)[first:])
        if not 0 < float(mean) < math.inf:
            return plain
        stderr = plain.stderr.clamp(min=math.sqrt(2 * float(mean) / len(plain.samples)))
        leaf_stderr, leaf_dof = leaf_errors(plain.leaf_samples, torch.cat(self.leaves)[first:])
        return replace(plain, stderr=stderr, dof=float(dof), leaf_stderr=leaf_stderr, leaf_dof=leaf_dof)


def blocks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, some at a time."""
    length = max(1, _BLOCK // rows[0].shape[1])
    return zip(*(part.split(length) for part in rows), strict=True)


def law_mean(summands: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis, and its degrees of freedom.

    These are by Satterthwaite's formula, ``2 mean^2 / Var(mean)``. To the summands' spread, itself from few, one
    deviation is added of the size it has when the matrix is of rank one, the worst case: then the degrees are at most
    the square of their number.
    """
    unit = summands.amax(0)
    unit = torch.where((unit > 0) & (unit < math.inf), unit, 1.0)
    shares = summands / unit  # so that no square overflows
    mean = shares.mean(0)
    spread = (shares - mean).square().sum(0)
    return unit * mean, 2 * (len(shares) * mean).square() / (spread + 2 * mean.square())


def leaf_errors(samples: Tensor, summands: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of the leaves' means, and their degrees of freedom; both of shape ``(num_leaves,)``.

    The variance of a sample is between ``S``, the mean of the summands, and ``2 S``. Their ratio is taken for uniform
    between 1 and 2, and its mean given the spread of the samples is put in; the spread itself if that is larger. What
    the spread is worth goes by its own degrees of freedom ``d``: ``1 / d = 1 / (k - 1) + 6 / dof`` for ``k`` samples of
    quadratic forms, whose kurtosis is six times what ``S`` knows of its own error.

    Args:
        samples: shape ``(k, num_leaves)``.
        summands: estimates of ``S`` from one probe each, shape ``(m, num_leaves)``.
    """
    count = len(samples)
    spread = samples.var(0)
    mean, dof = law_mean(summands)
    known = (mean > 0) & (mean < math.inf)
    mean, dof = torch.where(known, mean, 1.0), torch.where(known, dof, 1.0)
    worth = 1 / (1 / (count - 1) + 6 / dof)
    # The likelihood of a spread that is chi-squared
    likelihood = -worth / 2 * (_RATIOS.log().unsqueeze(1) + spread / mean / _RATIOS.unsqueeze(1))
    variance = torch.where(known, mean * (_RATIOS @ likelihood.softmax(0)), 0.0)
    return (torch.maximum(variance, spread) / count).sqrt(), torch.where(known, dof, float(count - 1))
