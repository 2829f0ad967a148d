"""Power iteration on prescribed spectra: the right eigenvalue, and a residual that tells."""

import pytest
import torch
from helpers import F64, SPECTRA, Counting, randn_like, relative_error, seeded, symmetric

import hessfunc as hf
from hessfunc import tree


def start(n, seed=1, dtype=F64):
    return torch.randn(n, generator=seeded(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "plus and minus"])
def test_the_eigenvalue_of_largest_magnitude(name, dtype):
    values = SPECTRA[name]
    A = symmetric(values, seed=2, dtype=dtype)
    result = hf.power_iteration(lambda v: A @ v, start(len(values), dtype=dtype), 150)
    largest = max(values, key=abs)
    eps = torch.finfo(dtype).eps
    scale = max(map(abs, values))
    assert abs(float(result.eigenvalue) - largest) <= 50 * eps * scale
    assert float(result.residual_norm) <= 50 * eps * scale
    assert result.history.shape == (150,)
    assert {field.dtype for field in result} == {dtype}
    if scale:
        assert abs(float(result.eigenvector.norm()) - 1) < 10 * eps


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30])
def test_every_field_belongs_to_the_same_vector(num_steps):
    A = symmetric(SPECTRA["distinct"], seed=3)
    result = hf.power_iteration(lambda v: A @ v, start(7), num_steps)
    v = result.eigenvector
    assert abs(float(v.norm()) - 1) < 1e-14
    assert abs(float(v @ A @ v) - float(result.eigenvalue)) < 1e-13
    assert abs(float((A @ v - result.eigenvalue * v).norm()) - float(result.residual_norm)) < 1e-13
    assert float(result.history[-1]) == float(result.eigenvalue)
    distance = min(abs(float(result.eigenvalue) - value) for value in SPECTRA["distinct"])
    assert distance <= float(result.residual_norm) + 1e-13, "some eigenvalue lies within the residual"


def test_the_history_is_that_of_the_single_steps():
    A = symmetric(SPECTRA["distinct"], seed=3)
    result = hf.power_iteration(lambda v: A @ v, start(7), 6)
    v, history = start(7), []
    for _ in range(6):
        step = hf.power_step(lambda v: A @ v, v)
        history.append(step.eigenvalue)
        v = step.following
    assert torch.equal(torch.stack(history), result.history)
    assert torch.equal(step.vector, result.eigenvector)
    assert torch.equal(step.residual_norm, result.residual_norm)


def test_one_step():
    A = symmetric(SPECTRA["distinct"], seed=4)
    v = start(7)
    before = v.clone()
    step = hf.power_step(lambda x: A @ x, v)
    unit = v / v.norm()
    assert torch.equal(v, before)
    assert relative_error(step.vector, unit) < 1e-15
    assert relative_error(step.eigenvalue, unit @ A @ unit) < 1e-13
    assert relative_error(step.residual_norm, (A @ unit - (unit @ A @ unit) * unit).norm()) < 1e-13
    assert relative_error(step.following, A @ unit / (A @ unit).norm()) < 1e-14


def test_eigenvalues_of_both_signs_do_not_converge_and_the_residual_says_so():
    A = symmetric(SPECTRA["plus and minus"], seed=5)
    result = hf.power_iteration(lambda v: A @ v, start(4), 200)
    assert float(result.residual_norm) > 0.5
    assert float((result.history[-1] - result.history[-2]).abs()) < 1e-10, "though the eigenvalue has come to rest"


@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_matvec_a_step(num_steps):
    counting = Counting(symmetric(SPECTRA["distinct"]))
    hf.power_iteration(counting, start(7), num_steps)
    assert counting.calls == num_steps


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_scale_covariance(factor, dtype):
    A = symmetric(SPECTRA["distinct"], seed=6, dtype=dtype)
    one = hf.power_iteration(lambda v: A @ v, start(7, dtype=dtype), 5)
    scaled = hf.power_iteration(lambda v: (factor * A) @ v, start(7, dtype=dtype) * factor, 5)
    eps = torch.finfo(dtype).eps
    assert relative_error(scaled.history / factor, one.history) < 100 * eps
    assert relative_error(scaled.eigenvector, one.eigenvector) < 100 * eps
    assert relative_error(scaled.residual_norm / factor, one.residual_norm) < 100 * eps


def test_a_zero_operator_and_a_zero_start_vector():
    zero = hf.power_iteration(lambda v: 0 * v, start(3), 4)
    assert float(zero.eigenvalue) == float(zero.residual_norm) == 0
    A = symmetric(SPECTRA["distinct"])
    nothing = hf.power_iteration(lambda v: A @ v, torch.zeros(7, dtype=F64), 4)
    assert all(bool((field == 0).all()) for field in nothing)


def test_pytrees_and_low_precision_leaves():
    like = {"a": [torch.zeros(2, 2)], "b": torch.zeros(3, dtype=torch.bfloat16)}
    layout = tree.Layout.of(like)
    A = symmetric(SPECTRA["distinct"], seed=8).float()
    v = randn_like(like, seeded(1))
    result = hf.power_iteration(lambda v: layout.unravel(A @ layout.ravel(v)), v, 60)
    assert result.eigenvalue.dtype == torch.float32
    assert result.eigenvector["b"].dtype == torch.bfloat16
    assert abs(float(result.eigenvalue) - 7) < 0.05


def test_options_out_of_range():
    with pytest.raises(ValueError, match=r"num_steps=0 is out of range; expected 1 <= num_steps"):
        hf.power_iteration(lambda v: v, torch.ones(2), 0)
    with pytest.raises(TypeError, match=r"num_steps is True of type bool, expected an int"):
        hf.power_iteration(lambda v: v, torch.ones(2), True)
    with pytest.raises(TypeError, match=r"v0\['x'\] is of type NoneType, not a tensor.*leave the entry out"):
        hf.power_iteration(lambda v: v, {"x": None}, 1)
