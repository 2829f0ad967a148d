"""Agreement of large vectors told from summaries: differences come out as long as they are."""

import pytest
import torch
from helpers import seeded

from hessfunc._agreement import LEAST, PARTS, Summary


@pytest.mark.parametrize("size", [1, 7, PARTS, LEAST * PARTS - 1, LEAST * PARTS, 100_003])
def test_differences_keep_their_length(size):
    for seed in range(20):
        one, difference = torch.randn(2, size, generator=seeded(seed))
        other = one + 1e-2 * difference
        length = 1e-2 * float(difference.norm() / one.norm())
        # Of 256 sums the root mean square is off by 1 / sqrt(2 * 256), 4.4 %, times 5.
        assert not Summary.of(other).agrees(Summary.of(one), 0.78 * length)
        assert Summary.of(other).agrees(Summary.of(one), 1.22 * length)


def test_one_entry_is_seen():
    vector = torch.randn(1, 50_000, generator=seeded(0))
    for position in range(0, 50_000, 997):
        other = vector.clone()
        other[0, position] += 3 * vector.norm()
        assert not Summary.of(other).agrees(Summary.of(vector), 0.1)


def test_what_is_not_finite_is_told_by_the_norm():
    for size in (3, 10_000):
        vector = torch.ones(size)
        vector[-1] = float("nan")
        assert not bool(torch.isfinite(Summary.of(vector).norm))
        assert not Summary.of(vector).agrees(Summary.of(torch.ones(size)), 0.1)


def test_summaries_are_small_and_of_their_own_memory():
    vector = torch.randn(100_000, generator=seeded(0))
    assert Summary.of(vector).sums.numel() < 2 * PARTS
    small = torch.ones(10)
    summary = Summary.of(small)
    small.zero_()
    assert float(summary.sums.sum()) == 10
