"""A batch of classifications read position by position, with sums over the positions of each class."""

from __future__ import annotations

import torch

from hessfunc._likelihood import Categorical, Observed
from hessfunc._typing import Tensor


class Positions:
    """A batch read position by position: probabilities, labels, and sums over the positions of each class.

    ``weighted`` is ``w_{i,c'}`` and ``own`` says where ``c'`` is the label, both of shape ``(positions, C)``.
    """

    def __init__(self, seen: Observed) -> None:
        self._axis = Categorical().along(seen.outputs)
        moved = seen.outputs.movedim(self._axis, -1)
        self._shape = moved.shape
        self._p = self._flat(seen.outputs).softmax(-1)
        counted = Categorical.counted(seen)
        self._labels = torch.where(counted, seen.target, torch.zeros_like(seen.target)).reshape(-1)
        self.weighted = self._p * (counted.reshape(-1, 1) * seen.weight)
        self.own = self._labels.unsqueeze(1) == torch.arange(self._shape[-1], device=self._labels.device)

    def inner(self, tangents: Tensor) -> Tensor:
        """``<g_{i,c'}, v>`` from ``J v``."""
        flat = self._flat(tangents)
        return (self._p * flat).sum(-1, keepdim=True) - flat

    def combined(self, coefficients: Tensor) -> Tensor:
        """Cotangents whose pull-back is ``sum coefficients_{i,c'} g_{i,c'}``."""
        flat = self._p * coefficients.sum(-1, keepdim=True) - coefficients
        return flat.reshape(self._shape).movedim(-1, self._axis)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the positions of each class, shape ``(C, C)``."""
        size = self._shape[-1]
        return values.new_zeros(size, size).index_add(0, self._labels, values)

    def spread(self, square: Tensor) -> Tensor:
        """The row of each position's class: the transpose of ``sums``."""
        return square.to(self._p.dtype).index_select(0, self._labels)

    def _flat(self, array: Tensor) -> Tensor:
        return array.movedim(self._axis, -1).reshape(-1, self._shape[-1])
