"""Batches of data and the weight each carries in the average over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hessfunc import tree
from hessfunc._checks import check_choice, check_data
from hessfunc._typing import Batch


@dataclass(frozen=True)
class Batches:
    """A pass over the data, again and again, as pairs of loss arguments and a weight.

    With ``reduction="mean"`` the loss averages over its batch, so a batch weighs by its sample count and the
    weighted sum is to be divided by the total; with ``"sum"`` every batch weighs 1 and nothing is divided.
    """

    data: Any
    reduction: str
    count: Callable[[Batch], float] | None
    device: torch.device

    @classmethod
    def of(cls, data: Any, *, reduction: str, count: Callable[[Batch], float] | None, device: torch.device) -> Batches:
        """Check ``data`` and wrap it."""
        check_choice(reduction, ("mean", "sum"), name="reduction")
        if count is not None and not callable(count):
            raise TypeError(f"count is {count!r}, expected a function from a batch to its number of samples.")
        check_data(data)
        return cls(data, reduction, count, device)

    @property
    def single(self) -> bool:
        """Whether the data is one batch: then no sample count is needed."""
        return isinstance(self.data, tuple | Mapping)

    @property
    def stable(self) -> bool:
        """Whether every pass yields the same objects, so that what was computed from them can be kept."""
        return self.single or isinstance(self.data, list)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], float]]:
        if self.single:
            yield self._arguments(self.data), 1.0
            return
        empty = True
        for position, batch in enumerate(self.data):
            empty = False
            yield self._arguments(batch), self._weight(batch, position)
        if empty:
            raise ValueError(
                "data is empty: a pass over it yielded no batch. If it worked before, it can be iterated over only "
                "once: pass list(data)."
            )

    def total(self, weights: list[float]) -> float:
        """What the weighted sum of one pass is to be divided by."""
        return sum(self.divisor(position, weight) for position, weight in enumerate(weights))

    def divisor(self, position: int, weight: float) -> float:
        """What a batch adds to that number, which is 1 for a sum."""
        return weight if self.reduction == "mean" else float(position == 0)

    def _arguments(self, batch: Batch) -> tuple[Any, ...]:
        if self._is_ready(batch):
            return batch
        arguments = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return tree.map_leaves(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, arguments)

    def _is_ready(self, batch: Batch) -> bool:
        return type(batch) is tuple and all(isinstance(x, torch.Tensor) and x.device == self.device for x in batch)

    def holds(self, arguments: tuple[Any, ...], position: int) -> bool:
        """Whether these loss arguments are a batch itself, of tensors alone, which stays the same in every pass."""
        return self.stable and arguments is (self.data if self.single else self.data[position])

    def _weight(self, batch: Batch, position: int) -> float:
        if self.reduction == "sum":
            return 1.0
        weight = float(_leading_length(batch, position) if self.count is None else self.count(batch))
        if not 0 < weight < float("inf"):
            raise ValueError(f"count is {weight} for batch {position}; every batch needs a positive sample count.")
        return weight


def _leading_length(batch: Batch, position: int) -> int:
    # A user-made mapping (a tokenizer's output) is no pytree node, but holds its tensors all the same.
    content = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in tree.leaves(content) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    lengths = sorted({leaf.shape[0] for leaf in tensors})
    if len(lengths) != 1:
        found = "no tensors" if not lengths else f"tensors of leading lengths {lengths}"
        raise ValueError(
            f"the sample count of batch {position} is unclear: it holds {found}. Pass count=, a function from the "
            "batch to the number that its mean-reduced loss divides by, or reduction='sum'."
        )
    return lengths[0]
