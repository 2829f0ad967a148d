"""Class, cross-class and within-class terms against sums over explicit extended gradients, and what they explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, LargestTensor, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import tree

C = 4


def points(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(2), dtype=F64)


def model(seed: int = 0, *, inputs: int = 3, classes: int = C, width: int = 5) -> tuple[Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf.functionalize(nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes)).double())


def transposing(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z.transpose(1, 2), y)


def by_definition(call: Any, params: Any, x: torch.Tensor, y: torch.Tensor, shares: torch.Tensor) -> Any:
    """Papyan's sums, one sample, class and cross-class after the other; ``shares`` weigh the samples."""
    layout = tree.Layout.of(params)
    z = call(params, x).reshape(-1, C)
    J = torch.autograd.functional.jacobian(lambda q: call(layout.unravel(q), x).reshape(-1, C), layout.ravel(params))
    p, labels, n = z.softmax(1), y.flatten(), layout.size
    residuals = p[:, None, :] - torch.eye(C, dtype=F64)  # of sample i as if its label were k
    g = torch.einsum("ikc,icn->ikn", residuals, J)
    w = shares[:, None] * p
    terms = {name: torch.zeros(n, n, dtype=F64) for name in ("class", "cross", "within", "label")}
    weights, means = torch.zeros(C, C, dtype=F64), torch.zeros(C, n, dtype=F64)
    for c in range(C):
        own = [i for i in range(len(p)) if labels[i] == c]
        if not own:
            continue
        others = [k for k in range(C) if k != c]
        weights[c] = w[own].sum(0)
        cross = {k: (w[own, k, None] * g[own, k]).sum(0) / weights[c, k] for k in others}
        whole = weights[c, others].sum()
        means[c] = sum(weights[c, k] * cross[k] for k in others) / whole
        terms["class"] += whole * torch.outer(means[c], means[c])
        for k in others:
            gap = cross[k] - means[c]
            terms["cross"] += weights[c, k] * torch.outer(gap, gap)
            for i in own:
                gap = g[i, k] - cross[k]
                terms["within"] += w[i, k] * torch.outer(gap, gap)
        for i in own:
            terms["label"] += w[i, c] * torch.outer(g[i, c], g[i, c])
    return terms, weights, means


LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])  # class 3 has no samples


@pytest.mark.parametrize("linearize", [True, False])
def test_terms_over_ragged_batches_are_those_of_the_definition(linearize):
    call, params = model()
    x = points(9, 3)
    data = [(x[:4], LABELS[:4]), (x[4:6], LABELS[4:6]), (x[6:], LABELS[6:])]
    found = hf.ggn_hierarchy(call, F.cross_entropy, params, data, linearize=linearize)
    terms, weights, means = by_definition(call, params, x, LABELS, torch.full((9,), 1 / 9, dtype=F64))
    for name, term in found.terms.items():
        for _ in range(2):  # traced, and from kept residuals
            assert relative_error(term.dense(), terms[name]) < 1e-12, name
        assert torch.linalg.eigvalsh(terms[name]).min() > -1e-14
    assert relative_error(found.weights, weights) < 1e-13
    assert relative_error(found.class_term.layout.ravel_rows(found.class_means()), means) < 1e-12
    G = hf.ggn(call, F.cross_entropy, params, data)
    assert relative_error(sum(term.dense() for term in found.terms.values()), G.dense()) < 1e-10
    assert torch.linalg.matrix_rank(found.class_term.dense()) == 3
    assert torch.linalg.matrix_rank(found.cross_term.dense()) == 3 * (C - 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_positions_of_a_sequence_are_samples_and_ignored_ones_do_not_count(reduction):
    call, params = model(1)
    x, y = points(4, 5, 3), torch.randint(0, C, (4, 5), generator=seeded(3))
    y[0, 1] = y[2, 4] = y[3, 0] = -100

    def criterion(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z.transpose(1, 2), y, reduction=reduction)

    counted = (y != -100).flatten().to(F64)
    shares = counted / counted.sum() if reduction == "mean" else counted
    terms, weights, _ = by_definition(call, params, x, y.clamp(min=0), shares)
    split = [(x[:3], y[:3]), (x[3:], y[3:])]
    options = {"reduction": reduction}
    if reduction == "mean":
        options["count"] = lambda batch: float((batch[1] != -100).sum())
    for data, more in (((x, y), {"reduction": reduction}), (split, options)):
        found = hf.ggn_hierarchy(call, criterion, params, data, **more)
        for name, term in found.terms.items():
            assert relative_error(term.dense(), terms[name]) < 1e-12, name
        assert relative_error(found.weights, weights) < 1e-13


def test_the_sum_is_gauss_newton_in_float32_and_for_a_network_that_is_sure_of_itself():
    call, params = model(2)
    x = points(9, 3).float()
    sure = tree.map_leaves(lambda leaf: 60 * leaf.float(), params)  # some probabilities underflow
    found = hf.ggn_hierarchy(call, F.cross_entropy, sure, (x, LABELS))
    G = hf.ggn(call, F.cross_entropy, sure, (x, LABELS))
    assert float(found.weights.min()) == 0
    assert relative_error(sum(term.dense() for term in found.terms.values()), G.dense()) < 1e-5


def test_estimators_and_vmap_take_the_terms():
    call, params = model(3)
    data = [(points(9, 3)[:5], LABELS[:5]), (points(9, 3)[5:], LABELS[5:])]
    found = hf.ggn_hierarchy(call, F.cross_entropy, params, data)
    V = torch.randn(5, found.class_term.size, generator=seeded(4), dtype=F64)
    for term in found.terms.values():
        dense = term.dense()
        assert relative_error(torch.func.vmap(term.vector)(V), V @ dense) < 1e-12
        exact = torch.linalg.eigvalsh(dense).flip(0)
        assert relative_error(hf.eigsh(term, 2, tol=1e-8, generator=seeded()).eigenvalues, exact[:2]) < 1e-8
        trace = hf.hutchinson(term, num_probes=200, generator=seeded(5))
        assert abs(float(trace) - float(dense.trace())) < 4 * float(trace.stderr)
        second = hf.slq(term, num_steps=8, num_probes=60, exact_outliers=False, generator=seeded(6)).moment(2)
        assert abs(float(second) - float(exact.square().mean())) < 4 * float(second.stderr)


def frozen_part(call: Any) -> Any:
    def model_fn(p: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            shift = call(p, 2 * x)
        return call(p, x) + shift

    return model_fn


def slope_of_an_energy(call: Any) -> Any:
    def model_fn(p: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda z: call(p, z[:, :3]).square().sum())(torch.cat([x, x[:, :1]], 1))

    return model_fn


def attending(call: Any) -> Any:
    def model_fn(p: Any, x: torch.Tensor) -> torch.Tensor:
        z = call(p, x).unsqueeze(0)
        return F.layer_norm(F.scaled_dot_product_attention(z, z, z)[0], (C,))

    return model_fn


@pytest.mark.parametrize("change", [frozen_part, slope_of_an_energy, attending])
def test_models_that_the_products_take_care_of(change):
    call, params = model(5)
    model_fn, batch = change(call), (points(9, 3), LABELS)
    G = hf.ggn(model_fn, F.cross_entropy, params, batch).dense()
    found = hf.ggn_hierarchy(model_fn, F.cross_entropy, params, batch)
    terms = {name: term.dense() for name, term in found.terms.items()}
    assert relative_error(sum(terms.values()), G) < 1e-10
    exact = by_definition(model_fn, params, *batch, torch.full((9,), 1 / 9, dtype=F64))[0]
    for name, term in terms.items():
        assert relative_error(term, exact[name]) < 1e-10, name


def test_no_tensor_holds_classes_squared_for_each_sample():
    batch, classes = 32, 50
    call, params = model(4, classes=classes, width=4)
    x, y = points(batch, 3), torch.randint(0, classes, (batch,), generator=seeded(7))
    for linearize in (True, False):
        found = hf.ggn_hierarchy(call, F.cross_entropy, params, (x, y), linearize=linearize)
        operators = [*found.terms.values(), hf.ggn(call, F.cross_entropy, params, (x, y), linearize=linearize)]
        for operator in operators:
            for _ in range(2):
                with LargestTensor() as largest:
                    operator.vector(torch.ones(operator.size, dtype=F64))
                assert 0 < largest.entries <= max(batch * classes, classes**2) + operator.size


def trained(classes: int, generator: torch.Generator) -> tuple[Any, Any, Any, Any]:
    """A ReLU network fitted with weight decay to one cluster for each class, in orthogonal directions."""
    labels = torch.arange(15 * classes) % classes
    centres = 3.5 * torch.linalg.qr(torch.randn(12, classes, generator=generator, dtype=F64))[0].T
    x = centres[labels] + 0.2 * torch.randn(len(labels), 12, generator=generator, dtype=F64)
    sizes = (12, 20, 20, classes)
    params = {}
    for i in range(3):
        weight = torch.randn(sizes[i + 1], sizes[i], generator=generator, dtype=F64)
        params[f"{i}.weight"] = weight * (2 / sizes[i]) ** 0.5
        params[f"{i}.bias"] = torch.zeros(sizes[i + 1], dtype=F64)

    def call(p: Any, x: torch.Tensor) -> torch.Tensor:
        for i in range(3):
            x = F.linear(x if i == 0 else x.relu(), p[f"{i}.weight"], p[f"{i}.bias"])
        return x

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        decay = sum(leaf.square().sum() for leaf in leaves.values())
        (F.cross_entropy(call(leaves, x), labels) + 2.5e-3 * decay).backward()
        optimizer.step()
    return call, tree.detach(leaves), x, labels


@pytest.mark.parametrize("classes", [3, 5])
def test_a_trained_network_has_as_many_outliers_as_classes_and_the_class_term_carries_them(classes):
    call, params, x, y = trained(classes, seeded(classes))
    assert bool((call(params, x).argmax(1) == y).all())
    found = hf.ggn_hierarchy(call, F.cross_entropy, params, (x, y))
    rest = hf.eigsh(found.cross_term + found.within_term, 1, generator=seeded(1)).eigenvalues[0]
    G = hf.ggn(call, F.cross_entropy, params, (x, y))
    H = hf.hessian(lambda p, x, y: F.cross_entropy(call(p, x), y), params, (x, y))
    span = torch.linalg.qr(G.layout.ravel_rows(found.class_means()).T)[0]
    for operator in (G, H):
        pairs = hf.eigsh(operator, classes + 2, which="LA", generator=seeded(2))
        gaps = pairs.eigenvalues[:-1] / pairs.eigenvalues[1:]
        assert int(gaps.argmax()) == classes - 1
        assert float(gaps.max()) > 2
        if operator is G:
            assert int((pairs.eigenvalues > rest).sum()) == classes
        overlaps = (pairs.rows() @ span).square().sum(1)
        assert overlaps[:classes].min() > 0.9
        assert overlaps[classes:].max() < 0.2


def test_errors_name_the_remedy():
    call, params = model()
    x = points(9, 3)
    with pytest.raises(ValueError, match=r"criterion does not end in F\.cross_entropy; classes and their means are"):
        hf.ggn_hierarchy(call, F.mse_loss, params, (x, points(9, C)))
    with pytest.raises(ValueError, match=r"criterion cannot be read as a negative log-likelihood"):
        hf.ggn_hierarchy(call, lambda z, y: 2 * F.cross_entropy(z, y), params, (x, LABELS))
    with pytest.raises(ValueError, match=r"reduction='sum', but the criterion reduces over its batch by 'mean'"):
        hf.ggn_hierarchy(call, F.cross_entropy, params, (x, LABELS), reduction="sum")
    with pytest.raises(FloatingPointError, match=r"the loss of batch 0 is NaN"):
        hf.ggn_hierarchy(call, F.cross_entropy, params, (x * float("nan"), LABELS))
