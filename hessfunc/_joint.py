"""A recording as one program in its own order, with little alive at once: for products that keep nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import torch
from torch.fx import Node

from hessfunc._program import Program, is_write, needed, program
from hessfunc._recorder import Recording, select_result

_aten = torch.ops.aten

_MASKS = {_aten.threshold_backward.default, _aten.leaky_relu_backward.default, _aten.hardtanh_backward.default}
"""To compute these again costs less than memory for them."""

_NEAR = 16
"""Operations between two uses of a value that is not given up in between."""

_SMALL = 64
"""Bytes that may be held for nothing."""

_FOREVER = 1 << 62


def joint_program(recording: Recording, body: Sequence[Node], moving: set[Node]) -> Program:
    """``(*primals, tangent) -> results``: the nodes of ``body`` in the order of the recorded run.

    Forward mode computes each value next to its tangent, and what both need dies with the later of the two; split into
    primal and tangent program, all that the second needs of the first is alive at once. It is less than in the recorded
    run: masks are computed again where they are needed again, if what they are computed from is still there.
    """
    again = _repeated(recording, body, moving)
    return program(recording, recording.inputs, recording.outputs, body, again)


def _repeated(recording: Recording, body: Sequence[Node], moving: set[Node]) -> dict[Node, list[Node]]:
    """Which masks to compute again before a node, instead of holding them until then."""
    body = needed(body, recording.outputs)
    position = {node: i for i, node in enumerate(body)}
    memory = Memory(recording)
    last = {memory.block[argument]: i for i, node in enumerate(body) for argument in node.all_input_nodes}
    last |= dict.fromkeys((*memory.outside, *map(memory.block.__getitem__, recording.outputs)), _FOREVER)
    written = {storage for _, storage in recording.mutations}
    again: dict[Node, list[Node]] = {}
    for node in body:
        sources = node.all_input_nodes
        if (
            node.target not in _MASKS
            or any(n in moving or memory.block[n] in written for n in (node, *sources))
            or any(n.target in _MASKS for n in sources)
            or any(memory.block[user] == memory.block[node] for user in node.users)
        ):
            continue
        large = [memory.block[n] for n in sources if memory.size[memory.block[n]] > _SMALL]
        users = sorted(position[user] for user in node.users if user in position)
        for before, after in pairwise([position[node], *users]):
            if after - before > _NEAR and all(last[block] + _NEAR >= after for block in large):
                again.setdefault(body[after], []).append(node)
    return again


class Memory:
    """Which memory the results of operations lie in, and how large it is.

    Attributes:
        block: an id of the memory of each node.
        size: bytes of each block.
        outside: the blocks of inputs and constants.
    """

    def __init__(self, recording: Recording) -> None:
        self.block: dict[Node, Hashable] = {}
        self.size: dict[Hashable, int] = {}
        for node in recording.graph.nodes:
            inputs = node.all_input_nodes
            block = recording.storage.get(node, node)
            if block is node and is_write(node):
                block = self.block[inputs[0]]
            value = recording.values.get(node)
            if value is not None:
                size = value.shape.numel() * value.dtype.itemsize
            elif any(user.target is select_result for user in node.users):
                size = 0  # counted with its parts
            elif node.target is _aten.new_ones.default:
                size = 8  # a number that is expanded
            else:  # a factor is as large as what it is made of
                size = max((self.size[self.block[argument]] for argument in inputs), default=0)
            self.block[node] = block
            self.size[block] = max(size, self.size.get(block, 0))
        self.outside = {self.block[node] for node in recording.graph.nodes if node.op != "call_function"}

    def total(self, nodes: Sequence[Node]) -> int:
        """Bytes that these results take beside inputs and constants."""
        return sum(self.size[block] for block in {self.block[node] for node in nodes} - self.outside)
