"""One long Lanczos run kept orthogonal enough, without orthogonalizing at every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hessfunc import tree
from hessfunc._deflation import inner, subtract
from hessfunc._lanczos import Tridiagonal
from hessfunc._room import room
from hessfunc._typing import Tensor

ENOUGH = 0.9
"""What orthogonalization has to leave of a vector's length for its result to be orthogonal."""

_ALWAYS = 8
"""Steps that are orthogonalized in any case; they tell how large the rounding errors of the products are."""

_NOISE = 4.0
"""Rounding errors of a step to begin with, in units of rounding of the largest coefficient."""


def run_semiorthogonal(matvec: Callable[[Tensor], Tensor], unit: Tensor, num_steps: int) -> Tridiagonal:
    """[`lanczos`][hessfunc.lanczos] on a flat unit vector with partial reorthogonalization.

    The inner products of the next vector with all earlier ones follow a recurrence of their own (Simon 1984, "The
    Lanczos algorithm with partial reorthogonalization"). Only where it says that one of them may exceed the square root
    of the rounding unit are the last two vectors orthogonalized against the basis, both in the same pass over it: T is
    then as accurate as with full reorthogonalization, up to rounding, and the basis is orthonormal up to that square
    root. On trained networks in float32 this happens at every third or fourth step.

    The host looks at a few numbers a step, which a kernel must not; on a GPU it waits for them.
    """
    eps = torch.finfo(unit.dtype).eps
    rows = room(unit, (num_steps + 1, len(unit)))
    rows[0] = unit
    alphas, betas = np.zeros(num_steps), np.zeros(num_steps)
    before, now = np.zeros(0), np.ones(1)
    scale, noise = 0.0, _NOISE
    for i in range(num_steps):
        residual = _recurred(matvec(rows[i]), rows, alphas, betas, i)
        length = float(tree.flat_norm(residual))
        scale = max(scale, abs(alphas[i]), length)
        rounding = noise * eps * scale
        overlaps = _overlaps(now, before, alphas, betas, i, rounding) / max(length, np.finfo(float).tiny)
        expected = float(np.abs(overlaps).max())
        if i and (i <= _ALWAYS or expected > eps**0.5):
            found = _orthogonalize(rows, i)
            if np.isfinite(expected) and found > expected * length:
                noise *= found / (expected * length)
            previous, length = length, float(tree.flat_norm(residual))
            while length < ENOUGH * previous and length > 0:
                subtract(residual.unsqueeze(0), inner(residual.unsqueeze(0), rows[: i + 1]), rows[: i + 1])
                previous, length = length, float(tree.flat_norm(residual))
            now[:i], overlaps[:] = eps, eps
        if length <= 10 * eps * scale:  # the space is exhausted
            rows[i + 1 :] = 0
            break
        betas[i] = length
        residual.div_(length)
        before, now = now, np.append(overlaps, 1.0)
    diagonal, off_diagonal = (torch.from_numpy(values).to(unit) for values in (alphas, betas))
    return Tridiagonal(diagonal, off_diagonal[:-1], rows[:num_steps], off_diagonal[-1])


def _recurred(product: Tensor, rows: Tensor, alphas: np.ndarray, betas: np.ndarray, i: int) -> Tensor:
    """What the three-term recurrence leaves of a product with row ``i``, as the row after it; notes the diagonal."""
    alpha = tree.flat_dot(rows[i], product)
    alphas[i] = float(alpha)
    residual = torch.addcmul(product, rows[i], alpha, value=-1, out=rows[i + 1])
    return residual.add_(rows[i - 1], alpha=-betas[i - 1]) if i else residual


def _overlaps(
    now: np.ndarray, before: np.ndarray, alphas: np.ndarray, betas: np.ndarray, i: int, rounding: float
) -> np.ndarray:
    """Inner products of the next residual with rows 0 to ``i``, at worst.

    ``now`` and ``before`` are those of row ``i`` with rows 0 to ``i`` and of row ``i - 1`` with rows 0 to ``i - 1``.
    """
    result = betas[:i] * now[1:] + (alphas[:i] - alphas[i]) * now[:-1]
    result[1:] += betas[: max(i - 1, 0)] * now[:-2]
    if i:
        result -= betas[i - 1] * before
    return np.append(result + np.copysign(rounding, result), rounding)


def _orthogonalize(rows: Tensor, i: int) -> float:
    """Take off row ``i`` and the residual after it what they have along the rows before; the largest such part."""
    pair, basis = rows[i : i + 2], rows[:i]
    along = inner(pair, basis)
    subtract(pair, along, basis)
    last = tree.flat_dot(rows[i], rows[i + 1])
    rows[i + 1].addcmul_(rows[i], last, value=-1)
    return float(torch.maximum(along[1].abs().max(), last.abs()))
