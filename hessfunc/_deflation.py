"""A subspace whose share of the trace is known, and probes of what it leaves over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessfunc._checks import check_like
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._operators import Operator
from hessfunc._terms import Rows
from hessfunc._typing import Params, Tensor


@dataclass(frozen=True)
class Deflation:
    """Orthonormal rows ``U`` with projector ``P``, and the trace of ``H P`` by leaf.

    ``tr H = tr(P H P) + tr((I - P) H (I - P))``, whether or not the space is invariant, since ``tr(P H (I - P)) = 0``.
    Leaf by leaf, with ``E`` the projector onto a leaf's entries and ``B = (I - P) H (I - P)``,
    ``tr(E H) = tr(E (H - B)) + tr(E B)``: the first is ``sum_j <u_j, E (2 H u_j - P H u_j)>``, and ``<v, E B v>`` is an
    unbiased sample of the second.

    Attributes:
        rows: shape ``(k, size)``.
        leaf_traces: shape ``(num_leaves,)``, float64, on the CPU: ``tr(E (H - B))`` if the products are known,
            ``sum_j <u_j, E u_j> theta_j`` for Ritz pairs. The totals agree; the shares of the leaves differ by
            ``2 sum_j <u_j, E r_j>`` with the residuals ``r_j``, which the samples make up for.
        ritz: whether ``leaf_traces`` are from Ritz values.
        num_matvecs: products spent on it.
    """

    rows: Tensor
    leaf_traces: Tensor
    ritz: bool
    num_matvecs: int

    @classmethod
    def of(cls, known: Eigenpairs | Params | None, H: Operator, chunk_size: int | None = None) -> Deflation:
        """From eigenpairs, from a pytree of vectors with a leading axis, or of nothing.

        One product tells whether the eigenvalues are Rayleigh quotients on ``H`` within the residuals given. If not
        (pairs of another checkpoint, or of another data set), and for vectors alone, ``H U`` is computed.

        Raises:
            ValueError: the vectors are not like ``H.like``, or linearly dependent.
        """
        if known is None:
            return cls(_empty(H), torch.zeros(len(H.layout.sizes), dtype=torch.float64, device="cpu"), False, 0)
        pairs = known if isinstance(known, Eigenpairs) else None
        vectors = known if pairs is None else pairs.eigenvectors
        name = "deflate" if pairs is None else "deflate.eigenvectors"
        count = check_like(vectors, H.like, name=name, reference="H.like", rows=True)
        if count > H.size:
            raise ValueError(f"{name} holds {count} vectors of {H.size} entries; they cannot be linearly independent.")
        rows = H.layout.ravel_rows(vectors).detach()
        if pairs is not None and _orthonormal(rows) and _are_ritz_pairs(rows, pairs, H):
            shares = leaf_sums(rows.square(), H)
            return cls(rows, pairs.eigenvalues.detach().cpu().double() @ shares, True, 1)
        basis = extend_basis(_empty(H), rows)
        if len(basis) < count:
            raise ValueError(f"{name} holds {count} vectors that span only {len(basis)} dimensions; drop some.")
        products = products_of(H, basis, chunk_size)
        return cls.with_products(basis, products, H, num_matvecs=count + (pairs is not None))

    @classmethod
    def with_products(cls, rows: Tensor, products: Tensor, H: Operator, *, num_matvecs: int) -> Deflation:
        """From orthonormal rows and the products of ``H`` with them."""
        return cls(rows, known_shares(rows[:0], rows, products, H), False, num_matvecs)

    def project(self, rows: Tensor) -> Tensor:
        """``(I - P)`` on each row."""
        return project_off(self.rows, rows) if len(self.rows) else rows

    def samples(self, H: Operator, probes: Tensor) -> tuple[Tensor, Tensor]:
        """One unbiased sample of the trace by leaf for each probe, shape ``(num_probes, num_leaves)``.

        Second, the products of ``(I - P) H (I - P)`` with the probes.
        """
        found, products = self.remainders(H, H.rows, probes)
        return found + self.leaf_traces, products

    def remainders(self, H: Operator, rows: Rows, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Samples without the known part, for one of the matrices that ``H`` is a sum of, and products, as above.

        Samples of all of them, each with probes of its own or not, add up to one of what ``H`` has beside that part.
        """
        products = rows(self.project(probes))
        if not len(self.rows):
            return leaf_sums(probes * products, H), products
        inside = inner(products, self.rows) @ self.rows
        products = products - inside
        found = leaf_sums(probes * products, H)
        if self.ritz:
            # <v, E P H (I - P) v> has mean <u_j, E r_j> summed over j. Its sum over the leaves has mean 0 and would
            # only add noise to the whole, so it is taken off in shares that do not depend on the probe.
            across = 2 * leaf_sums(probes * inside, H)
            share = leaf_sums(self.rows.square(), H).sum(0) / len(self.rows)
            found = found + across - across.sum(1, keepdim=True) * share
        return found, products


def leaf_sums(rows: Tensor, H: Operator) -> Tensor:
    """Sum over each leaf's entries of each row, shape ``(num_rows, num_leaves)``, float64, on the CPU."""
    return torch.stack([part.sum(1) for part in rows.split(H.layout.sizes, dim=1)], dim=1).cpu().double()


def known_shares(basis: Tensor, rows: Tensor, products: Tensor, H: Operator) -> Tensor:
    """By how much ``tr(E (H - B))`` grows when ``rows`` join ``basis``, for each leaf; ``products`` are those of rows.

    ``H - B = H P + P H - P H P``, of which ``basis`` alone has its part already.
    """
    parts = project_off(basis, products) + project_off(torch.cat([basis, rows]), products)
    return leaf_sums(rows * parts, H).sum(0)


def products_of(H: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """``H`` times each row, in passes of at most ``chunk_size`` rows."""
    return torch.cat([H.rows(part) for part in rows.split(chunk_size or max(len(rows), 1))]) if len(rows) else rows


def extend_basis(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal rows for the part of ``block`` outside the span of ``basis``; both have shape ``(k, size)``.

    Directions at rounding level of the block are left out.
    """
    floor = 10 * torch.finfo(block.dtype).eps * len(block) ** 0.5
    scale = float(block.square().sum(1).max()) ** 0.5 if len(block) else 0.0
    block = _orthonormalized(basis, block, threshold=floor * scale)
    # What was short in the block has picked up a part along the basis by rounding, and not so once its length is 1.
    return _orthonormalized(basis, block, threshold=0.5) if len(block) > 1 else block


def _orthonormalized(basis: Tensor, block: Tensor, *, threshold: float) -> Tensor:
    for _ in range(2):
        block = project_off(basis, block)
    if len(block) == 1:
        length = block.square().sum().sqrt()
        return block / length if float(length) > threshold else block[:0]
    q, r = torch.linalg.qr(block.T)
    left, lengths, _ = torch.linalg.svd(r.cpu().double())
    kept = left[:, : len(lengths)][:, lengths > threshold]
    # Householder's method has the rounding of sequential sums, which long vectors in float32 show.
    return nearest_orthonormal((q @ kept.to(q)).T.contiguous())


def nearest_orthonormal(rows: Tensor) -> Tensor:
    """The orthonormal rows next to rows that nearly are (Löwdin 1950)."""
    lengths, vectors = torch.linalg.eigh(inner(rows, rows).cpu().double())
    return ((vectors * lengths.rsqrt()) @ vectors.T).to(rows) @ rows


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, ``left @ right.T``, summed in blocks as in [`flat_dot`][hessfunc.tree.flat_dot]."""
    block = _columns(left)
    parts = [a @ b.T for a, b in zip(left.split(block, dim=1), right.split(block, dim=1), strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def project_off(basis: Tensor, rows: Tensor) -> Tensor:
    """Each row without its part along the orthonormal rows of ``basis``."""
    return subtract(rows.clone(), inner(rows, basis), basis)


def subtract(rows: Tensor, along: Tensor, basis: Tensor) -> Tensor:
    """``rows - along @ basis``, in place."""
    # A product of few rows with long ones is three times as fast in pieces that stay in the cache.
    block = _columns(rows) if rows.device.type == "cpu" else rows.shape[1]
    for piece, across in zip(*(x.split(block, dim=1) for x in (rows, basis)), strict=True):
        piece.addmm_(along, across, alpha=-1)
    return rows


def _columns(rows: Tensor) -> int:
    return max(2**14, -(-rows.shape[1] // 512))


def _empty(H: Operator) -> Tensor:
    return torch.empty(0, H.size, dtype=H.dtype, device=H.device)


def _tolerance(rows: Tensor) -> float:
    return torch.finfo(rows.dtype).eps ** 0.5


def _orthonormal(rows: Tensor) -> bool:
    gram = inner(rows, rows)
    return float((gram - torch.eye(len(rows), dtype=gram.dtype, device=gram.device)).abs().max()) <= _tolerance(rows)


def _are_ritz_pairs(rows: Tensor, pairs: Eigenpairs, H: Operator) -> bool:
    """Whether ``|H u - theta u|`` for the sum of all pairs is within the sum of their residuals, and of rounding."""
    values = pairs.eigenvalues.detach().to(rows)
    gap = H.vector(rows.sum(0)) - values @ rows
    allowed = float(pairs.residuals.sum()) + _tolerance(rows) * float(values.abs().sum())
    return float(torch.linalg.vector_norm(gap)) <= allowed
