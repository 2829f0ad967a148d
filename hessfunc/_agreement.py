"""Whether two large vectors agree, without both of them in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hessfunc import _probes
from hessfunc._typing import Tensor

PARTS, LEAST = 256, 16
"""How many sums are kept of a vector, unless that would be of fewer than ``LEAST`` entries each."""


class Summary(NamedTuple):
    """What is remembered of a vector.

    Attributes:
        norm: its length, not finite if it is not.
        sums: of its entries with random signs, part by part: those of a difference are on average as long as the
            difference, to a few per cent (a sketch after Johnson and Lindenstrauss 1984).
    """

    norm: Tensor
    sums: Tensor

    @classmethod
    def of(cls, vector: Tensor) -> Summary:
        """Sum up an array of any shape; the same combinations for all of one size."""
        flat = vector.reshape(-1)
        width = flat.numel() // PARTS
        norm = torch.linalg.vector_norm(flat)
        if width < LEAST:
            return cls(norm, flat.clone())
        generator = torch.Generator().manual_seed(0)
        signs = _probes.signs(1, width, generator=generator, dtype=flat.dtype, device=flat.device)[0]
        whole = PARTS * width
        return cls(norm, torch.cat([flat[:whole].view(PARTS, width) @ signs, flat[whole:]]))

    def agrees(self, other: Summary, tolerance: float) -> bool:
        """Whether the difference is within ``tolerance``, relative to the other."""
        return bool(torch.linalg.vector_norm(self.sums - other.sums) <= tolerance * other.norm)
