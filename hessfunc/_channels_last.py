"""Convolutions on images that lie in memory pixel by pixel, as oneDNN is quickest with."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from hessfunc._recorder import Recording
from hessfunc._simplify import is_layout_free

_aten = torch.ops.aten

_LAST = torch.channels_last
_FORWARD, _BACKWARD = _aten.convolution.default, _aten.convolution_backward.default


def in_channels_last(recording: Recording) -> None:
    """Let two-dimensional convolutions on the CPU take their arguments with the channels innermost, in place.

    What they give lies in the same order, and operations entry by entry pass it on, so that few images are turned
    around: those that come in, and kernels. Only rounding changes.
    """
    if not torch.backends.mkldnn.is_available() or not is_layout_free(recording):
        return
    turned: dict[Node, Node] = {}
    for node in list(recording.graph.nodes):
        for image in _images(recording, node):
            if image not in turned:
                turned[image] = _turned(recording, image)
            node.replace_input_with(image, turned[image])


def _images(recording: Recording, node: Node) -> list[Node]:
    """The arguments that a convolution reads, if it is one for oneDNN."""
    arguments: tuple[Any, ...] = node.args
    if node.target is _FORWARD:
        read, transposed = arguments[:2], arguments[6]
    elif node.target is _BACKWARD:
        into_input, into_weight, _ = arguments[10]
        gradient, images, weight = arguments[:3]
        read, transposed = (gradient, *[images] * into_weight, *[weight] * into_input), arguments[7]
    else:
        return []
    values = [recording.values.get(argument) for argument in read]
    suits = all(v and len(v.shape) == 4 and v.dtype == torch.float32 and v.device.type == "cpu" for v in values)
    return list(read) if suits and not transposed else []


def _turned(recording: Recording, image: Node) -> Node:
    after = image
    while after.next.op in ("placeholder", "get_attr"):
        after = after.next
    with recording.graph.inserting_after(after):
        turned = recording.graph.call_function(_aten.contiguous.default, (image,), {"memory_format": _LAST})
    value = recording.values[image]
    strides = torch.empty(value.shape, device="meta", memory_format=_LAST).stride()
    recording.values[turned] = value._replace(strides=strides)
    recording.storage[turned] = recording.storage[image]  # as it mostly is, in this order already
    return turned
