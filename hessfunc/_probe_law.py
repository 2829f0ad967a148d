"""The variance of a random probe's quadratic form, from the law of the probes and the products at hand."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hessfunc import tree
from hessfunc._estimate import Estimate
from hessfunc._probes import Sampler, normal, signs, sphere
from hessfunc._typing import Tensor


class ProbeLaw:
    """Estimates ``Var <v, B v>`` from products with a symmetric ``B``, without bias, for the error of their mean.

    Formula, with ``s`` the sum over entries of the sample variance of ``v * B v``:

    * signs: ``Var = 2 sum over i != j of B_ij^2 = 2 E[s]``, as entry i of ``v * B v`` has variance
      ``sum over j != i of B_ij^2``;
    * normal: ``Var = 2 |B|_F^2 = 2 E[|B v|^2]``;
    * sphere, of dimension n: ``Var = 2 n / (n + 2) |B - tr(B) / n|_F^2 = 2 E[|B v - <v, B v> / n v|^2]``.

    Each is a mean of summands, one for a probe. Where a few eigenvalues make up most of ``B``, ``<v, B v>`` is skewed,
    and few samples of it seldom show their spread; these summands are squares where the spread has fourth powers.
    Other probes have laws of their own, and nothing is known then.

    Cost: two vectors with signs, one otherwise, whatever the number of probes, and some passes over each product.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.mean: Tensor | None = None  # of v * B v
        self.num_probes = 0
        self.norms: list[Tensor] = []
        self.weights: list[float] = []

    def add(self, probes: Tensor, products: Tensor) -> None:
        """Take in probes and their products with ``B``, rows of shape ``(k, n)``."""
        if self.sampler not in (signs, normal, sphere):
            return
        products = products.to(tree.accumulation_dtype(products.dtype))
        # Row by row: memory does not grow, and the result does not depend on how many probes come at a time
        for probe, product in zip(probes, products, strict=True):
            known = self.num_probes
            self.num_probes += 1
            if self.sampler is normal:
                self._append(product, 1.0)
            elif self.sampler is sphere:
                self._append(product - probe * (tree.flat_dot(probe.to(product), product) / len(probe)), 1.0)
            elif self.mean is None:
                self.mean = probe * product
            else:
                # Welford's update: sums of squares would cancel where the diagonal is large
                gap = (probe * product).sub_(self.mean)
                self.mean.add_(gap, alpha=1 / self.num_probes)
                self._append(gap, known / self.num_probes)

    def _append(self, vector: Tensor, weight: float) -> None:
        self.norms.append(tree.flat_norm(vector))
        self.weights.append(2 * weight)

    def applied(self, plain: Estimate) -> Estimate:
        """With the larger of the standard errors by the law and by the spread of the samples.

        The spread remains as a floor since it also sees what is not the probes' noise, such as products that are not
        those of one symmetric matrix. Degrees of freedom are those of the mean of the summands by Satterthwaite's
        formula, ``2 mean^2 / Var(mean)``. To the summands' spread, itself from few, one deviation is added of the size
        it has when ``B`` is of rank one, the worst case: then the degrees are at most the square of their number.
        """
        if plain.samples.shape[0] == 1 or not self.norms:
            return plain
        weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")
        summands = torch.stack(self.norms).cpu().double().square() * weights
        unit = float(summands.max())
        if not 0 < unit < math.inf:
            return plain
        shares = summands / unit  # so that no square overflows
        mean = float(shares.mean())
        spread = float((shares - mean).square().sum())
        dof = 2 * (len(shares) * mean) ** 2 / (spread + 2 * mean**2)
        known = math.sqrt(mean / plain.samples.shape[0]) * math.sqrt(unit)
        return replace(plain, stderr=plain.stderr.clamp(min=known), dof=dof)
