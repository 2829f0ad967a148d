"""The Gauss-Newton matrix of a classifier taken apart by class: what makes its outliers, and what its bulk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hessfunc import tree
from hessfunc._batched import checked_point, summed
from hessfunc._compat import evaluated
from hessfunc._data import Batches
from hessfunc._fisher import observed
from hessfunc._gauss_newton import Criterion, ModelFn, composed, pull, push, push_and_pull, split_batch
from hessfunc._kept import available_memory
from hessfunc._likelihood import Categorical, Observed, observe
from hessfunc._operators import Operator, Rows
from hessfunc._positions import Positions
from hessfunc._rules import Programs, Rule
from hessfunc._typing import Batch, Loss, Params, Tensor


@dataclass(frozen=True)
class Hierarchy:
    """The terms of a Gauss-Newton matrix, all positive semi-definite; together they are the whole of it.

    Attributes:
        class_term: ``G_class``, of rank at most the number of classes C.
        cross_term: ``G_cross``, of rank at most ``C (C - 2)``.
        within_term: ``G_within``, the scatter of single samples around the means.
        label_term: ``G_label``, of the gradients at the samples' own labels.
        weights: the weights ``w_{c,c'}``, shape ``(C, C)``, float64 on the CPU: row c is the share of samples of class
            c (0 for a class without samples) times their mean predicted probabilities, so that all sum to 1.
    """

    class_term: Operator = field(repr=False)
    cross_term: Operator = field(repr=False)
    within_term: Operator = field(repr=False)
    label_term: Operator = field(repr=False)
    weights: Tensor = field(repr=False)
    _lift: Rows = field(repr=False)

    @property
    def terms(self) -> dict[str, Operator]:
        """The four operators by name: ``"class"``, ``"cross"``, ``"within"`` and ``"label"``."""
        return {
            "class": self.class_term,
            "cross": self.cross_term,
            "within": self.within_term,
            "label": self.label_term,
        }

    def class_means(self) -> Params:
        """The vectors ``g_c``, a pytree like the parameters with a leading axis of length C; zero for empty classes.

        ``G_class = sum_c w_c g_c g_c^T`` with ``w_c`` the sum of row c of ``weights`` without its diagonal.

        Cost: C backward passes over the data. Memory: C vectors.
        """
        layout, count = self.class_term.layout, len(self.weights)
        shares = _off_diagonal(_reciprocal(_class_weights(self.weights)).unsqueeze(1).expand(count, count))
        units = torch.eye(count, dtype=torch.float64, device="cpu").unsqueeze(2) * shares
        return layout.unravel_rows(self._lift(units.reshape(count, -1).to(layout.device, layout.dtype)))


def ggn_hierarchy(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    data: Any,
    *,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    chunk_size: int | None = None,
    linearize: bool = True,
    memory_budget: int | None = None,
) -> Hierarchy:
    """The Gauss-Newton matrix of a softmax classifier as class, cross-class, within-class and label terms.

    Formula (Papyan 2020, arXiv 2008.11865): with the extended gradients ``g_{i,c'} = J_i^T (p_i - e_{c'})``, what the
    gradient of sample i would be if its label were ``c'``, and their weights ``w_{i,c'} = p_{i,c'} / N``,

    - ``G = sum_{i,c'} w_{i,c'} g_{i,c'} g_{i,c'}^T``, which is what [`ggn`][hessfunc.ggn] computes;
    - over the samples i of class c, ``w_{c,c'} = sum_i w_{i,c'}`` and ``g_{c,c'} = sum_i w_{i,c'} g_{i,c'} / w_{c,c'}``
      (cross-class means); over ``c' != c``, ``w_c = sum w_{c,c'}`` and ``g_c = sum w_{c,c'} g_{c,c'} / w_c`` (class
      means);
    - ``G_class = sum_c w_c g_c g_c^T``,
      ``G_cross = sum_{c, c' != c} w_{c,c'} (g_{c,c'} - g_c) (g_{c,c'} - g_c)^T``,
      ``G_within = sum_{i, c' != c} w_{i,c'} (g_{i,c'} - g_{c,c'}) (g_{i,c'} - g_{c,c'})^T``, and what is left over,
      ``G_label = sum_i w_{i,c} g_{i,c} g_{i,c}^T`` for c the label of i, small where the network fits its labels.

    In a trained network ``G_class`` carries the outliers of the spectrum and ``G_within`` the bulk. Measured: exactly C
    outliers for 2 to 6 well-separated clusters; on scikit-learn's digits ``C - 1`` eigenvectors along the class means,
    the last eigenvalue of ``G_class`` being small, with no sharp edge below them. At most C eigenvalues of
    ``G - G_label`` exceed the largest of ``G_cross + G_within``, since ``G_class`` has rank C (Weyl's inequality): a
    count of outliers without a threshold. The means of the label gradients add no direction,
    ``w_{c,c} g_{c,c} = -w_c g_c``, as ``sum_{c'} p_{i,c'} (p_i - e_{c'}) = 0``.

    The criterion must be ``F.cross_entropy`` as [`fishervp`][hessfunc.fishervp] explains, so each position of a
    sequence is a sample of its own and the class is that of its target. Neither a gradient nor a mean is stored: means
    act through their C x C inner products with the vector.

    Cost: a product with the label term as one with ``ggn``; with the class and cross terms one pass over the data for
    ``J v`` and one for ``J^T``, and the first in addition for the within term. One pass without derivatives when
    built. Memory: as ``ggn``, and ``C^2`` numbers for each vector.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``, logits of C classes.
        criterion: ``criterion(outputs, target) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``.
        params: pytree of floating-point tensors.
        data: batches ``(*inputs, target)``: a tuple is one, a list, DataLoader or other re-iterable many.
        reduction: ``"mean"`` or ``"sum"``: how ``criterion`` reduces over a batch.
        count: what a batch weighs under ``"mean"``.
        chunk_size: largest number of vectors to push through one batch together.
        linearize: trace the products once for each shape of batch.
        memory_budget: bytes to spend on what one pass over the data leaves for the next, over all terms.

    Raises:
        ValueError: empty data, a criterion that does not end in ``F.cross_entropy`` or whose own reduction is not
            ``reduction``, an option out of range.
        TypeError: an integer leaf, an exhausted iterator, batches that do not fit the model.
        FloatingPointError: the loss of the first batch, or later a product, is NaN or infinite.

    Warns:
        ProductWarning: a product could not be traced.

    Example:
        >>> import torch, hessfunc as hf
        >>> call, params = hf.functionalize(torch.nn.Linear(2, 3).double())
        >>> data = (torch.eye(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
        >>> terms = hf.ggn_hierarchy(call, torch.nn.functional.cross_entropy, params, data).terms
        >>> G = hf.ggn(call, torch.nn.functional.cross_entropy, params, data)
        >>> bool(torch.allclose(sum(term.dense() for term in terms.values()), G.dense()))
        True
    """
    plain = composed(model_fn, criterion)

    def checked(params: Params, *batch: Any) -> Tensor:
        _check_criterion(observed(model_fn, criterion, params, batch), reduction)
        return plain(params, *batch)

    params, batches = checked_point(
        checked, params, data, reduction=reduction, count=count, chunk_size=chunk_size, memory_budget=memory_budget
    )
    weights = _weights(model_fn, criterion, params, batches)
    layout = tree.Layout.of(params)
    square = torch.zeros(weights.shape, dtype=layout.dtype, device=layout.device)
    terms = _Terms(model_fn, criterion)
    budget = available_memory(layout.device) // 4 if memory_budget is None else memory_budget

    def over(product: Any, **layouts: Any) -> Rows:
        return summed(
            plain,
            params,
            batches,
            name="Gauss-Newton product",
            programs=Programs(Rule(product), eager=not linearize),
            chunk_size=chunk_size,
            memory_budget=budget // 4,  # four programs keep residuals
            **layouts,
        )[0]

    project = over(terms.project, image=tree.Layout.of(square))
    lift = over(terms.lift, domain=tree.Layout.of(square))
    scatter = over(terms.within, domain=tree.Layout.of((params, square)))
    of_classes = _reciprocal(_class_weights(weights)).to(square).unsqueeze(1)
    of_pairs = _reciprocal(weights).to(square)

    def inner_products(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each vector with the class means, shape ``(K, C, 1)``, and with the cross-class means, ``(K, C, C)``."""
        sums = _off_diagonal(project(rows).reshape(-1, *square.shape))
        return sums.sum(2, keepdim=True) * of_classes, sums * of_pairs

    def class_rows(rows: Tensor) -> Tensor:
        means, pairs = inner_products(rows)
        return lift(_off_diagonal(means.expand_as(pairs)).flatten(1))

    def cross_rows(rows: Tensor) -> Tensor:
        means, pairs = inner_products(rows)
        return lift(_off_diagonal(pairs - means).flatten(1))

    def within_rows(rows: Tensor) -> Tensor:
        return scatter(torch.cat([rows, inner_products(rows)[1].flatten(1)], dim=1))

    return Hierarchy(
        class_term=Operator(params, class_rows),
        cross_term=Operator(params, cross_rows),
        within_term=Operator(params, within_rows),
        label_term=Operator(params, over(terms.label)),
        weights=weights,
        _lift=lift,
    )


class _Terms:
    """Linear maps on one batch, in the form of products: ``(loss, params, v, *batch)``."""

    def __init__(self, model_fn: ModelFn, criterion: Criterion) -> None:
        self._model_fn = model_fn
        self._criterion = criterion

    def project(self, _loss: Loss, params: Params, v: Params, *batch: Any) -> Tensor:
        """``w_{c,c'} <g_{c,c'}, v>``, shape ``(C, C)``."""
        model, positions = self._model(batch)
        outputs, tangents, aux = push(model, params, v)
        at = positions(outputs, aux)
        return at.sums(at.weighted * at.inner(tangents))

    def lift(self, _loss: Loss, params: Params, v: Tensor, *batch: Any) -> Params:
        """``sum w_{c,c'} v_{c,c'} g_{c,c'}``, the transpose of ``project``."""
        model, positions = self._model(batch)

        def cotangents(outputs: Tensor, aux: Any) -> Tensor:
            at = positions(outputs, aux)
            return at.combined(at.weighted * at.spread(v))

        return pull(model, params, cotangents)

    def within(self, _loss: Loss, params: Params, v: tuple[Params, Tensor], *batch: Any) -> Params:
        """Product with the scatter around the means whose inner products with the vector are given along with it."""
        model, positions = self._model(batch)

        def middle(outputs: Tensor, tangents: Tensor, aux: Any, _deeper: bool) -> Tensor:
            at = positions(outputs, aux)
            return at.combined(~at.own * at.weighted * (at.inner(tangents) - at.spread(v[1])))

        return push_and_pull(model, params, v[0], middle)

    def label(self, _loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
        """Product with the second moment of the gradients at the labels."""
        model, positions = self._model(batch)

        def middle(outputs: Tensor, tangents: Tensor, aux: Any, _deeper: bool) -> Tensor:
            at = positions(outputs, aux)
            return at.combined(at.own * at.weighted * at.inner(tangents))

        return push_and_pull(model, params, v, middle)

    def _model(self, batch: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Positions]]:
        inputs, target = split_batch(batch)
        calls: list[Observed] = []

        def likelihood(p: Params) -> tuple[Tensor, tuple[Tensor, ...]]:
            calls.append(observe(self._criterion, self._model_fn(p, *inputs), target))
            return calls[-1].outputs, (calls[-1].target,)

        def positions(outputs: Tensor, aux: tuple[Tensor, ...]) -> Positions:
            return Positions(calls[-1]._replace(outputs=outputs, target=aux[0]))

        return likelihood, positions


@torch.no_grad()
def _weights(model_fn: ModelFn, criterion: Criterion, params: Params, batches: Batches) -> Tensor:
    def read(params: Params, *batch: Any) -> Observed:
        return observed(model_fn, criterion, params, batch)

    total: Any = 0
    weights = []
    for batch, weight in batches:
        at = Positions(evaluated(read, params, *batch))
        total = total + weight * at.sums(at.weighted).cpu().double()
        weights.append(weight)
    return total / batches.total(weights)


def _check_criterion(seen: Observed, reduction: str) -> None:
    if not isinstance(seen.family, Categorical):
        raise ValueError(
            "criterion does not end in F.cross_entropy; classes and their means are those of a softmax classifier."
        )
    given = seen.options["reduction"]
    if given != reduction:
        raise ValueError(
            f"reduction={reduction!r}, but the criterion reduces over its batch by {given!r}; pass that one."
        )


def _off_diagonal(square: Tensor) -> Tensor:
    eye = torch.eye(square.shape[-1], dtype=torch.bool, device=square.device)
    return torch.where(eye, torch.zeros_like(square), square)


def _class_weights(weights: Tensor) -> Tensor:
    return _off_diagonal(weights).sum(1)


def _reciprocal(weights: Tensor) -> Tensor:
    """``1 / weights``, and 0 where there is no weight: an empty class has no mean."""
    zero = weights == 0
    return torch.where(zero, torch.zeros_like(weights), 1 / torch.where(zero, torch.ones_like(weights), weights))
