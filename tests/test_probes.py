"""Probe vectors: right distributions, and nothing random but the generator."""

import pytest
import torch
from helpers import F64, seeded

from hessfunc import _probes

SAMPLERS = [_probes.signs, _probes.normal, _probes.sphere]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_probes_depend_on_the_generator_alone(sampler, dtype):
    state = torch.random.get_rng_state()
    draw = lambda seed: sampler(3, 5, generator=seeded(seed), dtype=dtype, device="cpu")  # noqa: E731
    assert draw(0).shape == (3, 5)
    assert draw(0).dtype == dtype
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    generator = seeded(0)
    first, second = (sampler(3, 5, generator=generator, dtype=dtype, device="cpu") for _ in range(2))
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.__name__)
def test_probes_have_mean_zero_and_unit_covariance(sampler):
    num, size = 40_000, 3
    probes = sampler(num, size, generator=seeded(5), dtype=F64, device="cpu")
    assert float(probes.mean(0).abs().max()) < 5 / num**0.5
    covariance = probes.T @ probes / num
    assert float((covariance - torch.eye(size)).abs().max()) < 5 * (2 / num) ** 0.5


def test_signs_are_signs():
    probes = _probes.signs(200, 50, generator=seeded(), dtype=torch.float32, device="cpu")
    assert set(probes.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4003])
def test_signs_are_independent_of_how_many_are_drawn_at_once(size):
    """Eight come from one random number; chance is that of a fair coin for each entry and each pair of neighbours."""
    whole = _probes.signs(3, size, generator=seeded(1), dtype=F64, device="cpu")
    one_by_one = [_probes.signs(1, size, generator=g, dtype=F64, device="cpu") for g in [seeded(1)] for _ in range(3)]
    assert whole.shape == (3, size)
    assert whole.is_contiguous()
    assert torch.equal(whole, torch.cat(one_by_one))
    for lag in range(9 if size > 1000 else 0):
        pairs = whole[:, lag:] * whole[:, : size - lag] if lag else whole
        assert abs(float(pairs.mean())) < 5 / pairs.numel() ** 0.5


def test_sphere_probes_have_length_sqrt_of_the_size():
    probes = _probes.sphere(20, 7, generator=seeded(), dtype=F64, device="cpu")
    assert torch.allclose(probes.norm(dim=1), torch.full((20,), 7**0.5, dtype=F64), rtol=1e-14)
    single = _probes.sphere(4, 1, generator=seeded(), dtype=F64, device="cpu")
    assert torch.allclose(single.abs(), torch.ones(4, 1, dtype=F64), rtol=1e-14)


def test_normal_probes_have_normal_kurtosis():
    probes = _probes.normal(40_000, 1, generator=seeded(), dtype=F64, device="cpu")
    assert abs(float((probes**4).mean()) - 3) < 5 * (96 / 40_000) ** 0.5


def test_signs_are_the_same_in_every_dtype():
    draw = lambda dtype: _probes.signs(4, 9, generator=seeded(3), dtype=dtype, device="cpu")  # noqa: E731
    assert torch.equal(draw(torch.float32).to(F64), draw(F64))
    assert torch.equal(draw(torch.bfloat16).to(F64), draw(F64))
