"""A curvature product traced once for each shape of batch, and the residuals worth keeping between products."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

from hessfunc import tree
from hessfunc._agreement import Summary
from hessfunc._checks import ProductWarning
from hessfunc._kept import Kept, Way, available_memory
from hessfunc._linearize import Linearized, replayed
from hessfunc._recorder import NotRecordableError
from hessfunc._room import room
from hessfunc._rules import Programs, Rule
from hessfunc._shadows import Shadow, ShadowError
from hessfunc._trial import Point, Trial
from hessfunc._typing import Loss, Params, Tensor

MAX_LANES = 8
LANE_ELEMENTS, CPU_LANE_ELEMENTS = 1 << 20, 1 << 17
"""Lanes of one operation hold about this many numbers at most: beyond that batching saves no overhead any more, and on
the CPU what does not fit into the cache costs more than it saves."""

MANY = 1 << 16
"""Parameters from which a recording without numbers takes less time than the product that it saves."""

PATIENCE = 32
"""How many lanes are served one by one that another program would have taken along before it is made: that takes as
long as the calls of tens of products, and calls are all that it saves."""


class TracedProduct:
    """A product at fixed parameters, on flat rows, through its primal and tangent programs.

    Its vectors and results lie as ``domain`` and ``image`` say, by default as the parameters.

    The first product on a batch of a new shape runs eagerly and is recorded; later ones replay the tangent program
    on residuals that one evaluation of the primal program per batch provides. Residuals of batches that stay the same
    objects are kept from pass to pass up to a budget. What cannot be recorded runs eagerly, after a ``ProductWarning``;
    where an operation lacks a derivative that a rule needs, the next rule takes over, after another one.

    With ``compare=False`` a product with many parameters is recorded without being run, and not compared with anything.

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
        compare: bool = True,
        domain: tree.Layout | None = None,
        image: tree.Layout | None = None,
    ) -> None:
        self._loss = loss
        self._point = Point.of(params, domain, image)
        layout = self._point.domain
        self._compile = compile
        self._max_lanes = max_lanes
        self._budget = available_memory(layout.device) // 4 if memory_budget is None else memory_budget
        self._most_shared = float("inf") if memory_budget is None else memory_budget
        self._frugal = self._most_shared < layout.size * layout.dtype.itemsize  # not one vector
        self._unseen = not compare and not compile and layout.size >= MANY and not self._frugal
        self._programs = programs
        self._kept: dict[int, Kept] = {}
        self._trials: dict[int, tuple[tuple[Any, ...], Trial]] = {}
        self._lock = threading.RLock()  # several threads may share an operator, one product at a time

    def rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool, held: bool = False) -> Tensor:
        """Products with each row on one batch.

        ``keep`` says that the tensors of the batch at this position stay the same objects, ``held`` that the batch is a
        tuple of the caller's, of tensors alone, and stays the same object itself.
        """
        with self._lock:
            return self._programs.by_a_rule_that_works(
                partial(self._locked_rows, rows, batch, position, keep=keep, held=held)
            )

    def prepare(self, batch: tuple[Any, ...], position: int, *, keep: bool, held: bool = False) -> None:
        """Trace for single rows, where memory is scarce and nothing is traced yet: before there are rows in it."""
        if self._frugal:
            with self._lock:
                self._programs.by_a_rule_that_works(partial(self._prepare, batch, position, keep, held))

    def _prepare(self, batch: tuple[Any, ...], position: int, keep: bool, held: bool) -> None:
        trial = self._trial(batch, position, held)
        signature = trial.signature
        if not (self._programs.eager or signature is None or (signature, 1) in self._programs.traced):
            layout = self._point.domain
            rows = Shadow(torch.empty(1, layout.size, dtype=layout.dtype, device="meta"), layout.device)
            self._trace(trial, signature, rows, Way(position, keep, alone=True, shared={}))

    def _locked_rows(self, rows: Tensor, batch: tuple[Any, ...], position: int, *, keep: bool, held: bool) -> Tensor:
        trial = self._trial(batch, position, held)
        signature = trial.signature
        if self._programs.eager or signature is None:
            return self._run_eagerly(trial, rows)
        pieces = self._lanes(signature, rows.shape[0])
        way = Way(position, keep, alone=len(pieces) == 1, shared={})
        whole = None if way.alone else room(rows, (len(rows), self._point.image.size), dtype=self._point.image.dtype)
        start = 0
        for lanes in pieces:
            piece = rows[start : start + lanes]
            out = None if whole is None else whole[start : start + lanes]
            start += lanes
            program = self._programs.traced.get((signature, lanes))
            result = None
            if program is None:
                program, result = self._trace(trial, signature, piece, way)
            if program is not None and result is None:
                result = self._apply(program, trial, piece, way, out)
            if result is None:
                return self._run_eagerly(trial, rows)
            if whole is None or out is None:
                return result
            if result is not out:
                out.copy_(result)
        assert whole is not None
        return whole

    def _trial(self, batch: tuple[Any, ...], position: int, held: bool) -> Trial:
        known, trial = self._trials.get(position, (None, None))
        if trial is None or known is not batch or not trial.is_current(self._programs.rule):
            trial = Trial(self._programs.rule, self._loss, self._point, batch)
            if held:  # else a reference would keep the batch alive
                self._trials[position] = batch, trial
        return trial

    def _apply(self, program: Linearized, trial: Trial, rows: Tensor, way: Way, out: Tensor | None) -> Tensor | None:
        primals = trial.primals
        in_one = self._in_one(program, primals, way)
        if in_one not in program.checked:
            eager = Summary.of(trial.rows(rows))
            result = replayed(trial.function, primals, lambda: rows, program, eager, self._source(program, trial, way))
            if result is None:
                self._give_up("the replayed product differs from the eager one")
            return result
        residuals = None if in_one else self._residuals(program, primals, way)
        if not self._frugal:
            program.keep_heap()  # once residuals lie elsewhere
        if residuals is None:
            return program.apply_once(primals, rows)
        return program.apply(primals, residuals, rows, out)

    def _source(self, program: Linearized, trial: Trial, way: Way) -> Callable[[], list[Tensor]] | None:
        """Where the program gets residuals from; None if it does without."""
        if self._in_one(program, trial.primals, way):
            return None
        return lambda: self._residuals(program, trial.primals, way)

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
            elements = CPU_LANE_ELEMENTS if self._point.domain.device.type == "cpu" else LANE_ELEMENTS
            limit = 1 if single.convolves else min(limit, int(elements / single.mean_elements) or 1)
        largest = 1 << (limit.bit_length() - 1)
        pieces = [largest] * (wanted // largest)
        pieces += [1 << bit for bit in reversed(range(limit.bit_length() - 1)) if wanted % largest & 1 << bit]
        requests = self._programs.requests
        for lanes in set(pieces):
            requests[signature, lanes] = requests.get((signature, lanes), 0) + 1
        known = {lanes: lanes == 1 or requests[signature, lanes] * (lanes - 1) > PATIENCE for lanes in set(pieces)}
        return [part for lanes in pieces for part in ([lanes] if known[lanes] else [1] * lanes)]

    def _trace(
        self, trial: Trial, signature: Hashable, rows: Tensor, way: Way
    ) -> tuple[Linearized | None, Tensor | None]:
        """A program, as a rule compared with the function, and the product with ``rows`` if it was made."""
        num, primals = rows.shape[0], trial.primals
        if self._unseen and trial.rule.lighter is not None:
            with contextlib.suppress(Exception):  # what it is shows below, where all runs
                program = trial.unseen(rows)
                if not program.random:
                    result = self._apply(program, trial, rows, way, None)
                    self._programs.traced[signature, num] = program
                    return program, result
        probe = partial(trial.probe, num) if self._frugal else lambda: rows
        reason = "the replayed product differs from the eager one"
        unexpected: Exception | None = None
        for on_shadows, rewrite in self._attempts(trial.rule):
            options = {"on_shadows": on_shadows, "rewrite": rewrite, "compile": self._compile}
            try:
                program, eager = trial.recorded(rows, probe, **options)
            except (NotRecordableError, ShadowError) as error:
                reason = str(error)
                if on_shadows and trial.rule.vmappable and isinstance(error, ShadowError):
                    continue
                break
            except NotImplementedError:
                raise
            except Exception as error:  # the loss's own, which then comes again, or of a fault in rewriting
                if not rewrite:
                    raise
                unexpected = error
                continue
            if program.random:
                trial.check_repeats(program, probe)
                reason = "the loss draws random numbers"
                break
            try:
                residuals = self._source(program, trial, way)
                result = replayed(trial.function, primals, probe, program, eager, residuals)
            except Exception as error:
                if not rewrite:
                    raise
                # A few operations do not take tensors that lie in memory in another order.
                unexpected = unexpected if isinstance(error, RuntimeError) else error
                continue
            if result is not None:
                if unexpected is not None and not rewrite:
                    _warn_of_fault(unexpected)
                self._programs.traced[signature, num] = program
                return program, None if self._frugal else result  # as all products after it
        self._give_up(reason)
        return None, None

    def _attempts(self, rule: Rule) -> list[tuple[bool, bool]]:
        """Whether to record on shadows and whether to rewrite the recording, one after the other."""
        if not rule.vmappable:
            # A custom function could read numbers unseen, by way of NumPy; a shadow has none to read.
            return [(True, True), (True, False)]
        return [(True, True)] * self._frugal + [(False, True), (False, False)]

    def _give_up(self, reason: str) -> None:
        self._programs.eager = True
        self._kept.clear()
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

    def _run_eagerly(self, trial: Trial, rows: Tensor) -> Tensor:
        return torch.cat([trial.rows(piece) for piece in rows.split(self._max_lanes or MAX_LANES)])


def _warn_of_fault(error: Exception) -> None:
    warnings.warn(
        f"the product is traced, and not rewritten to do less ({type(error).__name__}: {error}), which is slower and "
        "otherwise the same. That is a fault of hessfunc: please report it with the loss.",
        ProductWarning,
        stacklevel=2,
    )
