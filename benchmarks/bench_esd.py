"""Spectral density of a trained network's Hessian, end to end: time and error against every peer.

Claim: from some hundred thousand parameters on, the error that peers have after 100 steps of 4 probes is reached with
far fewer products, by means of rules and exact outliers: PyHessian's in a fifth to a nineteenth of its time, that of
matfree's compiled code in a third to a fourteenth; on the smallest network matfree is ahead. The error is the
Wasserstein-1 distance to the spectrum, over its width: to the dense Hessian's where there is one (9k parameters), else
to that of a quadrature with far more probes and steps (its own noise is in the notes). Every library gets the same
network, batch, dtype and threads, starts from the model, and runs with a new seed each round. Checks of the products
are off in the libraries that have them. All run with fewer steps and probes too, since what counts is the time for an
error: each row of a peer is compared with the library's fastest row that is as accurate or more, and the other way
round.

    python benchmarks/bench_esd.py --out results
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import _harness as harness
import _models as models
import _peers as peers
import numpy as np
import torch
from scipy.stats import wasserstein_distance

import hessfunc as hf

AS_ACCURATE = "to fastest as accurate"
"""Of a peer, for the library's rows; of the library, for those of peers."""

DENSE_LIMIT = 10_000
TRAIN_STEPS = 60


def ours(problem: models.Problem, steps: int, probes: int, seed: int, **options: object) -> peers.Spectrum:
    """The library, from the model to nodes and weights."""
    loss, params = hf.module_loss(problem.model, problem.criterion)
    generator = torch.Generator().manual_seed(seed)
    H = hf.hessian(loss, params, problem.batch, check=False)
    result = hf.slq(H, num_steps=steps, num_probes=probes, generator=generator, **options)
    return result.nodes.numpy(), result.weights.numpy()


def competitors(names: Sequence[str] | None, probes: int) -> dict[str, Callable[..., peers.Spectrum]]:
    """Everyone who is installed, by the name that the table shows."""
    result: dict[str, Callable[..., peers.Spectrum]] = {}
    if probes == 1:  # where exact outliers have to be asked for
        result["hessfunc, exact_outliers=True"] = functools.partial(ours, exact_outliers=True)
    else:
        result["hessfunc"] = ours
    result["hessfunc, exact_outliers=False"] = functools.partial(ours, exact_outliers=False)
    result |= {peer.name: peer.density for peer in peers.taking_part(names)}
    return result


def flat(spectrum: peers.Spectrum) -> peers.Spectrum:
    """The mean over the probes as one list of nodes with weights of sum 1."""
    nodes, weights = spectrum
    return nodes.ravel(), weights.ravel() / weights.sum()


def distance(left: peers.Spectrum, right: peers.Spectrum) -> float:
    """Wasserstein-1 distance between two spectra."""
    (x, p), (y, q) = flat(left), flat(right)
    return float(wasserstein_distance(x, y, p, q))


def reference(
    problem: models.Problem, options: harness.Settings, steps: int, probes: int
) -> tuple[peers.Spectrum, str]:
    """The spectrum to compare with and a note on it; kept in the output folder, since it takes long."""
    dense = problem.size <= DENSE_LIMIT and not options.quick
    name = f"reference-{problem.name}-{options.dtype}-{'dense' if dense else f'{steps}x{probes}'}.npz"
    path = None if options.out is None else Path(options.out) / name
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as saved:
            spectrum = saved["nodes"], saved["weights"]
    elif dense:
        exact = models.in_float64(problem)
        values = torch.linalg.eigvalsh(hf.hessian(exact.loss, exact.params, exact.batch).dense()).cpu().numpy()
        spectrum = values[None], np.full((1, len(values)), 1 / len(values))
    else:
        chunks = [ours(problem, steps, min(4, probes - i), 1000 + i) for i in range(0, probes, 4)]
        width = max(nodes.shape[1] for nodes, _ in chunks)
        pad = [((0, 0), (0, width - nodes.shape[1])) for nodes, _ in chunks]
        spectrum = (
            np.concatenate([np.pad(nodes, p) for (nodes, _), p in zip(chunks, pad, strict=True)]),
            np.concatenate([np.pad(weights, p) for (_, weights), p in zip(chunks, pad, strict=True)]),
        )
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, nodes=spectrum[0], weights=spectrum[1])
    if dense:
        return spectrum, "error against the eigenvalues of the dense Hessian in float64"
    half = len(spectrum[0]) // 2
    first, second = ((spectrum[0][part], spectrum[1][part]) for part in (slice(half), slice(half, None)))
    noise = distance(first, second) / _width(spectrum) / 2
    return (
        spectrum,
        f"error against a quadrature of {probes} probes and {steps} steps, good to {noise:.1e} as far as probes go",
    )


def _width(spectrum: peers.Spectrum) -> float:
    nodes = spectrum[0][spectrum[1] > 0]
    return float(nodes.max() - nodes.min())


def run_model(name: str, options: harness.Settings, arguments: argparse.Namespace) -> harness.Table:
    """Check everyone's spectrum, then time them in turns."""
    steps, probes = (10, 2) if options.quick else (arguments.steps, arguments.probes)
    trained = 2 if options.quick else TRAIN_STEPS
    where = {"dtype": options.torch_dtype, "device": options.device}
    problem = models.build(name, train_steps=trained, quick=options.quick, **where)
    more = (20, 4) if options.quick else (arguments.reference_steps, arguments.reference_probes)
    truth, note = reference(problem, options, *more)
    width = _width(truth)

    def judge(spectrum: peers.Spectrum) -> harness.Record:
        error = distance(spectrum, truth) / width
        return {"W1 / width": error, "agrees": error < arguments.worst}

    def run(density: Callable[..., peers.Spectrum], steps: int, probes: int) -> Callable[[int], peers.Spectrum]:
        return lambda seed: density(problem, steps, probes, seed)

    sizes = [(steps, probes), (steps, 1)] if options.quick else [(steps, probes), *arguments.fewer]
    calls = {
        f"{label}, {m} x {k}": run(density, m, k)
        for m, k in sizes
        for label, density in competitors(options.peers, k).items()
    }
    records = harness.race(calls, judge, gradient=problem.gradient, options=options, budget=arguments.budget)
    for record in records:
        record["model"] = name
        is_ours = record["library"].startswith("hessfunc")
        rivals = [
            other["seconds"].median
            for other in records
            if "seconds" in other
            and other["library"].startswith("hessfunc") != is_ours
            and other["W1 / width"] <= record.get("W1 / width", -1)
        ]
        record[AS_ACCURATE] = record["seconds"].median / min(rivals) if rivals else None
    columns = ["library", "seconds", "gradients", AS_ACCURATE, "W1 / width", "first call s"]
    title = f"{name}: density, steps x probes"
    return harness.Table(title, records, columns, [note, *peers.notes(options.peers)])


def _size(text: str) -> tuple[int, int]:
    steps, probes = text.split("x")
    return int(steps), int(probes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if the library's own spectrum is wrong."""
    parser = harness.parser(__doc__, models=models.NAMES, repeats=5)
    parser.add_argument("--steps", type=int, default=100, help="Lanczos steps")
    parser.add_argument("--probes", type=int, default=4, help="probes")
    parser.add_argument(
        "--fewer",
        type=_size,
        nargs="*",
        default=[(100, 1), (80, 1), (60, 2), (60, 1), (40, 1)],
        help="smaller numbers, as in 60x2",
    )
    parser.add_argument("--reference-steps", type=int, default=200, help="steps of the reference quadrature")
    parser.add_argument("--reference-probes", type=int, default=16, help="probes of the reference quadrature")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds of timed rounds per model")
    parser.add_argument("--worst", type=float, default=0.05, help="largest W1 / width that counts as an answer")
    arguments = parser.parse_args(argv)
    options = harness.settings(arguments)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")  # PyHessian's way
    warnings.filterwarnings("ignore", category=hf.ConvergenceWarning)  # no outliers in so few steps, which is an answer
    tables = []
    for name in options.models:
        tables.append(run_model(name, options, arguments))
        print(f"{name}: done", file=sys.stderr)
    records = [record for table in tables for record in table.records]
    harness.report("bench_esd", tables, records, options)
    return 0 if all(r.get("agrees") for r in records if r["library"].startswith("hessfunc")) else 1


if __name__ == "__main__":
    sys.exit(main())
