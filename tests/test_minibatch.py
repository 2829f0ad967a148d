"""Largest eigenvalues of mini-batch Hessians against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F64, case, seeded

import hessfunc as hf
from hessfunc import tree
from hessfunc._minibatch import minibatch_eigenvalues


def dense_top(loss: Any, params: Any, batch: Any) -> float:
    layout = tree.Layout.of(params)
    H = torch.autograd.functional.hessian(lambda x: loss(layout.unravel(x), *batch), layout.ravel(params))
    return float(torch.linalg.eigvalsh(H)[-1])


def test_eigenvalues_are_those_of_each_dense_hessian_in_the_order_of_the_data():
    loss, params, (x, y) = case("mlp tanh")
    # Shapes alternate, so that groups of one shape are not neighbours.
    parts = [slice(0, 2), slice(2, 5), slice(3, 5), slice(1, 4), slice(4, 6), slice(0, 6)]
    batches = [(x[part], y[part]) for part in parts]
    exact = torch.tensor([dense_top(loss, params, batch) for batch in batches], dtype=F64)
    result = minibatch_eigenvalues(loss, params, batches, num_steps=30, generator=seeded())
    assert result.num_matvecs == 30
    assert float((result.eigenvalues - exact).abs().max()) < 1e-8
    assert float(result.residuals.max()) < 1e-4
    alone = minibatch_eigenvalues(loss, params, batches, num_steps=30, chunk_size=1, generator=seeded())
    assert float((alone.eigenvalues - result.eigenvalues).abs().max()) < 1e-10
    mean = float(torch.linalg.eigvalsh(hf.hessian(loss, params, [batches[0], batches[2], batches[4]]).dense())[-1])
    assert mean <= float(result.eigenvalues[[0, 2, 4]].mean())


def test_residuals_say_how_far_a_short_run_is_off():
    loss, params, (x, y) = case("mlp tanh")
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    exact = [dense_top(loss, params, batch) for batch in batches]
    result = minibatch_eigenvalues(loss, params, batches, num_steps=4, generator=seeded())
    for value, residual, truth in zip(result.eigenvalues, result.residuals, exact, strict=True):
        assert 0 < truth - float(value) <= float(residual)


def test_an_exhausted_krylov_space_adds_no_zero():
    scale = torch.tensor([-1.0, -2.0, -2.0, -4.0], dtype=F64)
    batches = [(torch.tensor(s, dtype=F64),) for s in (1.0, 3.0)]
    result = minibatch_eigenvalues(
        lambda w, s: s * (scale * w**2).sum() / 2, torch.ones(4, dtype=F64), batches, num_steps=4, generator=seeded()
    )
    assert result.eigenvalues.tolist() == pytest.approx([-1.0, -3.0], rel=1e-10)


def test_batches_as_mappings_and_with_plain_values():
    def loss(w: torch.Tensor, batch: Any) -> torch.Tensor:
        return batch["scale"] * ((batch["x"] @ w) ** 2).sum() / 2

    eye = torch.eye(2, dtype=F64)
    batches = [{"x": eye, "scale": 1.0}, {"x": 2 * eye, "scale": 1.0}, {"x": eye, "scale": 5.0}, {"x": eye, "scale": 1}]
    result = minibatch_eigenvalues(loss, torch.ones(2, dtype=F64), batches, num_steps=1, generator=seeded())
    assert result.eigenvalues.tolist() == pytest.approx([1.0, 4.0, 5.0, 1.0], rel=1e-12)


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
    with pytest.raises(ValueError, match=r"chunk_size=0 is out of range"):
        run([batch], chunk_size=0)
    with pytest.raises(TypeError, match=r"generator is of type NoneType, expected a torch\.Generator"):
        run([batch], generator=None)
    bad = (batch[0] * float("inf"), batch[1])
    with pytest.raises(FloatingPointError, match="a Hessian-vector product on batch 1 is NaN or infinite"):
        run([batch, bad], num_steps=2)
