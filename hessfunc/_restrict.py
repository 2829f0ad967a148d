"""The loss as a function of some of its parameters: the Hessian of a layer, a stage, or any set of leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from hessfunc import tree
from hessfunc._checks import check_params
from hessfunc._typing import Loss, Params, Tensor

Select: TypeAlias = str | Iterable[str] | Callable[[str], bool]


class Restriction(NamedTuple):
    """``loss(selected, *batch)`` with all other leaves held fixed, and the selected leaves by dotted name."""

    loss: Loss
    params: dict[str, Tensor]


def restrict(loss: Loss, params: Params, select: Select) -> Restriction:
    """Hold all but the selected leaves fixed; the Hessian of the result is a diagonal block of the whole one.

    A ``model_fn(params, *inputs)`` can be restricted in the same way, for blocks of [`ggn`][hessfunc.ggn] and others.

    Args:
        loss: ``loss(params, *batch)``.
        params: pytree of floating-point tensors.
        select: which leaves, by dotted name (``"layer1.0.weight"``, or ``"0.weight"`` in a list of dicts): a
            name or the name of something that contains leaves (``"layer1"`` selects ``layer1.0.weight``, not
            ``layer10``), a shell pattern (``"*.weight"``), several of these, or a predicate on the name.

    Returns:
        A pair ``(loss, params)``: ``params`` is a flat dict from name to leaf.

    Raises:
        ValueError: nothing is selected, one of several names or patterns selects nothing, or two leaves share a name.
        TypeError: a leaf is not a floating-point tensor, or ``select`` is none of the above.

    Example:
        >>> import torch, hessfunc as hf
        >>> params = {"first": {"w": torch.ones(2)}, "second": {"w": torch.ones(3)}}
        >>> total = lambda p: (p["first"]["w"] ** 2).sum() + (p["second"]["w"] ** 4).sum()
        >>> loss, selected = hf.restrict(total, params, "second")
        >>> hf.hvp(loss, selected, {"second.w": torch.ones(3)})
        {'second.w': tensor([12., 12., 12.])}
    """
    check_params(params)
    fixed, spec = tree.flatten(params)
    names = tree.names(params)
    chosen = _predicate(select, names)
    positions = {name: i for i, name in enumerate(names) if chosen(name)}
    if not positions:
        raise ValueError(f"select={select!r} matches no leaf; the leaves are {_listing(names)}.")
    for name in positions:
        if names.count(name) > 1:
            raise ValueError(f"params has {names.count(name)} leaves named {name!r}; rename one to tell them apart.")

    def restricted(selected: dict[str, Tensor], *batch: Any) -> Tensor:
        whole = list(fixed)
        for name, position in positions.items():
            whole[position] = selected[name]
        return loss(tree.unflatten(whole, spec), *batch)

    return Restriction(restricted, {name: fixed[position] for name, position in positions.items()})


def _predicate(select: Select, names: list[str]) -> Callable[[str], bool]:
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) else list(select) if isinstance(select, Iterable) else [select]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"select holds {pattern!r} of type {type(pattern).__name__}; expected names or patterns of leaves, "
                "or one predicate on a name."
            )
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"select: {pattern!r} matches no leaf; the leaves are {_listing(names)}.")
    return lambda name: any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _listing(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return shown + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
