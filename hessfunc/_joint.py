"""A recording as one program in its own order, with little alive at once: for products that keep nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.fx import Node

from hessfunc._memory import Memory
from hessfunc._placed import least_program
from hessfunc._program import Program
from hessfunc._recorder import Recording
from hessfunc._steps import NEAR, needed

_aten = torch.ops.aten

_MASKS = {_aten.threshold_backward.default, _aten.leaky_relu_backward.default, _aten.hardtanh_backward.default}
"""To compute these again costs less than memory for them."""

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
    return least_program(recording, recording.inputs, body, again, lean=True)


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
            if after - before > NEAR and all(last[block] + NEAR >= after for block in large):
                again.setdefault(body[after], []).append(node)
    return again
