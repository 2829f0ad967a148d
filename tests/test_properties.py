"""Laws that hold for every symmetric matrix, pytree, dtype and size, 1x1 included."""

import torch
from helpers import F64, seeded
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import hessfunc as hf
from hessfunc import tree

settings.register_profile(
    "hessfunc", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hessfunc")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, F64]
seeds = st.integers(0, 10_000)


@st.composite
def spectra(draw, max_size=9):
    """Eigenvalues with repetitions, zeros, both signs and any scale."""
    few = draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.5, 0.125]), min_size=1, max_size=max_size))
    scale = 10.0 ** draw(st.integers(-9, 9))
    spread = draw(st.lists(st.integers(-4000, 4000).map(lambda i: i / 1000), min_size=len(few), max_size=len(few)))
    mixed = [s if draw(st.booleans()) else f for s, f in zip(spread, few, strict=True)]
    return [scale * value for value in mixed]


@st.composite
def matrices(draw, max_size=9, dtype=F64):
    values = torch.tensor(draw(spectra(max_size)), dtype=F64)
    n = len(values)
    basis = torch.linalg.qr(torch.randn(n, n, generator=seeded(draw(seeds)), dtype=F64))[0]
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


leaves = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    seeds,
)
pytrees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def close(a, b, scale, tolerance=1e-11):
    return float((a - b).abs().max() if a.numel() else 0.0) <= tolerance * float(scale) + 1e-300


# Pytrees


@given(pytrees, st.integers(0, 3), seeds)
def test_ravel_and_unravel_are_inverse(point, rows, seed):
    layout = tree.Layout.of(point)
    assert layout.size == tree.size(point) == sum(layout.sizes)
    flat = layout.ravel(point)
    assert flat.shape == (layout.size,)
    assert flat.dtype == layout.dtype
    assert layout.dtype in (torch.float32, F64)
    back = layout.unravel(flat)
    assert tree.flatten(back)[1] == tree.flatten(point)[1]
    for a, b in zip(tree.leaves(back), tree.leaves(point), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    many = torch.randn(rows, layout.size, generator=seeded(seed), dtype=F64).to(layout.dtype)
    split = layout.unravel_rows(many)
    assert all(leaf.shape[0] == rows for leaf in tree.leaves(split))
    if rows:
        narrowed = torch.stack([layout.ravel(tree.index(split, i)) for i in range(rows)])
        assert torch.equal(layout.ravel_rows(split), narrowed)


@given(pytrees, seeds)
def test_inner_products_are_those_of_the_flat_vectors(point, seed):
    layout = tree.Layout.of(point)
    generator = seeded(seed)
    other = tree.map_leaves(lambda x: torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype), point)
    x, y = layout.ravel(point).to(F64), layout.ravel(other).to(F64)
    assert abs(float(tree.vdot(point, other)) - float(x @ y)) <= 1e-5 * float(x.norm() * y.norm()) + 1e-30
    assert abs(float(tree.norm(point)) - float(x.norm())) <= 1e-5 * float(x.norm()) + 1e-30
    assert len(tree.names(point)) == len(tree.leaves(point))


# Operators


@given(matrices(), seeds)
def test_operators_are_linear_and_symmetric(matrix, seed):
    H = hf.as_operator(matrix)
    scale = matrix.abs().sum()
    u, v = torch.randn(2, H.size, generator=seeded(seed), dtype=F64)
    assert close(H(2.0 * u - 3.0 * v), 2.0 * H(u) - 3.0 * H(v), 30 * scale)
    assert abs(float(u @ H(v) - v @ H(u))) <= 1e-11 * 30 * float(scale) + 1e-300
    assert close(H.dense(), matrix, scale)
    assert close((H - H).dense(), 0 * matrix, scale)
    assert close((0.5 * H).shift(float(scale)).dense(), 0.5 * matrix + scale * torch.eye(H.size, dtype=F64), scale)


@given(st.integers(1, 5), st.integers(1, 4), seeds, st.sampled_from([torch.float32, F64]))
def test_hessians_of_random_quartics_are_exact_linear_and_symmetric(size, terms, seed, dtype):
    """``loss = sum_k (a_k . x)^4 / 12`` has Hessian ``sum_k (a_k . x)^2 a_k a_k^T``."""
    generator = seeded(seed)
    A = torch.randn(terms, size, generator=generator, dtype=F64).to(dtype)
    x, u, v = (torch.randn(size, generator=generator, dtype=F64).to(dtype) for _ in range(3))

    def loss(p):
        return ((A @ p) ** 4).sum() / 12

    exact = (A * ((A @ x) ** 2).unsqueeze(1)).T @ A
    tolerance = 1000 * torch.finfo(dtype).eps
    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        assert close(product(loss, x, v), exact @ v, exact.abs().sum() * v.abs().max() + 1e-3, tolerance)
    H = hf.hessian(loss, x)
    assert close(H(u + 2 * v), H(u) + 2 * H(v), exact.abs().sum() * 10 + 1e-3, tolerance)
    assert H.dense().shape == (size, size)


@given(pytrees, seeds)
@settings(max_examples=12)
def test_hessians_keep_any_pytree(point, seed):
    assume(tree.size(point) > 0)
    generator = seeded(seed)
    v = tree.map_leaves(lambda x: torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype), point)

    def loss(p):
        return sum((3 * leaf.to(F64).square()).sum() for leaf in tree.leaves(p))

    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        result = product(loss, point, v)
        assert tree.flatten(result)[1] == tree.flatten(point)[1]
        for a, b in zip(tree.leaves(result), tree.leaves(v), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, 6 * b)
    H = hf.hessian(loss, point, linearize=False)
    assert all(torch.equal(a, 6 * b) for a, b in zip(tree.leaves(H(v)), tree.leaves(v), strict=True))


# Kernels


@given(matrices(), seeds, st.integers(1, 9), st.sampled_from(["full", "none"]))
def test_lanczos_quadrature_is_exact(matrix, seed, num_steps, reorthogonalize):
    """``sum_k w_k theta_k^p = q^T A^p q`` up to degree ``2 m - 1``, whatever breaks down on the way."""
    n = matrix.shape[0]
    num_steps = min(num_steps, n, 4)
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    v = torch.randn(n, generator=seeded(seed), dtype=F64)
    result = hf.lanczos(lambda x: matrix @ x, v, num_steps, reorthogonalize=reorthogonalize)
    assert all(bool(torch.isfinite(field).all()) for field in result)
    nodes, vectors = hf.eigh_tridiagonal(result.alphas, result.betas)
    weights = vectors[0] ** 2
    assert abs(float(weights.sum()) - 1) < 1e-12
    assert float(nodes.abs().max()) <= scale * (1 + 1e-12) + 1e-300, "Ritz values lie within the spectrum"
    power = v / v.norm()
    q = power
    for degree in range(1, 2 * num_steps):
        power = matrix @ power
        gap = abs(float((weights * nodes**degree).sum()) - float(q @ power))
        assert gap <= 1e-9 * scale**degree + 1e-300


@given(matrices(), seeds)
def test_lanczos_with_all_steps_diagonalizes(matrix, seed):
    n = matrix.shape[0]
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    v = torch.randn(n, generator=seeded(seed), dtype=F64)
    result = hf.lanczos(lambda x: matrix @ x, v, n)
    gram = result.basis @ result.basis.T
    kept = gram.diagonal().round()
    assert close(gram, torch.diag(kept), 1.0, 1e-13)
    assert bool((kept.diff() <= 0).all())
    rank = int(kept.sum())
    nodes = hf.eigh_tridiagonal(result.alphas[:rank], result.betas[: rank - 1]).eigenvalues
    exact = torch.linalg.eigvalsh(matrix)
    # Every Ritz value is an eigenvalue once the space is exhausted.
    assert float((nodes.unsqueeze(1) - exact).abs().min(dim=1).values.max()) <= 1e-7 * scale + 1e-300


@given(matrices(), seeds, st.integers(-12, 12))
def test_kernels_scale_with_the_operator(matrix, seed, exponent):
    factor = 2.0**exponent  # exact in binary, so the results are equal to the last bit
    n = matrix.shape[0]
    v = torch.randn(n, generator=seeded(seed), dtype=F64)
    one = hf.lanczos(lambda x: matrix @ x, v, n)
    scaled = hf.lanczos(lambda x: factor * (matrix @ x), v, n)
    assert torch.equal(scaled.alphas, factor * one.alphas)
    assert torch.equal(scaled.betas, factor * one.betas)
    assert torch.equal(scaled.basis, one.basis)
    power = hf.power_iteration(lambda x: matrix @ x, v, 3)
    other = hf.power_iteration(lambda x: factor * (matrix @ x), v, 3)
    assert close(other.history, factor * power.history, factor * matrix.abs().sum())


@given(matrices(), seeds, st.integers(1, 6))
def test_power_iteration_certifies_itself(matrix, seed, num_steps):
    """Some eigenvalue lies within the residual of the Rayleigh quotient, however early the iteration stops."""
    n = matrix.shape[0]
    v = torch.randn(n, generator=seeded(seed), dtype=F64)
    result = hf.power_iteration(lambda x: matrix @ x, v, num_steps)
    exact = torch.linalg.eigvalsh(matrix)
    scale = float(exact.abs().max())
    assert float((exact - result.eigenvalue).abs().min()) <= float(result.residual_norm) + 1e-12 * scale
    assert float(result.eigenvalue.abs()) <= scale * (1 + 1e-12) + 1e-300
    assert bool((result.history.abs() <= scale * (1 + 1e-12) + 1e-300).all())


@given(st.integers(1, 6), seeds, st.sampled_from([torch.float32, F64]))
def test_one_dimension_is_solved_in_one_step(num_copies, seed, dtype):
    """A 1x1 matrix, under vmap too."""
    values = torch.randn(num_copies, 1, generator=seeded(seed), dtype=F64).to(dtype)
    start = torch.ones(1, dtype=dtype)
    result = torch.func.vmap(lambda a: hf.lanczos(lambda v: a * v, start, 1))(values)
    assert torch.equal(result.alphas, values)
    assert result.betas.shape == (num_copies, 0)
    assert bool((result.residual_norm == 0).all())
