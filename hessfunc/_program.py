"""Part of a recording as a Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from hessfunc._bindings import quick_binding
from hessfunc._in_place import in_place
from hessfunc._onednn import instead
from hessfunc._recorder import Recording, select_result
from hessfunc._steps import dying
from hessfunc._typing import Tensor

Program = Callable[..., list[Tensor]]


def program(
    recording: Recording,
    inputs: Sequence[Node],
    steps: Sequence[Node],
    outputs: Sequence[Node],
    *,
    lean: bool = False,
) -> Program:
    """``(*inputs) -> outputs`` by way of these operations; results go at their last use.

    An operation may be repeated; what it gave before is not held until then. With ``lean`` little memory counts for
    more than time.

    Written here and not by ``torch.fx``, whose copy of a graph and source of it take about as long as recording it did.
    """
    return _Writer(recording, inputs, lean).function(steps, outputs)


class _Writer:
    def __init__(self, recording: Recording, inputs: Sequence[Node], lean: bool) -> None:
        self._lean = lean
        self._recording = recording
        self._names = {node: f"x{i}" for i, node in enumerate(inputs)}
        self._parameters = list(self._names.values())
        self._globals: dict[str, Any] = {}
        self._known: dict[int, str] = {}
        for node in recording.graph.nodes:
            if node.op == "get_attr":
                self._names[node] = self._shared(recording.constants[node.target])

    def function(self, steps: Sequence[Node], outputs: Sequence[Node]) -> Program:
        lines = [f"def program({', '.join(self._parameters)}):"]
        ends = dying(steps, outputs)
        targets = self._targets(steps, ends)
        for i, node in enumerate(steps):
            lines.append(f"    {self._named(node)} = {self._call(node, targets[i])}")
            names = [self._names[dead] for dead in ends[i] if self._names[dead].startswith("v")]
            if names:
                lines.append(f"    del {', '.join(names)}")
        lines.append(f"    return [{', '.join(self._names[node] for node in outputs)}]")
        exec(compile("\n".join(lines), "<hessfunc program>", "exec"), self._globals)
        return self._globals["program"]

    def _named(self, node: Node) -> str:
        return self._names.setdefault(node, f"v{len(self._names)}")

    def _targets(self, steps: Sequence[Node], ends: Sequence[Sequence[Node]]) -> list[Any]:
        """What to call in each step."""
        recording = self._recording
        if not recording.quick:
            return [node.target for node in steps]
        over = in_place(recording, list(self._names), steps, ends)
        chosen = [over[i] or instead(node, recording.values, lean=self._lean) for i, node in enumerate(steps)]
        return [quick_binding(target) for target in chosen]

    def _call(self, node: Node, target: Any) -> str:
        if node.target is select_result:
            results, position = node.args
            return f"{self._text(results)}[{position}]"
        arguments = [self._text(argument) for argument in node.args]
        arguments += [f"{name}={self._text(argument)}" for name, argument in node.kwargs.items()]
        return f"{self._shared(target)}({', '.join(arguments)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self._shared(value)

    def _shared(self, value: Any) -> str:
        name = self._known.setdefault(id(value), f"g{len(self._known)}")
        self._globals[name] = value  # which also keeps the object, and so its id
        return name
