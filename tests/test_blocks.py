"""Spectra of diagonal blocks against the blocks of the dense Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import tree
from hessfunc._blocks import block_spectra
from hessfunc._gauss_newton import ggn


def problem() -> tuple[Any, Any, Any, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        model = nn.Sequential(stem, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    call, params = hf.functionalize(model)
    x = torch.randn(8, 3, generator=seeded(1), dtype=F64)
    return call, hf.module_loss(model, F.cross_entropy).loss, params, (x, torch.arange(8) % 3)


def dense_blocks(loss: Any, params: Any, batch: Any) -> tuple[torch.Tensor, dict[str, slice]]:
    layout = tree.Layout.of(params)
    H = torch.autograd.functional.hessian(lambda x: loss(layout.unravel(x), *batch), layout.ravel(params))
    ends = torch.tensor(layout.sizes).cumsum(0).tolist()
    return H, {name: slice(end - size, end) for name, size, end in zip(layout.names, layout.sizes, ends, strict=True)}


BLOCKS: dict[str, tuple[Any, dict[str, list[str]]]] = {
    "leaf": (
        "leaf",
        {name: [name] for name in ("0.0.weight", "0.0.bias", "1.weight", "1.bias", "3.weight", "3.bias")},
    ),
    "module": (
        "module",
        {"0.0": ["0.0.weight", "0.0.bias"], "1": ["1.weight", "1.bias"], "3": ["3.weight", "3.bias"]},
    ),
    "prefix and pattern": (
        ["0", "*.bias"],
        {"0": ["0.0.weight", "0.0.bias"], "*.bias": ["0.0.bias", "1.bias", "3.bias"]},
    ),
    "stages": (
        {"body": ["0", "1"], "head": lambda name: name.startswith("3")},
        {"body": ["0.0.weight", "0.0.bias", "1.weight", "1.bias"], "head": ["3.weight", "3.bias"]},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_dense_hessian(name):
    blocks, expected = BLOCKS[name]
    _, loss, params, batch = problem()
    H, places = dense_blocks(loss, params, batch)
    spectra = block_spectra(
        loss, params, batch, blocks=blocks, k=2, tol=1e-8, num_probes=24, num_steps=8, generator=seeded(2)
    )
    assert list(spectra) == list(expected)
    for block, leaves in expected.items():
        result = spectra[block]
        index = torch.cat([torch.arange(len(H))[places[leaf]] for leaf in leaves])
        dense = H[index][:, index]
        values = torch.linalg.eigvalsh(dense)
        largest = values[values.abs().argsort(descending=True)][:2]
        assert result.name == block
        assert sorted(result.leaf_names) == sorted(leaves)
        assert result.size == len(index)
        assert float((result.eigenpairs.eigenvalues - largest).abs().max()) < 1e-8 * float(largest.abs().max())
        assert bool(result.eigenpairs.converged.all())
        slack = 4.5 * float(result.trace.stderr) + 1e-12
        assert abs(float(result.trace) - float(dense.trace())) < slack
        first = result.density.moment(1)
        mean = float(dense.trace()) / len(index)
        assert abs(float(first) - mean) < 4.5 * float(first.stderr) + 1e-10 * abs(mean) + 1e-12
        assert result.num_matvecs == result.eigenpairs.num_matvecs + 24 + result.density.num_matvecs


def test_a_block_without_density_and_with_few_parameters():
    _, loss, params, batch = problem()
    spectra = block_spectra(
        loss, params, batch, blocks=["3.bias"], k=10, which="SA", num_probes=4, num_steps=0, generator=seeded()
    )
    result = spectra["3.bias"]
    assert result.density is None
    assert result.eigenpairs.eigenvalues.shape == (3,)
    assert result.num_matvecs == result.eigenpairs.num_matvecs + 4
    H, places = dense_blocks(loss, params, batch)
    exact = torch.linalg.eigvalsh(H[places["3.bias"], places["3.bias"]])
    assert float((result.eigenpairs.eigenvalues - exact).abs().max()) < 1e-3 * float(exact[-1])


def test_other_operators_and_their_options():
    call, loss, params, (x, y) = problem()

    def sum_of_squares(restricted: Any, selected: Any, data: Any, **options: Any) -> hf.Operator:
        return hf.hessian(restricted, selected, data, **options).shift(1.0)

    summed = lambda p, a, b: loss(p, a, b) * len(a)  # noqa: E731
    options = {"blocks": ["1"], "tol": 1e-8, "num_steps": 0, "reduction": "sum"}
    shifted = block_spectra(summed, params, (x, y), operator=sum_of_squares, generator=seeded(), **options)
    plain = block_spectra(loss, params, (x, y), blocks=["1"], tol=1e-8, num_steps=0, generator=seeded())
    left, right = (s["1"].eigenpairs.eigenvalues[0] for s in (shifted, plain))
    assert float(left) == pytest.approx(8 * float(right) + 1, rel=1e-7)
    # The Gauss-Newton matrix of a block, from the model with all else held fixed
    fixed = {name: leaf for name, leaf in params.items() if not name.startswith("1.")}
    selected = {name: leaf for name, leaf in params.items() if name.startswith("1.")}
    G = ggn(lambda p, a: call({**fixed, **p}, a), F.cross_entropy, selected, (x, y)).dense()
    whole = ggn(call, F.cross_entropy, params, (x, y))
    _, places = dense_blocks(loss, params, (x, y))
    block = slice(places["1.weight"].start, places["1.bias"].stop)
    assert relative_error(G, whole.dense()[block, block]) < 1e-12
    found = block_spectra(
        call,
        params,
        (x, y),
        blocks=["1"],
        tol=1e-8,
        num_steps=0,
        operator=lambda model_fn, selected, data: ggn(model_fn, F.cross_entropy, selected, data),
        generator=seeded(),
    )
    assert float(found["1"].eigenpairs.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-8)


def test_traces_of_blocks_that_cover_everything_add_up():
    _, loss, params, batch = problem()
    H, _ = dense_blocks(loss, params, batch)
    spectra = block_spectra(loss, params, batch, num_probes=64, num_steps=0, generator=seeded(3))
    total = sum(float(block.trace) for block in spectra.values())
    error = sum(float(block.trace.stderr) ** 2 for block in spectra.values()) ** 0.5
    assert abs(total - float(H.trace())) < 4 * error
    top = max(float(block.eigenpairs.eigenvalues[0]) for block in spectra.values())
    assert top < float(torch.linalg.eigvalsh(H)[-1])


def test_a_single_tensor_is_one_block():
    spectra = block_spectra(lambda w: (w**4).sum() / 12, torch.tensor([1.0, 2.0]), num_steps=0, generator=seeded())
    assert list(spectra) == [""]
    assert float(spectra[""].eigenpairs.eigenvalues[0]) == pytest.approx(4.0, rel=1e-5)


def test_errors_name_the_remedy():
    _, loss, params, batch = problem()

    def run(**options: Any) -> Any:
        return block_spectra(loss, params, batch, **{"generator": seeded(), **options})

    with pytest.raises(ValueError, match="blocks='layer' is not known; expected 'leaf', 'module', a list of names"):
        run(blocks="layer")
    with pytest.raises(ValueError, match="blocks is empty; name at least one block"):
        run(blocks=[])
    with pytest.raises(ValueError, match="'conv' matches no leaf"):
        run(blocks=["conv"])
    with pytest.raises(ValueError, match="k=0 is out of range"):
        run(k=0)
    with pytest.raises(ValueError, match="num_probes=0 is out of range"):
        run(num_probes=0)
    with pytest.raises(ValueError, match="num_steps=-1 is out of range"):
        run(num_steps=-1)
    with pytest.raises(TypeError, match=r"generator is of type NoneType, expected a torch\.Generator"):
        run(generator=None)
