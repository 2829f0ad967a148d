"""The basis behind eigsh: its identity ``H Q^T = Q^T T + P^T C`` after every kind of step."""

import numpy as np
import pytest
import torch
from helpers import F64, seeded, symmetric

import hessfunc as hf
from hessfunc._krylov_basis import KrylovBasis

N = 40


def grown(block_size=1, capacity=N, spectrum=None, rows=None, seed=0):
    matrix = symmetric(torch.linspace(-2, 3, N, dtype=F64) ** 3 if spectrum is None else spectrum)
    basis = KrylovBasis(hf.as_operator(matrix), capacity, block_size, seeded(seed))
    basis.begin(torch.randn(block_size, N, generator=seeded(seed + 1), dtype=F64) if rows is None else rows)
    return matrix, basis


def assert_identity(matrix, basis, atol=1e-12):
    """Orthonormal rows, the exact projection, the exact remainder, and what follows from them."""
    Q = basis._rows[: basis.count]
    P = torch.stack(basis._pending) if basis.pending else Q[:0]
    T = torch.from_numpy(basis._projection[: basis.count, : basis.count])
    C = torch.from_numpy(basis._coupling)
    scale = max(basis.scale, 1e-300)
    both = torch.cat([Q, P])
    torch.testing.assert_close(both @ both.T, torch.eye(len(both), dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix @ Q.T, Q.T @ T + P.T @ C, rtol=0, atol=atol * scale)
    vectors = basis.ritz_rows(np.arange(basis.count))
    values = torch.from_numpy(basis.ritz_values.copy())
    true = torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
    torch.testing.assert_close(torch.from_numpy(basis.residuals), true, rtol=0, atol=10 * atol * scale)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_identity_holds_through_expansion_restart_new_start_and_steering(block_size):
    matrix, basis = grown(block_size)
    for _ in range(4):
        basis.expand(block_size)
        assert_identity(matrix, basis)
    assert basis.count == basis.num_matvecs == 4 * block_size
    order = np.argsort(-np.abs(basis.ritz_values))[: block_size + 1]
    values = basis.ritz_values[order]
    basis.restart(order)
    assert basis.count == block_size + 1
    np.testing.assert_array_equal(basis.ritz_values, values)
    assert_identity(matrix, basis)
    basis.expand(block_size)
    assert_identity(matrix, basis)
    basis.branch()
    assert basis.pending == block_size + 1
    for _ in range(3):
        basis.expand(1)
        assert basis.pending == block_size + 1
        assert_identity(matrix, basis)
    basis.steer(np.argsort(-np.abs(basis.ritz_values))[:2])
    assert_identity(matrix, basis)
    basis.expand(block_size)
    assert_identity(matrix, basis)


def test_restart_in_slabs_is_one_product(monkeypatch):
    bases = []
    for columns in (7, 1 << 16):
        monkeypatch.setattr("hessfunc._krylov_basis._COLUMNS", columns)
        _, basis = grown()
        for _ in range(6):
            basis.expand(1)
        basis.restart(np.array([5, 0, 4]))
        bases.append(basis.ritz_rows(np.arange(3)))
    torch.testing.assert_close(*bases, rtol=0, atol=1e-15)


def test_steering_puts_the_whole_residual_of_one_pair_first():
    _, basis = grown(block_size=3)
    for _ in range(3):
        basis.expand(3)
    basis.steer(np.array([8]))
    coupling = basis._coupling @ basis._vectors[:, 8]
    assert abs(coupling[0]) == pytest.approx(basis.residuals[8], rel=1e-12)
    np.testing.assert_allclose(coupling[1:], 0, atol=1e-13)


@pytest.mark.parametrize("spectrum", [[0.0] * N, [1.0] * N, [5.0, -3.0] + [0.0] * (N - 2)])
@pytest.mark.parametrize("block_size", [1, 3])
def test_random_rows_take_over_when_the_krylov_space_is_exhausted(spectrum, block_size):
    matrix, basis = grown(block_size, spectrum=spectrum)
    while basis.count < N:
        basis.expand(min(block_size, basis.pending))
        assert basis.pending == min(block_size, N - basis.count)
        assert_identity(matrix, basis)
    np.testing.assert_allclose(basis.ritz_values, np.sort(spectrum), atol=1e-13)
    np.testing.assert_allclose(basis.residuals, 0, atol=1e-13)


def test_dependent_and_zero_start_rows_are_replaced():
    row = torch.randn(1, N, generator=seeded(3), dtype=F64)
    for rows in (row.repeat(3, 1), torch.cat([row, torch.zeros(2, N, dtype=F64)]), torch.zeros(1, N, dtype=F64)):
        matrix, basis = grown(3, rows=rows.clone())
        assert basis.pending == 3
        basis.expand(3)
        assert_identity(matrix, basis)


def test_replacement_equal_to_a_row_that_is_there_already():
    # The generator that fills up is at the state that gave the start row.
    first = torch.randn(1, N, generator=seeded(5), dtype=F64)
    matrix, basis = grown(2, rows=first, seed=5)
    assert basis.pending == 2
    basis.expand(2)
    assert_identity(matrix, basis)


def test_float32_keeps_orthonormal_rows_of_a_million_entries():
    size = 1_000_000
    diagonal = torch.randn(size, generator=seeded(0))
    basis = KrylovBasis(hf.Operator(diagonal, lambda rows: rows * diagonal), 8, 1, seeded(1))
    basis.begin(torch.randn(1, size, generator=seeded(2)))
    for _ in range(8):
        basis.expand(1)
    rows = basis._rows.double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(8, dtype=F64), rtol=0, atol=3e-6)
    projection = rows @ (rows * diagonal).T
    torch.testing.assert_close(torch.from_numpy(basis._projection), projection, rtol=0, atol=1e-5)
