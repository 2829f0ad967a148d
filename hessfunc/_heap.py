"""Memory of the C library's heap that stays with the process while something needs it again and again."""

from __future__ import annotations

import sys

import numpy as np

SMALLEST, LARGEST = 2**22, 2**29
"""Bytes from which keeping memory is worth it, and of which to keep no more."""

_PIECE = 3 * 2**20
"""Bytes of a piece: below those from which NumPy asks for huge pages."""

_MAPPED = 2**25 - 2**13
"""Bytes of the largest block, almost, whose release tells glibc to take blocks up to this size from the heap."""


def keep_heap(num_bytes: int) -> np.ndarray | None:
    """Grow the heap by ``num_bytes``, free again, and keep it from shrinking for as long as the result lives.

    Whenever more lies free at the end of the heap than a few megabytes, glibc gives it back to the system, which clears
    page after page when it comes again: with tensors of some megabytes that are made and freed in each product a sixth
    of its time on ResNet-20, and a quarter on a small GPT. It gives back nothing below a block in use. Such a block is
    the result; nothing is ever written to it, so it takes address space and no memory.

    What is written to of the memory kept stays resident. Other parts of the process may use it meanwhile. None where
    there is nothing to gain: little memory, or another system's C library.
    """
    if not sys.platform.startswith("linux") or num_bytes < SMALLEST:
        return None
    np.empty(_MAPPED, dtype=np.uint8)  # and released at once; pages that are not written to take no time
    pieces = [np.empty(_PIECE, dtype=np.uint8) for _ in range(-(-min(num_bytes, LARGEST) // _PIECE) + 1)]
    return max(pieces, key=lambda piece: piece.ctypes.data)
