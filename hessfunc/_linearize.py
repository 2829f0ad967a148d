"""Partial evaluation of a curvature product: what depends on the vector apart from what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from hessfunc._reassociate import reassociate
from hessfunc._recorder import NotRecordableError, Recording, record, select_result
from hessfunc._simplify import simplify
from hessfunc._typing import Tensor

Program = Callable[..., list[Tensor]]


class Linearized:
    """``function(*primals, tangent)``, linear in its last argument, as two programs traced from one run.

    The primal program ``(*primals) -> residuals`` holds all operations that the tangent has no part in; the tangent
    program ``(*primals, *residuals, tangent) -> result`` the others. One evaluation of the first serves any number of
    tangents, and both serve all primals of the shapes traced.

    With ``compile`` the tangent program goes through ``torch.compile``. Without ``rewrite`` both programs do what the
    function did, operation by operation; with it they do less, and tensors may lie in memory in another order, which a
    few of torch's operations do not take.

    Attributes:
        result: what the traced run itself returned.
        random: names of the operations in it that draw random numbers.
        mean_elements: mean number of entries that an operation produces.
        eps: rounding unit of the coarsest dtype that it computes with.
        convolves: whether there are convolutions among the operations.
        constants: tensors that the function closes over.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        primals: Sequence[Tensor],
        tangent: Tensor,
        *,
        compile: bool = False,
        rewrite: bool = True,
    ) -> None:
        recording, outputs = record(lambda *inputs: [function(*inputs)], [*primals, tangent])
        self.result = outputs[0]
        self.random = tuple(recording.random)
        self.mean_elements = sum(recording.elements) / max(len(recording.elements), 1)
        self.convolves = any("convolution" in str(node.target) for node in _body(recording))
        dtypes = {value.dtype for value in recording.values.values() if value.dtype.is_floating_point}
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.constants = list(recording.constants.values())
        if rewrite:
            simplify(recording)
            reassociate(recording)
        moving = _moving(recording)
        self._computes_result = recording.outputs[0] in moving
        residuals = _residuals(recording, moving)
        self._primal: Program = _program(
            recording, recording.inputs[:-1], residuals, [n for n in _body(recording) if n not in moving]
        )
        self._tangent: Program = _program(
            recording,
            [*recording.inputs[:-1], *residuals, recording.inputs[-1]],
            recording.outputs,
            [n for n in _body(recording) if n in moving],
        )
        if compile:
            self._tangent = torch.compile(self._tangent, dynamic=False)

    def residuals(self, primals: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate all that does not depend on the tangent."""
        return self._primal(*primals)

    def apply(self, primals: Sequence[Tensor], residuals: Sequence[Tensor], tangent: Tensor) -> Tensor:
        """The result for one tangent, from the residuals at ``primals``; memory of its own."""
        result = self._tangent(*primals, *residuals, tangent)[0]
        # A constant result is a residual, and that of the identity is the tangent itself.
        shared = result.untyped_storage().data_ptr() == tangent.untyped_storage().data_ptr()
        return result.clone() if shared or not self._computes_result else result


def _body(recording: Recording) -> list[Node]:
    return [node for node in recording.graph.nodes if node.op == "call_function"]


def _moving(recording: Recording) -> set[Node]:
    """Nodes to be evaluated anew for each tangent.

    Those that depend on it, and where memory is written in place, whatever must not be shared between tangents.
    """
    body = _body(recording)
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


def _residuals(recording: Recording, moving: set[Node]) -> list[Node]:
    still = [node for node in _body(recording) if node not in moving]
    wanted = [node for node in still if any(user in moving for user in node.users) or node in recording.outputs]
    # A tuple of results cannot be handed over; its parts can.
    return [node for node in wanted if not any(user.target is select_result for user in node.users)]


def _program(
    recording: Recording, inputs: Sequence[Node], outputs: Sequence[Node], body: Sequence[Node]
) -> GraphModule:
    """The part of a recording from ``inputs`` to ``outputs``, without what neither needs."""
    graph = Graph()
    copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(inputs)}
    for node in recording.graph.nodes:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
    for node in body:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output([copies[node] for node in outputs])
    graph.eliminate_dead_code()
    return GraphModule(recording.constants, graph)
