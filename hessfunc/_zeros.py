"""Which results in a recording are zero whatever its inputs."""

from __future__ import annotations

import torch
from torch.fx import Node

from hessfunc._recorder import Recording
from hessfunc._simplify import VIEWS

_aten = torch.ops.aten

_ZERO = {
    *(_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten._efficientzerotensor.default),
    _aten._new_zeros_with_same_feature_meta.default,
}
_ZERO_IF_FIRST_IS = {
    *(*VIEWS, _aten.expand.default, _aten.t.default, _aten.transpose.int, _aten.permute.default),
    *(_aten._to_copy.default, _aten.clone.default, _aten.contiguous.default, _aten.neg.default),
    *(_aten.unsqueeze.default, _aten.threshold_backward.default, _aten.gelu_backward.default),
}
_ZERO_IF_ANY_IS = {
    *(_aten.mul.Tensor, _aten.mul.Scalar, torch.ops.prims.mul.default, _aten.mm.default, _aten.bmm.default),
}


def zeros(recording: Recording) -> set[Node]:
    """Nodes that are zero, as tangents of what does not depend on the parameters are.

    A product with zero counts as zero, as it does for torch's forward mode, also where the other factor is infinite.
    """
    written = {storage for _, storage in recording.mutations}
    found: set[Node] = set()
    for node in recording.graph.nodes:
        if node.op != "call_function" or recording.storage.get(node) in written:
            continue
        of_zeros = [isinstance(argument, Node) and argument in found for argument in node.args]
        made = node.target in _ZERO
        if (
            made
            or (node.target in _ZERO_IF_FIRST_IS and of_zeros[0])
            or (node.target in _ZERO_IF_ANY_IS and any(of_zeros))
        ):
            found.add(node)
    return found
