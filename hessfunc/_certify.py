"""What solvers for eigenpairs share: start vectors, tolerances, and residuals checked at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from hessfunc import tree
from hessfunc._checks import check_count, check_finite, check_like
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._operators import Operator
from hessfunc._typing import Tensor

NOISE = 50
"""Residuals below this many units of rounding of the largest eigenvalue count as zero."""

_SAFETY = 10
"""A combination with normal weights is this much shorter than what it is of in one of twelve cases."""

_ROUNDING = 4
"""Units of rounding of the largest eigenvalue that a product is off by at least."""


def tolerances(values: np.ndarray, scale: float, tol: float, dtype: torch.dtype) -> np.ndarray:
    """Residuals allowed; differences below the rounding level of the operator cannot be asked for."""
    return np.maximum(tol * np.abs(values), NOISE * torch.finfo(dtype).eps * scale)


def given_rows(H: Operator, v0: Any) -> Tensor:
    """Start vectors, in any of the forms that ``v0`` takes, as unit rows; a zero vector stays zero."""
    given = v0.eigenvectors if isinstance(v0, Eigenpairs) else v0
    first = next(iter(tree.leaves(given)), None)
    stacked = isinstance(first, torch.Tensor) and first.dim() == len(H.layout.shapes[0]) + 1
    num = check_like(given, H.like, name="v0", reference="H.like", rows=stacked)
    check_count(num, name="the number of vectors in v0")
    rows = H.layout.ravel_rows(given) if stacked else H.layout.ravel(given).unsqueeze(0)
    check_finite(rows, what="v0", remedy="leave it out for a random start.")
    tiny = torch.finfo(H.dtype).tiny
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp(min=tiny)  # so that no square over- or underflows
    return rows.div_(torch.stack([tree.flat_norm(row) for row in rows]).clamp(min=tiny).unsqueeze(1))


def certified(H: Operator, rows: Tensor, *, which: str, tol: float, scale: float, num_matvecs: int) -> Eigenpairs:
    """Eigenpairs from approximate eigenvectors, in order, with residuals from one product each.

    ``num_matvecs`` is what goes into the result and includes these products. ``scale`` is the norm of ``H``.

    Raises:
        NonFiniteError: a product is NaN or infinite.
    """
    if any(dtype != H.dtype for dtype in H.layout.dtypes):  # residuals are those of the vectors as handed out
        rows = H.layout.ravel_rows(H.layout.unravel_rows(rows))
    products = H.rows(rows)
    check_finite(products, what="the product with an eigenvector", remedy="nothing can be learnt from it; check H.")
    pairs = list(zip(rows, products, strict=True))
    values = torch.stack([tree.flat_dot(row, product) / tree.flat_dot(row, row) for row, product in pairs])
    residuals = torch.stack([tree.flat_norm(p - value * row) for value, (row, p) in zip(values, pairs, strict=True)])
    del products, pairs
    order = _in_order(values, which)
    limits = tolerances(values.cpu().double().numpy(), scale, tol, H.dtype)
    converged = residuals <= torch.from_numpy(limits).to(residuals)
    vectors = H.layout.unravel_rows(rows[order])
    return Eigenpairs(values[order], vectors, residuals[order], converged[order], num_matvecs)


def _in_order(values: Tensor, which: str) -> Tensor:
    keys = {"LM": -values.abs(), "SA": values}.get(which, -values)
    return torch.argsort(keys, stable=True)


class Claim(NamedTuple):
    """What a recurrence says of orthonormal ``rows`` of shape ``(k, size)``.

    Attributes:
        rows: approximate eigenvectors.
        values: their Rayleigh quotients, float64.
        residuals: their residuals, likewise.
        weights: random weights of a combination of them, float64.
        remainder: the combination of ``H v - values * v``, shape ``(size,)``.
    """

    rows: Tensor
    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    remainder: Tensor


def can_confirm(H: Operator, values: np.ndarray, residuals: np.ndarray, tol: float, scale: float) -> bool:
    """Whether residuals leave room within the tolerance for the rounding of a combination, as [`confirmed`][] asks.

    Vectors handed out in a lower precision than they were found in have residuals of their own.
    """
    if any(dtype != H.dtype for dtype in H.layout.dtypes):
        return False
    rounding = _ROUNDING * len(values) ** 0.5 * torch.finfo(H.dtype).eps * scale
    return bool((residuals + _SAFETY * rounding <= tolerances(values, scale, tol, H.dtype)).all())


def confirmed(
    H: Operator, claim: Claim, *, which: str, tol: float, scale: float, num_matvecs: int
) -> Eigenpairs | None:
    """The eigenpairs that a recurrence claims, if one product with a combination of all of them bears it out.

    If the recurrence is off, for lack of orthogonality or since products do not repeat, the combination shows it: it
    differs from what is claimed by the same combination of what each pair is off by. Ten times that difference has to
    fit in what each residual leaves of the tolerance, and it is added to the residuals. ``None`` if it does not.

    Raises:
        NonFiniteError: the product is NaN or infinite.
    """
    weights, along = (torch.from_numpy(x).to(claim.rows) for x in (claim.weights, claim.weights * claim.values))
    product = H.vector(weights @ claim.rows)
    check_finite(product, what="the product with eigenvectors", remedy="nothing can be learnt from it; check H.")
    off = float(tree.flat_norm(product - claim.remainder - along @ claim.rows))
    limits = tolerances(claim.values, scale, tol, H.dtype)
    if not (claim.residuals + _SAFETY * off <= limits).all():
        return None
    values, residuals = (torch.from_numpy(x).to(claim.rows) for x in (claim.values, claim.residuals + off))
    order = _in_order(values, which)
    return Eigenpairs(
        values[order],
        H.layout.unravel_rows(claim.rows[order]),
        residuals[order],
        torch.ones_like(order, dtype=torch.bool),
        num_matvecs,
    )
