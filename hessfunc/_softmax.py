"""The softmax that forward mode works out for itself: the one that the function has already, in its place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from hessfunc._recorder import Recording
from hessfunc._simplify import drop_unneeded, is_layout_free, merge_storage

_aten = torch.ops.aten

_SOFTMAX = {_aten._softmax.default, _aten._safe_softmax.default}
_LOG_SOFTMAX = {_aten._log_softmax.default}
_DIVISIONS = {_aten.div_.Tensor, _aten.div.Tensor}


def one_softmax(recording: Recording) -> None:
    """Rewrite tangents of softmax and log-softmax in the recording's graph, in place.

    torch's rules for both contain ``sum_j e_j dx_j / sum_j e_j`` with ``e = exp(x - max x)``. That is the sum of
    ``p_j dx_j`` where ``p`` is the softmax of ``x``, which backward passes need as well: in attention and for the
    logits of a language model there is no reason to hold ``e`` beside it. Only rounding changes, except where all of a
    row is masked: torch's safe softmax is zero there, and ``e`` is not a number.
    """
    if not is_layout_free(recording):
        return
    position = {node: i for i, node in enumerate(recording.graph.nodes)}
    written = {storage for _, storage in recording.mutations}
    known = _known(recording, written)
    for node in list(recording.graph.nodes):
        logits = _shifted_by_maximum(recording, node)
        softmax = known.get(logits) if logits else None
        if logits is None or softmax is None or recording.storage[node] in written:
            continue
        if recording.values[softmax].dtype != recording.values[node].dtype:
            continue
        (start,) = softmax.all_input_nodes
        for weighted, quotients in _quotients(recording, node, logits):
            if position[start] >= position[weighted]:
                continue
            if position[softmax] >= position[weighted]:
                start.append(softmax)
                position[softmax] = position[start]
            weighted.replace_input_with(node, softmax)
            for total, division in quotients:
                _drop(recording, division, total)
    drop_unneeded(recording)


class _Logits(NamedTuple):
    """What a softmax is of, and along which dimension, counted from the first."""

    source: Any
    dim: Any


def _known(recording: Recording, written: set[int]) -> dict[_Logits, Node]:
    """Softmaxes, by what they are of."""
    found: dict[_Logits, Node] = {}
    for node in recording.graph.nodes:
        inner: Any = node.args[0] if node.target is _aten.exp.default else node
        if inner.target not in (_SOFTMAX if inner is node else _LOG_SOFTMAX):
            continue
        source, dim = inner.args[:2]
        if not {recording.storage[n] for n in (source, inner, node)} & written:
            found.setdefault(_Logits(source, _from_first(recording, node, dim)), node)
    return found


def _shifted_by_maximum(recording: Recording, node: Node) -> _Logits | None:
    """``x`` and ``dim`` of ``exp(x - amax(x, dim, True))``."""
    shifted: Any = node.args[0] if node.target is _aten.exp.default else None
    if shifted is None or shifted.target is not _aten.sub.Tensor or shifted.kwargs:
        return None
    source, maximum = shifted.args
    if not isinstance(maximum, Node) or maximum.target is not _aten.amax.default or maximum.args[0] is not source:
        return None
    return _Logits(source, _reduced(recording, maximum))


def _quotients(recording: Recording, node: Node, logits: _Logits) -> list[tuple[Node, list[tuple[Node, Node]]]]:
    """``e * t``, and its sums with the divisions of them by the sum of ``e``, for each ``t``."""

    def sums_of(node: Node) -> list[Node]:
        sums = [user for user in node.users if user.target is _aten.sum.dim_IntList]
        return [total for total in sums if _reduced(recording, total) == logits.dim]

    def is_quotient(total: Node) -> bool:
        (division, *others) = total.users
        return division.target in _DIVISIONS and division.args[0] is total and division.args[1] in norms and not others

    norms, found = sums_of(node), []
    for weighted in node.users:
        totals = sums_of(weighted)
        all_summed = bool(totals) and len(totals) == len(weighted.users)
        if weighted.target is _aten.mul.Tensor and all_summed and all(map(is_quotient, totals)):
            found.append((weighted, [(total, next(iter(total.users))) for total in totals]))
    return found


def _reduced(recording: Recording, node: Node) -> int | None:
    """The only dimension that is reduced, and kept with length one."""
    arguments: Any = (*node.args, None, None)
    source, dims, keep = arguments[:3]
    alone = isinstance(dims, list | tuple) and len(dims) == 1 and keep is True and not node.kwargs
    return _from_first(recording, source, dims[0]) if alone else None


def _from_first(recording: Recording, node: Node, dim: int) -> int:
    return dim % max(len(recording.values[node].shape), 1)


def _drop(recording: Recording, division: Node, total: Node) -> None:
    division.replace_all_uses_with(total)
    recording.outputs = [total if output is division else output for output in recording.outputs]
    recording.mutations = [(writer, storage) for writer, storage in recording.mutations if writer is not division]
    merge_storage(recording, recording.storage.pop(division), recording.storage[total])
    recording.graph.erase_node(division)
