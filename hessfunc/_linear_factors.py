"""Sums of squared gradients of samples where all parameters are in linear layers with one row for each sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from hessfunc import tree
from hessfunc._compat import REVERSE_OVER_REVERSE, DeeperError, one_thread, rerouted, tape
from hessfunc._likelihood import Observed, columns
from hessfunc._typing import Params, Tensor


def factored_squares(likelihood: Callable[[Params], Observed], params: Params, num_samples: int) -> list[Tensor] | None:
    """``sum_n sum_j (J_n^T s_nj)^2`` for each leaf from one run of the whole batch, or ``None`` if it takes more.

    Formula: the gradient of a weight is the outer product ``g_nj x_n^T`` of a sample's row with the gradient at the
    layer's output, so the sum of its squares is ``sum_n (sum_j g_nj^2) (x_n^2)^T``, and no gradient of a weight is ever
    formed. That is so where each leaf enters once, as weight or bias of ``F.linear`` on rows that are samples: every
    edge of torch's graph that leads to a leaf has to be accounted for.

    Cost: one backward pass through the activations for each output of a sample, a third of a gradient.
    """
    tracked = tree.map_leaves(lambda leaf: leaf.detach().requires_grad_(), params)
    watch = _Linears(tree.leaves(tracked), num_samples)

    def run(p: Params) -> Observed:
        with watch:
            return likelihood(p)

    try:
        with one_thread(), torch.enable_grad():
            seen = rerouted(run, REVERSE_OVER_REVERSE)(tracked)
    except DeeperError:
        return None
    if not seen.outputs.dim() or seen.outputs.shape[0] != num_samples or not watch.account_for(seen.outputs):
        return None
    ends = [end for _, _, _, end in watch.calls]
    sums: list[Any] = [0.0] * len(ends)
    for column in columns(seen._replace(outputs=seen.outputs.detach()), num_samples, 1):
        found = torch.autograd.grad(seen.outputs, ends, column[0], retain_graph=True)
        sums = [total + gradient.square() for total, gradient in zip(sums, found, strict=True)]
    squares: list[Any] = [None] * len(watch.leaves)
    for (weight, bias, rows, _), total in zip(watch.calls, sums, strict=True):
        squares[weight] = total.T @ rows
        if bias is not None:
            squares[bias] = total.sum(0)
    return squares


class _Linears(TorchFunctionMode):
    """Notes calls of ``F.linear`` with leaves as weight and bias, and the squares of their inputs."""

    def __init__(self, leaves: list[Tensor], num_samples: int) -> None:
        super().__init__()
        self.leaves = leaves
        self.numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
        self.num_samples = num_samples
        self.calls: list[tuple[int, int | None, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear or _functorch.peek_interpreter_stack() is not None:
            return result
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        rows, bias = given["input"], given.get("bias")
        weight = self.numbers.get(id(given["weight"]))
        if weight is None or rows.dim() != 2 or rows.shape[0] != self.num_samples:
            return result
        self.calls.append((weight, self.numbers.get(id(bias)), rows.detach().square(), result))
        return result.clone()  # what is written in place later must not change the output noted here

    def account_for(self, outputs: Tensor) -> bool:
        """Whether each leaf enters ``outputs`` by one call alone, and by nothing else."""
        noted = Counter(number for weight, bias, _, _ in self.calls for number in (weight, bias) if number is not None)
        edges = Counter(
            self.numbers.get(id(getattr(following, "variable", None)))
            for node in tape(outputs)
            for following, _ in node.next_functions
        )
        return all(noted[number] == edges[number] == 1 for number in range(len(self.leaves)))
