import dataclasses
import math

import pytest
import torch
from helpers import F64, seeded
from scipy import stats

from hessfunc._estimate import Estimate

SAMPLES = torch.tensor([1.0, 2.0, 4.0, 9.0])


def test_value_and_standard_error_are_those_of_the_samples_in_float64():
    estimate = Estimate.of(SAMPLES, num_matvecs=7)
    assert float(estimate.value) == 4.0
    assert float(estimate.stderr) == pytest.approx(float(SAMPLES.double().std()) / 2, rel=1e-12)
    assert [t.dtype for t in (estimate.value, estimate.stderr, estimate.samples)] == [F64] * 3
    assert estimate.value.shape == estimate.stderr.shape == ()
    assert torch.equal(estimate.samples, SAMPLES.double())
    assert estimate.num_matvecs == 7
    assert estimate.leaf_samples is None
    assert estimate.leaf_names == ()


def test_a_standard_error_of_the_methods_own_replaces_that_of_the_samples():
    estimate = Estimate.of(SAMPLES, stderr=torch.tensor(0.5), num_matvecs=4)
    assert float(estimate.stderr) == 0.5
    assert estimate.stderr.dtype == F64
    assert estimate.half_width() == pytest.approx(0.5 * stats.t.ppf(0.975, 3))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_is_students(confidence):
    estimate = Estimate.of(SAMPLES, num_matvecs=4)
    expected = stats.t.interval(confidence, 3, loc=4.0, scale=float(estimate.stderr))
    assert estimate.interval(confidence) == pytest.approx(expected, rel=1e-12)
    assert estimate.half_width(confidence) == pytest.approx((expected[1] - expected[0]) / 2, rel=1e-12)


def test_the_interval_of_few_normal_samples_holds_the_mean_as_often_as_it_says():
    draws = 3 + torch.randn(1500, 4, generator=seeded(1), dtype=F64)
    held = 0
    for row in draws:
        low, high = Estimate.of(row, num_matvecs=4).interval(0.9)
        held += low <= 3 <= high
    assert abs(held / 1500 - 0.9) < 3 * math.sqrt(0.9 * 0.1 / 1500)


def test_one_sample_tells_nothing_of_its_error():
    estimate = Estimate.of(torch.tensor([5.0]), num_matvecs=1)
    assert float(estimate.value) == 5
    assert float(estimate.stderr) == math.inf
    assert estimate.interval() == (-math.inf, math.inf)
    assert repr(estimate) == "Estimate(5 ± inf, num_samples=1, num_matvecs=1)"


def test_an_exact_value_has_an_interval_of_no_width():
    estimate = Estimate.of(torch.tensor([5.0]), stderr=torch.zeros(()), num_matvecs=1)
    assert estimate.interval() == (5.0, 5.0)


def test_leaves_have_values_and_errors_of_their_own_and_sum_to_the_whole():
    leaves = torch.randn(6, 2, generator=seeded(2))
    estimate = Estimate.of(leaves.sum(1), num_matvecs=6, leaf_samples=leaves, leaf_names=["a", "b.0"])
    parts = estimate.per_leaf
    assert list(parts) == ["a", "b.0"] == list(estimate.leaf_names)
    assert estimate.leaf_samples.dtype == F64
    for column, part in zip(leaves.double().T, parts.values(), strict=True):
        assert torch.equal(part.samples, column)
        assert float(part.stderr) == pytest.approx(float(column.std()) / 6**0.5, rel=1e-12)
        assert part.num_matvecs == 6
    assert sum(float(part) for part in parts.values()) == pytest.approx(float(estimate), rel=1e-6)


def test_leaves_of_an_exact_value_are_exact():
    leaves = torch.tensor([[2.0, 3.0]])
    exact = {"stderr": torch.zeros(()), "num_matvecs": 2}
    estimate = Estimate.of(leaves.sum(1), leaf_samples=leaves, leaf_names=("a", "b"), **exact)
    assert [part.interval() for part in estimate.per_leaf.values()] == [(2.0, 2.0), (3.0, 3.0)]


def test_leaves_may_have_errors_and_degrees_of_freedom_of_the_methods_own():
    leaves = torch.randn(6, 2, generator=seeded(2))
    plain = Estimate.of(leaves.sum(1), num_matvecs=6, leaf_samples=leaves, leaf_names=["a", "b"])
    own = {"leaf_stderr": torch.tensor([0.5, 2.0], dtype=F64), "leaf_dof": torch.tensor([3.0, 30.0], dtype=F64)}
    for factor in (1.0, -2.0):
        parts = dataclasses.replace(plain, **own).scaled(factor).per_leaf
        assert float(parts["a"].half_width()) == pytest.approx(0.5 * abs(factor) * stats.t.ppf(0.975, 3))
        assert float(parts["b"].half_width()) == pytest.approx(2.0 * abs(factor) * stats.t.ppf(0.975, 30))
        assert float(parts["a"]) == pytest.approx(factor * float(leaves[:, 0].mean()), rel=1e-6)


def test_without_leaf_samples_per_leaf_says_where_they_are_kept():
    with pytest.raises(ValueError, match=r"no leaf_samples; those of hessfunc.hutchinson and hessfunc.hutchpp do"):
        _ = Estimate.of(SAMPLES, num_matvecs=4).per_leaf


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, float("nan")])
def test_a_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence=.* is out of range; expected 0 < confidence < 1"):
        Estimate.of(SAMPLES, num_matvecs=4).interval(confidence)


@pytest.mark.parametrize("confidence", ["95%", None, True])
def test_a_confidence_that_is_no_number_is_refused(confidence):
    with pytest.raises(TypeError, match=r"confidence is .* expected a number"):
        Estimate.of(SAMPLES, num_matvecs=4).half_width(confidence)


def test_it_prints_as_value_and_error_converts_to_float_and_cannot_be_changed():
    estimate = Estimate.of(SAMPLES, num_matvecs=4)
    assert repr(estimate) == str(estimate) == "Estimate(4 ± 1.8, num_samples=4, num_matvecs=4)"
    assert float(estimate) == 4.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = torch.zeros(())
