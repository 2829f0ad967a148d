"""jvp and grad through products and kernels, against finite differences of values."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, F64, SPECTRA, case, dense_hessian, randn_like, relative_error, seeded, symmetric

import hessfunc as hf
from hessfunc import tree

grad, jvp, vmap = torch.func.grad, torch.func.jvp, torch.func.vmap
FORWARD = [hf.hvp, hf.hvp_reverse_over_forward]
forward_products = pytest.mark.parametrize("product", FORWARD, ids=lambda p: p.__name__)


PIECEWISE = ("mlp relu", "huber", "conv batch norm eval")


def finite_difference(function, x, direction, step=1e-3):
    """Derivative of a scalar function of a pytree along a direction, to order ``step**4``."""

    def at(t):
        with torch.no_grad():
            return float(function(tree.axpy(t * step, direction, x)))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def unit_like(params, generator):
    v = randn_like(params, generator)
    return tree.scale(1 / float(tree.norm(v)), v)


def tape_gradient(function, x):
    leaves, spec = tree.flatten(x)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(tree.unflatten(inputs, spec))
    return tree.unflatten(torch.autograd.grad(value, inputs, materialize_grads=True), spec)


# Gradients of a trace estimate, on every model


@pytest.mark.parametrize("name", [name for name in CASES if name not in PIECEWISE])
@forward_products
def test_gradient_of_a_trace_estimate_with_respect_to_the_parameters(product, name, generator):
    """Third derivatives, where torch's own are wrong for normalization layers."""
    loss, params, batch = case(name)
    probe = randn_like(params, generator)
    direction = unit_like(params, generator)

    def estimate(p):
        return tree.vdot(probe, product(loss, p, probe, *batch))

    exact = finite_difference(estimate, params, direction)
    tolerance = 1e-6 * max(abs(exact), 1e-3)
    assert abs(float(tree.vdot(grad(estimate)(params), direction)) - exact) < tolerance
    assert abs(float(jvp(estimate, (params,), (direction,))[1]) - exact) < tolerance
    assert abs(float(tree.vdot(tape_gradient(estimate, params), direction)) - exact) < tolerance


@pytest.mark.parametrize("name", PIECEWISE)
@forward_products
def test_piecewise_losses_have_gradients_of_their_pieces(product, name, generator):
    """Where finite differences would cross kinks: against three passes of reverse mode."""
    loss, params, batch = case(name)
    probe = randn_like(params, generator)
    estimate = lambda p: tree.vdot(probe, product(loss, p, probe, *batch))  # noqa: E731

    def reverse(p):
        leaves, spec = tree.flatten(p)
        whole = lambda *q: loss(tree.unflatten(q, spec), *batch)  # noqa: E731
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(whole(*inputs), inputs, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(first, tree.leaves(probe), strict=True))
        second = torch.autograd.grad(slope, inputs, create_graph=True)
        value = sum((h * v).sum() for h, v in zip(second, tree.leaves(probe), strict=True))
        return tree.unflatten(torch.autograd.grad(value, inputs), spec)

    assert relative_error(grad(estimate)(params), reverse(params)) < 1e-10


@forward_products
def test_gradient_of_hutchinsons_estimate_over_vmapped_probes(product, generator):
    loss, params, batch = case("transformer block")
    probes = randn_like(params, generator, (3,))
    direction = unit_like(params, generator)

    def estimate(p):
        return vmap(lambda v: tree.vdot(v, product(loss, p, v, *batch)))(probes).mean()

    exact = finite_difference(estimate, params, direction)
    assert abs(float(tree.vdot(grad(estimate)(params), direction)) - exact) < 1e-6 * abs(exact)
    assert abs(float(jvp(estimate, (params,), (direction,))[1]) - exact) < 1e-6 * abs(exact)


def regularized(decay, temperature):
    """Cross-entropy with hyper-parameters that the loss closes over."""
    loss, params, (x, y) = case("mlp tanh")
    call = loss

    def total(p, x, y):
        return call(tree.scale(1 / temperature, p), x, y) + decay * sum((leaf**4).sum() for leaf in tree.leaves(p))

    return total, params, (x, y)


@pytest.mark.parametrize("which", ["decay", "temperature"])
@forward_products
def test_gradient_of_a_trace_estimate_with_respect_to_a_hyper_parameter(product, which, generator):
    values = {"decay": torch.tensor(0.3, dtype=F64), "temperature": torch.tensor(1.4, dtype=F64)}
    _, params, batch = regularized(**values)
    probes = randn_like(params, generator, (3,))

    def estimate(value):
        loss = regularized(**{**values, which: value})[0]
        return vmap(lambda v: tree.vdot(v, product(loss, params, v, *batch)))(probes).mean()

    exact = finite_difference(estimate, values[which], torch.ones((), dtype=F64))
    assert abs(float(grad(estimate)(values[which])) - exact) < 1e-7 * abs(exact)
    assert abs(float(jvp(estimate, (values[which],), (torch.ones((), dtype=F64),))[1]) - exact) < 1e-7 * abs(exact)
    assert abs(float(tape_gradient(estimate, values[which])) - exact) < 1e-7 * abs(exact)


@forward_products
def test_a_hyper_parameter_on_torchs_tape_under_layer_norm(product, generator):
    """Found only when the loss has run, so the product must be made anew in a safe order."""
    weight = torch.randn(3, 4, generator=generator, dtype=F64)
    v = torch.randn(3, 4, generator=generator, dtype=F64)

    def estimate(eps):
        return (v * product(lambda p: F.layer_norm(p * eps, (4,)).pow(3).sum(), weight, v)).sum()

    at = torch.tensor(0.7, dtype=F64)
    exact = finite_difference(lambda eps: estimate(eps) * 1, at, torch.ones((), dtype=F64))
    gradient = tape_gradient(estimate, at)
    assert abs(float(gradient) - exact) < 1e-7 * max(abs(exact), 1e-3)


# Gradients of the largest eigenvalue


def lanczos_largest(matvec, v0, num_steps):
    """The largest Ritz value, differentiable: the eigenproblem of T by torch."""
    result = hf.lanczos(matvec, v0, num_steps)
    T = torch.diag(result.alphas) + torch.diag(result.betas, 1) + torch.diag(result.betas, -1)
    return torch.linalg.eigvalsh(T)[-1]


def power_largest(matvec, v0, num_steps):
    return hf.power_iteration(matvec, v0, num_steps).eigenvalue


@pytest.mark.parametrize(("kernel", "num_steps"), [(lanczos_largest, 12), (power_largest, 25)])
@forward_products
def test_gradient_of_the_top_eigenvalue_with_respect_to_the_parameters(product, kernel, num_steps, generator):
    loss, params, batch = case("mlp tanh")
    layout = tree.Layout.of(params)
    values, vectors = torch.linalg.eigh(dense_hessian("mlp tanh"))
    assert float(values[-1]) > float(-values[0]), "the largest in magnitude too"
    top = layout.unravel(vectors[:, -1])
    v0 = tree.axpy(0.03, randn_like(params, generator), top)
    direction = unit_like(params, generator)

    def largest(p):
        return kernel(lambda v: product(loss, p, v, *batch), v0, num_steps)

    def hellmann_feynman(p):  # the derivative of a simple eigenvalue is v' dH v
        return tree.vdot(top, hf.hvp(loss, p, top, *batch))

    exact = finite_difference(hellmann_feynman, params, direction)
    assert abs(float(largest(params) - values[-1])) < 1e-6
    gradient = grad(largest)(params)
    assert abs(float(tree.vdot(gradient, direction)) - exact) < 1e-4 * abs(exact)
    assert abs(finite_difference(largest, params, direction) - exact) < 1e-4 * abs(exact)
    assert relative_error(gradient, grad(hellmann_feynman)(params)) < 1e-3
    if kernel is lanczos_largest:
        assert abs(float(jvp(largest, (params,), (direction,))[1]) - exact) < 1e-4 * abs(exact)


@pytest.mark.parametrize(("kernel", "num_steps"), [(lanczos_largest, 6), (power_largest, 10)])
def test_gradient_of_the_top_eigenvalue_with_respect_to_a_hyper_parameter(kernel, num_steps, generator):
    values = {"temperature": torch.tensor(1.4, dtype=F64)}
    _, params, batch = regularized(torch.tensor(1.0, dtype=F64), **values)
    v0 = randn_like(params, generator)

    def largest(decay):
        loss = regularized(decay, **values)[0]
        return kernel(lambda v: hf.hvp(loss, params, v, *batch), v0, num_steps)

    at = torch.tensor(1.0, dtype=F64)
    exact = finite_difference(largest, at, torch.ones((), dtype=F64))
    assert abs(float(grad(largest)(at)) - exact) < 1e-6 * abs(exact)
    assert abs(float(jvp(largest, (at,), (torch.ones((), dtype=F64),))[1]) - exact) < 1e-6 * abs(exact)
    assert abs(float(tape_gradient(largest, at)) - exact) < 1e-6 * abs(exact)


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_gradients_of_every_lanczos_field(reorthogonalize, generator):
    A = symmetric(SPECTRA["distinct"], seed=1)
    weights = [torch.randn(shape, generator=generator, dtype=F64) for shape in ((4,), (3,), (4, 7), ())]
    v0 = torch.randn(7, generator=generator, dtype=F64)
    keep = 4 if reorthogonalize == "full" else 0

    def combined(inputs):
        matrix, start = inputs
        matrix = (matrix + matrix.T) / 2
        fields = hf.lanczos(lambda v: matrix @ v, start, 4, reorthogonalize=reorthogonalize)
        weights[2] = weights[2][:keep]
        return sum((w * field).sum() for w, field in zip(weights, fields, strict=True))

    for _ in range(3):
        direction = unit_like((A, v0), generator)
        exact = finite_difference(combined, (A, v0), direction)
        assert abs(float(tree.vdot(grad(combined)((A, v0)), direction)) - exact) < 1e-7 * max(1, abs(exact))
        assert abs(float(jvp(combined, ((A, v0),), (direction,))[1]) - exact) < 1e-7 * max(1, abs(exact))


@pytest.mark.parametrize("name", ["zero", "identity", "rank deficient", "repeated", "one by one", "one by one zero"])
def test_gradients_stay_finite_where_the_space_is_exhausted(name):
    A = symmetric(SPECTRA[name], seed=2)
    n = len(SPECTRA[name])
    v0 = torch.randn(n, generator=seeded(3), dtype=F64)

    def trace_of_tridiagonal(matrix):
        return hf.lanczos(lambda v: matrix @ v, v0, n).alphas.sum()

    def power(matrix):
        result = hf.power_iteration(lambda v: matrix @ v, v0, 3)
        return result.eigenvalue + result.residual_norm + result.history.sum() + result.eigenvector.sum()

    for function in (trace_of_tridiagonal, power):
        assert bool(torch.isfinite(grad(function)(A)).all())
        assert math.isfinite(jvp(function, (A,), (torch.eye(n, dtype=F64),))[1])
        if function is trace_of_tridiagonal and name in ("identity", "zero"):
            # A shift moves the only Ritz value by as much.
            assert abs(float(jvp(function, (A,), (torch.eye(n, dtype=F64),))[1]) - 1) < 1e-12


# Gradients through operators, which are linear in the vector


def test_gradients_with_respect_to_the_vector_are_products(generator):
    loss, params, batch = case("conv batch norm train")
    H = hf.hessian(loss, params, batch)
    dense = dense_hessian("conv batch norm train")
    v, u = (torch.randn(H.size, generator=generator, dtype=F64) for _ in range(2))
    quadratic = lambda x: x @ H.vector(x)  # noqa: E731
    assert relative_error(grad(quadratic)(v), 2 * dense @ v) < 1e-10
    assert relative_error(jvp(quadratic, (v,), (u,))[1], 2 * u @ dense @ v) < 1e-10
    assert relative_error(jvp(H.vector, (v,), (u,))[1], dense @ u) < 1e-10
    assert relative_error(torch.func.vjp(H.vector, v)[1](u)[0], dense @ u) < 1e-10
    assert relative_error(tape_gradient(quadratic, v), 2 * dense @ v) < 1e-10


def test_second_derivatives_with_respect_to_the_vector():
    A = symmetric(SPECTRA["distinct"], seed=1)
    H = hf.as_operator(A)
    v = torch.ones(7, dtype=F64)
    assert relative_error(torch.func.hessian(lambda x: x @ H.vector(x))(v), 2 * A) < 1e-13
    cubic = lambda x: (x @ H.vector(x)) ** 2  # noqa: E731
    exact = torch.func.hessian(lambda x: (x @ (A @ x)) ** 2)(v)
    assert relative_error(torch.func.hessian(cubic)(v), exact) < 1e-13
    assert relative_error(torch.func.jacrev(torch.func.jacfwd(cubic))(v), exact) < 1e-13


def test_gradients_of_pytrees_under_vmap(generator):
    loss, params, batch = case("nested pytree")
    H = hf.hessian(loss, params, batch)
    vectors = randn_like(params, generator, (3,))
    gradients = vmap(grad(lambda v: tree.vdot(v, H(v))))(vectors)
    assert relative_error(gradients, tree.scale(2.0, H.matmat(vectors))) < 1e-11


def test_gradients_of_lanczos_with_respect_to_its_start_vector():
    loss, params, batch = case("gru")
    H = hf.hessian(loss, params, batch)
    v = torch.randn(H.size, generator=seeded(1), dtype=F64)
    direction = torch.randn(H.size, generator=seeded(2), dtype=F64) / H.size**0.5
    first = lambda x: hf.lanczos(H.vector, x, 4).betas.sum()  # noqa: E731
    exact = finite_difference(first, v, direction)
    assert abs(float(grad(first)(v) @ direction) - exact) < 1e-6 * abs(exact)


# When a graph is kept


def test_a_product_has_a_graph_exactly_when_something_outside_tracks():
    tracked = torch.ones(3, dtype=F64, requires_grad=True)
    plain = torch.ones(3, dtype=F64)
    for product in FORWARD:
        assert product(lambda p: (p**4).sum(), tracked, plain).requires_grad
        assert product(lambda p: (p**4).sum(), plain, tracked).requires_grad
        assert product(lambda p: (tracked * p**4).sum(), plain, plain).requires_grad
        assert not product(lambda p: (p**4).sum(), plain, plain).requires_grad
        assert not product(lambda p: (tracked.detach() * p**4).sum(), plain, plain).requires_grad
        with torch.no_grad():
            assert not product(lambda p: (tracked * p**4).sum(), tracked, tracked).requires_grad
    assert not hf.hvp_double_backward(lambda p: (tracked * p**4).sum(), tracked, tracked).requires_grad
    assert tracked.grad is None


@forward_products
def test_values_do_not_depend_on_whether_they_are_differentiated(product, generator):
    loss, params, batch = case("encoder layer eval")
    v = randn_like(params, generator)
    plain = product(loss, params, v, *batch)
    tracked = tree.map_leaves(lambda leaf: leaf.clone().requires_grad_(), params)
    assert relative_error(tree.detach(product(loss, tracked, v, *batch)), plain) < 1e-12
    assert relative_error(torch.func.jvp(lambda p: product(loss, p, v, *batch), (params,), (v,))[0], plain) < 1e-12
    assert relative_error(torch.func.vjp(lambda p: product(loss, p, v, *batch), params)[0], plain) < 1e-12


@forward_products
def test_products_differentiate_each_other(product, generator):
    """A product of a loss that itself holds a product: fourth derivatives."""
    x = torch.randn(3, generator=generator, dtype=F64)
    v, u = torch.randn(2, 3, generator=generator, dtype=F64)

    def sharpness(p):
        return (u * product(lambda q: (q**5).sum(), p, u)).sum()

    assert relative_error(product(sharpness, x, v), 20 * 3 * 2 * x * u**2 * v) < 1e-12
