"""Traces from probes of which each batch has its own: what they are, how far off, and what they cost."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded, symmetric, variance
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc import _probes

LIKE = {"w": torch.zeros(20, dtype=F64), "b": torch.zeros(10, dtype=F64)}
LEAVES = {"w": slice(20), "b": slice(20, 30)}
WEIGHTS = (1.0, 3.0, 2.0, 2.0, 4.0)
SAMPLERS = {"signs": _probes.signs, "normal": _probes.normal, "sphere": _probes.sphere}
COMMON = symmetric([*torch.linspace(-0.5, 1, 27).tolist(), 4.0, 6.0, 9.0])
MATRICES = [COMMON + 0.5 * symmetric(torch.linspace(-1, 1, 30).tolist(), seed=s) for s in range(1, 6)]


def quadratic(params, matrix):
    flat = torch.cat([params["w"], params["b"]])
    return flat @ matrix @ flat / 2


def operator(reduction="mean", matrices=MATRICES):
    """A Hessian over batches whose matrices are known: each batch is a matrix with its weight."""
    data = [(matrix, torch.tensor(weight)) for matrix, weight in zip(matrices, WEIGHTS, strict=False)]
    return hf.hessian(
        lambda p, matrix, _: quadratic(p, matrix), LIKE, data, count=lambda b: float(b[1]), reduction=reduction
    )


def shares(reduction="mean"):
    """The matrices of the terms, weights included."""
    if reduction == "sum":
        return MATRICES
    return [weight / sum(WEIGHTS) * matrix for weight, matrix in zip(WEIGHTS, MATRICES, strict=True)]


def of_leaf(matrix, name):
    part = torch.zeros_like(matrix)
    part[LEAVES[name]] = matrix[LEAVES[name]]
    return part


def within(estimate, value):
    low, high = estimate.interval(0.95)
    return low <= float(value) <= high


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_probes_find_the_trace_and_the_sum_of_the_batches_variances(sampler, reduction):
    H = operator(reduction)
    options = {"num_probes": 3000, "sampler": SAMPLERS[sampler], "chunk_size": 500, "per_batch": True}
    estimate = hf.hutchinson(H, **options, generator=seeded())
    exact = sum(shares(reduction))
    assert abs(float(estimate) - float(exact.trace())) < 4 * float(estimate.stderr)
    expected = sum(variance(form, sampler) for form in shares(reduction))
    assert float(estimate.stderr.square()) * 3000 == pytest.approx(expected, rel=0.1)
    assert float(estimate.samples.var()) == pytest.approx(expected, rel=0.15)
    for name, leaf in estimate.per_leaf.items():
        assert abs(float(leaf) - float(exact.diagonal()[LEAVES[name]].sum())) < 4 * float(leaf.stderr)
        of_leaves = sum(variance(of_leaf(form, name), sampler) for form in shares(reduction))
        assert float(leaf.stderr.square()) * 3000 == pytest.approx(of_leaves, rel=0.25)
    assert estimate.num_matvecs == 3000
    assert len(estimate.samples) == 3000


def test_where_batches_are_alike_the_variance_falls_by_their_number():
    alike = operator("sum", [COMMON] * 5)
    one, own = (
        hf.hutchinson(alike, num_probes=400, per_batch=per_batch, generator=seeded()) for per_batch in (False, True)
    )
    assert float((one.stderr / own.stderr).square()) == pytest.approx(5, rel=0.15)


@pytest.mark.parametrize(("num_probes", "low", "high"), [(2, 0.96, 0.995), (4, 0.92, 0.98), (12, 0.92, 0.98)])
def test_intervals_hold_the_trace_in_95_of_100_runs_with_few_probes_too(num_probes, low, high):
    H, truth = operator(), sum(shares())
    held, leaves = 0, torch.zeros(2)
    for seed in range(400):
        estimate = hf.hutchinson(H, num_probes=num_probes, per_batch=True, generator=seeded(seed))
        held += within(estimate, truth.trace())
        for i, (name, leaf) in enumerate(estimate.per_leaf.items()):
            leaves[i] += within(leaf, truth.diagonal()[LEAVES[name]].sum())
    assert low <= held / 400 <= high, held / 400
    assert ((leaves / 400 >= low) & (leaves / 400 <= high)).all(), leaves / 400


def test_probes_one_at_a_time_go_by_their_spread():
    estimate = hf.hutchinson(operator(), num_probes=12, per_batch=True, chunk_size=1, generator=seeded())
    assert float(estimate.stderr) == pytest.approx(float(estimate.samples.std()) / 12**0.5, rel=1e-12)
    assert estimate.dof is None


def test_a_tolerance_is_met_with_fewer_products_than_shared_probes_take():
    H = operator()
    one, own = (hf.hutchinson(H, rtol=0.2, per_batch=per_batch, generator=seeded()) for per_batch in (False, True))
    assert own.half_width() <= 0.2 * float(own)
    assert own.num_matvecs < one.num_matvecs / 2


def test_a_tolerance_that_is_far_off_takes_two_passes_over_five_batches():
    assert hf.hutchinson(operator(), rtol=5.0, per_batch=True, generator=seeded()).num_matvecs == 2
    assert hf.hutchinson(operator(matrices=MATRICES[:2]), rtol=5.0, per_batch=True, generator=seeded()).num_matvecs == 4


@pytest.mark.parametrize("ritz", [True, False])
def test_known_pairs_are_taken_off_each_batch(ritz):
    H, exact = operator(), sum(shares())
    known = hf.eigsh(H, 3, generator=seeded())
    vectors = torch.linalg.eigh(exact).eigenvectors[:, -3:].T
    outside = torch.eye(30, dtype=F64) - vectors.T @ vectors
    options = {"per_batch": True, "deflate": known if ritz else known.eigenvectors}
    estimate = hf.hutchinson(H, num_probes=3000, chunk_size=500, **options, generator=seeded())
    assert abs(float(estimate) - float(exact.trace())) < 4 * float(estimate.stderr)
    expected = sum(variance(outside @ form @ outside, "signs") for form in shares())
    assert float(estimate.stderr.square()) * 3000 == pytest.approx(expected, rel=0.1)
    assert estimate.num_matvecs == 3000 + (1 if ritz else 3)
    for name, leaf in estimate.per_leaf.items():
        assert abs(float(leaf) - float(exact.diagonal()[LEAVES[name]].sum())) < 4 * float(leaf.stderr)


# Operators


def model():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    generator = seeded(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    x = torch.randn(23, 4, generator=generator, dtype=F64)
    return hf.functionalize(net), (x, torch.randint(0, 3, (23,), generator=generator))


def test_combinations_of_operators_have_the_terms_of_their_parts():
    (call, params), (x, y) = model()
    batches = list(zip(x.split(5), y.split(5), strict=True))
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, batches)
    G = hf.ggn(call, F.cross_entropy, params, batches)
    rows = torch.randn(2, H.size, generator=seeded(), dtype=F64)
    for made in (H, G, H - G, 2.0 * H, -G, H.shift(0.3), (H + G).shift(1.0) - 0.5 * G, H.at(params)):
        terms = [(term.weight * term.rows(rows), term.divisor) for term in made.terms()]
        assert len(terms) == 5
        total = sum(part for part, _ in terms) / sum(divisor for _, divisor in terms)
        assert relative_error(total, made.rows(rows)) < 1e-12
    summed = hf.hessian(
        lambda p, x, y: F.cross_entropy(call(p, x), y, reduction="sum"), params, batches, reduction="sum"
    )
    terms = [term.weight * term.rows(rows) for term in summed.shift(0.3).terms()]
    assert relative_error(sum(terms), summed.shift(0.3).rows(rows)) < 1e-12


def test_a_loader_is_gone_through_once_for_each_chunk_and_checked():
    (call, params), (x, y) = model()
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, loader)
    estimate = hf.hutchinson(H, num_probes=6, per_batch=True, chunk_size=3, generator=seeded())
    same = hf.hutchinson(
        hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, list(loader)),
        num_probes=6,
        per_batch=True,
        chunk_size=3,
        generator=seeded(),
    )
    assert relative_error(estimate.samples, same.samples) < 1e-12
    assert relative_error(estimate.stderr, same.stderr) < 1e-12
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, drop_last=True)
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, shuffled)
    with pytest.raises(ValueError, match="check=False leaves this check out"):
        hf.hutchinson(H, num_probes=6, per_batch=True, chunk_size=3, generator=seeded())


def test_split_trace_takes_them_too():
    (call, params), (x, y) = model()
    batches = list(zip(x.split(5), y.split(5), strict=True))
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, batches).dense()
    options = {"num_probes": 40, "generator": seeded()}
    estimate = hf.split_trace(call, F.cross_entropy, params, batches, per_batch=True, **options)
    assert float(estimate.stderr) > 0
    assert abs(float(estimate) - float(H.trace())) < 4 * float(estimate.stderr)


def test_one_batch_is_a_batch_of_its_own():
    (call, params), batch = model()
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, batch)
    one, own = (hf.hutchinson(H, num_probes=5, per_batch=p, generator=seeded()) for p in (False, True))
    assert torch.equal(one.samples, own.samples)
    assert relative_error(own.stderr, one.stderr) < 1e-12


# Errors


def test_operators_without_terms_are_refused():
    with pytest.raises(ValueError, match=re.escape("per_batch=True needs an operator that is known as a sum over")):
        hf.hutchinson(hf.as_operator(COMMON), num_probes=4, per_batch=True, generator=seeded())
    assert (operator() + hf.as_operator(COMMON, LIKE)).terms is None


@pytest.mark.parametrize("other", [MATRICES[:3], MATRICES[::-1] + MATRICES])
def test_sums_of_operators_over_other_data_have_no_terms(other):
    data = [(matrix, torch.tensor(1.0)) for matrix in other]
    others = hf.hessian(lambda p, matrix, _: quadratic(p, matrix), LIKE, data, count=lambda _: 1.0)
    both = operator() - others
    with pytest.raises(ValueError, match="are over other batches, or weigh them otherwise"):
        hf.hutchinson(both, num_probes=4, per_batch=True, generator=seeded())
    assert relative_error(both.dense(), operator().dense() - others.dense()) < 1e-12


def test_what_was_done_before_a_product_that_is_not_finite_is_kept():
    calls = []

    def loss(params, matrix, _):
        calls.append(matrix)
        return quadratic(params, matrix) * (float("nan") if len(calls) > 40 else 1.0)

    data = [(matrix, torch.tensor(1.0)) for matrix in MATRICES]
    H = hf.hessian(loss, LIKE, data, count=lambda _: 1.0, linearize=False, check=False)
    with pytest.raises(hf.NonFiniteError, match="product on batch") as caught:
        hf.hutchinson(H, num_probes=20, per_batch=True, chunk_size=2, generator=seeded())
    assert 2 <= len(caught.value.partial.samples) < 20
