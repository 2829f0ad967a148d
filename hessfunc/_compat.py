"""What torch cannot differentiate twice, or gets wrong in silence, put right while the user's loss runs."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from hessfunc import _decompositions as spelled_out
from hessfunc import tree
from hessfunc._explain import CHECKPOINTED
from hessfunc._typing import Tensor

# Torch compiles its rules for forward mode when they are first needed, by a compiler that it calls deprecated: here, or
# whoever takes a first product would see the warning.
with warnings.catch_warnings(), forward_ad.dual_level():
    warnings.simplefilter("ignore")
    forward_ad.make_dual(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"))

_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.embedding: spelled_out.embedding,
    F.glu: spelled_out.glu,
    F.hardsigmoid: spelled_out.hardsigmoid,
    F.huber_loss: spelled_out.huber_loss,
    F.mse_loss: spelled_out.mse_loss,
    F.multi_head_attention_forward: spelled_out.multi_head_attention_forward,
    F.scaled_dot_product_attention: spelled_out.scaled_dot_product_attention,
    F.soft_margin_loss: spelled_out.soft_margin_loss,
    torch._weight_norm: spelled_out.weight_norm,
    # Reverse mode does not differentiate through .data, forward mode would.
    torch.Tensor.data.__get__: torch.Tensor.detach,  # type: ignore[attr-defined]
}

# The derivatives of these take saved statistics for constants: right for forward over reverse, wrong in silence for
# reverse over forward and for every third derivative.
_FUSED: dict[Any, Callable[..., Any]] = {
    F.batch_norm: spelled_out.batch_norm,
    F.instance_norm: spelled_out.instance_norm,
    F.layer_norm: spelled_out.layer_norm,
}

# By name, since one operation is a function, a method and a member of torch.linalg.
_WRONG_IN_FORWARD_MODE = frozenset({"scatter_reduce", "scatter_reduce_", "triangular_solve"})
_RIGHT_IN_FORWARD_OVER_REVERSE_ALONE = frozenset(
    {
        *("batch_norm", "instance_norm", "layer_norm", "native_batch_norm", "native_layer_norm"),
        *("det", "linalg_det", "logdet", "slogdet", "linalg_slogdet"),
        *("linalg_solve", "linalg_solve_ex", "linalg_tensorsolve", "linalg_householder_product", "orgqr"),
    }
)

# Nodes whose backward formula is one that can be differentiated again only if grad mode is on while it runs.
_NEED_GRAD_MODE = (
    *("CumprodBackward", "LinalgDetBackward", "LinalgSlogdetBackward", "LinalgSolveExBackward", "LogitBackward"),
    *("MishBackward", "NativeDropoutBackward", "NativeGroupNormBackward", "ProdBackward", "SiluBackward"),
    *("ThnnFusedGruCellBackward", "ThnnFusedLstmCellBackward"),
)


class Order(NamedTuple):
    """An order of differentiation: what to replace for it, and the names of what must be refused.

    ``deeper`` is the order to change to where the loss itself takes derivatives, so that third ones are needed; only
    the products of ``_products`` can, all else takes an order without one (``REVERSE_ALONE`` for a value or gradient).
    """

    replacements: dict[Any, Callable[..., Any]]
    wrong: frozenset[str]
    remedy: str
    deeper: Order | None


ANY_ORDER = Order(
    {**_REPLACEMENTS, **_FUSED},
    _WRONG_IN_FORWARD_MODE | _RIGHT_IN_FORWARD_OVER_REVERSE_ALONE,
    "use hessfunc.hvp without differentiating it further, or an equivalent (linalg.inv, linalg.lu and the "
    "normalizations of torch.nn.functional are right).",
    deeper=None,
)
FORWARD_OVER_REVERSE = Order(
    _REPLACEMENTS, _WRONG_IN_FORWARD_MODE, "use hessfunc.hvp_double_backward.", deeper=ANY_ORDER
)
REVERSE_ALONE = Order({**_REPLACEMENTS, **_FUSED}, frozenset(), "", deeper=None)
REVERSE_OVER_REVERSE = Order(_REPLACEMENTS, frozenset(), "", deeper=REVERSE_ALONE)


class DeeperError(Exception):
    """The loss takes derivatives on torch's own tape: start again, with the order's ``deeper``."""


class _Rerouting(TorchFunctionMode):
    """Reroutes calls to equivalents, and gives ``torch.no_grad`` its reverse-mode meaning.

    Forward mode differentiates through ``torch.no_grad()`` where reverse mode does not, which would make the product
    wrong in silence.
    """

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order
        self.levels = 0 if order.deeper is None else _num_derivatives()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling() and _checkpointed():
            raise NotImplementedError(CHECKPOINTED)
        order = self.order
        if order.deeper is not None:
            if func is torch.autograd.grad:
                raise DeeperError
            if func in _FUSED or _name(func) in _RIGHT_IN_FORWARD_OVER_REVERSE_ALONE:
                order = order.deeper if _num_derivatives() > self.levels else order
        replacement = order.replacements.get(func)
        if replacement is None and _is_wrong(order, func, args, kwargs):
            raise NotImplementedError(
                f"the loss calls {_name(func)}, which torch differentiates wrongly or not at all in this order; "
                + order.remedy
            )
        result = (replacement or func)(*args, **kwargs)
        if torch.is_grad_enabled():
            return result
        return tree.map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, result)


def _checkpointed() -> bool:
    """Whether gradient checkpointing runs this operation.

    Under torch.func it fails by itself. In double backward it would run the operation again after a functional module
    has its own parameters back (the variant with hooks on saved tensors), or take parameters for constants (the
    reentrant one, which shows in the call stack alone).
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        return "checkpoint" in getattr(hooks[0], "__qualname__", "")
    if torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _is_wrong(order: Order, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if _name(func) not in order.wrong:
        return False
    return not _name(func).startswith("scatter_reduce") or "prod" in (*args[4:5], kwargs.get("reduce"))


def _num_derivatives() -> int:
    """How many grad, vjp or jvp transforms are at work around the present call."""
    kinds = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return sum(level.key() in kinds for level in _functorch.get_interpreter_stack() or [])


_ONE_THREAD = threading.RLock()


def one_thread() -> Any:
    """A context for what torch does not keep apart by thread.

    It counts its levels of forward mode for the whole process: two threads in it raise errors or crash. And
    ``functional_call`` swaps the parameters of the module itself: two threads that run one module see each other's.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _ONE_THREAD


def rerouted(function: Callable[..., Any], order: Order) -> Callable[..., Any]:
    """``function`` with the operations that an order of differentiation cannot take replaced by equivalents."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with one_thread(), _Rerouting(order):
            return function(*args)

    return wrapped


def forward_mode_safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` made ready for forward over reverse, the order of [`hvp`][hessfunc.hvp]."""
    return rerouted(function, FORWARD_OVER_REVERSE)


def evaluated(function: Callable[..., Any], params: Any, *batch: Any) -> Any:
    """``function(params, *batch)`` alone, as the products differentiate it; tensors come without a tape."""
    try:
        with torch.no_grad():
            return rerouted(function, REVERSE_OVER_REVERSE)(params, *batch)
    except DeeperError:  # it takes derivatives itself, maybe on torch's own tape, which then has to run
        tracked = tree.map_leaves(lambda leaf: leaf.detach().requires_grad_(), params)
        with torch.enable_grad():
            result = rerouted(function, REVERSE_ALONE)(tracked, *batch)
    return tree.map_leaves(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, result)


def _in_forward_mode() -> bool:
    if forward_ad._current_level < 0:
        return False
    # Unless it is another thread that is in it.
    mine = _ONE_THREAD.acquire(blocking=False)
    if mine:
        _ONE_THREAD.release()
    return mine


def differentiated_outside(inputs: Sequence[Tensor]) -> bool:
    """Whether a transform outside, or torch's own tape by way of ``inputs``, differentiates what is computed next."""
    if torch.compiler.is_compiling() or _in_forward_mode():
        return True
    if not torch.is_grad_enabled():
        return False
    return _num_derivatives() > 0 or any(map(is_tracked, inputs))


def is_plain(tensor: Tensor) -> bool:
    """Whether no transform, no tape and no compiler looks at what is computed from this tensor."""
    if torch.compiler.is_compiling() or _in_forward_mode():
        return False
    return _functorch.peek_interpreter_stack() is None and not (tensor.requires_grad and torch.is_grad_enabled())


def is_tracked(tensor: Tensor) -> bool:
    """Whether reverse mode, at any level outside, records what is computed from this tensor."""
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def differentiable_backward(value: Tensor) -> None:
    """See to it that the backward pass from ``value`` can itself be differentiated in forward mode.

    Some of torch's backward formulas look at grad mode: off (``create_graph=False``), they take a kernel without
    forward-mode rule (SiLU, group norm) or one that takes saved results for constants and so is wrong in silence
    (determinants, linear solves). Switching it on for these nodes alone keeps the rest of the pass free of a graph.
    """
    for node in tape(value):
        if node.name().startswith(_NEED_GRAD_MODE):
            _enable_grad_mode(node)


def tape(value: Tensor) -> Iterator[Any]:
    """The nodes of torch's graph that ``value`` was computed by, each once."""
    seen = set()
    pending: list[Any] = [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
        yield node


def _enable_grad_mode(node: Any) -> None:
    previous = []

    def enable(_gradients: Any) -> None:
        previous.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(True)

    def restore(_inputs: Any, _outputs: Any) -> None:
        torch._C._set_grad_enabled(previous.pop())

    node.register_prehook(enable)
    node.register_hook(restore)
