"""Argument checks: every error names the argument, what was given and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hessfunc import tree
from hessfunc._typing import Params, Tensor


class ProductWarning(UserWarning):
    """A product takes a slower way than usual; its values are the same."""


class ConvergenceWarning(UserWarning):
    """An iterative method ended short of its tolerance; the result says by how much."""


class NonFiniteError(FloatingPointError):
    """A loss, a product or a sample is NaN or infinite.

    Attributes:
        partial: what the estimator had computed before: an ``Estimate`` over the probes done from ``hutchinson``, the
            best ``Eigenpairs`` so far from ``eigsh`` (residuals by the recurrence, not computed anew), also where a
            product of its last check is the one that fails, a ``Quadrature``
            over the probes done from ``slq``; ``None`` if there was nothing yet, and from all else.

    Example:
        >>> import torch, hessfunc as hf
        >>> bad = hf.as_operator(torch.diag(torch.tensor([1.0, torch.nan])))
        >>> try:
        ...     hf.hutchinson(bad, num_probes=4, generator=torch.Generator().manual_seed(0))
        ... except hf.NonFiniteError as error:
        ...     print(error.partial)
        None
    """

    partial: Any = None

    def keeping(self, partial: Any) -> NonFiniteError:
        """The same error with what was computed before it."""
        self.partial = partial
        if partial is not None:
            self.args = (f"{self} What was computed before is in this error's .partial, {_short(partial)}.",)
        return self


def check_params(params: Params, *, name: str = "params") -> None:
    """Raise unless ``params`` is a pytree of at least one floating-point tensor, all on one device."""
    named = tree.named_leaves(params)
    if not named:
        raise ValueError(f"{name} holds no tensors; pass a tensor or a dict, list or tuple of tensors.")
    for path, leaf in named:
        where = f"{name}[{path!r}]" if path else name
        if not isinstance(leaf, torch.Tensor):
            hint = " torch's pytrees count None as a leaf: leave the entry out." if leaf is None else ""
            raise TypeError(f"{where} is of type {type(leaf).__name__}, not a tensor; every leaf must be one.{hint}")
        if is_distributed(leaf):
            raise TypeError(
                f"{where} is a DTensor, of which each process may hold a part; torch.func has no rules for it. Pass "
                "the whole tensor, leaf.full_tensor()."
            )
        if not leaf.dtype.is_floating_point:
            raise TypeError(
                f"{where} has dtype {leaf.dtype}; curvature needs real floating-point leaves. Close over integer, "
                "boolean and complex tensors in the loss instead (hessfunc.restrict selects leaves)."
            )
    devices = sorted({str(leaf.device) for _, leaf in named})
    if len(devices) > 1:
        raise ValueError(f"{name} has leaves on several devices ({', '.join(devices)}); move them to one.")
    if tree.size(params) == 0:
        raise ValueError(f"{name} has leaves but no entries: every leaf is empty.")


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, whose class is not there in every build of torch."""
    return hasattr(tensor, "full_tensor")


def check_like(vector: Params, like: Params, *, name: str, reference: str, rows: bool = False) -> int:
    """Raise unless ``vector`` has the structure, shapes and dtypes of ``like``; return the number of rows.

    With ``rows`` each leaf of ``vector`` carries one further leading axis, of one length for all.
    """
    given, spec = tree.flatten(vector)
    wanted, wanted_spec = tree.flatten(like)
    if spec != wanted_spec:
        raise ValueError(
            f"{name} has a different pytree structure from {reference}: got {_outline(vector)}, "
            f"expected {_outline(like)}. Build it with hessfunc.tree.map_leaves over {reference}."
        )
    lengths = set()
    for path, leaf, reference_leaf in zip(tree.names(like), given, wanted, strict=True):
        where = f"{name}[{path!r}]" if path else name
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"{where} is of type {type(leaf).__name__}, expected a tensor like {reference}.")
        shape = leaf.shape[1:] if rows and leaf.dim() else leaf.shape
        if shape != reference_leaf.shape or (rows and not leaf.dim()):
            expected = ("K", *reference_leaf.shape) if rows else tuple(reference_leaf.shape)
            raise ValueError(f"{where} has shape {tuple(leaf.shape)}, expected {expected} as in {reference}.")
        if leaf.dtype != reference_leaf.dtype:
            raise TypeError(
                f"{where} has dtype {leaf.dtype}, but {reference} has {reference_leaf.dtype} there; "
                f"convert it with .to({reference_leaf.dtype})."
            )
        if leaf.device != reference_leaf.device:
            raise ValueError(f"{where} is on {leaf.device}, but {reference} is on {reference_leaf.device}; move it.")
        lengths.add(leaf.shape[0] if rows else 1)
    if len(lengths) > 1:
        raise ValueError(f"{name} has leading axes of different lengths {sorted(lengths)}; all leaves need one K.")
    return lengths.pop()


def check_loss_value(value: Any) -> None:
    """Raise unless ``value`` is what a loss must return: one real floating-point scalar tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"loss returned {type(value).__name__}, expected a scalar tensor; for a model output with a .loss "
            "field return that field."
        )
    if value.shape != ():
        raise ValueError(
            f"loss returned a tensor of shape {tuple(value.shape)}, expected a scalar of shape (); "
            "reduce it with .mean() or .sum()."
        )
    if not value.dtype.is_floating_point:
        raise TypeError(f"loss returned dtype {value.dtype}, expected a real floating-point scalar.")


def check_count(value: Any, *, name: str, minimum: int = 1, maximum: int | None = None, why: str = "") -> None:
    """Raise unless ``value`` is an int within ``minimum <= value <= maximum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected an int.")
    if value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" <= {maximum}"
        raise ValueError(f"{name}={value} is out of range; expected {minimum} <= {name}{upper}{why}.")


def check_positive(value: Any, *, name: str) -> None:
    """Raise unless ``value`` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected a positive number.")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} is out of range; expected a finite number above 0.")


def check_choice(value: Any, choices: tuple[str, ...], *, name: str) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; expected one of {', '.join(map(repr, choices))}.")


def check_generator(generator: Any) -> None:
    """Raise unless ``generator`` is a ``torch.Generator``."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is of type {type(generator).__name__}, expected a torch.Generator, for example "
            "torch.Generator().manual_seed(0); results depend on nothing else that is random."
        )


def check_data(data: Any) -> None:
    """Raise unless ``data`` is a tuple or mapping (one batch) or can be iterated over again and again."""
    if isinstance(data, tuple | Mapping):
        return
    if isinstance(data, torch.Tensor):
        raise TypeError(
            "data is a tensor; pass a tuple for one batch, data=(inputs,) or data=(inputs, targets), "
            "or a list of such tuples for several."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"data is a {type(data).__name__}, which is exhausted after one pass; every product needs a pass of its "
            "own. Pass list(data), a DataLoader, or another object that can be iterated over again."
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data is of type {type(data).__name__}; expected a tuple (one batch), or a list, DataLoader or other "
            "re-iterable of batches."
        )


def check_finite(value: Tensor, *, what: str, remedy: str) -> None:
    """Raise [`NonFiniteError`][hessfunc.NonFiniteError] if any entry of ``value`` is NaN or infinite."""
    # A finite sum rules both out in one pass; it can only overflow on top of that.
    if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{what} is NaN or infinite; {remedy}")


def _outline(value: Params) -> str:
    names = tree.names(value)
    shown = ", ".join(repr(name) for name in names[:6])
    more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
    return f"{type(value).__name__} with leaves [{shown}{more}]"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{'an' if type(value).__name__[0] in 'AEIOU' else 'a'} {type(value).__name__}"
