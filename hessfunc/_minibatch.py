"""The largest eigenvalue of each mini-batch's own Hessian."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from hessfunc import tree
from hessfunc._checks import check_count, check_finite, check_generator, check_params
from hessfunc._data import Batches
from hessfunc._lanczos import eigh_tridiagonal, lanczos
from hessfunc._probes import normal
from hessfunc._products import hvp_unchecked
from hessfunc._typing import Loss, Params, Tensor


class MinibatchEigenvalues(NamedTuple):
    """One entry for each mini-batch, in the order of the data; all on the CPU in float64.

    Attributes:
        eigenvalues: the largest (most positive) Ritz value, shape ``(num_batches,)``.
        residuals: ``|H_b v - lambda v|`` for each: some eigenvalue of the batch's Hessian lies that close.
        num_matvecs: products spent on each batch.
    """

    eigenvalues: Tensor
    residuals: Tensor
    num_matvecs: int


def minibatch_eigenvalues(
    loss: Loss,
    params: Params,
    batches: Any,
    *,
    num_steps: int = 20,
    chunk_size: int = 4,
    generator: torch.Generator,
) -> MinibatchEigenvalues:
    """Largest eigenvalue of each mini-batch's Hessian, whose distribution is the max-eigenvalue spectrum.

    Formula: ``lambda_max(d^2 loss(params, *batch_b) / d params^2)`` for each ``b`` (Park and Kim 2022), by Lanczos from
    one start vector for all. Steps of gradient descent see these and not the eigenvalue of the mean, which is at most
    their mean.

    Batches of one shape run in lockstep under ``torch.func.vmap``, ``chunk_size`` at a time; others go in groups of
    their own shape.

    Cost: ``num_steps`` matvecs per batch. Memory: ``num_steps`` vectors per batch of a chunk.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: pytree of floating-point tensors.
        batches: a list, DataLoader or other iterable of batches; held in memory as long as their chunk waits.
        num_steps: Lanczos steps, at most the number of parameters; the residuals tell whether they were enough.
        chunk_size: batches run together.
        generator: draws the start vector.

    Raises:
        ValueError: ``batches`` is empty or a single batch, or an option is out of range.
        TypeError: a leaf is not a floating-point tensor.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss = lambda w, x: ((x @ w) ** 2).mean() / 2
        >>> batches = [(torch.tensor([[1.0, 0.0]]),), (torch.tensor([[0.0, 3.0]]),), (2 * torch.eye(2),)]
        >>> options = {"num_steps": 2, "generator": torch.Generator().manual_seed(0)}
        >>> hf.minibatch_eigenvalues(loss, torch.zeros(2), batches, **options).eigenvalues.round()
        tensor([1., 9., 2.], dtype=torch.float64)
    """
    check_params(params)
    check_count(num_steps, name="num_steps", maximum=tree.size(params), why=" (the number of parameters)")
    check_count(chunk_size, name="chunk_size")
    check_generator(generator)
    params = tree.detach(params)
    layout = tree.Layout.of(params)
    source = Batches.of(batches, reduction="sum", count=None, device=layout.device)
    if source.single:
        raise ValueError("batches is a single batch (a tuple or mapping); pass a list or DataLoader of several.")
    start = normal(1, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)[0]

    def top(tensors: list[Tensor], rest: tuple[list[Any], Any]) -> tuple[Tensor, Tensor, Tensor]:
        batch = _joined(tensors, rest)

        def matvec(vector: Tensor) -> Tensor:
            return layout.ravel(hvp_unchecked(loss, params, layout.unravel(vector), *batch))

        run = lanczos(matvec, start, num_steps, reorthogonalize="full")
        return run.alphas, run.betas, run.residual_norm

    found: dict[int, tuple[float, float]] = {}
    waiting: dict[Hashable, list[tuple[int, list[Tensor], tuple[list[Any], Any]]]] = {}

    def flush(group: list[tuple[int, list[Tensor], tuple[list[Any], Any]]]) -> None:
        rest = group[0][2]
        stacked = [torch.stack(parts) for parts in zip(*(tensors for _, tensors, _ in group), strict=True)]
        runs: tuple[Tensor, ...]
        if len(group) > 1 and stacked:
            runs = torch.func.vmap(lambda *tensors: top(list(tensors), rest), randomness="same")(*stacked)
        else:
            runs = tuple(torch.stack(parts) for parts in zip(*(top(t, r) for _, t, r in group), strict=True))
        for (position, _, _), alphas, betas, last in zip(group, *runs, strict=True):
            check_finite(
                torch.cat([alphas, betas]),
                what=f"a Hessian-vector product on batch {position}",
                remedy="look at the loss and its gradient there.",
            )
            found[position] = _largest(alphas, betas, last)

    with torch.no_grad():
        for position, (batch, _) in enumerate(source):
            tensors, rest, signature = _split(batch)
            group = waiting.setdefault(signature, [])
            group.append((position, tensors, rest))
            if len(group) == chunk_size:
                flush(waiting.pop(signature))
        for group in waiting.values():
            flush(group)
    pairs = torch.tensor([found[position] for position in range(len(found))], dtype=torch.float64)
    return MinibatchEigenvalues(pairs[:, 0], pairs[:, 1], num_steps)


def _largest(alphas: Tensor, betas: Tensor, last: Tensor) -> tuple[float, float]:
    """Largest Ritz value and its residual; the rows after the Krylov space is exhausted do not count."""
    ended = (betas == 0).nonzero()
    if len(ended):
        steps = int(ended[0]) + 1
        alphas, betas, last = alphas[:steps], betas[: steps - 1], torch.zeros_like(last)
    values, vectors = eigh_tridiagonal(alphas, betas)
    return float(values[-1]), float(last) * abs(float(vectors[-1, -1]))


def _split(batch: tuple[Any, ...]) -> tuple[list[Tensor], tuple[list[Any], Any], Hashable]:
    """Tensors of a batch, the rest of it, and what batches must share to run together."""
    leaves, spec = tree.flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    plain = all(isinstance(leaf, int | float | bool | str | None) for leaf in rest)
    places = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    key = (str(spec), str(rest), str(places), tuple((t.shape, t.dtype) for t in tensors)) if plain else object()
    return tensors, ([_Tensor if place else leaf for leaf, place in zip(leaves, places, strict=True)], spec), key


def _joined(tensors: list[Tensor], rest: tuple[list[Any], Any]) -> tuple[Any, ...]:
    leaves, spec = rest
    given = iter(tensors)
    return tree.unflatten([next(given) if leaf is _Tensor else leaf for leaf in leaves], spec)


class _Tensor:
    """Stands for a tensor in what is left of a batch."""
