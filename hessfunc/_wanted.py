"""Which eigenpairs are asked for, and how far a basis is from having them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hessfunc._certify import tolerances
from hessfunc._krylov_basis import KrylovBasis

WHICH = ("LM", "LA", "SA", "BE")

_FEW = 4
"""Tolerances within which eigenvalues make a cluster."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: which pairs, how accurate, and within how many products."""

    k: int
    which: str
    tol: float
    budget: int

    def order(self, basis: KrylovBasis) -> np.ndarray:
        """Indices of all Ritz pairs, the most wanted first."""
        return wanted(basis.ritz_values, self.which)

    def values(self, basis: KrylovBasis) -> np.ndarray:
        """The wanted Ritz values, ascending."""
        return np.sort(basis.ritz_values[self.order(basis)[: self.k]])

    def unchanged(self, before: np.ndarray | None, now: np.ndarray, basis: KrylovBasis) -> bool:
        """Whether wanted values are the same as before, to the tolerance."""
        return before is not None and bool(
            (np.abs(now - before) <= tolerances(before, basis.scale, self.tol, basis.dtype)).all()
        )

    def crowded(self, basis: KrylovBasis) -> bool:
        """Whether two of the wanted Ritz values, or the last and the next, lie within a few tolerances."""
        near = np.sort(basis.ritz_values[self.order(basis)[: self.k + 1]])
        return bool((np.diff(near) <= _FEW * tolerances(near[1:], basis.scale, self.tol, basis.dtype)).any())

    def open(self, basis: KrylovBasis) -> np.ndarray:
        """Indices of the wanted Ritz pairs whose residuals are still too large."""
        order = self.order(basis)[: self.k]
        # A little below the tolerance, so that rounding does not undo it in the residuals computed at the end.
        return order[
            basis.residuals[order] > 0.98 * tolerances(basis.ritz_values[order], basis.scale, self.tol, basis.dtype)
        ]


def wanted(values: np.ndarray, which: str) -> np.ndarray:
    """Indices of eigenvalues, the most wanted first."""
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    ascending = np.argsort(values, kind="stable")
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending[::-1]
    order = np.empty_like(ascending)
    half = (len(values) + 1) // 2
    order[0::2] = ascending[::-1][:half]
    order[1::2] = ascending[: len(values) - half]
    return order
