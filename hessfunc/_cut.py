"""Which values to hold between two parts of a program, and which to work out again in the second."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch.fx import Node

from hessfunc._recorder import gives_several
from hessfunc._repeating import NEVER, Costs
from hessfunc._steps import NEAR

_MOST = 12
"""Operations to repeat for one value."""


def least_cut(early: Sequence[Node], wanted: Collection[Node], costs: Costs) -> tuple[set[Node], set[Node]]:
    """Of the operations done ``early`` those whose results are held, and those repeated, for what is ``wanted`` later.

    The results held are a cut of the graph of operations, the one of least capacity (as in the partitioner of
    AOTAutograd), where to hold a value counts its bytes and to work it out again a share of them.
    """
    overwritten = costs.overwritten(early)
    within = _within_reach(early, wanted, costs)
    if not within:
        return set(), set()
    number = {node: i for i, node in enumerate(within)}
    source, sink = 2 * len(within), 2 * len(within) + 1
    edges: list[tuple[int, int, int]] = []
    for i, (node, (hold, again)) in enumerate(within.items()):
        edges += [(2 * i, 2 * i + 1, NEVER if node in overwritten else hold), (source, 2 * i, again)]
        edges += [(2 * number[argument] + 1, 2 * i, NEVER) for argument in {*node.all_input_nodes} & number.keys()]
    edges += [(2 * number[node] + 1, sink, NEVER) for node in wanted]
    side = _source_side(edges, source, sink)
    if side is None:
        return set(wanted), set()
    held = {node for node, i in number.items() if side[2 * i] and not side[2 * i + 1]}
    blocks = {costs.block[node] for node in held} | costs.outside
    repeated = {node for node, i in number.items() if not side[2 * i]}
    # Another shape of what is held takes no memory, and not to make it saves a call.
    held |= {node for node in repeated if costs.block[node] in blocks}
    held |= _ends_of_long_ways([node for node in within if node in repeated - held], overwritten)
    return held, repeated - held


def _within_reach(early: Sequence[Node], wanted: Collection[Node], costs: Costs) -> dict[Node, tuple[int, int]]:
    """What it counts to hold and to repeat the operations that repeating could go back to, in their order."""
    here, found, waiting = set(early), {}, list(wanted)
    while waiting:
        node = waiting.pop()
        if node in here and node not in found:
            found[node] = costs.of(node, wanted=node in wanted)
            if found[node][1] < NEVER:
                waiting += node.all_input_nodes
    return {node: found[node] for node in early if node in found}


def _source_side(edges: list[tuple[int, int, int]], source: int, sink: int) -> np.ndarray | None:
    """Which vertices lie on the source's side of a cut of least capacity; None if there is no cut."""
    tails, heads, capacities = np.array(edges, dtype=np.int32).T
    graph = csr_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1))
    flow = maximum_flow(graph, source, sink)
    if not 0 <= flow.flow_value < NEVER:
        return None
    left = graph - flow.flow
    left.eliminate_zeros()
    side = np.zeros(sink + 1, dtype=bool)
    side[breadth_first_order(left, source, return_predecessors=False)] = True
    return side


def _ends_of_long_ways(repeated: Sequence[Node], overwritten: set[Node]) -> set[Node]:
    """Where to hold what would take many operations: the next state of a recurrence, which comes from all before it."""
    ends: set[Node] = set()
    ways: dict[Node, set[Node]] = {}
    for node in repeated:
        way = {node}.union(*(ways.get(argument, ()) for argument in node.all_input_nodes))
        if len(way) > _MOST and node not in overwritten and not gives_several(node):
            ends.add(node)
        else:
            ways[node] = way
    return ends


def with_repeated(done: Sequence[Node], steps: Sequence[Node], repeated: set[Node]) -> list[Node]:
    """All these steps, with those to be repeated right before what needs them, unless they were just there."""
    last: dict[Node, int] = {}
    for i, node in enumerate(done):
        last |= dict.fromkeys((node, *node.all_input_nodes), i)
    body = list(done)

    def bring(node: Node) -> None:
        if node in repeated and (node not in last or len(body) - last[node] > NEAR):
            add(node)
        last[node] = len(body)

    def add(node: Node) -> None:
        for argument in node.all_input_nodes:
            bring(argument)
        body.append(node)

    for node in steps:
        if node not in repeated:  # else it is there for something else, and comes when it is needed
            add(node)
    return body
