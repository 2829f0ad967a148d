"""Whether two large vectors agree, without both of them in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hessfunc import _probes
from hessfunc._typing import Tensor

PARTS = 1024


class Summary(NamedTuple):
    """What is remembered of a vector.

    Attributes:
        norm: its length, not finite if it is not.
        sums: of random combinations of its entries, part by part: those of a difference are on average as long as the
            difference, to a few per cent (a sketch after Johnson and Lindenstrauss 1984).
    """

    norm: Tensor
    sums: Tensor

    @classmethod
    def of(cls, vector: Tensor) -> Summary:
        """Sum up an array of any shape; the same combinations for all of one size."""
        flat = vector.reshape(-1)
        width = flat.numel() // PARTS
        whole = PARTS * width
        generator = torch.Generator().manual_seed(0)
        factors = _probes.normal(1, width, generator=generator, dtype=flat.dtype, device=flat.device)[0]
        sums = torch.cat([flat[:whole].view(PARTS, width) @ factors, flat[whole:]]) if width > 1 else flat.clone()
        return cls(torch.linalg.vector_norm(flat), sums)

    def agrees(self, other: Summary, tolerance: float) -> bool:
        """Whether the difference is within ``tolerance``, relative to the other."""
        return bool(torch.linalg.vector_norm(self.sums - other.sums) <= tolerance * other.norm)
