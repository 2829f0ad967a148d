"""The whole analysis of a loss in one call."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import scipy
import torch

from hessfunc import tree
from hessfunc._checks import check_choice, check_count, check_generator, check_positive
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._eigsh import eigsh
from hessfunc._estimate import Estimate
from hessfunc._hessian import Product, hessian
from hessfunc._krylov import Krylov, krylov
from hessfunc._operators import Operator
from hessfunc._quadrature import Quadrature
from hessfunc._trace import hutchinson
from hessfunc._typing import Batch, Loss, Params, Tensor
from hessfunc._wanted import WHICH, wanted
from hessfunc.report import Report
from hessfunc.surface import loss_surface

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
"""``progress(stage, done, total)``: matvecs, or losses for the surface; ``total`` is None where it is not known."""

_T = TypeVar("_T")

DEFAULT_STEPS = 64
STAGES = ("eigenpairs", "trace", "density", "surface")


def analyze(
    loss: Loss,
    params: Params,
    data: Any = (),
    *,
    k: int = 5,
    which: str = "LM",
    tol: float = 1e-3,
    num_probes: int = 32,
    num_steps: int | None = None,
    density_probes: int = 4,
    surface_points: int | None = None,
    surface_span: float = 0.5,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    product: Product | None = None,
    chunk_size: int | None = None,
    linearize: bool = True,
    memory_budget: int | None = None,
    compile: bool = False,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Report:
    """Eigenpairs, trace, spectral density and, if asked for, the loss surface of one loss.

    One set of Lanczos runs ([`krylov`][hessfunc.krylov]) gives the density and the eigenpairs, whose residuals are
    computed anew; [`eigsh`][hessfunc.eigsh] goes on from there if they have not converged or one may have been missed.
    The eigenpairs deflate the trace: what they hold is known exactly, and the probes estimate the rest with less noise.

    Cost: ``num_steps * density_probes + k + num_probes`` matvecs, ``2 k + 20`` or so more if the search goes on, and
    ``surface_points**2`` losses. Memory: ``num_steps + 3 * density_probes`` vectors, and those of
    [`eigsh`][hessfunc.eigsh] if the search goes on.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: pytree of floating-point tensors.
        data: as in [`hessian`][hessfunc.hessian].
        k: number of eigenpairs.
        which: which eigenpairs, as in [`eigsh`][hessfunc.eigsh].
        tol: residual over ``|lambda|`` at which a pair counts as converged.
        num_probes: probes for the trace, at least 2.
        num_steps: Lanczos steps for the density, at most the number of parameters; by default 64, or fewer if there
            are not as many.
        density_probes: probes for the density.
        surface_points: grid points per direction of the loss surface, at least 3; None leaves it out.
        surface_span: how far it reaches to either side along unit eigenvectors.
        reduction: ``"mean"`` or ``"sum"``: how ``loss`` reduces over a batch.
        count: what a batch weighs under ``"mean"``, as in [`hessian`][hessfunc.hessian].
        product: the curvature product, as in [`hessian`][hessfunc.hessian].
        chunk_size: vectors to push through one batch, and probes to hold, at a time; bounds memory.
        linearize: whether to trace the product, as in [`hessian`][hessfunc.hessian].
        memory_budget: bytes to keep between passes, as in [`hessian`][hessfunc.hessian].
        compile: whether to compile the product, as in [`hessian`][hessfunc.hessian].
        generator: draws everything that is random.
        progress: called as ``progress(stage, done, total)`` after each product; stages are ``"eigenpairs"``,
            ``"trace"``, ``"density"`` and ``"surface"``.

    Raises:
        ValueError: an option is out of range, empty data, non-scalar loss.
        TypeError: an integer leaf, an exhausted iterator, arguments that do not fit the loss.
        FloatingPointError: the loss or a product is NaN or infinite.

    Example:
        >>> import torch, hessfunc as hf
        >>> from hessfunc._analyze import analyze
        >>> loss = lambda p: (p["w"] ** 4).sum() / 12
        >>> options = {"k": 2, "num_probes": 4, "num_steps": 4, "generator": torch.Generator().manual_seed(0)}
        >>> report = analyze(loss, {"w": torch.arange(1.0, 5.0)}, **options)
        >>> report.eigenpairs.eigenvalues.round(decimals=2), round(float(report.trace), 3)
        (tensor([16.,  9.]), 30.0)
    """
    check_generator(generator)
    check_count(num_probes, name="num_probes", minimum=2, why=": one sample has no standard error")
    check_count(density_probes, name="density_probes")
    if surface_points is not None:
        check_count(surface_points, name="surface_points", minimum=3)
        check_positive(surface_span, name="surface_span")
    H = hessian(
        loss,
        params,
        data,
        reduction=reduction,
        count=count,
        product=product,
        chunk_size=chunk_size,
        linearize=linearize,
        memory_budget=memory_budget,
        compile=compile,
    )
    check_count(k, name="k", maximum=H.size, why=", the number of parameters")
    check_choice(which, WHICH, name="which")
    check_positive(tol, name="tol")
    num_steps = min(DEFAULT_STEPS, H.size) if num_steps is None else num_steps
    check_count(num_steps, name="num_steps", maximum=H.size, why=", the number of parameters")
    settings = {
        "k": k,
        "which": which,
        "tol": tol,
        "num_probes": num_probes,
        "num_steps": num_steps,
        "density_probes": density_probes,
        "surface_points": surface_points,
        "surface_span": surface_span,
        "reduction": reduction,
        "count": None if count is None else "custom",
        "product": "hvp" if product is None else getattr(product, "__name__", repr(product)),
        "chunk_size": chunk_size,
        "linearize": linearize,
        "memory_budget": memory_budget,
        "compile": compile,
        "dtype": str(H.dtype).removeprefix("torch."),
        "device": str(H.device),
        "seed": generator.initial_seed(),
    }
    report = progress or (lambda _stage, _done, _total: None)
    spectrum = _spectrum(H, settings, generator, report)
    surface, seconds = None, dict(spectrum.seconds)
    if surface_points is not None:
        directions = tree.map_leaves(lambda leaf: leaf[:2], spectrum.eigenpairs.eigenvectors)
        surface, seconds["surface"] = _timed(
            lambda: loss_surface(
                loss,
                H.like,
                directions,
                data,
                span=surface_span,
                num_points=surface_points,
                reduction=reduction,
                count=count,
                progress=lambda done, total: report("surface", done, total),
            )
        )
    return Report(
        eigenpairs=spectrum.eigenpairs,
        trace=spectrum.trace,
        quadrature=spectrum.quadrature,
        surface=surface,
        leaf_shapes=dict(zip(H.layout.names, map(tuple, H.layout.shapes), strict=True)),
        settings=settings,
        versions=_versions(),
        num_matvecs=spectrum.num_matvecs,
        seconds=seconds,
    )


class _Spectrum(NamedTuple):
    eigenpairs: Eigenpairs
    trace: Estimate
    quadrature: Quadrature
    num_matvecs: dict[str, int]
    seconds: dict[str, float]


def _spectrum(H: Operator, settings: dict[str, Any], generator: torch.Generator, progress: Progress) -> _Spectrum:
    """Everything that takes products: one set of Lanczos runs first, whose eigenpairs deflate the trace."""
    num_probes, chunk_size = settings["num_probes"], settings["chunk_size"]
    num_steps, density_probes = settings["num_steps"], settings["density_probes"]
    ledger = _Ledger(progress)
    observed = Operator(H.like, lambda rows: ledger.entered(H.rows(rows)))
    seconds = {}
    ledger.open("density", num_steps * density_probes)
    run, seconds["density"] = _timed(
        lambda: krylov(
            observed, num_steps=num_steps, num_probes=density_probes, chunk_size=chunk_size, generator=generator
        )
    )
    ledger.open("eigenpairs", None)
    pairs, seconds["eigenpairs"] = _timed(lambda: _eigenpairs(run, observed, settings, generator))
    ledger.open("trace", num_probes)
    trace, seconds["trace"] = _timed(
        lambda: hutchinson(observed, num_probes=num_probes, deflate=pairs, chunk_size=chunk_size, generator=generator)
    )
    order = [stage for stage in STAGES if stage in seconds]
    return _Spectrum(
        pairs,
        trace,
        run.quadrature,
        num_matvecs={stage: ledger.done[stage] for stage in order},
        seconds={stage: seconds[stage] for stage in order},
    )


def _eigenpairs(run: Krylov, H: Operator, settings: dict[str, Any], generator: torch.Generator) -> Eigenpairs:
    """The pairs of the Lanczos runs if they are certain to be the wanted ones, else those of a search from there.

    Certain are converged pairs that all carry their exact mass, if the runs of the other probes, which had these
    vectors projected off, met no eigenvalue that ranks among them: neither a further copy nor one that was missed.
    """
    k, which, tol = settings["k"], settings["which"], settings["tol"]
    start = None
    if k <= run.ritz_values.shape[0]:
        start = run.candidates(k, which=which, tol=tol)
        values = start.eigenvalues.detach().cpu().double()
        quadrature = run.quadrature
        others = quadrature.nodes[1:, quadrature.num_exact :].flatten()
        nearest = (values.unsqueeze(1) - quadrature.exact).abs() if quadrature.num_exact else values.new_full((k, 1), 1)
        exact = bool((nearest.min(dim=1).values <= tol * values.abs()).all())
        ranks = wanted(torch.cat([values, others * (1 - tol)]).numpy(), which)[:k]
        if exact and len(others) and bool(start.converged.all()) and set(ranks.tolist()) == set(range(k)):
            return start
    return eigsh(H, k, which=which, tol=tol, v0=start, generator=generator)


class _Ledger:
    """Products by stage, reported as they are made."""

    def __init__(self, progress: Progress) -> None:
        self.done: dict[str, int] = {}
        self._progress = progress

    def open(self, stage: str, total: int | None) -> None:
        """Enter what follows under this stage."""
        self._stage, self._total = stage, total
        self.done[stage] = 0

    def entered(self, products: Tensor) -> Tensor:
        """The products, once they are counted and reported."""
        done = self.done[self._stage] = self.done[self._stage] + products.shape[0]
        self._progress(self._stage, done, None if self._total is None else max(self._total, done))
        return products


def _timed(task: Callable[[], _T]) -> tuple[_T, float]:
    started = time.perf_counter()
    return task(), time.perf_counter() - started


def _versions() -> dict[str, str]:
    return {
        "hessfunc": metadata.version("hessfunc"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
    }
