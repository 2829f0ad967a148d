"""An ``nn.Module`` as a pure function of its trainable parameters, without changing the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.func import functional_call

from hessfunc._checks import is_distributed
from hessfunc._typing import Loss, Tensor


class Functional(NamedTuple):
    """``call(params, *args, **kwargs)`` runs the module at ``params``, a dict from name to detached tensor."""

    call: Callable[..., Any]
    params: dict[str, Tensor]


class ModuleLoss(NamedTuple):
    """``loss(params, *inputs, target) -> scalar`` and the parameters it takes, a dict from name to tensor."""

    loss: Loss
    params: dict[str, Tensor]


def functionalize(model: torch.nn.Module) -> Functional:
    """Turn a module into a pure function and its trainable parameters; the way in for a closure of one's own.

    The parameters are copies, so training the module further does not move them; tied weights appear once,
    frozen parameters (``requires_grad=False``) not at all: the call reads those from the module. Buffers are copied
    here and again in each call, so that a BatchNorm in train mode normalizes by its batch and leaves its running
    statistics alone. The module keeps its mode, its buffers and its ``.grad``; its mode at the time of the
    call counts.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or torch.func cannot run it: a script, or it is or holds a wrapper for
            parallel training or parameters split over processes.
        ValueError: no parameter requires grad.

    Example:
        >>> import torch, hessfunc as hf
        >>> call, params = hf.functionalize(torch.nn.Linear(2, 1))
        >>> sorted(params), call(params, torch.ones(3, 2)).shape
        (['bias', 'weight'], torch.Size([3, 1]))
        >>> loss = lambda params, batch: (call(params, batch["x"]) - batch["y"]).square().mean()
    """
    _check_module(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "model has no trainable parameter: every parameter has requires_grad=False. Unfreeze those to analyze."
        )
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def call(params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        state = {**params, **{name: buffer.clone() for name, buffer in buffers.items()}}
        return functional_call(model, state, args, kwargs)

    return Functional(call, params)


def module_loss(model: torch.nn.Module, criterion: Callable[..., Tensor]) -> ModuleLoss:
    """Close over a module and a criterion: ``loss(params, *inputs, target) = criterion(model(*inputs), target)``.

    The model is not changed and stays in its mode: call ``model.eval()`` first for the curvature of the network that
    predicts, leave it in train mode for that of the loss BatchNorm trains on. See [`functionalize`][] for what is
    copied. For dict batches or outputs with a ``.loss`` write the closure yourself with ``functionalize``.

    Args:
        model: the network.
        criterion: ``criterion(output, target) -> scalar``.

    Raises:
        TypeError: ``model`` is no ``nn.Module`` or ``criterion`` is not callable.
        ValueError: no parameter requires grad.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss, params = hf.module_loss(torch.nn.Linear(2, 3), torch.nn.functional.cross_entropy)
        >>> loss(params, torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """
    if not callable(criterion):
        raise TypeError(f"criterion is of type {type(criterion).__name__}, expected a callable (output, target).")
    call, params = functionalize(model)

    def loss(params: dict[str, Tensor], *batch: Any) -> Tensor:
        if len(batch) < 2:
            raise TypeError(
                f"a batch of module_loss needs inputs and a target, got {len(batch)} item(s). For other batches "
                "write the loss closure yourself: call, params = hessfunc.functionalize(model)."
            )
        *inputs, target = batch
        return criterion(call(params, *inputs), target)

    return ModuleLoss(loss, params)


def _check_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}, expected an nn.Module; a plain function needs no wrapping: "
            "pass loss(params, *batch) itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, which torch.func cannot run; pass the original nn.Module.")
    for name, part in model.named_modules():
        _check_undistributed(part, f"model.{name}" if name else "model")


def _check_undistributed(part: torch.nn.Module, name: str) -> None:
    kind = type(part).__name__
    if isinstance(part, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        way_out = "pass the bare module" if name == "model" else "put the bare module in its place"
        raise TypeError(f"{name} is wrapped in {kind}; {way_out}, {name}.module.")
    # By their names, since torch can be built without these classes.
    fully_sharded = any(base.__name__ == "FullyShardedDataParallel" for base in type(part).__mro__)
    if fully_sharded or any(is_distributed(p) for p in part.parameters(recurse=False)):
        raise TypeError(
            f"{name} is a {kind} with parameters that are split over processes (FSDP, tensor parallelism), which "
            "torch.func cannot run. Load the whole state dict, which get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict gathers, into a plain "
            "module and pass that."
        )
