"""Trace of a trained network's Hessian to 2 % standard error, end to end, against every peer.

Claim: in a fraction of any peer's time for piecewise-linear classifiers, whose trace is had without probes; elsewhere
at the cost of the products, and the library finds the number of probes by itself, to its own error bar. The peers are
told how many probes of Hutchinson's estimator they need, from the variance of the reference run; their Hutch++ and
XTrace the smallest number of products of a ladder whose root-mean-square error over four seeds is below the target. A
user knows neither. "split" is the trace of the Gauss-Newton matrix from gradients of samples, which is that of the
Hessian in piecewise-linear networks; its products are those that look whether it is one, and do not count those
gradients. "apart" gives each sequence of the language model's batch probes of its own (``per_batch``), which no peer
offers; PyHessian called in a loop over the sequences does so too and is shown, with as many probes as it needs, but not
compared with. PyHessian is also shown with its own stopping rule. "traced before" starts from an operator that has made
a product, as matfree's rows do from compiled code. Answers have to lie within four standard errors of the reference.
Checks of the products are off in the libraries that have them.

    python benchmarks/bench_trace_peers.py --out results
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import _harness as harness
import _models as models
import _peers as peers
import numpy as np
import torch

import hessfunc as hf

TRAIN_STEPS = 60
MAX_PROBES = 5000
LADDER = (12, 24, 48, 96, 192)
MANY_OUTPUTS = ("gpt",)
APART = {"gpt": 1}
"""Samples in each piece of the batch that gets probes of its own."""

OUTSIDE = "(no peer) "
"""What the names of competitors begin with that others are not compared with."""

ONE_SIGMA = math.erf(math.sqrt(0.5))


@dataclass(frozen=True)
class Answer:
    """An estimate; ``stderr`` is None where the method has none."""

    value: float
    stderr: float | None
    matvecs: int


def of_samples(samples: np.ndarray) -> Answer:
    """Mean and standard error of independent samples, one product each."""
    return Answer(float(samples.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples))), len(samples))


def pieces(problem: models.Problem) -> list[models.Batch]:
    """The batch in the pieces that get probes of their own."""
    length = APART[problem.name]
    return list(zip(*(part.split(length) for part in problem.batch), strict=True))


def operator(problem: models.Problem, *, apart: bool) -> hf.Operator:
    """The library's operator, from the model."""
    loss, params = hf.module_loss(problem.model, problem.criterion)
    return hf.hessian(loss, params, pieces(problem) if apart else problem.batch, check=False)


def ours(
    problem: models.Problem,
    seed: int,
    tolerance: dict[str, float],
    pairs: int = 0,
    *,
    apart: bool = False,
    traced: hf.Operator | None = None,
) -> Answer:
    """The library, from the model or a traced operator to an estimate with the standard error that was asked for."""
    generator = torch.Generator().manual_seed(seed)
    H = operator(problem, apart=apart) if traced is None else traced
    known, spent = None, 0
    if pairs:
        known = hf.eigsh(H, pairs, tol=0.1, generator=generator)
        spent = known.num_matvecs
    trace = hf.hutchinson(
        H,
        **tolerance,
        confidence=ONE_SIGMA,
        max_probes=4 * MAX_PROBES,
        deflate=known,
        per_batch=apart,
        generator=generator,
    )
    return Answer(float(trace.value), float(trace.stderr), spent + trace.num_matvecs)


def split(problem: models.Problem, seed: int, tolerance: dict[str, float]) -> Answer:
    """The library's exact Gauss-Newton part, from the model on, and probes only where something is left over."""
    model_fn, params = hf.functionalize(problem.model)
    trace = hf.split_trace(
        model_fn,
        problem.criterion,
        params,
        problem.batch,
        **tolerance,
        confidence=ONE_SIGMA,
        max_probes=4 * MAX_PROBES,
        check=False,
        generator=torch.Generator().manual_seed(seed),
    )
    return Answer(float(trace.value), float(trace.stderr), trace.num_matvecs)


def apart(peer: peers.Peer, problem: models.Problem, probes: int, seed: int) -> Answer:
    """A peer called for each piece of the batch by itself; pieces are of one size."""
    each = []
    for number, batch in enumerate(pieces(problem)):
        part = dataclasses.replace(problem, batches=[batch])
        each.append(peer.trace(part, probes, 1000 * seed + number))
    samples = np.array(each)
    variance = samples.var(axis=1, ddof=1).sum() / len(samples) ** 2
    return Answer(float(samples.mean()), math.sqrt(variance / probes), probes)


def probes_apart(problem: models.Problem, truth: float, target: float) -> int:
    """Probes of each piece that the target takes, from the variance of 16."""
    H = hf.hessian(problem.loss, problem.params, pieces(problem))
    trial = hf.hutchinson(H, num_probes=16, per_batch=True, generator=torch.Generator().manual_seed(54321))
    return max(2, math.ceil(16 * (float(trial.stderr) / truth / target) ** 2))


def climb(sketch: Callable[..., float], problem: models.Problem, truth: float, target: float) -> int | None:
    """The smallest number of products whose root-mean-square error over four seeds is below the target."""
    for matvecs in LADDER:
        errors = [sketch(problem, matvecs, seed) / truth - 1 for seed in range(4)]
        if math.sqrt(np.mean(np.square(errors))) <= target:
            return matvecs
    return None


def competitors(
    problem: models.Problem,
    truth: float,
    probes: int,
    target: float,
    options: harness.Settings,
    arguments: argparse.Namespace,
) -> dict[str, Callable[[int], Answer]]:
    """Everyone with the settings that the target needs."""
    # A barely trained network's trace can be as good as zero: the quick form has an absolute tolerance.
    tolerance = {"atol": target * abs(truth)} if arguments.quick else {"rtol": target}
    result: dict[str, Callable[[int], Answer]] = {}
    if problem.name not in MANY_OUTPUTS:
        result["hessfunc, split"] = lambda seed: split(problem, seed, tolerance)
    if probes > arguments.most_probes:
        return result
    result["hessfunc"] = lambda seed: ours(problem, seed, tolerance)
    if problem.name in APART:
        result["hessfunc, apart"] = lambda seed: ours(problem, seed, tolerance, apart=True)
        traced = operator(problem, apart=True)
        traced.vector(torch.ones(traced.size, dtype=traced.dtype, device=traced.device))
        result["hessfunc, apart, traced before"] = lambda seed: ours(
            problem, seed, tolerance, apart=True, traced=traced
        )
    for pairs in arguments.deflate:
        result[f"hessfunc, {pairs} pairs deflated"] = lambda seed, pairs=pairs: ours(problem, seed, tolerance, pairs)
    for peer in peers.taking_part(options.peers):
        label = f"{peer.name}, {probes} probes"
        result[label] = lambda seed, trace=peer.trace: of_samples(trace(problem, probes, seed))
        for way, sketch in {} if arguments.quick else peer.sketch.items():
            matvecs = climb(sketch, problem, truth, target)
            if matvecs is None:
                print(f"  {peer.name}, {way}: not to the target in {LADDER[-1]} products", file=sys.stderr)
                continue
            result[f"{peer.name}, {way} of {matvecs}"] = lambda seed, sketch=sketch, m=matvecs: Answer(
                sketch(problem, m, seed), None, m
            )
        if peer.name == "PyHessian" and problem.name in APART:
            own = probes_apart(problem, truth, target)
            result[f"{OUTSIDE}PyHessian in a loop, {own} probes apart"] = lambda seed, peer=peer, own=own: apart(
                peer, problem, own, seed
            )
        if peer.name == "PyHessian":
            result["PyHessian, own stopping rule"] = lambda seed: of_samples(peers.pyhessian_default(problem, seed))
    return result


def run_model(name: str, options: harness.Settings, arguments: argparse.Namespace) -> harness.Table:
    """Estimate the truth and the variance, then check and time everyone."""
    where = {"dtype": options.torch_dtype, "device": options.device}
    problem = models.build(name, train_steps=10 if options.quick else TRAIN_STEPS, quick=options.quick, **where)
    H = hf.hessian(problem.loss, problem.params, problem.batch)
    num = 16 if options.quick else arguments.reference_probes
    truth = hf.hutchinson(H, num_probes=num, generator=torch.Generator().manual_seed(54321))
    value, noise = float(truth.value), float(truth.stderr)
    target = noise / abs(value) if options.quick else arguments.target
    # One more than a normal sample needs, so that a peer does not miss the target by a hair.
    probes = max(2, math.ceil((noise * math.sqrt(num) / value / target) ** 2) + 1)
    notes = [f"reference {value:.5g} +- {noise:.2g} from {num} probes; error and stderr relative to it"]
    if probes > arguments.most_probes:
        notes.append(f"plain probes were not run: it would take {probes:,} of them")

    def judge(answer: Answer) -> harness.Record:
        record: harness.Record = {"products": answer.matvecs, "error": abs(answer.value / value - 1)}
        stderr = target * abs(value) if answer.stderr is None else answer.stderr
        if answer.stderr is not None:
            record["stderr"] = answer.stderr / abs(value)
        within = abs(answer.value - value) <= 4 * math.hypot(stderr, noise)
        record["agrees"] = within and stderr <= 1.5 * target * abs(value)
        return record

    calls = competitors(problem, value, probes, target, options, arguments)
    records = harness.race(
        calls, judge, gradient=problem.gradient, options=options, budget=arguments.budget, outside=OUTSIDE
    )
    for record in records:
        record["model"] = name
        record["to target"] = "yes" if record["agrees"] else "no"
    columns = ["library", "to target", "seconds", "gradients", "to fastest peer", "products", "stderr", "error"]
    title = f"{name}: trace to {target:.2g} standard error"
    return harness.Table(title, records, [*columns, "first call s"], [*notes, *peers.notes(options.peers)])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if the library's own estimate is wrong."""
    parser = harness.parser(__doc__, models=models.NAMES, repeats=5)
    parser.add_argument("--target", type=float, default=0.02, help="standard error relative to the trace")
    parser.add_argument("--reference-probes", type=int, default=400, help="probes of the reference run")
    parser.add_argument(
        "--deflate", type=int, nargs="*", default=[5, 10], help="also run hessfunc with that many pairs"
    )
    parser.add_argument("--most-probes", type=int, default=MAX_PROBES, help="run no more plain probes than these")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of timed rounds per model")
    arguments = parser.parse_args(argv)
    options = harness.settings(arguments)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")  # PyHessian's way
    tables = []
    for name in options.models:
        tables.append(run_model(name, options, arguments))
        print(f"{name}: done", file=sys.stderr)
    records = [record for table in tables for record in table.records]
    harness.report("bench_trace_peers", tables, records, options)
    return 0 if all(r["agrees"] for r in records if r["library"].startswith("hessfunc")) else 1


if __name__ == "__main__":
    sys.exit(main())
