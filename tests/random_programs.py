"""Programs of random operations on matrices, for what rewrites programs to be tried on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

A, B, TANGENT = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))

UNARY = {
    "sin": torch.sin,
    "turned": torch.t,
    "another shape": lambda x: x.reshape(2, 8).reshape(4, 4),
    "one row for all": lambda x: x[:1].expand(4, 4),
    "upper and lower part": lambda x: torch.cat([x[2:], x[:2]]),
    "a number": lambda x: x * -0.5,
    "divided": lambda x: x / 3.0,
    "multiplied": lambda x: x @ B,
    "split": lambda x: torch.cat(x.split(1)[::-1]),
    "written to": lambda x: x.clone().mul_(B),
    "added to": lambda x: x.clone().add_(A),
    "positive part": torch.relu,
    "masked": lambda x: torch.ops.aten.threshold_backward(x, B, 0),
    "normalized": lambda x: F.layer_norm(x, (4,)),
    "gated": F.silu,
    "probabilities": lambda x: torch.softmax(x, -1),
}
BINARY = {
    "times": torch.mul,
    "plus": torch.add,
    "minus": lambda x, y: torch.sub(x, y, alpha=0.5),
    "matrix product": torch.mm,
    "matrix product and more": lambda x, y: x * y * 0.5 + x @ y,
    "row": lambda x, y: x * y[:1],
    "column": lambda x, y: x - y[:, :1],
}
_places = st.integers(0, 99)
_steps = st.one_of(
    st.tuples(st.sampled_from(sorted(UNARY)), _places), st.tuples(st.sampled_from(sorted(BINARY)), _places, _places)
)


def lines(at_most: int) -> Any:
    """Operations, each on some of the values before it."""
    return st.lists(_steps, min_size=3, max_size=at_most)


results = st.sets(_places, min_size=1, max_size=3)


def function(lines: list[Any], results: set[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``(parameter, tangent) -> sum of some values``."""

    def program(a: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        values = [a, t, B, (t @ a).cos()]
        for name, *chosen in lines:
            operation: Any = UNARY.get(name) or BINARY[name]
            values.append(operation(*(values[i % len(values)] for i in chosen)))
        return sum((values[i % len(values)] for i in sorted(results)), values[-1])

    return program
