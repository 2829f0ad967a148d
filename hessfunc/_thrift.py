"""Residuals that take little to work out from others: worked out where they are needed, and not held until then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch.fx import Node

from hessfunc._memory import Memory
from hessfunc._recorder import Recording, select_result
from hessfunc._simplify import VIEWS
from hessfunc._steps import NEAR, needed

_aten, _prims = torch.ops.aten, torch.ops.prims

_EACH_ENTRY = {
    *(_aten.mul.Tensor, _aten.mul.Scalar, _prims.mul.default, _aten.div.Tensor, _aten.div.Scalar),
    *(_aten.add.Tensor, _aten.add.Scalar, _prims.add.default, _aten.sub.Tensor, _prims.sub.default, _aten.neg.default),
    *(_aten.threshold_backward.default, _aten.leaky_relu_backward.default, _aten.hardtanh_backward.default),
    *(_aten.relu.default, _aten.reciprocal.default, _aten.contiguous.default, _aten.clone.default),
    *(_aten.expand.default, _aten.new_ones.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.slice.Tensor),
    *(_aten.transpose.int, _aten.t.default, _aten.permute.default, *VIEWS),
}
"""One pass over memory."""

_LONGER = {
    *(_aten.exp.default, _aten.gelu.default, _aten.gelu_backward.default, _aten.silu.default),
    *(_aten.silu_backward.default, _aten.tanh_backward.default, _aten.sigmoid_backward.default),
}
"""Entry by entry as well, with more to do for each."""

_PASS, _LONG_PASS = 0.2, 1.5
"""What it counts to go over a byte in each product, where to hold one counts 1."""

_CALL = 1 << 17
"""Bytes that an operation is taken for beside those of its result."""

_UNIT = 1 << 8
_NEVER = 1 << 30

_MOST = 12
"""Operations to repeat for one value."""


def thrifty(
    recording: Recording, primal: Sequence[Node], moving: Sequence[Node], residuals: Sequence[Node]
) -> tuple[list[Node], list[Node]]:
    """What to hold in place of ``residuals``, and the operations of a product, with those that are then repeated.

    Of the operations of the ``primal`` program some are done for all products and some in each of them. Values that
    lead from the former to the latter are held, a cut of a graph; this is the one of least capacity (as in the
    partitioner of AOTAutograd), where to hold a value counts its bytes and to work it out again a share of them.
    """
    costs = _Costs(recording)
    primal = needed(primal, residuals)
    number = {node: i for i, node in enumerate(primal)}
    source, sink = 2 * len(primal), 2 * len(primal) + 1
    edges: list[tuple[int, int, int]] = []
    for node, i in number.items():
        hold, again = costs.of(node)
        edges += [(2 * i, 2 * i + 1, hold), (source, 2 * i, again)]
        edges += [(2 * number[argument] + 1, 2 * i, _NEVER) for argument in {*node.all_input_nodes} & number.keys()]
    edges += [(2 * number[node] + 1, sink, _NEVER) for node in residuals]
    early = _source_side(edges, source, sink)
    held = {node for node, i in number.items() if early[2 * i] and not early[2 * i + 1]}
    blocks = {costs.block[node] for node in held} | costs.outside
    repeated = {node for node, i in number.items() if not early[2 * i]}
    # Another shape of what is held takes no memory, and not to make it saves a call.
    held |= {node for node in repeated if costs.block[node] in blocks}
    held |= _ends_of_long_ways([node for node in primal if node in repeated - held])
    body = _with_repeated(needed(moving, recording.outputs), repeated - held)
    used = {argument for node in body for argument in node.all_input_nodes} | set(recording.outputs)
    return [node for node in primal if node in held and node in used], body


class _Costs:
    """What it counts to hold the results of operations and to work them out again."""

    def __init__(self, recording: Recording) -> None:
        memory = Memory(recording)
        self.block, self.outside = memory.block, memory.outside
        self._size = memory.size
        self._position = {node: i for i, node in enumerate(recording.graph.nodes)}
        writes: dict[int, int] = {}
        for writer, storage in recording.mutations:
            writes[storage] = max(self._position[writer], writes.get(storage, 0))
        self._last_write = {memory.block[n]: writes[s] for n, s in recording.storage.items() if s in writes}
        self._results = set(recording.outputs)

    def of(self, node: Node) -> tuple[int, int]:
        """To hold it, and to do it again."""
        block = self.block[node]
        if block in self.outside:
            return 0, _NEVER
        if any(user.target is select_result for user in node.users):
            return _NEVER, _NEVER  # a tuple, whose parts are held
        size = self._size[block]
        hold = size // _UNIT + 1
        arguments = {self.block[argument] for argument in node.all_input_nodes}
        known = node.target in _EACH_ENTRY or node.target in _LONGER
        # An argument that is written to later is no longer there.
        read = all(self._last_write.get(other, -1) < self._position[node] for other in arguments)
        if not known or node in self._results or block in self._last_write or not read:
            return hold, _NEVER
        if block in arguments:
            return _NEVER, 0  # what it is a view of is held
        price = _LONG_PASS if node.target in _LONGER else _PASS
        return hold, int(price * (size + _CALL)) // _UNIT


def _source_side(edges: list[tuple[int, int, int]], source: int, sink: int) -> np.ndarray:
    """Which vertices lie on the source's side of a cut of least capacity."""
    tails, heads, capacities = np.array(edges, dtype=np.int32).T
    graph = csr_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1))
    left = graph - maximum_flow(graph, source, sink).flow
    left.eliminate_zeros()
    side = np.zeros(sink + 1, dtype=bool)
    side[breadth_first_order(left, source, return_predecessors=False)] = True
    return side


def _ends_of_long_ways(repeated: Sequence[Node]) -> set[Node]:
    """Where to hold what would take many operations: the next state of a recurrence, which comes from all before it."""
    ends: set[Node] = set()
    ways: dict[Node, set[Node]] = {}
    for node in repeated:
        way = {node}.union(*(ways.get(argument, ()) for argument in node.all_input_nodes))
        if len(way) > _MOST:
            ends.add(node)
        else:
            ways[node] = way
    return ends


def _with_repeated(moving: Sequence[Node], repeated: set[Node]) -> list[Node]:
    """The operations of a product, before each what it needs of the repeated ones unless that was just there."""
    last: dict[Node, int] = {}
    body: list[Node] = []

    def bring(node: Node) -> None:
        if node in repeated and (node not in last or len(body) - last[node] > NEAR):
            for argument in node.all_input_nodes:
                bring(argument)
            body.append(node)
        last[node] = len(body)

    for node in moving:
        for argument in node.all_input_nodes:
            bring(argument)
        body.append(node)
    return body
