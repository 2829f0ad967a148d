"""Partial evaluation of a curvature product: what depends on the vector apart from what does not."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from hessfunc._agreement import Summary
from hessfunc._channels_last import in_channels_last
from hessfunc._heap import keep_heap
from hessfunc._memory import Memory
from hessfunc._parts import body_of, moving_nodes, residual_nodes
from hessfunc._placed import least_program, program_into
from hessfunc._program import Program, program
from hessfunc._reassociate import reassociate
from hessfunc._recorder import NotRecordableError, record
from hessfunc._shadows import ShadowError
from hessfunc._simplify import simplify
from hessfunc._slopes import known_slopes
from hessfunc._softmax import one_softmax
from hessfunc._steps import needed
from hessfunc._thrift import lowered, thrifty
from hessfunc._typing import Tensor

_SMALL = 1 << 14
"""Mean number of entries of an operation's result below which memory comes from the heap as fast as it can."""

_SCRATCH = 2
"""Times the memory of the results that operations need, for their own purposes and for gaps between blocks."""


def cast_to(device: torch.device) -> torch.dtype | None:
    """What autocast, where it is on, casts operations to that run on the device now."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _cast_as_recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Programs contain the casts of the run; autocast would make others."""

    @functools.wraps(method)
    def alone(self: Linearized, *arguments: Any) -> Any:
        if cast_to(self._device) is None:
            return method(self, *arguments)
        with torch.autocast(self._device.type, enabled=False):
            return method(self, *arguments)

    return alone


@contextlib.contextmanager
def _garbage_left_for_later() -> Iterator[None]:
    """Python looks for reference cycles after so many objects are made, and what a recording makes stays.

    One look at all objects of a process took 0.3 seconds where JAX was loaded as well, and came with every fourth
    recording of a small GPT. There are few cycles meanwhile: 3,800 objects and no more memory at the peak.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Linearized:
    """``function(*primals, tangent)``, linear in its last argument, as programs traced from one run.

    The primal program ``(*primals) -> residuals`` holds the operations that the tangent has no part in; the tangent
    program ``(*primals, *residuals, tangent) -> result`` the others, and those whose results take more to hold than to
    work out again. One evaluation of the first serves any number of tangents, and both serve all primals of the shapes
    traced.

    A third program ``(*primals, tangent) -> result`` does all in one, in the order of the run, and holds the least.
    Each is written when it is called for the first time.

    With ``compile`` the tangent program goes through ``torch.compile``. Without ``rewrite`` programs do what the
    function did, operation by operation; with it they do less, by kernels that may be others and in memory that is
    used again, and tensors may lie in memory in another order, which a few of torch's operations do not take.

    With ``on_shadows`` the run takes no memory and computes nothing, so that it has no result.

    Attributes:
        random: names of the operations in it that draw random numbers.
        mean_elements: mean number of entries that an operation produces.
        eps: rounding unit of the coarsest dtype that it computes with.
        convolves: whether there are convolutions among the operations.
        constants: tensors that the function closes over.
        checked: the ways of replaying it that were compared with the function: ``True`` for all in one program.
    """

    @_garbage_left_for_later()
    def __init__(
        self,
        function: Callable[..., Tensor],
        primals: Sequence[Tensor],
        tangent: Tensor,
        *,
        compile: bool = False,
        rewrite: bool = True,
        on_shadows: bool = False,
    ) -> None:
        inputs = [*primals, tangent]
        try:
            recording, outputs = record(lambda *inputs: [function(*inputs)], inputs, on_shadows=on_shadows)
        except NotRecordableError:
            raise
        except Exception as error:
            if not on_shadows:
                raise
            raise ShadowError(str(error)) from error
        self._result = None if on_shadows else outputs[0]
        self.random = tuple(recording.random)
        self.mean_elements = sum(recording.elements) / max(len(recording.elements), 1)
        self.convolves = any("convolution" in str(node.target) for node in body_of(recording))
        dtypes = {value.dtype for value in recording.values.values() if value.dtype.is_floating_point}
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.constants = list(recording.constants.values())
        if rewrite:
            simplify(recording)
            one_softmax(recording)
            reassociate(recording)
            known_slopes(recording)
            in_channels_last(recording)
            recording.quick = not compile  # a compiler chooses by itself what to call
        self._device = tangent.device
        self._recording = recording
        self._body = body_of(recording)
        self._moving = moving_nodes(recording)
        self._computes_result = recording.outputs[0] in self._moving
        self._compile, self._rewrite = compile, rewrite
        self.checked: set[bool] = set()

    @cached_property
    def residual_bytes(self) -> int:
        """Memory that residuals take."""
        return self._memory.total(self._residuals)

    def take_result(self) -> Tensor:
        """What the traced run itself returned; it is not held any longer."""
        result, self._result = self._result, None
        assert result is not None
        return result

    @_cast_as_recorded
    def residuals(self, primals: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate all that does not depend on the tangent."""
        return self._primal(*primals)

    @_cast_as_recorded
    def apply(
        self, primals: Sequence[Tensor], residuals: Sequence[Tensor], tangent: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The result for one tangent, from the residuals at ``primals``; memory of its own, or ``out`` of its shape."""
        if out is not None:
            if self._into is None:
                return out.copy_(self._tangent(*primals, *residuals, tangent)[0])
            self._into(*primals, *residuals, tangent, out)
            return out
        return self._own(self._tangent(*primals, *residuals, tangent)[0], tangent)

    @_cast_as_recorded
    def apply_once(self, primals: Sequence[Tensor], tangent: Tensor) -> Tensor:
        """The result for one tangent without residuals, in less memory than they take; memory of its own."""
        return self._own(self._joint(*primals, tangent)[0], tangent)

    def keep_heap(self) -> None:
        """See to it that the memory of one product stays with the process until the next one."""
        self._heap  # noqa: B018  # made when it is asked for

    def _own(self, result: Tensor, tangent: Tensor) -> Tensor:
        # A constant result is a residual, and that of the identity is the tangent itself.
        shared = result.untyped_storage().data_ptr() == tangent.untyped_storage().data_ptr()
        return result.clone() if shared or not self._computes_result else result

    @cached_property
    def _heap(self) -> Any:
        if self._device.type != "cpu" or self.mean_elements < _SMALL:
            return None
        outputs = self._recording.outputs
        peak = self._memory.peak(self._tangent_inputs, needed(self._tangent_body, outputs), outputs)
        return keep_heap(_SCRATCH * peak)

    @cached_property
    def _memory(self) -> Memory:
        return Memory(self._recording)

    @cached_property
    @_garbage_left_for_later()
    def _split(self) -> tuple[list[Node], list[Node]]:
        """Residuals, and the operations of the tangent program."""
        *primals, tangent = self._recording.inputs
        moving = [node for node in self._body if node in self._moving]
        residuals = residual_nodes(self._recording, self._moving)
        if not self._rewrite:
            return residuals, moving
        residuals, body = thrifty(self._recording, self._memory, self._still, moving, residuals)
        inputs = [*primals, *residuals, tangent]
        return residuals, body if self._compile else lowered(self._recording, self._memory, inputs, body)

    @property
    def _still(self) -> list[Node]:
        return [node for node in self._body if node not in self._moving]

    @property
    def _residuals(self) -> list[Node]:
        return self._split[0]

    @property
    def _tangent_body(self) -> list[Node]:
        return self._split[1]

    @property
    def _tangent_inputs(self) -> list[Node]:
        *primals, tangent = self._recording.inputs
        return [*primals, *self._residuals, tangent]

    @cached_property
    @_garbage_left_for_later()
    def _primal(self) -> Program:
        inputs = self._recording.inputs[:-1]
        return program(self._recording, inputs, needed(self._still, self._residuals), self._residuals)

    @cached_property
    @_garbage_left_for_later()
    def _tangent(self) -> Program:
        inputs, body, outputs = self._tangent_inputs, self._tangent_body, self._recording.outputs
        if self._compile:  # a compiler places results itself
            return torch.compile(program(self._recording, inputs, needed(body, outputs), outputs), dynamic=False)
        return least_program(self._recording, inputs, body)

    @cached_property
    @_garbage_left_for_later()
    def _into(self) -> Program | None:
        return None if self._compile else program_into(self._recording, self._tangent_inputs, self._tangent_body)

    @cached_property
    @_garbage_left_for_later()
    def _joint(self) -> Program:
        # Forward mode computes each value next to its tangent, and what both need dies with the later of the two.
        inputs, body = self._recording.inputs, self._body
        body = lowered(self._recording, self._memory, inputs, body, lean=True) if self._rewrite else body
        return least_program(self._recording, inputs, body, lean=True)


def replayed(
    function: Callable[..., Tensor],
    primals: list[Tensor],
    rows: Callable[[], Tensor],
    program: Linearized,
    eager: Summary,
    residuals: Callable[[], Sequence[Tensor]] | None,
) -> Tensor | None:
    """The product with ``rows()`` as the program gives it from now on, or None if it is not that of the function.

    ``residuals`` gives those at ``primals``; None stands for all in one program.
    """
    if not bool(torch.isfinite(eager.norm)):
        return function(*primals, rows())

    def replay(rows: Tensor) -> Tensor:
        return program.apply_once(primals, rows) if known is None else program.apply(primals, known, rows)

    known = None if residuals is None else residuals()
    result = replay(rows())
    tolerance = min(100 * program.eps**0.75, 0.1)
    if not Summary.of(result).agrees(eager, tolerance):
        # A vector without curvature has a product of nothing but rounding errors: another one decides.
        vector = rows()
        other = torch.linspace(1, 2 * vector.numel(), vector.numel(), dtype=vector.dtype, device=vector.device)
        other = other.reshape(vector.shape).cos()
        if not Summary.of(replay(other)).agrees(Summary.of(function(*primals, other)), tolerance):
            return None
    program.checked.add(residuals is None)
    return result
