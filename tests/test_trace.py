import itertools
import math
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, SPECTRA, CountingRows, seeded, symmetric
from scipy import stats
from torch import nn

import hessfunc as hf
from hessfunc import _probes
from hessfunc._deflation import Deflation, extend_basis
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._trace import hutchinson

LIKE = {"w": torch.zeros(5, 4, dtype=F64), "b": [torch.zeros(3, dtype=F64), torch.zeros((), dtype=F64)]}
NAMES, SIZES = ("w", "b.0", "b.1"), (20, 3, 1)
GROUPS = 1000


def outlying(seed=0):
    """A few large eigenvalues of both signs over a bulk, as in a trained network; 24 by 24."""
    return symmetric([40.0, 25.0, -15.0, 9.0, *torch.linspace(-1, 2, 20).tolist()], seed=seed)


def leaf_traces(matrix):
    return torch.stack([part.sum() for part in matrix.diagonal().split(SIZES)])


def exact_pairs(matrix, k):
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:k]
    return as_pairs(matrix, vectors[:, order].T)


def as_pairs(matrix, rows, like=LIKE):
    """What Rayleigh-Ritz makes of orthonormal rows."""
    values, mix = torch.linalg.eigh(rows @ matrix @ rows.T)
    rows = mix.T @ rows
    residuals = (rows @ matrix - values[:, None] * rows).norm(dim=1)
    layout = hf.tree.Layout.of(like)
    return Eigenpairs(values, layout.unravel_rows(rows), residuals, residuals < 1e-3, num_matvecs=0)


def rough_pairs(matrix, k):
    """Ritz pairs of one step of subspace iteration: orthonormal, and far from converged."""
    start = torch.randn(k, len(matrix), generator=seeded(9), dtype=F64) @ matrix
    return as_pairs(matrix, torch.linalg.qr(start.T)[0].T)


def assert_calibrated(samples, truth, *, size, low=0.92, high=0.98):
    """In groups of that many samples: no bias, standard errors of the right size, intervals that hold the truth."""
    groups = samples.unflatten(0, (-1, size))
    values, errors = groups.mean(1), groups.std(1) / size**0.5
    spread = values.std(0)
    assert (values.mean(0) - truth).abs().le(4 * spread / len(values) ** 0.5).all()
    assert (errors.square().mean(0).sqrt() / spread - 1).abs().max() < 0.12
    held = ((values - truth).abs() <= stats.t.ppf(0.975, size - 1) * errors).double().mean(0)
    assert held.min() >= low
    assert held.max() <= high


# The estimate


def test_samples_are_quadratic_forms_of_sign_probes_and_leaves_their_parts():
    matrix = outlying()
    estimate = hutchinson(hf.as_operator(matrix, LIKE), num_probes=7, generator=seeded(3))
    g = seeded(3)
    probes = torch.cat([_probes.signs(1, 24, generator=g, dtype=F64, device="cpu") for _ in range(7)])
    products = probes * (probes @ matrix)
    torch.testing.assert_close(estimate.samples, products.sum(1), rtol=1e-13, atol=1e-12)
    parts = torch.stack([part.sum(1) for part in products.split(SIZES, dim=1)], dim=1)
    torch.testing.assert_close(estimate.leaf_samples, parts, rtol=1e-13, atol=1e-12)
    assert estimate.leaf_names == NAMES == tuple(estimate.per_leaf)
    assert estimate.num_matvecs == 7


@pytest.mark.parametrize("diagonal", [[1.0, -2.0, 5.0], [0.0, 0.0], [-3.0]])
def test_signs_are_exact_on_a_diagonal_matrix(diagonal):
    estimate = hutchinson(hf.as_operator(torch.diag(torch.tensor(diagonal))), num_probes=3, generator=seeded())
    assert float(estimate) == sum(diagonal)
    assert float(estimate.stderr) == 0


@pytest.mark.parametrize("name", [name for name, values in SPECTRA.items() if len(values) > 1 and name != "identity"])
def test_the_mean_over_seeds_is_the_trace_and_the_variance_that_of_the_formula(name):
    matrix = symmetric(SPECTRA[name])
    estimate = hutchinson(hf.as_operator(matrix), num_probes=4000, generator=seeded(1))
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    assert abs(float(estimate) - sum(SPECTRA[name])) <= 4 * float(estimate.stderr) + 1e-12
    assert float(estimate.samples.var()) == pytest.approx(variance, rel=0.15, abs=1e-12)


@pytest.mark.parametrize("sampler", [_probes.normal, _probes.sphere])
def test_other_samplers_are_unbiased(sampler):
    matrix = outlying()
    estimate = hutchinson(hf.as_operator(matrix), num_probes=4000, sampler=sampler, generator=seeded(1))
    assert abs(float(estimate) - float(matrix.trace())) < 4 * float(estimate.stderr)
    if sampler is _probes.normal:
        assert float(estimate.samples.var()) == pytest.approx(2 * float(matrix.square().sum()), rel=0.1)


DEFLATE = {
    "nothing": lambda _: None,
    "eigenpairs": lambda matrix: exact_pairs(matrix, 4),
    "rough pairs": lambda matrix: rough_pairs(matrix, 4),
    "vectors": lambda matrix: rough_pairs(matrix, 4).eigenvectors,
    "pairs of another matrix": lambda _: exact_pairs(outlying(seed=5), 4),
    "skew vectors": lambda matrix: hf.tree.map_leaves(
        lambda leaf: torch.stack([leaf[0], leaf[0] + 0.1 * leaf[1]]), exact_pairs(matrix, 2).eigenvectors
    ),
}


@pytest.mark.parametrize("name", DEFLATE)
def test_estimates_of_the_whole_and_of_each_leaf_are_calibrated(name):
    matrix = outlying()
    H, known = hf.as_operator(matrix, LIKE), DEFLATE[name](matrix)
    truth = torch.cat([matrix.trace().unsqueeze(0), leaf_traces(matrix)])
    estimate = hutchinson(H, num_probes=30 * GROUPS, deflate=known, chunk_size=1000, generator=seeded(1))
    samples = torch.cat([estimate.samples.unsqueeze(1), estimate.leaf_samples], dim=1)
    assert_calibrated(samples, truth, size=30)
    torch.testing.assert_close(estimate.leaf_samples.sum(1), estimate.samples, rtol=1e-12, atol=1e-12)


# Deflation


def test_deflating_the_outliers_takes_their_part_of_the_variance_away():
    matrix = outlying()
    plain, deflated = (
        hutchinson(hf.as_operator(matrix, LIKE), num_probes=200, deflate=known, generator=seeded())
        for known in (None, exact_pairs(matrix, 4))
    )
    rows = exact_pairs(matrix, 4).rows()
    rest = matrix - rows.T @ (rows @ matrix @ rows.T) @ rows
    variance = 2 * float(rest.square().sum() - rest.diagonal().square().sum())
    assert float(deflated.samples.var()) == pytest.approx(variance, rel=0.3)
    assert float(deflated.stderr) < float(plain.stderr) / 5


@pytest.mark.parametrize("form", ["pairs", "vectors"])
def test_deflating_everything_is_exact(form):
    matrix = outlying()
    pairs = exact_pairs(matrix, 24)
    known = pairs if form == "pairs" else pairs.eigenvectors
    estimate = hutchinson(hf.as_operator(matrix, LIKE), num_probes=2, deflate=known, generator=seeded())
    assert float(estimate) == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert float(estimate.stderr) < 1e-12
    for part, trace in zip(estimate.per_leaf.values(), leaf_traces(matrix), strict=True):
        assert float(part) == pytest.approx(float(trace), rel=1e-11)


def test_one_product_certifies_eigenpairs_and_others_are_worked_out_anew():
    matrix = outlying()
    counted = CountingRows(matrix)
    layout = hf.tree.Layout.of(matrix[0])

    def spent(known):
        counted.passes.clear()
        estimate = hutchinson(counted.operator, num_probes=5, deflate=known, chunk_size=5, generator=seeded())
        assert estimate.num_matvecs == sum(counted.passes)
        return counted.passes.copy()

    def pairs(of, rows, shift=0.0):
        found = as_pairs(of, rows, like=matrix[0])
        return replace(found, eigenvalues=found.eigenvalues + shift)

    rows = exact_pairs(matrix, 3).rows()
    rough = rough_pairs(matrix, 3).rows()
    assert spent(None) == [5]
    assert spent(pairs(matrix, rows)) == [1, 5]
    assert spent(pairs(matrix, rough)) == [1, 5]
    assert spent(pairs(2 * matrix, rows)) == [1, 3, 5]
    assert spent(pairs(outlying(seed=5), rows)) == [1, 3, 5]
    assert spent(pairs(matrix, rows, shift=0.1)) == [1, 3, 5]
    assert spent(layout.unravel_rows(rows)) == [3, 5]
    assert spent(layout.unravel_rows(exact_pairs(matrix, 7).rows())) == [5, 2, 5]


def test_eigenpairs_whose_vectors_lost_orthonormality_still_give_no_bias():
    matrix = outlying()
    pairs = exact_pairs(matrix, 4)
    skew = hf.tree.map_leaves(lambda leaf: leaf.to(torch.bfloat16).double(), pairs.eigenvectors)
    bent = replace(pairs, eigenvectors=skew)
    estimate = hutchinson(hf.as_operator(matrix, LIKE), num_probes=20_000, deflate=bent, generator=seeded())
    assert abs(float(estimate) - float(matrix.trace())) < 4 * float(estimate.stderr) < 0.2
    assert estimate.num_matvecs > 20_000 + 1


def test_long_float32_vectors_keep_their_digits():
    """Sequential sums of three million float32 entries are off by 1e-4 and more."""
    size = 3_000_000
    rows = extend_basis(torch.empty(0, size), torch.randn(3, size, generator=seeded()))
    gram = rows.double() @ rows.double().T
    assert float((gram - torch.eye(3, dtype=F64)).abs().max()) < 1e-6
    values = torch.tensor([100.0, -50.0, 20.0])

    def product(vectors):
        return (((vectors.double() @ rows.double().T) * values) @ rows.double()).float()

    H = hf.Operator(torch.zeros(size), product)
    pairs = Eigenpairs(values, rows, torch.zeros(3), torch.ones(3, dtype=torch.bool), 0)
    estimate = hutchinson(H, num_probes=2, deflate=pairs, generator=seeded())
    assert estimate.num_matvecs == 3
    assert float(estimate) == pytest.approx(70, rel=2e-6)
    assert float(estimate.stderr) < 1e-4


def test_pairs_from_eigsh_deflate():
    matrix = outlying()
    H = hf.as_operator(matrix, LIKE)
    pairs = hf.eigsh(H, 4, generator=seeded())
    estimate = hutchinson(H, num_probes=16, deflate=pairs, generator=seeded())
    assert estimate.num_matvecs == 17
    assert abs(float(estimate) - float(matrix.trace())) < 4 * float(estimate.stderr) < 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_basis_grows_orthonormal_and_leaves_out_what_it_holds(dtype):
    block = torch.randn(6, 40, generator=seeded(), dtype=F64)
    first = extend_basis(block[:0].to(dtype), block[:3].to(dtype))
    nearly = 3 * block[:2] + 1e-4 * block[3:5]
    second = extend_basis(first, torch.cat([nearly, block[:1], block[5:]]).to(dtype))
    whole = torch.cat([first, second]).double()
    assert len(first) == 3
    assert len(second) == 3
    epsilon = torch.finfo(dtype).eps
    assert float((whole @ whole.T - torch.eye(6, dtype=F64)).abs().max()) < 20 * epsilon
    assert float((block - (block @ whole.T) @ whole).abs().max()) < 1e6 * epsilon
    inside = torch.randn(4, 6, generator=seeded(1), dtype=F64) @ whole
    assert extend_basis(whole.to(dtype), inside.to(dtype)).shape == (0, 40)
    assert extend_basis(whole[:0].to(dtype), torch.zeros(2, 40, dtype=dtype)).shape == (0, 40)


def test_nothing_deflated_is_a_projector_onto_nothing():
    H = hf.as_operator(outlying(), LIKE)
    rows = torch.ones(2, 24, dtype=F64)
    nothing = Deflation.of(None, H)
    assert torch.equal(nothing.project(rows), rows)
    assert nothing.num_matvecs == 0
    assert torch.equal(nothing.leaf_traces, torch.zeros(3, dtype=F64))


# Probes and products


@pytest.mark.parametrize("sampler", [_probes.signs, _probes.normal, _probes.sphere])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_same_seed_gives_the_same_probes_whatever_the_chunk(sampler, chunk_size):
    H = hf.as_operator(outlying(), LIKE)
    options = {"num_probes": 10, "sampler": sampler}
    whole = hutchinson(H, **options, generator=seeded(4))
    chunked = hutchinson(H, **options, chunk_size=chunk_size, generator=seeded(4))
    torch.testing.assert_close(chunked.leaf_samples, whole.leaf_samples, rtol=1e-12, atol=1e-12)
    again = hutchinson(H, **options, generator=seeded(4))
    assert torch.equal(again.samples, whole.samples)
    other = hutchinson(H, **options, generator=seeded(5))
    assert not torch.equal(other.samples, whole.samples)


@pytest.mark.parametrize(("chunk_size", "passes"), [(None, [16, 4]), (3, [3, 3, 3, 3, 3, 3, 2]), (20, [20])])
def test_probes_come_in_passes_of_the_chunk_size(chunk_size, passes):
    counted = CountingRows(outlying())
    estimate = hutchinson(counted.operator, num_probes=20, chunk_size=chunk_size, generator=seeded())
    assert counted.passes == passes
    assert estimate.num_matvecs == 20


def test_chunks_of_large_vectors_shrink():
    size = 2**25
    H = hf.Operator(torch.zeros(size), lambda rows: rows)
    assert hf._chunks.chunk_length(H, None) == 2
    assert hf._chunks.chunk_length(H, 5) == 5
    for size, length in ((1, 16), (2**18, 16), (2**19, 8), (2**22, 4), (2**24, 4)):
        assert hf._chunks.chunk_length(hf.Operator(torch.zeros(size), lambda rows: rows), None) == length


def test_one_probe_has_a_value_and_no_error():
    estimate = hutchinson(hf.as_operator(outlying()), num_probes=1, generator=seeded())
    assert estimate.samples.shape == (1,)
    assert float(estimate.stderr) == math.inf


def test_low_precision_parameters_get_float32_probes_and_float64_estimates():
    like = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    estimate = hutchinson(hf.Operator(like, lambda rows: 2 * rows), num_probes=4, generator=seeded())
    assert float(estimate) == 10
    assert [float(part) for part in estimate.per_leaf.values()] == [6, 4]
    assert estimate.value.dtype == estimate.leaf_samples.dtype == F64


# Stopping


@pytest.mark.parametrize(
    "tolerance", [{"rtol": 0.1}, {"atol": 5.0}, {"rtol": 1e-9, "atol": 5.0}, {"rtol": 0.1, "atol": 1e-9}]
)
def test_probes_are_added_until_either_tolerance_is_met(tolerance):
    counted = CountingRows(outlying())
    estimate = hutchinson(counted.operator, **tolerance, max_probes=10_000, generator=seeded())
    goal = max(tolerance.get("rtol", 0) * abs(float(estimate)), tolerance.get("atol", 0))
    assert estimate.half_width(0.95) <= goal
    assert estimate.half_width(0.95) > 0.6 * goal
    assert estimate.num_matvecs == len(estimate.samples) == sum(counted.passes) > 100


def test_the_interval_is_looked_at_few_times():
    looks = []

    class Watched(hf._trace.Stopping):
        def following(self, estimate, count, *, growth=2.0):
            looks.append(count)
            return super().following(estimate, count, growth=growth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf._trace, "Stopping", Watched)
        hutchinson(hf.as_operator(outlying()), rtol=0.1, max_probes=10_000, generator=seeded())
    assert looks[0] == 8
    assert all(before < after <= 2 * before for before, after in itertools.pairwise(looks))
    assert len(looks) <= math.log2(looks[-1] / 8) + 4


@pytest.mark.parametrize("deflated", [False, True])
def test_the_estimate_is_as_close_as_was_asked_as_often_as_was_asked(deflated):
    matrix = outlying()
    H = hf.as_operator(matrix, LIKE)
    known = exact_pairs(matrix, 4) if deflated else None
    truth = float(matrix.trace())
    close = sum(
        abs(float(hutchinson(H, rtol=0.2, max_probes=10_000, deflate=known, generator=seeded(seed))) / truth - 1) <= 0.2
        for seed in range(200)
    )
    assert close / 200 >= 0.91


def test_more_confidence_takes_more_probes():
    H = hf.as_operator(outlying())
    few, many = (
        hutchinson(H, rtol=0.2, confidence=confidence, max_probes=10_000, generator=seeded()).num_matvecs
        for confidence in (0.68, 0.99)
    )
    assert many > 4 * few


@pytest.mark.parametrize("tolerance", [{"rtol": 0.1}, {"atol": 1e-3}])
def test_a_zero_operator_stops_at_the_first_look(tolerance):
    estimate = hutchinson(hf.as_operator(torch.zeros(5, 5)), **tolerance, generator=seeded())
    assert (float(estimate), float(estimate.stderr), estimate.num_matvecs) == (0, 0, 8)


def test_probes_that_run_out_give_the_estimate_and_a_warning_with_the_error_reached():
    matrix = symmetric([1.0, -1.0, 2.0, -2.0, 5.0, -5.0])
    text = (
        r"hutchinson: the 95% interval is \S+ ± \S+ \(\S+ of the value\) after max_probes=50, "
        r"wider than rtol=0.01 or atol=0.001\. Raise max_probes, deflate"
    )
    with pytest.warns(hf.ConvergenceWarning, match=text) as caught:
        estimate = hutchinson(hf.as_operator(matrix), rtol=0.01, atol=0.001, max_probes=50, generator=seeded())
    assert estimate.num_matvecs == 50
    assert caught[0].filename == __file__
    assert abs(float(estimate)) < 4 * float(estimate.stderr)


def test_the_warning_of_a_value_of_zero_names_no_relative_error():
    H = hf.Operator(torch.zeros(2), lambda rows: rows.flip(1) * torch.tensor([1.0, 1.0]))
    g = seeded(next(s for s in range(50) if float(hutchinson(H, num_probes=2, generator=seeded(s))) == 0))
    with pytest.warns(hf.ConvergenceWarning, match=r"interval is 0 ± \S+ after max_probes=2, wider than rtol=0.1\. "):
        hutchinson(H, rtol=0.1, max_probes=2, generator=g)


# Networks


@cache
def trained():
    """A ReLU network of 115 parameters on two noisy clusters, trained for a moment; with its dense Hessian."""
    g = seeded(7)
    labels = torch.randint(0, 3, (60,), generator=g)
    points = torch.randn(60, 4, generator=g, dtype=F64) + 2 * F.one_hot(labels, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(points), labels).backward()
        optimizer.step()
    loss, params = hf.module_loss(model, F.cross_entropy)
    H = hf.hessian(loss, params, [(points[:37], labels[:37]), (points[37:], labels[37:])])
    return H, H.dense(), (model, points)


@pytest.mark.parametrize("k", [0, 6])
def test_estimates_on_a_trained_network_are_calibrated_leaf_by_leaf(k):
    operator, matrix, _ = trained()
    H = hf.as_operator(matrix, operator.like)
    known = hf.eigsh(H, k, tol=0.3, generator=seeded()) if k else None
    truth = torch.stack([matrix.trace(), *(part.sum() for part in matrix.diagonal().split(H.layout.sizes))])
    estimate = hutchinson(H, num_probes=40 * 600, deflate=known, chunk_size=1000, generator=seeded())
    samples = torch.cat([estimate.samples.unsqueeze(1), estimate.leaf_samples], dim=1)
    assert_calibrated(samples, truth, size=40)


def test_over_a_data_loader_the_trace_is_that_of_the_dense_hessian():
    H, matrix, _ = trained()
    estimate = hutchinson(H, rtol=0.1, deflate=hf.eigsh(H, 4, generator=seeded()), generator=seeded())
    assert abs(float(estimate) - float(matrix.trace())) < 4 * float(estimate.stderr)
    assert estimate.leaf_names == ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


def test_leaf_traces_of_a_piecewise_linear_network_are_those_of_its_gauss_newton_matrix():
    """Within one parameter tensor such a network is linear, so Hessian and Gauss-Newton blocks agree."""
    H, _, (model, points) = trained()
    call, params = hf.functionalize(model)
    jacobian = torch.func.jacrev(lambda p: call(p, points))(params)
    p = call(params, points).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    estimate = hutchinson(H, num_probes=400, deflate=hf.eigsh(H, 8, generator=seeded()), generator=seeded())
    for name, part in estimate.per_leaf.items():
        J = jacobian[name].flatten(2)
        exact = float(torch.einsum("nap,nab,nbp->", J, curvature, J)) / len(points)
        assert abs(float(part) - exact) < 4.5 * float(part.stderr) < exact


# Bad input


H = hf.as_operator(torch.eye(3))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, r"num_probes, rtol and atol are all None; pass num_probes=100 .* or rtol=0.05 \(or atol\)"),
        ({"num_probes": 5, "rtol": 0.1}, ValueError, r"num_probes=5 fixes the number .* rtol=0.1, atol=None would do"),
        ({"num_probes": 5, "atol": 1.0}, ValueError, r"rtol=None, atol=1.0 would do nothing; pass one or the other"),
        ({"num_probes": 0}, ValueError, r"num_probes=0 is out of range; expected 1 <= num_probes"),
        ({"num_probes": 2.0}, TypeError, r"num_probes is 2.0 of type float, expected an int"),
        ({"rtol": 0.0}, ValueError, r"rtol=0.0 is out of range; expected a finite number above 0"),
        ({"atol": float("inf")}, ValueError, r"atol=inf is out of range"),
        ({"rtol": "5%"}, TypeError, r"rtol is '5%' of type str, expected a positive number"),
        ({"rtol": 0.1, "confidence": 95}, ValueError, r"confidence=95 is out of range; expected 0 < confidence < 1"),
        ({"rtol": 0.1, "max_probes": 1}, ValueError, r"max_probes=1 is out of range; expected 2 <= max_probes"),
        ({"num_probes": 2, "chunk_size": 0}, ValueError, r"chunk_size=0 is out of range; expected 1 <= chunk_size"),
        ({"num_probes": 2, "generator": 0}, TypeError, r"generator is of type int, expected a torch.Generator"),
        (
            {"num_probes": 2, "deflate": torch.ones(2, 4)},
            ValueError,
            r"deflate has shape \(2, 4\), expected \('K', 3\)",
        ),
        ({"num_probes": 2, "deflate": torch.ones(4, 3)}, ValueError, r"deflate holds 4 vectors of 3 entries"),
        ({"num_probes": 2, "deflate": torch.ones(2, 3)}, ValueError, r"deflate holds 2 vectors that span only 1 dim"),
    ],
)
def test_bad_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        hutchinson(H, **{"generator": seeded(), **options})


def test_eigenpairs_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"deflate.eigenvectors has a different pytree structure from H.like"):
        hutchinson(H, num_probes=2, deflate=exact_pairs(outlying(), 2), generator=seeded())


def test_a_product_that_is_not_finite_stops_at_once():
    broken = hf.Operator(torch.zeros(3), lambda rows: rows / 0)
    with pytest.raises(FloatingPointError, match="the product with a probe is NaN or infinite; the operator overflows"):
        hutchinson(broken, num_probes=2, generator=seeded())


def test_a_fixed_number_of_probes_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hutchinson(hf.as_operator(outlying()), num_probes=3, max_probes=2, generator=seeded())
