"""Spectra followed through training: against dense ones, matvecs of warm starts, crossings, the edge of stability."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, CountingRows, relative_error, seeded, symmetric
from torch import nn

import hessfunc as hf
from hessfunc import tree


def regression() -> tuple[Any, Any, Any]:
    """A tanh network with two hidden layers on 30 samples whose sharpness rises from 7 to 24 under gradient flow."""
    g = seeded()
    x = torch.randn(30, 6, generator=g, dtype=F64)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 0.3 * torch.randn(30, 1, generator=g, dtype=F64)
    params = {
        "a": torch.randn(16, 6, generator=g, dtype=F64) / 6**0.5,
        "b": torch.randn(16, 16, generator=g, dtype=F64) / 4,
        "c": torch.randn(1, 16, generator=g, dtype=F64) / 4,
    }

    def loss(p: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(torch.tanh(torch.tanh(x @ p["a"].T) @ p["b"].T) @ p["c"].T, y)

    return loss, params, (x, y)


def eigenvalues(loss: Any, params: Any, batch: Any) -> torch.Tensor:
    layout = tree.Layout.of(params)
    dense = torch.func.hessian(lambda flat: loss(layout.unravel(flat), *batch))(layout.ravel(params))
    return torch.linalg.eigvalsh(dense.detach())


def descent(
    loss: Any, params: Any, batch: Any, *, step_size: float, num_steps: int, every: int, losses: list[float]
) -> Iterator[Any]:
    gradient = torch.func.grad_and_value(loss)
    for step in range(num_steps):
        slope, value = gradient(params, *batch)
        losses.append(float(value))
        if step % every == 0:
            yield params
        params = tree.axpy(-step_size, slope, params)


def test_tracked_eigenvalues_are_those_of_dense_hessians_for_fewer_matvecs_than_fresh_ones():
    loss, params, batch = regression()
    points = list(descent(loss, params, batch, step_size=0.05, num_steps=200, every=40, losses=[]))
    H = hf.hessian(loss, params, batch)
    records = list(hf.track(H, points, k=2, num_probes=8, generator=seeded(1)))
    for point, record in zip(points, records, strict=True):
        dense = eigenvalues(loss, point, batch)
        exact = dense.flip(0)[:2]
        assert bool(record.converged.all())
        assert bool(((record.eigenvalues - exact).abs() <= record.residuals).all())
        assert relative_error(record.eigenvalues, exact) < 1e-3
        assert abs(float(record.trace) - float(dense.sum())) < 5 * float(record.trace.stderr)
        assert record.seconds > 0
    cold = sum(hf.eigsh(H.at(p), 2, which="LA", tol=1e-2, generator=seeded(2)).num_matvecs for p in points)
    assert sum(record.num_matvecs - record.trace.num_matvecs for record in records) < 0.9 * cold
    quick = hf.track(H, points, k=2, verify_steps=0, generator=seeded(1))
    assert sum(record.num_matvecs for record in quick) < 0.6 * cold
    assert bool(records[0].overlaps.isnan().all())
    assert all(0.5 < float(record.overlaps[0]) <= 1 for record in records[1:])


def test_matvecs_are_counted_and_a_start_at_the_eigenvector_takes_few():
    matrix = symmetric([*torch.linspace(-1, 1, 60).tolist(), 5.0, 4.0], seed=3)
    counting = CountingRows(matrix)
    state, first = hf.track_step(counting.operator, k=2, num_probes=3, generator=seeded(2))
    assert sum(counting.passes) == first.num_matvecs
    counting.passes.clear()
    _, again = hf.track_step(counting.operator, state, k=2, num_probes=3, verify_steps=0, generator=seeded(2))
    assert sum(counting.passes) == again.num_matvecs
    # Two to span the eigenvectors, two for the residuals, three probes and one for the deflation.
    assert again.num_matvecs <= 2 + 2 + 3 + 1 + 1
    assert again.num_matvecs < first.num_matvecs - 5
    assert float(again.overlaps.min()) > 0.999


def test_a_step_is_a_function_of_its_arguments():
    matrix = symmetric([*torch.linspace(-1, 1, 30).tolist(), 5.0], seed=3)
    H = hf.as_operator(matrix)
    state, _ = hf.track_step(H, num_probes=4, generator=seeded(1))
    before = (state.pairs.rows().clone(), state.probes.clone())
    one = hf.track_step(H, state, num_probes=4, generator=seeded(5))[1]
    two = hf.track_step(H, state, num_probes=4, generator=seeded(5))[1]
    assert torch.equal(one.eigenvalues, two.eigenvalues)
    assert torch.equal(one.trace.samples, two.trace.samples)
    assert torch.equal(before[0], state.pairs.rows())
    assert torch.equal(before[1], state.probes)


def test_probes_are_the_same_in_every_step_so_that_differences_are_accurate():
    matrix = symmetric([*torch.linspace(0, 1, 40).tolist(), 5.0], seed=3)
    other = matrix + 0.01 * symmetric(torch.linspace(0, 1, 41), seed=4)
    g = seeded(1)
    state, first = hf.track_step(hf.as_operator(matrix), num_probes=6, generator=g)
    second = hf.track_step(hf.as_operator(other), state, num_probes=6, generator=g)[1]
    change = float(second.trace) - float(first.trace)
    exact = float(other.trace() - matrix.trace())
    assert abs(change - exact) < 0.1 * float(first.trace.stderr)
    assert float(first.trace.stderr) > 0
    # The generator went on behind the probes of the first step.
    fresh = hf.hutchinson(hf.as_operator(matrix), num_probes=6, generator=g)
    assert not torch.allclose(fresh.samples, hf.hutchinson(hf.as_operator(matrix), num_probes=6, generator=g).samples)


def test_an_eigenvalue_that_overtakes_is_found_by_the_search_and_not_without_it():
    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w**4).sum() / 12

    ramp = torch.linspace(0.1, 1, 30, dtype=F64)
    before, after = (torch.cat([torch.tensor(top, dtype=F64), ramp]) for top in ([3.0, 2.0], [3.0, 4.0]))
    H = hf.hessian(loss, before)
    seen = [record.eigenvalues[0] for record in hf.track(H, [before, after], generator=seeded(1))]
    assert relative_error(torch.stack(seen), torch.tensor([9.0, 16.0], dtype=F64)) < 1e-3
    unseen = list(hf.track(H, [before, before, after], tol=1e-6, verify_steps=0, generator=seeded(1)))
    assert float(unseen[-1].eigenvalues[0]) == pytest.approx(9.0, rel=1e-3)
    assert unseen[-1].num_matvecs < 5


def test_the_largest_eigenvalue_rises_to_the_edge_of_stability_and_hovers():
    loss, params, batch = regression()
    H = hf.hessian(loss, params, batch)
    sharpness = {}
    for step_size in (0.05, 0.13):
        losses: list[float] = []
        points = descent(loss, params, batch, step_size=step_size, num_steps=1000, every=50, losses=losses)
        run = hf.Trajectory.of(hf.track(H, points, generator=seeded(1)), steps=range(0, 1000, 50))
        assert losses[-1] < 1e-3 * losses[0]
        sharpness[step_size] = run.eigenvalues[:, 0]
    flow, edge = sharpness[0.05], 2 / 0.13
    assert float(flow[0]) < 0.5 * edge
    assert 1.5 * edge < float(flow[-1]) < 0.65 * (2 / 0.05), "far from its own edge nothing holds it back"
    assert float((sharpness[0.13][7:] / edge - 1).abs().max()) < 0.05


def test_a_module_trained_in_place_by_an_optimizer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(20, 3, generator=seeded(1), dtype=F64), torch.randint(0, 2, (20,), generator=seeded(2))
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    copies = []

    def training() -> Iterator[Any]:
        for step in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 5 == 4:
                copies.append(tree.map_leaves(lambda leaf: leaf.detach().clone(), dict(model.named_parameters())))
                yield dict(model.named_parameters())

    H = hf.hessian(loss, params, (x, y))
    for position, record in enumerate(hf.track(H, training(), generator=seeded(3))):
        dense = eigenvalues(loss, copies[position], (x, y))
        assert float(record.eigenvalues[0]) == pytest.approx(float(dense[-1]), rel=1e-3)
    assert len(copies) == 4
    assert all(leaf.grad is not None for leaf in model.parameters()), "left as the optimizer had it"


def test_a_trajectory_stacks_records_and_writes_a_table(tmp_path):
    loss, params, batch = regression()
    points = descent(loss, params, batch, step_size=0.05, num_steps=30, every=10, losses=[])
    records = list(hf.track(hf.hessian(loss, params, batch), points, k=2, num_probes=2, generator=seeded(1)))
    run = hf.Trajectory.of(records, steps=[0, 10, 20])
    assert run.eigenvalues.shape == run.residuals.shape == run.overlaps.shape == (3, 2)
    assert torch.equal(run.eigenvalues[1], records[1].eigenvalues)
    assert run.converged.dtype == torch.bool
    assert run.trace[2] == records[2].trace.value
    assert run.num_matvecs.tolist() == [record.num_matvecs for record in records]
    spent = sum(record.seconds for record in records[1:])
    assert run.share == pytest.approx(spent / sum(record.seconds_between for record in records[1:]))
    path = run.save(tmp_path / "run.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step"]) for row in rows] == [0, 10, 20]
    assert [float(row["eigenvalue_2"]) for row in rows] == run.eigenvalues[:, 1].tolist()
    assert [row["converged_1"] for row in rows] == ["True"] * 3
    assert list(rows[0]) == list(run.columns())
    bare = hf.Trajectory.of(iter(records))
    assert bare.steps.tolist() == [0, 1, 2]


def test_a_single_step_knows_no_time_between_and_without_probes_no_trace():
    record = hf.track_step(hf.as_operator(torch.eye(3, dtype=F64)), generator=seeded(1))[1]
    assert record.trace is None
    assert record.seconds_between != record.seconds_between
    run = hf.Trajectory.of([record])
    assert bool(run.trace.isnan().all())


def test_errors_name_the_remedy():
    H = hf.as_operator(torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"num_probes=-1 is out of range; expected 0 <= num_probes"):
        hf.track_step(H, num_probes=-1, generator=seeded())
    with pytest.raises(ValueError, match=r"cannot move; build it anew"):
        next(hf.track(H, [torch.ones(3, dtype=F64)], generator=seeded()))
    with pytest.raises(ValueError, match=r"records is empty: points yielded no parameters"):
        hf.Trajectory.of([])
    record = hf.track_step(H, generator=seeded())[1]
    with pytest.raises(ValueError, match=r"steps has 2 entries for 1 records; give one for each"):
        hf.Trajectory.of([record], steps=[0, 1])
    state = hf.track_step(hf.as_operator(torch.eye(4, dtype=F64)), generator=seeded())[0]
    with pytest.raises(ValueError, match=r"v0 has shape \(1, 4\), expected \('K', 3\) as in H\.like"):
        hf.track_step(H, state, generator=seeded())
