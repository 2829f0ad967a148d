"""How many probes to hold at a time, and probes in chunks of that length."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hessfunc._checks import check_count, check_finite
from hessfunc._operators import Operator
from hessfunc._probes import Sampler
from hessfunc._typing import Tensor

CHUNK_PROBES, FEW_PROBES = 16, 4
CACHED_BYTES, CHUNK_BYTES = 2**24, 2**28
"""Probes held at a time unless ``chunk_size`` says otherwise: 16; down to 4 if they take more than 16 MiB, beyond which
fresh memory costs more than a pass over the data saves; and down to 1 if they take more than 256 MiB."""


def chunk_length(H: Operator, chunk_size: int | None) -> int:
    """Number of probes to hold at a time."""
    if chunk_size is not None:
        check_count(chunk_size, name="chunk_size")
        return chunk_size
    each = H.size * H.dtype.itemsize
    return max(1, min(CHUNK_PROBES, max(FEW_PROBES, CACHED_BYTES // each), CHUNK_BYTES // each))


def draw(H: Operator, num_probes: int, sampler: Sampler, chunk: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Probes in chunks of rows.

    Each probe is drawn by a call of its own: a stream may depend on how many numbers one call asks for.
    """
    for start in range(0, num_probes, chunk):
        length = min(chunk, num_probes - start)
        rows = [sampler(1, H.size, generator=generator, dtype=H.dtype, device=H.device) for _ in range(length)]
        yield torch.cat(rows)


def check_samples(samples: Tensor) -> None:
    """Raise if a product, or a sample made of products, is NaN or infinite."""
    check_finite(samples, what="the product with a probe", remedy="the operator overflows, or is not defined there.")
