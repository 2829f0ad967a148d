"""A curvature product traced once for each shape of batch, and the residuals worth keeping between products."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch

from hessfunc import _probes, tree
from hessfunc._agreement import Summary
from hessfunc._checks import ProductWarning
from hessfunc._compat import evaluated
from hessfunc._kept import Kept, Way, available_memory
from hessfunc._linearize import Linearized, replayed
from hessfunc._recorder import NotRecordableError
from hessfunc._rules import Product, Programs
from hessfunc._shadows import Shadow, ShadowError
from hessfunc._typing import Loss, Params, Tensor

MAX_LANES = 8
LANE_ELEMENTS, CPU_LANE_ELEMENTS = 1 << 20, 1 << 18
"""Lanes of one operation hold about this many numbers at most: beyond that batching saves no overhead any more, and on
the CPU what does not fit into the cache costs more than it saves."""


OUTWEIGHED = 10
"""What does not depend on the vector takes this many times the memory of the parameters where they are outweighed."""

PATIENCE = 4
"""How often a number of lanes is asked for before it gets a program of its own, which takes as long to make as tens of
products of a small network."""


class TracedProduct:
    """A product at fixed parameters, on flat rows, through its primal and tangent programs.

    Its vectors and results lie as ``domain`` and ``image`` say, by default as the parameters.

    The first product on a batch of a new shape runs eagerly and is recorded; later ones replay the tangent program
    on residuals that one evaluation of the primal program per batch provides. Residuals of batches that stay the same
    objects are kept from pass to pass up to a budget. What cannot be recorded runs eagerly, after a ``ProductWarning``;
    where an operation lacks a derivative that a rule needs, the next rule takes over, after another one.

    With a budget below one vector nothing runs for the recording alone: it is made without memory, and compared with
    an eager product in the order of differentiation that needs less.
    """

    def __init__(
        self,
        loss: Loss,
        params: Params,
        *,
        programs: Programs,
        max_lanes: int | None,
        memory_budget: int | None,
        compile: bool,
        domain: tree.Layout | None = None,
        image: tree.Layout | None = None,
    ) -> None:
        self._loss = loss
        self._layout = tree.Layout.of(params)
        self._domain = domain or self._layout
        self._image = image or self._layout
        self._params, self._spec = tree.flatten(params)
        self._compile = compile
        self._max_lanes = max_lanes
        self._budget = available_memory(self._layout.device) // 4 if memory_budget is None else memory_budget
        self._most_shared = float("inf") if memory_budget is None else memory_budget
        self._bytes = sum(leaf.numel() * leaf.element_size() for leaf in self._params)
        self._frugal = self._most_shared < self._bytes
        self._programs = programs
        self._strides = tuple(leaf.stride() for leaf in self._params)
        self._kept: dict[int, Kept] = {}
        self._lock = threading.RLock()  # several threads may share an operator, one product at a time

    def rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool) -> Tensor:
        """Products with each row on one batch; ``keep`` says that the batch at this position stays the same object."""
        with self._lock:
            return self._programs.by_a_rule_that_works(partial(self._locked_rows, rows, batch, position, keep=keep))

    def prepare(self, batch: tuple[Any, ...], position: int, *, keep: bool) -> None:
        """Trace for single rows, where memory is scarce and nothing is traced yet: before there are rows in it."""
        if self._frugal:
            with self._lock:
                self._programs.by_a_rule_that_works(partial(self._prepare, batch, position, keep))

    def _prepare(self, batch: tuple[Any, ...], position: int, keep: bool) -> None:
        traceable = self._traceable(batch)
        if traceable is not None and (traceable.signature, 1) not in self._programs.traced:
            like = torch.empty(1, self._domain.size, dtype=self._domain.dtype, device="meta")
            self._trace(traceable, Shadow(like, self._domain.device), Way(position, keep, alone=True, shared={}))

    def _locked_rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool) -> Tensor:
        traceable = self._traceable(batch)
        if traceable is None:
            return self._run_eagerly(rows, batch)
        results: list[Tensor] = []
        pieces = self._lanes(traceable.signature, rows.shape[0])
        way = Way(position, keep, alone=len(pieces) == 1, shared={})
        for lanes in pieces:
            start = sum(map(len, results))
            piece = rows[start : start + lanes]
            program = self._programs.traced.get((traceable.signature, lanes))
            result = None
            if program is None:
                program, result = self._trace(traceable, piece, way)
            if program is not None and result is None:
                result = self._apply(program, traceable, piece, way)
            if result is None:
                return self._run_eagerly(rows, batch)
            results.append(result)
        return torch.cat(results) if len(results) > 1 else results[0]

    def _traceable(self, batch: tuple[Any, ...]) -> _Traceable | None:
        leaves, spec = tree.flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        shapes = _signature(leaves, spec)
        if self._programs.eager or shapes is None:
            return None

        def function(*inputs: Tensor) -> Tensor:
            given = iter(inputs[len(self._params) : -1])
            whole = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            params = tree.unflatten(inputs[: len(self._params)], self._spec)
            return self._eager_rows(inputs[-1], tree.unflatten(whole, spec), params)

        return _Traceable(batch, (shapes, self._strides), function, [*self._params, *tensors])

    def _apply(self, program: Linearized, traceable: _Traceable, rows: Tensor, way: Way) -> Tensor | None:
        primals = traceable.primals
        in_one = self._in_one(program, primals, way)
        if in_one not in program.checked:
            eager = Summary.of(traceable.function(*primals, rows))
            result = replayed(traceable.function, primals, lambda: rows, program, eager, in_one=in_one)
            if result is None:
                self._give_up("the replayed product differs from the eager one")
            return result
        if in_one:
            return program.apply_once(primals, rows)
        return program.apply(primals, self._residuals(program, primals, way), rows)

    def _in_one(self, program: Linearized, primals: list[Tensor], way: Way) -> bool:
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
        if single is None or not self._programs.rule.vmappable:
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

    def _trace(self, traceable: _Traceable, rows: Tensor, way: Way) -> tuple[Linearized | None, Tensor | None]:
        """A program that was compared with the function, and the product with ``rows`` if it was compared on that."""
        rule, primals = self._programs.rule, traceable.primals
        probe = partial(self._probe, rows.shape[0]) if self._frugal else lambda: rows
        # On the tape a loss could read numbers unseen, by way of NumPy; a shadow has none to read.
        attempts = [(True, True)] * (self._frugal or not rule.vmappable)
        attempts += [(False, True), (False, False)] if rule.vmappable else [(True, False)]
        reason = "the replayed product differs from the eager one"
        for on_shadows, rewrite in attempts:
            try:
                program, reference = self._recorded(traceable, rows, probe, on_shadows=on_shadows, rewrite=rewrite)
            except NotRecordableError as error:
                reason = str(error)
                break
            except ShadowError as error:
                reason = str(error)
                continue
            if program.random:
                self._check_repeats(traceable, probe, program)
                reason = "the loss draws random numbers"
                break
            in_one = self._in_one(program, primals, way)
            try:
                result = replayed(traceable.function, primals, probe, program, reference, in_one=in_one)
            except RuntimeError:
                if not rewrite:
                    raise
                continue
            if result is not None:
                self._programs.traced[traceable.signature, rows.shape[0]] = program
                return program, None if self._frugal else result  # as all products after it
        self._give_up(reason)
        return None, None

    def _recorded(
        self, traceable: _Traceable, rows: Tensor, probe: Callable[[], Tensor], *, on_shadows: bool, rewrite: bool
    ) -> tuple[Linearized, Summary]:
        """A program for rows like these, and the eager product with ``probe()`` to compare it with."""
        function, primals, lighter = traceable.function, traceable.primals, self._programs.rule.lighter
        record = partial(Linearized, function, primals, compile=self._compile, rewrite=rewrite, on_shadows=on_shadows)
        if not on_shadows:
            program = record(probe())
            return program, Summary.of(program.take_result())
        # Something runs in earnest first: what a loss makes at its first run and keeps shall have numbers.
        if lighter is None:
            reference = Summary.of(function(*primals, probe()))
            return record(rows), reference
        evaluated(self._loss, tree.unflatten(self._params, self._spec), *traceable.batch)
        program = record(rows)
        if rows.shape[0] == 1 and program.residual_bytes < OUTWEIGHED * self._bytes:
            with contextlib.suppress(NotImplementedError):
                return program, Summary.of(self._product_by(lighter, traceable.batch, probe))
        return program, Summary.of(function(*primals, probe()))

    def _product_by(self, product: Product, batch: tuple[Any, ...], probe: Callable[[], Tensor]) -> Tensor:
        # Forward mode would copy views of a flat vector, and does not copy these.
        v = tree.map_leaves(torch.clone, self._domain.unravel(probe()[0]))
        result = product(self._loss, tree.unflatten(self._params, self._spec), v, *batch)
        del v
        return self._image.ravel(result)

    def _probe(self, num: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        layout = self._domain
        return _probes.normal(num, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)

    def _check_repeats(self, traceable: _Traceable, probe: Callable[[], Tensor], program: Linearized) -> None:
        first, second = (traceable.function(*traceable.primals, probe()) for _ in range(2))
        if not torch.equal(first, second):
            raise ValueError(
                "the loss is not deterministic: two products with the same vector differ, and it draws random "
                f"numbers ({', '.join(sorted(set(program.random)))}). Call model.eval() if that is dropout, or fix "
                "the randomness inside the loss; a Hessian that changes between products has no eigenvalues."
            )

    def _give_up(self, reason: str) -> None:
        self._programs.eager = True
        warnings.warn(
            f"the product cannot be traced ({reason}); each one now repeats the whole loss and gradient, which is "
            "slower and otherwise the same. hessian(..., linearize=False) does so without this warning.",
            ProductWarning,
            stacklevel=2,
        )

    def _residuals(self, program: Linearized, primals: list[Tensor], way: Way) -> list[Tensor]:
        kept = self._kept.get(way.position)
        if kept is not None and kept.fits(program, primals):
            return kept.residuals
        if program in way.shared:
            return way.shared[program]
        way.shared.clear()  # those of another number of lanes
        residuals = program.residuals(primals)
        if way.keep:
            self._kept.pop(way.position, None)
            fresh = Kept(program, primals, residuals)
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
        rule = self._programs.rule

        def single(row: Tensor) -> Tensor:
            return self._image.ravel(rule.product(self._loss, params, self._domain.unravel(row), *batch))

        if rows.shape[0] == 1:
            return single(rows[0]).unsqueeze(0).contiguous()
        if not rule.vmappable:
            return torch.stack([single(row) for row in rows])
        return torch.func.vmap(single, randomness="same")(rows)


class _Traceable(NamedTuple):
    """A product on a batch as a function of tensors.

    Attributes:
        batch: the batch.
        signature: equal for batches that one program serves.
        function: ``function(*primals, rows)``.
        primals: the parameters' leaves and the batch's tensors.
    """

    batch: tuple[Any, ...]
    signature: Hashable
    function: Callable[..., Tensor]
    primals: list[Tensor]


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
