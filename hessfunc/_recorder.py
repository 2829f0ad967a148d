"""Record the tensor operations of a function as a graph, at the level below autograd and torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from hessfunc._shadows import Shadow, Shadows, leaves, mapped
from hessfunc._typing import Tensor

_UNSAFE = {
    *("aten::_unsafe_view", "aten::unsafe_chunk", "aten::unsafe_split", "aten::unsafe_split_with_sizes"),
    "aten::lift",
}
"""Views whose schema keeps silent on it."""

_METADATA = {"aten::is_same_size", "aten::_has_same_storage_numel", "aten::_has_compatible_shallow_copy_type"}
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotRecordableError(Exception):
    """The function does something that a graph cannot repeat for other inputs."""


class Value(NamedTuple):
    """What a tensor looks like."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Recording:
    """A straight-line program.

    Attributes:
        graph: nodes in the order of execution; placeholders are the inputs, ``get_attr`` nodes the constants.
        inputs: one placeholder per input tensor.
        outputs: one node per output tensor.
        constants: tensors the function closes over, by attribute name.
        storage: an id for each node, shared by nodes that are views of the same memory.
        values: what each node's tensor looks like.
        mutations: nodes that write into the memory with the id given.
        random: names of operations that draw random numbers.
        elements: number of entries in each operation's results, for an idea of their size.
        quick: whether programs may call other operations than the recorded ones, to the same effect.
    """

    graph: Graph = field(default_factory=Graph)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    storage: dict[Node, int] = field(default_factory=dict)
    values: dict[Node, Value] = field(default_factory=dict)
    mutations: list[tuple[Node, int]] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    quick: bool = False


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *, on_shadows: bool = False
) -> tuple[Recording, list[Tensor]]:
    """Run ``function(*inputs)`` once and write down what it did; returns the recording and the results.

    With ``on_shadows`` nothing is computed: the function runs on tensors that have a shape and no memory, and so do the
    results. What then goes wrong may be due to that.

    Raises:
        NotRecordableError: the function reads a value out of a tensor that depends on the inputs (``.item()``, ``if
            tensor``), makes shapes that depend on values, or uses an argument that a graph cannot hold.
    """
    recorder = _Recorder(on_shadows)
    inputs = [Shadow.of(tensor) for tensor in inputs] if on_shadows else inputs
    for i, tensor in enumerate(inputs):
        recorder.add_input(tensor, f"input_{i}")
    with recorder:
        outputs = list(function(*inputs))
    recording = recorder.recording
    recording.outputs = [recorder.node_of(tensor) for tensor in outputs]
    return recording, outputs


class _Recorder(TorchDispatchMode):
    def __init__(self, on_shadows: bool) -> None:
        super().__init__()
        self._shadows = Shadows() if on_shadows else None
        self.recording = Recording()
        self._nodes = WeakTensorKeyDictionary()

    def add_input(self, tensor: Tensor, name: str) -> None:
        node = self.recording.graph.placeholder(name)
        self.recording.inputs.append(node)
        self._remember(tensor, node, storage=None)

    def node_of(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        if node is None:  # made outside of the function: a constant of the program
            name = f"constant_{len(self.recording.constants)}"
            self.recording.constants[name] = tensor
            node = self.recording.graph.create_node("get_attr", name)
            self._remember(tensor, node, storage=None)
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _Kind.of(func)
        if kind.decides or (kind.dynamic and not _picks_by_number(func, args)):
            raise NotRecordableError(f"the values of a tensor decide on shapes or on the way taken ({func})")
        result = self._shadows.run(func, args, kwargs) if self._shadows else func(*args, **kwargs)
        if kind.metadata:
            return result
        results = [result] if isinstance(result, torch.Tensor) else [x for x in leaves(result) if x is not None]
        if not all(isinstance(leaf, torch.Tensor) for leaf in results):
            raise NotRecordableError(f"{func} reads a Python value out of a tensor")
        if kind.random:
            self.recording.random.append(str(func))
        keywords = {name: mapped(self._argument, value) for name, value in kwargs.items()}
        node = self._call(func, tuple([mapped(self._argument, x) for x in args]), keywords)
        storage = self._aliased(kind, args, kwargs) if kind.views else None
        if kind.writes:
            self._note_mutations(kind, args, kwargs, node)
        self.recording.elements.append(sum([leaf.numel() for leaf in results]))
        self._remember_results(result, node, storage)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        # A name that torch makes up takes longer to find than all else takes to record.
        name = f"step_{len(self.recording.graph.nodes)}"
        return self.recording.graph.create_node("call_function", func, args, kwargs, name)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, _PLAIN):
            return value
        raise NotRecordableError(f"an argument of type {type(value).__name__} has no place in a graph")

    def _remember(self, tensor: Tensor, node: Node, storage: int | None) -> None:
        self._nodes[tensor] = node
        self.recording.values[node] = Value(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self.recording.storage[node] = len(self.recording.storage) if storage is None else storage

    def _remember_results(self, result: Any, node: Node, storage: int | None) -> None:
        if isinstance(result, torch.Tensor):
            self._remember(result, node, storage)
        elif isinstance(result, tuple | list):
            self.recording.storage[node] = len(self.recording.storage) if storage is None else storage
            for i, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    item = self._call(select_result, (node, i), {})
                    self._remember(part, item, storage)
        else:
            self.recording.storage[node] = len(self.recording.storage)

    def _aliased(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Storage of the argument that the results are views of."""
        for value in kind.shared(args, kwargs, kind.aliased):
            if isinstance(value, torch.Tensor):
                return self.recording.storage[self.node_of(value)]
        return None

    def _note_mutations(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> None:
        for value in kind.shared(args, kwargs, kind.written):
            for tensor in leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self.recording.mutations.append((node, self.recording.storage[self.node_of(tensor)]))


class _Kind(NamedTuple):
    """What an operation is like, which takes longer to ask than to look up.

    Attributes:
        dynamic: whether the shapes of results depend on values.
        decides: whether it gives a Python value.
        random: whether it draws random numbers.
        metadata: whether it is about shapes and layouts, which a recording fixes anyway.
        views: whether results are views of an argument.
        writes: whether it writes to memory of an argument.
        names: of the arguments, in order.
        aliased: the names of those that results may be views of.
        written: the names of those that are written to.
    """

    dynamic: bool
    decides: bool
    random: bool
    metadata: bool
    views: bool
    writes: bool
    names: tuple[str, ...]
    aliased: tuple[str, ...]
    written: tuple[str, ...]

    @classmethod
    @cache
    def of(cls, func: Any) -> _Kind:
        schema, tags = func._schema, func.tags
        unsafe = schema.name in _UNSAFE
        shared = schema.arguments[:1] if unsafe else [a for a in schema.arguments if a.alias_info is not None]
        return cls(
            dynamic=torch.Tag.dynamic_output_shape in tags,
            decides=torch.Tag.data_dependent_output in tags,
            random=torch.Tag.nondeterministic_seeded in tags,
            metadata=schema.name in _METADATA,
            views=unsafe or any(result.alias_info is not None for result in schema.returns),
            writes=schema.is_mutable,
            names=tuple(spec.name for spec in schema.arguments),
            aliased=tuple(spec.name for spec in shared),
            written=tuple(spec.name for spec in shared if spec.alias_info and spec.alias_info.is_write),
        )

    def shared(self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: tuple[str, ...]) -> list[Any]:
        """Values of these arguments, where they are given."""
        return [value for name, value in (*zip(self.names, args, strict=False), *kwargs.items()) if name in wanted]


def _picks_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is ``x[i]`` with integers in ``i``: only a mask makes a shape that depends on values."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])


def select_result(results: Sequence[Tensor], position: int) -> Tensor:
    """One of an operation's several results."""
    return results[position]


def gives_several(node: Node) -> bool:
    """Whether the result is a tuple, of which parts are taken."""
    return any(user.target is select_result for user in node.users)
