"""The exact diagonal of the Gauss-Newton matrix against the dense one, and what it asks of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import tree
from hessfunc._likelihood import columns, observe

LABELS = torch.tensor([0, 2, 1, 1, 0])


def randn(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def functional(build: Any, train: bool = False) -> Any:
    """A model in float64 from a fixed seed, as a function and parameters; BatchNorm has statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().train(train)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.linspace(-0.3, 0.3, part.num_features))
            part.running_var.copy_(torch.linspace(0.5, 1.5, part.num_features))
    return hf.functionalize(model)


def mlp(act: Any = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten()]
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Tokens ``(batch, time)`` to logits ``(batch, time, vocabulary)`` with the embedding as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.attention(self.embedding(tokens), src_mask=mask))


def transposing(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z.transpose(1, 2), y)


def flattening(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


TOKENS = torch.randint(0, 6, (3, 4), generator=seeded(5))
IGNORING = TOKENS.roll(1).index_put((torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 1, 2, 3, 1])), torch.tensor(-100))
IMAGES = randn(5, 2, 5, 5)
YES = (randn(5, 3, seed=3) > 0).to(F64)

CASES: dict[str, Any] = {
    "mlp": (mlp, F.cross_entropy, (randn(5, 4), LABELS)),
    "mlp, squares": (mlp, nn.MSELoss(), (randn(5, 4), randn(5, 3))),
    "mlp, logistic": (mlp, nn.BCEWithLogitsLoss(), (randn(5, 4), YES)),
    "one output": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), F.mse_loss, (randn(5, 4), randn(5))),
    "time axis, squares": (mlp, F.mse_loss, (randn(5, 2, 4), randn(5, 2, 3))),
    "convolutions": (convolutional, F.cross_entropy, (IMAGES, LABELS)),
    "attention": (Attention, transposing, (TOKENS, TOKENS.roll(1))),
    "attention, flattened": (Attention, flattening, (TOKENS, TOKENS.roll(1))),
    "attention, some ignored": (Attention, flattening, (TOKENS, IGNORING)),
    "attention, a mask for all": (Attention, transposing, (TOKENS, torch.zeros(4, 4, dtype=F64), TOKENS.roll(1))),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_dense_matrix(name):
    build, criterion, batch = CASES[name]
    call, params = functional(build)
    exact = hf.ggn_diagonal(call, criterion, params, batch)
    dense = hf.ggn(call, criterion, params, batch).dense().diagonal()
    layout = tree.Layout.of(params)
    assert relative_error(layout.ravel(exact.value), dense) < 1e-10
    assert abs(float(exact.trace) / float(dense.sum()) - 1) < 1e-10
    assert float(exact.trace.stderr) == 0
    for path, leaf in tree.named_leaves(exact.value):
        share = exact.trace.per_leaf[path]
        assert float(share.value) == pytest.approx(float(leaf.sum()), rel=1e-10)
        assert float(share.stderr) == 0
    assert exact.trace.num_matvecs == 0
    assert exact.num_pullbacks == call(params, *batch[:-1]).numel()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mlp", "mlp, squares", "attention, some ignored"])
def test_ragged_batches_weigh_as_in_the_operator(reduction, name):
    build, _, (x, y) = CASES[name]
    criterion = nn.MSELoss(reduction=reduction) if y.is_floating_point() else nn.CrossEntropyLoss(reduction=reduction)
    call, params = functional(build)
    loss = criterion if y.dim() < 2 or y.is_floating_point() else lambda z, t: criterion(z.transpose(1, 2), t)
    data = [(x[:1], y[:1]), (x[1:], y[1:])] if name != "attention, some ignored" else [(x[1:2], y[1:2]), (x, y)]
    dense = hf.ggn(call, loss, params, data, reduction=reduction).dense().diagonal()
    exact = hf.ggn_diagonal(call, loss, params, data, reduction=reduction)
    assert relative_error(tree.Layout.of(params).ravel(exact.value), dense) < 1e-10
    assert float(exact.trace) == pytest.approx(float(dense.sum()), rel=1e-10)
    weighted = hf.ggn_diagonal(call, loss, params, data, reduction=reduction, count=lambda _batch: 2.0)
    same = hf.ggn(call, loss, params, data, reduction=reduction, count=lambda _batch: 2.0).dense().diagonal()
    assert relative_error(tree.Layout.of(params).ravel(weighted.value), same) < 1e-10


def test_rows_of_all_samples_in_a_line():
    call, params = functional(Attention)
    line = lambda p, x: call(p, x).flatten(0, 1)  # noqa: E731
    batch = (TOKENS, IGNORING.flatten())
    exact = hf.ggn_diagonal(line, F.cross_entropy, params, batch)
    dense = hf.ggn(line, F.cross_entropy, params, batch).dense().diagonal()
    assert relative_error(tree.Layout.of(params).ravel(exact.value), dense) < 1e-10


def test_other_pytrees_and_chunks_and_float32():
    model_fn = lambda p, x: torch.tanh(x["a"] @ p[0]["w"]) @ p[1] + x["b"]  # noqa: E731
    params = [{"w": randn(4, 6)}, randn(6, 3, seed=3)]
    batch = ({"a": randn(5, 4), "b": randn(5, 3, seed=4)}, LABELS)
    exact = hf.ggn_diagonal(model_fn, F.cross_entropy, params, batch)
    dense = hf.ggn(model_fn, F.cross_entropy, params, batch).dense().diagonal()
    assert tree.names(exact.value) == ["0.w", "1"]
    assert relative_error(tree.Layout.of(params).ravel(exact.value), dense) < 1e-10
    for chunk_size in (1, 2):
        other = hf.ggn_diagonal(model_fn, F.cross_entropy, params, batch, chunk_size=chunk_size)
        assert relative_error(other.value, exact.value) < 1e-12
    single = tree.map_leaves(lambda x: x.float() if x.is_floating_point() else x, (params, batch))
    assert relative_error(hf.ggn_diagonal(model_fn, F.cross_entropy, *single).value, exact.value) < 1e-5


class Twice(nn.Module):
    """A linear layer that enters twice, the second time where only torch's graph shows it."""

    def __init__(self, again: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.linear(x)), self.linear)


class Hidden(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, _output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, x.T @ gradients[0]


LINEAR: dict[str, Any] = {
    "mlp": (mlp, True),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), True),
    "twice": (lambda: Twice(lambda z, f: f(z)), False),
    "twice, a transpose": (lambda: Twice(lambda z, f: z @ f.weight), False),
    "twice, a function": (lambda: Twice(lambda z, f: Hidden.apply(z, f.weight)), False),
    "a bias twice": (lambda: Twice(lambda z, f: z * f.bias), False),
    "under vmap": (lambda: Twice(lambda z, _: torch.func.vmap(lambda row: torch.tanh(row))(z)), True),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_by_factors(name, monkeypatch):
    build, factored = LINEAR[name]
    call, params = functional(build)
    batch = (randn(5, 4), LABELS)
    loss = lambda z, _: F.mse_loss(z, torch.zeros_like(z))  # noqa: E731
    outputs = torch.func.jacrev(call)(params, batch[0])
    jacobian = torch.cat([leaf.flatten(2) for leaf in tree.leaves(outputs)], 2)
    expected = 2 * jacobian.square().sum((0, 1)) / call(params, batch[0]).numel()
    taken = []
    monkeypatch.setattr("hessfunc._samples.Samples._pulled", lambda *_: taken.append(1) or iter(()))
    by_factors = hf.ggn_diagonal(call, loss, params, batch)
    assert bool(taken) != factored
    if factored:
        assert relative_error(tree.Layout.of(params).ravel(by_factors.value), expected) < 1e-10
    monkeypatch.undo()
    exact = hf.ggn_diagonal(call, loss, params, batch)
    assert relative_error(tree.Layout.of(params).ravel(exact.value), expected) < 1e-10


def test_large_leaves_are_squared_row_by_row(monkeypatch):
    call, params = functional(mlp)
    exact = hf.ggn_diagonal(call, *CASES["mlp"][1:2], params, CASES["mlp"][2])
    monkeypatch.setattr("hessfunc._samples.factored_squares", lambda *_: None)
    one_by_one = hf.ggn_diagonal(call, *CASES["mlp"][1:2], params, CASES["mlp"][2])
    assert relative_error(one_by_one.value, exact.value) < 1e-12
    monkeypatch.setattr("hessfunc._samples.ROW_BY_ROW", 1)
    other = hf.ggn_diagonal(call, *CASES["mlp"][1:2], params, CASES["mlp"][2])
    assert relative_error(other.value, one_by_one.value) < 1e-14


@pytest.mark.parametrize("build", [lambda: mlp(nn.ReLU), convolutional])
def test_piecewise_linear_networks_have_the_trace_of_the_hessian(build):
    call, params = functional(build)
    batch = (IMAGES if build is convolutional else randn(5, 4), LABELS)
    dense = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, batch).dense().diagonal()
    parts = dense.split(tree.Layout.of(params).sizes)
    trace = hf.ggn_diagonal(call, F.cross_entropy, params, batch).trace
    for share, part in zip(trace.per_leaf.values(), parts, strict=True):
        assert float(share) == pytest.approx(float(part.sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("criterion", "outputs", "target"),
    [
        (F.cross_entropy, randn(2, 3), LABELS[:2]),
        (F.cross_entropy, randn(2, 3, 2), torch.tensor([[0, -100], [2, 1]])),
        (F.cross_entropy, randn(3), torch.tensor(1)),
        (F.mse_loss, randn(2, 3), randn(2, 3)),
        (F.binary_cross_entropy_with_logits, randn(4), YES.flatten()[:4]),
    ],
)
def test_columns_make_up_the_covariance(criterion, outputs, target):
    seen = observe(criterion, outputs, target)
    root = torch.cat(list(columns(seen, 1, 2))).flatten(1)
    unit = torch.eye(outputs.numel(), dtype=F64).unflatten(1, outputs.shape)
    covariance = torch.stack([seen.family.covariance(seen, row) for row in unit]).flatten(1)
    assert len(root) == outputs.numel()
    assert relative_error(root.T @ root, covariance) < 1e-12


class Coupling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), Coupling(), nn.Dropout()])
def test_samples_that_depend_on_one_another_are_refused(layer):
    call, params = functional(lambda: nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)), train=True)
    with pytest.raises(ValueError, match=r"sample \d of batch 0 has other outputs alone.*call model\.eval\(\)"):
        hf.ggn_diagonal(call, F.cross_entropy, params, (randn(5, 4), LABELS))


def test_errors_name_the_remedy():
    call, params = functional(mlp)
    batch = (randn(5, 4), LABELS)
    with pytest.raises(ValueError, match="chunk_size=0 is out of range"):
        hf.ggn_diagonal(call, F.cross_entropy, params, batch, chunk_size=0)
    with pytest.raises(ValueError, match="criterion cannot be read as a negative log-likelihood"):
        hf.ggn_diagonal(call, lambda z, y: 2 * F.cross_entropy(z, y), params, batch)
    with pytest.raises(ValueError, match="reduction='sum', but the criterion reduces over its batch by 'mean'"):
        hf.ggn_diagonal(call, F.cross_entropy, params, batch, reduction="sum")
    with pytest.raises(ValueError, match="samples of batch 0 cannot be told apart: its inputs hold no tensor"):
        hf.ggn_diagonal(lambda p, x: x * p, F.mse_loss, randn(3), (torch.tensor(2.0), randn(3)))
    swapped = lambda p, x: call(p, x.transpose(0, 1)).transpose(0, 1)  # noqa: E731
    with pytest.raises(ValueError, match=r"inputs have leading length 2, a target shape \(5, 3\)"):
        hf.ggn_diagonal(swapped, lambda z, y: F.mse_loss(z[0], y), params, (randn(2, 5, 4), randn(5, 3)))


def test_infinite_gradients_are_named():
    with pytest.raises(hf.NonFiniteError, match="the diagonal on batch 0 is NaN or infinite"):
        hf.ggn_diagonal(lambda w, x: x * w.sqrt(), F.mse_loss, torch.zeros(1), (torch.ones(2, 1), torch.ones(2, 1)))


def test_nothing_is_mutated_or_drawn():
    call, params = functional(convolutional)
    tracked = tree.map_leaves(lambda p: p.clone().requires_grad_(), params)
    before = tree.map_leaves(torch.clone, params)
    batch = (IMAGES.clone(), LABELS.clone())
    state = torch.random.get_rng_state()
    with torch.no_grad():
        exact = hf.ggn_diagonal(call, F.cross_entropy, tracked, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(leaf.requires_grad for leaf in tree.leaves(exact.value))
    assert all(leaf.grad is None for leaf in tree.leaves(tracked))
    assert all(map(torch.equal, tree.leaves(before), tree.leaves(tracked)))
    assert torch.equal(batch[0], IMAGES)


def test_a_model_that_takes_derivatives_itself():
    energy = lambda x, p: torch.tanh(x @ p).square().sum()  # noqa: E731
    p, batch = randn(4, 3), (randn(5, 4), randn(5, 4, seed=3))
    x = batch[0]
    written = lambda p, x: 2 * ((1 - torch.tanh(x @ p) ** 2) * torch.tanh(x @ p)) @ p.T  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda q: written(q, x), p)

    by_function = hf.ggn_diagonal(lambda p, x: torch.func.grad(energy)(x, p), F.mse_loss, p, batch)
    assert relative_error(by_function.value, 2 * jacobian.square().sum((0, 1)) / 20) < 1e-10
