"""vmap: over probes, start vectors, operators, parameters, batches and hyper-parameters, nested, always as the loop."""

import pytest
import torch
from helpers import F64, SPECTRA, CountingRows, case, dense_hessian, randn_like, relative_error, seeded, symmetric
from torch import nn

import hessfunc as hf
from hessfunc import tree

vmap = torch.func.vmap
A = symmetric(SPECTRA["distinct"], seed=1)


def stacked(results):
    return type(results[0])(*(tree.stack(list(field)) for field in zip(*results, strict=True)))


def assert_fields_equal(together, loop, tolerance=1e-11, scale=0.0):
    """Equal up to rounding, which is relative to each field or, where that is larger, to the operator's scale."""
    assert type(together) is type(loop[0])
    for a, b in zip(together, stacked(loop), strict=True):
        gap = tree.norm(tree.axpy(-1.0, a, b))
        assert float(gap) <= tolerance * max(float(tree.norm(b)), scale)


# Operators


def test_all_lanes_go_through_rows_once():
    counting = CountingRows(A)
    V = torch.randn(5, 7, generator=seeded(1), dtype=F64)
    assert relative_error(vmap(counting.operator.vector)(V), V @ A) < 1e-14
    assert counting.passes == [5]
    vmap(counting.operator)(V)
    assert counting.passes == [5, 5]


def test_nested_vmap_is_one_pass():
    counting = CountingRows(A)
    V = torch.randn(2, 3, 4, 7, generator=seeded(1), dtype=F64)
    assert relative_error(vmap(vmap(vmap(counting.operator.vector)))(V), V @ A) < 1e-14
    assert counting.passes == [24]
    assert relative_error(vmap(counting.operator.rows)(V[0]), V[0] @ A) < 1e-14
    assert counting.passes == [24, 12]


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("out_dim", [0, 1, -1])
def test_any_dimension_may_carry_the_lanes(in_dim, out_dim):
    V = torch.randn(5, 7, generator=seeded(1), dtype=F64)
    H = hf.as_operator(A)
    result = vmap(H.vector, in_dims=in_dim, out_dims=out_dim)(V.movedim(0, in_dim))
    assert relative_error(result.movedim(out_dim, 0), V @ A) < 1e-14


def test_chunks_are_passes():
    counting = CountingRows(A)
    V = torch.randn(5, 7, generator=seeded(1), dtype=F64)
    assert relative_error(vmap(counting.operator.vector, chunk_size=2)(V), V @ A) < 1e-14
    assert counting.passes == [2, 2, 1]


def test_a_vector_that_is_not_batched_is_one_row():
    counting = CountingRows(A)
    fixed = torch.ones(7, dtype=F64)
    scales = torch.tensor([1.0, 2.0], dtype=F64)
    result = vmap(lambda s: s * counting.operator.vector(fixed))(scales)
    assert relative_error(result, scales.unsqueeze(1) * (A @ fixed)) < 1e-14
    assert counting.passes == [1]


def test_pytrees_under_vmap(generator):
    loss, params, batch = case("nested pytree")
    H = hf.hessian(loss, params, batch)
    vectors = randn_like(params, generator, (4,))
    together = vmap(H)(vectors)
    assert relative_error(together, H.matmat(vectors)) < 1e-12
    for i in range(4):
        assert relative_error(tree.index(together, i), H(tree.index(vectors, i))) < 1e-12


@pytest.mark.parametrize("name", ["conv batch norm train", "causal attention", "tied embedding"])
def test_hessians_under_vmap_are_the_dense_hessian(name, generator):
    loss, params, batch = case(name)
    H = hf.hessian(loss, params, batch)
    V = torch.randn(5, H.size, generator=generator, dtype=F64)
    assert relative_error(vmap(H.vector)(V), V @ dense_hessian(name)) < 1e-10
    assert relative_error(vmap(H.vector)(V), V @ dense_hessian(name)) < 1e-10, "again, from the traced program"


def test_sums_and_shifts_under_vmap():
    left, right = CountingRows(A), CountingRows(A @ A)
    V = torch.randn(3, 7, generator=seeded(1), dtype=F64)
    combined = (left.operator - 0.5 * right.operator).shift(2.0)
    assert relative_error(vmap(combined.vector)(V), V @ A - 0.5 * V @ A @ A + 2 * V) < 1e-13
    assert (left.passes, right.passes) == ([3], [3])


# Kernels


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_over_start_vectors_equals_the_loop(name, reorthogonalize):
    matrix = symmetric(SPECTRA[name], seed=2)
    n = len(SPECTRA[name])
    steps = min(n, 4 if reorthogonalize == "full" else 3)
    counting = CountingRows(matrix)
    V = torch.randn(5, n, generator=seeded(3), dtype=F64)
    V[1] = torch.linalg.eigh(matrix).eigenvectors[:, -1]  # breaks down at once, the others later or never
    V[2] = 0
    kernel = lambda v: hf.lanczos(counting.operator.vector, v, steps, reorthogonalize=reorthogonalize)  # noqa: E731
    together = vmap(kernel)(V)
    assert counting.passes == [5] * steps, "one pass for each step, of all lanes in lockstep"
    assert_fields_equal(together, [kernel(v) for v in V], scale=max(map(abs, SPECTRA[name])))


def test_power_iteration_over_start_vectors_equals_the_loop():
    counting = CountingRows(A)
    V = torch.randn(4, 7, generator=seeded(3), dtype=F64)
    kernel = lambda v: hf.power_iteration(counting.operator.vector, v, 6)  # noqa: E731
    together = vmap(kernel)(V)
    assert counting.passes == [4] * 6
    assert_fields_equal(together, [kernel(v) for v in V])
    step = vmap(lambda v: hf.power_step(counting.operator.vector, v))(V)
    assert_fields_equal(step, [hf.power_step(counting.operator.vector, v) for v in V])


def test_kernels_over_operators_with_one_start_vector():
    matrices = torch.stack([symmetric(SPECTRA["distinct"], seed=s) for s in range(3)] + [torch.zeros(7, 7, dtype=F64)])
    v = torch.randn(7, generator=seeded(4), dtype=F64)
    assert_fields_equal(
        vmap(lambda a: hf.lanczos(lambda x: a @ x, v, 5))(matrices),
        [hf.lanczos(lambda x, a=a: a @ x, v, 5) for a in matrices],
    )
    assert_fields_equal(
        vmap(lambda a: hf.power_iteration(lambda x: a @ x, v, 5))(matrices),
        [hf.power_iteration(lambda x, a=a: a @ x, v, 5) for a in matrices],
    )


def test_nested_vmap_over_operators_and_start_vectors():
    matrices = torch.stack([symmetric(SPECTRA["repeated"], seed=s) for s in range(2)])
    V = torch.randn(3, 6, generator=seeded(5), dtype=F64)
    nested = vmap(lambda a: vmap(lambda v: hf.lanczos(lambda x: a @ x, v, 3))(V))(matrices)
    for i, a in enumerate(matrices):
        alone = vmap(lambda v, a=a: hf.lanczos(lambda x: a @ x, v, 3))(V)
        for field, expected in zip(nested, alone, strict=True):
            assert relative_error(field[i], expected) < 1e-11


def test_lanczos_of_a_real_hessian_over_probes_equals_the_loop():
    loss, params, batch = case("conv batch norm train")
    H = hf.hessian(loss, params, [batch, tuple(t[:2] for t in batch)])
    V = torch.randn(2, H.size, generator=seeded(6), dtype=F64)
    kernel = lambda v: hf.lanczos(H.vector, v, 5)  # noqa: E731
    assert_fields_equal(vmap(kernel)(V), [kernel(v) for v in V], 1e-8)


# Batches of parameters, of data, of hyper-parameters


def ensemble(norm):
    def build(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(3, 4), norm(), nn.Tanh(), nn.Linear(4, 2)).double()

    return [build(seed) for seed in range(3)]


X = torch.randn(6, 3, generator=seeded(7), dtype=F64)
Y = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward])
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(4)], ids=["plain", "layer norm"])
def test_products_over_an_ensemble_equal_the_loop(product, norm, generator):
    models = ensemble(norm)
    loss, _ = hf.module_loss(models[0], nn.CrossEntropyLoss())
    stack = tree.detach(torch.func.stack_module_state(models)[0])
    vectors = randn_like(tree.index(stack, 0), generator, (3,))
    both = vmap(lambda p, v: product(loss, p, v, X, Y))(stack, vectors)
    params_alone = vmap(lambda p: product(loss, p, tree.index(vectors, 0), X, Y))(stack)
    for i, model in enumerate(models):
        own, params = hf.module_loss(model, nn.CrossEntropyLoss())
        assert relative_error(tree.index(both, i), product(own, params, tree.index(vectors, i), X, Y)) < 1e-11
        assert relative_error(tree.index(params_alone, i), product(own, params, tree.index(vectors, 0), X, Y)) < 1e-11


def test_lanczos_and_a_trace_over_an_ensemble_equal_the_loop(generator):
    models = ensemble(nn.Identity)
    loss, params = hf.module_loss(models[0], nn.CrossEntropyLoss())
    stack = tree.detach(torch.func.stack_module_state(models)[0])
    v = randn_like(params, generator)
    probes = randn_like(params, generator, (4,))

    def spectrum(p):
        return hf.lanczos(lambda v: hf.hvp(loss, p, v, X, Y), v, 5)

    def trace(p):
        return vmap(lambda probe: tree.vdot(probe, hf.hvp(loss, p, probe, X, Y)))(probes).mean()

    members = [tree.index(stack, i) for i in range(3)]
    assert_fields_equal(vmap(spectrum)(stack), [spectrum(p) for p in members], 1e-9)
    assert relative_error(vmap(trace)(stack), torch.stack([trace(p) for p in members])) < 1e-11


def test_products_over_mini_batches_equal_the_loop(generator):
    loss, params, (x, y) = case("mlp tanh")
    v = randn_like(params, generator)
    xs, ys = x.unflatten(0, (3, 2)), y.unflatten(0, (3, 2))
    together = vmap(lambda x, y: hf.hvp(loss, params, v, x, y))(xs, ys)
    for i in range(3):
        assert relative_error(tree.index(together, i), hf.hvp(loss, params, v, xs[i], ys[i])) < 1e-11
    whole = tree.map_leaves(lambda leaf: leaf.mean(0), together)
    assert relative_error(whole, hf.hvp(loss, params, v, x, y)) < 1e-11


def test_products_over_a_hyper_parameter_equal_the_loop(generator):
    loss, params, batch = case("mlp tanh")
    v = randn_like(params, generator)

    def product(decay):
        return hf.hvp(lambda p, *b: loss(p, *b) + decay * tree.vdot(p, p), params, v, *batch)

    decays = torch.tensor([0.0, 0.1, 3.0], dtype=F64)
    together = vmap(product)(decays)
    plain = hf.hvp(loss, params, v, *batch)
    for i, decay in enumerate(decays):
        assert relative_error(tree.index(together, i), tree.axpy(2 * decay, v, plain)) < 1e-11


def test_a_loss_that_vmaps_over_samples_itself(generator):
    loss, params, (x, y) = case("transformer block")

    def per_sample(p, x):
        return vmap(lambda one: loss(p, one.unsqueeze(0), y))(x).mean()

    v = randn_like(params, generator)
    for product in (hf.hvp, hf.hvp_reverse_over_forward):
        assert relative_error(product(per_sample, params, v, x), hf.hvp(loss, params, v, x, y)) < 1e-10
