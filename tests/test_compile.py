"""torch.compile of a product, of an operator and of whole kernels, against eager."""

import pytest
import torch
from helpers import F64, SPECTRA, case, randn_like, relative_error, seeded, symmetric
from torch import nn

import hessfunc as hf
from hessfunc import tree

# Tracing without a code generator: the same program, run by torch's own kernels; no C++ compiler needed.
BACKEND = "aot_eager"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def regression():
    """Mean squared error, which kills the process when torch's own jvp(grad) of it is compiled."""
    loss, params = hf.module_loss(_network(), nn.MSELoss())
    x = torch.randn(5, 3, generator=seeded(1), dtype=F64)
    y = torch.randn(5, 2, generator=seeded(2), dtype=F64)
    return loss, params, (x, y)


def _network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_a_compiled_product_is_the_eager_one(generator):
    loss, params, batch = regression()
    compiled = torch.compile(lambda p, v: hf.hvp(loss, p, v, *batch), backend=BACKEND, fullgraph=True)
    for _ in range(2):
        v = randn_like(params, generator)
        assert relative_error(compiled(params, v), hf.hvp(loss, params, v, *batch)) < 1e-12
    moved = tree.axpy(0.1, v, params)
    assert relative_error(compiled(moved, v), hf.hvp(loss, moved, v, *batch)) < 1e-12


def test_a_compiled_kernel_is_the_eager_one():
    A = symmetric(SPECTRA["repeated"], seed=1)
    v = torch.randn(6, generator=seeded(2), dtype=F64)

    def kernel(matrix, v):
        return hf.lanczos(lambda x: matrix @ x, v, 3), hf.power_iteration(lambda x: matrix @ x, v, 2)

    compiled = torch.compile(kernel, backend=BACKEND, fullgraph=True)
    for matrix in (A, 2 * A, 0 * A):  # the last breaks down
        for together, eager in zip(compiled(matrix, v), kernel(matrix, v), strict=True):
            assert type(together) is type(eager)
            for a, b in zip(together, eager, strict=True):
                assert relative_error(a, b) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward], ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["conv batch norm train", "causal attention", "transformer block", "huber"])
def test_compiled_products_of_real_layers(product, name, generator):
    loss, params, batch = case(name)
    compiled = torch.compile(lambda p, v: product(loss, p, v, *batch), backend=BACKEND)
    v = randn_like(params, generator)
    assert relative_error(compiled(params, v), product(loss, params, v, *batch)) < 1e-12


@pytest.mark.slow
def test_a_compiled_product_under_vmap(generator):
    loss, params, batch = regression()
    vectors = randn_like(params, generator, (3,))
    together = torch.func.vmap(lambda v: hf.hvp(loss, params, v, *batch))
    assert relative_error(torch.compile(together, backend=BACKEND)(vectors), together(vectors)) < 1e-12


@pytest.mark.slow
def test_a_compiled_lanczos_of_a_hessian(generator):
    loss, params, batch = regression()

    def kernel(p, v):
        return hf.lanczos(lambda x: hf.hvp(loss, p, x, *batch), v, 4)

    v = randn_like(params, generator)
    for a, b in zip(torch.compile(kernel, backend=BACKEND)(params, v), kernel(params, v), strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.slow
def test_a_compiled_operator(generator):
    loss, params, batch = regression()
    H = hf.hessian(loss, params, batch)
    v = torch.randn(H.size, generator=generator, dtype=F64)
    assert relative_error(torch.compile(H.vector, backend=BACKEND)(v), H.vector(v)) < 1e-12


@pytest.mark.slow
def test_generated_code(generator):
    """The default backend, which writes and compiles C++."""
    loss, params, batch = regression()
    v = randn_like(params, generator)
    compiled = torch.compile(lambda p, v: hf.hvp(loss, p, v, *batch))
    assert relative_error(compiled(params, v), hf.hvp(loss, params, v, *batch)) < 1e-12
    A = symmetric(SPECTRA["distinct"], seed=1)
    start = torch.randn(7, generator=generator, dtype=F64)
    kernel = lambda v: hf.lanczos(lambda x: A @ x, v, 4)  # noqa: E731
    for a, b in zip(torch.compile(kernel)(start), kernel(start), strict=True):
        assert relative_error(a, b) < 1e-10
