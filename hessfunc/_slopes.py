"""The slope of an activation: worked out once, where one program has it and passes tangents through it as well."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from hessfunc._elementwise import LONG_SLOPES
from hessfunc._recorder import Recording

_aten = torch.ops.aten


def known_slopes(recording: Recording) -> None:
    """Multiply by slopes that are worked out anyway, in the recording's graph, in place.

    ``gelu_backward(t, x)`` is ``t * gelu_backward(1, x)``. Where the latter is held for another term, the former needs
    neither the exponential function once more nor ``x``. Only rounding changes.
    """
    calls = [node for node in recording.graph.nodes if node.target in LONG_SLOPES]
    slopes = {_what_of(node): node for node in calls if _is_of_ones(node)}
    position = {node: i for i, node in enumerate(recording.graph.nodes)}
    for node in calls:
        slope = slopes.get(_what_of(node))
        (tangent, *_) = node.args
        if slope is None or slope is node or not isinstance(tangent, Node) or _is_of_ones(node):
            continue
        for moved in (*_made_of(slope), slope):
            if position[moved] > position[node]:
                node.prepend(moved)
                position[moved] = position[node]
        with recording.graph.inserting_before(node):
            product = recording.graph.call_function(_aten.mul.Tensor, (tangent, slope))
        recording.storage[product] = recording.storage.pop(node)
        recording.values[product] = recording.values.pop(node)
        node.replace_all_uses_with(product)
        recording.outputs = [product if output is node else output for output in recording.outputs]
        recording.graph.erase_node(node)


def _what_of(node: Node) -> Hashable:
    """Equal for slopes of the same activation at the same place."""
    return node.target, node.args[1:], *node.kwargs.items()


def _made_of(slope: Node) -> list[Node]:
    """What makes the ones that it is taken of."""
    ones: Any = slope.args[0]
    return [ones.args[0], ones]


def _is_of_ones(node: Node) -> bool:
    ones = node.args[0]
    expanded = isinstance(ones, Node) and ones.target is _aten.expand.default
    return expanded and ones.args[0].target is _aten.new_ones.default  # type: ignore[union-attr]  # of a node
