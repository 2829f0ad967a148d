"""The reorthogonalized run behind ``krylov``: Lanczos to the last bit that matters, where one pass is enough too."""

import pytest
import torch
from helpers import F64, SPECTRA, seeded, symmetric

import hessfunc as hf
from hessfunc._deflation import project_off
from hessfunc._runs import run_orthogonal, run_probes

EPS32 = torch.finfo(torch.float32).eps


def start(size, dtype=F64, seed=1):
    vector = torch.randn(size, generator=seeded(seed), dtype=F64)
    return (vector / vector.norm()).to(dtype)


@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_lanczos(name):
    matrix = symmetric(SPECTRA[name])
    size = len(matrix)
    run = run_orthogonal(lambda v: matrix @ v, start(size), size)
    expected = hf.lanczos(lambda v: matrix @ v, start(size), size, reorthogonalize="full")
    for ours, theirs in zip(run, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert torch.equal(run.betas == 0, expected.betas == 0)


def test_the_basis_is_orthonormal_in_float32_while_ritz_pairs_converge():
    """Where orthogonality is lost without reorthogonalization: outliers far from a dense bulk."""
    values = torch.cat([torch.linspace(-1, 1, 390, dtype=F64), 10.0 ** torch.arange(1, 5, dtype=F64)])
    matrix = symmetric(values, dtype=torch.float32)
    run = run_orthogonal(lambda v: matrix @ v, start(len(values), torch.float32), 100)
    gram = (run.basis.double() @ run.basis.double().T) - torch.eye(100, dtype=F64)
    assert float(gram.abs().max()) < 20 * EPS32
    plain = hf.lanczos(lambda v: matrix @ v, run.basis[0], 100, reorthogonalize="full").basis.double()
    assert float(gram.abs().max()) < 3 * float((plain @ plain.T - torch.eye(100, dtype=F64)).abs().max())


def test_products_and_the_start_are_not_written_to():
    matrix, products = symmetric(SPECTRA["distinct"]), []

    def matvec(vector):
        products.append((matrix @ vector, (matrix @ vector).clone()))
        return products[-1][0]

    unit = start(len(matrix))
    before = unit.clone()
    run_orthogonal(matvec, unit, 5)
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
