"""Which memory the operations of a recording need, told from the shapes of their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch.fx import Node

from hessfunc._recorder import Recording, gives_several
from hessfunc._steps import dying, is_write

_aten = torch.ops.aten


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
        same: dict[Hashable, Hashable] = {}
        extent: dict[Node, int] = {}
        for node in recording.graph.nodes:
            inputs = node.all_input_nodes
            block = recording.storage.get(node, node)
            if is_write(node) and node.target._schema.arguments[0].alias_info is not None:
                same[block] = self.block[inputs[0]]
            block = same.get(block, block)
            value = recording.values.get(node)
            if value is not None:
                extent[node] = value.shape.numel() * value.dtype.itemsize
            elif gives_several(node):
                extent[node] = 0  # counted with its parts
            elif node.target is _aten.new_ones.default:
                extent[node] = 8  # a number that is expanded
            else:  # a factor is as large as what it is made of
                extent[node] = max((extent[argument] for argument in inputs), default=0)
            self.block[node] = block
            self.size[block] = max(extent[node], self.size.get(block, 0))
        self.outside = {self.block[node] for node in recording.graph.nodes if node.op != "call_function"}

    def total(self, nodes: Sequence[Node]) -> int:
        """Bytes that these results take beside inputs and constants."""
        return sum(self.size[block] for block in {self.block[node] for node in nodes} - self.outside)

    def peak(self, inputs: Sequence[Node], steps: Sequence[Node], outputs: Sequence[Node]) -> int:
        """Most bytes alive at once beside inputs and constants, if the steps are done in this order."""
        return max(self.course(inputs, steps, outputs), default=0)

    def course(self, inputs: Sequence[Node], steps: Sequence[Node], outputs: Sequence[Node]) -> list[int]:
        """Bytes alive in each step beside inputs and constants."""
        outside = self.outside | {self.block[node] for node in inputs}
        holders: Counter[Hashable] = Counter()
        alive = 0
        most: list[int] = []
        for step, dead in zip(steps, dying(steps, outputs), strict=True):
            for node, change in ((step, 1), *((node, -1) for node in dead)):
                block = self.block[node]
                before, holders[block] = holders[block], holders[block] + change
                if block not in outside and bool(before) != bool(holders[block]):
                    alive += change * self.size[block]
                if node is step and change == 1:
                    most.append(alive)
        return most
