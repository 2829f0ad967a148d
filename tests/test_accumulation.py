"""Sums over long float32 vectors: torch's own lose digits on the CPU, ours must not."""

import pytest
import torch

import hessfunc as hf
from hessfunc import tree

N = 3_000_000


@pytest.fixture(scope="module")
def rows():
    return torch.randn(4, N, generator=torch.Generator().manual_seed(0))


def error(value, truth):
    return float(((value.double() - truth) / truth).abs().max())


def test_dot_products_and_norms(rows):
    truth = (rows.double() ** 2).sum(1)
    assert error(torch.func.vmap(torch.dot)(rows, rows), truth) > 1e-4  # what blocks are for
    assert error(torch.func.vmap(tree.flat_dot)(rows, rows), truth) < 1e-5
    assert error(tree.flat_dot(rows[1], rows[1]), truth[1]) < 1e-6
    assert error(tree.flat_dot(rows, rows[1]), rows.double() @ rows[1].double()) < 1e-3
    assert error(tree.flat_dot(rows, rows[1])[1], truth[1]) < 1e-5
    assert error(tree.flat_norm(rows[2]), truth[2].sqrt()) < 1e-6
    assert error(torch.func.vmap(tree.flat_norm)(rows), truth.sqrt()) < 1e-6
    assert error(tree.norm({"w": rows[0], "b": rows[3, :5]}), (truth[0] + (rows[3, :5] ** 2).sum()).sqrt()) < 1e-6


def test_gradients():
    for size in (5, 40_000):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(torch.func.grad(tree.flat_norm)(x), x / x.norm())
        torch.testing.assert_close(torch.func.grad(tree.flat_dot)(x, y), y)
        assert torch.equal(torch.func.grad(tree.flat_norm)(torch.zeros(size)), torch.zeros(size))


def test_lanczos_basis_stays_orthonormal(rows):
    diagonal = 0.1 * rows[0]
    run = hf.lanczos(lambda v: diagonal * v, rows[1], 6)
    basis = run.basis.double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(6).double(), rtol=0, atol=2e-6)
