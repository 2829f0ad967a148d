"""Lanczos runs from several probes in lockstep, on an operator or on what some of its eigenpairs leave over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hessfunc import tree
from hessfunc._checks import NonFiniteError, check_choice, check_count, check_generator
from hessfunc._deflation import leaf_sums
from hessfunc._lanczos import eigh_tridiagonal, lanczos
from hessfunc._mean_rule import mean_rule, usual_num_rules
from hessfunc._operators import Operator
from hessfunc._outliers import Outliers
from hessfunc._typing import Tensor


class Runs(NamedTuple):
    """Lanczos runs from several probes, as quadrature rules and as shares of the leaves in ``<q, H q>``.

    Attributes:
        nodes: Ritz values, shape ``(num_probes, num_steps)``, float64, on the CPU.
        weights: squared first components, the same shape; each row sums to 1.
        alphas: diagonals of the tridiagonal matrices, the same shape.
        betas: their off-diagonals, shape ``(num_probes, num_steps - 1)``.
        shares: contribution of each leaf to ``<q, H q>`` for the unit probe ``q``, ``(num_probes, num_leaves)``.
        squares: contribution of each leaf to ``|H q|^2``, the same shape.
    """

    nodes: Tensor
    weights: Tensor
    alphas: Tensor
    betas: Tensor
    shares: Tensor
    squares: Tensor


def run_deflated(
    H: Operator, outliers: Outliers, probes: Tensor, num_steps: int, reorthogonalize: str, chunk_size: int | None
) -> Runs:
    """Lanczos runs on what the outliers leave over of ``H``."""
    # Twice, since the second pass takes off what rounding left in the first.
    projected = outliers.project(outliers.project(probes))
    return run_probes(outliers.deflate(H), projected, num_steps, reorthogonalize, chunk_size)


def run_probes(H: Operator, probes: Tensor, num_steps: int, reorthogonalize: str, chunk_size: int | None) -> Runs:
    """Lanczos runs from the rows of ``probes``, each chunk in lockstep: one pass over the data per step.

    Raises:
        NonFiniteError: a product is NaN or infinite; its ``partial`` are the ``Runs`` of the chunks before.
    """
    if probes.shape[0] == 0:
        empty, shorter, no_shares = (
            torch.empty(0, width, dtype=torch.float64, device="cpu")
            for width in (num_steps, num_steps - 1, len(H.layout.sizes))
        )
        return Runs(empty, empty, empty, shorter, no_shares, no_shares)

    def full(unit: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        run = lanczos(continued(H, product), unit, num_steps)
        return run.alphas, run.betas

    pieces: list[Runs] = []
    for chunk in probes.split(chunk_size or probes.shape[0]):
        units = normalized(chunk)
        try:
            products = H.rows(units)
            if reorthogonalize == "full":
                alphas, betas = torch.func.vmap(full)(units, products)
            else:
                alphas, betas = _recur(H, units, products, num_steps)
            ritz = eigh_tridiagonal(alphas, betas)
        except NonFiniteError as error:
            error.partial = _joined(pieces) if pieces else None  # the caller makes a quadrature of them
            raise
        shares, squares = leaf_sums(units * products, H), leaf_sums(products.square(), H)
        found = ritz.eigenvalues, ritz.eigenvectors[:, 0].square(), alphas.cpu().double(), betas.cpu().double()
        pieces.append(Runs(*found, shares, squares))
    return _joined(pieces)


def _recur(H: Operator, units: Tensor, products: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """[`lanczos`][hessfunc.lanczos] without reorthogonalization from each unit row, in place.

    ``products`` are the first ones. Returns the diagonals and off-diagonals, shape ``(num_rows, num_steps)`` and one
    less.
    """
    eps = torch.finfo(units.dtype).eps
    rows, last = units.clone(), torch.zeros_like(units)
    beta = scale = units.new_zeros(len(units), 1)
    alphas, betas = [], []
    for i in range(num_steps):
        product = H.rows(rows) if i else products
        alpha = _by_row(tree.flat_dot, rows, product)
        torch.sub(product, last.mul_(beta), out=last).addcmul_(alpha, rows, value=-1)
        beta = _by_row(lambda row, _: tree.flat_norm(row), last, last)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        exhausted = beta <= 10 * eps * scale
        beta = torch.where(exhausted, 0, beta)
        rows, last = last, rows
        rows.mul_(torch.where(exhausted, 0, 1 / beta))
        alphas.append(alpha)
        betas.append(beta)
    return torch.cat(alphas, dim=1), torch.cat(betas[:-1] or [beta[:, :0]], dim=1)


def _by_row(function: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([function(a, b) for a, b in zip(left, right, strict=True)]).unsqueeze(1)


def _joined(pieces: list[Runs]) -> Runs:
    return Runs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def deflated_rows(values: Tensor, rest: Runs, size: int, num_rules: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of whole rows: exact ``values`` of mass ``1 / size`` each, then what the probes found."""
    count, num_steps = rest.nodes.shape
    nodes, weights = mean_rule(rest.alphas, rest.betas, num_rules, complete=num_steps >= size - len(values))
    exact = torch.full((count, len(values)), 1 / size, dtype=torch.float64, device="cpu")
    nodes = torch.cat([values.expand(count, -1), nodes], dim=1)
    return nodes, torch.cat([exact, weights * (1 - len(values) / size)], dim=1)


def check_options(
    H: Operator,
    num_steps: int,
    num_probes: int,
    num_rules: int | None,
    reorthogonalize: str,
    chunk_size: int | None,
    generator: Any,
) -> int:
    """Check what every run of probes takes; returns the number of rules."""
    check_count(num_steps, name="num_steps", maximum=H.size, why=", the size of the operator")
    check_count(num_probes, name="num_probes")
    check_choice(reorthogonalize, ("none", "full"), name="reorthogonalize")
    if chunk_size is not None:
        check_count(chunk_size, name="chunk_size")
    if num_rules is not None:
        check_count(num_rules, name="num_rules", maximum=num_steps, why=", the number of steps")
    check_generator(generator)
    return usual_num_rules(num_steps) if num_rules is None else num_rules


def normalized(rows: Tensor) -> Tensor:
    """Each row divided by its norm; a zero row stays zero."""
    # torch.sum adds in pairs and keeps the digits that torch's norms lose over long float32 vectors.
    norms = rows.square().sum(dim=1, keepdim=True).sqrt()
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)


def continued(H: Operator, product: Tensor) -> Callable[[Tensor], Tensor]:
    """The matvec of a run whose first product is known."""
    known = [product]
    return lambda vector: known.pop() if known else H.vector(vector)
