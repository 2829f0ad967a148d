"""The benchmarks run, check answers before they time them, and say what they measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The helper modules, found as the scripts find them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import _harness
    import _models

    return types.SimpleNamespace(harness=_harness, models=_models)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Run a benchmark's quick form in this process, which has torch loaded, and read what it wrote."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()

    def main(name: str, *arguments: str) -> list[dict[str, Any]]:
        module = importlib.import_module(name)
        assert module.main(["--quick", "--threads", "1", "--out", str(tmp_path), *arguments]) == 0
        return json.loads((tmp_path / f"{name}.json").read_text())["records"]

    yield main
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "size"), [("mlp-9k", 8_970), ("mlp-670k", 669_706), ("resnet-20", 272_474), ("gpt", 875_264)]
)
def test_models_have_the_sizes_they_are_known_by(modules, name, size):
    problem = modules.models.build(name, quick=True)
    assert problem.size == size
    assert not problem.model.training
    again = modules.models.build(name, quick=True)
    torch.testing.assert_close(problem.params, again.params, rtol=0, atol=0)
    torch.testing.assert_close(problem.batches, again.batches, rtol=0, atol=0)


def test_a_problem_is_one_network_in_both_forms(modules):
    problem = modules.models.build("gpt", quick=True, dtype=torch.float64, num_batches=2)
    assert len(problem.batches) == 2
    pure = torch.func.grad(problem.loss)(problem.params, *problem.batch)
    for own, functional in zip(problem.gradient(), pure.values(), strict=True):
        torch.testing.assert_close(own, functional, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in problem.model.parameters())


def test_training_lowers_the_loss_and_float64_copies_the_network(modules):
    before = modules.models.build("mlp-9k")
    after = modules.models.build("mlp-9k", train_steps=60)
    assert after.loss(after.params, *after.batch) < 0.7 * before.loss(before.params, *before.batch)
    exact = modules.models.in_float64(after)
    assert exact.batch[0].dtype == torch.float64
    value = exact.loss(exact.params, *exact.batch)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.float(), after.loss(after.params, *after.batch))


def test_interleaved_times_every_call_in_every_round(modules):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = modules.harness.interleaved(calls, repeats=3, device="cpu", burn_in=0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    order.clear()
    modules.harness.interleaved({"a": calls["a"]}, repeats=1, device="cpu", burn_in=2, at_least=1e-3)
    assert len(order) > 3


def test_spread_and_multiples(modules):
    spread = modules.harness.Spread
    assert spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == spread(3.0, 2.0, 4.0)
    assert spread.of([2.0]) == spread(2.0, 2.0, 2.0)
    assert str(spread(1234.5, 0.012345, 2e7)) == "1234 (0.0123-2e+07)"
    assert str(spread.of([1.0, 2.0, 3.0, 4.0, 5.0])) == "3 (2-4)"
    # Ratios within a round: a machine that slows down by half in the second changes nothing.
    assert modules.harness.multiples([4.0, 8.0], [1.0, 2.0], per=2) == spread(2.0, 2.0, 2.0)


def test_peak_memory_counts_what_is_alive_at_once(modules):
    kilobytes = 1000 * 4

    def build():
        kept = torch.zeros(1000)

        def call():
            first = torch.zeros(2000)
            del first
            return kept + torch.zeros(3000)[:1000]

        return call

    assert modules.harness.peak_memory(build, device="cpu") == (1 + 3 + 1) * kilobytes


def test_race_times_right_answers_alone(modules, capsys):
    options = modules.harness.Settings([], 3, 1, "cpu", "float32", True, None)

    def fails(_seed):
        raise ValueError("no such operation")

    competitors = {
        "hessfunc": lambda seed: 10.0 + seed - modules.harness.FIRST_SEED,
        "rival": lambda _: 10.0,
        "wrong": lambda _: 0.0,
    }
    records = modules.harness.race(
        competitors | {"broken": fails},
        lambda answer: {"error": abs(answer - 10), "agrees": answer >= 10},
        gradient=lambda: None,
        options=options,
        budget=60,
    )
    by_name = {record["library"]: record for record in records}
    assert by_name["hessfunc"]["error"] == 2  # median over the seeds after the first, 1, 2, 3 more
    assert by_name["hessfunc"]["rounds"] == 3
    assert by_name["hessfunc"]["agrees"]
    assert by_name["rival"]["to fastest peer"] == 1
    assert not by_name["wrong"]["agrees"]
    assert "seconds" not in by_name["wrong"]
    assert by_name["broken"]["failed"] == "ValueError('no such operation')"
    assert "broken failed" in capsys.readouterr().err


def test_report_is_printed_and_written(modules, tmp_path, capsys):
    options = modules.harness.Settings(["mlp-9k"], 1, 1, "cpu", "float32", False, str(tmp_path / "new folder"))
    spread = modules.harness.Spread(1.0, 0.5, 2.0)
    records = [{"method": "a|b", "time": spread, "error": 1.23456e-7}, {"method": "c"}]
    table = modules.harness.Table("Title", records, ["method", "time", "error"], ["a note"])
    modules.harness.report("name", [table], records, options)
    printed = capsys.readouterr().out
    assert "1 (0.5-2)  1.23e-07" in printed
    assert f"torch {torch.__version__}" in printed
    written = json.loads((tmp_path / "new folder" / "name.json").read_text())
    assert written["records"][0]["time"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert written["machine"]["hessfunc"] == hf.__version__
    markdown = (tmp_path / "new folder" / "name.md").read_text()
    assert "| a\\|b | 1 (0.5-2) | 1.23e-07 |" in markdown
    assert "a note" in markdown


def test_hvp_benchmark(run):
    records = run("bench_hvp", "--models", "mlp-9k")
    assert {record["method"] for record in records} >= {"double backprop, afresh", "hvp", "operator, list of batches"}
    for record in records:
        assert record["error"] < 1e-5
        assert record["gradients"]["median"] > 0
    (measured,) = [record for record in records if "memory" in record]
    assert measured["method"] == "hvp"
    assert 1 < measured["memory later"] <= measured["memory"] < 20


def test_eigsh_benchmark(run):
    records = run("bench_eigsh", "--counts", "2")
    assert len(records) == 2
    for record in records:
        assert record["hessfunc missed"] == 0
        assert record["hessfunc residual"] < 1e-3
        assert 0 < record["search alone"] < record["hessfunc"]


@pytest.mark.parametrize("name", ["bench_eigs", "bench_esd", "bench_trace_peers"])
def test_peer_benchmarks(run, name, capsys):
    records = run(name, "--models", "mlp-9k")
    ours = [record for record in records if record["library"].startswith("hessfunc")]
    assert ours
    for record in ours:
        assert record["agrees"]
        assert record["seconds"]["median"] > 0
        assert record["gradients"] > 1
    assert len(records) > len(ours) or capsys.readouterr().out.count("not installed") == 4


def test_options_benchmark(run):
    records = run("bench_options", "--models", "mlp-9k")
    assert [record["option"] for record in records] == ["as it is", "bfloat16"]
    assert records[0]["error"] < 1e-5 < records[1]["error"] < 0.1
    assert abs(records[0]["trace bias"]) < 1e-5
    assert all(record["gradients"]["median"] > 0 for record in records)


def test_scaling_benchmark(run, tmp_path):
    records = run("bench_scaling", "--models", "mlp-9k", "--axes", "parameters", "batches")
    assert {record["axis"] for record in records} == {"parameters", "batches"}
    sizes = sorted({record["parameters"] for record in records if record["axis"] == "parameters"})
    assert sizes == [pytest.approx(10**4, rel=0.01), pytest.approx(10**5, rel=0.01)]
    assert all(record["gradients"]["median"] > 0 for record in records)
    assert (tmp_path / "bench_scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_benchmark_in_one_command(tmp_path):
    command = [sys.executable, str(FOLDER), "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 0
    assert len(list(tmp_path.glob("*.json"))) == 9
