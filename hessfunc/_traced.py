"""A curvature product traced once for each shape of batch, and the residuals worth keeping between products."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from hessfunc import tree
from hessfunc._checks import ProductWarning
from hessfunc._linearize import Linearized, replayed
from hessfunc._recorder import NotRecordableError
from hessfunc._typing import Loss, Params, Tensor

Product = Callable[..., Params]
"""``product(loss, params, v, *batch)``: a curvature product such as [`hvp`][hessfunc.hvp]."""

MAX_LANES = 8
LANE_ELEMENTS, CPU_LANE_ELEMENTS = 1 << 20, 1 << 18
"""Lanes of one operation hold about this many numbers at most: beyond that batching saves no overhead any more, and on
the CPU what does not fit into the cache costs more than it saves."""


PATIENCE = 4
"""How often a number of lanes is asked for before it gets a program of its own, which takes as long to make as tens of
products of a small network."""


class Programs:
    """What products of one loss share at all points: programs by shape of batch and number of lanes.

    Attributes:
        traced: the programs.
        requests: how often a number of lanes came up.
        eager: whether there are none, since the product cannot be traced or shall not be.
    """

    def __init__(self, *, eager: bool) -> None:
        self.traced: dict[Hashable, Linearized] = {}
        self.requests: dict[Hashable, int] = {}
        self.eager = eager


class TracedProduct:
    """``product`` at fixed parameters, on flat rows, through its primal and tangent programs.

    Its vectors and results lie as ``domain`` and ``image`` say, by default as the parameters.

    The first product on a batch of a new shape runs eagerly and is recorded; later ones replay the tangent program
    on residuals that one evaluation of the primal program per batch provides. Residuals of batches that stay the same
    objects are kept from pass to pass up to a budget. What cannot be recorded runs eagerly, after a ``ProductWarning``.
    """

    def __init__(
        self,
        product: Product,
        loss: Loss,
        params: Params,
        *,
        programs: Programs,
        vmappable: bool,
        max_lanes: int | None,
        memory_budget: int | None,
        compile: bool,
        domain: tree.Layout | None = None,
        image: tree.Layout | None = None,
    ) -> None:
        self._product = product
        self._loss = loss
        self._layout = tree.Layout.of(params)
        self._domain = domain or self._layout
        self._image = image or self._layout
        self._params, self._spec = tree.flatten(params)
        self._vmappable = vmappable
        self._compile = compile
        self._max_lanes = max_lanes
        self._budget = available_memory(self._layout.device) // 4 if memory_budget is None else memory_budget
        self._most_shared = float("inf") if memory_budget is None else memory_budget
        self._programs = programs
        self._strides = tuple(leaf.stride() for leaf in self._params)
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.RLock()  # several threads may share an operator, one product at a time

    def rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool) -> Tensor:
        """Products with each row on one batch; ``keep`` says that the batch at this position stays the same object."""
        with self._lock:
            return self._locked_rows(rows, batch, position, keep=keep)

    def _locked_rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool) -> Tensor:
        leaves, spec = tree.flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        shapes = _signature(leaves, spec)
        if self._programs.eager or shapes is None:
            return self._run_eagerly(rows, batch)
        signature = (shapes, self._strides)

        def function(*inputs: Tensor) -> Tensor:
            given = iter(inputs[len(self._params) : -1])
            whole = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            params = tree.unflatten(inputs[: len(self._params)], self._spec)
            return self._eager_rows(inputs[-1], tree.unflatten(whole, spec), params)

        primals = [*self._params, *tensors]
        results: list[Tensor] = []
        pieces = self._lanes(signature, rows.shape[0])
        way = _Way(position, keep, alone=len(pieces) == 1, shared={})
        for lanes in pieces:
            start = sum(map(len, results))
            piece = rows[start : start + lanes]
            program = self._programs.traced.get((signature, lanes))
            if program is None:
                program, result = self._trace(function, primals, piece, way)
                if program is not None:
                    self._programs.traced[signature, lanes] = program
            else:
                result = self._apply(program, function, primals, piece, way)
            if result is None:
                return self._run_eagerly(rows, batch)
            results.append(result)
        return torch.cat(results) if len(results) > 1 else results[0]

    def _apply(
        self,
        program: Linearized,
        function: Callable[..., Tensor],
        primals: list[Tensor],
        rows: Tensor,
        way: _Way,
    ) -> Tensor | None:
        in_one = self._in_one(program, primals, way)
        if in_one not in program.checked:
            result = replayed(function, primals, rows, program, function(*primals, rows), in_one=in_one)
            if result is None:
                self._give_up("the replayed product differs from the eager one")
            return result
        if in_one:
            return program.apply_once(primals, rows)
        return program.apply(primals, self._residuals(program, primals, way), rows)

    def _in_one(self, program: Linearized, primals: list[Tensor], way: _Way) -> bool:
        """Whether to do without residuals: they would serve no other product, or are too large to."""
        if self._compile:  # the tangent program is what is compiled
            return False
        kept = self._kept.get(way.position)
        if kept is not None and kept.fits(program, primals):
            return False
        others = sum(kept.bytes for position, kept in self._kept.items() if position != way.position)
        if way.keep and program.residual_bytes + others <= self._budget:
            return False
        return way.alone or program.residual_bytes > self._most_shared

    def _lanes(self, signature: Hashable, wanted: int) -> list[int]:
        """How many rows to take together: powers of two that suit the size of the operations, of sum ``wanted``."""
        single = self._programs.traced.get((signature, 1))
        if single is None or not self._vmappable:
            return [1] * wanted
        limit = MAX_LANES if self._max_lanes is None else self._max_lanes
        if self._max_lanes is None:
            # Convolutions with a kernel per lane become grouped ones, which are slower than one after the other.
            elements = CPU_LANE_ELEMENTS if self._layout.device.type == "cpu" else LANE_ELEMENTS
            limit = 1 if single.convolves else min(limit, int(elements / single.mean_elements) or 1)
        largest = 1 << (limit.bit_length() - 1)
        pieces = [largest] * (wanted // largest)
        pieces += [1 << bit for bit in reversed(range(limit.bit_length() - 1)) if wanted % largest & 1 << bit]
        requests = self._programs.requests
        for lanes in set(pieces):
            requests[signature, lanes] = requests.get((signature, lanes), 0) + 1
        known = {lanes: lanes == 1 or requests[signature, lanes] > PATIENCE for lanes in set(pieces)}
        return [part for lanes in pieces for part in ([lanes] if known[lanes] else [1] * lanes)]

    def _trace(
        self, function: Callable[..., Tensor], primals: list[Tensor], rows: Tensor, way: _Way
    ) -> tuple[Linearized | None, Tensor | None]:
        for rewrite in (True, False):
            try:
                program = Linearized(function, primals, rows, compile=self._compile, rewrite=rewrite)
            except NotRecordableError as error:
                self._give_up(str(error))
                return None, None
            if rewrite and not self._is_repeatable(function, primals, rows, program):
                return None, None
            eager = program.result
            del program.result  # as large as the vector
            in_one = self._in_one(program, primals, way)
            try:
                result = replayed(function, primals, rows, program, eager, in_one=in_one)
            except RuntimeError:
                if not rewrite:
                    raise
                continue
            if result is not None:
                return program, result  # as all products after it
        self._give_up("the replayed product differs from the eager one")
        return None, None

    def _is_repeatable(
        self, function: Callable[..., Tensor], primals: list[Tensor], rows: Tensor, program: Linearized
    ) -> bool:
        """Whether the program draws no random numbers; those that change from run to run are refused."""
        if program.random:
            again = function(*primals, rows)
            if not torch.equal(again, program.result):
                raise ValueError(
                    "the loss is not deterministic: two products with the same vector differ, and it draws random "
                    f"numbers ({', '.join(sorted(set(program.random)))}). Call model.eval() if that is dropout, or fix "
                    "the randomness inside the loss; a Hessian that changes between products has no eigenvalues."
                )
            self._give_up("the loss draws random numbers")
        return not program.random

    def _give_up(self, reason: str) -> None:
        self._programs.eager = True
        warnings.warn(
            f"the product cannot be traced ({reason}); each one now repeats the whole loss and gradient, which is "
            "slower and otherwise the same. hessian(..., linearize=False) does so without this warning.",
            ProductWarning,
            stacklevel=2,
        )

    def _residuals(self, program: Linearized, primals: list[Tensor], way: _Way) -> list[Tensor]:
        kept = self._kept.get(way.position)
        if kept is not None and kept.fits(program, primals):
            return kept.residuals
        if program in way.shared:
            return way.shared[program]
        way.shared.clear()  # those of another number of lanes
        residuals = program.residuals(primals)
        if way.keep:
            self._kept.pop(way.position, None)
            fresh = _Kept(program, primals, residuals)
            if fresh.bytes + sum(kept.bytes for kept in self._kept.values()) <= self._budget:
                self._kept[way.position] = fresh
                return residuals
        way.shared[program] = residuals
        return residuals

    def _run_eagerly(self, rows: Tensor, batch: tuple[Any, ...]) -> Tensor:
        params = tree.unflatten(self._params, self._spec)
        pieces = rows.split(self._max_lanes or MAX_LANES)
        return torch.cat([self._eager_rows(piece, batch, params) for piece in pieces])

    def _eager_rows(self, rows: Tensor, batch: tuple[Any, ...], params: Params) -> Tensor:
        def single(row: Tensor) -> Tensor:
            return self._image.ravel(self._product(self._loss, params, self._domain.unravel(row), *batch))

        if rows.shape[0] == 1 or not self._vmappable:
            return torch.stack([single(row) for row in rows])
        return torch.func.vmap(single, randomness="same")(rows)


class _Way(NamedTuple):
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


class _Kept:
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


def _signature(leaves: list[Any], spec: Any) -> Hashable | None:
    """What a traced program depends on besides the values of tensors; None if that cannot be compared."""
    parts: list[Hashable] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif isinstance(leaf, int | float | bool | str | type(None)):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)
