"""An orthonormal basis grown by products with an operator, and its Rayleigh-Ritz pairs."""

from __future__ import annotations

import numpy as np
import torch

from hessfunc import _probes, tree
from hessfunc._checks import check_finite
from hessfunc._operators import Operator
from hessfunc._room import room
from hessfunc._typing import Tensor

_COLUMNS = 1 << 16
_MOST_PASSES = 5

ENOUGH = 0.7
"""What orthogonalization leaves of a length if its result is orthogonal ("twice is enough", Parlett 1998, 6.9)."""


class KrylovBasis:
    """Rows ``Q``, the projection ``T = Q H Q^T`` in float64, and pending rows ``P`` with ``H Q^T = Q^T T + P^T C``.

    The pending rows are orthonormal, orthogonal to ``Q``, and hold all that products so far have outside the basis, so
    the residuals of Ritz pairs are exact whichever of them are expanded. T is filled with the coefficients of the
    orthogonalization, so it is the exact projection after restarts and new starts too. The object belongs to one
    run of a solver; nothing of it is shared.

    Attributes:
        operator: the operator.
        capacity: largest number of rows.
        block_size: number of pending rows kept at least, while the space has room for them.
        count: rows now in the basis.
        num_matvecs: products so far.
        ritz_values: eigenvalues of T, ascending after ``expand``, shape ``(count,)``.
        residuals: norms ``|H y - theta y|`` of the Ritz pairs as ``C`` gives them, shape ``(count,)``.
        scale: largest magnitude seen among the eigenvalues of T: the working estimate of ``|H|``.
    """

    def __init__(self, operator: Operator, capacity: int, block_size: int, generator: torch.Generator) -> None:
        self.operator = operator
        self.dtype = operator.dtype
        self.capacity = capacity
        self.block_size = block_size
        self.count = 0
        self.num_matvecs = 0
        self.scale = 0.0
        self.ritz_values = np.zeros(0)
        self.residuals = np.zeros(0)
        self._generator = generator
        self._rows = room(torch.empty(0, dtype=operator.dtype, device=operator.device), (capacity, operator.size))
        self._projection = np.zeros((capacity, capacity))
        self._vectors = np.zeros((0, 0))
        self._pending: list[Tensor] = []  # apart, so that taking one out or putting one in copies none
        self._coupling = np.zeros((0, 0))

    @property
    def pending(self) -> int:
        """Number of rows that wait to be expanded."""
        return len(self._pending)

    def along_first(self) -> np.ndarray:
        """Share of the residuals along the first pending row: for Ritz pairs of its own Krylov space, all of it."""
        return np.abs(self._coupling[:1] @ self._vectors).sum(axis=0)

    def begin(self, rows: Tensor) -> None:
        """Set the rows to expand first: those given, overwritten to be orthonormal, and random ones to fill up."""
        self._append(list(rows))
        self._fill()

    def branch(self) -> None:
        """Put a random row before the pending ones."""
        if self.pending < self.operator.size - self.count:
            self._append([self._random_row()])

    def steer(self, order: np.ndarray) -> None:
        """Turn the pending rows so that the first hold as much as they can of the residuals of these Ritz pairs."""
        target = self._coupling @ self._vectors[:, order]
        # Each residual counts alike however small: all have to be brought down by expanding what they are made of.
        lengths = np.linalg.norm(target, axis=0)
        turn, _, _ = np.linalg.svd(target / np.where(lengths == 0, 1, lengths))
        self._pending = list(self._weights(turn) @ torch.stack(self._pending))
        self._coupling = turn.T @ self._coupling

    def expand(self, width: int) -> None:
        """Take the first ``width`` pending rows into the basis: one pass over the data, ``width`` products."""
        start, stop = self.count, self.count + width
        block = self._rows[start:stop]
        torch.stack(self._pending[:width], out=block)
        self._pending = self._pending[width:]
        products = self.operator.rows(block)
        own = _inner(block, products)
        # A product that is NaN or infinite has such inner products, which are there anyway
        check_finite(own, what="a product of the operator", remedy="nothing can be learnt from it; check H.")
        self.num_matvecs += width
        products, columns, lengths = self._orthogonalized(products, _numpy(own), start, stop)
        self._projection[:stop, start:stop] = columns
        self._projection[start:stop, :stop] = columns.T
        known = self._coupling[width:]
        self._coupling = np.hstack([known, np.zeros((len(known), width))])  # np.pad takes ten times as long
        self.count = stop
        self.ritz_values, self._vectors = np.linalg.eigh(self._projection[:stop, :stop])
        self.scale = max(self.scale, float(np.abs(self.ritz_values).max()))
        floor = 10 * torch.finfo(self.dtype).eps * self.scale
        added = self._append(list(products), floor, lengths=lengths)  # which gives the coupling its new rows
        self._coupling[:, start:] = added
        self._fill()
        self.residuals = np.linalg.norm(self._coupling @ self._vectors, axis=0)

    def _orthogonalized(
        self, products: Tensor, own: np.ndarray, start: int, stop: int
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Products with the rows from ``start`` on less their part in the basis, their columns of T, and lengths left.

        ``own`` are inner products with these rows themselves.

        The coupling holds what a product has along the earlier rows, and nearly all of it is zero. That is taken off
        first; what a pass over the basis then takes off is rounding error, and seldom a second one is needed.
        """
        known = self._coupling[: stop - start]
        touched = np.flatnonzero(np.abs(known).max(axis=0, initial=0) > torch.finfo(self.dtype).eps * self.scale)
        first = touched[0] if len(touched) else start
        columns = np.concatenate([known.T, (own + own.T) / 2])
        # Anew, since the operator may own its product
        products = torch.addmm(products, self._weights(columns[first:]), self._rows[first:stop], alpha=-1)
        lengths, before = _lengths(products), np.full(stop - start, np.inf)
        while (lengths < ENOUGH * before).any() and (before > 0).all():
            rest = _inner(self._rows[:stop], products)
            products.addmm_(rest.T, self._rows[:stop], alpha=-1)
            columns += _numpy(rest)
            before, lengths = lengths, _lengths(products)
        columns[start:] = (columns[start:] + columns[start:].T) / 2
        return products, columns, lengths

    def ritz_rows(self, order: np.ndarray) -> Tensor:
        """Ritz vectors as rows, in the order of the indices given."""
        return self._weights(self._vectors[:, order]) @ self._rows[: self.count]

    def remainder(self, order: np.ndarray, weights: np.ndarray) -> Tensor:
        """``sum of weight * (H y - theta y)`` over the Ritz pairs of these indices, shape ``(size,)``.

        The last that is asked of a basis: it takes the memory of a pending row.
        """
        along = (self._coupling @ (self._vectors[:, order] @ weights)).tolist()
        if not along:
            return self._rows.new_zeros(self.operator.size)
        total = self._pending[0].mul_(along[0])
        for row, share in zip(self._pending[1:], along[1:], strict=True):
            total.add_(row, alpha=share)
        return total

    def restart(self, order: np.ndarray) -> None:
        """Shrink the basis to the Ritz vectors given; the pending rows stay."""
        keep = len(order)
        weights = self._weights(self._vectors[:, order])
        for columns in self._rows[: self.count].split(_COLUMNS, dim=1):  # in place, a slab at a time
            columns[:keep] = weights @ columns
        self.ritz_values = self.ritz_values[order]
        self.residuals = self.residuals[order]
        self._projection[:keep, :keep] = np.diag(self.ritz_values)
        self._coupling = self._coupling @ self._vectors[:, order]
        self._vectors = np.eye(keep)
        self.count = keep

    def _weights(self, columns: np.ndarray) -> Tensor:
        return torch.from_numpy(columns.T.copy()).to(self._rows)

    def _append(self, rows: list[Tensor], floor: float = 0.0, *, lengths: np.ndarray | None = None) -> np.ndarray:
        """Put the part of ``rows`` outside the basis before the pending rows. Overwrites both.

        With ``lengths``, those of the rows, these have no part inside, up to rounding.

        Returns the coefficients with ``rows^T = P^T coefficients`` up to a part in the basis. What is no longer than
        ``floor``, or is left once basis and pending rows fill the space, is rounding error and dropped.
        """
        basis, room = self._rows[: self.count], self.operator.size - self.count
        # The old ones last: new ones keep what they have in common, or a search from a random row would be blind to it.
        candidates = [*rows, *self._pending]
        pending: list[Tensor] = []
        coefficients = np.zeros((len(candidates), len(candidates)))
        for i, row in enumerate(candidates):
            whole = float(tree.flat_norm(row) if lengths is None or i >= len(rows) else lengths[i])
            rounding = 10 * torch.finfo(self.dtype).eps * whole
            rounding = max(rounding, floor) if i < len(rows) else rounding
            for _ in range(2):
                coefficients[: len(pending), i] += _numpy(_project_off(row, pending))
            length = float(tree.flat_norm(row)) if pending else whole
            if length <= rounding or len(pending) == room:
                continue
            coefficients[len(pending), i] = length
            row /= length
            # Rows that were pending are orthogonal to the basis, which has grown by others of them
            settled = (lengths is not None or i >= len(rows)) and length > ENOUGH * whole
            for _ in range(0 if settled else _MOST_PASSES):  # a short row lost its orthogonality in the subtraction
                row.addmv_(basis.T, tree.flat_dot(basis, row), alpha=-1)
                _project_off(row, pending)
                kept = float(tree.flat_norm(row))
                row /= kept
                if kept > ENOUGH:
                    break
            pending.append(row)
        self._pending = pending
        self._coupling = coefficients[: len(pending), len(rows) :] @ self._coupling
        return coefficients[: len(pending), : len(rows)]

    def _fill(self) -> None:
        """Add random rows until ``block_size`` are pending, or as many as the space has room for."""
        while self.pending < min(self.block_size, self.operator.size - self.count):
            self._append([self._random_row()])

    def _random_row(self) -> Tensor:
        size = self.operator.size
        row = _probes.normal(1, size, generator=self._generator, dtype=self.dtype, device=self.operator.device)[0]
        return row.div_(tree.flat_norm(row))


def _project_off(row: Tensor, others: list[Tensor]) -> Tensor:
    """Subtract from ``row``, in place, its part along each of the orthonormal ``others``; returns the coefficients."""
    coefficients = row.new_zeros(len(others))
    for i, other in enumerate(others):
        coefficients[i] = tree.flat_dot(other, row)
        row.addcmul_(other, coefficients[i], value=-1)
    return coefficients


def _lengths(rows: Tensor) -> np.ndarray:
    return _numpy(torch.stack([tree.flat_norm(row) for row in rows]))


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([tree.flat_dot(left, row) for row in right], dim=1)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
