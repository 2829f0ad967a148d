"""What a loss does while it runs: which modules draw random numbers or couple samples, and in what precision."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hessfunc import tree
from hessfunc._compat import REVERSE_ALONE, rerouted, tape
from hessfunc._typing import Loss, Params


class Witness(TorchDispatchMode):
    """Watches every operation of a loss.

    Attributes:
        random: places that drew random numbers, by the name of a module where there is one.
        coupled: modules that normalize by the batch, so that a sample's loss depends on the others in it.
        eps: the coarsest rounding among floating-point results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []
        self.coupled: list[str] = []
        self.eps = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            _note(self.random, str(func))
        for leaf in tree.leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.eps = max(self.eps, torch.finfo(leaf.dtype).eps)
        return result

    def watching(self, loss: Loss) -> Loss:
        """``loss``, watched."""

        def watched(params: Params, *batch: Any) -> Any:
            with self, _BatchNorms(self.coupled):
                return loss(params, *batch)

        return watched

    def suspects(self) -> str:
        """A sentence on where the randomness comes from, and what to do about it."""
        if self.random:
            return (
                f"It draws random numbers in {', '.join(self.random[:4])}. Call model.eval() if that is dropout, or "
                "fix the randomness inside the loss."
            )
        return (
            "No operation of torch draws random numbers in it, so it uses another source (random, numpy) or a state of "
            "its own that changes with each call; make it a function of its arguments."
        )


class _BatchNorms(TorchFunctionMode):
    """Notes normalizations by the batch before they are spelled out."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (kwargs.get("training") or True in args[5:6]):
            _note(self.places, "F.batch_norm")
        return func(*args, **kwargs)


def custom_functions(loss: Loss, params: Params, batch: tuple[Any, ...]) -> list[str]:
    """Names of the ``autograd.Function`` classes that the loss calls."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = tree.map_leaves(lambda p: p.detach().clone().requires_grad_(), params)
        value = rerouted(loss, REVERSE_ALONE)(inputs, *batch)
    custom = [node for node in tape(value) if isinstance(node, torch.autograd.function.BackwardCFunction)]
    return sorted({node._forward_cls.__name__ for node in custom})  # type: ignore[attr-defined]


def _note(places: list[str], operation: str) -> None:
    place = _module() or operation
    if place not in places:
        places.append(place)


def _module() -> str:
    """The innermost module that is running now, named as the outermost one names it."""
    running: list[torch.nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            running.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    if not running:
        return ""
    name = next((name for name, module in running[-1].named_modules() if module is running[0]), "")
    kind = type(running[0]).__name__
    return f"{kind} {name!r}" if name else f"the module {kind}"
