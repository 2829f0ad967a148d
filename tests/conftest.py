"""Fixtures shared by all tests."""

import zlib

import pytest
import torch

torch.set_num_threads(1)  # the tests are small, and run in as many processes as there are cores


class Seeded(torch.Generator):
    """A generator that says its seed where pytest prints the arguments of a failed test."""

    def __repr__(self):
        return f"torch.Generator().manual_seed({self.initial_seed()})"


@pytest.fixture
def generator(request):
    """A CPU generator with a seed of each test's own, the same in every run."""
    seeded = Seeded()
    seeded.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    return seeded


@pytest.fixture(autouse=True)
def _what_is_random_repeats(request):
    """What draws from torch's global generator (dropout, mostly) draws the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _global_modes_are_left_alone():
    """Nothing in hessfunc may change torch's grad mode or default dtype."""
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    assert torch.is_grad_enabled() == grad_mode
    assert torch.get_default_dtype() == dtype
