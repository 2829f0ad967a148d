"""Residuals that are kept between products, and how a product asks for them."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from hessfunc._linearize import Linearized
from hessfunc._typing import Tensor


class Way(NamedTuple):
    """How a product is asked for.

    Attributes:
        position: of the batch.
        keep: whether the batch stays the same object.
        alone: whether no other product shares the pass.
        shared: residuals of this pass that are not kept.
    """

    position: int
    keep: bool
    alone: bool
    shared: dict[Linearized, list[Tensor]]


class Kept:
    """Residuals, and what they were computed from: held, so that an object's identity stays its own."""

    def __init__(self, program: Linearized, primals: list[Tensor], residuals: list[Tensor]) -> None:
        self.program = program
        self.primals = primals
        self.residuals = residuals
        self.versions = _versions(program, primals)
        # Told apart by the storage object: torch's zero tensors have no memory to point to.
        known = {tensor.untyped_storage()._cdata for tensor in primals}
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in residuals}
        self.bytes = sum(size for pointer, size in storages.items() if pointer not in known)

    def fits(self, program: Linearized, primals: list[Tensor]) -> bool:
        """Whether they are those of the program at these primals."""
        same = all(a is b for a, b in zip(self.primals, primals, strict=True))
        return self.program is program and same and self.versions == _versions(program, primals)


def available_memory(device: torch.device) -> int:
    """Free memory of a device in bytes, or 1 GiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 30


def _versions(program: Linearized, primals: list[Tensor]) -> list[int]:
    # An inference tensor has no version counter, and no in-place changes either.
    return [-1 if t.is_inference() else t._version for t in [*primals, *program.constants]]
