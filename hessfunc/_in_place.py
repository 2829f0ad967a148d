"""Which operations of a program may write their result over an argument that nothing needs any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Node

from hessfunc._memory import Memory
from hessfunc._recorder import Recording

_aten = torch.ops.aten

_OVER_FIRST = {
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.div.Scalar: _aten.div_.Scalar,
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.addcmul.default: _aten.addcmul_.default,
}


def in_place(
    recording: Recording, given: Sequence[Node], steps: Sequence[Node], ends: Sequence[Sequence[Node]]
) -> list[Any]:
    """For each step the operation that does it in the memory of its first argument, or None where that must not be.

    Memory fresh from the system is cleared page by page, and what was just read lies in the cache. ``given`` is not
    written to, nor what shares its memory; ``ends`` says what is needed for the last time in each step.
    """
    block = Memory(recording).block
    taken_over: dict[Hashable, Hashable] = {}

    def memory_of(node: Node) -> Hashable:
        return taken_over.get(block[node], block[node])

    kept = set(given)
    alive = Counter(memory_of(node) for node in given)
    chosen: list[Any] = []
    for node, dead in zip(steps, ends, strict=True):
        alive.subtract(memory_of(other) for other in dead if other is not node and other not in kept)
        over: Any = _OVER_FIRST.get(node.target)  # type: ignore[call-overload]  # of a call, always an operation
        base: Any = node.args[0] if over else None
        if (
            base in dead
            and not alive[memory_of(base)]
            and all(other is base or memory_of(other) != memory_of(base) for other in node.all_input_nodes)
            and _may_hold(recording, node, base)
        ):
            taken_over[block[node]] = memory_of(base)
        else:
            over = None
        chosen.append(over)
        if node not in dead:
            alive[memory_of(node)] += 1
    return chosen


def _may_hold(recording: Recording, node: Node, base: Node) -> bool:
    """Whether the result is a tensor like ``base``, each of whose entries has a place of its own."""
    values = recording.values
    if base not in values or node not in values:
        return False
    base_value, value = values[base], values[node]
    apart = all(stride or length == 1 for length, stride in zip(base_value.shape, base_value.strides, strict=True))
    return apart and base_value.shape == value.shape and base_value.dtype == value.dtype
