"""Whether one pass over the data saw the same numbers as another, told from sums over them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from hessfunc import tree
from hessfunc._typing import Tensor

_ROUNDING = 1e-9


class Fingerprint:
    """Sums over the numbers of each batch and over their squares, in the order in which the batches came."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, batch: tuple[Any, ...]) -> None:
        """Take up a batch."""
        total = torch.zeros(3, dtype=torch.float64, device="cpu")
        for leaf in tree.leaves(batch):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                total = total + _sums(leaf)
        self._batches.append(total)

    def same_content(self, other: Fingerprint) -> bool:
        """Whether both saw the same numbers, in whatever order."""
        return _close(torch.stack(self._batches).sum(0), torch.stack(other._batches).sum(0))

    def same_batches(self, other: Fingerprint) -> bool:
        """Whether both saw the same batches, in whatever order."""
        if len(self._batches) != len(other._batches):
            return False
        mine, others = (sorted(batches, key=torch.Tensor.tolist) for batches in (self._batches, other._batches))
        return all(map(_close, mine, others))


def in_double(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, on the CPU where its device has no such dtype (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def explained_difference(data: Any, first: Fingerprint, now: Fingerprint, *, coupled: list[str]) -> str | None:
    """What makes the products of two passes differ, if it is the data; ``coupled`` modules mix samples."""
    if not first.same_content(now):
        return (
            f"data: this pass over the {_described(data)} saw other numbers than the first one, so that each product "
            f"would be with another matrix. {_cause(data)} Pass a fixed list of batches, such as list(loader)."
        )
    if coupled and not first.same_batches(now):
        return (
            f"data: the {_described(data)} makes up its batches anew in each pass, and {', '.join(coupled[:4])} "
            "normalizes by the batch, so that each product would be with another matrix. Pass shuffle=False or a fixed "
            "list of batches, or call model.eval()."
        )
    return None


def _described(data: Any) -> str:
    dataset = getattr(data, "dataset", None)
    return type(data).__name__ + (f" of {type(dataset).__name__}" if dataset is not None else "")


def _cause(data: Any) -> str:
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler) and data.drop_last:
            return "It shuffles and drops the last batch (shuffle=True, drop_last=True), or its dataset augments."
        if isinstance(data.sampler, RandomSampler) and data.sampler.num_samples < len(data.dataset):  # type: ignore[arg-type]
            return "It draws a part of the samples, or its dataset augments."
        return "Its dataset or collate function changes the samples at random (data augmentation)."
    return "It changes the samples or draws others (data augmentation, a sampler)."


def _sums(leaf: Tensor) -> Tensor:
    flat = leaf.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = in_double(flat)
    return torch.stack([flat.sum(), flat @ flat, flat.new_tensor(float(flat.numel()))]).cpu()


def _close(a: Tensor, b: Tensor) -> bool:
    # The sum of n numbers against sqrt(n * sum of squares), the most it could be; what is not finite is not compared.
    size = torch.stack([torch.sqrt(a[1] * a[2]), a[1], a[2]])
    return not bool(((a - b).abs() > _ROUNDING * size).any())
