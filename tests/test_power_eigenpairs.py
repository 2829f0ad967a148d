"""Deflated power iteration: right, or said not to have converged."""

from __future__ import annotations

import warnings

import pytest
import torch

import hessfunc as hf


def rotated(values, generator):
    spectrum = torch.tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (basis * spectrum) @ basis.T


def counted(matrix):
    calls = []

    def rows(rows):
        calls.append(rows.shape[0])
        return rows @ matrix

    return hf.Operator(matrix[0], rows), calls


def test_pairs_of_a_separated_spectrum(generator):
    matrix = rotated([8.0, -5.0, 3.0, 1.5, *[0.02 * i for i in range(20)]], generator)
    H, calls = counted(matrix)
    pairs = hf.power_eigenpairs(H, 4, tol=1e-8, generator=generator)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([8.0, -5.0, 3.0, 1.5]).double(), rtol=1e-12, atol=0)
    rows = pairs.rows()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4).double(), rtol=0, atol=1e-14)
    residuals = (rows @ matrix - pairs.eigenvalues[:, None] * rows).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=0, atol=1e-13)
    assert bool((pairs.residuals <= 1e-8 * pairs.eigenvalues.abs()).all())
    assert pairs.converged.tolist() == [True] * 4
    assert pairs.num_matvecs == sum(calls)


@pytest.mark.parametrize("seed", range(10))
def test_close_and_opposite_eigenvalues_are_right_or_warned_of(seed):
    generator = torch.Generator().manual_seed(seed)
    spectrum = [0.815, 0.568, 0.551, -0.528, 0.500, *[0.01 * i for i in range(30)]]  # as of a small residual network
    H = hf.as_operator(rotated(spectrum, generator))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = hf.power_eigenpairs(H, 5, max_matvecs=60, generator=generator)
    assert bool(pairs.converged.all()) == (not caught)
    exact = torch.tensor(spectrum, dtype=torch.float64)
    for value, residual in zip(pairs.eigenvalues, pairs.residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + 1e-14  # each lies within its residual
    patient = hf.power_eigenpairs(H, 5, max_matvecs=5000, generator=generator)
    assert bool(patient.converged.all())
    torch.testing.assert_close(patient.eigenvalues, exact[:5], rtol=1e-4, atol=0)


def test_opposite_extremes_do_not_converge_and_say_so(generator):
    H = hf.as_operator(rotated([2.0, -2.0, 0.5, 0.1], generator))
    with pytest.warns(hf.ConvergenceWarning, match=r"1 of 1 pairs have a residual above tol=0.001 after 40 matvecs"):
        pairs = hf.power_eigenpairs(H, max_matvecs=40, generator=generator)
    assert pairs.converged.tolist() == [False]
    assert float(pairs.residuals[0]) > 0.1


def test_zero_low_rank_and_tiny_operators(generator):
    zero = hf.power_eigenpairs(hf.as_operator(torch.zeros(4, 4)), 4, generator=generator)
    assert zero.eigenvalues.tolist() == [0.0] * 4
    assert bool(zero.converged.all())
    rank_one = hf.power_eigenpairs(hf.as_operator(torch.diag(torch.tensor([3.0, 0, 0]))), 3, generator=generator)
    torch.testing.assert_close(rank_one.eigenvalues, torch.tensor([3.0, 0, 0]), rtol=0, atol=1e-5)
    assert bool(rank_one.converged.all())
    single = hf.power_eigenpairs(hf.as_operator(torch.tensor([[-2.0]])), generator=generator)
    assert single.eigenvalues.tolist() == [-2.0]


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scaling(factor, generator):
    matrix = rotated([8.0, -5.0, 1.0, 0.5], generator)
    pairs = hf.power_eigenpairs(hf.as_operator(factor * matrix), 2, tol=1e-6, generator=generator)
    torch.testing.assert_close(pairs.eigenvalues / factor, torch.tensor([8.0, -5.0]).double(), rtol=1e-9, atol=0)


def test_start_vector_and_seed(generator):
    H, calls = counted(rotated([8.0, 7.0, 1.0, 0.5], generator))
    first = hf.power_eigenpairs(H, tol=1e-6, generator=torch.Generator().manual_seed(0))
    again = hf.power_eigenpairs(H, tol=1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    calls.clear()
    warm = hf.power_eigenpairs(H, tol=1e-5, v0=first.eigenvectors[0], generator=generator)
    assert warm.num_matvecs == len(calls) == 2  # one step, and one for the residual


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k=0 is out of range; expected 1 <= k <= 3, the size of the operator"),
        ({"k": 4}, "k=4 is out of range"),
        ({"tol": 0.0}, "tol=0.0 is out of range"),
        ({"max_matvecs": 0}, "max_matvecs=0 is out of range"),
        ({"v0": torch.ones(2)}, r"v0 has shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_options(options, text, generator):
    with pytest.raises(ValueError, match=text):
        hf.power_eigenpairs(hf.as_operator(torch.eye(3)), **options, generator=generator)


def test_products_that_are_not_finite(generator):
    H = hf.Operator(torch.ones(2), lambda rows: rows * torch.nan)
    with pytest.raises(FloatingPointError, match="a product of the operator is NaN or infinite"):
        hf.power_eigenpairs(H, generator=generator)
