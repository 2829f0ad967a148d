"""What every benchmark shares: interleaved timing, peak memory in a fresh process, the machine's stamp, reports.

Times are given as multiples of one gradient that was timed in the same run, so that they mean the same on another
machine. Nothing is timed before its answer was checked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
Record = dict[str, Any]

GRADIENTS = 5
"""Gradients in a row that long calls are compared with."""

FIRST_SEED = 1000
"""Not a seed that weights and data are drawn with: random vectors drawn by the same numbers would be these."""

PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "matfree", "jax")


@dataclass(frozen=True)
class Settings:
    """The options that all benchmarks have."""

    models: list[str]
    repeats: int
    threads: int
    device: str
    dtype: str
    quick: bool
    out: str | None
    peers: list[str] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own object."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; of a single value, that value thrice."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)}-{_digits(self.high)})"


@dataclass(frozen=True)
class Table:
    """Rows of one table; the columns of the printed form are picked from the records' keys."""

    title: str
    records: list[Record]
    columns: list[str]
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[list[str]]:
        """Header and cells as text."""
        return [self.columns, *([_cell(record.get(column)) for column in self.columns] for record in self.records)]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, "-" * len(self.title), *lines, *self.notes])

    def markdown(self) -> str:
        """A Markdown table under a heading."""
        header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows()]
        rule = "|" + " --- |" * len(self.columns)
        return "\n".join([f"### {self.title}", "", header, rule, *body, *(f"\n{note}" for note in self.notes)])


def parser(description: str | None, *, models: Sequence[str], repeats: int) -> argparse.ArgumentParser:
    """The common options; a benchmark adds its own and passes the result to [`settings`][]."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--models", nargs="+", default=list(models), choices=list(models), help="which models to run")
    result.add_argument("--repeats", type=int, default=None, help=f"rounds of timing (default {repeats}, quick 1)")
    result.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch on the CPU")
    result.add_argument("--device", default="cpu", help="cpu or cuda")
    result.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="dtype of the parameters")
    result.add_argument("--quick", action="store_true", help="small batches, one round: shows breakage, not speed")
    result.add_argument("--peers", nargs="+", default=None, metavar="NAME", help="only these libraries, by their names")
    result.add_argument("--out", default=None, help="folder for the JSON and Markdown files")
    result.set_defaults(default_repeats=repeats)
    return result


def settings(arguments: argparse.Namespace) -> Settings:
    """Read the common options and apply the number of threads."""
    torch.set_num_threads(arguments.threads)
    repeats = arguments.repeats or (1 if arguments.quick else arguments.default_repeats)
    names = ("models", "threads", "device", "dtype", "quick", "peers", "out")
    return Settings(repeats=repeats, **{name: getattr(arguments, name) for name in names})


def synchronize(device: str) -> None:
    """Wait for a device that runs ahead of Python."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def seconds(call: Call, *, device: str, number: int = 1) -> float:
    """Time of one call, averaged over ``number`` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / number


def interleaved(
    calls: dict[str, Call], *, repeats: int, device: str, burn_in: int = 4, at_least: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call of each competitor in each of ``repeats`` rounds.

    Every round times all of them, starting one place further on, so that drift of the machine's clock and other load
    hits all alike. ``burn_in`` calls of each go first, short ones up to ten times as many: a traced product settles on
    its form in the first tens. Short calls are timed several in a row, for ``at_least`` seconds together. ``burn_in=0``
    is for long calls that were made before.
    """
    names = list(calls)
    numbers = dict.fromkeys(names, 1)
    for name in names if burn_in else []:
        spent = [seconds(calls[name], device=device) for _ in range(burn_in)]
        while len(spent) < 10 * burn_in and sum(spent) < 10 * at_least:
            spent.append(seconds(calls[name], device=device))
        once = min(spent)
        numbers[name] = max(1, round(at_least / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(calls[name], device=device, number=numbers[name]))
    return times


def multiples(times: Sequence[float], unit: Sequence[float], *, per: float = 1.0) -> Spread:
    """Ratios to the unit timed in the same round, divided by ``per`` (probes, batches)."""
    return Spread.of([t / u / per for t, u in zip(times, unit, strict=True)])


def race(
    competitors: dict[str, Callable[[int], Any]],
    judge: Callable[[Any], Record],
    *,
    gradient: Call,
    options: Settings,
    budget: float,
    outside: str = "hessfunc",
) -> list[Record]:
    """Long calls against each other: everyone's first answer is judged, those that are right are timed in turns.

    A competitor takes a seed, another one each round. ``judge`` turns an answer into figures and a verdict ``agrees``;
    figures are medians over the rounds, worked out off the clock. There are ``options.repeats`` rounds, or as many as
    fit into ``budget`` seconds, at least one. The fastest peer is looked for among those that are right in all
    rounds, by names that begin neither with ``hessfunc`` nor with ``outside``.
    """
    records: dict[str, Record] = {}
    answers: dict[str, list[Any]] = {}
    calls: dict[str, Call] = {"gradient": lambda: [gradient() for _ in range(GRADIENTS)]}
    for name, competitor in competitors.items():
        record = records[name] = {"library": name, "agrees": False}
        start = time.perf_counter()
        try:
            first = competitor(FIRST_SEED)
        except Exception as error:  # that a peer fails is a result
            record["failed"] = repr(error)
            print(f"  {name} failed: {error!r}", file=sys.stderr)
            continue
        record["first call s"] = time.perf_counter() - start
        record |= judge(first)
        if record["agrees"]:
            answers[name] = []
            seeds = iter(range(FIRST_SEED + 1, FIRST_SEED + 10_000))
            calls[name] = lambda name=name, run=competitor, seeds=seeds: answers[name].append(run(next(seeds)))
    spent = sum(records[name]["first call s"] for name in answers)
    repeats = max(1, min(options.repeats, int(budget / max(spent, 1e-9))))
    times = interleaved(calls, repeats=repeats, device=options.device, burn_in=0)
    judged = {name: [judge(answer) for answer in given] for name, given in answers.items()}
    right = [name for name, figures in judged.items() if all(figure["agrees"] for figure in figures)]
    rivals = [statistics.median(times[name]) for name in right if not name.startswith(("hessfunc", outside))]
    for name, figures in judged.items():
        medians = {key: statistics.median(figure[key] for figure in figures) for key in figures[0] if key != "agrees"}
        records[name] |= medians | {
            "agrees": all(figure["agrees"] for figure in figures),
            "seconds": Spread.of(times[name]),
            "gradients": multiples(times[name], times["gradient"], per=1 / GRADIENTS).median,
            "to fastest peer": statistics.median(times[name]) / min(rivals) if rivals else None,
            "rounds": repeats,
        }
    return list(records.values())


def seconds_in_products(call: Call, *, repeats: int = 20) -> float:
    """Seconds of one call on the CPU that pass inside of matrix products and convolutions, by torch's profiler.

    The median over the calls: what the library cannot make shorter, as these are kernels of BLAS and oneDNN.
    """
    found = []
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        ends = ("mm", "addmv", "linear_pointwise")
        events = [e for e in profile.key_averages() if "conv" in e.key or e.key.rstrip("_").endswith(ends)]
        found.append(sum(event.self_cpu_time_total for event in events) * 1e-6)
    return statistics.median(found)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in float64, over all entries."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return float((value - reference).norm() / reference.norm())


def peak_memory(build: Callable[[], Call], *, device: str, from_second_call: bool = False) -> int:
    """Bytes of tensors alive at once at the worst moment of building a call and making it four times.

    With ``from_second_call`` the worst moment of the last three calls, what the first one leaves included.
    Counted above what was alive before. On the CPU from torch's record of every allocation and release, which other
    processes do not disturb; buffers inside oneDNN or BLAS are not in it.
    """
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call = build()
        call()
        if from_second_call:
            torch.cuda.reset_peak_memory_stats(device)
        _repeat(call)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    calls: list[Call] = []

    def first() -> None:
        calls.append(build())
        calls[0]()

    peak, held = _recorded(first)
    later, _ = _recorded(lambda: _repeat(calls[0]))
    return held + later if from_second_call else max(peak, held + later)


def _recorded(action: Callable[[], None]) -> tuple[int, int]:
    """Most bytes alive at once during an action, and those alive at its end, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, alive


def _repeat(call: Call) -> None:
    for _ in range(3):
        call()


def in_fresh_process(script: str, arguments: Sequence[str]) -> Any:
    """Run a benchmark again for one measurement and read the JSON in its last line; None if that process dies."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"  failed: {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine(options: Settings) -> Record:
    """What the numbers depend on besides the code."""
    stamp: Record = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": options.device,
        "dtype": options.dtype,
        "load": [round(x, 2) for x in os.getloadavg()],
        "quick": options.quick,
    }
    if options.device.startswith("cuda"):
        stamp["device_name"] = torch.cuda.get_device_name(options.device)
    for package in ("hessfunc", *PEERS):
        stamp[package] = version(package) or "missing"
    return stamp


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(name: str, tables: Sequence[Table], records: Sequence[Record], options: Settings) -> None:
    """Print the tables; with ``--out`` also write them to ``name.md`` and all records to ``name.json`` there."""
    stamp = machine(options)
    described = ", ".join(f"{key} {value}" for key, value in stamp.items())
    for table in tables:
        print(f"\n{table.text()}")
    print(f"\n{described}")
    if options.out is None:
        return
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "machine": stamp, "records": list(records)}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    sections = "\n\n".join(table.markdown() for table in tables)
    (folder / f"{name}.md").write_text(f"{sections}\n\nMachine: {described}.\n")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else asdict(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return _digits(value) if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    """Three significant digits, or the integer part."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
