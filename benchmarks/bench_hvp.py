"""One Hessian-vector product: what each way to compute it costs in time and memory, in gradients.

Claim: a product with the Hessian costs one to two gradients once the primal pass is shared, on any of four kinds of
network, and no more per probe when several probes share it. Rivals: double backprop, with its graph kept alive for one
batch (PyHessian) and afresh (PyHessian's data loader, hessian-eigenthings), torch.func's jvp of grad (curvlinops) and
torch.func.linearize. The three orders of differentiation are measured eagerly, and the two that can be traced also
traced; the first of them also compiled.

Every product is compared with double backprop in float64 before it is timed. The column of flops has the operations in
its matrix products and convolutions, in those of a gradient: where time keeps to it, there is nothing left to save. For
the library's operators there is also the time that passes inside of these, with one probe and with the most (columns
"inside"): the rest is what another library on the same kernels could save at most.

    python benchmarks/bench_hvp.py --out results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import _harness as harness
import _models as models
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hessfunc as hf

PROBES = (1, 2, 4, 8)
INSIDE = (1, 8)
"""Numbers of probes for which the time inside of matrix products is measured."""

BATCHES = 4
TOLERANCE = {"float32": 2e-4, "float64": 1e-9}

Rows = torch.Tensor
Product = Callable[[Rows], Rows]


def kept_graph(problem: models.Problem) -> Product:
    """Double backprop on one batch: the gradient's graph stays alive, each probe is a backward pass through it."""
    parameters = list(problem.model.parameters())
    gradient = _gradient_graph(problem, parameters)
    return _row_by_row(problem, lambda tangents: torch.autograd.grad(gradient, parameters, tangents, True))


def afresh(problem: models.Problem) -> Product:
    """Double backprop that builds its graph for every product, as over a data loader."""
    parameters = list(problem.model.parameters())

    def single(tangents: list[torch.Tensor]) -> Any:
        return torch.autograd.grad(_gradient_graph(problem, parameters), parameters, tangents)

    return _row_by_row(problem, single)


def _gradient_graph(problem: models.Problem, parameters: list[Any]) -> Any:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        value = problem.criterion(problem.model(problem.batch[0]), problem.batch[1])
        return torch.autograd.grad(value, parameters, create_graph=True)


def _row_by_row(problem: models.Problem, single: Callable[[list[torch.Tensor]], Any]) -> Product:
    layout = hf.tree.Layout.of(problem.params)

    def product(rows: Rows) -> Rows:
        products = [single(list(layout.unravel(row).values())) for row in rows]
        return torch.stack([layout.ravel(dict(zip(problem.params, leaves, strict=True))) for leaves in products])

    return product


def _vmapped(problem: models.Problem, single: Callable[[Any], Any]) -> Product:
    """Alone for one probe and under vmap for several."""
    layout = hf.tree.Layout.of(problem.params)

    def product(rows: Rows) -> Rows:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if rows.shape[0] == 1:
                return layout.ravel(single(layout.unravel(rows[0]))).unsqueeze(0)
            return layout.ravel_rows(torch.func.vmap(single)(layout.unravel_rows(rows)))

    return product


def jvp_of_grad(problem: models.Problem) -> Product:
    """The textbook form, as curvlinops has it."""
    gradient = torch.func.grad(lambda p: problem.loss(p, *problem.batch))
    return _vmapped(problem, lambda v: torch.func.jvp(gradient, (problem.params,), (v,))[1])


def linearized(problem: models.Problem) -> Product:
    """torch.func.linearize of the gradient at one batch, made once and reused."""
    gradient = torch.func.grad(lambda p: problem.loss(p, *problem.batch))
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.fx on its own constant folding
        return _vmapped(problem, torch.func.linearize(gradient, problem.params)[1])


def forward_over_reverse(problem: models.Problem) -> Product:
    """``hessfunc.hvp``."""
    return _vmapped(problem, lambda v: hf.hvp(problem.loss, problem.params, v, *problem.batch))


def reverse_over_forward(problem: models.Problem) -> Product:
    """``hessfunc.hvp_reverse_over_forward``."""
    return _vmapped(problem, lambda v: hf.hvp_reverse_over_forward(problem.loss, problem.params, v, *problem.batch))


def operator(problem: models.Problem) -> Product:
    """The library's operator on one batch."""
    return hf.hessian(problem.loss, problem.params, problem.batch).rows


def operator_without_residuals(problem: models.Problem) -> Product:
    """The library's operator, told to keep nothing."""
    return hf.hessian(problem.loss, problem.params, problem.batch, memory_budget=0).rows


def operator_reverse_over_forward(problem: models.Problem) -> Product:
    """The library's operator with the other order of differentiation traced."""
    product = hf.hvp_reverse_over_forward
    return hf.hessian(problem.loss, problem.params, problem.batch, product=product).rows


def operator_compiled(problem: models.Problem) -> Product:
    """The library's operator with its tangent program compiled, one probe after the other."""
    H = hf.hessian(problem.loss, problem.params, problem.batch, compile=True, chunk_size=1)
    return H.rows


def operator_over_list(problem: models.Problem) -> Product:
    """The library's operator on a list of batches."""
    return hf.hessian(problem.loss, problem.params, problem.batches).rows


METHODS: dict[str, Callable[[models.Problem], Product]] = {
    "double backprop, graph kept": kept_graph,
    "double backprop, afresh": afresh,
    "torch.func jvp(grad)": jvp_of_grad,
    "torch.func linearize, reused": linearized,
    "hvp": forward_over_reverse,
    "hvp_reverse_over_forward": reverse_over_forward,
    "operator, one batch": operator,
    "operator, memory_budget=0": operator_without_residuals,
    "operator, reverse over forward": operator_reverse_over_forward,
    "operator, compiled": operator_compiled,
    "operator, list of batches": operator_over_list,
}
SEQUENTIAL = ("double backprop, graph kept", "double backprop, afresh", "operator, compiled")
"""Their cost per probe does not depend on the number of probes."""


def _num_batches(method: str, options: harness.Settings) -> int:
    if method != "operator, list of batches":
        return 1
    return 2 if options.quick else BATCHES


def _problem(name: str, num_batches: int, options: harness.Settings) -> models.Problem:
    where = {"dtype": options.torch_dtype, "device": options.device}
    return models.build(name, num_batches=num_batches, quick=options.quick, **where)


def _probes(problem: models.Problem) -> Rows:
    # All of them, always: how many are drawn at once can change torch's stream.
    like = next(iter(problem.params.values()))
    return torch.randn(PROBES[-1], problem.size, generator=torch.Generator().manual_seed(1)).to(like)


def _references(problem: models.Problem, rows: Rows) -> tuple[Rows, Rows]:
    """Two products by double backprop in float64: with the first batch, and with all of them."""
    exact = models.in_float64(problem)
    how: dict[str, Any] = {"product": hf.hvp_double_backward, "linearize": False}
    pair = rows[:2].double()
    each = [hf.hessian(exact.loss, exact.params, batch, **how).rows(pair) for batch in exact.batches]
    return each[0], torch.stack(each).mean(dim=0)


def time_model(name: str, options: harness.Settings) -> list[harness.Record]:
    """Time all methods on one model, all numbers of probes interleaved with the gradient."""
    problem = _problem(name, 2 if options.quick else BATCHES, options)
    probes = _probes(problem)
    on_first, on_all = _references(problem, probes)
    calls: dict[str, harness.Call] = {"gradient": problem.gradient}
    records: list[harness.Record] = []
    counts = PROBES[:2] if options.quick else PROBES
    flops_of_gradient = _flops(problem.gradient)
    for method, build in METHODS.items():
        if options.quick and (build is operator_compiled or (build is linearized and name != "mlp-9k")):
            continue  # tracing or compiling alone takes many seconds
        reference = on_first if _num_batches(method, options) == 1 else on_all
        product, failure = _attempt(build, problem)
        for num in PROBES[:1] if method in SEQUENTIAL else counts:
            rows = probes[:num]
            record: harness.Record = {"model": name, "size": problem.size, "method": method, "probes": num}
            records.append(record)
            if product is not None:
                value, failure = _attempt(product, rows)
            if failure is not None:
                record["failed"] = failure
                continue
            record["error"] = harness.relative_error(value[:2], reference[: len(value)])
            record["agrees"] = record["error"] <= TOLERANCE[options.dtype]
            if num == 1:
                record["flops"] = _flops(lambda product=product, rows=rows: product(rows)) / (
                    flops_of_gradient * _num_batches(method, options)
                )
            if record["agrees"]:
                calls[f"{method}/{num}"] = lambda product=product, rows=rows: product(rows)
    times = harness.interleaved(
        calls, repeats=options.repeats, device=options.device, burn_in=1 if options.quick else 6
    )
    unit = harness.Spread.of(times["gradient"]).median
    for record in records:
        key = f"{record['method']}/{record['probes']}"
        if key in times:
            share = record["probes"] * _num_batches(record["method"], options)
            if options.device == "cpu" and record["method"].startswith("operator") and record["probes"] in INSIDE:
                record["inside"] = harness.seconds_in_products(calls[key], repeats=options.repeats) / unit / share
            record["seconds"] = harness.Spread.of(times[key])
            record["gradients"] = harness.multiples(times[key], times["gradient"], per=share)
            record["gradient_seconds"] = harness.Spread.of(times["gradient"])
    return records


def _flops(call: harness.Call) -> int:
    """Floating-point operations in matrix products and convolutions of one call."""

    def multiply(_sum: Any, left: Any, right: Any, **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    def multiply_by_rows(left: Any, right: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(left) * right[0]

    uncounted = dict.fromkeys([torch.ops.aten.addmm_, torch.ops.aten.baddbmm_], multiply)  # by torch
    uncounted[torch.ops.mkldnn._linear_pointwise] = multiply_by_rows
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    try:
        return function(*arguments), None
    except (RuntimeError, NotImplementedError, TypeError) as error:  # what torch raises where it has no rule
        return None, str(error)


def measure_peak(name: str, method: str, num: int, options: harness.Settings) -> dict[str, int]:
    """Peak memory of one method and of one gradient, in this process; meant for a fresh one."""
    problem = _problem(name, _num_batches(method, options), options)
    rows = _probes(problem)[:num]
    gradient = harness.peak_memory(lambda: problem.gradient, device=options.device)

    def build() -> harness.Call:
        product = METHODS[method](problem)
        return lambda: product(rows)

    whole = harness.peak_memory(build, device=options.device)
    later = harness.peak_memory(build, device=options.device, from_second_call=True)
    return {"bytes": whole, "later_bytes": later, "gradient_bytes": gradient}


def add_peaks(records: list[harness.Record], arguments: argparse.Namespace) -> None:
    """Measure memory in fresh processes: each method with one probe and with the most."""
    common = ["--threads", str(arguments.threads), "--device", arguments.device, "--dtype", arguments.dtype]
    if arguments.quick:
        common.append("--quick")
    for record in records:
        wanted = (
            record["method"] == "hvp" and record["probes"] == 1
            if arguments.quick
            else record["probes"] in (1, PROBES[-1])
        )
        if wanted and record.get("agrees"):
            spec = json.dumps([record["model"], record["method"], record["probes"]])
            peak = harness.in_fresh_process(__file__, ["--measure-peak", spec, *common])
            if peak is not None:
                record |= peak
                record["memory"] = peak["bytes"] / peak["gradient_bytes"]
                record["memory later"] = peak["later_bytes"] / peak["gradient_bytes"]


def tables(records: list[harness.Record]) -> list[harness.Table]:
    """One table a model: a row for each method, a column for each number of probes."""
    result = []
    for name in dict.fromkeys(record["model"] for record in records):
        of_model = [record for record in records if record["model"] == name]
        counts = sorted({record["probes"] for record in of_model})
        rows = []
        for method in dict.fromkeys(record["method"] for record in of_model):
            of_method = {record["probes"]: record for record in of_model if record["method"] == method}
            row: harness.Record = {"method": method, "error": of_method[1].get("error")}
            if "flops" in of_method[1]:
                row["flops"] = of_method[1]["flops"]
            for num, record in of_method.items():
                missing = "fails" if "failed" in record else "disagrees"
                row[f"K={num}"] = record.get("gradients", missing)
                if "inside" in record:
                    row[f"inside K={num}"] = record["inside"]
                if "memory" in record:
                    row[f"memory K={num}"] = record["memory"]
                    row[f"later K={num}"] = record["memory later"]
            rows.append(row)
        unit = next((r["gradient_seconds"] for r in of_model if "gradient_seconds" in r), None)
        milliseconds = f"; one gradient {unit.median * 1e3:.2f} ms" if unit else ""
        memory = [f"{when} K={k}" for k in (1, counts[-1]) for when in ("memory", "later")]
        inside = [f"inside K={k}" for k in counts if any(f"inside K={k}" in row for row in rows)]
        columns = ["method", "flops", *(f"K={k}" for k in counts), *inside, *memory, "error"]
        title = f"{name}: {of_model[0]['size']:,} parameters, gradients per probe and batch{milliseconds}"
        result.append(harness.Table(title, rows, list(dict.fromkeys(columns))))
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a product of the library disagrees with the reference."""
    parser = harness.parser(__doc__, models=models.NAMES, repeats=15)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    parser.add_argument("--measure-peak", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    options = harness.settings(arguments)
    if arguments.measure_peak is not None:
        print(json.dumps(measure_peak(*json.loads(arguments.measure_peak), options)))
        return 0
    records = []
    for name in options.models:
        of_model = time_model(name, options)
        if not arguments.no_memory and not (arguments.quick and records):
            add_peaks(of_model, arguments)
        records += of_model
        print(f"{name}: done", file=sys.stderr)
    harness.report("bench_hvp", tables(records), records, options)
    ours = ("hvp", "operator")
    wrong = [r for r in records if r["method"].startswith(ours) and not r.get("agrees")]
    for record in wrong:
        print(f"wrong or failed: {record}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
