"""The result of a program, joined from its parts at the end or written part by part where it ends up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from hessfunc._memory import Memory
from hessfunc._program import Program, program
from hessfunc._recorder import Recording
from hessfunc._room import room
from hessfunc._simplify import VIEWS
from hessfunc._steps import is_write, needed

_aten = torch.ops.aten

_INTO = {_aten.mm.default: _aten.mm.out}
"""Operations that write to memory that they are given as well as to their own."""

_WORTH = 1 << 19
"""Bytes to be saved: a small network's time is spent on the number of operations."""


def least_program(recording: Recording, inputs: Sequence[Node], body: Sequence[Node], *, lean: bool = False) -> Program:
    """``(*inputs) -> results`` by way of those operations of ``body`` that are needed, in little memory.

    A product joined from its parts exists twice at the end. With its memory set aside before it exists once, and along
    with all that is alive earlier. Which is less is told by the sizes.

    ``lean`` saves memory at the cost of time as well.
    """
    steps = needed(body, recording.outputs)
    placed = _Placed.of(recording, steps)
    if placed is not None:
        others = needed(placed.body, placed.outputs)
        memory = Memory(recording)
        if memory.peak(inputs, others, placed.outputs) + _WORTH <= memory.peak(inputs, steps, recording.outputs):
            return program(recording, inputs, others, placed.outputs, lean=lean)
    return program(recording, inputs, steps, recording.outputs, lean=lean)


def program_into(recording: Recording, inputs: Sequence[Node], body: Sequence[Node]) -> Program | None:
    """``(*inputs, out) -> results``, written to ``out`` of their shape; None if the result is not made of parts."""
    placed = _Placed.of(recording, needed(body, recording.outputs), into=True)
    if placed is None:
        return None
    return program(recording, [*inputs, placed.whole], needed(placed.body, placed.outputs), placed.outputs)


class _Placed:
    """Operations with which each part of the result is written to its place.

    Attributes:
        body: the operations.
        outputs: the result.
        whole: the memory of the result, which the body sets aside or, with ``into``, is given.
    """

    whole: Node

    @classmethod
    def of(cls, recording: Recording, body: Sequence[Node], *, into: bool = False) -> _Placed | None:
        """In place of ``body``; None where its result is not joined from parts that it computes."""
        (output,) = recording.outputs
        joined = output.args[0] if output.target is _aten.unsqueeze.default else output
        if not isinstance(joined, Node) or joined.target is not _aten.cat.default or set(joined.users) - {output}:
            return None
        parts: Any = joined.args[0]
        values = recording.values
        if not all(part in values and values[part].dtype == values[joined].dtype for part in parts):
            return None
        placed = cls(recording, body)
        dim: Any = (*joined.args, 0)[1]
        sources = [placed._unflattened(part, dim) for part in parts]
        written = {storage for _, storage in recording.mutations}
        ready = all(source in placed._known and recording.storage[source] not in written for source in sources)
        if not ready or len(set(sources)) < len(sources):
            return None
        placed._place(output, joined, list(zip(parts, sources, strict=True)), dim, into)
        return placed

    def __init__(self, recording: Recording, body: Sequence[Node]) -> None:
        self._recording = recording
        self._storage = len(recording.graph.nodes)
        self._known = set(body)
        self.body = list(body)
        self.outputs = recording.outputs

    def _place(self, output: Node, joined: Node, parts: list[tuple[Node, Node]], dim: int, into: bool) -> None:
        values = self._recording.values
        shape, dtype = list(values[joined].shape), values[joined].dtype
        if into:
            self.whole = self._recording.graph.create_node("placeholder", "out")
            self._recording.storage[self.whole] = self._storage
            whole = self._made(_aten.view.default, self.whole, shape)
        else:
            whole = self.whole = self._made(room, self._recording.inputs[-1], shape, dtype=dtype)
        values[whole] = values[self.whole] = values[joined]
        instead: dict[Node, list[Node]] = {}
        start = 0
        for part, source in parts:
            length = values[part].shape[dim]
            strip = self._made(_aten.slice.Tensor, whole, dim, start, start + length)
            place = self._made(_aten.view.default, strip, list(values[source].shape))
            start += length
            first, *rest = self._chain(source) or [source]
            if first.target in _INTO:
                filled = self._made(_INTO[first.target], *first.args, out=place, **first.kwargs)
                instead[first] = [strip, place, filled]
                for node in rest:
                    filled = self._made(node.target, filled, *node.args[1:], **node.kwargs)
                    instead[node] = [filled]
            else:
                instead[source] = [source, strip, place, self._made(_aten.copy_.default, place, source)]
        begin = next(i for i, node in enumerate(self.body) if node in instead)
        self.outputs = [whole]
        instead[joined] = []
        if output is not joined:
            self.outputs = instead[output] = [self._made(_aten.unsqueeze.default, whole, *output.args[1:])]
        steps = [step for node in self.body[begin:] for step in instead.get(node, [node])]
        self.body = [*self.body[:begin], whole, *steps]

    def _made(self, target: Any, *arguments: Any, **keywords: Any) -> Node:
        node = self._recording.graph.call_function(target, arguments, keywords)
        self._recording.storage[node] = self._storage
        return node

    def _unflattened(self, part: Node, dim: int) -> Node:
        """What a part is another shape of: flattening may take memory of its own."""
        values = self._recording.values
        while part.target in VIEWS:
            (source,) = part.all_input_nodes
            lead = values[part].shape[:dim]
            if source not in self._known or source not in values or values[source].shape[:dim] != lead:
                break
            part = source
        return part

    def _chain(self, source: Node) -> list[Node] | None:
        """The operation that makes this, for nothing else, and those that write to it; None if it cannot be placed."""
        chain = [source]
        while chain[0].target not in _INTO:
            node = chain[0]
            base = node.args[0] if node.args else None
            if not is_write(node) or not isinstance(base, Node) or node.all_input_nodes.count(base) > 1:
                return None
            chain.insert(0, base)
        alone = all(len(self._users(node)) == 1 for node in chain)
        return chain if alone and set(chain) <= self._known else None

    def _users(self, node: Node) -> set[Node]:
        return self._known.intersection(node.users)
