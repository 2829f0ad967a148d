"""Memory that stays with the process between products."""

import os
import subprocess
import sys

import pytest
import torch

import hessfunc as hf
from hessfunc import _heap, _linearize

GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and sys.platform.startswith("linux")

ROUNDS = """
import resource, sys, torch
from hessfunc._heap import keep_heap

def one():
    rows = [torch.ones(750_000) for _ in range(20)]  # 60 MB in blocks of 3 MB
    del rows

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

one()
before = resident()
kept = keep_heap(120_000_000) if sys.argv[1] == "kept" else None
taken = resident() - before
for _ in range(10):  # until all of it has been written to
    one()
start = faults()
for _ in range(5):
    one()
print(faults() - start, taken)
"""


def measured(how):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    return [int(number) for number in run.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_pages_stay_and_none_are_taken_ahead():
    faults, _ = measured("plain")
    kept, taken = measured("kept")
    if faults < 20_000:  # 75,000 pages of 4 KiB are written to
        pytest.skip("the system gives huge pages, or the C library keeps all by itself")
    assert kept < faults / 20
    assert taken < 4 * 2**20


def test_little_memory_is_left_alone():
    assert _heap.keep_heap(_heap.SMALLEST - 1) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_much_memory_is_kept_in_part(monkeypatch):
    monkeypatch.setattr(_heap, "LARGEST", 10 * 2**20)
    made = []
    empty = _heap.np.empty
    monkeypatch.setattr(_heap.np, "empty", lambda size, dtype: made.append(size) or empty(size, dtype=dtype))
    assert _heap.keep_heap(2**40) is not None
    assert sum(made[1:]) < 20 * 2**20


@pytest.mark.parametrize("budget", [None, 0])
def test_an_operator_keeps_what_its_product_needs_unless_memory_is_scarce(budget, monkeypatch):
    asked = []
    monkeypatch.setattr(_linearize, "keep_heap", lambda num_bytes: asked.append(num_bytes))
    monkeypatch.setattr(_linearize, "_SMALL", 1)
    w, x = torch.randn(30, 20), torch.randn(40, 30)
    H = hf.hessian(lambda w, x: torch.tanh(x @ w).square().mean(), w, (x,), memory_budget=budget)
    for _ in range(3):
        H.vector(torch.randn(600))
    assert len(asked) == (budget is None)
    assert all(40 * 20 * 4 < num_bytes < 100 * 40 * 20 * 4 for num_bytes in asked)


def test_small_networks_are_left_alone(monkeypatch):
    monkeypatch.setattr(_linearize, "keep_heap", lambda _: pytest.fail("asked for memory"))
    w, x = torch.randn(3, 2), torch.randn(4, 3)
    H = hf.hessian(lambda w, x: torch.tanh(x @ w).square().mean(), w, (x,))
    for _ in range(3):
        H.vector(torch.randn(6))
