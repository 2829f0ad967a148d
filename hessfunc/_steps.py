"""Which operations a result needs, and when memory is free again."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

NEAR = 16
"""Operations between two uses of a value that is not given up in between."""


def needed(body: Sequence[Node], outputs: Sequence[Node]) -> list[Node]:
    """The operations that results depend on, and those that write to memory."""
    wanted = set(outputs)
    found: list[Node] = []
    for node in reversed(body):
        if node in wanted or is_write(node):
            found.append(node)
            wanted.discard(node)  # what comes before it is not what is wanted
            wanted.update(node.all_input_nodes)
    return found[::-1]


def is_write(node: Node) -> bool:
    """Whether the operation writes to memory of an argument."""
    return node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable


def dying(steps: Sequence[Node], outputs: Sequence[Node]) -> list[list[Node]]:
    """What to free after each step: used for the last time there, or made once more before its next use."""
    ends: list[list[Node]] = [[] for _ in steps]
    wanted = set(outputs)
    for i in reversed(range(len(steps))):
        node = steps[i]
        used = dict.fromkeys([node, *node.all_input_nodes])
        ends[i] = [n for n in used if n not in wanted]
        wanted.discard(node)
        wanted.update(node.all_input_nodes)
    return ends
