"""A batch taken apart into its samples, and the squares of the gradients of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hessfunc import tree
from hessfunc._compat import REVERSE_ALONE, REVERSE_OVER_REVERSE, DeeperError, Order, evaluated, one_thread, rerouted
from hessfunc._gauss_newton import Criterion, ModelFn, composed, split_batch
from hessfunc._likelihood import Observed, columns, observe
from hessfunc._linear_factors import factored_squares
from hessfunc._typing import Loss, Params, Tensor

CHUNK_BYTES = 2**28
"""Gradients of one sample to hold at a time unless ``chunk_size`` says otherwise."""

ROW_BY_ROW = 2**15
"""Entries of a leaf from which on its gradients are squared one by one: fresh memory costs more than the calls."""


@dataclass(frozen=True)
class Samples:
    """A batch taken apart.

    Attributes:
        model_fn: the model.
        criterion: the criterion.
        params: the point.
        batch: ``(*inputs, target)``.
        num_samples: length of the leading axis.
        outputs: what the model gives for the whole batch.
        whole: the likelihood of the whole batch.
        where: what to call the batch in error messages.
    """

    model_fn: ModelFn
    criterion: Criterion
    params: Params
    batch: tuple[Any, ...]
    num_samples: int
    outputs: Any
    whole: Observed
    where: str

    @classmethod
    def of(cls, model_fn: ModelFn, criterion: Criterion, params: Params, batch: tuple[Any, ...], where: str) -> Samples:
        """Run the batch as a whole, and see how many samples it has."""
        inputs, target = split_batch(batch)
        lengths = [leaf.shape[0] for leaf in tree.leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if not lengths or not lengths[0]:
            raise ValueError(f"the samples of {where} cannot be told apart: its inputs hold no tensor with an axis.")

        def run(params: Params, *batch: Any) -> Any:
            outputs = model_fn(params, *batch[:-1])
            return outputs, observe(criterion, outputs, batch[-1])

        outputs, whole = evaluated(run, params, *batch)
        for name, value in (("target", target), ("output", outputs)):
            for leaf in tree.leaves(value):
                if isinstance(leaf, torch.Tensor) and (not leaf.dim() or leaf.shape[0] % lengths[0]):
                    raise ValueError(
                        f"the samples of {where} cannot be told apart: inputs have leading length {lengths[0]}, a "
                        f"{name} shape {tuple(leaf.shape)}; the samples must lie along the leading axis of each."
                    )
        return cls(model_fn, criterion, params, batch, lengths[0], outputs, whole, where)

    @property
    def loss(self) -> Loss:
        """``loss(params, *inputs, target)``."""
        return composed(self.model_fn, self.criterion)

    @property
    def outputs_per_sample(self) -> int:
        """Numbers that the likelihood of one sample depends on, each of which takes a pullback."""
        return self.whole.outputs.numel() // self.num_samples

    def likelihood(self, batch: tuple[Any, ...]) -> Callable[[Params], Observed]:
        """That of a batch as a function of the parameters."""
        inputs, target = split_batch(batch)
        return lambda params: observe(self.criterion, self.model_fn(params, *inputs), target)

    def first(self, num: int) -> tuple[Any, ...]:
        """A batch of so many samples, or all of it if its loss is not defined on so few (none of them counts)."""
        inputs, target = self._part(0, min(num, self.num_samples))
        batch = (*inputs, target)
        return batch if bool(torch.isfinite(evaluated(self.loss, self.params, *batch))) else self.batch

    def squares(self, layout: tree.Layout, chunk_size: int | None) -> Tensor:
        """``sum_n sum_j (J_n^T s_nj)^2``, shape ``(size,)``."""
        factored = self._factored(layout)
        if factored is not None:
            return factored
        chunk = chunk_size or max(1, CHUNK_BYTES // (layout.size * layout.dtype.itemsize))
        totals = [torch.zeros(shape, dtype=layout.dtype, device=layout.device) for shape in layout.shapes]
        for number in range(self.num_samples):
            for gradients in self._pulled(number, chunk):
                for total, leaf in zip(totals, tree.leaves(gradients), strict=True):
                    _add_squares(total, leaf.to(layout.dtype))
        return torch.cat([total.reshape(-1) for total in totals])

    def _factored(self, layout: tree.Layout) -> Tensor | None:
        """The same from factors of the gradients, if all of these have such."""
        in_order = isinstance(self.outputs, torch.Tensor) and torch.equal(
            self.outputs.reshape(-1), self.whole.outputs.reshape(-1)
        )
        if set(layout.dtypes) != {layout.dtype} or not in_order:
            return None
        squares = factored_squares(self.likelihood(self.batch), self.params, self.num_samples)
        if squares is None:
            return None
        self._check_each_alone()
        return torch.cat([square.reshape(-1) for square in squares])

    def _pulled(self, number: int, chunk: int) -> Iterator[Params]:
        """Gradients ``J_n^T s_nj`` of one sample, some at a time: pytrees with a leading axis."""
        inputs, target = self._part(number, number + 1)
        calls: list[Observed] = []

        def likelihood(p: Params) -> tuple[Tensor, Any]:
            outputs = self.model_fn(p, *inputs)
            calls.append(observe(self.criterion, outputs, target))
            return calls[-1].outputs, (outputs, calls[-1].target)

        def run(order: Order) -> Any:
            with one_thread(), torch.enable_grad():
                return torch.func.vjp(rerouted(likelihood, order), self.params, has_aux=True)

        with self._uncoupled(number):
            try:
                found, pullback, (outputs, observations) = run(REVERSE_OVER_REVERSE)
            except DeeperError:
                found, pullback, (outputs, observations) = run(REVERSE_ALONE)
        self._check_alone(outputs, number)
        seen = calls[-1]._replace(outputs=found.detach(), target=observations.detach())

        def pull(column: Tensor) -> Params:
            return pullback(column, retain_graph=True, create_graph=False)[0]

        for some in columns(seen, 1, chunk):
            yield tree.detach(torch.func.vmap(pull)(some))

    def _part(self, start: int, stop: int) -> tuple[Any, Any]:
        """Inputs and target of some samples."""

        def part(leaf: Any) -> Any:
            return leaf[start:stop] if self._shared(leaf) else leaf

        inputs, target = split_batch(self.batch)
        return tree.map_leaves(part, inputs), tree.map_leaves(lambda leaf: self._rows(leaf, start, stop), target)

    def _shared(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.num_samples

    def _rows(self, leaf: Any, start: int, stop: int) -> Any:
        """These samples' part of an output or a target; several rows each where all rows lie in a line."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        each = leaf.shape[0] // self.num_samples
        return leaf[start * each : stop * each]

    @contextlib.contextmanager
    def _uncoupled(self, number: int) -> Iterator[None]:
        """Say in other words what BatchNorm says of a sample alone."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise self._coupled(number) from error

    def _check_each_alone(self) -> None:
        leaves, spec = tree.flatten(split_batch(self.batch)[0])
        shared = [n for n, leaf in enumerate(leaves) if self._shared(leaf)]

        def one(*rows: Tensor) -> Any:
            alone = dict(zip(shared, (row.unsqueeze(0) for row in rows), strict=True))
            inputs = tree.unflatten([alone.get(n, leaf) for n, leaf in enumerate(leaves)], spec)
            return self.model_fn(self.params, *inputs)

        try:
            outputs = evaluated(lambda _params, *rows: torch.func.vmap(one)(*rows), (), *[leaves[n] for n in shared])
        except (RuntimeError, ValueError):  # vmap lacks a rule, or BatchNorm has one sample alone
            for number in range(self.num_samples):
                with self._uncoupled(number):
                    outputs = evaluated(self.model_fn, self.params, *self._part(number, number + 1)[0])
                self._check_alone(outputs, number)
            return
        self._check_alone(tree.map_leaves(lambda leaf: leaf.flatten(0, 1), outputs), 0)

    def _check_alone(self, outputs: Any, first: int) -> None:
        """Raise if samples from the one numbered ``first`` on have other outputs alone than in their batch."""
        for alone, together in zip(tree.leaves(outputs), tree.leaves(self.outputs), strict=True):
            if isinstance(together, torch.Tensor) and together.is_floating_point():
                each = together.shape[0] // self.num_samples
                expected = together[first * each : first * each + len(alone)]
                if alone.shape != expected.shape:
                    raise self._coupled(first)
                allowed = torch.finfo(together.dtype).eps ** 0.5 * together.abs().max()
                same = ((alone.detach() - expected).abs() <= allowed).reshape(len(alone) // each, -1).all(1)
                if not bool(same.all()):
                    raise self._coupled(first + int(same.int().argmin()))

    def _coupled(self, number: int) -> ValueError:
        return ValueError(
            f"sample {number} of {self.where} has other outputs alone than in its batch, so there is no gradient of "
            "each sample: BatchNorm in train mode normalizes by the batch and dropout draws anew (call model.eval()), "
            "or the samples do not lie along the leading axis. hessfunc.ggn with hutchinson or xdiag needs neither."
        )


def _add_squares(total: Tensor, rows: Tensor) -> None:
    if total.numel() < ROW_BY_ROW:
        total.add_(rows.square().sum(0))
        return
    for row in rows:
        total.addcmul_(row, row)
