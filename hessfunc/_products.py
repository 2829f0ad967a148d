"""Products of the Hessian of a loss with a vector: pure functions, a pytree in and a pytree out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hessfunc import tree
from hessfunc._checks import check_like, check_loss_value, check_params
from hessfunc._compat import (
    ANY_ORDER,
    FORWARD_OVER_REVERSE,
    REVERSE_ALONE,
    REVERSE_OVER_REVERSE,
    DeeperError,
    Order,
    differentiable_backward,
    differentiated_outside,
    is_tracked,
    one_thread,
    rerouted,
)
from hessfunc._explain import explained
from hessfunc._typing import Loss, Params, Tensor


def hvp(loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
    """Hessian-vector product, forward over reverse: ``jvp(grad(loss))``.

    Formula: ``H v = d/dt grad loss(params + t v)`` at ``t = 0`` (Pearlmutter 1994).
    Cost: one gradient and its tangent, 2 to 4 gradients of time. Composes with ``vmap``, ``grad``, ``jvp``
    and ``torch.compile``; differentiable in ``params``, ``v`` and whatever the loss closes over. Where it is
    differentiated or compiled it is computed as [`hvp_reverse_over_forward`][], since torch's third derivatives are
    missing or wrong in this order (BatchNorm, LayerNorm, ``F.normalize``).

    Args:
        loss: ``loss(params, *batch)``, returns a scalar tensor.
        params: pytree of floating-point tensors.
        v: pytree of the structure, shapes and dtypes of ``params``.
        *batch: passed on to ``loss``.

    Returns:
        Pytree like ``params``.

    Raises:
        ValueError: ``v`` is not like ``params``, or the loss is not a scalar.
        TypeError: a leaf is not a floating-point tensor, or dtypes differ.
        NotImplementedError: the loss uses an operation without forward-mode derivatives.

    Example:
        >>> import torch, hessfunc as hf
        >>> quartic = lambda p: (p["x"] ** 4).sum() / 12
        >>> hf.hvp(quartic, {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([1.0, 1.0])})
        {'x': tensor([1., 4.])}
    """
    _check_point(params, v)
    if differentiated_outside([*tree.leaves(params), *tree.leaves(v)]):
        return _reverse_over_forward(loss, params, v, batch)
    return hvp_unchecked(loss, params, v, *batch)


def hvp_unchecked(loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
    """[`hvp`][] for arguments that were checked before, differentiated no further: what operators call."""
    try:
        return _forward_over_reverse(loss, params, v, batch, FORWARD_OVER_REVERSE)
    except DeeperError:
        return _forward_over_reverse(loss, params, v, batch, ANY_ORDER)


def hvp_reverse_over_forward(loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
    """Hessian-vector product, reverse over forward: the gradient of ``jvp(loss)``.

    The same numbers as [`hvp`][]; arguments and errors as there. Cheaper or dearer than it by the model and the
    version of torch: ``benchmarks/bench_hvp.py`` measures both. Normalizations are spelled out, since torch gets the
    derivative of their forward-mode rules wrong; determinants and linear solves are refused for the same reason.

    Raises:
        NotImplementedError: the loss uses an operation that torch differentiates wrongly, or not at all, in this order.

    Example:
        >>> import torch, hessfunc as hf
        >>> hf.hvp_reverse_over_forward(lambda p: (p**4).sum() / 12, torch.tensor([1.0, 2.0]), torch.ones(2))
        tensor([1., 4.])
    """
    _check_point(params, v)
    return _reverse_over_forward(loss, params, v, batch)


def hvp_drawn(loss: Loss, params: Params, draw: Callable[[], Params], *batch: Any) -> Params:
    """[`hvp_reverse_over_forward`][] with the vector ``draw()``, which is not held during the backward pass."""
    return _pulled_back(loss, params, draw, batch, again=False)


def hvp_double_backward(loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
    """Hessian-vector product, reverse over reverse on torch's own tape.

    The baseline, and the way out for an operation without a forward-mode rule (a custom ``autograd.Function``,
    ``grid_sample``). The result is detached and the call cannot be vmapped or differentiated. ``params`` are not
    changed and get no ``.grad``. Arguments and errors as in [`hvp`][]. Gradient checkpointing inside a model that
    was made functional gives wrong gradients here (torch recomputes after its parameters were swapped back):
    switch it off.

    Example:
        >>> import torch, hessfunc as hf
        >>> hf.hvp_double_backward(lambda p: (p**4).sum() / 12, torch.tensor([1.0, 2.0]), torch.ones(2))
        tensor([1., 4.])
    """
    _check_point(params, v)
    try:
        return _double_backward(loss, params, v, batch, REVERSE_OVER_REVERSE)
    except DeeperError:
        return _double_backward(loss, params, v, batch, REVERSE_ALONE)


def _check_point(params: Params, v: Params) -> None:
    check_params(params)
    check_like(v, params, name="v", reference="params")


def _checked_loss(loss: Loss, params: Params, batch: tuple[Any, ...]) -> Tensor:
    value = loss(params, *batch)
    check_loss_value(value)
    return value


class _TrackedError(Exception):
    """Torch's own tape records the loss, through a tensor that it closes over."""


def _forward_over_reverse(loss: Loss, params: Params, v: Params, batch: tuple[Any, ...], order: Order) -> Params:
    def value_of(p: Params) -> Tensor:
        value = _checked_loss(loss, p, batch)
        differentiable_backward(value)
        return value

    def gradient(p: Params) -> Params:
        value, pullback = torch.func.vjp(rerouted(value_of, order), p)[:2]
        if is_tracked(value):
            raise _TrackedError
        # torch.func.grad always builds a graph of the backward pass, which nearly doubles peak memory.
        return pullback(torch.ones_like(value), retain_graph=False, create_graph=False)[0]

    try:
        with one_thread():
            return torch.func.jvp(gradient, (params,), (v,))[1]
    except _TrackedError:
        return _reverse_over_forward(loss, params, v, batch)
    except RuntimeError as error:
        if _is_about_dtypes(error):  # autocast inside the loss is over when the backward pass and its tangent run
            return _reverse_over_forward(loss, params, v, batch)
        raise explained(error) from error


def _is_about_dtypes(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("same dtype", "scalar type", "should be the same", "expected dtype"))


def _reverse_over_forward(loss: Loss, params: Params, v: Params, batch: tuple[Any, ...]) -> Params:
    outside = differentiated_outside([*tree.leaves(params), *tree.leaves(v)])
    return _pulled_back(loss, params, lambda: v, batch, again=outside)


def _pulled_back(
    loss: Loss, params: Params, draw: Callable[[], Params], batch: tuple[Any, ...], *, again: bool
) -> Params:
    safe = rerouted(lambda p: _checked_loss(loss, p, batch), ANY_ORDER)
    try:
        with one_thread():
            slope, pullback = torch.func.vjp(lambda p: torch.func.jvp(safe, (p,), (draw(),))[1], params)[:2]
        again = again or is_tracked(slope)
        return pullback(torch.ones_like(slope), retain_graph=again, create_graph=again)[0]
    except RuntimeError as error:
        raise explained(error) from error


def _double_backward(loss: Loss, params: Params, v: Params, batch: tuple[Any, ...], order: Order) -> Params:
    leaves, spec = tree.flatten(params)
    safe = rerouted(lambda p: _checked_loss(loss, p, batch), order)
    # In inference mode nothing is recorded whatever grad mode says, and all would be zero.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [(leaf.clone() if leaf.is_inference() else leaf.detach()).requires_grad_() for leaf in leaves]
        try:
            return _double_backward_of(safe, inputs, tree.leaves(v), spec)
        except RuntimeError as error:
            raise explained(error) from error


def _double_backward_of(safe: Loss, inputs: list[Tensor], v: list[Tensor], spec: Any) -> Params:
    value = safe(tree.unflatten(inputs, spec))
    if not value.requires_grad:
        return tree.unflatten([torch.zeros_like(leaf).detach() for leaf in inputs], spec)
    gradient = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
    curved = [(g, t.detach()) for g, t in zip(gradient, v, strict=True) if g.requires_grad]
    if not curved:
        return tree.unflatten([torch.zeros_like(leaf).detach() for leaf in inputs], spec)
    outputs, tangents = zip(*curved, strict=True)
    products = torch.autograd.grad(outputs, inputs, tangents, materialize_grads=True)
    return tree.unflatten([product.detach() for product in products], spec)
