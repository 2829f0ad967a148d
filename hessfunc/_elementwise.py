"""Elementwise operations that are linear in a tangent, by what they do to it."""

from __future__ import annotations

import torch

_aten, _prims = torch.ops.aten, torch.ops.prims

MULTIPLY = {_aten.mul.Tensor, _aten.mul.Scalar, _prims.mul.default}
DIVIDE = {_aten.div.Tensor, _aten.div.Scalar}
ADD = {_aten.add.Tensor: 1.0, _prims.add.default: 1.0, _aten.sub.Tensor: -1.0, _prims.sub.default: -1.0}

LONG_SLOPES = {
    *(_aten.gelu_backward.default, _aten.silu_backward.default, _aten.elu_backward.default),
    _aten.softplus_backward.default,
}
"""Multiply by a slope that takes longer to work out than to multiply by."""

MASKS = {_aten.threshold_backward.default, _aten.leaky_relu_backward.default, _aten.hardtanh_backward.default}
"""Multiply by one of two slopes, as quickly as by one that is held."""

SLOPES = {*LONG_SLOPES, _aten.tanh_backward.default, _aten.sigmoid_backward.default}
"""Multiply by the slope of an activation that is not a mask."""
