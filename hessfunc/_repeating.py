"""What it costs to hold the result of an operation, and to do the operation again instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from hessfunc._elementwise import ADD, DIVIDE, MASKS, MULTIPLY
from hessfunc._memory import Memory
from hessfunc._recorder import Recording, select_result
from hessfunc._steps import is_write

_aten = torch.ops.aten

_EACH_ENTRY = {
    *(*MULTIPLY, *DIVIDE, *ADD, *MASKS, _aten.tanh_backward.default, _aten.sigmoid_backward.default),
    *(_aten.neg.default, _aten.reciprocal.default, _aten.relu.default, _aten.add.Scalar),
    *(_aten.addcmul.default, _aten.addcmul_.default, _aten.add_.Tensor),
    *(_aten.contiguous.default, _aten.clone.default, _aten.new_ones.default, _aten.expand.default),
}
_NORMALIZING = {
    *(_aten.native_layer_norm.default, _aten.native_group_norm.default, _aten.native_batch_norm.default),
    _aten._native_batch_norm_legit.no_stats,
}
_PASSES: dict[Any, float] = {
    **dict.fromkeys(_EACH_ENTRY, 1.0),
    **dict.fromkeys((_aten.gelu.default, _aten.silu.default), 2.0),
    **dict.fromkeys((_aten.gelu_backward.default, _aten.silu_backward.default, *_NORMALIZING), 3.0),
    _aten.exp.default: 5.0,
}
"""How many times as long operations take as to multiply entry by entry."""

_PASS = 0.065
"""What it counts to go over a byte in each product, where to hold one counts 1."""

_UNIT = 1 << 8

NEVER = 1 << 30


class Costs:
    """What it counts to hold the results of operations and to work them out again, so many ``times``.

    What is ``given`` is there anyway; a call counts as much as so many bytes.

    Attributes:
        block: an id of the memory of each node.
        outside: the blocks that are there anyway.
    """

    def __init__(
        self, recording: Recording, memory: Memory, given: Sequence[Node] = (), *, times: int = 1, call: int
    ) -> None:
        self.block = memory.block
        self.outside = memory.outside | {memory.block[node] for node in given}
        self._size = memory.size
        self._pass = _PASS * times
        self._call = call
        self._position = {node: i for i, node in enumerate(recording.graph.nodes)}
        writes: dict[int, int] = {}
        for writer, storage in recording.mutations:
            writes[storage] = max(self._position[writer], writes.get(storage, 0))
        self._last_write = {memory.block[n]: writes[s] for n, s in recording.storage.items() if s in writes}
        self._results = set(recording.outputs)

    def of(self, node: Node, *, wanted: bool) -> tuple[int, int]:
        """To hold it, which may be ``wanted`` itself, and to do it again."""
        block = self.block[node]
        if block in self.outside:
            return 0, NEVER
        parts = [user for user in node.users if user.target is select_result]
        size = sum(self._size[self.block[part]] for part in parts) or self._size[block]
        hold = NEVER if parts and not wanted else size // _UNIT + 1  # rather than a tuple its parts
        arguments = {self.block[argument] for argument in node.all_input_nodes}
        # An argument that the function writes to later is no longer there.
        read = all(self._last_write.get(other, -1) < self._position[node] for other in arguments)
        if not read or node in self._results or block in self._last_write:
            return hold, NEVER
        if block in arguments and not is_write(node):
            return NEVER, 0  # what it is a view of is held
        if node.target is select_result:
            return hold, 0
        passes = _PASSES.get(node.target)
        if passes is None or _updates_statistics(node):
            return hold, NEVER
        return hold, int(self._pass * passes * (size + self._call)) // _UNIT

    def overwritten(self, nodes: Sequence[Node]) -> set[Node]:
        """Those of them that others of them write over, except where the function itself does that."""
        last = {self.block[node]: i for i, node in enumerate(nodes) if is_write(node)}
        found = {node for i, node in enumerate(nodes) if i < last.get(self.block[node], -1)}
        return {node for node in found if self.block[node] not in self._last_write}


def _updates_statistics(node: Node) -> bool:
    """Whether a batch normalization changes its running means, which its schema keeps silent on."""
    return node.target is _aten.native_batch_norm.default and node.args[5] is not False
