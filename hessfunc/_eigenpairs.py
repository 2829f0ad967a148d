"""Approximate eigenpairs with the residuals that certify them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hessfunc import tree
from hessfunc._typing import Params, Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues, eigenvectors and how far to trust each.

    Attributes:
        eigenvalues: Rayleigh quotients of the vectors, shape ``(k,)``.
        eigenvectors: orthonormal, a pytree like the parameters with a leading axis of length k.
        residuals: ``|H v - lambda v|`` for each pair, shape ``(k,)``, from a product with ``v`` made for the purpose;
            from ``eigsh`` mostly as its recurrence has it, plus what one product with a random combination of all
            vectors differs from that by. Some eigenvalue of ``H`` lies within the residual of each ``lambda``, and the
            distance is about ``residual**2 / gap`` to the next eigenvalue (Parlett 1998, sections 4.5 and 11.7).
        converged: whether the residual is within the tolerance that was asked for, shape ``(k,)``, bool.
        num_matvecs: products spent in all, those for the residuals included.
    """

    eigenvalues: Tensor
    eigenvectors: Params = field(repr=False)
    residuals: Tensor
    converged: Tensor
    num_matvecs: int

    def __len__(self) -> int:
        return self.eigenvalues.shape[0]

    def rows(self) -> Tensor:
        """The eigenvectors as flat rows, shape ``(k, size)``."""
        return tree.Layout.of(tree.index(self.eigenvectors, 0)).ravel_rows(self.eigenvectors)
