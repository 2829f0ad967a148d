"""Whether a product is that of one symmetric matrix: found out at the first products of an operator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hessfunc import _probes, tree
from hessfunc._compat import REVERSE_ALONE, evaluated, rerouted
from hessfunc._fingerprint import Fingerprint, explained_difference, in_double
from hessfunc._rules import Product
from hessfunc._typing import Loss, Params, Tensor
from hessfunc._witness import Witness, custom_functions

OFF = "check=False leaves this check out."


class Soundness:
    """The checks of one operator, each made once: the loss repeats, the product is symmetric, the data stay the same.

    Loss and product are looked at on the first batch. What is wrong with them lies in the operations of the loss, which
    are the same for all batches: shapes aside, a loss can only take another way by the values of a tensor, which is
    noticed when it is traced. A wrong derivative in a branch that the first batch does not enter goes unnoticed. A
    check of a later batch would need two products of its own, as the vector of a caller may be one whose product is
    rounding alone.

    Cost: two evaluations of the loss and two products on the first batch, at the first product; one more gradient and
    two products in float64 where rounding might be taken for asymmetry. From then on a sum over the data in each pass
    over a loader; nothing for a tuple or list.
    """

    def __init__(self, product: Product, loss: Loss, params: Params, data: Any, *, name: str) -> None:
        self._product = product
        self._loss = loss
        self._params = params
        self._data = data
        self._name = name
        self._witness = Witness()
        self._done = False
        self._first: Fingerprint | None = None
        self._lock = threading.RLock()

    def of_batch(
        self,
        batch: tuple[Any, ...],
        arguments: tuple[Any, ...],
        rows: Callable[[Tensor], Tensor],
        prepare: Callable[[], None],
    ) -> None:
        """Check the loss and the product on one batch, unless it has been done.

        Args:
            batch: arguments of the loss.
            arguments: arguments of the product.
            rows: the product with rows on this batch.
            prepare: called before there are rows in memory.
        """
        with self._lock:
            if self._done:
                return
            self._check_repeats(batch)
            prepare()
            self._check_symmetry(batch, arguments, rows)
            self._done = True

    def of_pass(self, seen: Fingerprint) -> None:
        """Check that a whole pass over the data saw what the first one saw."""
        with self._lock:
            if self._first is None:
                self._first = seen
                return
        problem = explained_difference(self._data, self._first, seen, coupled=self._witness.coupled)
        if problem:
            raise ValueError(f"{problem} {OFF}")

    def _check_repeats(self, batch: tuple[Any, ...]) -> None:
        first = evaluated(self._witness.watching(self._loss), self._params, *batch).item()
        second = evaluated(self._loss, self._params, *batch).item()
        # Written so that NaN passes: the product says more about it.
        if abs(first - second) > _tolerance(self._witness.eps) * max(abs(first), abs(second)):
            raise ValueError(
                f"the loss is not deterministic: on one batch it is {first:.9g} and then {second:.9g}. "
                f"{self._witness.suspects()} A Hessian that changes between products has no eigenvalues. {OFF}"
            )

    def _check_symmetry(
        self, batch: tuple[Any, ...], arguments: tuple[Any, ...], rows: Callable[[Tensor], Tensor]
    ) -> None:
        layout = tree.Layout.of(self._params)

        def probe(seed: int) -> Tensor:
            # Drawn anew each time, since memory for vectors is what large models lack; no stream of the user's moves.
            generator = torch.Generator().manual_seed(seed)
            return _probes.normal(1, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)

        gap, size = _asymmetry(probe, rows)
        # Written so that NaN passes: the check for finite products names the batch.
        if not gap > _tolerance(self._witness.eps) * size:
            return
        floor, eps = self._rounding(batch), self._witness.eps
        if gap <= floor * eps:
            return
        exact = self._in_double(arguments, probe)
        if exact is not None:
            gap, size = exact
            eps = torch.finfo(torch.float64).eps
            if not gap > max(1e-6 * size, floor * eps):
                return
        functions = custom_functions(self._loss, self._params, batch)
        called = f"It calls the autograd.Function {', '.join(functions)}. " if functions else ""
        raise ValueError(
            f"the {self._name} is not symmetric: <u, Hv> and <v, Hu> differ by {gap / size:.1g} of their size on the "
            f"first batch. Some operation of the loss has a wrong or an approximate derivative (a straight-through "
            f"estimator, an autograd.Function whose backward or jvp is not its derivative, a write to outside tensors)."
            f" {called}No eigenvalues belong to such a product. {OFF}"
        )

    def _rounding(self, batch: tuple[Any, ...]) -> float:
        """What rounding contributes to ``<u, Hv>`` at most, over eps: curvature is of the size of gradient over point.

        It is all there is of the product where the Hessian vanishes.
        """
        with torch.inference_mode(False), torch.enable_grad():
            inputs = tree.map_leaves(lambda p: p.detach().clone().requires_grad_(), self._params)
            value = rerouted(self._loss, REVERSE_ALONE)(inputs, *batch)
            if not value.requires_grad:
                return 0.0
            leaves = tree.leaves(inputs)
            gradient = torch.autograd.grad(value, leaves, allow_unused=True)
        slope = sum(float(in_double(g).square().sum()) for g in gradient if g is not None) ** 0.5
        point = float(tree.norm(self._params))
        return 1e3 * slope * tree.size(self._params) / point if point else float("inf")

    def _in_double(self, arguments: tuple[Any, ...], probe: Callable[[int], Tensor]) -> tuple[float, float] | None:
        """The asymmetry in float64, or ``None`` if the loss does not run in it."""

        def rows(rows: Tensor) -> Tensor:
            return layout.ravel(self._product(self._loss, params, layout.unravel(rows[0]), *arguments)).unsqueeze(0)

        try:
            params, arguments = _double(self._params), _double(arguments)
            layout = tree.Layout.of(params)
            return _asymmetry(lambda seed: probe(seed).double(), rows)
        except (RuntimeError, TypeError, ValueError):  # float32 weights of its own, or a device without float64
            return None


def _asymmetry(probe: Callable[[int], Tensor], rows: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """``|<u, Hv> - <v, Hu>|``, and the size that either would have by chance for a matrix without symmetry."""

    def one_way(seed: int, other: int) -> tuple[float, float]:
        product = rows(probe(seed))[0]
        return float(tree.flat_dot(probe(other)[0], product)), float(tree.flat_norm(product))

    (left, left_norm), (right, right_norm) = one_way(0, 1), one_way(1, 0)
    return abs(left - right), left_norm + right_norm


def _tolerance(eps: float) -> float:
    return min(100 * eps**0.75, 0.1)


def _double(value: Any) -> Any:
    return tree.map_leaves(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        value,
    )
