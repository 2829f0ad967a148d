"""Terms of a sum that is linear in tangents, and the fixed factors in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Factor:
    """``target(*arguments)`` on fixed tensors; arguments are nodes, numbers and factors."""

    target: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    shape: torch.Size


@dataclass(frozen=True)
class Term:
    """``scale * factor * base``, the factor a fixed tensor or None for 1."""

    base: Node
    factor: Node | Factor | None
    scale: float


@dataclass(frozen=True)
class Plan:
    """``factor * (start + sum of rest)``, and how many operations that takes.

    Of the rest, ``joined`` are products of matrices that are added by what computes them.
    """

    start: Term
    rest: list[Term]
    joined: list[Term]
    factor: Node | Factor | None
    operations: int


TOO_LARGE = object()
"""In place of a product of factors that has more entries than either."""


def combined(target: Any, left: Any, right: Any, left_shape: torch.Size, right_shape: torch.Size) -> Any:
    """``target(left, right)``, or ``TOO_LARGE``."""
    shape = torch.broadcast_shapes(left_shape, right_shape)
    if shape.numel() > max(left_shape.numel(), right_shape.numel()):
        return TOO_LARGE
    return Factor(target, (left, right), (), shape)
