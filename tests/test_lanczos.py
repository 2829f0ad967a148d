"""Lanczos on prescribed spectra: identities, breakdown, scale, cost."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import F64, SPECTRA, Counting, randn_like, relative_error, seeded, symmetric

import hessfunc as hf
from hessfunc import tree

EPS = torch.finfo(F64).eps


def start(n, seed=1, dtype=F64):
    return torch.randn(n, generator=seeded(seed), dtype=F64).to(dtype)


def dense(result):
    """T as a matrix, and the basis."""
    off = torch.diag(result.betas, 1) if len(result.betas) else 0
    return torch.diag(result.alphas) + off + (off.T if len(result.betas) else 0), result.basis


def distinct_count(values):
    return len(set(values))


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_identities_at_every_length(name, dtype):
    """``A Q^T = Q^T T + r e_m^T``, orthonormal rows, zero rows once the space is exhausted."""
    values = SPECTRA[name]
    A = symmetric(values, seed=3, dtype=dtype)
    n = len(values)
    eps = torch.finfo(dtype).eps
    scale = max(float(A.abs().max()), torch.finfo(dtype).tiny)
    for m in range(1, n + 1):
        result = hf.lanczos(lambda v: A @ v, start(n, dtype=dtype), m)
        assert result.alphas.shape == (m,)
        assert result.betas.shape == (m - 1,)
        assert result.basis.shape == (m, n)
        assert result.residual_norm.shape == ()
        assert {field.dtype for field in result} == {dtype}
        T, Q = dense(result)
        gram = Q @ Q.T
        kept = gram.diagonal().round()
        assert bool(((kept == 0) | (kept == 1)).all())
        assert torch.allclose(gram, torch.diag(kept), atol=50 * eps)
        assert bool((kept.diff() <= 0).all()), "zero rows come last"
        residual = A @ Q.T - Q.T @ T
        assert float(residual[:, :-1].abs().max() if m > 1 else 0) < 100 * eps * scale
        last = int(kept.sum()) - 1
        assert float((residual[:, last].norm() - (result.residual_norm if last == m - 1 else 0)).abs()) < (
            100 * eps * scale
        )
        rank = int(kept.sum())
        if not (name == "wide" and dtype == torch.float32):  # where the smallest are below rounding
            assert rank == min(m, distinct_count(values)), "one step for each distinct eigenvalue"
        assert bool((T[rank:] == 0).all())


@pytest.mark.parametrize("name", SPECTRA)
def test_all_steps_find_every_distinct_eigenvalue(name):
    values = sorted(set(SPECTRA[name]))
    A = symmetric(SPECTRA[name], seed=4)
    n = len(SPECTRA[name])
    result = hf.lanczos(lambda v: A @ v, start(n), n)
    rank = len(values)
    assert float(result.residual_norm) <= 100 * EPS * max(map(abs, values), default=0) + 1e-300
    found = hf.eigh_tridiagonal(result.alphas[:rank], result.betas[: rank - 1]).eigenvalues
    assert np.abs(found.numpy() - values).max() < 1e-11 * max(1.0, *map(abs, values))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_quadrature_is_exact_and_broken_down_steps_weigh_nothing(name, reorthogonalize):
    """``sum_k w_k f(theta_k) = q^T f(A) q`` for polynomials of degree up to 2 m - 1, with no mask."""
    A = symmetric(SPECTRA[name], seed=5)
    n = len(SPECTRA[name])
    v = start(n)
    q = v / v.norm()
    for m in range(1, min(n, 4) + 1):
        result = hf.lanczos(lambda v: A @ v, v, m, reorthogonalize=reorthogonalize)
        nodes, vectors = hf.eigh_tridiagonal(result.alphas, result.betas)
        weights = vectors[0] ** 2
        assert abs(float(weights.sum()) - 1) < 1e-12
        power = q
        for degree in range(2 * m):
            moment = float((weights * nodes**degree).sum())
            exact = float(q @ power)
            assert abs(moment - exact) < 1e-10 * max(1.0, float(A.norm()) ** degree)
            power = A @ power


def test_without_reorthogonalization_no_basis_is_kept():
    A = symmetric(SPECTRA["distinct"])
    full = hf.lanczos(lambda v: A @ v, start(7), 5)
    none = hf.lanczos(lambda v: A @ v, start(7), 5, reorthogonalize="none")
    assert none.basis.shape == (0, 7)
    assert relative_error(none.alphas, full.alphas) < 1e-10
    assert relative_error(none.betas, full.betas) < 1e-10
    assert relative_error(none.residual_norm, full.residual_norm) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_full_reorthogonalization_holds_over_many_steps(dtype):
    """Where the plain recurrence has long lost orthogonality: one outlier that converges at once."""
    n, m = 400, 100
    values = torch.cat([torch.linspace(-1, 1, n - 2, dtype=F64), torch.tensor([50.0, 100.0], dtype=F64)])
    A = symmetric(values, seed=6).to(dtype)
    eps = torch.finfo(dtype).eps
    result = hf.lanczos(lambda v: A @ v, start(n, dtype=dtype), m)
    gram = result.basis @ result.basis.T
    assert float((gram - torch.eye(m, dtype=dtype)).abs().max()) < 10 * eps
    nodes = hf.eigh_tridiagonal(result.alphas, result.betas).eigenvalues
    assert abs(float(nodes[-1]) - 100) < 1000 * eps
    assert int((nodes > 99).sum()) == 1, "no ghosts"
    none = hf.lanczos(lambda v: A @ v, start(n, dtype=dtype), m, reorthogonalize="none")
    ghosts = hf.eigh_tridiagonal(none.alphas, none.betas)
    assert int((ghosts.eigenvalues > 99).sum()) > 1, "the recurrence alone has ghost copies"
    weight = float((ghosts.eigenvectors[0] ** 2)[ghosts.eigenvalues > 99].sum())
    exact = float(result_weight(A, start(n, dtype=dtype)))
    assert abs(weight - exact) < 100 * eps, "which share one eigenvalue's weight"


def result_weight(A, v):
    vectors = torch.linalg.eigh(A.to(F64)).eigenvectors
    q = v.to(F64) / v.to(F64).norm()
    return (vectors[:, -1] @ q) ** 2


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["distinct", "repeated", "rank deficient", "identity"])
def test_scaling_the_operator_scales_the_result(name, dtype, factor):
    A = symmetric(SPECTRA[name], seed=7, dtype=dtype)
    n = len(SPECTRA[name])
    one = hf.lanczos(lambda v: A @ v, start(n, dtype=dtype), n)
    scaled = hf.lanczos(lambda v: (A * factor) @ v, start(n, dtype=dtype), n)
    eps = torch.finfo(dtype).eps
    rank = distinct_count(SPECTRA[name])
    assert torch.equal(one.betas == 0, scaled.betas == 0), "breakdown at the same step"
    assert int((scaled.betas != 0).sum()) == rank - 1
    assert relative_error(scaled.alphas / factor, one.alphas) < 1000 * eps
    assert relative_error(scaled.betas / factor, one.betas) < 1000 * eps


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scaling_the_start_vector_changes_nothing(factor):
    A = symmetric(SPECTRA["distinct"])
    one, other = (hf.lanczos(lambda v: A @ v, v, 5) for v in (start(7), factor * start(7)))
    for a, b in zip(one, other, strict=True):
        assert relative_error(b, a) < 1e-11


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_one_matvec_a_step(num_steps, reorthogonalize):
    counting = Counting(symmetric(SPECTRA["distinct"]))
    hf.lanczos(counting, start(7), num_steps, reorthogonalize=reorthogonalize)
    assert counting.calls == num_steps
    zero = Counting(torch.zeros(7, 7, dtype=F64))
    hf.lanczos(zero, start(7), num_steps, reorthogonalize=reorthogonalize)
    assert zero.calls == num_steps, "also after a breakdown"


def test_the_start_vector_is_not_written_to_and_the_basis_starts_with_it():
    A = symmetric(SPECTRA["distinct"])
    v = start(7)
    before = v.clone()
    result = hf.lanczos(lambda v: A @ v, v, 4)
    assert torch.equal(v, before)
    assert relative_error(result.basis[0], v / v.norm()) < 1e-15


def test_a_zero_start_vector_gives_zeros():
    A = symmetric(SPECTRA["distinct"])
    result = hf.lanczos(lambda v: A @ v, torch.zeros(7, dtype=F64), 3)
    assert all(bool((field == 0).all()) for field in result)


def test_a_start_vector_in_an_invariant_subspace():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64))
    result = hf.lanczos(lambda v: A @ v, torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64), 4)
    assert torch.allclose(result.alphas, torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=F64))
    assert torch.allclose(result.betas, torch.tensor([1.0, 0.0, 0.0], dtype=F64))
    assert float(result.residual_norm) == 0


def test_pytrees_go_in_and_come_out():
    like = {"a": [torch.zeros(2, 2, dtype=F64)], "b": torch.zeros(3, dtype=F64)}
    layout = tree.Layout.of(like)
    A = symmetric(SPECTRA["distinct"], seed=8)
    v = randn_like(like, seeded(1))
    result = hf.lanczos(lambda v: layout.unravel(A @ layout.ravel(v)), v, 4)
    flat = hf.lanczos(lambda v: A @ v, layout.ravel(v), 4)
    assert torch.equal(result.alphas, flat.alphas)
    assert result.basis["a"][0].shape == (4, 2, 2)
    assert torch.equal(layout.ravel_rows(result.basis), flat.basis)


def test_leaves_of_low_precision_recur_in_float32():
    like = {"half": torch.ones(4, dtype=torch.bfloat16), "single": torch.ones(3)}
    scale = {"half": torch.arange(1.0, 5.0), "single": torch.arange(5.0, 8.0)}
    result = hf.lanczos(lambda v: {k: (v[k].float() * scale[k]).to(v[k].dtype) for k in v}, like, 7)
    assert result.alphas.dtype == torch.float32
    assert result.basis["half"].dtype == torch.bfloat16
    nodes = hf.eigh_tridiagonal(result.alphas, result.betas).eigenvalues
    assert abs(float(nodes[-1]) - 7) < 0.05


def test_long_runs_cross_the_blocks_of_the_basis():
    n = 50
    A = symmetric(torch.linspace(-2, 3, n, dtype=F64), seed=9)
    reference = hf.lanczos(lambda v: A @ v, start(n), n)
    for m in (15, 16, 17, 32, 33):
        result = hf.lanczos(lambda v: A @ v, start(n), m)
        assert relative_error(result.alphas, reference.alphas[:m]) < 1e-10
        assert relative_error(result.betas, reference.betas[: m - 1]) < 1e-10
        assert relative_error(result.basis, reference.basis[:m]) < 1e-10
        assert relative_error(result.residual_norm, reference.betas[m - 1]) < 1e-10


# The tridiagonal eigenproblem


def test_eigh_tridiagonal_is_scipys_in_float64():
    g = seeded(2)
    alphas, betas = torch.randn(2, 3, 5, generator=g), torch.randn(2, 3, 4, generator=g)
    values, vectors = hf.eigh_tridiagonal(alphas, betas)
    assert values.shape == (2, 3, 5)
    assert vectors.shape == (2, 3, 5, 5)
    assert values.dtype == vectors.dtype == F64
    for i in range(2):
        for j in range(3):
            exact = scipy.linalg.eigvalsh_tridiagonal(alphas[i, j].double(), betas[i, j].double())
            assert np.array_equal(values[i, j].numpy(), exact) or np.allclose(values[i, j], exact, rtol=1e-14)
            T = torch.diag(alphas[i, j]) + torch.diag(betas[i, j], 1) + torch.diag(betas[i, j], -1)
            assert relative_error(T.to(F64) @ vectors[i, j], vectors[i, j] * values[i, j]) < 1e-13
    assert bool((values.diff(dim=-1) >= 0).all())


def test_eigh_tridiagonal_of_one_by_one_and_of_tensors_that_require_grad():
    values, vectors = hf.eigh_tridiagonal(torch.tensor([3.0], requires_grad=True), torch.empty(0))
    assert values.tolist() == [3.0]
    assert vectors.abs().tolist() == [[1.0]]
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("alphas", "betas"), [((3,), (3,)), ((), ()), ((2, 3), (2,)), ((0,), (1,)), ((2, 3), (3, 2))], ids=str
)
def test_eigh_tridiagonal_of_shapes_that_do_not_fit(alphas, betas):
    with pytest.raises(ValueError, match=r"alphas has shape .*, betas .*; expected \(..., m\) and \(..., m - 1\)"):
        hf.eigh_tridiagonal(torch.ones(alphas), torch.ones(betas))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigh_tridiagonal_of_what_is_not_finite(bad):
    with pytest.raises(FloatingPointError, match="alphas or betas are NaN or infinite; a product of the operator"):
        hf.eigh_tridiagonal(torch.tensor([1.0, bad]), torch.tensor([1.0]))
    with pytest.raises(FloatingPointError, match="alphas or betas are NaN or infinite"):
        hf.eigh_tridiagonal(torch.tensor([1.0, 1.0]), torch.tensor([bad]))


def test_options_out_of_range():
    A = symmetric(SPECTRA["distinct"])
    for num_steps in (0, -1, 8):
        with pytest.raises(
            ValueError, match=rf"num_steps={num_steps} is out of range; expected 1 <= num_steps <= 7, the number of ent"
        ):
            hf.lanczos(lambda v: A @ v, start(7), num_steps)
    with pytest.raises(TypeError, match=r"num_steps is 2.0 of type float, expected an int"):
        hf.lanczos(lambda v: A @ v, start(7), 2.0)
    with pytest.raises(ValueError, match=r"reorthogonalize='partial' is not known; expected one of 'full', 'none'"):
        hf.lanczos(lambda v: A @ v, start(7), 2, reorthogonalize="partial")
    with pytest.raises(ValueError, match=r"v0 holds no tensors"):
        hf.lanczos(lambda v: v, {}, 1)
    with pytest.raises(TypeError, match=r"v0 has dtype torch.int64; curvature needs real floating-point leaves"):
        hf.lanczos(lambda v: v, torch.ones(3, dtype=torch.int64), 1)
