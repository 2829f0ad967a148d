"""Eigenvalues known well enough to carry their exact mass, and probes drawn from what they leave over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import chi2

from hessfunc._checks import check_like
from hessfunc._deflation import nearest_orthonormal, project_off
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._lanczos import Tridiagonal, eigh_tridiagonal
from hessfunc._operators import Operator
from hessfunc._quadrature import SHARE
from hessfunc._typing import Tensor

ISOLATION = 1e-2
"""A Ritz pair counts as one eigenpair if its residual is this part of the gap to the next Ritz value, or less."""

_LARGEST = 0.3
"""What the residual may be in gaps where the probe happens to have little weight on the pair."""

_RARE = 1e-6
"""Chance with which simple eigenvalues are taken for repeated ones."""


class Outliers(NamedTuple):
    """Eigenvalues with orthonormal eigenvectors.

    Attributes:
        values: shape ``(j,)``, float64, on the CPU.
        rows: eigenvectors, shape ``(j, size)``.
        reach: distance within which no other eigenvalue was seen, shape ``(j,)``, float64, on the CPU.
    """

    values: Tensor
    rows: Tensor
    reach: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """Vectors, one per row, without their part along the eigenvectors."""
        return project_off(self.rows, rows)

    def deflate(self, H: Operator) -> Operator:
        """``P H P`` on vectors in the range of ``P``, the projector off the eigenvectors.

        Without it rounding brings the outliers back into a run, where their copies use up steps (selective
        orthogonalization, Parlett and Scott 1979).
        """
        return Operator(H.like, lambda rows: self.project(H.rows(rows))) if len(self.values) else H

    def subset(self, mask: Tensor) -> Outliers:
        """The outliers where ``mask`` is true."""
        if bool(mask.all()):  # no copy of all vectors
            return self
        return Outliers(self.values[mask], self.rows[mask.to(self.rows.device)], self.reach[mask])

    def repeated(self, nodes: Tensor, weights: Tensor, size: int) -> Tensor:
        """Which outliers have a further copy in quadrature rows of probes orthogonal to them; shape ``(j,)``, bool."""
        if not len(nodes):
            return torch.zeros_like(self.values, dtype=torch.bool)
        near = (nodes - self.values[:, None, None]).abs() <= self.reach[:, None, None]
        copies = (size - len(self.values)) * (near * weights).sum(dim=2).mean(dim=1)
        return copies > SHARE


class RitzPairs(NamedTuple):
    """Ritz pairs of one reorthogonalized Lanczos run from a unit vector; all but the basis float64 and on the CPU.

    Attributes:
        values: ascending, shape ``(m,)``; m is less than the number of steps if the Krylov space was exhausted.
        weights: squared first components, shape ``(m,)``; their sum is 1.
        residuals: ``|H v - theta v|`` by the recurrence, shape ``(m,)``.
        coefficients: Ritz vectors in the basis, one per column, shape ``(m, m)``.
        basis: Lanczos vectors, shape ``(m, size)``.
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor
    coefficients: Tensor
    basis: Tensor

    @classmethod
    def of(cls, run: Tridiagonal) -> RitzPairs:
        """Solve the tridiagonal problem of a run on flat vectors."""
        broken = (run.betas == 0).nonzero().flatten()
        m = int(broken[0]) + 1 if broken.numel() else run.alphas.shape[0]
        last = 0.0 if broken.numel() else float(run.residual_norm)
        values, vectors = eigh_tridiagonal(run.alphas[:m], run.betas[: m - 1])
        return cls(values, vectors[0].square(), last * vectors[-1].abs(), vectors, run.basis[:m])

    def rows(self, which: Tensor) -> Tensor:
        """Ritz vectors by index, as rows of shape ``(len(which), size)``."""
        return self.coefficients[:, which].T.to(self.basis) @ self.basis

    def gaps(self, size: int) -> Tensor:
        """Distance from each Ritz value to the next one with a noticeable weight, infinite if there is none.

        Rounding can bring a further copy of a repeated eigenvalue into the space, with next to no weight.
        """
        distances = (self.values.unsqueeze(1) - self.values).abs().fill_diagonal_(torch.inf)
        return distances.masked_fill(size * self.weights <= SHARE, torch.inf).min(dim=1).values

    def isolated(self, size: int) -> Tensor:
        """Indices of the pairs that stand for one eigenpair each, as far as one run can tell.

        The residual has to be small against the gap to the next Ritz value: the vector is then one eigenvector and no
        mixture. Residuals go with the inverse of ``sqrt(weight)``, and a pair that is taken or left by its weight
        would bias that weight's estimate, so they are judged as if the weight were ``1 / size``.

        ``size`` times the weight of a simple eigenvalue is chi-squared with one degree of freedom; far larger ones
        belong to an eigenvalue of high multiplicity, as 0 often is.
        """
        typical = self.residuals * (size * self.weights).sqrt()
        small = torch.maximum(typical / ISOLATION, self.residuals / _LARGEST) <= self.gaps(size)
        light = size * self.weights <= chi2.isf(_RARE, 1)
        return (small & light).nonzero().flatten()

    def consistent(self, which: Tensor, size: int) -> bool:
        """Whether all these can be simple: their weight is no more than chance allows, and the rest has some."""
        others = torch.ones_like(self.weights, dtype=torch.bool)
        others[which] = False
        mass = size * float(self.weights[which].sum())
        left = float(self.weights[others].sum())
        return len(which) == size or (left > 1e-12 and mass <= chi2.isf(_RARE, max(len(which), 1)))

    def select(self, which: Tensor, size: int) -> Outliers:
        """The pairs of these indices as outliers."""
        # The basis of the run is orthonormal to the square root of the rounding unit only.
        rows = nearest_orthonormal(self.rows(which)) if len(which) else self.rows(which)
        return Outliers(self.values[which], rows, self.gaps(size)[which] / 4)


def no_outliers(H: Operator) -> Outliers:
    """None at all."""
    values = torch.empty(0, dtype=torch.float64, device="cpu")
    return Outliers(values, torch.empty(0, H.size, dtype=H.dtype, device=H.device), values)


def from_eigenpairs(pairs: Eigenpairs, H: Operator) -> Outliers:
    """The converged ones among given eigenpairs. One product, to see that they belong to ``H``.

    Raises:
        ValueError: the vectors are not like ``H.like``, not orthonormal, or no eigenvectors of ``H``.
    """
    check_like(pairs.eigenvectors, H.like, name="deflate.eigenvectors", reference="H.like", rows=True)
    rows = H.layout.ravel_rows(pairs.eigenvectors).detach()[pairs.converged]
    values = pairs.eigenvalues.detach()[pairs.converged].to(rows)
    # Vectors are kept in the leaves' own dtypes, which may be coarser than H.dtype.
    rounding = max(torch.finfo(H.dtype).eps ** 0.5, *(torch.finfo(dtype).eps for dtype in H.layout.dtypes))
    gram = rows @ rows.T
    off = float((gram - torch.eye(len(rows), dtype=gram.dtype, device=gram.device)).norm())
    if off > 1e-3 + rounding:
        raise ValueError(
            f"deflate.eigenvectors are not orthonormal: their inner products are off by {off:.2g}. Pass the result of "
            "hessfunc.eigsh on this operator."
        )
    gap = float((H.vector(rows.sum(dim=0)) - values @ rows).norm())
    allowed = float(pairs.residuals[pairs.converged].sum()) + rounding * float(values.abs().sum())
    if not gap <= allowed:
        raise ValueError(
            f"deflate holds no eigenpairs of this operator: the residual of their sum is {gap:.3g}, by their own "
            f"residuals it is at most {allowed:.3g}. Pairs of another checkpoint or other data can start a new search: "
            "hessfunc.eigsh(H, k, v0=pairs, generator=generator)."
        )
    return Outliers(values.cpu().double(), rows, torch.zeros(len(rows), dtype=torch.float64, device="cpu"))
