"""The variance of ``|B v|^2`` for a random probe ``v``, from pairs of products."""

from __future__ import annotations

from dataclasses import replace

import torch

from hessfunc._deflation import leaf_sums
from hessfunc._estimate import Estimate
from hessfunc._operators import Operator
from hessfunc._probe_law import SIGNED, Entries, ProbeLaw, blocks
from hessfunc._probes import Sampler, normal, sphere
from hessfunc._typing import Tensor


class Scatter(Entries):
    """The same with the sum of squared deviations from the mean, entry by entry."""

    def __init__(self, H: Operator) -> None:
        super().__init__(H)
        self.squares = torch.zeros_like(self.mean)

    def absorb(self, row: Tensor) -> None:
        """Take in a row, overwritten as by ``Entries``."""
        super().absorb(row)
        self.squares.addcmul_(row, row)


class SquareLaw:
    """Estimates ``Var |B v|^2``, for the error of the mean of ``|B v|^2`` over probes.

    Formula: ``|B v|^2`` is the quadratic form of ``M = B^2``, with the variances that [`ProbeLaw`][] has. Products with
    ``M`` are not at hand, but ``E[<B u, B v>^2] = |M|_F^2`` for independent probes: the summands are those of each
    probe and the one before it. From these the squared diagonal of ``M`` is taken off with signs, ``tr(M)^2 / n`` on
    the sphere, nothing for normal probes.

    With signs ``<B u, B v>`` is taken without the part of the diagonal ``d`` of ``B``, ``sum_i u_i v_i d_i^2``, which
    would be pure noise; what is left of the diagonal of ``M`` are the variances of the entries of ``v * B v``, whose
    squares are known and taken off.

    The share of a leaf, with ``E`` the projector onto its entries, is the form of ``M = B E B``. With signs the
    diagonal of that is not known; it is at least as large as if it were constant, so the result is a bound.

    Cost: seven vectors with signs, two otherwise, and some passes over each product.

    Args:
        sampler: what draws the probes.
        H: the operator the products are of.
        linear: the law of ``<v, B v>`` for the same probes, which is told of them too if they are signs.
    """

    def __init__(self, sampler: Sampler, H: Operator, linear: ProbeLaw | None = None) -> None:
        self.sampler, self.H, self.linear = sampler, H, linear
        self.entries = Scatter(H) if sampler in SIGNED else None
        self.count = 0
        self.last: tuple[Tensor, Tensor] | None = None
        self.pairs: list[Tensor] = []

    def add(self, probes: Tensor, products: Tensor) -> None:
        """Take in probes and their products with ``B``, rows of shape ``(k, n)``."""
        if self.sampler not in (*SIGNED, normal, sphere):
            return
        for some, images in blocks(probes, products):
            pairs = torch.empty_like(images)
            terms = some * images if self.entries is not None else images
            for probe, product, pair, term in zip(some, images, pairs, terms, strict=True):
                known = probe
                if self.entries is not None:
                    self.entries.absorb(term)
                    known = probe * self.entries.mean
                last = self.last or (known, product)
                torch.mul(product, last[1], out=pair)
                if self.entries is not None:
                    pair.addcmul_(known, last[0], value=-1)
                self.last = known, product
            counts = torch.arange(
                self.count + 1, self.count + len(images) + 1, dtype=torch.float64, device="cpu"
            ).clamp(min=2)
            self.count += len(images)
            # The means that are taken off have in them a part of the pair itself.
            part = 1 / (counts * (counts - 1)).unsqueeze(1) if self.entries is not None else 0.0
            self.pairs.append(leaf_sums(pairs, self.H) / (1 - part))
            if self.entries is not None and self.linear is not None:
                self.linear.take(terms)
        if self.last is not None:  # the rows may be the caller's to overwrite
            self.last = self.last[0].clone(), self.last[1].clone()

    def applied(self, plain: Estimate) -> Estimate:
        """With the larger of the standard errors by the law and by the spread of the samples, by leaf too.

        Degrees of freedom go by ``r = |M|_F^2 / tr(M)^2``, one over the effective rank, which pairs tell far better
        than they tell their own spread: ``1 / dof = 1 / (k - 1) + 4 r / k`` for k samples. The second part is what a
        form of ``M``, whose square the variance is in proportion to, varies by; the first what ``r`` does.
        """
        count, leaves = len(plain.samples), plain.leaf_samples
        if count == 1 or not self.pairs or leaves is None:
            return plain
        found, samples = (torch.cat([x, x.sum(1, keepdim=True)], dim=1) for x in (torch.cat(self.pairs)[1:], leaves))
        mean = found.square().mean(0)
        variance = 2 * (mean - self._diagonal(leaves)).clamp(min=0)
        stderr = (torch.maximum(variance, samples.var(0)) / count).sqrt()
        ratio = (mean / (samples[1:] * samples[:-1]).mean(0)).nan_to_num(0.0).clamp(0, 1)
        dof = 1 / (1 / (count - 1) + 4 * ratio / count)
        return replace(
            plain,
            stderr=torch.maximum(stderr[-1], plain.stderr),
            dof=float(dof[-1]),
            leaf_stderr=stderr[:-1],
            leaf_dof=dof[:-1],
        )

    def _diagonal(self, leaves: Tensor) -> Tensor:
        """What the summands have of the squared diagonal of ``M``: for each leaf, and for the whole."""
        if self.sampler is normal:
            return torch.zeros(leaves.shape[1] + 1, dtype=torch.float64, device="cpu")
        if self.entries is None:
            shares = leaves.mean(0)
            return torch.cat([shares, shares.sum(0, keepdim=True)]).square() / self.H.size
        freedom = self.count - 1
        variances = (self.entries.squares / freedom).unsqueeze(0)
        shares = leaf_sums(variances, self.H)[0].square() / self.H.size
        # The square of a sample variance is larger in the mean than that of the variance, by this much if normal.
        whole = leaf_sums(variances.square_(), self.H).sum(1) / (1 + 2 / freedom)
        return torch.cat([shares, whole])
