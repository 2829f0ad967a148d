"""The runs behind ``krylov``: plain ones in place, and one that is orthogonalized only where that is needed."""

import pytest
import torch
from helpers import F64, SPECTRA, seeded, symmetric

import hessfunc as hf
from hessfunc import _semiorthogonal
from hessfunc._deflation import project_off
from hessfunc._runs import run_probes
from hessfunc._semiorthogonal import run_semiorthogonal


def start(size, dtype=F64, seed=1):
    vector = torch.randn(size, generator=seeded(seed), dtype=F64)
    return (vector / vector.norm()).to(dtype)


@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_lanczos(name):
    matrix = symmetric(SPECTRA[name])
    size = len(matrix)
    run = run_semiorthogonal(lambda v: matrix @ v, start(size), size)
    expected = hf.lanczos(lambda v: matrix @ v, start(size), size, reorthogonalize="full")
    for ours, theirs in zip(run, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert torch.equal(run.betas == 0, expected.betas == 0)


def departure(basis):
    return float((basis.double() @ basis.double().T - torch.eye(len(basis), dtype=F64)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_orthogonal_to_the_square_root_of_rounding_while_ritz_pairs_converge(dtype, noise):
    """Where orthogonality is lost soonest: outliers far from a dense bulk; and with products that are inexact."""
    values = torch.cat([torch.linspace(-1, 1, 390, dtype=F64), 10.0 ** torch.arange(1, 5, dtype=F64)])
    matrix, generator = symmetric(values, dtype=dtype), seeded(3)

    def matvec(vector):
        product = matrix @ vector
        return product + noise * product.norm() * torch.randn(394, generator=generator, dtype=dtype) / 394**0.5

    run = run_semiorthogonal(matvec, start(394, dtype), 100)
    assert departure(run.basis) < torch.finfo(dtype).eps ** 0.5
    if noise == 0:
        exact, plain = (
            hf.lanczos(lambda v: matrix @ v, run.basis[0], 100, reorthogonalize=way) for way in ("full", "none")
        )
        ours, theirs, ghosts = (hf.eigh_tridiagonal(r.alphas, r.betas).eigenvalues for r in (run, exact, plain))
        assert int((ghosts > 9e3).sum()) > int((ours > 9e3).sum()) == 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * torch.finfo(dtype).eps * 1e4)


def test_most_steps_are_not_orthogonalized(monkeypatch):
    values = torch.cat([torch.linspace(-1, 1, 390, dtype=F64), torch.tensor([4.0, 6.0, 9.0], dtype=F64)])
    matrix, steps = symmetric(values, dtype=torch.float32), []
    orthogonalize = _semiorthogonal._orthogonalize
    monkeypatch.setattr(_semiorthogonal, "_orthogonalize", lambda rows, i: steps.append(i) or orthogonalize(rows, i))
    run_semiorthogonal(lambda v: matrix @ v, start(393, torch.float32), 100)
    assert len(steps) < 40


def test_products_and_the_start_are_not_written_to():
    matrix, products = symmetric(SPECTRA["distinct"]), []

    def matvec(vector):
        products.append((matrix @ vector, (matrix @ vector).clone()))
        return products[-1][0]

    unit = start(len(matrix))
    before = unit.clone()
    run_semiorthogonal(matvec, unit, 5)
    assert torch.equal(unit, before)
    assert all(torch.equal(now, then) for now, then in products)


@pytest.mark.parametrize("size", [5, 2**14, 2**14 + 3, 5 * 2**14 + 1])
def test_projection_in_pieces(size):
    basis = torch.linalg.qr(torch.randn(size, 4, generator=seeded(0), dtype=F64))[0].T.contiguous()
    rows = torch.randn(3, size, generator=seeded(1), dtype=F64)
    before = rows.clone()
    torch.testing.assert_close(project_off(basis, rows), rows - (rows @ basis.T) @ basis, rtol=0, atol=1e-12)
    assert torch.equal(rows, before)
    assert torch.equal(project_off(basis[:0], rows), rows)


def test_plain_runs_in_place_are_lanczos():
    matrix = symmetric(torch.linspace(-1, 3, 40, dtype=F64))
    probes = torch.stack([start(40, seed=seed) for seed in range(3)])
    given = probes.clone()
    runs = run_probes(hf.as_operator(matrix), probes, 12, "none", None)
    assert torch.equal(probes, given)
    for probe, nodes, weights in zip(probes, runs.nodes, runs.weights, strict=True):
        run = hf.lanczos(lambda v: matrix @ v, probe, 12, reorthogonalize="none")
        expected = hf.eigh_tridiagonal(run.alphas, run.betas)
        torch.testing.assert_close(nodes, expected.eigenvalues, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(weights, expected.eigenvectors[0].square(), rtol=1e-8, atol=1e-11)


def test_a_plain_run_ends_where_its_space_does():
    """One probe in a space of two dimensions next to one that has more: the rest of its row carries no weight."""
    matrix = symmetric([1.0, 2.0, 3.0, 4.0, 5.0])
    vectors = torch.linalg.eigh(matrix).eigenvectors.T
    probes = torch.stack([vectors[0] + vectors[3], vectors.sum(0)])
    runs = run_probes(hf.as_operator(matrix), probes, 5, "none", None)
    heavy = runs.weights[0] > 1e-12
    torch.testing.assert_close(runs.nodes[0][heavy], torch.tensor([1.0, 4.0], dtype=F64))
    torch.testing.assert_close(runs.weights[0][heavy], torch.tensor([0.5, 0.5], dtype=F64))
    torch.testing.assert_close(runs.nodes[1], torch.arange(1.0, 6.0, dtype=F64))
