"""The mean of the Gauss rules that the last steps of a Lanczos run give, in place of the last one alone."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from hessfunc._lanczos import eigh_tridiagonal
from hessfunc._typing import Tensor

_PART = 4
"""The rules of this part of the steps are averaged: errors hardly change between a sixth and a half of them."""


def usual_num_rules(num_steps: int) -> int:
    """How many rules to average by default."""
    return max(1, num_steps // _PART)


def mean_rule(alphas: Tensor, betas: Tensor, num_rules: int, *, complete: bool = False) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mean of the Gauss rules of ``m``, ``m - 1``, ... ``m - num_rules + 1`` steps.

    A Gauss rule puts the mass of a spectrum that it does not resolve on one node, now on one side of it and now on the
    other, as the number of steps has it; most of a network's eigenvalues are such a mass near 0. Means of rules of
    neighbouring lengths have errors of both signs in them, and more nodes; averages of a Gauss rule with one that errs
    on the other side are Laurie's (1996, "Anti-Gaussian quadrature formulas").

    The rule of a run that ended is exact, and so are those of ``complete`` ones: the mean is then this rule alone, the
    other nodes have weight 0.

    Args:
        alphas: diagonals, shape ``(num_rows, m)``, float64.
        betas: off-diagonals, shape ``(num_rows, m - 1)``.
        num_rules: between 1 and m.
        complete: whether the Krylov spaces are whole spaces.

    Returns:
        Both of shape ``(num_rows, m + (m - 1) + ...)``, the nodes ascending.
    """
    count, m = alphas.shape
    lengths = range(m, m - num_rules, -1)
    if not count:
        return alphas.new_empty(0, sum(lengths)), alphas.new_empty(0, sum(lengths))
    ended = ((betas == 0).any(1, keepdim=True) | complete).double()
    nodes, weights = [], []
    for length in lengths:
        rule = eigh_tridiagonal(alphas[:, :length], betas[:, : length - 1])
        share = (1 - ended) / num_rules + ended * (length == m)
        nodes.append(rule.eigenvalues)
        weights.append(share * rule.eigenvectors[:, 0].square())
    values, order = torch.cat(nodes, dim=1).sort(dim=1)
    return values, torch.cat(weights, dim=1).gather(1, order)


def recurrence(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal and off-diagonal of the Lanczos run whose Gauss rule this is; the weights are above 0.

    A Householder reduction of the diagonal matrix bordered by the square roots of the weights, which keeps the first
    row in place (Gragg and Harrod 1984, section 1).
    """
    bordered = np.diag(np.concatenate([[0.0], nodes.numpy()]))
    bordered[0, 1:] = bordered[1:, 0] = weights.sqrt().numpy()
    reduced = scipy.linalg.hessenberg(bordered)
    diagonal, off_diagonal = np.diag(reduced)[1:], np.abs(np.diag(reduced, -1))[1:]
    return torch.from_numpy(diagonal.copy()), torch.from_numpy(off_diagonal.copy())
