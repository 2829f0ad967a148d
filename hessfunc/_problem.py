"""A user's own problem from ``FILE.py:FUNCTION``: what ``hessfunc analyze`` runs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hessfunc import tree
from hessfunc._module import module_loss
from hessfunc._typing import Loss, Params

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ProblemError(Exception):
    """The user's file or function is not what the command needs; the message says what is."""


class Problem(NamedTuple):
    """What [`analyze`][hessfunc.analyze] takes, and remarks for the user."""

    loss: Loss
    params: Params
    data: Any
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def user_problem(
    target: str, *, dtype: torch.dtype | None = None, device: str | None = None, seed: int = 0
) -> Iterator[Problem]:
    """The problem that ``FILE.py:FUNCTION`` returns; within the block the file's folder can be imported from.

    Runs no code but that of the named file and what it imports. torch's global generator is set to ``seed`` while the
    function runs, so that a freshly initialized model is the same each time, and put back afterwards.

    Args:
        target: path of a Python file, a colon, the name of a function without required arguments that returns
            ``(model, criterion, data)`` or ``(loss, params, data)``.
        dtype: convert parameters, buffers and floating-point data; by default as returned.
        device: move parameters and buffers; by default as returned.
        seed: of torch's global generator.

    Raises:
        ProblemError: the target is not such a function, or it fails.
    """
    path, name = _split(target)
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            returned = _call(_function(path, name), path, name)
        yield _problem(returned, f"{name} in {str(path)!r}", dtype, device)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _split(target: str) -> tuple[Path, str]:
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ProblemError(f"{target!r} is not of the form FILE.py:FUNCTION, for example problem.py:problem.")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ProblemError(f"there is no file {file!r}; the working directory is {str(Path.cwd())!r}.")
    if path.suffix != ".py":
        raise ProblemError(f"{file!r} is not a Python file: its name has to end in .py.")
    return path, name


def _function(path: Path, name: str) -> Any:
    module_name = f"_hessfunc_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ProblemError(f"{str(path)!r} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickled data sets look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ProblemError(f"importing {str(path)!r} failed:\n{_their_traceback(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module_name]
        listing = f"it defines {', '.join(defined)}" if defined else "it defines no function"
        raise ProblemError(f"{str(path)!r} has no function {name!r}; {listing}.")
    return function


def _call(function: Any, path: Path, name: str) -> Any:
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise ProblemError(
            f"{name} in {str(path)!r} has required arguments ({', '.join(required)}); it is called as {name}()."
        )
    try:
        return function()
    except Exception as error:
        raise ProblemError(f"{name}() in {str(path)!r} failed:\n{_their_traceback(error, path)}") from error


def _problem(returned: Any, where: str, dtype: torch.dtype | None, device: str | None) -> Problem:
    if not isinstance(returned, tuple) or len(returned) != 3:
        given = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise ProblemError(f"{where} returned {given}, expected (model, criterion, data) or (loss, params, data).")
    first, second, data = returned
    if dtype is not None:
        data = _Cast.of(data, dtype)
    if isinstance(first, torch.nn.Module):
        if not callable(second):
            raise ProblemError(
                f"{where} returned a model and a {type(second).__name__}; after a model it has to return a criterion, "
                "a callable (output, target) -> scalar."
            )
        model, criterion = (_converted(part, dtype, device) for part in (first, second))
        loss, params = module_loss(model, criterion)
        return Problem(loss, params, data, _mode_notes(model))
    if not callable(first):
        raise ProblemError(
            f"{where} returned a {type(first).__name__} first, expected an nn.Module or a loss function of "
            "(params, *batch)."
        )
    return Problem(first, tree.map_leaves(lambda leaf: _moved(leaf, dtype, device), second), data)


def _moved(leaf: Any, dtype: torch.dtype | None, device: str | None) -> Any:
    return leaf.detach().to(device=device, dtype=dtype) if isinstance(leaf, torch.Tensor) else leaf


def _converted(part: Any, dtype: torch.dtype | None, device: str | None) -> Any:
    """A module converted as a copy, all else as it is."""
    if not isinstance(part, torch.nn.Module) or (dtype is None and device is None):
        return part
    return copy.deepcopy(part).to(device=device, dtype=dtype)


def _mode_notes(model: torch.nn.Module) -> tuple[str, ...]:
    active = [(name, module) for name, module in model.named_modules() if module.training]
    random = [name for name, m in active if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0]
    batch = [name for name, m in active if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    notes = []
    if random:
        notes.append(f"dropout is active ({random[0]}): every product differs; call model.eval() in your function.")
    if batch:
        notes.append(f"BatchNorm is in train mode ({batch[0]}): the Hessian is that of the loss with batch statistics.")
    return tuple(notes)


class _Cast:
    """Data whose floating-point tensors are converted as they are read."""

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self._data, self._dtype = data, dtype

    @classmethod
    def of(cls, data: Any, dtype: torch.dtype) -> Any:
        if isinstance(data, tuple | Mapping):
            return cls._batch(data, dtype)
        if isinstance(data, list):  # converted once; what is converted anew each time cannot be kept between passes
            return [cls._batch(batch, dtype) for batch in data]
        sized = hasattr(data, "__len__")
        iterable = hasattr(data, "__iter__") and not hasattr(data, "__next__") and not isinstance(data, torch.Tensor)
        # What is not data at all is passed on, to be refused with its own name.
        return (_SizedCast if sized else cls)(data, dtype) if iterable else data

    @staticmethod
    def _batch(batch: Any, dtype: torch.dtype) -> Any:
        return tree.map_leaves(
            lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, batch
        )

    def __iter__(self) -> Iterator[Any]:
        return (self._batch(batch, self._dtype) for batch in self._data)


class _SizedCast(_Cast):
    def __len__(self) -> int:
        return len(self._data)


def location(error: BaseException, file: str) -> str:
    """`` (FILE, line N)`` for the innermost frame of ``error`` in ``file``, or nothing if there is none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""


def _their_traceback(error: BaseException, path: Path) -> str:
    """The traceback from the user's file on, without the frames of the machinery before it."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if frame.filename == str(path)), len(frames))
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
