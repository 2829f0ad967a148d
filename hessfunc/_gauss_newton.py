"""The generalized Gauss-Newton matrix: the curvature of the criterion alone, seen through a linearized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hessfunc import tree
from hessfunc._batched import over_batches
from hessfunc._checks import check_like, check_params
from hessfunc._compat import (
    ANY_ORDER,
    FORWARD_OVER_REVERSE,
    REVERSE_ALONE,
    REVERSE_OVER_REVERSE,
    DeeperError,
    Order,
    differentiated_outside,
    is_tracked,
    one_thread,
    rerouted,
)
from hessfunc._explain import explained
from hessfunc._operators import Operator
from hessfunc._products import hvp, hvp_unchecked
from hessfunc._rules import Rule
from hessfunc._typing import Batch, Loss, Params, Tensor

ModelFn = Callable[..., Any]
"""``model_fn(params, *inputs) -> outputs``, a floating-point tensor or a pytree of such."""

_WAY_OUT = "Write that operation in others; for the Hessian alone, hessfunc.hvp_double_backward needs no forward mode."

Criterion = Callable[..., Tensor]
"""``criterion(outputs, target) -> scalar``."""


def ggnvp(model_fn: ModelFn, criterion: Criterion, params: Params, v: Params, *batch: Any) -> Params:
    """Product of the generalized Gauss-Newton matrix with a vector.

    Formula: ``G v = J^T H_out (J v)`` with ``J`` the Jacobian of the model's outputs at ``params`` and ``H_out`` the
    Hessian of the criterion at the outputs (Schraudolph 2002). The Hessian of the loss is ``G`` plus the criterion's
    gradient times the model's second derivatives. ``G`` is positive semi-definite for a criterion that is convex in
    the outputs, such as cross-entropy and squared error; it then is the Fisher matrix of the model's own predictions
    ([`fishervp`][hessfunc.fishervp]).

    Any criterion will do, also one that couples the samples: its Hessian is applied as a product of its own, so that
    no ``(batch, classes, classes)`` tensor arises. Composes with ``vmap``, ``grad``, ``jvp`` and ``torch.compile``.

    Cost: one run of the model with its tangent and one backward pass. Memory: as of one gradient, plus the tangents.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``, as from [`functionalize`][hessfunc.functionalize].
        criterion: ``criterion(outputs, target) -> scalar``.
        params: pytree of floating-point tensors.
        v: pytree of the structure, shapes and dtypes of ``params``.
        *batch: ``(*inputs, target)``.

    Returns:
        Pytree like ``params``.

    Raises:
        ValueError: ``v`` is not like ``params``, or the criterion gives no scalar.
        TypeError: a leaf or an output is not a floating-point tensor, dtypes differ, or the batch lacks a target.
        NotImplementedError: the model uses an operation without forward-mode derivatives.

    Example:
        >>> import torch, hessfunc as hf
        >>> model_fn = lambda p, x: (p["w"] * x) ** 2
        >>> criterion = lambda z, y: ((z - y) ** 2).sum() / 2
        >>> batch = (torch.tensor(1.0), torch.tensor(5.0))
        >>> hf.ggnvp(model_fn, criterion, {"w": torch.tensor(3.0)}, {"w": torch.tensor(1.0)}, *batch)
        {'w': tensor(36.)}
    """
    check_params(params)
    check_like(v, params, name="v", reference="params")
    inputs, target = split_batch(batch)

    def model(p: Params) -> tuple[Any, Any]:
        outputs = model_fn(p, *inputs)
        check_params(outputs, name="the model's output")
        return outputs, ()

    def curvature(outputs: Any, tangents: Any, _aux: Any, deeper: bool) -> Any:
        return (hvp if deeper else hvp_unchecked)(criterion, outputs, tangents, target)

    return push_and_pull(model, params, v, curvature)


def ggn(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    data: Any,
    *,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    chunk_size: int | None = None,
    linearize: bool = True,
    memory_budget: int | None = None,
    check: bool = True,
) -> Operator:
    """The generalized Gauss-Newton matrix at ``params`` over all of ``data``, as a matvec.

    The same interface, weighting of batches and cost per pass as [`hessian`][hessfunc.hessian], which explains the
    options; the formula is that of [`ggnvp`][hessfunc.ggnvp].

    Prefer it to the Hessian where a positive semi-definite matrix is needed (log-determinants, effective dimension,
    natural gradients), where its lower cost counts, or where the outliers of a classifier are to be explained
    ([`ggn_hierarchy`][hessfunc.ggn_hierarchy]). For cross-entropy, squared error and logistic loss it is the Fisher
    matrix ``fisher(..., kind="type2")``; it takes any other criterion too. ``hessian(...) - ggn(...)`` is the residual
    part, which vanishes where the model fits its targets. In a piecewise-linear network with BatchNorm in eval mode
    the diagonal blocks of both agree for each parameter tensor, and with them the traces.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``.
        criterion: ``criterion(outputs, target) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``.
        params: pytree of floating-point tensors.
        data: batches ``(*inputs, target)``: a tuple is one, a list, DataLoader or other re-iterable many.
        reduction: ``"mean"`` or ``"sum"``: how ``criterion`` reduces over a batch.
        count: what a batch weighs under ``"mean"``.
        chunk_size: largest number of vectors to push through one batch together.
        linearize: trace the product once for each shape of batch.
        memory_budget: bytes for what does not depend on the vector, as in [`hessian`][hessfunc.hessian]; 0 takes the
            least memory and more time.
        check: look at the first products for randomness, asymmetry and data that change.

    Raises:
        ValueError: empty data, a criterion that gives no scalar, unclear sample count, an option out of range.
        TypeError: an integer leaf, an exhausted iterator, batches that do not fit the model.
        NonFiniteError: the loss of the first batch, or later a product, is NaN or infinite.

    Warns:
        ProductWarning: the product could not be traced.

    Example:
        >>> import torch, hessfunc as hf
        >>> call, params = hf.functionalize(torch.nn.Linear(2, 3))
        >>> data = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), (torch.zeros(1, 2), torch.tensor([1]))]
        >>> G = hf.ggn(call, torch.nn.functional.cross_entropy, params, data)
        >>> bool(torch.linalg.eigvalsh(G.dense()).min() > -1e-6)
        True
    """

    def product(_loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
        return ggnvp(model_fn, criterion, params, v, *batch)

    return over_batches(
        [Rule(product)],
        composed(model_fn, criterion),
        params,
        data,
        name="Gauss-Newton product",
        reduction=reduction,
        count=count,
        chunk_size=chunk_size,
        linearize=linearize,
        memory_budget=memory_budget,
        check=check,
    )


def composed(model_fn: ModelFn, criterion: Criterion) -> Loss:
    """``loss(params, *inputs, target) = criterion(model_fn(params, *inputs), target)``."""
    if not callable(model_fn):
        raise TypeError(
            f"model_fn is of type {type(model_fn).__name__}, expected a function model_fn(params, *inputs); "
            "model_fn, params = hessfunc.functionalize(model) makes one from a module."
        )
    if isinstance(model_fn, torch.nn.Module):
        raise TypeError(
            "model_fn is an nn.Module, which keeps its parameters to itself; "
            "model_fn, params = hessfunc.functionalize(model) makes a function of them."
        )
    if not callable(criterion):
        raise TypeError(f"criterion is of type {type(criterion).__name__}, expected a callable (outputs, target).")

    def loss(params: Params, *batch: Any) -> Tensor:
        inputs, target = split_batch(batch)
        return criterion(model_fn(params, *inputs), target)

    return loss


def split_batch(batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Inputs and target of a batch."""
    if len(batch) < 2:
        raise TypeError(
            f"a batch needs inputs and a target, (*inputs, target), got {len(batch)} item(s). For other batches pack "
            "them: [(inputs, target), ...]; for a criterion without a target pass None as the last item."
        )
    return batch[:-1], batch[-1]


Middle = Callable[[Any, Any, Any, bool], Any]
"""``middle(outputs, tangents, aux, deeper) -> cotangents``, linear in ``tangents``."""


def push_and_pull(model: Callable[[Params], tuple[Any, Any]], params: Params, v: Params, middle: Middle) -> Params:
    """``J^T middle(J v)`` for ``model(params) -> (outputs, aux)``, from one run of the model.

    ``middle`` is told in its last argument whether what it computes is differentiated further.
    """
    if not differentiated_outside([*tree.leaves(params), *tree.leaves(v)]):
        try:
            return _push_and_pull(model, params, v, middle, FORWARD_OVER_REVERSE, deeper=False)
        except DeeperError:
            return _push_and_pull(model, params, v, middle, ANY_ORDER, deeper=False)
        except _TrackedError:
            pass
    return _push_and_pull(model, params, v, middle, ANY_ORDER, deeper=True)


class _TrackedError(Exception):
    """Torch's own tape records the outputs, through a tensor that the model closes over."""


def _push_and_pull(
    model: Callable[[Params], tuple[Any, Any]],
    params: Params,
    v: Params,
    middle: Middle,
    order: Order,
    *,
    deeper: bool,
) -> Params:
    # The tape of vjp records the run that jvp makes, so one forward pass gives J v and the way back.
    def run(p: Params) -> tuple[Any, Any]:
        result: Any = torch.func.jvp(rerouted(model, order), (p,), (v,), has_aux=True)
        outputs, tangents, aux = result
        return outputs, (tangents, aux)

    try:
        with one_thread():
            result: Any = torch.func.vjp(run, params, has_aux=True)
    except RuntimeError as error:
        raise explained(error, subject="model", remedy=_WAY_OUT) from error
    outputs, pullback, (tangents, aux) = result
    if not deeper and any(is_tracked(leaf) for leaf in [*tree.leaves(outputs), *tree.leaves(tangents)]):
        raise _TrackedError
    cotangents = middle(outputs, tangents, aux, deeper)
    return pullback(cotangents, retain_graph=deeper, create_graph=deeper)[0]


def push(model: Callable[[Params], tuple[Any, Any]], params: Params, v: Params) -> tuple[Any, Any, Any]:
    """``(outputs, J v, aux)`` for ``model(params) -> (outputs, aux)``, all of them without a tape."""

    def run(order: Order) -> Any:
        # Grad mode is on, without which the model would count as one under no_grad, that is as constant.
        with one_thread(), torch.enable_grad():
            return torch.func.jvp(rerouted(model, order), (params,), (v,), has_aux=True)

    try:
        try:
            result = run(FORWARD_OVER_REVERSE)
        except DeeperError:
            result = run(ANY_ORDER)
    except RuntimeError as error:
        raise explained(error, subject="model", remedy=_WAY_OUT) from error
    outputs, tangents, aux = tree.detach(result)
    return outputs, tangents, aux


def pull(model: Callable[[Params], tuple[Any, Any]], params: Params, cotangents: Callable[[Any, Any], Any]) -> Params:
    """``J^T cotangents(outputs, aux)`` for ``model(params) -> (outputs, aux)``."""

    def run(order: Order) -> Any:
        return torch.func.vjp(rerouted(model, order), params, has_aux=True)

    try:
        outputs, pullback, aux = run(REVERSE_OVER_REVERSE)
    except DeeperError:
        outputs, pullback, aux = run(REVERSE_ALONE)
    return pullback(tree.detach(cotangents(outputs.detach(), aux)), retain_graph=False, create_graph=False)[0]
