"""Values that take little to work out from others: worked out where they are needed, and not held until then."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from hessfunc._cut import least_cut, with_repeated
from hessfunc._memory import Memory
from hessfunc._recorder import Recording
from hessfunc._repeating import Costs
from hessfunc._steps import needed

_WORTH = 1 << 20
"""Bytes from which on it is worth while to hold fewer."""

_CALL, _CALLS = 1 << 17, 1 << 7
"""Bytes that a call is taken for, and how many calls at least for all bytes that are alive."""

_TIMES = 3
"""How often a residual is needed far from where it was: on the way forwards, and twice on the way back."""

_ROUNDS = 8
"""How often to look for where most is alive."""

_LESS = 0.97
"""What has to be left of that for it to be worth while."""


def thrifty(
    recording: Recording,
    memory: Memory,
    primal: Sequence[Node],
    moving: Sequence[Node],
    residuals: Sequence[Node],
) -> tuple[list[Node], list[Node]]:
    """What to hold in place of ``residuals``, and the operations of a product, with those that are then repeated.

    Of the operations of the ``primal`` program some are done for all products and some in each of them. Values that
    lead from the former to the latter are held.
    """
    if memory.total(residuals) < _WORTH:
        return list(residuals), list(moving)
    primal = needed(primal, residuals)
    held, repeated = least_cut(primal, set(residuals), Costs(recording, memory, times=_TIMES, call=_CALL))
    body = with_repeated([], needed(moving, recording.outputs), repeated)
    used = {argument for node in body for argument in node.all_input_nodes} | set(recording.outputs)
    return [node for node in primal if node in held and node in used], body


def lowered(
    recording: Recording, memory: Memory, inputs: Sequence[Node], body: Sequence[Node], *, lean: bool = False
) -> list[Node]:
    """The same operations with some of them done twice, so that less is alive at once; with ``lean`` however little.

    A product goes through a network forwards and then backwards, and what the second half needs of the first piles up
    in between. Where most is alive, a cut says what is held and what is done again.
    """
    outputs = recording.outputs
    steps = needed(body, outputs)
    course = memory.course(inputs, steps, outputs)
    height = max(course, default=0)
    costs = Costs(recording, memory, inputs, call=min(_CALL, height // _CALLS))
    for _ in range(_ROUNDS):
        height = max(course, default=0)
        if height <= (0 if lean else _WORTH):
            break
        top = course.index(height) + 1
        early = list(dict.fromkeys(steps[:top]))
        _, repeated = least_cut(early, _handed_over(early, steps[top:], outputs), costs)
        others = needed(with_repeated(steps[:top], steps[top:], repeated), outputs)
        course = memory.course(inputs, others, outputs)
        if max(course) > _LESS * height:
            break
        steps = others
    return steps


def _handed_over(early: Sequence[Node], steps: Sequence[Node], outputs: Sequence[Node]) -> set[Node]:
    """What the steps use of what was made before."""
    here = set(early)
    found: set[Node] = set()
    for node in steps:
        found |= here.intersection(node.all_input_nodes)
        here.discard(node)
    return found | here.intersection(outputs)
