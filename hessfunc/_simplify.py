"""Remove from a recording what does no work: aliases, copies of tangents, and operations done twice."""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import Node
from torch.fx.node import map_arg

from hessfunc._recorder import Recording

_SAME = {"aten::alias", "aten::detach"}
_EMPTY = "aten::_new_zeros_with_same_feature_meta"


def simplify(recording: Recording) -> None:
    """Rewrite the recording's graph in place; results stay the same to the last bit.

    Forward mode copies every tangent whose memory is laid out differently from its primal's (a slice of a flat vector
    is), and its rules for normalizations repeat subexpressions. Memory that is written to otherwise is left alone.
    """
    _drop_tangent_copies(recording)
    written = {storage for _, storage in recording.mutations}
    seen: dict[Hashable, Node] = {}
    for node in list(recording.graph.nodes):
        touched = [node, *node.all_input_nodes]
        if node.op != "call_function" or any(recording.storage.get(n) in written for n in touched):
            continue
        if _name(node) in _SAME:
            _replace(recording, node, node.all_input_nodes[0])
            continue
        earlier = seen.setdefault(_key(node), node)
        if earlier is not node:
            _replace(recording, node, earlier)


def _drop_tangent_copies(recording: Recording) -> None:
    for copy in [node for node, _ in recording.mutations if _name(node) == "aten::copy_"]:
        target, source = copy.args[:2]
        if not isinstance(target, Node) or not isinstance(source, Node):
            continue
        fresh = _name(target) == _EMPTY and set(target.users) == {copy}
        writers = [writer for writer, storage in recording.mutations if storage == recording.storage[copy]]
        # Views that follow rely on the memory layout, so the copy may go only if it does not change that.
        if fresh and writers == [copy] and recording.strides[source] == recording.strides[copy]:
            recording.mutations = [(writer, storage) for writer, storage in recording.mutations if writer is not copy]
            _replace(recording, copy, source)


def _replace(recording: Recording, node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    recording.outputs = [by if output is node else output for output in recording.outputs]
    recording.graph.erase_node(node)
    recording.storage.pop(node, None)


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _key(node: Node) -> Hashable:
    """Equal for nodes that do the same to the same."""
    arguments = map_arg((node.args, node.kwargs), lambda argument: f"%{argument.name}")
    return (node.target, repr(arguments))
