"""Tensors that have a shape and no numbers, on which a function runs in order to be recorded without memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet

from hessfunc._typing import Tensor


class ShadowError(RuntimeError):
    """Something that cannot be done without numbers: the function has to run in earnest."""


class Shadow(torch.Tensor):
    """Looks like a tensor on its device, and has one on torch's device for shapes (``meta``) in place of memory."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> Shadow:
        keys: Any = {"_extra_dispatch_keys": DispatchKeySet(DispatchKey.ZeroTensor)} if meta._is_zerotensor() else {}
        shadow: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
            **keys,
        )
        shadow.meta = meta
        return shadow

    @classmethod
    def of(cls, tensor: Tensor) -> Shadow:
        """What looks like a tensor."""
        return cls(_meta(tensor), tensor.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is not declared as a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reached by what was carried out of the function only."""
        raise ShadowError(f"{func} meets a tensor without numbers, which was made while the loss was being recorded")


class Shadows:
    """Runs operations on shadows, and on tensors as if they were shadows.

    What an operation's results look like is worked out once for each kind of arguments: many of torch's rules for that
    are in Python and take longer than the operation.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``.

        Raises:
            ShadowError: the operation changes the shape of an argument.
        """
        shadows: dict[int, Shadow] = {}
        devices = [value for value in kwargs.values() if isinstance(value, torch.device)]

        def without_memory(value: Any) -> Any:
            if isinstance(value, torch.device):
                return "meta"
            if not isinstance(value, torch.Tensor):
                return value
            devices.append(value.device)
            if not isinstance(value, Shadow):
                return _meta(value)
            shadows[id(value.meta)] = value
            return value.meta

        def with_shadow(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return shadows[id(value)] if id(value) in shadows else Shadow(value, device)

        given = mapped(without_memory, args)
        if func.namespace == "prims":
            given = _with_scalars(given)
        keywords = {name: mapped(without_memory, value) for name, value in kwargs.items()}
        result = self._result(func, given, keywords)
        if any(shadow.shape != meta.shape for shadow in shadows.values() for meta in (shadow.meta,)):
            raise ShadowError(f"{func} changes the shape of its argument")
        device = next(iter(devices), torch.device("cpu"))
        return mapped(with_shadow, result)

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        schema = func._schema
        if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
            return func(*args, **kwargs)
        key = (func, mapped(_look, args, tuple), *kwargs, mapped(_look, tuple(kwargs.values()), tuple))
        if key not in self._known:
            result = func(*args, **kwargs)
            if not all(_is_ordinary(leaf) for leaf in leaves(result)):
                return result
            self._known[key] = result
        return mapped(lambda leaf: _meta(leaf) if isinstance(leaf, torch.Tensor) else leaf, self._known[key])


def _with_scalars(values: Any) -> Any:
    # They take numbers in tensors next to larger tensors from the CPU only.
    if all(not isinstance(value, torch.Tensor) or value.dim() == 0 for value in leaves(values)):
        return values

    def with_scalar(value: Any) -> Any:
        scalar = isinstance(value, torch.Tensor) and value.dim() == 0
        return torch.zeros((), dtype=value.dtype, device="cpu") if scalar else value

    return mapped(with_scalar, values)


def mapped(function: Callable[[Any], Any], value: Any, kind: Callable[[list[Any]], Any] | None = None) -> Any:
    """``function`` of all that lists and tuples hold; an operation takes no other containers."""
    if isinstance(value, list | tuple):
        return (kind or type(value))([mapped(function, part, kind) for part in value])
    return function(value)


def leaves(value: Any) -> list[Any]:
    """All that lists and tuples hold."""
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list | tuple) else [value]


def _look(value: Any) -> Hashable:
    """Equal for tensors that look alike, and for numbers of one type that are the same."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes(), value._is_zerotensor()
    return type(value), value


def _is_ordinary(value: Any) -> bool:
    """Whether a result is told by its shape and strides."""
    if not isinstance(value, torch.Tensor):
        return True
    same_size = value.untyped_storage().nbytes() == _meta(value).untyped_storage().nbytes()
    return same_size and not value._is_zerotensor()


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
