"""Gauss-Newton products and operators against J^T H_out J from dense Jacobians."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessfunc as hf
from hessfunc import tree
from hessfunc._gauss_newton import ggn, ggnvp


class Problem(NamedTuple):
    model_fn: Any
    criterion: Any
    params: Any
    batch: tuple[Any, ...]


class Block(nn.Module):
    """Pre-norm attention whose output is (batch, time, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.head(F.gelu(x + self.attention(h, h, h, need_weights=False)[0]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


def mlp(activation: nn.Module, width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, width))


def convolutional(*, train: bool, activation: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), activation, nn.Conv2d(3, 3, 3), nn.Flatten()]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[1].running_mean.copy_(torch.linspace(-0.3, 0.3, 3))
        model[1].running_var.copy_(torch.linspace(0.5, 1.5, 3))
    return model.train(train)


def sequence_cross_entropy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), target)


def coupled(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Convex, and not a sum over samples."""
    return torch.logsumexp((outputs * target).flatten(), 0) + F.softplus(outputs).mean() ** 2


def points(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(2), dtype=F64)


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
TOKENS = torch.randint(0, 3, (3, 5), generator=seeded(5))
MODELS: dict[str, Any] = {
    "cross-entropy": lambda: (mlp(nn.Tanh()), F.cross_entropy, points(6, 4), LABELS),
    "cross-entropy options": lambda: (
        mlp(nn.Softplus()),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=F64), label_smoothing=0.1, ignore_index=2),
        points(6, 4),
        LABELS,
    ),
    "squared error": lambda: (mlp(nn.Tanh()), nn.MSELoss(), points(6, 4), points(6, 3) * 2),
    "huber": lambda: (mlp(nn.Tanh()), nn.HuberLoss(delta=0.7), points(6, 4), points(6, 3) * 2),
    "coupled samples": lambda: (mlp(nn.Tanh()), coupled, points(6, 4), points(6, 3)),
    "batch norm eval": lambda: (
        convolutional(train=False, activation=nn.ReLU()),
        F.cross_entropy,
        points(4, 2, 5, 5),
        LABELS[:4],
    ),
    "batch norm train": lambda: (
        convolutional(train=True, activation=nn.Tanh()),
        F.cross_entropy,
        points(4, 2, 5, 5),
        LABELS[:4],
    ),
    "attention": lambda: (Block(), sequence_cross_entropy, points(3, 5, 4), TOKENS),
    "recurrent": lambda: (Recurrent(), sequence_cross_entropy, points(3, 5, 4), TOKENS),
}


@cache
def problem(name: str) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, criterion, inputs, target = MODELS[name]()
    call, params = hf.functionalize(model.double())
    return Problem(call, criterion, params, (inputs, target))


@cache
def dense(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """J^T H_out J, J and H_out by torch's own tape, which shares no code with the product."""
    model_fn, criterion, params, (inputs, target) = problem(name)
    layout = tree.Layout.of(params)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model_fn(params, inputs).detach()
        J = torch.autograd.functional.jacobian(lambda x: model_fn(layout.unravel(x), inputs), layout.ravel(params))
    J = J.reshape(outputs.numel(), -1)
    middle = torch.autograd.functional.hessian(lambda z: criterion(z, target), outputs)
    middle = middle.reshape(outputs.numel(), outputs.numel())
    return J.T @ middle @ J, J, middle


@pytest.mark.parametrize("name", MODELS)
def test_product_and_operator_are_the_dense_matrix(name):
    model_fn, criterion, params, batch = problem(name)
    reference = dense(name)[0]
    G = ggn(model_fn, criterion, params, batch)
    first = G.dense()
    v = randn_like(params, seeded(1))
    product = ggnvp(model_fn, criterion, params, v, *batch)
    assert relative_error(first, reference) < 1e-12
    assert relative_error(G.dense(), reference) < 1e-12  # from kept residuals
    assert relative_error(G.layout.ravel(product), reference @ G.layout.ravel(v)) < 1e-12
    assert torch.linalg.eigvalsh(first).min() > -1e-12 * torch.linalg.norm(first)


@pytest.mark.parametrize("name", ["cross-entropy", "batch norm eval", "recurrent"])
def test_untraced_operator_is_the_traced_one(name):
    model_fn, criterion, params, batch = problem(name)
    G = ggn(model_fn, criterion, params, batch, linearize=False, chunk_size=3)
    assert relative_error(G.dense(), dense(name)[0]) < 1e-12


def test_it_is_not_the_hessian():
    model_fn, criterion, params, (inputs, target) = problem("cross-entropy")
    H = hf.hessian(lambda p, x, y: criterion(model_fn(p, x), y), params, (inputs, target))
    assert relative_error(H.dense(), dense("cross-entropy")[0]) > 0.05


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_weigh_by_their_samples(reduction):
    model_fn, _, params, (inputs, target) = problem("cross-entropy")
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    whole = ggn(model_fn, criterion, params, (inputs, target), reduction=reduction)
    split = [(inputs[:4], target[:4]), (inputs[4:], target[4:])]
    parts = ggn(model_fn, criterion, params, split, reduction=reduction)
    assert relative_error(parts.dense(), whole.dense()) < 1e-12


def test_count_sets_the_weights():
    model_fn, _, params, (inputs, target) = problem("cross-entropy")
    criterion = nn.CrossEntropyLoss(ignore_index=2)
    split = [(inputs[:2], target[:2]), (inputs[2:], target[2:])]
    parts = ggn(model_fn, criterion, params, split, count=lambda batch: float((batch[1] != 2).sum()))
    whole = ggn(model_fn, criterion, params, (inputs, target))
    assert relative_error(parts.dense(), whole.dense()) < 1e-12


def test_vmap_over_vectors_and_over_an_ensemble_of_parameters():
    model_fn, criterion, params, batch = problem("cross-entropy")
    layout = tree.Layout.of(params)
    vectors = randn_like(params, seeded(3), (4,))
    lanes = torch.func.vmap(lambda v: ggnvp(model_fn, criterion, params, v, *batch))(vectors)
    assert relative_error(layout.ravel_rows(lanes), layout.ravel_rows(vectors) @ dense("cross-entropy")[0]) < 1e-12
    ensemble = tree.stack([params, tree.scale(0.5, params)])
    v = randn_like(params, seeded(4))
    members = torch.func.vmap(lambda p: ggnvp(model_fn, criterion, p, v, *batch))(ensemble)
    for i in range(2):
        alone = ggnvp(model_fn, criterion, tree.index(ensemble, i), v, *batch)
        assert relative_error(tree.index(members, i), alone) < 1e-12


@pytest.mark.parametrize("name", ["cross-entropy", "attention", "batch norm train"])
def test_derivative_of_a_product_with_respect_to_parameters(name):
    model_fn, criterion, params, batch = problem(name)
    layout = tree.Layout.of(params)
    u, v, direction = (randn_like(params, seeded(seed)) for seed in (5, 6, 7))

    def form(p: Any) -> torch.Tensor:
        return tree.vdot(u, ggnvp(model_fn, criterion, p, v, *batch))

    def change(step: float) -> torch.Tensor:
        return form(tree.axpy(step, direction, params)) - form(tree.axpy(-step, direction, params))

    difference = (8 * change(1e-4) - change(2e-4)) / 12e-4
    forward = torch.func.jvp(form, (params,), (direction,))[1]
    reverse = layout.ravel(torch.func.grad(form)(params)) @ layout.ravel(direction)
    assert float(difference) == pytest.approx(float(forward), rel=1e-7)
    assert float(difference) == pytest.approx(float(reverse), rel=1e-7)


def test_gradient_through_a_tensor_the_model_closes_over():
    _, criterion, params, batch = problem("squared error")
    model_fn = problem("squared error").model_fn
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)
    v = randn_like(params, seeded(8))
    product = ggnvp(lambda p, x: scale * model_fn(p, x), criterion, params, v, *batch)
    value = tree.vdot(v, product)
    # For squared error G is quadratic in the outputs' scale.
    (slope,) = torch.autograd.grad(value, scale)
    assert float(slope) == pytest.approx(2 * float(value.detach()) / 1.5, rel=1e-12)


def test_outputs_may_be_a_pytree():
    generator = seeded(9)
    params = {"w": torch.randn(3, 2, generator=generator, dtype=F64)}
    x, y = points(5, 3), points(5, 2)

    def as_dict(p: Any, x: torch.Tensor) -> Any:
        return {"mean": torch.tanh(x @ p["w"]), "scale": (x @ p["w"]).exp()}

    def of_dict(z: Any, y: torch.Tensor) -> torch.Tensor:
        return ((z["mean"] - y) ** 2).mean() + (z["scale"] ** 2).mean()

    def as_tensor(p: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(as_dict(p, x).values()), dim=1)

    def of_tensor(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return of_dict({"mean": z[:, :2], "scale": z[:, 2:]}, y)

    left = ggn(as_dict, of_dict, params, (x, y)).dense()
    assert relative_error(left, ggn(as_tensor, of_tensor, params, (x, y)).dense()) < 1e-12


def test_residual_operator_and_shift():
    model_fn, criterion, params, batch = problem("cross-entropy")
    H = hf.hessian(lambda p, x, y: criterion(model_fn(p, x), y), params, batch)
    G = ggn(model_fn, criterion, params, batch)
    residual = H - G
    # The residual part is sum_i dL/dz_i * Hessian of z_i.
    layout = H.layout
    inputs, target = batch
    slope = torch.func.grad(lambda z: criterion(z, target))(model_fn(params, inputs))
    reference = torch.autograd.functional.hessian(
        lambda x: (slope * model_fn(layout.unravel(x), inputs)).sum(), layout.ravel(params)
    )
    assert relative_error(residual.dense(), reference) < 1e-10
    shifted = (G.shift(0.3) + 2.0 * residual).dense()
    eye = torch.eye(H.size, dtype=F64)
    assert relative_error(shifted, G.dense() + 0.3 * eye + 2 * reference) < 1e-10


def test_diagonal_blocks_of_a_piecewise_linear_net_are_those_of_its_hessian():
    model_fn, criterion, params, batch = problem("batch norm eval")
    H = hf.hessian(lambda p, x, y: criterion(model_fn(p, x), y), params, batch).dense()
    layout = tree.Layout.of(params)
    G = dense("batch norm eval")[0]
    assert relative_error(H, G) > 0.01
    start = 0
    for size in layout.sizes:
        block = slice(start, start + size)
        assert relative_error(H[block, block], G[block, block]) < 1e-10
        start += size
    assert float(H.trace()) == pytest.approx(float(G.trace()), rel=1e-10)


def test_estimators_take_it():
    model_fn, criterion, params, batch = problem("cross-entropy")
    pairs = hf.eigsh(ggn(model_fn, criterion, params, batch), 3, tol=1e-8, generator=seeded(1))
    exact = torch.linalg.eigvalsh(dense("cross-entropy")[0]).flip(0)[:3]
    assert relative_error(pairs.eigenvalues, exact) < 1e-8


def test_errors_name_the_remedy():
    model_fn, criterion, params, (inputs, target) = problem("cross-entropy")
    with pytest.raises(TypeError, match=r"needs inputs and a target, \(\*inputs, target\), got 1 item"):
        ggnvp(model_fn, criterion, params, params, inputs)
    with pytest.raises(TypeError, match="needs inputs and a target"):
        ggn(model_fn, criterion, params, (inputs,))
    with pytest.raises(ValueError, match="v has a different pytree structure from params"):
        ggnvp(model_fn, criterion, params, [torch.ones(2)], inputs, target)
    with pytest.raises(ValueError, match=r"loss returned a tensor of shape \(6,\)"):
        ggnvp(model_fn, nn.CrossEntropyLoss(reduction="none"), params, params, inputs, target)
    with pytest.raises(ValueError, match=r"loss returned a tensor of shape \(6,\)"):
        ggn(model_fn, nn.CrossEntropyLoss(reduction="none"), params, (inputs, target))
    with pytest.raises(TypeError, match=r"model_fn is an nn\.Module, which keeps its parameters to itself"):
        ggn(mlp(nn.Tanh()), criterion, params, (inputs, target))
    with pytest.raises(TypeError, match="model_fn is of type int, expected a function"):
        ggn(3, criterion, params, (inputs, target))
    with pytest.raises(TypeError, match="criterion is of type str, expected a callable"):
        ggn(model_fn, "mse", params, (inputs, target))
    with pytest.raises(TypeError, match=r"the model's output\['loss'\] is of type NoneType"):
        ggnvp(lambda p, x: {"loss": None, "z": model_fn(p, x)}, lambda z, _: z["z"].sum(), params, params, inputs, 0)
    bad = tree.map_leaves(lambda leaf: leaf * float("nan"), params)
    with pytest.raises(FloatingPointError, match="the loss of batch 0 is NaN"):
        ggn(model_fn, criterion, bad, (inputs, target))


def test_product_that_overflows_names_its_batch():
    def model_fn(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (p * x).sqrt()

    G = ggn(model_fn, F.mse_loss, torch.ones(1), [(torch.ones(2, 1), torch.ones(2, 1)), (torch.zeros(2, 1),) * 2])
    with pytest.raises(FloatingPointError, match="the Gauss-Newton product on batch 1 is NaN or infinite"):
        G(torch.ones(1))


def test_operation_without_forward_mode_is_named():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(_ctx, gradient):
            return 2 * gradient

    with pytest.raises(
        NotImplementedError,
        match=r"the model calls an autograd.Function without a jvp method.*Write that operation in others",
    ):
        ggnvp(lambda p, x: Double.apply(p * x), F.mse_loss, torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2))
