"""Operators: algebra, flat and structured forms, dtypes, SciPy."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import (
    CASES,
    F64,
    CountingRows,
    case,
    dense_hessian,
    randn_like,
    relative_error,
    seeded,
    symmetric,
)

import hessfunc as hf
from hessfunc import tree

A = symmetric([-3.0, -1.0, 0.5, 2.0, 4.0, 7.0], seed=1)
B = symmetric([1.0, 1.0, 1.0, 2.0, 3.0, 5.0], seed=2)
LIKE = {"a": [torch.zeros(2, 2, dtype=F64)], "b": (torch.zeros(2, dtype=F64),)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("linearize", [True, False])
def test_the_hessian_operator_is_the_dense_hessian(name, linearize, generator):
    loss, params, batch = case(name)
    H = hf.hessian(loss, params, batch, linearize=linearize)
    reference = dense_hessian(name)
    v = randn_like(params, generator)
    result = H(v)
    assert tree.flatten(result)[1] == tree.flatten(params)[1]
    assert relative_error(H.layout.ravel(result), reference @ H.layout.ravel(v)) < 1e-10
    V = torch.randn(9, H.size, generator=generator, dtype=F64)
    for _ in range(2):  # traced, and then replayed
        assert relative_error(H.rows(V), V @ reference) < 1e-10
    assert not any(leaf.requires_grad for leaf in tree.leaves(result))


@pytest.mark.parametrize("product", [hf.hvp_reverse_over_forward, hf.hvp_double_backward])
@pytest.mark.parametrize("name", ["conv batch norm train", "causal attention", "huber", "nested pytree"])
def test_the_other_products_give_the_same_operator(product, name, generator):
    loss, params, batch = case(name)
    H = hf.hessian(loss, params, batch, product=product)
    vectors = randn_like(params, generator, (3,))
    rows = H.layout.ravel_rows(H.matmat(vectors))
    assert relative_error(rows, H.layout.ravel_rows(vectors) @ dense_hessian(name)) < 1e-10


def test_losses_that_take_derivatives_themselves(generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    w = torch.randn(3, generator=generator, dtype=F64)

    def energy(z, w):
        return torch.tanh(z @ w).pow(3).sum()

    def by_hand(w, x):
        t = torch.tanh(x @ w)
        return ((3 * t**2 * (1 - t**2))[:, None] * w).square().sum()

    def by_transform(w, x):
        return torch.func.grad(energy)(x, w).square().sum()

    def by_tape(w, x):
        z = x.clone().requires_grad_()
        return torch.autograd.grad(energy(z, w), z, create_graph=True)[0].square().sum()

    def by_tape_of_activations(w, x):
        z = x @ w
        slopes = torch.autograd.grad(torch.tanh(z).pow(3).sum(), z, create_graph=True)[0]
        return (slopes[:, None] * w).square().sum()

    reference = hf.hessian(by_hand, w, (x,)).dense()
    for loss, product in (
        (by_transform, hf.hvp),
        (by_transform, hf.hvp_double_backward),
        (by_tape, hf.hvp_double_backward),
        (by_tape_of_activations, hf.hvp_double_backward),
    ):
        H = hf.hessian(loss, w, [(x[:2],), (x[2:],)], reduction="sum", product=product)
        assert relative_error(H.dense(), reference) < 1e-10
    H = hf.hessian(by_tape, w, (x,), reduction="sum")
    with pytest.warns(hf.ProductWarning, match=r"on torch's own tape.*go on with hessfunc\.hvp_double_backward"):
        assert relative_error(H.dense(), reference) < 1e-10
    step, rise = hf.sam_ascent(by_transform, w, x, rho=0.01)
    assert float(rise) == pytest.approx(float(by_hand(w + step, x) - by_hand(w, x)), rel=1e-10)


def test_attributes():
    H = hf.as_operator(A, like=LIKE)
    assert (H.size, H.dtype, H.device) == (6, F64, torch.device("cpu"))
    assert H.layout.names == ("a.0", "b.0")
    assert tree.flatten(H.like)[1] == tree.flatten(LIKE)[1]
    assert hf.as_operator(A).layout.names == ("",)


def test_pytree_and_flat_forms_agree(generator):
    H = hf.as_operator(A, like=LIKE)
    vectors = randn_like(LIKE, generator, (4,))
    flat = H.layout.ravel_rows(vectors)
    expected = flat @ A
    assert relative_error(H.rows(flat), expected) < 1e-14
    assert relative_error(H.layout.ravel_rows(H.matmat(vectors)), expected) < 1e-14
    assert relative_error(H.vector(flat[0]), expected[0]) < 1e-14
    assert relative_error(H.layout.ravel(H(tree.index(vectors, 0))), expected[0]) < 1e-14
    assert torch.equal(H.rows(flat[:0]), flat[:0]), "no rows, no products"


def test_algebra():
    H, G = hf.as_operator(A, like=LIKE), hf.as_operator(B, like=LIKE)
    eye = torch.eye(6, dtype=F64)
    for operator, expected in (
        (H + G, A + B),
        (H - G, A - B),
        (2.5 * H, 2.5 * A),
        (H * 3, 3 * A),
        (-H, -A),
        (H.shift(0.5), A + 0.5 * eye),
        (H - 2 * G.shift(-1.0) + H, 2 * A - 2 * (B - eye)),
        (H * np.float64(0.25), 0.25 * A),
    ):
        assert relative_error(operator.dense(), expected) < 1e-14
        assert operator.layout == H.layout


def test_algebra_makes_one_pass_of_each_operand_for_all_rows():
    left, right = CountingRows(A), CountingRows(B)
    (left.operator - 2 * right.operator).shift(1.0).rows(torch.eye(6, dtype=F64))
    assert left.passes == [6]
    assert right.passes == [6]


@pytest.mark.parametrize("other", [3, A, None, "H"])
def test_adding_what_is_no_operator(other):
    with pytest.raises(TypeError, match=r"unsupported operand|must be|cannot"):
        hf.as_operator(A) + other


@pytest.mark.parametrize("factor", [torch.tensor(2.0), "2", None, 1j])
def test_scaling_by_what_is_no_number(factor):
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        hf.as_operator(A) * factor


def test_operators_on_different_spaces_do_not_add():
    with pytest.raises(ValueError, match=r"other.like has a different pytree structure from H.like"):
        hf.as_operator(A, like=LIKE) + hf.as_operator(B)
    with pytest.raises(ValueError, match=r"other.like has shape \(5,\), expected \(6,\) as in H.like"):
        hf.as_operator(A) - hf.as_operator(B[:5, :5])


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_dense_is_made_in_chunks(chunk_size):
    counting = CountingRows(A)
    assert relative_error(counting.operator.dense(chunk_size=chunk_size), A) < 1e-14
    assert sum(counting.passes) == 6
    assert max(counting.passes) == min(chunk_size, 6)


def test_dense_checks_its_chunk_size():
    with pytest.raises(ValueError, match=r"chunk_size=0 is out of range; expected 1 <= chunk_size"):
        hf.as_operator(A).dense(chunk_size=0)


def test_as_operator_of_a_matvec():
    def matvec(v):
        return {"a": [3 * v["a"][0].T], "b": (v["b"][0].flip(0),)}

    H = hf.as_operator(matvec, like=LIKE)
    matrix = H.dense()
    assert torch.equal(matrix, matrix.T)
    v = randn_like(LIKE, seeded(1))
    assert relative_error(H(v), matvec(v)) < 1e-14


def test_as_operator_of_an_operator_is_one_pass():
    counting = CountingRows(A)
    outer = hf.as_operator(counting.operator.vector, like=torch.zeros(6, dtype=F64))
    outer.rows(torch.eye(6, dtype=F64))
    assert counting.passes == [6]


def test_as_operator_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"matvec is a tensor of shape \(2, 3\); a matrix must be square"):
        hf.as_operator(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"matvec is a tensor of shape \(3,\)"):
        hf.as_operator(torch.ones(3))
    with pytest.raises(ValueError, match=r"like is missing; pass a pytree with the structure"):
        hf.as_operator(lambda v: v)
    with pytest.raises(ValueError, match=r"like holds 4 numbers, but the matrix has 6 rows"):
        hf.as_operator(A, like=torch.zeros(4, dtype=F64))
    with pytest.raises(TypeError, match=r"like has dtype torch.int64; curvature needs real floating-point leaves"):
        hf.as_operator(torch.eye(2, dtype=torch.int64))


def test_vectors_that_do_not_fit():
    H = hf.as_operator(A, like=LIKE)
    v = randn_like(LIKE, seeded(1))
    with pytest.raises(ValueError, match=r"v has a different pytree structure from H.like: got dict with leaves"):
        H({"a": v["a"]})
    with pytest.raises(ValueError, match=r"v\['b.0'\] has shape \(3,\), expected \(2,\) as in H.like"):
        H({"a": v["a"], "b": (torch.zeros(3, dtype=F64),)})
    with pytest.raises(TypeError, match=r"v\['b.0'\] has dtype torch.float32, but H.like has torch.float64 there"):
        H({"a": v["a"], "b": (torch.zeros(2),)})
    with pytest.raises(ValueError, match=r"vectors\['a.0'\] has shape \(2, 2\), expected \('K', 2, 2\)"):
        H.matmat(v)
    uneven = {"a": [torch.zeros(3, 2, 2, dtype=F64)], "b": (torch.zeros(4, 2, dtype=F64),)}
    with pytest.raises(ValueError, match=r"vectors has leading axes of different lengths \[3, 4\]"):
        H.matmat(uneven)
    with pytest.raises(ValueError, match=r"flat vector has shape \(5,\), expected \(6,\); H.layout.ravel makes one"):
        H.vector(torch.zeros(5, dtype=F64))
    with pytest.raises(ValueError, match=r"flat vector has shape \(6,\), expected \(K, 6\)"):
        H.rows(torch.zeros(6, dtype=F64))
    with pytest.raises(ValueError, match=r"flat vector has shape list, expected \(6,\)"):
        H.vector([0.0] * 6)
    with pytest.raises(TypeError, match=r"flat vector has dtype torch.float32, expected torch.float64; convert"):
        H.vector(torch.zeros(6))


# Other points


def test_an_operator_moves_to_other_parameters_without_tracing_again(generator):
    loss, params, (x, y) = case("mlp tanh")
    calls = []

    def counted(p, *batch):
        calls.append(1)
        return loss(p, *batch)

    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    H = hf.hessian(counted, params, data)
    V = torch.randn(9, H.size, generator=generator, dtype=F64)
    for _ in range(3):  # so that there are programs for one lane and for several
        H.rows(V)
    other = tree.map_leaves(lambda leaf: leaf + randn_like(leaf, generator), params)
    calls.clear()
    moved = H.at(other)
    assert relative_error(moved.rows(V), hf.hessian(loss, other, data).rows(V)) < 1e-12
    assert len(calls) == 1, "the check of the first batch"
    assert relative_error(H.rows(V), hf.hessian(loss, params, data).rows(V)) < 1e-12, "the first stays where it was"
    assert relative_error(moved.at(params).rows(V), H.rows(V)) < 1e-12


def test_moving_to_parameters_of_other_strides():
    w, x = torch.randn(3, 4, generator=seeded(1), dtype=F64), torch.randn(5, 4, generator=seeded(2), dtype=F64)
    H = hf.hessian(lambda w, x: torch.tanh(x @ w.view(12).view(3, 4).T).pow(3).sum(), w, (x,))
    H.vector(torch.ones(12, dtype=F64))
    G = hf.hessian(lambda w, x: torch.tanh(x @ w.T).pow(3).sum(), w, (x,))
    G.vector(torch.ones(12, dtype=F64))
    turned = torch.randn(4, 3, generator=seeded(3), dtype=F64).T
    assert relative_error(G.at(turned).dense(), H.at(turned.contiguous()).dense()) < 1e-12


def test_sums_multiples_and_shifts_move_with_their_operands(generator):
    loss, params, batch = case("mlp tanh")
    other = tree.map_leaves(lambda leaf: leaf + randn_like(leaf, generator), params)
    cubic = lambda p, *_: sum((leaf**3).sum() for leaf in tree.leaves(p))  # noqa: E731

    def combined(point):
        return (hf.hessian(loss, point, batch) - 0.5 * hf.hessian(cubic, point, batch)).shift(0.3)

    assert relative_error(combined(params).at(other).dense(), combined(other).dense()) < 1e-12


def test_what_cannot_be_traced_says_so_once_and_moves_all_the_same():
    def loss(w):
        return (w**4).sum() if w.sum() > 0 else (w**2).sum()

    H = hf.hessian(loss, torch.ones(2, dtype=F64))
    with pytest.warns(hf.ProductWarning, match="cannot be traced"):
        H(torch.ones(2, dtype=F64))
    assert H.at(-torch.ones(2, dtype=F64))(torch.ones(2, dtype=F64)).tolist() == [2.0, 2.0]


def test_operators_that_belong_to_one_point():
    with pytest.raises(ValueError, match=r"the operator belongs to one point and cannot move; build it anew there"):
        hf.as_operator(A).at(A[0])
    call, params = hf.functionalize(torch.nn.Linear(2, 3))
    data = (torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
    sampled = hf.fisher(call, torch.nn.functional.cross_entropy, params, data, kind="mc", generator=seeded())
    with pytest.raises(ValueError, match=r"but for kind='mc'"):
        sampled.at(params)
    with pytest.raises(ValueError, match=r"cannot move"):
        hf.ggn_hierarchy(call, torch.nn.functional.cross_entropy, params, data).class_term.at(params)
    G = hf.ggn(call, torch.nn.functional.cross_entropy, params, data)
    with pytest.raises(ValueError, match=r"params has a different pytree structure from H.like"):
        G.at([torch.ones(2)])
    with pytest.raises(FloatingPointError, match=r"the loss of batch 0 is NaN"):
        G.at(tree.map_leaves(lambda leaf: leaf * float("nan"), params))


# Dtypes


def quartic(p):
    return sum((leaf.float() ** 4).sum() for leaf in tree.leaves(p)) / 12


def test_leaves_of_several_dtypes_in_one_pytree():
    params = {
        "bf16": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "f16": torch.tensor([3.0], dtype=torch.float16),
        "f32": torch.tensor([4.0, 5.0]),
    }
    H = hf.hessian(quartic, params)
    assert H.dtype == torch.float32
    assert torch.allclose(H.dense().diagonal(), torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0]), rtol=2**-7)
    result = H(tree.map_leaves(torch.ones_like, params))
    assert {k: t.dtype for k, t in result.items()} == {k: t.dtype for k, t in params.items()}
    widened = hf.hessian(quartic, {**params, "f64": torch.ones(1, dtype=F64)})
    assert widened.dtype == F64
    alone = hf.hessian(quartic, params["bf16"])
    assert alone.dtype == torch.float32
    assert alone.vector(torch.ones(2)).dtype == torch.float32


def test_float32_agrees_with_float64():
    loss, params, (x, target) = case("causal attention")
    single = hf.hessian(loss, tree.map_leaves(lambda t: t.float(), params), (x.float(), target))
    assert single.dtype == torch.float32
    # The rounding of a few dozen operations.
    assert relative_error(single.dense(), dense_hessian("causal attention")) < 1e-5


# SciPy


@pytest.fixture(params=[F64, torch.float32], ids=str)
def bridge(request):
    values = torch.cat([torch.linspace(-1, 1, 40, dtype=F64), torch.tensor([-6.0, 5.0, 9.0], dtype=F64)])
    matrix = symmetric(values, seed=5).to(request.param)
    counting = CountingRows((matrix + matrix.T) / 2)
    return counting, np.sort(values.numpy()), 1e-10 if request.param == F64 else 1e-4


def test_scipys_eigsh_runs_on_an_operator(bridge):
    counting, values, tolerance = bridge
    linear = counting.operator.to_scipy()
    start = np.ones(linear.shape[0], dtype=linear.dtype)
    found, vectors = scipy.sparse.linalg.eigsh(linear, k=4, which="BE", v0=start)
    assert np.abs(found - values[[0, 1, -2, -1]]).max() < tolerance * 10
    assert np.abs(linear @ vectors - vectors * found).max() < tolerance * 10


def test_scipys_lobpcg_runs_on_an_operator(bridge):
    counting, values, tolerance = bridge
    linear = counting.operator.to_scipy()
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((linear.shape[0], 3)))[0].astype(linear.dtype)
    found, _ = scipy.sparse.linalg.lobpcg(linear, start, largest=True, tol=tolerance, maxiter=200)
    assert np.abs(np.sort(found)[-2:] - values[-2:]).max() < tolerance * 10
    assert 3 in counting.passes, "a block of vectors is one pass"


def test_the_scipy_operator(bridge):
    counting, _, _ = bridge
    linear = counting.operator.to_scipy()
    matrix = counting.operator.dense().numpy()
    assert linear.shape == matrix.shape
    assert linear.dtype == matrix.dtype
    rng = np.random.default_rng(1)
    x = rng.standard_normal((linear.shape[0], 3)).astype(linear.dtype)
    for product in (linear @ x, linear.matmat(x), linear.rmatmat(x), linear.H @ x, np.asfortranarray(x).T @ linear.T):
        expected = matrix @ x
        product = product.T if product.shape != expected.shape else product
        assert np.allclose(product, expected, rtol=1e-4)
    for product in (linear.matvec(x[:, 0]), linear.rmatvec(x[:, 0]), linear @ x[:, 0]):
        assert product.shape == (linear.shape[0],)
        assert np.allclose(product, matrix @ x[:, 0], rtol=1e-4)
    assert linear.matvec(x[:, :1]).shape == (linear.shape[0], 1)
    strided = np.zeros((linear.shape[0], 2), dtype=linear.dtype)
    strided[:, 1] = x[:, 0]
    assert np.allclose(linear.matvec(strided[:, 1]), matrix @ x[:, 0], rtol=1e-4)


def test_scipy_on_a_real_hessian():
    loss, params, batch = case("lstm")
    H = hf.hessian(loss, params, batch)
    exact = np.linalg.eigvalsh(dense_hessian("lstm").numpy())
    found = scipy.sparse.linalg.eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False, v0=np.ones(H.size))
    assert np.allclose(np.sort(found), exact[-3:], rtol=1e-9)


# Building an operator


def test_params_are_taken_detached_and_get_no_gradient():
    w = torch.ones(3, dtype=F64, requires_grad=True)
    H = hf.hessian(lambda p: (p**3).sum(), w)
    assert not H.like.requires_grad
    assert not H.vector(torch.ones(3, dtype=F64)).requires_grad
    assert w.grad is None


def test_an_operator_is_not_built_inside_a_transform():
    def inside(p):
        return hf.hessian(lambda q: (q**4).sum(), p).vector(torch.ones(2)).sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(TypeError, match=r"params are inside a torch.func transform.*hessfunc.lanczos\(lambda v"):
            transform(inside)(torch.ones(2) if transform is torch.func.grad else torch.ones(3, 2))


def test_a_loss_that_is_no_scalar_or_not_finite():
    w = torch.ones(2)
    with pytest.raises(ValueError, match=r"loss returned a tensor of shape \(2,\), expected a scalar of shape \(\)"):
        hf.hessian(lambda p: p**2, w)
    with pytest.raises(TypeError, match=r"loss returned dict, expected a scalar tensor; for a model output with a"):
        hf.hessian(lambda p: {"loss": p.sum()}, w)
    with pytest.raises(TypeError, match=r"loss returned dtype torch.int64, expected a real floating-point scalar"):
        hf.hessian(lambda p: (p > 0).sum(), w)
    with pytest.raises(FloatingPointError, match=r"the loss of batch 0 is NaN or infinite; curvature is not defined"):
        hf.hessian(lambda p: p.sum().log(), -w)


def test_a_product_that_is_not_finite_names_the_batch():
    batches = [(torch.ones(1),), (torch.zeros(1),)]
    H = hf.hessian(lambda p, x: (p * x).abs().pow(1.5).sum(), torch.ones(2), batches)
    with pytest.raises(FloatingPointError, match=r"the Hessian-vector product on batch 1 is NaN or infinite; look at"):
        H(torch.ones(2))


@pytest.mark.parametrize("bad", [0, -1])
def test_chunk_size_and_memory_budget_out_of_range(bad):
    with pytest.raises(ValueError, match=f"chunk_size={bad} is out of range; expected 1 <= chunk_size"):
        hf.hessian(quartic, torch.ones(2), chunk_size=bad)
    with pytest.raises(ValueError, match=r"memory_budget=-1 is out of range; expected 0 <= memory_budget"):
        hf.hessian(quartic, torch.ones(2), memory_budget=-1)


def test_a_loss_that_does_not_take_these_arguments():
    with pytest.raises(TypeError, match=r"failed on the first batch, which holds 1 item.*Does the loss take params"):
        hf.hessian(quartic, torch.ones(2), (torch.ones(2),))
