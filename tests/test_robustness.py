"""Threads, repetition, and files where they are awkward."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import tree


def network(width, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 2)).double()
    x, y = torch.randn(7, 3, generator=seeded(seed), dtype=F64), torch.arange(7) % 2
    return (*hf.module_loss(model, F.cross_entropy), (x, y))


def run_in_threads(functions):
    """Run all at once, from a common start, and pass errors on."""
    start, errors = threading.Barrier(len(functions)), []

    def guarded(function):
        try:
            start.wait(30)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def repeatedly(H, vectors, expected, times=12):
    def function():
        for i in range(times):
            rows = vectors[: 1 + i % len(vectors)]
            assert relative_error(H.rows(rows), expected[: len(rows)]) < 1e-10

    return function


def test_threads_with_an_operator_each():
    functions = []
    for seed in range(3):
        loss, params, batch = network(4 + seed, seed)
        exact = hf.hessian(loss, params, batch).dense()
        vectors = torch.randn(5, len(exact), generator=seeded(seed), dtype=F64)
        functions.append(repeatedly(hf.hessian(loss, params, batch), vectors, vectors @ exact))
    run_in_threads(functions)


@pytest.mark.parametrize("linearize", [True, False])
def test_threads_that_share_an_operator(linearize):
    loss, params, (x, y) = network(5, 0)
    data = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    exact = hf.hessian(loss, params, data).dense()
    H = hf.hessian(loss, params, data, linearize=linearize)
    vectors = torch.randn(5, len(exact), generator=seeded(), dtype=F64)
    run_in_threads([repeatedly(H, vectors, vectors @ exact, times=6) for _ in range(3)])


def test_threads_with_products_of_every_order():
    """Rerouted operations and grad mode belong to the thread that runs the loss."""
    loss, params, batch = network(4, 1)
    v = randn_like(params, seeded(1))
    reference = hf.hvp_double_backward(loss, params, v, *batch)

    def repeated(product):
        def function():
            for _ in range(15):
                assert relative_error(product(loss, params, v, *batch), reference) < 1e-10
                assert torch.is_grad_enabled()

        return function

    run_in_threads([repeated(p) for p in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward)])


def num_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("linearize", [True, False])
def test_two_hundred_products_leave_nothing_behind(linearize):
    loss, params, batch = network(4, 2)
    H = hf.hessian(loss, params, batch, linearize=linearize)
    rows = torch.randn(3, H.size, generator=seeded(), dtype=F64)
    for _ in range(4):
        H.rows(rows)
    before = num_tensors()
    for _ in range(200):
        H.rows(rows[:1])
    assert num_tensors() <= before + 2


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward])
def test_two_hundred_calls_of_a_product_leave_nothing_behind(product):
    loss, params, batch = network(4, 3)
    v = randn_like(params, seeded())
    product(loss, params, v, *batch)
    before = num_tensors()
    for _ in range(200):
        product(loss, params, v, *batch)
    assert num_tensors() <= before + 2
    assert all(p.grad is None for p in params.values())


def test_operators_and_estimates_that_are_dropped_are_freed():
    loss, params, batch = network(4, 4)

    def once(seed):
        H = hf.hessian(loss, params, batch)
        hf.eigsh(H, 2, generator=seeded(seed))
        hf.slq(H, num_steps=4, num_probes=2, generator=seeded(seed))
        hf.hutchinson(H, num_probes=4, generator=seeded(seed))

    once(0)
    before = num_tensors()
    for seed in range(8):
        once(seed)
    assert num_tensors() <= before + 2


def test_a_parameter_tree_is_not_changed_by_a_failing_product():
    params = {"w": torch.ones(3, dtype=F64)}

    def loss(p):
        if p["w"].requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(p["w"]):
            raise OSError("the disk of the data is gone")
        return p["w"].sum()

    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        with pytest.raises(OSError, match="the disk of the data is gone"):
            product(loss, params, params)
        assert not params["w"].requires_grad
        assert tree.leaves(params)[0].grad is None
