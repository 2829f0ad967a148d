"""How close stochastic Lanczos quadrature comes to a spectrum that is known in full.

Claim: exact outliers, which cost no further product, save more error than ten times the probes do; the mean of the
last quarter's rules saves a quarter to two fifths of what is left then, and is never worse than the last rule;
reorthogonalization of the probes saves little. The truth is the dense Hessian, in float64, of a network trained on
scikit-learn's digits; the runs are in the dtype asked for. Each figure is over ``--repeats`` seeds: W1 is the mean
Wasserstein-1 distance, trace the root mean square error, outliers the number of eigenvalues above 5 % of the largest.
"spread / stderr" tells whether the error of the trace is what its standard error says (1 if so). Products are by
the dense matrix, so the seconds are those of the method rather than of a network.

    python benchmarks/bench_density.py --out results
"""

from __future__ import annotations

import math
import statistics

import _harness as harness
import torch
import torch.nn.functional as F

from hessfunc import Operator, hessian
from hessfunc._quadrature import Quadrature
from hessfunc._slq import slq

STEPS = (40, 80)
PROBES = (1, 10)
METHODS = {
    "plain, no reorthogonalization": {"exact_outliers": False, "reorthogonalize": "none"},
    "plain, full": {"exact_outliers": False, "reorthogonalize": "full"},
    "exact outliers, no reorthogonalization": {"exact_outliers": True, "reorthogonalize": "none"},
    "exact outliers, full": {"exact_outliers": True, "reorthogonalize": "full"},
    "plain, last rule alone": {"exact_outliers": False, "num_rules": 1},
    "exact outliers, last rule alone": {"exact_outliers": True, "num_rules": 1},
}


def trained_hessian(options: harness.Settings) -> tuple[torch.Tensor, float]:
    """The dense Hessian of a small network at the end of training, in float64, and the training accuracy."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    count, hidden, steps = (300, 8, 40) if options.quick else (1797, 32, 300)
    x = torch.from_numpy(digits.data[:count] / 16).to(options.device)
    y = torch.from_numpy(digits.target[:count]).to(options.device)
    draw = torch.Generator().manual_seed(0)
    sizes = {"0": (64, hidden), "1": (hidden, 10)}
    params = {name: torch.randn(*size, generator=draw).double() / size[0] ** 0.5 for name, size in sizes.items()}
    params |= {f"{name}.bias": torch.zeros(size[1]).double() for name, size in sizes.items()}
    params = {name: leaf.to(options.device).requires_grad_() for name, leaf in params.items()}

    def logits(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ p["0"] + p["0.bias"]) @ p["1"] + p["1.bias"]

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(p, x), y)

    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params, x, y).backward()
        optimizer.step()
    matrix = hessian(loss, params, (x, y)).dense(chunk_size=32)
    return (matrix + matrix.T) / 2, float((logits(params, x).argmax(1) == y).double().mean())


def measure(
    method: str, steps: int, probes: int, matrix: torch.Tensor, truth: torch.Tensor, options: harness.Settings
) -> harness.Record:
    """One row: errors over the seeds, and the time of the first run."""
    matrix = matrix.to(options.torch_dtype)
    H = Operator(matrix[0], lambda rows: rows @ matrix)

    def run(seed: int) -> Quadrature:
        draw = torch.Generator().manual_seed(seed)
        return slq(H, num_steps=steps, num_probes=probes, **METHODS[method], generator=draw)

    runs = [run(harness.FIRST_SEED + i) for i in range(options.repeats)]
    width, trace, limit = float(truth[-1] - truth[0]), float(truth.sum()), 0.05 * float(truth.abs().max())
    traces = [quadrature.trace() for quadrature in runs]
    errors = [float(estimate.value) - trace for estimate in traces]
    counts = [float(quadrature.count(low=limit).value) for quadrature in runs]
    spread = math.sqrt(statistics.fmean(error**2 for error in errors))
    stated = math.sqrt(statistics.fmean(float(estimate.stderr) ** 2 for estimate in traces))
    return {
        "method": method,
        "steps": steps,
        "probes": probes,
        "matvecs": runs[0].num_matvecs,
        "W1 / width": statistics.fmean(quadrature.wasserstein(truth) / width for quadrature in runs),
        "trace error": f"{100 * spread / trace:.2g} %",
        "spread / stderr": spread / stated if probes > 1 else None,
        "outliers": f"{statistics.fmean(counts):.1f} ± {statistics.pstdev(counts):.1f}",
        "exact": statistics.fmean(quadrature.num_exact for quadrature in runs),
        "ms": 1e3 * harness.seconds(lambda: run(0), device=options.device),
        "trace errors": errors,
        "counts": counts,
        "a priori": runs[0].error_bound().distance / width,
    }


def main() -> None:
    """Run all methods and print their table."""
    parser = harness.parser(__doc__, models=["digits"], repeats=24)
    options = harness.settings(parser.parse_args())
    matrix, accuracy = trained_hessian(options)
    truth = torch.linalg.eigvalsh(matrix).cpu()
    steps, probes = ((10,), (1, 3)) if options.quick else (STEPS, PROBES)
    records = [
        measure(method, m, count, matrix, truth, options) for m in steps for count in probes for method in METHODS
    ]
    above = int((truth > 0.05 * truth.abs().max()).sum())
    title = f"Quadrature against the dense spectrum, {len(truth)} parameters, {accuracy:.1%} training accuracy"
    columns = ["method", "steps", "probes", "matvecs", "W1 / width", "trace error", "spread / stderr", "outliers"]
    note = (
        f"True outliers: {above}. Means over {options.repeats} seeds. One probe has no standard error. The pairs with "
        "an exact mass number 'exact' on average; the first probe, which finds them, is always reorthogonalized."
    )
    harness.report(
        "bench_density", [harness.Table(title, records, [*columns, "exact", "ms"], [note])], records, options
    )


if __name__ == "__main__":
    main()
