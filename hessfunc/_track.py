"""Extreme eigenvalues and the trace through training, each step warm-started from the one before."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from hessfunc._checks import check_count
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._eigsh import eigsh
from hessfunc._operators import Operator
from hessfunc._trace import hutchinson
from hessfunc._trajectory import TrackRecord
from hessfunc._typing import Params, Tensor


@dataclass(frozen=True)
class TrackState:
    """What one step of [`track_step`][hessfunc.track_step] hands to the next; nothing in it changes.

    Attributes:
        pairs: the eigenpairs found last, with their vectors.
        probes: state of the generator from which the trace's probes are drawn, anew in every step.
    """

    pairs: Eigenpairs = field(repr=False)
    probes: Tensor = field(repr=False)


def track_step(
    H: Operator,
    state: TrackState | None = None,
    *,
    k: int = 1,
    which: str = "LA",
    tol: float = 1e-2,
    verify_steps: int = 5,
    num_probes: int = 0,
    generator: torch.Generator,
) -> tuple[TrackState, TrackRecord]:
    """One step of following a spectrum: a pure function from a state to the next state and a record.

    Eigenpairs come from [`eigsh`][hessfunc.eigsh] with the last eigenvectors as its start, the trace from
    [`hutchinson`][hessfunc.hutchinson] deflated by them, with the same probes in every step: the errors of two steps
    then have most in common, and differences are more accurate than the standard errors say.

    Cost: from a good start about 3 matvecs for one pair at the default tolerance, whose eigenvalue is then accurate to
    about 1e-4, against 18 for a random start; and ``verify_steps``, k for the residuals, and ``num_probes + 1`` for a
    trace. Memory: as of ``eigsh``.

    Args:
        H: symmetric operator at the present parameters; ``H.at(params)`` moves one there without tracing it again.
        state: as the step before returned it; ``None`` to begin.
        k: number of pairs.
        which: which eigenvalues, as in ``eigsh``: the largest (most positive) by default.
        tol: residual of a pair over its ``|lambda|``.
        verify_steps: steps of the search for a pair that has overtaken those followed. With 0 a step is two or three
            times cheaper, and a crossing can go unseen as long as the old eigenvector remains one.
        num_probes: probes for the trace; 0 for none.
        generator: draws the first start vector, the probes and the vectors of the search.

    Returns:
        The next state, and the record.

    Raises:
        ValueError: an option is out of range, or the state is not like ``H``.
        FloatingPointError: the loss or a product is NaN or infinite.

    Warns:
        ConvergenceWarning: fewer than k pairs met the tolerance.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss, generator = (lambda w: (w**4).sum() / 12), torch.Generator().manual_seed(0)
        >>> H, state = hf.hessian(loss, torch.tensor([1.0, 2.0, 3.0])), None
        >>> for w in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])):
        ...     state, record = hf.track_step(H.at(w), state, num_probes=2, generator=generator)
        ...     print(round(float(record.eigenvalues[0]), 3), round(float(record.trace), 3))
        9.0 14.0
        16.0 21.0
    """
    check_count(num_probes, name="num_probes", minimum=0)
    started = time.perf_counter()
    before = None if state is None else state.pairs
    pairs = eigsh(H, k, which=which, tol=tol, v0=before, verify_steps=verify_steps, generator=generator)
    probes = generator.get_state() if state is None else state.probes
    trace = None
    if num_probes:
        same = torch.Generator(device=generator.device)
        same.set_state(probes)
        trace = hutchinson(H, num_probes=num_probes, deflate=pairs, generator=same)
        if state is None:
            generator.set_state(same.get_state())  # so that no number is used twice
    record = TrackRecord(
        eigenvalues=pairs.eigenvalues.cpu().double(),
        residuals=pairs.residuals.cpu().double(),
        converged=pairs.converged.cpu(),
        overlaps=_overlaps(pairs, before),
        trace=trace,
        num_matvecs=pairs.num_matvecs + (0 if trace is None else trace.num_matvecs),
        seconds=time.perf_counter() - started,
    )
    return TrackState(pairs, probes), record


def track(
    H: Operator,
    points: Iterable[Params],
    *,
    k: int = 1,
    which: str = "LA",
    tol: float = 1e-2,
    verify_steps: int = 5,
    num_probes: int = 0,
    generator: torch.Generator,
) -> Iterator[TrackRecord]:
    """Follow eigenvalues and trace along ``points``, the parameters that a training of your own passes through.

    A generator around an iterable: each point is taken, analyzed by [`track_step`][hessfunc.track_step] with a warm
    start, and its record yielded before the next point is asked for. Training is thus an iterable that yields its
    parameters every so many steps; or yours stays a loop, and calls ``track_step``. Stack the records with
    [`Trajectory.of`][hessfunc.Trajectory], which also says what share of the training's time they took.

    Cost: that of ``track_step`` for each point. A matvec takes about two gradients, so 14 of them every 100 steps add
    28 % to full-batch training; ``verify_steps=0`` halves that, and so does an ``H`` over half of the data.

    Args:
        H: an operator that moves, as [`hessian`][hessfunc.hessian] and [`ggn`][hessfunc.ggn] make; where it is does
            not matter.
        points: parameters like ``H.like``. They are used before the next is asked for, so they may be changed in place.
        k: number of pairs.
        which: which eigenvalues, as in ``eigsh``.
        tol: residual of a pair over its ``|lambda|``.
        verify_steps: steps of the search for a pair that has overtaken those followed, as in ``track_step``.
        num_probes: probes for the trace; 0 for none.
        generator: draws start vectors and probes.

    Yields:
        A record for each point.

    Raises:
        ValueError: an option is out of range, a point is not like ``H.like``, or ``H`` cannot move.
        FloatingPointError: the loss or a product is NaN or infinite.

    Warns:
        ConvergenceWarning: fewer than k pairs met the tolerance.

    Example:
        >>> import torch, hessfunc as hf
        >>> def descent(loss, w, *, step_size, num_steps, every):
        ...     for step in range(num_steps):
        ...         if step % every == 0:
        ...             yield w
        ...         w = w - step_size * torch.func.grad(loss)(w)
        >>> loss, start = (lambda w: (w**4).sum() / 12), torch.tensor([1.0, 2.0, 3.0])
        >>> points = descent(loss, start, step_size=0.05, num_steps=30, every=10)
        >>> records = hf.track(hf.hessian(loss, start), points, generator=torch.Generator().manual_seed(0))
        >>> run = hf.Trajectory.of(records, steps=range(0, 30, 10))
        >>> run.eigenvalues[:, 0].round(decimals=1)
        tensor([9.0000, 2.1000, 1.2000], dtype=torch.float64)
    """
    state = None
    ended = time.perf_counter()
    for params in points:
        began = time.perf_counter()
        state, record = track_step(
            H.at(params),
            state,
            k=k,
            which=which,
            tol=tol,
            verify_steps=verify_steps,
            num_probes=num_probes,
            generator=generator,
        )
        between, seconds = began - ended, time.perf_counter() - began
        ended = time.perf_counter()
        yield replace(record, seconds=seconds, seconds_between=between)


def _overlaps(pairs: Eigenpairs, before: Eigenpairs | None) -> Tensor:
    if before is None:
        return torch.full((len(pairs),), torch.nan, dtype=torch.float64, device="cpu")
    cosines = pairs.rows() @ before.rows().T
    return cosines.square().sum(1).clamp(max=1).cpu().double()
