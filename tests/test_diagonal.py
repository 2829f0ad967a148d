"""Diagonals, Frobenius norms and sharpness against exact values, and their error bars against the errors made."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64, CountingRows, case, dense_hessian, relative_error, seeded, symmetric

import hessfunc as hf
from hessfunc import tree
from hessfunc._diagonal import diagonal, frobenius_squared, xdiag
from hessfunc._sharpness import condition_number, effective_dimension, sam_ascent, sharpness, stable_rank

SPECTRA = {
    "decay": [50 * 0.8**i - 0.5 for i in range(30)],
    "flat": torch.linspace(-3, 5, 30).tolist(),
    "outliers": [100.0, 60.0, 30.0, *torch.linspace(-1, 1, 27).tolist()],
}


def errors(method, matrix: torch.Tensor, num_probes: int, seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors and standard errors, shape (seeds, n)."""
    H = hf.as_operator(matrix)
    runs = [method(H, num_probes=num_probes, generator=seeded(seed)) for seed in range(seeds)]
    return torch.stack([run.value - matrix.diagonal() for run in runs]), torch.stack([run.stderr for run in runs])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("method", "low", "high"), [(diagonal, 0.94, 1.06), (xdiag, 0.94, 1.09)])
def test_errors_are_what_the_standard_errors_say(name, method, low, high):
    error, stderr = errors(method, symmetric(SPECTRA[name]), 8, 200)
    ratio = float((stderr.square().mean() / error.square().mean()).sqrt())
    assert low < ratio < high
    # No bias: the mean error over seeds is within its own standard error.
    z = error.mean(0) / (error.std(0) / math.sqrt(200))
    assert 0.6 < float(z.square().mean().sqrt()) < 1.45


def test_hutchinson_variance_is_the_formula():
    matrix = symmetric(SPECTRA["flat"])
    error, _ = errors(diagonal, matrix, 4, 300)
    variance = (matrix.square().sum(1) - matrix.diagonal().square()) / 4
    assert float(error.square().mean()) == pytest.approx(float(variance.mean()), rel=0.06)


def test_xdiag_is_the_more_accurate_for_the_same_matvecs_where_few_eigenvalues_matter():
    matrix = symmetric(SPECTRA["outliers"])
    plain, _ = errors(diagonal, matrix, 16, 40)
    better, _ = errors(xdiag, matrix, 8, 40)
    assert better.square().mean() < plain.square().mean() / 100


@pytest.mark.parametrize("eigenvalues", [[0.0] * 9, [3.0, -2.0, *[0.0] * 7], [5.0, *[0.0] * 8]])
def test_xdiag_is_exact_below_the_number_of_probes(eigenvalues):
    matrix = symmetric(eigenvalues)
    result = xdiag(hf.as_operator(matrix), num_probes=4, generator=seeded())
    rank = sum(value != 0 for value in eigenvalues)
    assert float((result.value - matrix.diagonal()).abs().max()) < 1e-12
    assert float(result.stderr.max()) < 1e-12
    assert result.num_matvecs == 4 + rank


def test_xdiag_does_not_take_few_coordinates_for_a_low_rank():
    matrix = torch.diag(torch.tensor([1.0, 2.0, *[0.0] * 18], dtype=F64))
    for seed in range(20):  # random signs would agree on both coordinates in one of eight runs
        result = xdiag(hf.as_operator(matrix), num_probes=4, generator=seeded(seed))
        assert float((result.value - matrix.diagonal()).abs().max()) < 1e-12


def test_xdiag_is_exact_where_that_costs_no_more():
    matrix = symmetric(SPECTRA["flat"])
    counting = CountingRows(matrix)
    result = xdiag(counting.operator, num_probes=15, chunk_size=8, generator=seeded())
    assert relative_error(result.value, matrix.diagonal()) < 1e-14
    assert float(result.stderr.max()) == 0
    assert counting.passes == [8, 8, 8, 6]
    assert result.num_matvecs == result.trace.num_matvecs == 30
    assert float(result.trace) == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert float(result.frobenius_squared) == pytest.approx(float(matrix.square().sum()), rel=1e-12)
    assert float(result.trace.stderr) == float(result.frobenius_squared.stderr) == 0
    assert all(float(leaf.stderr) == 0 for leaf in result.trace.per_leaf.values())


def test_diagonal_matrix_is_exact_with_one_probe():
    values = torch.tensor([3.0, -1.0, 0.0, 7.0], dtype=F64)
    H = hf.as_operator(torch.diag(values))
    result = diagonal(H, num_probes=1, generator=seeded())
    assert torch.equal(result.value, values)
    assert bool(result.stderr.isinf().all())
    assert float(diagonal(H, num_probes=2, generator=seeded()).stderr.abs().max()) == 0


@pytest.mark.parametrize("method", [diagonal, xdiag])
def test_result_on_a_network_has_the_shape_of_the_parameters_and_is_right(method):
    loss, params, batch = case("mlp tanh")
    exact = dense_hessian("mlp tanh")
    H = hf.hessian(loss, params, batch)
    num_probes = 30 if method is diagonal else 15
    result = method(H, num_probes=num_probes, generator=seeded(1))
    error = H.layout.ravel(result.value) - exact.diagonal()
    stderr = H.layout.ravel(result.stderr)
    assert tree.names(result.value) == tree.names(params)
    assert all(a.shape == b.shape for a, b in zip(tree.leaves(result.stderr), tree.leaves(params), strict=True))
    assert 0.6 < float(error.square().sum().sqrt() / stderr.square().sum().sqrt()) < 1.6
    assert result.num_matvecs == 30
    assert result.trace.num_matvecs == result.frobenius_squared.num_matvecs == num_probes
    assert abs(float(result.trace) - float(exact.trace())) < 4 * float(result.trace.stderr)
    square = result.frobenius_squared
    assert abs(float(square) - float(exact.square().sum())) < 4 * float(square.stderr)
    start = 0
    for name, size in zip(H.layout.names, H.layout.sizes, strict=True):
        rows = exact[start : start + size]
        leaf = square.per_leaf[name]
        assert abs(float(leaf) - float(rows.square().sum())) < 5 * float(leaf.stderr)
        share = result.trace.per_leaf[name]
        assert abs(float(share) - float(rows[:, start : start + size].trace())) < 5 * float(share.stderr)
        start += size


def test_probes_are_shared_and_do_not_depend_on_the_chunk():
    matrix = symmetric(SPECTRA["flat"])
    counting = CountingRows(matrix)
    whole = diagonal(counting.operator, num_probes=10, generator=seeded(2))
    assert counting.passes == [10]
    parts = diagonal(counting.operator, num_probes=10, chunk_size=4, generator=seeded(2))
    assert counting.passes == [10, 4, 4, 2]
    assert relative_error(parts.value, whole.value) < 1e-13
    assert relative_error(parts.stderr, whole.stderr) < 1e-13
    trace = hf.hutchinson(counting.operator, num_probes=10, generator=seeded(2))
    assert relative_error(trace.samples, whole.trace.samples) < 1e-13
    square = frobenius_squared(counting.operator, num_probes=10, chunk_size=3, generator=seeded(2))
    assert relative_error(square.samples, whole.frobenius_squared.samples) < 1e-13
    sketched = xdiag(counting.operator, num_probes=10, chunk_size=4, generator=seeded(2))
    assert relative_error(xdiag(counting.operator, num_probes=10, generator=seeded(2)).value, sketched.value) < 1e-10


def test_frobenius_norm_by_its_error_bars():
    matrix = symmetric(SPECTRA["decay"])
    exact = float(matrix.square().sum())
    H = hf.as_operator(matrix)
    runs = [frobenius_squared(H, num_probes=12, generator=seeded(seed)) for seed in range(300)]
    inside = sum(run.interval()[0] < exact < run.interval()[1] for run in runs)
    assert 0.89 < inside / 300 < 0.985
    variance = 2 * (matrix @ matrix).square()
    formula = float(variance.sum() - variance.diagonal().sum()) / 12
    spread = torch.tensor([float(run) - exact for run in runs]).square().mean()
    assert float(spread) == pytest.approx(formula, rel=0.3)


def test_frobenius_norm_to_a_tolerance():
    H = hf.as_operator(symmetric(SPECTRA["flat"]))
    result = frobenius_squared(H, rtol=0.05, generator=seeded())
    assert result.half_width() <= 0.05 * float(result)
    assert result.num_matvecs == len(result.samples)
    with pytest.warns(
        hf.ConvergenceWarning, match="frobenius_squared: the 95% interval is .* after max_probes=9"
    ) as caught:
        frobenius_squared(H, rtol=1e-4, max_probes=9, generator=seeded())
    assert caught[0].filename == __file__


def test_sharpness():
    matrix = symmetric([-9.0, 1.0, 2.0, 5.0])
    H = hf.as_operator(matrix)
    result = sharpness(H, num_probes=64, tol=1e-8, generator=seeded())
    assert float(result.lambda_max) == pytest.approx(5.0, rel=1e-8)
    assert bool(result.top.converged[0])
    assert abs(float(result.trace) + 1) < 4 * float(result.trace.stderr)
    assert float(result.mean_eigenvalue) == pytest.approx(float(result.trace) / 4, rel=1e-12)
    assert float(result.mean_eigenvalue.stderr) == pytest.approx(float(result.trace.stderr) / 4, rel=1e-12)
    assert result.num_matvecs == result.top.num_matvecs + 64 + 1  # which checks the pair that is deflated


def test_sam_ascent_is_the_worst_direction_and_its_rise_the_second_order_formula():
    loss, params, batch = case("mlp tanh")
    rho = 1e-3
    step, rise = sam_ascent(loss, params, *batch, rho=rho)
    gradient = torch.func.grad(loss)(params, *batch)
    norm = float(tree.norm(gradient))
    assert relative_error(step, tree.scale(rho / norm, gradient)) < 1e-12
    curvature = float(tree.vdot(step, hf.hvp(loss, params, step, *batch)))
    assert float(rise) == pytest.approx(rho * norm + curvature / 2, rel=1e-5)
    flat, nothing = sam_ascent(lambda w: (w**2).sum(), torch.zeros(3))
    assert torch.equal(flat, torch.zeros(3))
    assert float(nothing) == 0


def test_stable_rank_effective_dimension_and_condition_number():
    values = torch.tensor([4.0, 4.0, 2.0, 1.0, 0.5, 0.5], dtype=F64)
    H = hf.as_operator(symmetric(values))
    rank = stable_rank(H, num_probes=200, tol=1e-8, generator=seeded())
    exact = float(values.square().sum()) / 16
    assert abs(float(rank) - exact) < 4 * float(rank.stderr)
    assert float(rank.stderr) < 0.1 * exact
    quadrature = hf.slq(H, num_steps=5, num_probes=100, generator=seeded())
    dimension = effective_dimension(quadrature, 1.5)
    exact = float((values / (values + 1.5)).sum())
    assert abs(float(dimension) - exact) < 4 * float(dimension.stderr)
    assert float(dimension.stderr) < 0.1 * exact
    assert condition_number(H, tol=1e-10, generator=seeded()) == pytest.approx(8.0, rel=1e-8)
    assert condition_number(hf.as_operator(torch.tensor([[3.0]])), generator=seeded()) == 1.0


@pytest.mark.parametrize("method", [diagonal, xdiag, frobenius_squared])
def test_products_that_overflow_are_reported(method):
    H = hf.Operator(torch.ones(3), lambda rows: rows * float("inf"))
    with pytest.raises(FloatingPointError, match="H v of a probe v is NaN or infinite; the operator overflows"):
        method(H, num_probes=2, generator=seeded())


def test_errors_name_the_remedy():
    H = hf.as_operator(torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"num_probes=0 is out of range; expected 1 <= num_probes\."):
        diagonal(H, num_probes=0, generator=seeded())
    with pytest.raises(ValueError, match=r"num_probes=1 is out of range; .* \(xdiag leaves one probe out\)"):
        xdiag(H, num_probes=1, generator=seeded())
    with pytest.raises(ValueError, match="chunk_size=0 is out of range"):
        diagonal(H, num_probes=2, chunk_size=0, generator=seeded())
    with pytest.raises(TypeError, match=r"generator is of type int, expected a torch\.Generator"):
        diagonal(H, num_probes=2, generator=0)
    with pytest.raises(TypeError, match=r"generator is of type int, expected a torch\.Generator"):
        xdiag(H, num_probes=2, generator=0)
    with pytest.raises(TypeError, match=r"generator is of type int, expected a torch\.Generator"):
        frobenius_squared(H, num_probes=2, generator=0)
    with pytest.raises(ValueError, match="num_probes, rtol and atol are all None"):
        frobenius_squared(H, generator=seeded())
    with pytest.raises(ValueError, match=r"rho=0 is out of range; expected a finite number above 0\."):
        sam_ascent(lambda w: w.sum(), torch.ones(2), rho=0)
    with pytest.raises(ValueError, match=r"loss returned a tensor of shape \(2,\)"):
        sam_ascent(lambda w: w, torch.ones(2))
    with pytest.raises(ValueError, match="H is zero: no eigenvalue differs from 0"):
        stable_rank(0.0 * H, generator=seeded())
    quadrature = hf.slq(H - H.shift(1.0), num_steps=1, num_probes=2, generator=seeded())
    with pytest.raises(ValueError, match=r"shift=1\.0 does not dominate the negative node -1 of the quadrature"):
        effective_dimension(quadrature, 1.0)
    with pytest.raises(ValueError, match=r"shift=-1 is out of range"):
        effective_dimension(quadrature, -1)
    with pytest.raises(ValueError, match="H has the eigenvalue -2, so it is not positive definite; shift it"):
        condition_number(-2.0 * H, generator=seeded())
