"""Extreme eigenpairs by thick-restart block Lanczos."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

from hessfunc import _probes
from hessfunc._certify import Claim, can_confirm, certified, confirmed, given_rows, tolerances
from hessfunc._checks import (
    ConvergenceWarning,
    NonFiniteError,
    check_choice,
    check_count,
    check_generator,
    check_positive,
)
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._krylov_basis import KrylovBasis
from hessfunc._operators import Operator
from hessfunc._typing import Params, Tensor
from hessfunc._wanted import WHICH, Goal

_PURE = 0.1
"""Share of the tolerance below which a residual leaves no room for another eigenvector of a cluster."""


def eigsh(
    H: Operator,
    k: int = 1,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    block_size: int = 1,
    v0: Params | Eigenpairs | None = None,
    verify_steps: int = 5,
    generator: torch.Generator,
) -> Eigenpairs:
    """The k most extreme eigenvalues and eigenvectors of a symmetric operator, with certified residuals.

    Thick-restart Lanczos (Wu and Simon 2000) with full reorthogonalization: a pair is accepted when
    ``|H v - lambda v| <= tol * |lambda|``, or is at the rounding level of ``H``. A single Krylov space holds one copy
    of a repeated eigenvalue and can pass by one closer than ``tol`` to another, so once k pairs are accepted, a few
    Lanczos steps from a fresh random vector orthogonal to them look for one that was missed, and the search goes
    on if there is one. At the end one product with a random combination of all the vectors tells whether residuals are
    those of the recurrence; if it differs by more than a tenth of what they leave of the tolerance, and where that is
    at the level of rounding, every residual is computed anew from a product with its vector.

    Cost: typically ``2 k + 20`` matvecs in all at the default tolerance, of which ``verify_steps`` and one are for the
    checks; far more where the wanted eigenvalues lie close to the rest, or close to zero, to which ``tol`` is relative.
    Memory: ``max_basis + k + 2 * block_size`` vectors, and one for each round of the search for missed pairs. A pass
    over the data serves ``block_size`` products.

    Args:
        H: symmetric operator.
        k: number of pairs, between 1 and ``H.size``.
        which: ``"LM"`` largest magnitude, ``"LA"`` largest (most positive), ``"SA"`` smallest (most negative),
            ``"BE"`` both ends, one more at the upper end if k is odd.
        tol: residual of a pair over its ``|lambda|``. Eigenvalues are more accurate than that: their error is about
            ``residual**2`` over the gap to the next one; the angle of an eigenvector about ``residual`` over the gap.
        max_matvecs: most products to spend, those for the checks included; by default ``500 + 50 k``. A search that
            is cut short ends with a ``ConvergenceWarning``.
        max_basis: vectors in the basis, more than ``k + 2 * block_size`` and ``k + verify_steps``; by default
            ``4 k + 40``. Fewer vectors need more products.
        block_size: vectors expanded together. A block costs more products in all and fewer passes over the data; it
            pays where a batched product is cheaper than single ones, and with clusters of that many eigenvalues.
        v0: start: a pytree like the parameters, one with a leading axis of several vectors, or the ``Eigenpairs`` of an
            earlier run, whose span then enters from the first step. Random by default.
        verify_steps: steps of the search for missed pairs, with up to as many again while one may be emerging, and
            half as many again where wanted eigenvalues lie within a few ``tol`` of each other; 0 to leave it out. It
            is a matter of chance: 5 were enough in all of the trials with spectra that fall off like ``1 / sqrt(i)``
            for a million parameters, but 9 where a flat bulk reached half-way up to the missed eigenvalue. With
            two clusters of up to three eigenvalues each, 0.3, 1 or 3 ``tol`` apart, none of 90 runs lacked a pair
            (``tests/test_eigsh.py``).
        generator: draws the start vector, and replacements where the Krylov space is exhausted.

    Returns:
        Pairs in order of decreasing magnitude for LM, decreasing for LA and BE, increasing for SA.

    Raises:
        ValueError, TypeError: an option is out of range, or ``v0`` is not like the parameters.
        NonFiniteError: a product or ``v0`` is NaN or infinite; its ``partial`` holds the best pairs so far.

    Warns:
        ConvergenceWarning: fewer than k pairs met the tolerance, or ``max_matvecs`` ended the search for missed ones;
            see ``converged``.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([1.0, 2.0, 2.0, -7.0, 0.0])))
        >>> pairs = hf.eigsh(H, 3, generator=torch.Generator().manual_seed(0))
        >>> pairs.eigenvalues.round(decimals=3), bool(pairs.converged.all())
        (tensor([-7.,  2.,  2.]), True)
    """
    n = H.size
    check_count(k, name="k", maximum=n, why=", the size of the operator")
    check_choice(which, WHICH, name="which")
    check_positive(tol, name="tol")
    check_count(verify_steps, name="verify_steps", minimum=0)
    check_count(block_size, name="block_size", maximum=n, why=", the size of the operator")
    check_generator(generator)
    smallest = min(n, k + max(2 * block_size, verify_steps) + 1)
    max_basis = min(n, max(4 * k + 40, smallest)) if max_basis is None else max_basis
    check_count(
        max_basis,
        name="max_basis",
        minimum=smallest,
        maximum=n,
        why="; k and 2 * block_size or verify_steps fit below it",
    )
    least = -(-k // block_size) * block_size + verify_steps + k
    max_matvecs = max(500 + 50 * k, least) if max_matvecs is None else max_matvecs
    check_count(max_matvecs, name="max_matvecs", minimum=least, why="; k to start with, verify_steps and k for checks")

    with torch.no_grad():
        goal = Goal(k, which, tol, max_matvecs - k)
        basis = KrylovBasis(H, max_basis, block_size, generator)
        basis.begin(_start_rows(H, v0, block_size, generator))
        try:
            verified = _solve(basis, goal, verify_steps)
        except NonFiniteError as error:
            raise error.keeping(_Found.of(basis, goal).pairs(H, tol) if basis.count else None) from None
        found = _Found.of(basis, goal)
        claim = _claim(basis, goal, found, generator) if verified and found.num_matvecs < goal.budget else None
        del basis  # makes room for the products with the result
        try:
            pairs = _checked(H, goal, found, claim)
        except NonFiniteError as error:
            raise error.keeping(found.pairs(H, tol)) from None
    _warn(goal, verified, pairs)
    return pairs


class _Found(NamedTuple):
    """The best pairs of a basis, as the recurrence has them."""

    rows: Tensor
    values: np.ndarray
    residuals: np.ndarray
    scale: float
    num_matvecs: int

    @classmethod
    def of(cls, basis: KrylovBasis, goal: Goal) -> _Found:
        order = goal.order(basis)[: goal.k]
        values, residuals = basis.ritz_values[order], basis.residuals[order]
        return cls(basis.ritz_rows(order), values, residuals, basis.scale, basis.num_matvecs)

    def pairs(self, H: Operator, tol: float) -> Eigenpairs:
        """For an error that comes before their residuals could be computed anew."""
        converged = self.residuals <= tolerances(self.values, self.scale, tol, H.dtype)
        return Eigenpairs(
            torch.from_numpy(self.values).to(self.rows),
            H.layout.unravel_rows(self.rows),
            torch.from_numpy(self.residuals).to(self.rows),
            torch.from_numpy(converged).to(H.device),
            self.num_matvecs,
        )


def _claim(basis: KrylovBasis, goal: Goal, found: _Found, generator: torch.Generator) -> Claim | None:
    """What one product can check, or None where it would not do, or would be the one product of a single pair."""
    if goal.k == 1 or not can_confirm(basis.operator, found.values, found.residuals, goal.tol, basis.scale):
        return None
    weights = _probes.normal(1, goal.k, generator=generator, dtype=torch.float64, device="cpu")[0].numpy()
    remainder = basis.remainder(goal.order(basis)[: goal.k], weights)
    return Claim(found.rows, found.values, found.residuals, weights, remainder)


def _checked(H: Operator, goal: Goal, found: _Found, claim: Claim | None) -> Eigenpairs:
    """With residuals that a product was made for: one with all vectors together, or else one with each."""
    spent = found.num_matvecs
    if claim is not None:
        spent += 1
        pairs = confirmed(H, claim, which=goal.which, tol=goal.tol, scale=found.scale, num_matvecs=spent)
        if pairs is not None:
            return pairs
    spent += goal.k
    return certified(H, found.rows, which=goal.which, tol=goal.tol, scale=found.scale, num_matvecs=spent)


def _start_rows(H: Operator, v0: Any, block_size: int, generator: torch.Generator) -> Tensor:
    if v0 is None:
        return _probes.normal(block_size, H.size, generator=generator, dtype=H.dtype, device=H.device)
    rows = given_rows(H, v0)
    # One vector that holds all given ones in equal parts: Lanczos then takes them up one per step.
    return torch.stack([rows[i::block_size].sum(0) for i in range(min(block_size, len(rows)))])


def _solve(basis: KrylovBasis, goal: Goal, verify_steps: int) -> bool:
    """Whether the search for missed pairs came to its end."""
    settled, verified = None, False
    while _search(basis, goal, goal.budget - verify_steps):
        now = goal.values(basis)
        # Ritz vectors may turn within a cluster, and their residuals open again, without a pair having been missed.
        verified = not verify_steps or basis.count == basis.operator.size or goal.unchanged(settled, now, basis)
        if verified or basis.num_matvecs + verify_steps > goal.budget:
            break
        settled = now if _unchallenged(basis, goal, now, verify_steps) else None
    return verified


def _search(basis: KrylovBasis, goal: Goal, budget: int) -> bool:
    """Expand and restart until the wanted pairs are accepted (True) or the budget is spent (False)."""
    while True:
        if basis.count >= goal.k:
            still_open = goal.open(basis)
            if not len(still_open) or basis.count == basis.operator.size:
                return True
            if basis.pending > basis.block_size:
                basis.steer(still_open)
        width = min(basis.pending, basis.block_size)
        if basis.num_matvecs + width > budget:
            return False
        _expand(basis, goal, width)


def _expand(basis: KrylovBasis, goal: Goal, width: int) -> None:
    if basis.count + width > basis.capacity:
        # The wanted pairs and the half of the rest next to them: accepted ones stay, which locks them.
        keep = min(goal.k + (basis.count - goal.k) // 2, basis.capacity - width)
        basis.restart(goal.order(basis)[:keep])
    basis.expand(width)


def _unchallenged(basis: KrylovBasis, goal: Goal, before: np.ndarray, steps: int) -> bool:
    """Whether the wanted values stay as they are while the basis grows from a fresh random vector."""
    n = basis.operator.size
    if basis.capacity < min(n, basis.count + steps):
        # Now, since a restart half-way would throw out what the new vector brings in.
        basis.restart(goal.order(basis)[: basis.capacity - steps])
    basis.branch()
    for step in range(2 * steps):
        # Half as many again in a cluster: there may be copies of all its members, and one looks much like another.
        least = steps + (steps + 1) // 2 if step >= steps and goal.crowded(basis) else steps
        if basis.count == n or (step >= least and not _emerging(basis, goal)):
            break
        if basis.num_matvecs == goal.budget:
            return False
        _expand(basis, goal, 1)
        if not goal.unchanged(before, goal.values(basis), basis):
            return False
    return True


def _emerging(basis: KrylovBasis, goal: Goal) -> bool:
    """Whether a pair that the random vector brought in is within its residual of being wanted, or holds another."""
    order, values, reach = goal.order(basis), basis.ritz_values, basis.along_first()
    chosen, rest = values[order[: goal.k]], order[goal.k :]
    upper = {"LM": np.abs(chosen).min(), "LA": chosen.min(), "SA": np.inf, "BE": chosen[0::2].min()}[goal.which]
    lower = {"LM": -upper, "LA": -np.inf, "SA": chosen.max(), "BE": chosen[1::2].max(initial=-np.inf)}[goal.which]
    near = (values[rest] + reach[rest] > upper).any() or (values[rest] - reach[rest] < lower).any()
    # In a cluster, one accepted can still hold a part of another that lies a few tolerances further out.
    limits = _PURE * tolerances(chosen, basis.scale, goal.tol, basis.dtype)
    mixed = goal.crowded(basis) and (reach[order[: goal.k]] > limits).any()
    return bool(near or mixed)


def _warn(goal: Goal, verified: bool, pairs: Eigenpairs) -> None:
    num_converged = int(pairs.converged.sum())
    if verified and num_converged == goal.k:
        return
    within = f"{num_converged} of {goal.k} pairs have residuals within tol={goal.tol}"
    if not verified:
        message = (
            f"eigsh: the search ended at max_matvecs after {pairs.num_matvecs} matvecs; {within}, and others may have "
            "been missed. See the fields converged and residuals; raise max_matvecs, tol or max_basis."
        )
    else:
        message = (
            f"eigsh: only {within} when |Hv - lambda v| is computed anew, though all had in the Krylov space: products "
            "of H are not accurate or not repeatable enough. Use parameters of higher precision, or raise tol."
        )
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
