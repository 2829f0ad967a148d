"""Which operations of a recording depend on the tangent, and what the others hand over to them."""

from __future__ import annotations

from torch.fx import Node

from hessfunc._recorder import NotRecordableError, Recording, gives_several
from hessfunc._steps import needed


def body_of(recording: Recording) -> list[Node]:
    return [node for node in recording.graph.nodes if node.op == "call_function"]


def moving_nodes(recording: Recording) -> set[Node]:
    """Nodes to be evaluated anew for each tangent.

    Those that depend on it, and where memory is written in place, whatever must not be shared between tangents.
    """
    body = body_of(recording)
    position = {node: i for i, node in enumerate(body)}
    moving = {recording.inputs[-1]}
    fixed = set(recording.inputs[:-1]) | {n for n in recording.graph.nodes if n.op == "get_attr"}
    views: dict[int, list[Node]] = {}
    for node, storage in recording.storage.items():
        views.setdefault(storage, []).append(node)
    while True:
        size = len(moving)
        for node in body:
            if any(argument in moving for argument in node.all_input_nodes):
                moving.add(node)
        for writer, storage in recording.mutations:
            group = views[storage]
            if fixed.intersection(group):
                raise NotRecordableError(f"{writer.target} writes into a parameter, the batch or a captured tensor")
            read_before = any(
                user in moving and position[user] < position[writer] for node in group for user in node.users
            )
            if writer in moving or read_before:
                moving.update(group)
                moving.add(writer)
        if len(moving) == size:
            return moving - {recording.inputs[-1]}


def residual_nodes(recording: Recording, moving: set[Node]) -> list[Node]:
    body = needed(body_of(recording), recording.outputs)
    served = moving.intersection(body)
    still = [node for node in body if node not in moving]
    wanted = [node for node in still if served.intersection(node.users) or node in recording.outputs]
    # A tuple of results cannot be handed over; its parts can.
    return [node for node in wanted if not gives_several(node)]
