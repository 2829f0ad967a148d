"""The whole analysis in one call: its parts against the dense Hessian, progress, settings, errors."""

import platform

import pytest
import torch
from helpers import F64, seeded

import hessfunc as hf
from hessfunc._analyze import analyze
from hessfunc.report import Report, load_report

SMALL = {"k": 3, "num_probes": 8, "num_steps": 12, "density_probes": 3}


def problem(dtype=F64):
    generator = seeded(0)
    params = {
        "first": {"w": torch.randn(5, 4, generator=generator, dtype=dtype)},
        "second": [torch.randn(3, 5, generator=generator, dtype=dtype), torch.zeros(3, dtype=dtype)],
    }
    x = torch.randn(11, 4, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (11,), generator=generator)

    def loss(params, x, y):
        weight, bias = params["second"]
        return torch.nn.functional.cross_entropy(torch.tanh(x @ params["first"]["w"].T) @ weight.T + bias, y)

    return loss, params, [(x[:7], y[:7]), (x[7:], y[7:])]


@pytest.fixture(scope="module")
def analyzed():
    loss, params, data = problem()
    calls = []
    report = analyze(
        loss,
        params,
        data,
        **SMALL,
        tol=1e-8,
        surface_points=5,
        surface_span=0.3,
        generator=seeded(1),
        progress=lambda *call: calls.append(call),
    )
    return report, calls, hf.hessian(loss, params, data)


def test_parts_agree_with_the_dense_hessian(analyzed):
    report, _, H = analyzed
    assert isinstance(report, Report)
    dense = H.dense()
    values = torch.linalg.eigvalsh(dense)
    top = values[values.abs().argsort(descending=True)[:3]]
    torch.testing.assert_close(report.eigenpairs.eigenvalues, top, rtol=1e-9, atol=0)
    rows = report.eigenpairs.rows()
    residuals = (rows @ dense - top[:, None] * rows).norm(dim=1)
    torch.testing.assert_close(report.eigenpairs.residuals, residuals, rtol=0, atol=1e-10)
    assert bool(report.eigenpairs.converged.all())
    assert abs(float(report.trace) - float(values.sum())) < 5 * float(report.trace.stderr)
    blocks = dense.diagonal().split(H.layout.sizes)
    for share, block in zip(report.trace.per_leaf.values(), blocks, strict=True):
        assert abs(float(share) - float(block.sum())) < 6 * float(share.stderr)
    quadrature = report.quadrature
    assert all(float((values - value).abs().min()) < 1e-2 * float(value.abs()) for value in quadrature.exact)
    second = quadrature.moment(2)
    assert abs(float(second) - float((values**2).mean())) < 5 * float(second.stderr)
    assert quadrature.size == report.size == 38
    assert quadrature.num_steps == 12
    assert quadrature.num_probes == 3


def test_deflation_makes_the_trace_more_certain(analyzed):
    _, _, H = analyzed
    loss, params, data = problem()
    report = analyze(loss, params, data, **SMALL | {"num_probes": 200}, tol=1e-8, generator=seeded(1))
    plain = hf._trace.hutchinson(H, num_probes=200, generator=seeded(2))
    deflated_spread = float(report.trace.samples.std())
    assert deflated_spread < 0.8 * float(plain.samples.std())


def test_surface_runs_along_the_first_two_eigenvectors(analyzed):
    report, _, _ = analyzed
    loss, params, data = problem()
    vectors = report.eigenpairs.eigenvectors
    directions = hf.tree.map_leaves(lambda leaf: leaf[:2], vectors)
    expected = hf.surface.loss_surface(loss, params, directions, data, span=0.3, num_points=5)
    assert torch.equal(report.surface.losses, expected.losses)
    assert [float(c[-1]) for c in report.surface.coordinates] == [0.3, 0.3]


def test_every_product_ticks(analyzed):
    report, calls, _ = analyzed
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["density", "eigenpairs", "trace", "surface"]
    for stage in stages:
        done = [d for s, d, _ in calls if s == stage]
        assert done == sorted(set(done)), stage
    last = {stage: (done, total) for stage, done, total in calls}
    assert last["eigenpairs"] == (report.num_matvecs["eigenpairs"], None)
    assert last["trace"][0] == report.num_matvecs["trace"]
    assert last["density"] == (report.num_matvecs["density"],) * 2
    assert report.num_matvecs["density"] == 36
    assert last["surface"] == (50, 50)
    totals = {total for stage, _, total in calls if stage == "trace"}
    assert totals <= {8, 9}


def diagonal(values):
    weights = torch.tensor(values, dtype=torch.float64)
    return lambda p: (weights * p["w"].square()).sum() / 2, {"w": torch.ones(len(values), dtype=torch.float64)}


def test_one_set_of_runs_gives_density_and_eigenpairs():
    loss, params = diagonal([9.0, 7.0, -5.0, *torch.linspace(-0.5, 0.5, 200).tolist()])
    report = analyze(loss, params, k=3, num_probes=4, num_steps=30, density_probes=3, generator=seeded(3))
    assert report.num_matvecs == {"eigenpairs": 3, "trace": 5, "density": 90}
    torch.testing.assert_close(report.eigenpairs.eigenvalues, torch.tensor([9.0, 7.0, -5.0]).double())
    torch.testing.assert_close(report.quadrature.exact.sort().values, torch.tensor([-5.0, 7.0, 9.0]).double())


@pytest.mark.parametrize("seed", range(5))
def test_repeated_eigenvalues_are_listed_as_often_as_they_occur(seed):
    loss, params = diagonal([9.0, 7.0, 7.0, 7.0, 4.0, *torch.linspace(-0.5, 0.5, 200).tolist()])
    report = analyze(loss, params, k=4, num_probes=4, num_steps=30, density_probes=3, generator=seeded(seed))
    torch.testing.assert_close(
        report.eigenpairs.eigenvalues, torch.tensor([9.0, 7.0, 7.0, 7.0]).double(), rtol=1e-5, atol=0
    )
    assert report.num_matvecs["eigenpairs"] > 4  # the search went on


def test_counts_times_settings_versions(analyzed):
    report, _, _ = analyzed
    assert report.num_matvecs == {
        "eigenpairs": report.eigenpairs.num_matvecs + 3,  # and the residuals of what the runs offered
        "trace": report.trace.num_matvecs,
        "density": report.quadrature.num_matvecs,
    }
    assert set(report.seconds) == {"eigenpairs", "trace", "density", "surface"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert report.leaf_shapes == {"first.w": (5, 4), "second.0": (3, 5), "second.1": (3,)}
    assert report.settings == {
        "k": 3,
        "which": "LM",
        "tol": 1e-8,
        "num_probes": 8,
        "num_steps": 12,
        "density_probes": 3,
        "surface_points": 5,
        "surface_span": 0.3,
        "reduction": "mean",
        "count": None,
        "product": "hvp",
        "chunk_size": None,
        "linearize": True,
        "memory_budget": None,
        "compile": False,
        "dtype": "float64",
        "device": "cpu",
        "seed": 1,
    }
    assert report.versions["hessfunc"] == hf.__version__
    assert report.versions["torch"] == torch.__version__
    assert report.versions["python"] == platform.python_version()
    assert set(report.versions) == {"hessfunc", "python", "torch", "numpy", "scipy", "platform"}


def test_report_of_a_run_survives_the_disk(analyzed, tmp_path):
    report, _, _ = analyzed
    loaded = load_report(report.save(tmp_path, eigenvectors=True))
    assert torch.equal(loaded.eigenpairs.eigenvalues, report.eigenpairs.eigenvalues)
    assert loaded.table() == report.table()
    flat = torch.cat([leaf.flatten(1) for leaf in loaded.eigenpairs.eigenvectors.values()], dim=1)
    assert torch.equal(flat, report.eigenpairs.rows())


def test_same_seed_same_report():
    loss, params, data = problem(torch.float32)
    one, two, other = (analyze(loss, params, data, **SMALL, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one.trace.samples, two.trace.samples)
    assert torch.equal(one.quadrature.nodes, two.quadrature.nodes)
    assert not torch.equal(one.trace.samples, other.trace.samples)
    assert one.surface is None
    assert "surface" not in one.seconds
    assert other.settings["seed"] == 4


def test_options_reach_what_they_are_for():
    loss, params, data = problem()

    def summed(params, x, y):
        return len(x) * loss(params, x, y)

    base = analyze(loss, params, data, **SMALL, generator=seeded(0))
    options = {"which": "SA", "reduction": "sum", "product": hf.hvp_double_backward, "chunk_size": 2}
    report = analyze(summed, params, data, **SMALL, **options, surface_points=3, generator=seeded(0))
    values = torch.linalg.eigvalsh(hf.hessian(loss, params, data).dense())
    torch.testing.assert_close(report.eigenpairs.eigenvalues, 11 * values[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(report.surface.losses[1, 1] / 11, torch.tensor(_loss(loss, params, data), dtype=F64))
    calls = []

    def counted(params, x, y):
        calls.append(1)
        return loss(params, x, y)

    analyze(counted, params, data, **SMALL, linearize=True, memory_budget=2**20, generator=seeded(0))
    traced = len(calls)
    plain = analyze(counted, params, data, **SMALL, linearize=False, generator=seeded(0))
    assert traced < 15 < 40 < len(calls) - traced  # traced once for each shape of batch, or run for each product
    torch.testing.assert_close(plain.eigenpairs.eigenvalues, base.eigenpairs.eigenvalues, rtol=1e-10, atol=0)
    assert plain.settings["linearize"] is False
    assert report.settings["product"] == "hvp_double_backward"
    assert report.settings["chunk_size"] == 2
    assert report.settings["which"] == "SA"
    assert base.settings["which"] == "LM"
    weighted = analyze(loss, params, data, **SMALL, count=lambda batch: len(batch[1]), generator=seeded(0))
    torch.testing.assert_close(weighted.eigenpairs.eigenvalues, base.eigenpairs.eigenvalues, rtol=1e-10, atol=0)
    assert weighted.settings["count"] == "custom"


def _loss(loss, params, data):
    return sum(len(y) * float(loss(params, x, y)) for x, y in data) / 11


def test_defaults_suit_a_small_problem():
    report = analyze(lambda p: (p * p * torch.arange(1.0, 8.0)).sum(), torch.zeros(7), generator=seeded(0))
    assert report.settings["num_steps"] == 7
    torch.testing.assert_close(report.eigenpairs.eigenvalues, torch.tensor([14.0, 12, 10, 8, 6]), rtol=1e-4, atol=0)
    assert report.trace.samples.shape == (32,)
    assert float(report.trace) == pytest.approx(56, rel=1e-4)
    assert report.quadrature.num_probes == 4


BAD = [
    ({"generator": 0}, TypeError, "generator is of type int"),
    ({"num_probes": 1}, ValueError, "num_probes=1 is out of range; expected 2 <= num_probes: one sample has no"),
    ({"density_probes": 0}, ValueError, "density_probes=0 is out of range"),
    (
        {"num_steps": 0},
        ValueError,
        "num_steps=0 is out of range; expected 1 <= num_steps <= 38, the number of parameters",
    ),
    ({"num_steps": 39}, ValueError, "num_steps=39 is out of range"),
    ({"surface_points": 2}, ValueError, "surface_points=2 is out of range; expected 3 <= surface_points"),
    ({"surface_points": 3, "surface_span": 0.0}, ValueError, r"surface_span=0.0 is out of range"),
    ({"k": 0}, ValueError, "k=0 is out of range"),
    ({"k": 39}, ValueError, "k=39 is out of range"),
    ({"which": "XX"}, ValueError, "which='XX' is not known"),
    ({"tol": 0.0}, ValueError, "tol=0.0 is out of range"),
    ({"reduction": "none"}, ValueError, "reduction='none' is not known"),
    ({"chunk_size": 0}, ValueError, "chunk_size=0 is out of range"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_bad_options_are_refused_before_any_product(change, error, text):
    loss, params, data = problem()
    ticks = []
    options = {**SMALL, "generator": seeded(0), "progress": lambda *call: ticks.append(call), **change}
    with pytest.raises(error, match=text):
        analyze(loss, params, data, **options)
    assert ticks == []
