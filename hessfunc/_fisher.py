"""The Fisher matrix of a model read as a distribution over its targets: exact, sampled or empirical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hessfunc import tree
from hessfunc._batched import over_batches
from hessfunc._checks import check_choice, check_count, check_generator, check_like, check_params
from hessfunc._compat import evaluated
from hessfunc._data import Batches
from hessfunc._fingerprint import in_double
from hessfunc._gauss_newton import Criterion, ModelFn, composed, push_and_pull, split_batch
from hessfunc._likelihood import Observed, observe
from hessfunc._operators import Operator
from hessfunc._rules import Rule
from hessfunc._typing import Batch, Loss, Params, Tensor

KINDS = ("type2", "mc", "empirical")


def fishervp(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    v: Params,
    *batch: Any,
    kind: str = "type2",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Params:
    """Product of the Fisher matrix with a vector.

    Formula: ``F v = sum_i c_i J_i^T E[s_i s_i^T] J_i v`` over observations ``i``, with ``s_i`` the gradient of the
    negative log-likelihood of observation ``i`` with respect to the outputs, ``J_i`` the Jacobian of these, and
    ``c_i`` the weight of the observation in the loss, ``1 / number`` for a mean. The kinds differ in the expectation:

    - ``"type2"``: over the model's own predictive distribution, in closed form. It does not depend on the targets and
      equals the Gauss-Newton matrix ([`ggnvp`][hessfunc.ggnvp]), since the criteria known here are natural
      exponential families (Martens 2020, section 9.2).
    - ``"mc"``: over ``num_samples`` targets drawn from that distribution; unbiased for ``"type2"``.
    - ``"empirical"``: over the targets of the batch, so the mean of the outer products of per-observation
      gradients. Not an approximation of the others away from a good fit (Kunstner, Hennig and Balles 2019).

    The criterion must end in ``F.cross_entropy``, ``F.mse_loss`` or ``F.binary_cross_entropy_with_logits``, called by
    itself, by its nn module or by a function that reshapes outputs and target first. An observation is one position
    for cross-entropy (a token, a pixel; those with ``ignore_index`` do not count) and one vector along the last axis
    for the others. Each is weighted as in the loss, whatever the axes: ``(batch, classes)``, ``(batch, classes,
    time)`` or, by way of a transposing criterion, ``(batch, time, classes)``. Outputs of an observation must depend
    on the parameters alone and not on other targets. No per-sample gradient of the parameters is stored.

    Cost: one run of the model with its tangent and one backward pass, as for [`ggnvp`][hessfunc.ggnvp].

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``, as from [`functionalize`][hessfunc.functionalize].
        criterion: ``criterion(outputs, target) -> scalar``.
        params: pytree of floating-point tensors.
        v: pytree of the structure, shapes and dtypes of ``params``.
        *batch: ``(*inputs, target)``.
        kind: ``"type2"``, ``"mc"`` or ``"empirical"``.
        num_samples: number of targets drawn for each observation, with ``"mc"``.
        generator: draws the targets anew in each call, for ``"mc"`` alone. Two calls with generators in one state have
            one matrix; [`fisher`][hessfunc.fisher] fixes the samples once and for all. Under ``vmap`` pass
            ``randomness="same"``.

    Returns:
        Pytree like ``params``.

    Raises:
        ValueError: the criterion is no known log-likelihood, ``kind`` is not known, ``num_samples`` is out of range, or
            ``v`` is not like ``params``.
        TypeError: a leaf is not a floating-point tensor, dtypes differ, or ``generator`` is missing or out of place.
        NotImplementedError: the model uses an operation without forward-mode derivatives.

    Example:
        >>> import torch, hessfunc as hf
        >>> model_fn = lambda w, x: x * w
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> arguments = (model_fn, torch.nn.functional.mse_loss, torch.tensor(1.0), torch.tensor(1.0), *batch)
        >>> hf.fishervp(*arguments), hf.fishervp(*arguments, kind="empirical")
        (tensor(5.), tensor(34.))
    """
    check_params(params)
    check_like(v, params, name="v", reference="params")
    _check_kind(kind, num_samples, generator)
    return _product(model_fn, criterion, params, v, batch, _targets(kind, num_samples, generator))


def fisher(
    model_fn: ModelFn,
    criterion: Criterion,
    params: Params,
    data: Any,
    *,
    kind: str = "type2",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    chunk_size: int | None = None,
    linearize: bool = True,
    memory_budget: int | None = None,
    check: bool = True,
) -> Operator:
    """The Fisher matrix at ``params`` over all of ``data``, as a matvec.

    Kinds, formula and what counts as an observation are those of [`fishervp`][hessfunc.fishervp]; weighting of
    batches and the options not named here those of [`hessian`][hessfunc.hessian].

    Which kind: ``"type2"`` is the Gauss-Newton matrix ([`ggn`][hessfunc.ggn]) and needs no targets. ``"mc"`` is its
    unbiased estimate by gradients of samples, for comparison with methods that use such (K-FAC among them); it saves
    nothing here. ``"empirical"`` is the second moment of the gradients, for their noise; as curvature it misleads away
    from a good fit. With ``kind="mc"`` the targets are
    drawn once, in a pass over the data when the operator is built, so that all products are with one matrix; they
    take as much memory as ``num_samples`` times the targets, and the data must come in the same order in each pass.

    Args:
        model_fn: ``model_fn(params, *inputs) -> outputs``.
        criterion: ``criterion(outputs, target) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``.
        params: pytree of floating-point tensors.
        data: batches ``(*inputs, target)``: a tuple is one, a list, DataLoader or other re-iterable many.
        kind: ``"type2"``, ``"mc"`` or ``"empirical"``.
        num_samples: number of targets drawn for each observation, with ``"mc"``.
        generator: draws the targets, for ``"mc"`` alone.
        reduction: ``"mean"`` or ``"sum"``: how ``criterion`` reduces over a batch.
        count: what a batch weighs under ``"mean"``.
        chunk_size: largest number of vectors to push through one batch together.
        linearize: trace the product once for each shape of batch.
        memory_budget: bytes for what does not depend on the vector, as in [`hessian`][hessfunc.hessian]; 0 takes the
            least memory and more time.
        check: look at the first products for randomness, asymmetry and data that change.

    Raises:
        ValueError: empty data, a criterion that is no known log-likelihood or whose own reduction is not ``reduction``,
            an option out of range, or later batches that changed between passes under ``"mc"``.
        TypeError: an integer leaf, an exhausted iterator, batches that do not fit the model, or ``generator`` missing
            or out of place.
        NonFiniteError: the loss of the first batch, or later a product, is NaN or infinite.

    Warns:
        ProductWarning: the product could not be traced.

    Example:
        >>> import torch, hessfunc as hf
        >>> call, params = hf.functionalize(torch.nn.Linear(2, 3))
        >>> data = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), (torch.zeros(1, 2), torch.tensor([1]))]
        >>> F = hf.fisher(call, torch.nn.functional.cross_entropy, params, data)
        >>> G = hf.ggn(call, torch.nn.functional.cross_entropy, params, data)
        >>> bool(torch.allclose(F.dense(), G.dense(), atol=1e-6))
        True
    """
    _check_kind(kind, num_samples, generator)
    samples = None
    if generator is not None:
        samples = _Samples(model_fn, criterion, tree.detach(params), num_samples, generator)

    def product(_loss: Loss, params: Params, v: Params, *batch: Any) -> Params:
        if samples is None:
            return _product(model_fn, criterion, params, v, batch, _targets(kind, num_samples, None))
        return _product(model_fn, criterion, params, v, batch[:-1], lambda _seen: batch[-1])

    operator = over_batches(
        [Rule(product)],
        checked_loss(model_fn, criterion, reduction),
        params,
        data,
        name="Fisher product",
        reduction=reduction,
        count=count,
        chunk_size=chunk_size,
        linearize=linearize,
        memory_budget=memory_budget,
        check=check,
        extend=samples,
    )
    if samples is not None:
        samples.draw(Batches.of(data, reduction=reduction, count=count, device=operator.device))
    return operator


def checked_loss(model_fn: ModelFn, criterion: Criterion, reduction: str) -> Loss:
    """``loss(params, *inputs, target)``, which raises unless it is a negative log-likelihood reduced in that way."""
    loss = composed(model_fn, criterion)

    def checked(params: Params, *batch: Any) -> Tensor:
        given = observed(model_fn, criterion, params, batch).options["reduction"]
        if given != reduction:
            raise ValueError(
                f"reduction={reduction!r}, but the criterion reduces over its batch by {given!r}; pass that one."
            )
        return loss(params, *batch)

    return checked


def _check_kind(kind: str, num_samples: int, generator: torch.Generator | None) -> None:
    check_choice(kind, KINDS, name="kind")
    check_count(num_samples, name="num_samples")
    if kind == "mc":
        check_generator(generator)
        return
    if generator is not None:
        raise TypeError(f"generator is given, but kind={kind!r} draws nothing; leave it out, or pass kind='mc'.")
    if num_samples != 1:
        raise ValueError(f"num_samples={num_samples}, but kind={kind!r} draws nothing; pass kind='mc'.")


Targets = Callable[[Observed], list[Tensor] | None]
"""Targets whose scores make up the matrix, or ``None`` for the expectation in closed form."""


def _targets(kind: str, num_samples: int, generator: torch.Generator | None) -> Targets:
    if kind == "type2":
        return lambda _seen: None
    if generator is None:
        return lambda seen: [seen.target]
    return lambda seen: [seen.family.sample(seen, generator) for _ in range(num_samples)]


def _product(
    model_fn: ModelFn, criterion: Criterion, params: Params, v: Params, batch: tuple[Any, ...], targets: Targets
) -> Params:
    inputs, target = split_batch(batch)
    calls: list[Observed] = []

    def likelihood(p: Params) -> tuple[Tensor, tuple[Tensor, ...]]:
        calls.append(observe(criterion, model_fn(p, *inputs), target))
        return calls[-1].outputs, (calls[-1].target,)

    def second_moment(outputs: Tensor, tangents: Tensor, aux: tuple[Tensor, ...], _deeper: bool) -> Tensor:
        seen = calls[-1]._replace(outputs=outputs, target=aux[0])
        family = seen.family
        drawn = targets(seen)
        if drawn is None:
            return seen.weight * family.covariance(seen, tangents)
        total = torch.zeros_like(tangents)
        for sample in drawn:
            score = family.score(seen, sample.detach())
            total = total + score * family.inner(outputs, score, tangents)
        return seen.weight / len(drawn) * total

    return push_and_pull(likelihood, params, v, second_moment)


def observed(model_fn: ModelFn, criterion: Criterion, params: Params, batch: tuple[Any, ...]) -> Observed:
    """The likelihood at the end of ``criterion`` for one batch."""
    inputs, target = split_batch(batch)
    return observe(criterion, model_fn(params, *inputs), target)


class _Samples:
    """Targets drawn once for each batch; called with a batch it appends those drawn for it."""

    def __init__(
        self, model_fn: ModelFn, criterion: Criterion, params: Params, num_samples: int, generator: torch.Generator
    ) -> None:
        self._params = params
        self._observed = lambda params, *batch: observed(model_fn, criterion, params, batch)
        self._num_samples = num_samples
        self._generator = generator
        self._drawn: list[list[Tensor]] = []
        self._prints: list[list[float]] = []
        self._stable = False

    @torch.no_grad()
    def draw(self, batches: Batches) -> None:
        self._stable = batches.stable
        for batch, _ in batches:
            seen = evaluated(self._observed, self._params, *batch)
            self._drawn.append([seen.family.sample(seen, self._generator) for _ in range(self._num_samples)])
            self._prints.append(self._fingerprint(batch))

    def __call__(self, position: int, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        if position >= len(self._drawn) or self._fingerprint(batch) != self._prints[position]:
            raise ValueError(
                f"data: batch {position} is not the one that targets were drawn for; a loader that shuffles or "
                "augments gives no fixed matrix with kind='mc'. Pass shuffle=False, or list(loader)."
            )
        return (*batch, self._drawn[position])

    def _fingerprint(self, batch: tuple[Any, ...]) -> list[float]:
        if self._stable:
            return []
        return [float(in_double(leaf).sum()) for leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor)]
