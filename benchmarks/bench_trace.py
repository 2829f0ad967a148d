"""Which trace estimator to use: error against products on the spectra of trained networks, and stopping rules.

Claim: on what a network's few large eigenvalues leave over, Hutchinson's method needs a tenth of the products, and a
Krylov space of half of them is the cheapest way to find these; every standard error is what it says or larger.

The truth is the dense matrix, in float64, of small networks on scikit-learn's digits: an MLP after training (its
Hessian and its Gauss-Newton matrix) and a convolutional net with BatchNorm, at the start and after training. The
estimates are in the dtype asked for, with the dense matrix for products, over ``--repeats`` seeds. Errors are root mean
squares relative to the trace, with the root mean square of the standard errors in brackets. The products that find the
pairs for deflation are counted unless a row says that they are known. "PyHessian" is its rule to stop, on the same
probes: the running mean changed by less than 0.1 % from one probe to the next, or 100 probes.

    python benchmarks/bench_trace.py --out results
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import _harness as harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessfunc as hf

BUDGETS = (12, 24, 48, 96, 192)
PAIRS = 10
RTOL = 0.05
PASS = 200
SPECTRA = ("mlp", "mlp-gauss-newton", "conv-start", "conv")


@dataclass(frozen=True)
class Spectrum:
    """A matrix of which all is known."""

    name: str
    matrix: Tensor
    positive: bool

    @property
    def trace(self) -> float:
        """The truth."""
        return float(self.matrix.trace())

    def operator(self, dtype: torch.dtype) -> hf.Operator:
        """Products by the dense matrix."""
        return hf.as_operator(self.matrix.to(dtype))


def build(name: str, options: harness.Settings) -> Spectrum:
    """Train the network of that name and work out its matrix."""
    from sklearn.datasets import load_digits

    count, width, steps = (200, 6, 30) if options.quick else (600, 24, 150)
    digits = load_digits()
    x = torch.from_numpy(digits.data[:count] / 16).float()
    y = torch.from_numpy(digits.target[:count])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _mlp(width) if name.startswith("mlp") else _convolutional(width // 3)
    if not name.endswith("start"):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        draw = torch.Generator().manual_seed(0)
        for _ in range(steps):
            batch = torch.randint(0, count, (128,), generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model, data = model.double().eval().to(options.device), (x.double().to(options.device), y.to(options.device))
    positive = name.endswith("gauss-newton")
    if positive:
        call, params = hf.functionalize(model)
        operator = hf.ggn(call, F.cross_entropy, params, data)
    else:
        operator = hf.hessian(*hf.module_loss(model, F.cross_entropy), data)
    matrix = operator.dense(chunk_size=16)
    return Spectrum(name, (matrix + matrix.T) / 2, positive)


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def _convolutional(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()),
        *(nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.GELU()),
        *(nn.Flatten(), nn.Linear(16 * width, 10)),
    )


Method = Callable[[hf.Operator, torch.Generator, dict[str, float]], hf.Estimate]


def methods(spectrum: Spectrum, pairs: hf.Eigenpairs) -> dict[str, tuple[Method, Callable[[int], int]]]:
    """Each method as a call, and the number of probes that a number of products pays for."""

    def plain(estimator: Callable[..., hf.Estimate], **fixed: object) -> Method:
        return lambda H, generator, given: estimator(H, **given, **fixed, chunk_size=PASS, generator=generator)

    known = plain(hf.hutchinson, deflate=pairs)
    found = {
        "hutchinson": (plain(hf.hutchinson), lambda m: m),
        f"hutchinson, {len(pairs)} pairs from eigsh": (known, lambda m: m - 1 - pairs.num_matvecs),
        f"hutchinson, {len(pairs)} pairs known": (known, lambda m: m - 1),
        "deflated": (plain(hf.deflated), lambda m: m),
        "hutchpp": (plain(hf.hutchpp), lambda m: 2 * m // 3),
        "xtrace": (plain(hf.xtrace), lambda m: m // 2),
    }
    return found | ({"xnystrace": (plain(hf.xnystrace), lambda m: m)} if spectrum.positive else {})


def errors(spectrum: Spectrum, pairs: hf.Eigenpairs, options: harness.Settings) -> list[harness.Record]:
    """Errors of all methods at each number of products; the best at each is starred."""
    H, records = spectrum.operator(options.torch_dtype), []
    for name, (method, probes) in methods(spectrum, pairs).items():
        record: harness.Record = {
            "spectrum": spectrum.name,
            "method": name,
            "rms": {},
            "stated": {},
            "held": {},
            "naive": {},
        }
        for budget in BUDGETS[:2] if options.quick else BUDGETS:
            num = probes(budget)
            if num < 2 or budget > H.size // 2:
                continue
            runs = [
                method(H, torch.Generator().manual_seed(seed), {"num_probes": num}) for seed in range(options.repeats)
            ]
            gaps = [float(run) / spectrum.trace - 1 for run in runs]
            record["rms"][budget] = _root_mean_square(gaps)
            record["stated"][budget] = _root_mean_square([float(run.stderr) / spectrum.trace for run in runs])
            naive = [hf.Estimate.of(run.samples, num_matvecs=budget) for run in runs]
            record["held"][budget], record["naive"][budget] = _held(spectrum, runs), _held(spectrum, naive)
        records.append(record)
    for budget in BUDGETS:
        fair = [r["rms"][budget] for r in records if budget in r["rms"] and not r["method"].endswith("known")]
        for record in records:
            if budget in record["rms"]:
                star = "*" if record["rms"][budget] == min(fair) else ""
                stated = record["stated"][budget]
                record[str(budget)] = f"{100 * record['rms'][budget]:.2g}{star} ({100 * stated:.2g})"
        for record in records:
            record["held, %"] = _percent(record["held"])
            record["if independent, %"] = _percent(record["naive"]) if record["method"].startswith("x") else None
    return records


def _held(spectrum: Spectrum, runs: list[hf.Estimate]) -> float:
    """Share of the 95 % intervals that hold the trace."""
    return statistics.fmean(low <= spectrum.trace <= high for low, high in (run.interval() for run in runs))


def _percent(shares: dict[int, float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares.values())


def stops(spectrum: Spectrum, pairs: hf.Eigenpairs, options: harness.Settings) -> list[harness.Record]:
    """Products until each rule stops, and how often the error then is within the tolerance."""
    H = spectrum.operator(options.torch_dtype)
    rules: dict[str, Callable[[torch.Generator], tuple[float, int]]] = {"PyHessian": lambda g: _pyhessian(H, g)}
    for name, (method, probes) in methods(spectrum, pairs).items():
        before = -probes(0) if name.endswith("from eigsh") else 0

        def run(g: torch.Generator, method: Method = method, before: int = before) -> tuple[float, int]:
            estimate = method(H, g, {"rtol": RTOL, "max_probes": 4000})
            return float(estimate), estimate.num_matvecs + max(0, before - 1)

        rules[name] = run
    records = []
    for name, rule in rules.items():
        runs = [rule(torch.Generator().manual_seed(1000 + seed)) for seed in range(options.repeats)]
        gaps = sorted(abs(value / spectrum.trace - 1) for value, _ in runs)
        within = statistics.fmean(gap <= RTOL for gap in gaps)
        records.append(
            {
                "spectrum": spectrum.name,
                "rule": name,
                "products, median": statistics.median(count for _, count in runs),
                "products, most": max(count for _, count in runs),
                f"within {RTOL:.0%}": f"{within:.0%}",
                "95th percentile of the error": f"{gaps[math.ceil(0.95 * len(gaps)) - 1]:.1%}",
            }
        )
    return records


def _pyhessian(H: hf.Operator, generator: torch.Generator, *, tol: float = 1e-3, most: int = 100) -> tuple[float, int]:
    """What ``hessian.trace()`` of PyHessian does with these probes."""
    samples = hf.hutchinson(H, num_probes=most, chunk_size=PASS, generator=generator).samples.tolist()
    before = 0.0
    for count in range(1, most + 1):
        mean = statistics.fmean(samples[:count])
        if abs(mean - before) / (abs(before) + 1e-6) < tol:
            break
        before = mean
    return mean, count


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def main() -> None:
    """Run all methods on all spectra and print both tables."""
    parser = harness.parser(__doc__, models=SPECTRA, repeats=200)
    options = harness.settings(parser.parse_args())
    if options.quick:
        options = replace(options, repeats=4)
    accuracy, stopping, sizes = [], [], []
    for name in options.models:
        spectrum = build(name, options)
        pairs = hf.eigsh(
            spectrum.operator(options.torch_dtype), PAIRS, tol=0.1, generator=torch.Generator().manual_seed(0)
        )
        extreme = torch.linalg.eigvalsh(spectrum.matrix)[[0, -1]].tolist()
        sizes.append(
            f"{name}: {len(spectrum.matrix)} parameters, trace {spectrum.trace:.3g}, Frobenius norm "
            f"{float(spectrum.matrix.norm()):.3g}, eigenvalues {extreme[0]:.2g} to {extreme[1]:.3g}, "
            f"{pairs.num_matvecs} products for {PAIRS} pairs."
        )
        accuracy += errors(spectrum, pairs, options)
        stopping += stops(spectrum, pairs, options)
    tables = [
        harness.Table(
            "Error of the trace in % (in brackets what the standard error says) by number of products",
            accuracy,
            ["spectrum", "method", *map(str, BUDGETS), "held, %", "if independent, %"],
            [
                "* the best of those with all products counted. 'held': how often the 95 % interval held the trace, by "
                "number of products; 'if independent': the same with the standard error that independent samples "
                f"would have. {options.repeats} seeds.",
                *sizes,
            ],
        ),
        harness.Table(
            f"Stopping at a relative error of {RTOL:.0%} with 95 % confidence",
            stopping,
            list(stopping[0]),
            [f"{options.repeats} seeds."],
        ),
    ]
    harness.report("bench_trace", tables, accuracy + stopping, options)


if __name__ == "__main__":
    main()
