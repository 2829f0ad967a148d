"""Eigenpairs by power iteration with deflation, one after the other: PyHessian's method, stopped by the residual."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from hessfunc import _probes, tree
from hessfunc._certify import certified, given_rows, tolerances
from hessfunc._checks import ConvergenceWarning, check_count, check_finite, check_generator, check_positive
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._operators import Operator
from hessfunc._power import power_step
from hessfunc._typing import Params, Tensor


def power_eigenpairs(
    H: Operator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    v0: Params | Eigenpairs | None = None,
    generator: torch.Generator,
) -> Eigenpairs:
    """The k eigenvalues of largest magnitude by power iteration, each on what the ones before leave over.

    A vector is accepted by its residual, not when its eigenvalue has stopped to change, which says little. A last
    Rayleigh-Ritz step on the span of all k separates what close eigenvalues, or ``lambda`` and ``-lambda``, have
    mixed, and residuals ``|H v - lambda v|`` with the full ``H`` are computed anew.

    Prefer [`eigsh`][hessfunc.eigsh]: it takes far fewer products, has no trouble with eigenvalues of nearly the same
    magnitude, and looks for pairs that were missed. This one makes sense for one pair in the memory of a few vectors,
    with a good start vector such as the last checkpoint's, or to compare with PyHessian. A pair to which the start
    vector is orthogonal, or nearly so, is passed by.

    Cost: about ``log(1 / tol) / log(|lambda_i / lambda_{i + 1}|)`` matvecs for pair i, then ``2 k`` (1 for a single
    pair). Memory: ``2 k + 3`` vectors. Source: Golub and Van Loan 2013, sections 7.3 and 8.2; Yao et al. 2020.

    Args:
        H: symmetric operator.
        k: number of pairs, between 1 and ``H.size``.
        tol: residual of a pair over its ``|lambda|``.
        max_matvecs: most products to spend, by default ``1000 k``. A pair may use an equal share of what those before
            it have left.
        v0: start: a pytree like the parameters, one with a leading axis of several vectors, or the ``Eigenpairs`` of
            an earlier run; the i-th is for pair i. Random for those without.
        generator: draws the start vectors.

    Returns:
        Pairs in order of decreasing magnitude.

    Raises:
        ValueError, TypeError: an option is out of range, or ``v0`` is not like the parameters.
        FloatingPointError: a product or ``v0`` is NaN or infinite.

    Warns:
        ConvergenceWarning: a pair did not reach the tolerance; see ``converged``.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([1.0, -5.0, 3.0])))
        >>> hf.power_eigenpairs(H, 2, generator=torch.Generator().manual_seed(0)).eigenvalues.round(decimals=3)
        tensor([-5.,  3.])
    """
    check_count(k, name="k", maximum=H.size, why=", the size of the operator")
    check_positive(tol, name="tol")
    check_generator(generator)
    last = 2 * k if k > 1 else 1
    max_matvecs = 1000 * k if max_matvecs is None else max_matvecs
    check_count(max_matvecs, name="max_matvecs", minimum=k + last, why=f"; one for each pair and {last} at the end")

    with torch.no_grad():
        starts = None if v0 is None else given_rows(H, v0)
        rows = torch.empty(k, H.size, dtype=H.dtype, device=H.device)
        spent, scale = 0, 0.0
        for i in range(k):
            start = None if starts is None or i >= len(starts) else starts[i]
            share = (max_matvecs - last - spent) // (k - i)
            rows[i], steps, largest = _iterate(H, _start(H, start, rows[:i], generator), rows[:i], tol, share, scale)
            spent, scale = spent + steps, max(scale, largest)
        if k > 1:
            rows = _separated(H, rows)
        pairs = certified(H, rows, which="LM", tol=tol, scale=scale, num_matvecs=spent + last)
    if not bool(pairs.converged.all()):
        warnings.warn(
            f"power_eigenpairs: {int((~pairs.converged).sum())} of {k} pairs have a residual above tol={tol} after "
            f"{pairs.num_matvecs} matvecs; see the fields converged and residuals. Eigenvalues of nearly the same "
            "magnitude make power iteration stall: hessfunc.eigsh does not; or raise max_matvecs.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return pairs


def _iterate(H: Operator, v: Tensor, found: Tensor, tol: float, most: int, scale: float) -> tuple[Tensor, int, float]:
    """Power iteration off the vectors found: the vector, the products made, the largest ``|lambda|`` seen."""

    def deflated(v: Tensor) -> Tensor:
        product = H.vector(v)
        check_finite(product, what="a product of the operator", remedy="nothing can be learnt from it; check H.")
        return _project_off(product, found)

    steps = 0
    while True:
        step = power_step(deflated, v)
        steps += 1
        value = float(step.eigenvalue)
        scale = max(scale, abs(value))
        # Half the tolerance: the last step adds what the residuals of others share with this vector.
        limit = 0.5 * float(tolerances(np.array(value), scale, tol, H.dtype))
        if steps == most or float(step.residual_norm) <= limit:
            return step.vector, steps, scale
        v = step.following


def _separated(H: Operator, rows: Tensor) -> Tensor:
    """The Ritz vectors in the span of orthonormal rows. One product each."""
    projection = torch.stack([tree.flat_dot(rows, product) for product in H.rows(rows)]).cpu().double().numpy()
    _, vectors = np.linalg.eigh((projection + projection.T) / 2)
    return torch.from_numpy(vectors.T.copy()).to(rows) @ rows


def _start(H: Operator, given: Tensor | None, found: Tensor, generator: torch.Generator) -> Tensor:
    if given is not None:
        start = _project_off(given, found)
        if float(tree.flat_norm(start)) > torch.finfo(H.dtype).eps ** 0.5:
            return start
    random = _probes.normal(1, H.size, generator=generator, dtype=H.dtype, device=H.device)[0]
    return _project_off(random, found)


def _project_off(vector: Tensor, found: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - tree.flat_dot(found, vector) @ found
    return vector
