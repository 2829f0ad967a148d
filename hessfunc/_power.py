"""Power iteration as a stateless kernel of fixed length."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hessfunc import tree
from hessfunc._checks import check_count, check_params
from hessfunc._typing import Matvec, Params, Tensor


class PowerStep(NamedTuple):
    """One step: the Rayleigh quotient and residual of ``vector``, and the vector for the next step.

    Attributes:
        eigenvalue: Rayleigh quotient ``<v, H v>``, a scalar tensor.
        vector: the unit vector ``v`` that the other figures belong to, a pytree.
        residual_norm: ``|H v - eigenvalue v|``, a scalar; some eigenvalue lies within it of ``eigenvalue``.
        following: ``H v / |H v|``, the pytree to go on from; zero if ``H v`` is.
    """

    eigenvalue: Tensor
    vector: Params
    residual_norm: Tensor
    following: Params


class PowerIteration(NamedTuple):
    """Estimate of the eigenvalue of largest magnitude.

    Attributes:
        eigenvalue: Rayleigh quotient of ``eigenvector``, a scalar tensor.
        eigenvector: unit vector, a pytree like ``v0``.
        residual_norm: ``|H v - eigenvalue v|``, a scalar; some eigenvalue lies within it of ``eigenvalue``.
        history: Rayleigh quotient of every step, shape ``(num_steps,)``.
    """

    eigenvalue: Tensor
    eigenvector: Params
    residual_norm: Tensor
    history: Tensor


def power_step(matvec: Matvec, v: Params) -> PowerStep:
    """One step of power iteration from ``v``, which need not have unit length. One matvec.

    Example:
        >>> import torch, hessfunc as hf
        >>> step = hf.power_step(lambda v: torch.tensor([2.0, 0.0]) * v, torch.tensor([3.0, 0.0]))
        >>> float(step.eigenvalue), float(step.residual_norm)
        (2.0, 0.0)
    """
    v = _normalized(v)
    product = matvec(v)
    eigenvalue = tree.vdot(v, product)
    residual = tree.axpy(-eigenvalue, v, product)
    return PowerStep(eigenvalue, v, tree.norm(residual), _normalized(product))


def power_iteration(matvec: Matvec, v0: Params, num_steps: int) -> PowerIteration:
    """Power iteration for the eigenvalue of largest magnitude, with the residual that says how far to trust it.

    Fixed length and free of branches on values: works under ``vmap``, ``jvp``, ``grad`` and ``torch.compile``. Prefer
    [`eigsh`][hessfunc.eigsh] for accuracy: it needs far fewer matvecs. This one keeps two vectors and its cost is
    known in advance. If ``lambda`` and ``-lambda`` are both extreme it does not converge, which the residual shows.

    Cost: ``num_steps`` matvecs. Memory: two vectors. Source: Golub and Van Loan, section 8.2.1.

    Args:
        matvec: symmetric linear map on pytrees like ``v0``.
        v0: start vector, any length but zero.
        num_steps: at least 1.

    Raises:
        ValueError: ``num_steps`` is out of range.
        TypeError: ``v0`` has a leaf that is not a floating-point tensor.

    Example:
        >>> import torch, hessfunc as hf
        >>> A = torch.diag(torch.tensor([1.0, -5.0]))
        >>> result = hf.power_iteration(lambda v: A @ v, torch.ones(2), 20)
        >>> round(float(result.eigenvalue), 4)
        -5.0
    """
    check_params(v0, name="v0")
    check_count(num_steps, name="num_steps")
    history = []
    v = v0
    for _ in range(num_steps):
        step = power_step(matvec, v)
        history.append(step.eigenvalue)
        v = step.following
    return PowerIteration(step.eigenvalue, step.vector, step.residual_norm, torch.stack(history))


def _normalized(vector: Params) -> Params:
    norm = tree.norm(vector)
    zero = norm == 0
    inverse = torch.where(zero, torch.zeros_like(norm), 1 / torch.where(zero, torch.ones_like(norm), norm))
    return tree.map_leaves(lambda leaf: leaf * inverse.to(leaf.dtype), vector)
