import math

import numpy as np
import pytest
import torch
from helpers import F64, SPECTRA, CountingRows, seeded, symmetric
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import hessfunc as hf
from hessfunc import _leave_one_out, _probes
from hessfunc._chunks import draw
from hessfunc._leave_one_out import nystrom_values, spread_and_covariance, xtrace_values
from hessfunc._probe_law import law_mean
from hessfunc._sketch_trace import deflated, hutchpp, xnystrace, xtrace
from hessfunc._sketches import HutchPlusPlus, KrylovDeflation
from hessfunc._trace import hutchinson

METHODS = [deflated, hutchpp, xtrace, xnystrace]
HALVES = [deflated, hutchpp]
COST = {deflated: lambda k: k, hutchpp: lambda k: k + (k + 1) // 2, xtrace: lambda k: 2 * k, xnystrace: lambda k: k}
LIKE = {"w": torch.zeros(9, 6, dtype=F64), "b": torch.zeros(6, dtype=F64)}

DECAYING = [10.0 / i**1.5 for i in range(1, 61)]
INDEFINITE = [30.0, 20.0, -12.0, 6.0, *torch.linspace(-0.5, 0.8, 56).tolist()]
FLAT = torch.linspace(1, 2, 60).tolist()
STEP = [5.0] * 6 + [0.01] * 54


def sphere(num, size, seed):
    return _probes.sphere(num, size, generator=seeded(seed), dtype=F64, device="cpu")


# Against the definitions


def leave_out(matrix, probes, test, left_out):
    """From the definition, the value of the test probe with the images of all probes but those left out; its law."""
    others = [i for i in range(len(probes)) if i not in left_out]
    basis = torch.linalg.qr((probes[others] @ matrix).T)[0]
    outside = torch.eye(len(matrix), dtype=F64) - basis @ basis.T
    tested, law = on_the_sphere(outside @ matrix @ outside, outside @ probes[test], len(matrix) - len(others))
    return float((basis.T @ matrix @ basis).trace() + tested), law


def leave_out_nystrom(matrix, probes, test, left_out):
    others = [i for i in range(len(probes)) if i not in left_out]
    images = matrix @ probes[others].T
    approximation = images @ torch.linalg.pinv(probes[others] @ images) @ images.T
    basis = torch.linalg.qr(probes[others].T)[0]
    rest = probes[test] - basis @ (basis.T @ probes[test])
    tested, law = on_the_sphere(matrix - approximation, rest, len(matrix) - len(others))
    return float(approximation.trace() + tested), law


def on_the_sphere(matrix, probe, dimension):
    """The quadratic form of a probe that is stretched to the radius of its space, and what it says of its variance."""
    probe = probe * (dimension / (probe @ probe)) ** 0.5
    tested, image = probe @ matrix @ probe, matrix @ probe
    return float(tested), float(2 * (image @ image - tested.square() / dimension))


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("spectrum", [DECAYING, FLAT, STEP])
@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_values_and_error_are_those_of_leaving_out_one_probe_and_two(method, spectrum, k):
    matrix = symmetric(spectrum)
    estimate = method(hf.as_operator(matrix), num_probes=k, generator=seeded(3))
    g = seeded(3)
    probes = torch.cat([_probes.sphere(1, 60, generator=g, dtype=F64, device="cpu") for _ in range(k)])
    reference = leave_out if method is xtrace else leave_out_nystrom
    values, laws = torch.tensor([reference(matrix, probes, i, {i}) for i in range(k)], dtype=F64).T
    torch.testing.assert_close(estimate.samples, values, rtol=1e-9, atol=1e-9)
    assert float(estimate) == pytest.approx(float(values.mean()), rel=1e-10)
    if k == 1:
        assert float(estimate.stderr) == math.inf
        return
    change = {(i, j): values[i] - reference(matrix, probes, i, {i, j})[0] for i in range(k) for j in range(k) if i != j}
    covariance = float(sum(change[i, j] * change[j, i] for i, j in change)) / (k * (k - 1))
    variance = float(laws.mean()) / k
    if covariance < 0:
        covariance = min(-covariance, variance / 4)
    expected = (variance + (1 - 1 / k) * covariance) ** 0.5
    assert estimate.dof == pytest.approx(float(law_mean(laws)[1]), rel=1e-7)
    assert float(estimate.stderr) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("spectrum", [DECAYING, INDEFINITE, FLAT, STEP], ids=["decaying", "indefinite", "flat", "step"])
@pytest.mark.parametrize("method", [xtrace_values, nystrom_values])
def test_spread_and_covariance_add_up_to_the_variance_of_the_mean(method, spectrum, monkeypatch):
    """On average over runs, whatever the spectrum: the identity that the standard error rests on.

    The law of the probes tells the variance of one value, which is that of the mean without what they have in common.
    """
    if method is nystrom_values and min(spectrum) < 0:
        pytest.skip("for positive semi-definite operators")
    parts = []

    def kept(samples, pairs, laws):
        parts.append([samples.mean(), *spread_and_covariance(samples, pairs), laws.mean() / len(laws)])
        return samples.mean(), None

    monkeypatch.setattr(_leave_one_out, "_error", kept)
    diagonal = torch.tensor(spectrum, dtype=F64)
    for seed in range(1500):
        # Next to the drop of STEP, after six, errors have such tails that no mean of squares settles.
        probes = sphere(4 if spectrum is STEP else 9, 60, seed)
        images = probes * diagonal
        if method is nystrom_values:
            method(probes, images)
        else:
            basis = torch.linalg.qr(images.T)[0].T.contiguous()
            method(probes, images, basis, basis * diagonal)
    mean, spread, covariance, law = torch.tensor(parts, dtype=F64).unbind(1)
    error = (mean - sum(spectrum)).square() - spread - covariance
    assert abs(float(error.mean())) < 4 * float(error.std()) / 1500**0.5
    assert float(error.std()) / 1500**0.5 < 0.1 * float(mean.var())
    gap = law - spread - covariance / (4 if spectrum is STEP else 9)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 1500**0.5
    assert float(spread.mean()) < 0.96 * float(mean.var()), "which the spread alone does not tell"


def test_xtrace_on_an_indefinite_matrix_is_that_of_the_definition():
    matrix = symmetric(INDEFINITE)
    estimate = xtrace(hf.as_operator(matrix), num_probes=6, generator=seeded(3))
    g = seeded(3)
    probes = torch.cat([_probes.sphere(1, 60, generator=g, dtype=F64, device="cpu") for _ in range(6)])
    values = [leave_out(matrix, probes, i, {i})[0] for i in range(6)]
    torch.testing.assert_close(estimate.samples, torch.tensor(values, dtype=F64), rtol=1e-9, atol=1e-9)


def check_against_formula(estimate, matrix, basis, probes):
    """Of the whole and of both leaves: the diagonal known from the basis, and samples of what is off it."""
    off = torch.eye(60, dtype=F64) - basis.T @ basis
    left = off @ matrix @ off
    expected = (matrix - left).diagonal() + probes * (probes @ left)
    torch.testing.assert_close(estimate.samples, expected.sum(1), rtol=1e-10, atol=1e-10)
    assert list(estimate.per_leaf) == list(LIKE)
    for part, columns in zip(estimate.per_leaf.values(), (slice(54), slice(54, 60)), strict=True):
        torch.testing.assert_close(part.samples, expected[:, columns].sum(1), rtol=1e-10, atol=1e-10)


def test_hutchpp_is_hutchinson_on_what_the_image_of_the_first_half_leaves_over():
    matrix = symmetric(INDEFINITE)
    estimate = hutchpp(hf.as_operator(matrix, LIKE), num_probes=11, generator=seeded(3))
    H = hf.as_operator(matrix)
    first, second = (torch.cat(list(draw(H, num, _probes.signs, 16, g))) for g in [seeded(3)] for num in (6, 5))
    check_against_formula(estimate, matrix, torch.linalg.qr((first @ matrix).T)[0].T, second)
    assert estimate.num_matvecs == 6 + 6 + 5


def test_deflated_is_hutchinson_on_what_the_krylov_space_of_one_probe_leaves_over():
    matrix = symmetric(INDEFINITE)
    H = hf.as_operator(matrix, LIKE)
    estimate = deflated(H, num_probes=11, generator=seeded(3))
    g = seeded(3)
    start, probes = (torch.cat(list(draw(H, num, _probes.signs, 16, g))) for num in (1, 5))
    check_against_formula(estimate, matrix, hf.lanczos(lambda v: matrix @ v, start[0], 6).basis, probes)
    assert estimate.num_matvecs == 11


def test_deflated_with_pairs_is_hutchinson_with_them():
    matrix = symmetric(INDEFINITE)
    H = hf.as_operator(matrix, LIKE)
    pairs = hf.eigsh(H, 4, generator=seeded())
    for options in (
        {"num_probes": 9, "chunk_size": 2},
        {"rtol": 0.5, "confidence": 0.8},
        {"atol": 9, "max_probes": 99},
    ):
        ours = deflated(H, pairs, **options, generator=seeded(1))
        theirs = hutchinson(H, deflate=pairs, **options, generator=seeded(1))
        assert torch.equal(ours.leaf_samples, theirs.leaf_samples)
        assert ours.num_matvecs == theirs.num_matvecs
    vectors = deflated(H, pairs.eigenvectors, num_probes=9, generator=seeded(1))
    assert vectors.num_matvecs == 13


# Accuracy; how often intervals hold the trace is in test_calibration.py


@pytest.mark.parametrize("method", METHODS)
def test_on_a_decaying_spectrum_they_beat_hutchinson_at_equal_cost(method):
    matrix = symmetric([10.0 / i**2 for i in range(1, 201)])
    H, truth = hf.as_operator(matrix), float(matrix.trace())
    k = {deflated: 60, hutchpp: 40, xtrace: 30, xnystrace: 60}[method]

    def error(of, num):
        runs = [of(H, num_probes=num, chunk_size=60, generator=seeded(seed)) for seed in range(30)]
        assert all(run.num_matvecs == 60 for run in runs)
        return torch.tensor([float(run) - truth for run in runs]).square().mean().sqrt()

    assert error(method, k) < error(hutchinson, 60) / 5


# Exactness and degenerate operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_below_the_number_of_probes_gives_the_exact_trace(method, dtype):
    matrix = symmetric([4.0, 3.0, 3.0, 1.0, *[0.0] * 56], dtype=dtype)
    estimate = method(hf.as_operator(matrix), num_probes=12, generator=seeded(1))
    # A Nystrom approximation is good to the square root of rounding.
    close = 1e-10 if dtype == F64 else 2e-3 if method is xnystrace else 1e-5
    assert float(estimate) == pytest.approx(11, rel=1e-11 if dtype == F64 else 1e-4)
    assert float(estimate.stderr) < close
    spent = {deflated: 12, hutchpp: 6 + 4 + 6, xtrace: 12 + 4, xnystrace: 12}[method]
    assert estimate.num_matvecs == spent


@pytest.mark.parametrize("k", [4, 5, 6])
def test_xtrace_is_exact_from_one_probe_more_than_the_rank(k):
    matrix = symmetric([4.0, -3.0, 3.0, 1.0, *[0.0] * 56])
    estimate = xtrace(hf.as_operator(matrix), num_probes=k, generator=seeded(2))
    assert (abs(float(estimate) - 5) < 1e-9) == (k > 4)
    assert (float(estimate.stderr) < 1e-9) == (k > 4)


@pytest.mark.parametrize("factor", [3.0, -2.0])
@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_a_multiple_of_the_identity_is_exact(method, factor):
    H = hf.as_operator(factor * torch.eye(60, dtype=F64))
    if method is xnystrace and factor < 0:
        with pytest.raises(ValueError, match=r"has the Rayleigh quotient -2\b"):
            method(H, num_probes=5, generator=seeded())
        return
    estimate = method(H, num_probes=5, generator=seeded())
    assert float(estimate) == pytest.approx(60 * factor, rel=1e-12)
    assert float(estimate.stderr) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_the_zero_operator_has_trace_zero(method, dtype):
    H = hf.as_operator(torch.zeros(50, 50, dtype=dtype))
    for options in ({"num_probes": 6}, {"rtol": 0.1}, {"atol": 0.1}):
        estimate = method(H, **options, generator=seeded())
        assert (float(estimate), float(estimate.stderr)) == (0, 0)
        assert torch.isfinite(estimate.samples).all()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_small_operators_get_their_diagonal_summed(method, name):
    matrix = symmetric(SPECTRA[name])
    counted = CountingRows(matrix)
    estimate = method(counted.operator, num_probes=8, generator=seeded())
    assert float(estimate) == pytest.approx(float(matrix.trace()), rel=1e-12, abs=1e-12)
    assert float(estimate.stderr) == 0
    assert estimate.interval() == (float(estimate), float(estimate))
    assert estimate.num_matvecs == sum(counted.passes) == len(matrix)
    part = estimate.per_leaf[""]
    assert (float(part), float(part.stderr)) == (float(estimate), 0)


@pytest.mark.parametrize("method", [hutchinson, *METHODS])
@settings(max_examples=25, deadline=None)
@given(
    entries=arrays(np.float64, st.tuples(st.integers(1, 7), st.just(7)), elements=st.floats(-1e3, 1e3, width=32)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    num_probes=st.sampled_from([2, 3, 9]),
)
def test_any_positive_semi_definite_matrix_goes_through(method, entries, dtype, num_probes):
    """Of any rank and scale, also zero, also with one row."""
    rows = torch.as_tensor(entries).to(dtype)
    matrix = rows @ rows.T
    estimate = method(hf.as_operator(matrix), num_probes=num_probes, generator=seeded())
    assert torch.isfinite(estimate.samples).all()
    assert float(estimate.stderr) >= 0
    if estimate.leaf_samples is not None:
        torch.testing.assert_close(estimate.leaf_samples.sum(1), estimate.samples, rtol=1e-6, atol=1e-9)
    if method is not hutchinson and num_probes >= len(rows):
        assert float(estimate) == pytest.approx(float(matrix.trace()), rel=1e-5)
        assert float(estimate.stderr) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_out_of_reach_ends_with_the_diagonal(method):
    counted = CountingRows(symmetric(DECAYING))
    estimate = method(counted.operator, rtol=1e-9, chunk_size=7, generator=seeded())
    assert float(estimate) == pytest.approx(sum(DECAYING), rel=1e-12)
    assert float(estimate.stderr) == 0
    assert estimate.num_matvecs == sum(counted.passes) < 2.5 * 60
    assert max(counted.passes) <= 7


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("method", METHODS)
def test_estimates_scale_with_the_operator(method, scale):
    matrix = symmetric(DECAYING)
    unit, scaled = (
        method(hf.as_operator(factor * matrix), num_probes=8, generator=seeded()) for factor in (1.0, scale)
    )
    torch.testing.assert_close(scaled.samples / scale, unit.samples, rtol=1e-9, atol=0)
    assert float(scaled.stderr) == pytest.approx(scale * float(unit.stderr), rel=1e-8)


def test_float32_agrees_with_float64_up_to_its_rounding():
    matrix = symmetric(DECAYING)
    probes = sphere(20, 60, 1)
    images = probes @ matrix
    basis = torch.linalg.qr(images.T)[0].T.contiguous()
    products = basis @ matrix
    for function, arguments in ((xtrace_values, (probes, images, basis, products)), (nystrom_values, (probes, images))):
        double, single = function(*arguments), function(*(array.float() for array in arguments))
        torch.testing.assert_close(single.samples, double.samples, rtol=1e-4, atol=0)
        assert float(single.stderr) == pytest.approx(float(double.stderr), rel=0.02)
        assert single.samples.dtype == single.stderr.dtype == F64


# Indefinite operators


def test_xnystrace_refuses_an_indefinite_operator_and_says_what_takes_it():
    text = r"not positive semi-definite, .* Rayleigh quotient -\d.*hessfunc.xtrace, hutchpp and hutchinson take every"
    with pytest.raises(ValueError, match=text):
        xnystrace(hf.as_operator(symmetric(INDEFINITE)), num_probes=20, generator=seeded())


def test_rounding_below_zero_is_no_indefiniteness():
    matrix = symmetric([5.0, 1.0, *[-1e-15] * 58])
    assert float(xnystrace(hf.as_operator(matrix), num_probes=6, generator=seeded())) == pytest.approx(6, rel=1e-10)


def test_xnystrace_of_a_slightly_indefinite_operator_is_unbiased_while_it_goes_through():
    spectrum = [20.0, *torch.linspace(-0.02, 0.4, 59).tolist()]
    H = hf.as_operator(symmetric(spectrum))
    values = torch.tensor([float(xnystrace(H, num_probes=6, generator=seeded(seed))) for seed in range(200)])
    assert abs(float(values.mean()) - sum(spectrum)) < 4 * float(values.std()) / 200**0.5


# Probes, products, growth


@pytest.mark.parametrize("k", [2, 5, 10])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("method", METHODS)
def test_every_product_is_counted_and_no_pass_is_wider_than_the_chunk(method, chunk_size, k):
    counted = CountingRows(symmetric(DECAYING))
    estimate = method(counted.operator, num_probes=k, chunk_size=chunk_size, generator=seeded())
    assert estimate.num_matvecs == sum(counted.passes) == COST[method](k)
    assert max(counted.passes) <= (chunk_size or 16)
    assert len(estimate.samples) == (k // 2 if method in HALVES else k)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_estimate_whatever_the_chunk(method):
    H = hf.as_operator(symmetric(DECAYING), LIKE)
    for options in ({"num_probes": 11}, {"rtol": 0.1}):
        first, again, chunked = (
            method(H, **options, chunk_size=chunk, generator=seeded(4)) for chunk in (None, None, 3)
        )
        assert torch.equal(first.samples, again.samples)
        torch.testing.assert_close(chunked.samples, first.samples, rtol=1e-9, atol=1e-10)
        assert not torch.equal(method(H, **options, generator=seeded(5)).value, first.value)


@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_probes_added_under_a_tolerance_are_those_of_a_fixed_number(method):
    counted = CountingRows(symmetric(DECAYING))
    grown = method(counted.operator, rtol=0.05, generator=seeded())
    k = len(grown.samples)
    assert 8 < k < 30
    assert grown.num_matvecs == sum(counted.passes) == COST[method](k)
    assert grown.half_width() <= 0.05 * float(grown)
    fixed = method(counted.operator, num_probes=k, generator=seeded())
    torch.testing.assert_close(grown.samples, fixed.samples, rtol=1e-9, atol=1e-9)
    assert float(grown.stderr) == pytest.approx(float(fixed.stderr), rel=1e-7)


@pytest.mark.parametrize("kind", [HutchPlusPlus, KrylovDeflation])
def test_a_grown_sketch_holds_a_basis_and_products_of_all_it_leaves_over(kind):
    matrix = symmetric(INDEFINITE)
    counted = CountingRows(matrix)
    sketch = kind(counted.operator, 16, seeded())
    for count in (8, 12, 19):
        sketch.grow(count)
        assert sum(counted.passes) == sketch.num_matvecs == sketch.cost(count)
    basis, rest = sketch.basis, sketch.rest
    assert (len(basis), len(rest)) == (10, 9)
    torch.testing.assert_close(basis @ basis.T, torch.eye(10, dtype=F64), rtol=0, atol=1e-12)
    assert float(sketch.leaf_traces) == pytest.approx(float((basis * (basis @ matrix)).sum()), rel=1e-12)
    torch.testing.assert_close(sketch.rest_products, rest @ matrix, rtol=1e-10, atol=1e-10)
    assert float((rest @ basis.T).abs().max()) < 1e-12
    if kind is KrylovDeflation:
        projected = basis @ matrix @ basis.T
        assert float(projected.triu(2).abs().max()) < 1e-10


def test_a_krylov_space_that_is_exhausted_goes_on_from_a_fresh_probe():
    matrix = torch.diag(torch.tensor([3.0] * 30 + [-1.0] * 30, dtype=F64))
    sketch = KrylovDeflation(hf.as_operator(matrix), 16, seeded())
    sketch.grow(12)
    torch.testing.assert_close(sketch.basis @ sketch.basis.T, torch.eye(6, dtype=F64), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(sketch.basis @ matrix @ sketch.basis.T)
    torch.testing.assert_close(values, torch.tensor([-1.0] * 3 + [3.0] * 3, dtype=F64))


@pytest.mark.parametrize("method", METHODS)
def test_under_a_tolerance_the_estimate_is_as_close_as_was_asked(method):
    H = hf.as_operator(symmetric(DECAYING))
    runs = [method(H, rtol=0.15, chunk_size=100, generator=seeded(seed)) for seed in range(150)]
    assert all(run.half_width() <= 0.15 * float(run) for run in runs)
    close = sum(abs(float(run) / sum(DECAYING) - 1) <= 0.15 for run in runs) / len(runs)
    assert close >= 0.91


# Options and errors


@pytest.mark.parametrize("method", METHODS)
def test_probes_that_run_out_give_the_estimate_and_a_warning(method):
    H = hf.as_operator(symmetric(DECAYING))
    text = rf"{method.__name__}: the 90% interval is .* after max_probes=10, wider than rtol=0.001\. Raise max_probes"
    with pytest.warns(hf.ConvergenceWarning, match=text) as caught:
        estimate = method(H, rtol=1e-3, confidence=0.9, max_probes=10, generator=seeded())
    assert estimate.num_matvecs == COST[method](10)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "num_probes, rtol and atol are all None"),
        ({"num_probes": 5, "rtol": 0.1}, ValueError, "num_probes=5 fixes the number of probes"),
        ({"num_probes": 0}, ValueError, r"num_probes=0 is out of range; expected [12] <= num_probes"),
        ({"rtol": -1.0}, ValueError, r"rtol=-1.0 is out of range"),
        ({"atol": 0.0}, ValueError, r"atol=0.0 is out of range"),
        ({"rtol": 0.1, "confidence": 1.0}, ValueError, r"confidence=1.0 is out of range"),
        ({"rtol": 0.1, "max_probes": 0}, ValueError, r"max_probes=0 is out of range"),
        ({"num_probes": 5, "chunk_size": -1}, ValueError, r"chunk_size=-1 is out of range"),
        ({"num_probes": 5, "generator": None}, TypeError, r"generator is of type NoneType, expected a torch.Generator"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_options_are_named(method, options, error, text):
    with pytest.raises(error, match=text):
        method(hf.as_operator(torch.eye(60)), **{"generator": seeded(), **options})


@pytest.mark.parametrize("method", HALVES)
def test_a_probe_is_needed_in_each_half(method):
    with pytest.raises(ValueError, match=r"num_probes=1 is out of range; expected 2 <= num_probes"):
        method(hf.as_operator(torch.eye(60)), num_probes=1, generator=seeded())
    estimate = method(hf.as_operator(torch.eye(60)), num_probes=2, generator=seeded())
    assert (len(estimate.samples), float(estimate.stderr), estimate.num_matvecs) == (1, math.inf, COST[method](2))


@pytest.mark.parametrize("method", [xtrace, xnystrace])
def test_leave_one_out_values_have_no_leaves(method):
    estimate = method(hf.as_operator(symmetric(DECAYING)), num_probes=4, generator=seeded())
    assert estimate.leaf_samples is None
    with pytest.raises(ValueError, match="this estimate has no leaf_samples"):
        _ = estimate.per_leaf


@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite_stops_at_once(method):
    broken = hf.Operator(torch.zeros(60), lambda rows: rows * torch.nan)
    with pytest.raises(FloatingPointError, match="the product with a probe is NaN or infinite"):
        method(broken, num_probes=4, generator=seeded())
