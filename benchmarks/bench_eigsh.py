"""Products that eigsh needs, against ARPACK (SciPy's eigsh) on the same operator at the same tolerance.

Claim: seldom more products than ARPACK, with a certificate on top. ARPACK trusts its own estimate of the residuals and
looks for nothing it may have passed by: ``search alone`` does neither and is what compares with it (``ratio``);
``hessfunc`` includes the product that checks the residuals, or k for each of them where that does not do, and the
search for missed pairs. Both start from the same random
vector; figures are medians over the seeds. ``error`` is that of the worst eigenvalue: a residual within the tolerance
leaves room for it where eigenvalues lie closer together than that. ``missed`` counts wanted eigenvalues that an answer
lacks to 1 %, in all seeds together.

    python benchmarks/bench_eigsh.py --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import _harness as harness
import _models as models
import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

import hessfunc as hf

N = 1000
COUNTS = (1, 5, 10, 20)
SEEDS = 5


def spectra() -> dict[str, np.ndarray]:
    """Prescribed eigenvalues, from easy to hard."""
    generator = np.random.default_rng(0)
    bulk = generator.standard_normal(N) * 0.01
    outliers = np.concatenate([np.geomspace(10, 0.2, 20), bulk[20:]])
    clustered = np.concatenate([np.repeat([10.0, 9.99, 8.0, 5.0], 3), np.linspace(2, 1, 18), bulk[30:]])
    indefinite = np.concatenate([np.geomspace(5, 0.2, 15), -np.geomspace(4.5, 0.2, 15), bulk[30:]])
    return {
        "outliers and bulk": outliers,
        "1 / i": 1 / np.arange(1, N + 1),
        "1 / i^2": 1 / np.arange(1, N + 1) ** 2,
        "both signs": indefinite,
        "threefold and close": clustered,
        "semicircle": np.cos(np.linspace(0, np.pi, N)) + 0.02,
    }


def operators(options: harness.Settings) -> dict[str, hf.Operator]:
    """Matrices with these spectra in a random basis, and Hessians of trained networks."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    result = {}
    chosen = list(spectra().items())[:2] if options.quick else spectra().items()
    for name, values in chosen:
        matrix = (basis * torch.from_numpy(values)) @ basis.T
        result[name] = hf.as_operator(((matrix + matrix.T) / 2).to(device=options.device, dtype=options.torch_dtype))
    for name in options.models:
        steps = 2 if options.quick else 60
        where = {"dtype": options.torch_dtype, "device": options.device}
        problem = models.build(name, train_steps=steps, quick=options.quick, **where)
        result[name] = hf.hessian(problem.loss, problem.params, problem.batch)
    return result


def by_arpack(H: hf.Operator, k: int, tol: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Values, rows and products of SciPy's eigsh, with its defaults."""
    inner = H.to_scipy()
    count = 0

    def matvec(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return inner.matvec(vector)

    counted = LinearOperator(inner.shape, matvec=matvec, dtype=inner.dtype)
    start = start_vector(H, seed).cpu().numpy()
    try:
        values, vectors = arpack(counted, k=k, which="LM", tol=tol, v0=start)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    to = {"device": H.device, "dtype": H.dtype}
    return torch.from_numpy(values).to(**to), torch.from_numpy(vectors.T.copy()).to(**to), count


def start_vector(H: hf.Operator, seed: int) -> torch.Tensor:
    """A random vector, the same for both."""
    start = torch.randn(H.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return start.to(device=H.device, dtype=H.dtype)


def by_hessfunc(H: hf.Operator, k: int, tol: float, seed: int, **options: Any) -> tuple[Any, Any, int]:
    """Values, rows and products of the library's eigsh; it warns, here an error, if a pair has not converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ConvergenceWarning)
        start = H.layout.unravel(start_vector(H, seed))
        generator = torch.Generator().manual_seed(seed)
        pairs = hf.eigsh(H, k, tol=tol, v0=start, generator=generator, **options)
    return pairs.eigenvalues, pairs.rows(), pairs.num_matvecs


def search_alone(H: hf.Operator, k: int, tol: float, seed: int) -> int:
    """Products that find the pairs: without the search for missed ones, and without the check of the residuals."""
    passes: list[int] = []

    def rows(rows: torch.Tensor) -> torch.Tensor:
        passes.append(len(rows))
        return H.rows(rows)

    spent = by_hessfunc(hf.Operator(H.like, rows), k, tol, seed, verify_steps=0)[2]
    return spent - passes[-1]  # one product for all residuals, or the pass with one for each of them


def residual(H: hf.Operator, values: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest ``|H v - lambda v| / |lambda|``."""
    products = torch.cat([H.rows(row.unsqueeze(0)) for row in rows])
    return float(((products - values.unsqueeze(1) * rows).norm(dim=1) / values.abs()).max())


def missed(values: torch.Tensor, truth: np.ndarray) -> int:
    """How many of the wanted eigenvalues have no counterpart within 1 %, each counterpart used once."""
    left = list(values.double().cpu().numpy())
    count = 0
    for wanted in truth:
        close = [value for value in left if abs(value - wanted) <= 1e-2 * abs(wanted)]
        if close:
            left.remove(min(close, key=lambda value: abs(value - wanted)))
        else:
            count += 1
    return count


def worst_error(values: torch.Tensor, truth: np.ndarray) -> float:
    """The largest relative error of an eigenvalue, both lists sorted by value."""
    given, wanted = np.sort(values.double().cpu().numpy()), np.sort(truth)
    return float(np.max(np.abs(given - wanted) / np.abs(wanted))) if len(given) == len(wanted) else float("nan")


def truths(name: str, H: hf.Operator, most: int) -> np.ndarray:
    """The eigenvalues of largest magnitude: prescribed, or found with a tight tolerance and pairs to spare."""
    if name in spectra():
        values = spectra()[name]
    else:
        generator = torch.Generator().manual_seed(999)
        values = hf.eigsh(H, most + 5, tol=1e-4, block_size=2, generator=generator).eigenvalues.double().cpu().numpy()
    return values[np.argsort(-np.abs(values), kind="stable")]


def compare(name: str, H: hf.Operator, counts: list[int], tol: float, seeds: int) -> list[harness.Record]:
    """One record for each k."""
    solvers: dict[str, Callable[..., Any]] = {"hessfunc": by_hessfunc, "ARPACK": by_arpack}
    truth = truths(name, H, max(counts))
    records = []
    for k in counts:
        record: harness.Record = {"spectrum": name, "k": k}
        for solver, solve in solvers.items():
            answers = [solve(H, k, tol, seed) for seed in range(seeds)]
            record[solver] = statistics.median(products for _, _, products in answers)
            record[f"{solver} residual"] = statistics.median(residual(H, values, rows) for values, rows, _ in answers)
            record[f"{solver} error"] = statistics.median(worst_error(values, truth[:k]) for values, _, _ in answers)
            record[f"{solver} missed"] = sum(missed(values, truth[:k]) for values, _, _ in answers)
        record["search alone"] = statistics.median(search_alone(H, k, tol, seed) for seed in range(seeds))
        record["ratio"] = record["search alone"] / record["ARPACK"]
        records.append(record)
        print(f"{name}, k = {k}: done", file=sys.stderr)
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if the library misses an eigenvalue."""
    parser = harness.parser(__doc__, models=models.NAMES, repeats=SEEDS)
    parser.set_defaults(models=["mlp-9k", "mlp-670k", "resnet-20"])
    parser.add_argument("--tol", type=float, default=1e-3, help="residual relative to |lambda|")
    parser.add_argument("--counts", type=int, nargs="+", default=None, help="numbers of pairs")
    arguments: argparse.Namespace = parser.parse_args(argv)
    options = harness.settings(arguments)
    counts = arguments.counts or ([1, 3] if options.quick else list(COUNTS))
    if options.quick:
        options = dataclasses.replace(options, models=[])
    records = []
    for name, H in operators(options).items():
        records += compare(name, H, counts, arguments.tol, options.repeats)
    columns = ["spectrum", "k", "search alone", "ARPACK", "ratio", "hessfunc"]
    columns += [f"{solver} {what}" for what in ("residual", "error", "missed") for solver in ("hessfunc", "ARPACK")]
    notes = [f"products to a residual of {arguments.tol:g} |lambda|; medians over {options.repeats} seeds"]
    harness.report("bench_eigsh", [harness.Table("Matrix-vector products", records, columns, notes)], records, options)
    return 0 if not any(record["hessfunc missed"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
