"""Lanczos tridiagonalization as a stateless kernel of fixed length, and the eigenproblem of its result."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch

from hessfunc import tree
from hessfunc._checks import NonFiniteError, check_choice, check_count, check_params
from hessfunc._typing import Matvec, Params, Tensor

_BLOCK = 16


class Tridiagonal(NamedTuple):
    """``H Q^T = Q^T T + residual_norm q e_m^T`` for a basis of orthonormal rows ``Q`` and tridiagonal ``T``.

    Attributes:
        alphas: diagonal of T, shape ``(num_steps,)``.
        betas: off-diagonal of T, shape ``(num_steps - 1,)``.
        basis: Lanczos vectors, a pytree like ``v0`` with a leading axis of length ``num_steps``; empty (length 0)
            without reorthogonalization, which keeps none.
        residual_norm: norm of the part of the last product outside the basis, a scalar; 0 if the space is invariant.
    """

    alphas: Tensor
    betas: Tensor
    basis: Params
    residual_norm: Tensor


class TridiagonalEigen(NamedTuple):
    """Eigenvalues and eigenvectors of tridiagonal matrices, in float64 on the CPU.

    Attributes:
        eigenvalues: ascending, shape ``(..., m)``.
        eigenvectors: orthonormal columns, shape ``(..., m, m)``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor


def lanczos(matvec: Matvec, v0: Params, num_steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """Tridiagonalize a symmetric matvec on the Krylov space of ``v0``.

    Fixed length, one matvec a step, no host synchronization and no branch on a value, so ``vmap`` (over start
    vectors, or over operators), ``jvp``, ``grad`` and ``torch.compile`` go through. Once the Krylov space is
    exhausted (the next vector is zero up to rounding) the remaining rows of T and of the basis are zero; in a
    quadrature such rows carry weight 0.

    Cost: ``num_steps`` matvecs. Memory: ``num_steps`` vectors with ``"full"``, three with ``"none"``, whose later
    vectors lose orthogonality: T then holds ghost copies of converged eigenvalues, which share one eigenvalue's
    quadrature weight (Knizhnerman 1996), so densities hold and lists of eigenvalues do not.

    Args:
        matvec: symmetric linear map on pytrees like ``v0``.
        v0: start vector, a pytree of floating-point tensors; any length but zero.
        num_steps: between 1 and the number of entries of ``v0``.
        reorthogonalize: ``"full"``, two passes of classical Gram-Schmidt by matrix products against all earlier
            vectors (Giraud et al. 2005), or ``"none"``, the three-term recurrence alone (Paige 1972).

    Raises:
        ValueError: ``num_steps`` is out of range, or ``reorthogonalize`` is not known.
        TypeError: ``v0`` has a leaf that is not a floating-point tensor.

    Example:
        >>> import torch, hessfunc as hf
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> result = hf.lanczos(lambda v: A @ v, torch.ones(3), 3)
        >>> hf.eigh_tridiagonal(result.alphas, result.betas).eigenvalues.round(decimals=4)
        tensor([1., 2., 4.], dtype=torch.float64)
    """
    check_params(v0, name="v0")
    layout = tree.Layout.of(v0)
    check_count(num_steps, name="num_steps", maximum=layout.size, why=", the number of entries of v0")
    check_choice(reorthogonalize, ("full", "none"), name="reorthogonalize")
    start = layout.ravel(v0)
    norm = tree.flat_norm(start)
    q = start * _inverse(norm, norm == 0)
    previous = torch.zeros_like(q)
    kept: list[Tensor] = []  # blocks of rows, so that every vector is copied once and never written to
    recent: list[Tensor] = []
    alphas, betas = [], []
    beta = torch.zeros_like(norm)
    scale = torch.zeros_like(norm)
    for _ in range(num_steps):
        product = layout.ravel(matvec(layout.unravel(q)))
        alpha = tree.flat_dot(q, product)
        residual = product - alpha * q - beta * previous
        if reorthogonalize == "full":
            recent.append(q)
            earlier = [*kept, torch.stack(recent)]
            for _ in range(2):
                for rows in earlier:
                    residual = residual - tree.flat_dot(rows, residual) @ rows
            if len(recent) == _BLOCK:
                kept, recent = earlier, []
        beta = tree.flat_norm(residual)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        # Below this the residual is the rounding error of the product, not a direction.
        exhausted = beta <= 10 * torch.finfo(beta.dtype).eps * scale
        inverse = _inverse(beta, exhausted)
        beta = torch.where(exhausted, torch.zeros_like(beta), beta)
        alphas.append(alpha)
        betas.append(beta)
        previous, q = q, residual * inverse
    blocks = [*kept, *([torch.stack(recent)] if recent else [])]
    rows = torch.cat(blocks) if blocks else q.unsqueeze(0)[:0]
    empty = alphas[0].unsqueeze(0)[:0]
    return Tridiagonal(
        alphas=torch.stack(alphas),
        betas=torch.stack(betas[:-1]) if num_steps > 1 else empty,
        basis=layout.unravel_rows(rows),
        residual_norm=betas[-1],
    )


def eigh_tridiagonal(alphas: Tensor, betas: Tensor) -> TridiagonalEigen:
    """Eigenvalues and eigenvectors of symmetric tridiagonal matrices, by SciPy (LAPACK) in float64.

    Args:
        alphas: diagonals, shape ``(..., m)``.
        betas: off-diagonals, shape ``(..., m - 1)``.

    Raises:
        ValueError: the shapes do not fit together.
        NonFiniteError: an entry is NaN or infinite.

    Example:
        >>> import torch, hessfunc as hf
        >>> hf.eigh_tridiagonal(torch.tensor([2.0, 2.0]), torch.tensor([1.0])).eigenvalues.round(decimals=6)
        tensor([1., 3.], dtype=torch.float64)
    """
    if alphas.dim() < 1 or betas.shape != (*alphas.shape[:-1], max(alphas.shape[-1] - 1, 0)):
        raise ValueError(
            f"alphas has shape {tuple(alphas.shape)}, betas {tuple(betas.shape)}; expected (..., m) and (..., m - 1)."
        )
    m = alphas.shape[-1]
    diagonals = alphas.detach().cpu().double().numpy().reshape(-1, m)
    off_diagonals = betas.detach().cpu().double().numpy().reshape(len(diagonals), max(m - 1, 0))
    if not (np.isfinite(diagonals).all() and np.isfinite(off_diagonals).all()):
        raise NonFiniteError("alphas or betas are NaN or infinite; a product of the operator was not finite.")
    pairs = [scipy.linalg.eigh_tridiagonal(d, e) for d, e in zip(diagonals, off_diagonals, strict=True)]
    values = np.stack([values for values, _ in pairs]).reshape(alphas.shape)
    vectors = np.stack([vectors for _, vectors in pairs]).reshape(*alphas.shape, m)
    return TridiagonalEigen(torch.from_numpy(values), torch.from_numpy(vectors))


def _inverse(value: Tensor, masked: Tensor) -> Tensor:
    """``1 / value``, and 0 where masked; both branches stay finite so that gradients do."""
    return torch.where(masked, torch.zeros_like(value), 1 / torch.where(masked, torch.ones_like(value), value))
