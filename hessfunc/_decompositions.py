"""Torch functions spelled out in operations that can be differentiated in any order; signatures are torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from hessfunc import tree
from hessfunc._typing import Tensor


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``F.mse_loss``: with mean reduction it fails in jvp (pytorch#123996) and kills the process when linearized.

    With any reduction it kills the process when jvp over vjp is compiled.
    """
    if target.shape != input.shape:
        warnings.warn(
            f"target has shape {tuple(target.shape)}, input {tuple(input.shape)}: mse_loss broadcasts them, "
            "which is seldom meant; give them one shape.",
            stacklevel=2,
        )
    elementwise = (input - target).square()
    reduction = _legacy_reduction(size_average, reduce, reduction)
    if weight is None:
        return _reduce(elementwise, reduction)
    total = _reduce(elementwise * weight, "sum" if reduction == "mean" else reduction)
    return total / weight.sum() if reduction == "mean" else total


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """``F.huber_loss``: its backward pass has no forward-mode rule, that of the same loss scaled otherwise has."""
    elementwise = delta * F.smooth_l1_loss(input, target, reduction="none", beta=delta)
    return _reduce(elementwise if weight is None else elementwise * weight, reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.soft_margin_loss``: its backward pass has no forward-mode rule."""
    return _reduce(F.softplus(-target * input), _legacy_reduction(size_average, reduce, reduction))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``: its backward pass has no derivative at all."""
    output = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(output) if inplace else output


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: ARG001  shapes torch's gradient, not the function
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    """``F.embedding``, with the padding row as the constant that training takes it for.

    Torch masks that row in the gradient but not in the forward mode, and the product would not be symmetric.
    ``max_norm`` clips a copy, where torch writes to the weights.
    """
    if max_norm is not None:
        clipped = torch.embedding_renorm_(weight.detach().clone(), input.contiguous(), max_norm, norm_type)
        weight = weight + (clipped - weight.detach())
    output = torch.embedding(weight, input)
    if padding_idx is None:
        return output
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, output.detach(), output)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: no forward-mode rule, and torch's second derivative of it is wrong."""
    others = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: the fused kernels have no forward-mode rule; this is torch's reference."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the reference would add it as 0 and 1
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    math_attention = torch.ops.aten._scaled_dot_product_attention_math
    return math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` by way of its weights, which spells attention out, no fused kernel."""
    wanted = kwargs.get("need_weights", True)
    output, weights = F.multi_head_attention_forward(*args, **{**kwargs, "need_weights": True})
    return output, weights if wanted else None


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``F.glu``: its forward-mode rule has no derivative and no batching rule."""
    left, right = input.chunk(2, dim)
    return left * torch.sigmoid(right)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``F.layer_norm``."""
    axes = list(range(-len(normalized_shape), 0))
    return _affine(_standardize(input, axes, eps)[0], weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, running statistics included."""
    count = input.numel() // input.shape[1]
    if not training or count == 1:  # torch's own error for a single value
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    normalized, mean, variance = _standardize(input, [0, *range(2, input.dim())], eps)
    _track(running_mean, running_var, mean, variance, momentum, count)
    return _affine(normalized, *_by_channel(input, weight, bias)).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``, running statistics included."""
    count = input[0, 0].numel()
    if not use_input_stats or count == 1:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    normalized, mean, variance = _standardize(input, list(range(2, input.dim())), eps)
    _track(running_mean, running_var, mean.mean(0), variance.mean(0), momentum, count)
    return _affine(normalized, *_by_channel(input, weight, bias)).to(input.dtype)


def _standardize(input: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    input = input.to(tree.accumulation_dtype(input.dtype))
    mean = input.mean(axes, keepdim=True)
    centered = input - mean
    variance = centered.square().mean(axes, keepdim=True)
    return centered * torch.rsqrt(variance + eps), mean, variance


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normalized if weight is None else normalized * weight
    return scaled if bias is None else scaled + bias


def _by_channel(input: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    shape = (-1, *[1] * (input.dim() - 2))
    return [None if tensor is None else tensor.reshape(shape) for tensor in tensors]


def _track(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, count: int
) -> None:
    unbiased = variance * (count / (count - 1))
    for running, current in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.copy_((1 - momentum) * running + momentum * current.detach().reshape(-1).to(running.dtype))


def _reduce(elementwise: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return elementwise
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not known; expected 'mean', 'sum' or 'none'.")
    return elementwise.mean() if reduction == "mean" else elementwise.sum()


def _legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"
