"""Largest eigenvalues of mini-batch Hessians against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, case, seeded

import hessfunc as hf
from hessfunc import tree
from hessfunc._minibatch import minibatch_eigenvalues


def dense_values(loss: Any, params: Any, batch: Any) -> torch.Tensor:
    """All eigenvalues, decreasing."""
    layout = tree.Layout.of(params)
    H = torch.autograd.functional.hessian(lambda x: loss(layout.unravel(x), *batch), layout.ravel(params))
    return torch.linalg.eigvalsh(H).flip(0)


def test_eigenvalues_are_those_of_each_dense_hessian_in_the_order_of_the_data():
    loss, params, (x, y) = case("mlp tanh")
    # Shapes alternate, so that groups of one shape are not neighbours.
    parts = [slice(0, 2), slice(2, 5), slice(3, 5), slice(1, 4), slice(4, 6), slice(0, 6)]
    batches = [(x[part], y[part]) for part in parts]
    exact = torch.stack([dense_values(loss, params, batch)[:1] for batch in batches])
    result = minibatch_eigenvalues(loss, params, batches, num_steps=30, generator=seeded())
    assert result.num_matvecs == 30
    assert float((result.eigenvalues - exact).abs().max()) < 1e-8
    assert float(result.residuals.max()) < 1e-4
    alone = minibatch_eigenvalues(loss, params, batches, num_steps=30, chunk_size=1, generator=seeded())
    assert float((alone.eigenvalues - result.eigenvalues).abs().max()) < 1e-10
    mean = float(torch.linalg.eigvalsh(hf.hessian(loss, params, [batches[0], batches[2], batches[4]]).dense())[-1])
    assert mean <= float(result.eigenvalues[[0, 2, 4], 0].mean())


def test_residuals_say_how_far_a_short_run_is_off():
    loss, params, (x, y) = case("mlp tanh")
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    exact = [dense_values(loss, params, batch)[0] for batch in batches]
    result = minibatch_eigenvalues(loss, params, batches, num_steps=4, generator=seeded())
    for value, residual, truth in zip(result.eigenvalues, result.residuals, exact, strict=True):
        assert 0 < float(truth - value[0]) <= float(residual[0])


@pytest.mark.parametrize("which", ["LA", "LM"])
def test_several_eigenvalues_of_ragged_batches_in_order(which):
    loss, params, (x, y) = case("mlp tanh")
    batches = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[3:], y[3:]), (x[2:3], y[2:3]), (x, y)]
    result = minibatch_eigenvalues(loss, params, batches, k=4, which=which, num_steps=40, generator=seeded(3))
    assert result.eigenvalues.shape == result.residuals.shape == (5, 4)
    for found, residuals, batch in zip(result.eigenvalues, result.residuals, batches, strict=True):
        exact = dense_values(loss, params, batch)
        if which == "LM":
            exact = exact[exact.abs().argsort(descending=True)]
        assert float((found - exact[:4]).abs().max()) < 1e-8
        assert float(residuals.max()) < 1e-4
    if which == "LM":
        assert result.num_negative == int((result.eigenvalues < 0).sum()) > 0


def test_regularization_in_the_loss_moves_every_value():
    loss, params, (x, y) = case("mlp tanh")
    batches = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:]), (x[:5], y[:5])]

    def regularized(p: Any, *batch: Any) -> torch.Tensor:
        return loss(p, *batch) + 0.35 * tree.vdot(p, p)

    options: Any = {"k": 3, "num_steps": 30}
    plain = minibatch_eigenvalues(loss, params, batches, generator=seeded(4), **options)
    moved = minibatch_eigenvalues(regularized, params, batches, generator=seeded(4), **options)
    assert float((moved.eigenvalues - plain.eigenvalues - 0.7).abs().max()) < 1e-8


def test_odd_shapes_images_and_sequences():
    loss, params, (x, y) = case("conv batch norm eval")
    batches = [(x, y), (x[:2], y[:2]), (x.flip(0), y.flip(0)), (x.transpose(2, 3), y), (x[1:], y[1:])]
    result = minibatch_eigenvalues(loss, params, batches, num_steps=40, generator=seeded(5))
    exact = torch.stack([dense_values(loss, params, batch)[:1] for batch in batches])
    assert float((result.eigenvalues - exact).abs().max()) < 1e-6 * float(exact.max())

    loss, params, (tokens, _) = case("tied embedding")
    parts = [tokens, tokens[:, :2], tokens[:1], tokens[1:2], tokens[:, 1:3]]
    batches = [(part, part.roll(1).flatten()) for part in parts]
    result = minibatch_eigenvalues(loss, params, batches, num_steps=44, chunk_size=3, generator=seeded(6))
    exact = torch.stack([dense_values(loss, params, batch)[:1] for batch in batches])
    assert float((result.eigenvalues - exact).abs().max()) < 1e-6


def test_a_loss_that_does_not_run_under_vmap_takes_its_batches_one_after_the_other():
    loss, params, (x, y) = case("conv batch norm train")
    batches = [(x[:2], y[:2]), (x[1:], y[1:]), (x.flip(0)[:2], y.flip(0)[:2])]
    exact = torch.stack([dense_values(loss, params, batch)[:1] for batch in batches])
    with pytest.warns(hf.ProductWarning, match=r"does not run under vmap over batches \(Batch norm got a batched"):
        result = minibatch_eigenvalues(loss, params, batches, num_steps=40, generator=seeded(5))
    assert float((result.eigenvalues - exact).abs().max()) < 1e-6 * float(exact.max())
    alone = minibatch_eigenvalues(loss, params, batches, num_steps=40, chunk_size=1, generator=seeded(5))
    assert float((result.eigenvalues - alone.eigenvalues).abs().max()) < 1e-8


def test_a_loss_that_draws_random_numbers_is_refused():
    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.dropout(x, 0.5) @ w).square().sum()

    batches = [(torch.ones(40, 4),)] * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match=r"the loss is not deterministic: two products with the same vector"):
            minibatch_eigenvalues(loss, torch.ones(4), batches, num_steps=3, generator=seeded())


def test_values_beyond_the_krylov_space_are_unknown():
    batches = [(torch.tensor([[3.0, 0.0, 0.0]], dtype=F64),), (torch.eye(3, dtype=F64) * 2,)]
    loss = lambda w, x: ((x @ w) ** 2).sum() / 2  # noqa: E731
    result = minibatch_eigenvalues(loss, torch.zeros(3, dtype=F64), batches, k=3, num_steps=3, generator=seeded(1))
    assert result.eigenvalues[0, :2].tolist() == pytest.approx([9.0, 0.0], abs=1e-12)
    assert result.eigenvalues[1, 0].item() == pytest.approx(4.0)
    assert result.eigenvalues.isnan().tolist() == [[False, False, True], [False, True, True]]
    assert result.residuals.isinf().tolist() == result.eigenvalues.isnan().tolist()
    assert result.num_negative == 0


def test_an_exhausted_krylov_space_adds_no_zero():
    scale = torch.tensor([-1.0, -2.0, -2.0, -4.0], dtype=F64)
    batches = [(torch.tensor(s, dtype=F64),) for s in (1.0, 3.0)]
    result = minibatch_eigenvalues(
        lambda w, s: s * (scale * w**2).sum() / 2, torch.ones(4, dtype=F64), batches, num_steps=4, generator=seeded()
    )
    assert result.eigenvalues[:, 0].tolist() == pytest.approx([-1.0, -3.0], rel=1e-10)


def test_batches_as_mappings_and_with_plain_values():
    def loss(w: torch.Tensor, batch: Any) -> torch.Tensor:
        return batch["scale"] * ((batch["x"] @ w) ** 2).sum() / 2

    eye = torch.eye(2, dtype=F64)
    batches = [{"x": eye, "scale": 1.0}, {"x": 2 * eye, "scale": 1.0}, {"x": eye, "scale": 5.0}, {"x": eye, "scale": 1}]
    result = minibatch_eigenvalues(loss, torch.ones(2, dtype=F64), batches, num_steps=1, generator=seeded())
    assert result.eigenvalues[:, 0].tolist() == pytest.approx([1.0, 4.0, 5.0, 1.0], rel=1e-12)


def test_errors_name_the_remedy():
    loss, params, batch = case("mlp tanh")

    def run(batches: Any, **options: Any) -> Any:
        return minibatch_eigenvalues(loss, params, batches, **{"generator": seeded(), **options})

    with pytest.raises(ValueError, match="batches is a single batch"):
        run(batch)
    with pytest.raises(ValueError, match="data is empty"):
        run([])
    with pytest.raises(ValueError, match=r"num_steps=0 is out of range"):
        run([batch], num_steps=0)
    with pytest.raises(ValueError, match=r"num_steps=44 is out of range; .* \(the number of parameters\)"):
        run([batch], num_steps=44)
    with pytest.raises(ValueError, match=r"k=6 is out of range; expected 1 <= k <= 5 \(num_steps\)"):
        run([batch], k=6, num_steps=5)
    with pytest.raises(ValueError, match=r"which='SA' is not known; expected one of 'LA', 'LM'"):
        run([batch], which="SA")
    with pytest.raises(ValueError, match=r"chunk_size=0 is out of range"):
        run([batch], chunk_size=0)
    with pytest.raises(TypeError, match=r"generator is of type NoneType, expected a torch\.Generator"):
        run([batch], generator=None)
    bad = (batch[0] * float("inf"), batch[1])
    with pytest.raises(FloatingPointError, match="a Hessian-vector product on batch 1 is NaN or infinite"):
        run([batch, bad], num_steps=2)
