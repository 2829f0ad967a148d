"""A linear map as a sum of one for each batch of the data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hessfunc._typing import Tensor

Rows = Callable[[Tensor], Tensor]
"""A linear map on flat vectors, row by row."""


class Term(NamedTuple):
    """One batch's part in an operator, which is ``sum of weight * rows`` over ``sum of divisor``.

    Attributes:
        rows: the batch's own matrix as a map on flat rows, to be used before the next term is taken.
        weight: what it is multiplied by.
        divisor: what the batch adds to the number that the sum is divided by.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss = lambda w, x: ((x @ w) ** 2).mean() / 2
        >>> H = hf.hessian(loss, torch.zeros(2), [(torch.eye(2),), (torch.ones(1, 2),)])
        >>> v = torch.tensor([[1.0, 0.0]])
        >>> [(term.weight, term.rows(v)) for term in H.terms()]
        [(2.0, tensor([[0.5000, 0.0000]])), (1.0, tensor([[1., 1.]]))]
        >>> sum(term.weight * term.rows(v) for term in H.terms()) / sum(term.divisor for term in H.terms())
        tensor([[0.6667, 0.3333]])
    """

    rows: Rows
    weight: float
    divisor: float


Terms = Callable[[], Iterator[Term]]


def paired(left: Terms, right: Terms, factor: float) -> Terms:
    """Those of a sum of two operators over the same batches."""

    def terms() -> Iterator[Term]:
        for one, other in itertools.zip_longest(left(), right()):
            if one is None or other is None or one[1:] != other[1:]:
                raise ValueError(
                    "the operators that were added are over other batches, or weigh them otherwise, so that their sum "
                    "has no terms batch by batch; build both from the same data with the same reduction and count."
                )
            yield one._replace(rows=functools.partial(summed_rows, one.rows, other.rows, factor))

    return terms


def summed_rows(left: Rows, right: Rows, factor: float, rows: Tensor) -> Tensor:
    """``left + factor * right`` on rows."""
    return left(rows).add(right(rows), alpha=factor)
