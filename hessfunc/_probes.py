"""Random probe vectors, drawn from an explicit generator: the only module that draws random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from hessfunc._typing import Tensor

Sampler: TypeAlias = Callable[..., Tensor]


def signs(num: int, size: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Rademacher probes: independent entries +1 or -1 with equal chance, shape ``(num, size)``.

    Among probes with independent entries these give Hutchinson's estimator its smallest variance
    (Hutchinson 1990).

    >>> generator = torch.Generator().manual_seed(0)
    >>> signs(1, 4, generator=generator, dtype=torch.float32, device="cpu").abs()
    tensor([[1., 1., 1., 1.]])
    """
    # Drawn on the generator's own device: a seeded CPU generator gives the same probes whatever the model's device.
    shape = (num, -(-size // 8))
    octets = torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)
    # A random number for each sign takes several times as long as a table of eight at once.
    rows = _eight_signs(dtype, device).index_select(0, octets.to(device=device, dtype=torch.int32).reshape(-1))
    return rows.reshape(num, -1)[:, :size].contiguous()


def _eight_signs(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The bits of each octet as signs, shape ``(256, 8)``."""
    octets = torch.arange(256, device=device).unsqueeze(1)
    return (octets >> torch.arange(8, device=device) & 1).to(dtype).mul_(2).sub_(1)


def jittered(
    num: int, size: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Random signs times lengths that are uniform within 10 % of one value, with mean square 1; shape ``(num, size)``.

    Nearly the variance of [`signs`][] (1.4 % more), from a continuous distribution: the products of any matrix with
    such probes are as independent as its rank allows, where signs coincide on few coordinates.
    """
    lengths = torch.rand(num, size, generator=generator, device=generator.device, dtype=dtype).mul_(0.2).add_(0.9)
    lengths = lengths.div_((1 + 0.1**2 / 3) ** 0.5).to(device)
    return lengths.mul_(signs(num, size, generator=generator, dtype=dtype, device=device))


def normal(
    num: int, size: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Standard normal probes of shape ``(num, size)``.

    They come from a stream of their own, whose seed ``generator`` draws. Weights and data are drawn by ``torch.randn``
    too, and often with the same seed: probes straight from ``generator`` would then be the weights over again, and what
    they see of the curvature no sample of it.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    stream = torch.Generator(generator.device).manual_seed(int(seed))
    return torch.randn(num, size, generator=stream, device=generator.device, dtype=dtype).to(device)


def sphere(
    num: int, size: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Probes uniform on the sphere of radius ``sqrt(size)``, shape ``(num, size)``."""
    probes = normal(num, size, generator=generator, dtype=dtype, device=device)
    return probes.mul_(size**0.5 / probes.norm(dim=1, keepdim=True))
