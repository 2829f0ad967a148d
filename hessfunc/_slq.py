"""Stochastic Lanczos quadrature: the spectrum of an operator as nodes and weights."""

from __future__ import annotations

import warnings

import torch

from hessfunc import _probes
from hessfunc._checks import ConvergenceWarning, NonFiniteError
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._krylov import krylov
from hessfunc._operators import Operator
from hessfunc._outliers import from_eigenpairs, no_outliers
from hessfunc._quadrature import Quadrature
from hessfunc._runs import Runs, check_options, deflated_rows, run_deflated

BASIS_BYTES = 2**32
"""Largest basis, ``num_steps`` vectors, that the search for exact outliers takes without being asked."""


def slq(
    H: Operator,
    *,
    num_steps: int,
    num_probes: int,
    num_rules: int | None = None,
    exact_outliers: bool | None = None,
    deflate: Eigenpairs | None = None,
    reorthogonalize: str = "none",
    chunk_size: int | None = None,
    generator: torch.Generator,
) -> Quadrature:
    """Spectral density and traces of functions by stochastic Lanczos quadrature.

    Formula: for a probe ``v`` uniform on the unit sphere, Lanczos gives ``T`` with eigenvalues ``node_i`` and
    eigenvectors ``s_i``, and ``weight_i = s_i[0]**2``; then ``<v, f(H) v> = sum_i weight_i f(node_i)`` for every
    polynomial of degree below ``2 num_steps``, and its mean over probes is ``tr f(H) / size`` (Golub and Meurant 2010;
    Ubaru, Chen and Saad 2017).

    A network has most of its eigenvalues next to 0, closer together than any number of steps resolves. Such a Gauss
    rule has a node now above and now below them, as the number of steps has it, so each row is the mean of the rules of
    the last quarter of the steps, which cost no further product: on networks of 9 thousand to 900 thousand parameters
    one probe comes 1.3 to 5 times as close to the spectrum (Wasserstein-1 distance, 40 to 100 steps). The mean is exact
    for degrees below ``2 (num_steps - num_rules + 1)``; smooth functions are the better for ``num_rules=1`` as long as
    their error is more than rounding.

    The weight of a single eigenvalue is chi-squared noise of 140 % per probe. With ``exact_outliers`` those that
    Lanczos finds as isolated pairs get their exact mass ``1 / size``, and only the rest is left to the probes
    ([`krylov`][hessfunc.krylov] tells how, and returns the eigenpairs as well).

    Without reorthogonalization Lanczos keeps three vectors per probe. Its nodes then hold ghost copies of converged
    eigenvalues, which share one eigenvalue's weight (Knizhnerman 1996; Chen, Trogdon and Ubaru 2021): densities,
    moments and traces hold, the list of nodes is no list of eigenvalues. It is the default, since full
    reorthogonalization takes ``num_steps`` vectors per probe and up to twice the time between products, and on a
    trained network left the error of traces as it was and lowered the Wasserstein-1 distance by 0 to 23 %
    (``benchmarks/bench_density.py``), where exact outliers lowered it to a sixth and less.

    Cost: ``num_probes * num_steps`` matvecs, in ``num_steps`` passes if the probes run in one chunk (twice as many
    with exact outliers), and one that checks the pairs given as ``deflate``. Memory: ``num_probes`` vectors for the
    probes, three per probe of a chunk (``num_steps`` with ``"full"``), and with exact outliers
    ``num_steps + num_exact`` once.

    Args:
        H: symmetric operator.
        num_steps: Lanczos steps per probe, between 1 and ``H.size``.
        num_probes: number of probes; each gives one sample of every estimate.
        num_rules: Gauss rules that are averaged, of ``num_steps`` steps and fewer one by one; by default a quarter of
            ``num_steps``, and 1 for the Gauss rule alone.
        exact_outliers: whether to give isolated eigenvalues their exact mass. By default yes if there are at least two
            probes (one alone cannot tell a simple eigenvalue from a repeated one), nothing is deflated already, and
            ``num_steps`` vectors take at most 4 GiB.
        deflate: eigenpairs of ``H`` from [`eigsh`][hessfunc.eigsh]: the converged ones get their exact mass and are
            projected off every probe.
        reorthogonalize: ``"none"`` or ``"full"``.
        chunk_size: probes run at a time; by default all. Changes memory, not the answer.
        generator: draws the probes.

    Raises:
        ValueError: an option is out of range or not known, ``deflate`` does not fit ``H``, or both ``deflate`` and
            ``exact_outliers`` are asked for.
        NonFiniteError: a product is NaN or infinite; its ``partial`` is the quadrature of the probes done before, those
            of whole chunks.

    Warns:
        ConvergenceWarning: exact outliers or deflation were asked for, and no pair has converged.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.arange(1.0, 101.0)))
        >>> quadrature = hf.slq(H, num_steps=20, num_probes=8, generator=torch.Generator().manual_seed(0))
        >>> trace = quadrature.trace()
        >>> abs(float(trace.value) - 5050) < 3 * float(trace.stderr)
        True
    """
    num_rules = check_options(H, num_steps, num_probes, num_rules, reorthogonalize, chunk_size, generator)
    if deflate is not None and exact_outliers:
        raise ValueError("exact_outliers=True and deflate= exclude each other; the deflated pairs are exact already.")
    if exact_outliers is None:
        basis = num_steps * H.size * H.dtype.itemsize
        exact_outliers = num_probes > 1 and deflate is None and basis <= BASIS_BYTES
        asked = False
    else:
        asked = exact_outliers
    if exact_outliers:
        result = krylov(
            H,
            num_steps=num_steps,
            num_probes=num_probes,
            num_rules=num_rules,
            reorthogonalize=reorthogonalize,
            chunk_size=chunk_size,
            generator=generator,
        ).quadrature
        if asked and not result.num_exact:
            _warn(f"no Ritz pair was isolated after {num_steps} steps; raise num_steps, or pass exact_outliers=False.")
        return result
    with torch.no_grad():
        probes = _probes.sphere(num_probes, H.size, generator=generator, dtype=H.dtype, device=H.device)
        outliers = no_outliers(H) if deflate is None else from_eigenpairs(deflate, H)
        if deflate is not None and not len(outliers.values):
            _warn("no pair in deflate has converged, so nothing is deflated; raise eigsh's max_matvecs or tol.")

        def quadrature(runs: Runs) -> Quadrature:
            nodes, weights = deflated_rows(outliers.values, runs, H.size, num_rules)
            spent = len(nodes) * num_steps + (deflate is not None)
            count = len(outliers.values)
            return Quadrature(nodes, weights, H.size, num_steps, spent, num_exact=count, num_rules=num_rules)

        try:
            return quadrature(run_deflated(H, outliers, probes, num_steps, reorthogonalize, chunk_size))
        except NonFiniteError as error:
            raise error.keeping(error.partial and quadrature(error.partial)) from None


def _warn(message: str) -> None:
    warnings.warn(f"slq: {message}", ConvergenceWarning, stacklevel=3)
