"""In which leaves a function is piecewise linear: where its second derivative there is zero, digit by digit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import BackwardCFunction

from hessfunc import tree
from hessfunc._compat import REVERSE_ALONE, REVERSE_OVER_REVERSE, DeeperError, Order, rerouted, tape
from hessfunc._probes import signs
from hessfunc._typing import Params, Tensor


def straight(
    function: Callable[[Params], Tensor], params: Params, leaves: Sequence[int], generator: torch.Generator
) -> list[bool]:
    """Whether ``E (d2 (u . f)) E v`` is zero in all entries, with ``E`` the projector onto each of these leaves.

    ``u`` and ``v`` are random signs. Reverse over reverse forms no term of this product where ``f`` has no curvature,
    so that nothing is left to cancel, and what is not zero can still be rounding. What torch does not differentiate
    twice in this order counts as curved, and so does every ``torch.autograd.Function``: the backward pass of one that
    is ``once_differentiable`` passes for a constant.

    Cost: a gradient that is kept to be differentiated, and for each leaf a backward pass through it.
    """
    try:
        try:
            return _straight(function, params, leaves, generator, REVERSE_OVER_REVERSE)
        except DeeperError:
            return _straight(function, params, leaves, generator, REVERSE_ALONE)
    except RuntimeError:
        return [False] * len(leaves)


def _straight(
    function: Callable[[Params], Tensor],
    params: Params,
    leaves: Sequence[int],
    generator: torch.Generator,
    order: Order,
) -> list[bool]:
    found, spec = tree.flatten(params)
    # In inference mode nothing is recorded whatever grad mode says, and all would be zero.
    with torch.inference_mode(False), torch.enable_grad():
        tracked = [(leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_() for leaf in found]
        outputs = rerouted(function, order)(tree.unflatten(tracked, spec))
        inputs = [tracked[n] for n in leaves]
        if not outputs.requires_grad or not inputs:
            return [True] * len(leaves)
        if any(isinstance(node, BackwardCFunction) for node in tape(outputs)):
            return [False] * len(leaves)
        gradients = torch.autograd.grad(
            outputs, inputs, _signs(outputs, generator), create_graph=True, materialize_grads=True
        )
        return [_vanishes(g, leaf, generator) for g, leaf in zip(gradients, inputs, strict=True)]


def _vanishes(gradient: Tensor, leaf: Tensor, generator: torch.Generator) -> bool:
    if not gradient.requires_grad:
        return True
    product = torch.autograd.grad(gradient, leaf, _signs(leaf, generator), retain_graph=True, allow_unused=True)[0]
    return product is None or not bool(product.any())


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = signs(1, like.numel(), generator=generator, dtype=like.dtype, device=like.device)
    return drawn.reshape(like.shape)
