"""Trace by Hutchinson's method, plain or on what known eigenpairs leave over."""

from __future__ import annotations

import torch

from hessfunc._batch_probes import BatchProbes
from hessfunc._checks import NonFiniteError, check_generator
from hessfunc._chunks import check_samples, chunk_length, draw
from hessfunc._deflation import Deflation
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._estimate import Estimate, outline
from hessfunc._operators import Operator
from hessfunc._probe_law import ProbeLaw
from hessfunc._probes import Sampler, signs
from hessfunc._stopping import FIRST, Stopping
from hessfunc._typing import Params, Tensor


def hutchinson(
    H: Operator,
    *,
    num_probes: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    confidence: float = 0.95,
    max_probes: int = 1000,
    deflate: Eigenpairs | Params | None = None,
    plus: Estimate | None = None,
    sampler: Sampler = signs,
    per_batch: bool = False,
    chunk_size: int | None = None,
    generator: torch.Generator,
) -> Estimate:
    """Trace of ``H`` and of its diagonal blocks, leaf by leaf, from the same random probes.

    Formula: ``tr H = E[<v, H v>]`` for probes with ``E[v v^T] = I``; a leaf's block has the trace
    ``E[sum of v * H v over the leaf's entries]``. With random signs one probe has variance
    ``2 (|H|_F^2 - sum_i H_ii^2)`` (Hutchinson 1990). With ``deflate``, projector ``P`` onto known vectors,
    ``tr H = tr(P H P) + tr((I - P) H (I - P))``: the first is the sum of Rayleigh quotients, the second is left to the
    probes, without the outliers that make up most of ``|H|_F`` (as in Hutch++, Meyer et al. 2021). Unconverged
    vectors cost variance, and no bias.

    The standard error is from that variance, which the products at hand tell: twice the sum over entries of the sample
    variances of ``v * H v`` for signs, twice the mean of ``|H v|^2`` for normal probes, the same off ``v`` for probes
    on the sphere, with ``(I - P) H (I - P)`` for ``H`` where deflated. It is from the samples' spread for other
    samplers, and where that is larger by more than chance: products may have a noise of their own. Degrees of freedom
    come from how much one probe's share in it varies. Those sums over the entries of a leaf bound the variance of its
    share from above, and half of them from below, and tell its covariance with the whole; the spread tells the rest.
    Over nine spectra of 56 or 60 parameters 95 % intervals held the trace, and the shares of leaves, in 92 to 98 % of
    runs with 4, 8, 12 and 40 probes, where those of the spread alone did in 82 to 95 %
    (``tests/test_calibration.py``; with four probes a leaf that is coupled to none, or to others alone, 90 to 99 %).

    Which method: if eigenpairs are at hand, or wanted anyway, this one with ``deflate``; if not,
    [`deflated`][hessfunc.deflated], which finds a subspace of its own, or [`xnystrace`][hessfunc.xnystrace] for a
    Gauss-Newton or Fisher matrix. On trained networks these took 9, 24 and 27 products to 5 % of the trace with 95 %
    confidence where plain probes took 318 to 410 (``benchmarks/bench_trace.py``). Plain probes win on flat spectra,
    such as that of a network before training, and hold no vectors. [`hutchpp`][hessfunc.hutchpp] and
    [`xtrace`][hessfunc.xtrace] come in between, and pay from about 50 products on.

    With ``plus``, what is known of another matrix is added, and tolerances are for the sum: a control variate, such as
    ``tr H = tr(H - G) + tr G`` with the exact trace of a Gauss-Newton matrix from
    [`ggn_diagonal`][hessfunc.ggn_diagonal]; [`split_trace`][hessfunc.split_trace] does so by itself.

    With ``per_batch`` each batch of the data has a probe of its own, and ``sum_b w_b <v_b, H_b v_b>`` is taken with the
    batches' weights, at the price of one probe for all. Its variance is ``sum_b w_b^2 Var <v_b, H_b v_b>``, that of a
    shared probe less ``4 w_a w_b tr(H_a H_b)`` for each pair of batches (but for diagonals, with signs): less wherever
    batches curve in the same directions, as semidefinite matrices cannot help doing, and up to as many times less as
    there are batches. All batches together tell the standard error, so that two passes over the data can do. One large
    batch can be given to [`hessian`][hessfunc.hessian] in pieces, ``[(x[:8], y[:8]), (x[8:], y[8:])]``. For 2 % of the
    trace of a language model of 875k parameters 8 sequences apart took 4 products where shared probes took 13
    (``benchmarks/bench_trace_peers.py``); where a few samples make up most of the trace, as with labels that are
    noise, there is little to gain. On five batches of 30 parameters 95 % intervals held the trace in 95 % of runs with
    4 and 12 probes for each, and in 98 % with two (``tests/test_batch_probes.py``). With ``chunk_size=1`` signs leave
    the standard error to the spread alone.

    Give either ``num_probes``, or ``rtol`` and/or ``atol``: then batches of probes follow until the confidence
    interval ``value -+ t * stderr`` is within ``rtol * |value|`` or within ``atol``, whichever comes first.

    Cost: one matvec per probe, one pass over the data per ``chunk_size`` probes; with ``deflate`` one more matvec for
    eigenpairs, and as many as there are vectors if these turn out not to be eigenpairs of ``H`` or come without
    eigenvalues. Memory: four vectors per probe of a chunk, two for the error,
    and those in ``deflate``.

    Args:
        H: symmetric operator.
        num_probes: number of probes.
        rtol: half-width of the interval to reach, relative to the estimate.
        atol: half-width to reach; the floor for traces near zero, as an indefinite Hessian may have.
        confidence: probability with which the interval shall hold the trace.
        max_probes: where to end, with a warning, if the tolerance is not met.
        deflate: ``Eigenpairs`` of ``H``, as from [`eigsh`][hessfunc.eigsh], or any linearly independent vectors as a
            pytree like the parameters with a leading axis.
        plus: an estimate over the same leaves that is added to this one; its standard error joins in quadrature, and
            its products are counted.
        sampler: what draws the probes: signs have the least variance of all independent entries.
        per_batch: whether each batch of the data gets probes of its own: for the same products a variance that is up to
            as many times smaller as there are batches, where these curve in the same directions. See above.
        chunk_size: probes held at a time; by default 16, or as few as 4 if these take more than 16 MiB, and 1 if more
            than 256 MiB. The same seed gives the same probes whatever it is.
        generator: draws the probes, one after the other.

    Returns:
        An [`Estimate`][hessfunc.Estimate] with one sample per probe, and ``per_leaf``.

    Raises:
        ValueError: an option is out of range, both or neither of ``num_probes`` and a tolerance are given, or
            ``deflate`` or ``plus`` does not fit ``H``.
        NonFiniteError: a product is NaN or infinite; its ``partial`` is the estimate over the chunks done before.

    Warns:
        ConvergenceWarning: ``max_probes`` did not reach the tolerance; the message says what was reached.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss = lambda p: (p["a"] ** 4).sum() / 12 + p["b"].sum() * p["a"].sum()
        >>> H = hf.hessian(loss, {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.ones(2)})
        >>> generator = torch.Generator().manual_seed(0)
        >>> trace = hf.hutchinson(H, rtol=0.1, generator=generator)
        >>> low, high = trace.interval()
        >>> low < 14 < high, high - low < 0.2 * float(trace)
        (True, True)
        >>> sorted(trace.per_leaf)
        ['a', 'b']
    """
    stopping = Stopping.of(num_probes, rtol, atol, confidence, max_probes)
    estimate = probed(
        H,
        stopping,
        deflate=deflate,
        plus=plus,
        sampler=sampler,
        per_batch=per_batch,
        chunk_size=chunk_size,
        generator=generator,
    )
    stopping.warn_unless_met(
        estimate,
        method="hutchinson",
        advice="Raise max_probes, deflate eigenpairs of large magnitude (deflate=), or ask for less.",
        stacklevel=2,
    )
    return estimate


def probed(
    H: Operator,
    stopping: Stopping,
    *,
    deflate: Eigenpairs | Params | None = None,
    plus: Estimate | None = None,
    sampler: Sampler = signs,
    per_batch: bool = False,
    chunk_size: int | None,
    generator: torch.Generator,
) -> Estimate:
    """What [`hutchinson`][hessfunc.hutchinson] returns, without its warning."""
    check_generator(generator)
    chunk = chunk_length(H, chunk_size)
    if plus is not None:
        _check_plus(plus, H)
    with torch.no_grad():
        known = Deflation.of(deflate, H, chunk)
        probes: BatchProbes | SharedProbes
        if per_batch:
            length = chunk if chunk_size is not None else max(chunk, BatchProbes.fewest_at_a_time)
            probes = BatchProbes(H, known, sampler, length, generator)
        else:
            probes = SharedProbes(H, known, sampler, chunk, generator)
        goal = stopping.starting(probes.fewest)
        while True:
            try:
                probes.take(goal - probes.count)
            except NonFiniteError as error:
                raise error.keeping(_sum(probes.estimate(), plus) if probes.count else None) from None
            goal = stopping.starting(probes.fewest)  # known when there was a pass over the data
            if goal <= probes.count:
                estimate = _sum(probes.estimate(), plus)
                following = stopping.following(estimate, probes.count)
                if following is None:
                    return estimate
                goal = following


def _check_plus(plus: Estimate, H: Operator) -> None:
    if not isinstance(plus, Estimate):
        raise TypeError(
            f"plus is of type {type(plus).__name__}, expected an Estimate, such as ggn_diagonal(...).trace."
        )
    if plus.leaf_samples is None or plus.leaf_names != H.layout.names:
        raise ValueError(
            f"plus has leaves {outline(plus.leaf_names)}, but H has {outline(H.layout.names)}; it must be an estimate "
            "by leaf of a matrix over the same parameters."
        )


def _sum(estimate: Estimate, plus: Estimate | None) -> Estimate:
    return estimate if plus is None else estimate.plus(plus)


class SharedProbes:
    """Samples of a trace from probes that each go through all of the data.

    Attributes:
        count: probes so far.
        fewest: number of them that tells a standard error.
    """

    fewest = FIRST

    def __init__(self, H: Operator, known: Deflation, sampler: Sampler, chunk: int, generator: torch.Generator) -> None:
        self._H, self._known, self._sampler, self._chunk, self._generator = H, known, sampler, chunk, generator
        self._law = ProbeLaw(sampler, H)
        self._samples: list[Tensor] = []
        self.count = 0

    def take(self, num_probes: int) -> None:
        """So many probes more."""
        for probes in draw(self._H, num_probes, self._sampler, self._chunk, self._generator):
            samples, products = self._known.samples(self._H, probes)
            check_samples(samples)
            self._law.add(probes, products)
            self._samples.append(samples)
            self.count += len(samples)

    def estimate(self) -> Estimate:
        """The mean over all probes so far."""
        leaf_samples = torch.cat(self._samples)
        plain = Estimate.of(
            leaf_samples.sum(1),
            num_matvecs=len(leaf_samples) + self._known.num_matvecs,
            leaf_samples=leaf_samples,
            leaf_names=self._H.layout.names,
        )
        return self._law.applied(plain)
