"""The largest eigenvalues of each mini-batch's own Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from hessfunc import tree
from hessfunc._certify import NOISE
from hessfunc._checks import ProductWarning, check_choice, check_count, check_finite, check_generator, check_params
from hessfunc._data import Batches
from hessfunc._lanczos import eigh_tridiagonal, lanczos
from hessfunc._probes import normal
from hessfunc._products import hvp_unchecked
from hessfunc._typing import Loss, Params, Tensor
from hessfunc._wanted import wanted


@dataclass(frozen=True)
class MinibatchEigenvalues:
    """One row for each mini-batch, in the order of the data; tensors are float64 and on the CPU.

    Attributes:
        eigenvalues: k Ritz values for each, the most wanted first, shape ``(num_batches, k)``. NaN where the Krylov
            space of a batch's Hessian has fewer than k dimensions, as for one of rank below ``k - 1``.
        residuals: ``|H_b v - lambda v|`` for each, shape ``(num_batches, k)``: some eigenvalue of the batch's Hessian
            lies that close. Infinite where the value is NaN.
        num_matvecs: products spent on each batch.
    """

    eigenvalues: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    num_matvecs: int

    @property
    def num_negative(self) -> int:
        """How many of all values are below zero by more than their residuals and rounding."""
        scale = self.eigenvalues.nan_to_num().abs().amax(1, keepdim=True)
        rounding = NOISE * torch.finfo(self.eigenvalues.dtype).eps * scale
        return int((self.eigenvalues < -(self.residuals + rounding)).sum())


def minibatch_eigenvalues(
    loss: Loss,
    params: Params,
    batches: Any,
    *,
    k: int = 1,
    which: str = "LA",
    num_steps: int = 20,
    chunk_size: int = 8,
    generator: torch.Generator,
) -> MinibatchEigenvalues:
    """Largest eigenvalues of each mini-batch's Hessian, whose distribution is the max-eigenvalue spectrum.

    Formula: ``lambda_max(d^2 loss(params, *batch_b) / d params^2)`` for each ``b``, and those next to it, by Lanczos
    from one start vector for all. Park and Kim (2022) take the five of largest magnitude: ``k=5, which="LM"``. Steps of
    stochastic gradient descent see these and not the eigenvalue of the mean, which is at most the mean of the largest.
    A Krylov space holds one copy of a repeated eigenvalue. Draw the distribution with ``hessfunc.plot.minibatch``.

    The loss is taken as it is, so with L2 regularization in it every value moves up by as much; leave that out for
    negative eigenvalues, or subtract it.

    Batches of one shape run in lockstep under ``torch.func.vmap``, ``chunk_size`` at a time; others go in groups of
    their own shape. A loss that does not run under ``vmap`` (BatchNorm in train mode writes to its statistics) has its
    batches one after the other, after a ``ProductWarning``.

    Cost: ``num_steps`` matvecs per batch, and two to see that products repeat. Memory: ``num_steps`` vectors per batch
    of a chunk.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: pytree of floating-point tensors.
        batches: a list, DataLoader or other iterable of batches; held in memory as long as their chunk waits.
        k: eigenvalues for each batch, at most ``num_steps``.
        which: ``"LA"`` largest (most positive), or ``"LM"`` largest magnitude, among which negative ones show.
        num_steps: Lanczos steps, at most the number of parameters; the residuals tell whether they were enough.
        chunk_size: batches run together.
        generator: draws the start vector.

    Raises:
        ValueError: ``batches`` is empty or a single batch, an option is out of range, or the loss draws random numbers.
        TypeError: a leaf is not a floating-point tensor.
        FloatingPointError: a product is NaN or infinite.

    Warns:
        ProductWarning: the loss does not run under ``vmap``.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss = lambda w, x: ((x @ w) ** 2).mean() / 2
        >>> batches = [(torch.tensor([[1.0, 0.0]]),), (torch.tensor([[0.0, 3.0]]),), (2 * torch.eye(2),)]
        >>> options = {"num_steps": 2, "generator": torch.Generator().manual_seed(0)}
        >>> hf.minibatch_eigenvalues(loss, torch.zeros(2), batches, **options).eigenvalues.round().T
        tensor([[1., 9., 2.]], dtype=torch.float64)
    """
    check_params(params)
    check_count(num_steps, name="num_steps", maximum=tree.size(params), why=" (the number of parameters)")
    check_count(k, name="k", maximum=num_steps, why=" (num_steps)")
    check_choice(which, ("LA", "LM"), name="which")
    check_count(chunk_size, name="chunk_size")
    check_generator(generator)
    params = tree.detach(params)
    layout = tree.Layout.of(params)
    source = Batches.of(batches, reduction="sum", count=None, device=layout.device)
    if source.single:
        raise ValueError("batches is a single batch (a tuple or mapping); pass a list or DataLoader of several.")
    start = normal(1, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)[0]

    def product(vector: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return layout.ravel(hvp_unchecked(loss, params, layout.unravel(vector), *batch))

    def run(tensors: list[Tensor], rest: _Rest) -> tuple[Tensor, Tensor, Tensor]:
        batch = _joined(tensors, rest)
        result = lanczos(lambda vector: product(vector, batch), start, num_steps, reorthogonalize="full")
        return result.alphas, result.betas, result.residual_norm

    together = chunk_size > 1

    def run_all(group: list[_Waiting]) -> tuple[Tensor, ...]:
        nonlocal together
        rest = group[0][2]
        stacked = [torch.stack(parts) for parts in zip(*(tensors for _, tensors, _ in group), strict=True)]
        if together and len(group) > 1 and stacked:
            try:
                return torch.func.vmap(lambda *tensors: run(list(tensors), rest))(*stacked)
            except RuntimeError as error:
                together = False
                warnings.warn(
                    f"the loss does not run under vmap over batches ({str(error).splitlines()[0]}); they go one after "
                    "the other, which is slower and otherwise the same. chunk_size=1 does so without this warning.",
                    ProductWarning,
                    stacklevel=4,
                )
        return tuple(torch.stack(parts) for parts in zip(*(run(t, r) for _, t, r in group), strict=True))

    found: dict[int, Tensor] = {}
    waiting: dict[Hashable, list[_Waiting]] = {}

    def flush(group: list[_Waiting]) -> None:
        runs = run_all(group)
        for (position, _, _), alphas, betas, last in zip(group, *runs, strict=True):
            check_finite(
                torch.cat([alphas, betas]),
                what=f"a Hessian-vector product on batch {position}",
                remedy="look at the loss and its gradient there.",
            )
            found[position] = _extreme(alphas, betas, last, k, which)

    with torch.no_grad():
        for position, (batch, _) in enumerate(source):
            if not position:
                _check_repeats(product(start, batch), product(start, batch))
            tensors, rest, signature = _split(batch)
            group = waiting.setdefault(signature, [])
            group.append((position, tensors, rest))
            if len(group) == chunk_size:
                flush(waiting.pop(signature))
        for group in waiting.values():
            flush(group)
    pairs = torch.stack([found[position] for position in range(len(found))])
    return MinibatchEigenvalues(pairs[:, 0], pairs[:, 1], num_steps)


def _check_repeats(first: Tensor, second: Tensor) -> None:
    # Beyond what sums in another order, as on a GPU, can make of it.
    limit = 100 * torch.finfo(first.dtype).eps ** 0.75 * torch.linalg.vector_norm(first)
    if bool(torch.linalg.vector_norm(first - second) > limit):
        raise ValueError(
            "the loss is not deterministic: two products with the same vector differ. Call model.eval() if that is "
            "dropout, or fix the randomness inside the loss."
        )


def _extreme(alphas: Tensor, betas: Tensor, last: Tensor, k: int, which: str) -> Tensor:
    """Extreme Ritz values and their residuals, shape ``(2, k)``; rows after the Krylov space's end do not count."""
    ended = (betas == 0).nonzero()
    if len(ended):
        steps = int(ended[0]) + 1
        alphas, betas, last = alphas[:steps], betas[: steps - 1], torch.zeros_like(last)
    values, vectors = eigh_tridiagonal(alphas, betas)
    result = torch.tensor([[torch.nan], [torch.inf]], dtype=torch.float64, device="cpu").repeat(1, k)
    order = torch.from_numpy(wanted(values.numpy(), which)[:k].copy())
    result[0, : len(order)] = values[order]
    result[1, : len(order)] = float(last) * vectors[-1, order].abs()
    return result


_Rest: TypeAlias = tuple[list[Any], Any]
_Waiting: TypeAlias = tuple[int, list[Tensor], _Rest]


def _split(batch: tuple[Any, ...]) -> tuple[list[Tensor], _Rest, Hashable]:
    """Tensors of a batch, the rest of it, and what batches must share to run together."""
    leaves, spec = tree.flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    plain = all(isinstance(leaf, int | float | bool | str | None) for leaf in rest)
    places = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    key = (str(spec), str(rest), str(places), tuple((t.shape, t.dtype) for t in tensors)) if plain else object()
    return tensors, ([_Tensor if place else leaf for leaf, place in zip(leaves, places, strict=True)], spec), key


def _joined(tensors: list[Tensor], rest: _Rest) -> tuple[Any, ...]:
    leaves, spec = rest
    given = iter(tensors)
    return tree.unflatten([next(given) if leaf is _Tensor else leaf for leaf in leaves], spec)


class _Tensor:
    """Stands for a tensor in what is left of a batch."""
