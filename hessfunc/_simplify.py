"""Remove from a recording what does no work: aliases, copies, and operations done twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from hessfunc._recorder import Recording, Value
from hessfunc._steps import needed

_aten = torch.ops.aten

VIEWS = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
"""Another shape of the same numbers in the same order."""

_SAME = {_aten.alias.default, _aten.detach.default}
_MAYBE_SAME = {*VIEWS, _aten.expand.default, _aten._to_copy.default, _aten.to.dtype_layout}
_EMPTY = _aten._new_zeros_with_same_feature_meta.default
_TURNS = {_aten.transpose.int, _aten.t.default}


def simplify(recording: Recording) -> None:
    """Rewrite the recording's graph in place; results stay the same to the last bit.

    Forward mode copies every tangent whose memory is laid out differently from its primal's (a slice of a flat vector
    is), and its rules for normalizations repeat subexpressions. Memory that is written to otherwise is
    left alone.
    """
    layout_free = is_layout_free(recording)
    _drop_tangent_copies(recording, layout_free)
    if layout_free:
        _take_views_by_shape(recording)
    written = {storage for _, storage in recording.mutations}
    seen: dict[Hashable, Node] = {}
    for node in list(recording.graph.nodes):
        touched = [node, *node.all_input_nodes]
        if node.op != "call_function" or any(recording.storage.get(n) in written for n in touched):
            continue
        same = _same(recording, node, layout_free)
        if same is None:
            same = seen.setdefault(_key(node), node)
        if same is not node:
            _replace(recording, node, same)
    drop_unneeded(recording)


def drop_unneeded(recording: Recording) -> None:
    """Let users that nothing needs not stand in the way of what else is rewritten."""
    body = [node for node in recording.graph.nodes if node.op == "call_function"]
    kept = set(needed(body, recording.outputs))
    for node in reversed(body):
        if node not in kept:
            recording.graph.erase_node(node)
            recording.storage.pop(node, None)


def is_layout_free(recording: Recording) -> bool:
    """Whether no operation counts on an order of numbers in memory other than the usual one."""
    if any(node.target is _aten.as_strided.default for node in recording.graph.nodes):
        return False
    values = [recording.values.get(base) for base in _written_and_viewed(recording)]
    return all(value is not None and _is_contiguous(value) for value in values)


def _written_and_viewed(recording: Recording) -> list[Node]:
    """What first holds memory that is written to and has a view of another shape."""
    groups: dict[int, list[Node]] = {storage: [] for _, storage in recording.mutations}
    for node in recording.graph.nodes:
        groups.get(recording.storage.get(node, -1), []).append(node)
    return [group[0] for group in groups.values() if any(node.target in VIEWS for node in group)]


def _is_contiguous(value: Value) -> bool:
    expected = 1
    for length, stride in zip(reversed(value.shape), reversed(value.strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True


def _take_views_by_shape(recording: Recording) -> None:
    """Let views work in whatever order the numbers lie in; memory that is written to is put in order first."""
    bases = _written_and_viewed(recording)
    for base in bases:
        with recording.graph.inserting_after(base):
            ordered = recording.graph.call_function(_aten.contiguous.default, (base,))
        base.replace_all_uses_with(ordered)
        ordered.args = (base,)
        recording.storage[ordered], recording.values[ordered] = recording.storage[base], recording.values[base]
    written = {storage for _, storage in recording.mutations}
    for node in recording.graph.nodes:
        if node.target in VIEWS and recording.storage.get(node) not in written:
            node.target = _aten.reshape.default


def _same(recording: Recording, node: Node, layout_free: bool) -> Node | None:
    """The argument that this operation returns as it is, or None."""
    arguments: tuple[Any, ...] = node.args
    if node.target in _SAME:
        return node.all_input_nodes[0]
    if node.target in _TURNS and arguments[0].target is node.target and arguments[0].args[1:] == arguments[1:]:
        return arguments[0].args[0]
    known, value = recording.values.get(arguments[0]) if arguments else None, recording.values.get(node)
    if node.target not in _MAYBE_SAME or known is None or value is None:
        return None
    if layout_free:
        known, value = known._replace(strides=()), value._replace(strides=())
    return arguments[0] if known == value else None


def _drop_tangent_copies(recording: Recording, layout_free: bool) -> None:
    for copy in [node for node, _ in recording.mutations if node.target is _aten.copy_.default]:
        target, source = copy.args[:2]
        if not isinstance(target, Node) or not isinstance(source, Node):
            continue
        fresh = target.target is _EMPTY and set(target.users) == {copy}
        writers = [writer for writer, storage in recording.mutations if storage == recording.storage[copy]]
        read_only = all(storage != recording.storage[source] for _, storage in recording.mutations)
        alike = recording.values[source]._replace(strides=()) == recording.values[copy]._replace(strides=())
        alike = alike and (layout_free or recording.values[source].strides == recording.values[copy].strides)
        if fresh and alike and read_only and writers == [copy]:
            recording.mutations = [(writer, storage) for writer, storage in recording.mutations if writer is not copy]
            _replace(recording, copy, source)


def _replace(recording: Recording, node: Node, by: Node) -> None:
    new = recording.storage[by]
    views = _sharing_memory(recording, node) if recording.storage[node] != new else set()
    node.replace_all_uses_with(by)
    recording.outputs = [by if output is node else output for output in recording.outputs]
    recording.graph.erase_node(node)
    del recording.storage[node]
    for view in views:
        recording.storage[view] = new


def _sharing_memory(recording: Recording, node: Node) -> set[Node]:
    """The other nodes of the same memory: each is a view of one of them, or has one of them for a view."""
    storage, found, waiting = recording.storage[node], {node}, [node]
    while waiting:
        one = waiting.pop()
        for other in (*one.users, *one.all_input_nodes):
            if other not in found and recording.storage.get(other) == storage:
                found.add(other)
                waiting.append(other)
    return found - {node}


def merge_storage(recording: Recording, old: int, new: int) -> None:
    """Note that what was views of one memory is views of another."""
    if old == new:  # as for an alias, so in most cases
        return
    for node, storage in recording.storage.items():
        if storage == old:
            recording.storage[node] = new


def _key(node: Node) -> Hashable:
    """Equal for nodes that do the same to the same."""
    return node.target, _look(node.args), *((name, _look(value)) for name, value in node.kwargs.items())


def _look(value: Any) -> Hashable:
    if isinstance(value, Node):
        return value
    if isinstance(value, list | tuple):
        return tuple([_look(part) for part in value])
    return type(value), value  # 1 is not True, nor 1.0
