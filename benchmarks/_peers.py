"""The other libraries behind one interface, each at its best settings; those not installed are listed as missing.

Every adapter starts from the model, so that a call is what a user pays end to end. PyHessian's density calls
``torch.eig``, which torch removed: that one call is given a replacement. It also leaves gradients behind that double
its next answer on the same model, so they are cleared first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from _models import Problem
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch.nn.attention import SDPBackend, sdpa_kernel

Spectrum = tuple[np.ndarray, np.ndarray]
"""Nodes and weights, both of shape (probes, steps)."""


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues with eigenvectors as rows, flat in the order of the model's parameters, and products spent."""

    values: np.ndarray
    rows: np.ndarray
    matvecs: int | None


@dataclass(frozen=True)
class Peer:
    """A library: its distribution, the module to import, a note, and what it can do.

    density: ``(problem, steps, probes, seed) -> Spectrum``. eigs: a ladder of settings from cheap to careful, each
    ``(problem, k, seed) -> Eigen``. trace: ``(problem, probes, seed) -> samples`` of Hutchinson's estimator. sketch:
    Hutch++ and XTrace, each ``(problem, matvecs, seed) -> estimate``.
    """

    name: str
    distribution: str
    module: str
    note: str
    density: Callable[..., Spectrum]
    eigs: dict[str, Callable[..., Eigen]]
    trace: Callable[..., np.ndarray]
    sketch: dict[str, Callable[..., float]]

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


@contextlib.contextmanager
def _settings(problem: Problem, seed: int) -> Iterator[None]:
    """The peers draw from the global generator, use the default dtype and need attention without fused kernels."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        torch.set_default_dtype(next(iter(problem.params.values())).dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


# --- PyHessian -------------------------------------------------------------------------------------------------------


def _eig(matrix: torch.Tensor, eigenvectors: bool = False) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@contextlib.contextmanager
def _with_eig() -> Iterator[None]:
    removed = getattr(torch, "eig", None)
    torch.eig = _eig  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.eig = removed  # type: ignore[attr-defined]


def _pyhessian(problem: Problem) -> Any:
    from pyhessian import hessian

    problem.model.zero_grad(set_to_none=True)
    cuda = problem.batch[0].is_cuda
    return hessian(problem.model, problem.criterion, data=problem.batch, cuda=cuda)


def _pyhessian_density(problem: Problem, steps: int, probes: int, seed: int) -> Spectrum:
    with _settings(problem, seed), _with_eig():
        nodes, weights = _pyhessian(problem).density(iter=steps, n_v=probes)
    problem.model.zero_grad(set_to_none=True)
    return np.array(nodes, dtype=float), np.array(weights, dtype=float)


def _pyhessian_eigs(max_iter: int, tol: float) -> Callable[..., Eigen]:
    def eigs(problem: Problem, k: int, seed: int) -> Eigen:
        with _settings(problem, seed):
            values, vectors = _pyhessian(problem).eigenvalues(maxIter=max_iter, tol=tol, top_n=k)
        problem.model.zero_grad(set_to_none=True)
        rows = [np.concatenate([leaf.detach().cpu().numpy().ravel() for leaf in vector]) for vector in vectors]
        return Eigen(np.array(values), np.stack(rows), None)

    return eigs


def _pyhessian_trace(problem: Problem, probes: int, seed: int) -> np.ndarray:
    with _settings(problem, seed):
        # With tol=0 it would stop at the first running mean below zero.
        samples = _pyhessian(problem).trace(maxIter=probes, tol=float("-inf"))
    problem.model.zero_grad(set_to_none=True)
    return np.array(samples)


def pyhessian_default(problem: Problem, seed: int) -> np.ndarray:
    """PyHessian's trace with its own stopping rule."""
    with _settings(problem, seed):
        samples = _pyhessian(problem).trace()
    problem.model.zero_grad(set_to_none=True)
    return np.array(samples)


# --- hessian-eigenthings ---------------------------------------------------------------------------------------------


def _eigenthings(problem: Problem) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(problem.model, [problem.batch], supervised_loss(problem.criterion))


def _eigenthings_density(problem: Problem, steps: int, probes: int, seed: int) -> Spectrum:
    from hessian_eigenthings import spectral_density

    with _settings(problem, seed):
        result = spectral_density(_eigenthings(problem), num_runs=probes, lanczos_steps=steps, seed=seed)
    return result.raw_eigenvalues.double().cpu().numpy(), result.raw_weights.double().cpu().numpy()


def _eigenthings_lanczos(steps: int) -> Callable[..., Eigen]:
    def eigs(problem: Problem, k: int, seed: int) -> Eigen:
        from hessian_eigenthings import lanczos

        with _settings(problem, seed):
            result = lanczos(_eigenthings(problem), k=k, max_iter=steps, reorthogonalize=True, seed=seed)
        return Eigen(result.eigenvalues.cpu().numpy(), result.eigenvectors.cpu().numpy(), steps)

    return eigs


def _eigenthings_hutchpp(problem: Problem, matvecs: int, seed: int) -> float:
    from hessian_eigenthings import hutch_plus_plus

    with _settings(problem, seed):
        return hutch_plus_plus(_eigenthings(problem), num_matvecs=matvecs, seed=seed).estimate


def _eigenthings_trace(problem: Problem, probes: int, seed: int) -> np.ndarray:
    from hessian_eigenthings import hutchinson

    with _settings(problem, seed):
        return hutchinson(_eigenthings(problem), num_samples=probes, seed=seed).samples.double().cpu().numpy()


# --- curvlinops ------------------------------------------------------------------------------------------------------


def _curvlinops(problem: Problem) -> Any:
    from curvlinops import HessianLinearOperator

    parameters = list(problem.model.parameters())
    # Without its checks, which cost two passes over the data.
    options = {"check_deterministic": False, "num_data": problem.batch[0].shape[0]}
    return HessianLinearOperator(problem.model, problem.criterion, parameters, [problem.batch], **options)


def _curvlinops_density(problem: Problem, steps: int, probes: int, seed: int) -> Spectrum:
    # The Lanczos runs behind lanczos_approximate_spectrum, without its search for the ends of the spectrum.
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    with _settings(problem, seed):
        operator = _curvlinops(problem)
        runs = [fast_lanczos(operator, steps) for _ in range(probes)]
    nodes = [values.double().cpu().numpy() for values, _ in runs]
    return np.stack(nodes), np.stack([vectors[0].double().cpu().numpy() ** 2 for _, vectors in runs])


def _curvlinops_arpack(tol: float) -> Callable[..., Eigen]:
    def eigs(problem: Problem, k: int, seed: int) -> Eigen:
        with _settings(problem, seed):
            operator = _curvlinops(problem)
            dtype = np.dtype(str(operator.dtype).removeprefix("torch."))
            start = np.random.default_rng(seed).standard_normal(problem.size).astype(dtype)
            inner, count = operator.to_scipy(dtype=dtype), itertools.count()
            counted = LinearOperator(inner.shape, lambda v: (next(count), inner.matvec(v))[1], dtype=inner.dtype)
            values, vectors = arpack(counted, k=k, which="LM", tol=tol, v0=start)
        return Eigen(values, vectors.T, next(count))

    return eigs


@dataclass(frozen=True)
class _InChunks:
    """An operator that pushes all columns through vmap at once, more than memory holds: here a few at a time."""

    operator: Any
    chunk: int = 4

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)

    def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.operator @ piece for piece in columns.split(self.chunk, dim=1)], dim=1)


def _curvlinops_trace(problem: Problem, probes: int, seed: int) -> np.ndarray:
    # One probe a call: it returns the mean alone, and the standard error needs the samples.
    from curvlinops import hutchinson_trace

    with _settings(problem, seed):
        operator = _curvlinops(problem)
        return np.array([float(hutchinson_trace(operator, 1)) for _ in range(probes)])


def _curvlinops_sketch(function: str) -> Callable[..., float]:
    def estimate(problem: Problem, matvecs: int, seed: int) -> float:
        import curvlinops

        with _settings(problem, seed):
            return float(getattr(curvlinops, function)(_InChunks(_curvlinops(problem)), matvecs))

    return estimate


# --- matfree ---------------------------------------------------------------------------------------------------------


def _matfree(function: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        import _matfree

        return getattr(_matfree, function)(*arguments)

    return call


def _matfree_lanczos(steps: int) -> Callable[..., Eigen]:
    return lambda problem, k, seed: Eigen(*_matfree("eigs")(problem, k, steps, seed), steps)


PEERS = (
    Peer(
        "PyHessian",
        "PyHessian",
        "pyhessian",
        "graph kept for its one batch; torch.eig, which torch removed, replaced by torch.linalg.eigh",
        _pyhessian_density,
        {
            "defaults": _pyhessian_eigs(100, 1e-3),
            **{f"maxIter=1000, tol={tol:g}": _pyhessian_eigs(1000, tol) for tol in (1e-4, 1e-5, 1e-6)},
        },
        _pyhessian_trace,
        {},
    ),
    Peer(
        "hessian-eigenthings",
        "hessian-eigenthings",
        "hessian_eigenthings",
        "exact products, full reorthogonalization",
        _eigenthings_density,
        {
            "defaults": _eigenthings_lanczos(10),
            **{f"max_iter={steps}": _eigenthings_lanczos(steps) for steps in (15, 20, 25, 30, 40, 50, 60, 80, 120)},
        },
        _eigenthings_trace,
        {"hutch++": _eigenthings_hutchpp},
    ),
    Peer(
        "curvlinops",
        "curvlinops-for-pytorch",
        "curvlinops",
        "determinism check off; no reorthogonalization; eigenpairs by SciPy's eigsh on its operator",
        _curvlinops_density,
        {f"eigsh(tol={tol:g})": _curvlinops_arpack(tol) for tol in (1e-2, 1e-3, 1e-4, 1e-5)},
        _curvlinops_trace,
        {"hutch++": _curvlinops_sketch("hutchpp_trace"), "xtrace": _curvlinops_sketch("xtrace")},
    ),
    Peer(
        "matfree",
        "matfree",
        "matfree",
        "JAX: jitted, product linearized once, probes one by one (vmap was slower on every model); times are without "
        "compilation, which is in the first call",
        _matfree("density"),
        {f"num_matvecs={steps}": _matfree_lanczos(steps) for steps in (20, 25, 30, 40, 60, 120)},
        _matfree("trace"),
        {"xtrace": _matfree("xtrace")},
    ),
)


def taking_part(names: Sequence[str] | None) -> list[Peer]:
    """Those of the names, or all, that can be run here."""
    return [peer for peer in PEERS if peer.installed and (names is None or peer.name in names)]


def notes(names: Sequence[str] | None) -> list[str]:
    """Versions and settings of the peers, and who does not take part."""
    here = taking_part(names)
    told = [f"{peer.name} {metadata.version(peer.distribution)}: {peer.note}" for peer in here]
    missing = [peer for peer in PEERS if peer not in here]
    return told + [f"{peer.name}: {'left out' if peer.installed else 'not installed'}" for peer in missing]
