"""What changing precision, memory format or compiling does to a product: time, error, and bias of the trace.

Claim: none to be believed without a look at this table: each option is faster on some machines and slower on others.
The trace is estimated from the same probes with each option and in float64; the bias is the mean difference between
the two, relative to the trace, with the standard error of that mean. bfloat16 means parameters and inputs of that dtype
(Krylov vectors and inner products stay float32, as always).

    python benchmarks/bench_options.py --out results
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import _harness as harness
import _models as models
import torch

import hessfunc as hf

PROBES = 16
TOLERANCE = {"as it is": 1e-4, "channels_last": 1e-4, "compiled": 1e-4, "bfloat16": 0.5}


def plain(problem: models.Problem) -> hf.Operator:
    """The operator at its defaults."""
    return hf.hessian(problem.loss, problem.params, problem.batch)


def channels_last(problem: models.Problem) -> hf.Operator:
    """Images in channels_last, which convolutions pass on."""
    inputs, targets = problem.batch
    return hf.hessian(problem.loss, problem.params, (inputs.to(memory_format=torch.channels_last), targets))


def compiled(problem: models.Problem) -> hf.Operator:
    """The tangent program through torch.compile."""
    return hf.hessian(problem.loss, problem.params, problem.batch, compile=True, chunk_size=1)


def bfloat16(problem: models.Problem) -> hf.Operator:
    """Parameters, buffers and inputs in bfloat16."""
    model = copy.deepcopy(problem.model).bfloat16()
    inputs, targets = problem.batch
    inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    return hf.hessian(*hf.module_loss(model, problem.criterion), (inputs, targets))


OPTIONS: dict[str, Callable[[models.Problem], hf.Operator]] = {
    "as it is": plain,
    "channels_last": channels_last,
    "compiled": compiled,
    "bfloat16": bfloat16,
}


def run_model(name: str, options: harness.Settings) -> harness.Table:
    """Check every option's products against float64, then time one product of each in turns."""
    where = {"dtype": options.torch_dtype, "device": options.device}
    problem = models.build(name, quick=options.quick, train_steps=2 if options.quick else 60, **where)
    exact = models.in_float64(problem)
    count = 2 if options.quick else PROBES
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (count, problem.size), generator=generator).to(options.device).double() * 2 - 1
    truth = hf.hessian(exact.loss, exact.params, exact.batch).rows(probes)
    samples = (truth * probes).sum(dim=1)
    records, calls = [], {"gradient": problem.gradient}
    for label, build in OPTIONS.items():
        if (label == "channels_last" and problem.batch[0].dim() != 4) or (label == "compiled" and options.quick):
            continue
        record: harness.Record = {"model": name, "option": label}
        records.append(record)
        try:
            H = build(problem)
            rows = probes.to(H.dtype)
            products = torch.cat([H.rows(row.unsqueeze(0)) for row in rows]).double()
        except (RuntimeError, NotImplementedError) as error:
            record["failed"] = str(error).splitlines()[0]
            continue
        differences = (products * probes).sum(dim=1) - samples
        record["error"] = harness.relative_error(products, truth)
        record["trace bias"] = float(differences.mean() / samples.mean().abs())
        record["its stderr"] = float(differences.std() / count**0.5 / samples.mean().abs())
        record["agrees"] = record["error"] < TOLERANCE[label]
        calls[label] = lambda H=H, row=rows[:1]: H.rows(row)
    times = harness.interleaved(calls, repeats=options.repeats, device=options.device)
    for record in records:
        if record["option"] in times:
            record["gradients"] = harness.multiples(times[record["option"]], times["gradient"])
    columns = ["option", "gradients", "error", "trace bias", "its stderr"]
    return harness.Table(f"{name}: options of one product", records, columns, ["error of products against float64"])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a product is wrong."""
    options = harness.settings(harness.parser(__doc__, models=models.NAMES, repeats=9).parse_args(argv))
    tables = []
    for name in options.models:
        tables.append(run_model(name, options))
        print(f"{name}: done", file=sys.stderr)
    records = [record for table in tables for record in table.records]
    harness.report("bench_options", tables, records, options)
    return 0 if all(r.get("agrees") for r in records if "failed" not in r) else 1


if __name__ == "__main__":
    sys.exit(main())
