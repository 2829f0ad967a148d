"""Variances that the law of the probes tells, against those of dense matrices."""

import pytest
import torch
from helpers import F64, relative_error, seeded, symmetric, variance

import hessfunc as hf
from hessfunc import _probes
from hessfunc._probe_law import leaf_errors

LIKE = {"w": torch.zeros(22, dtype=F64), "b": torch.zeros(8, dtype=F64)}
LEAVES = {"w": slice(22), "b": slice(22, 30)}
MATRIX = symmetric([9.0, 4.0, *torch.linspace(-1, 2, 28).tolist()])
SAMPLERS = {"signs": _probes.signs, "normal": _probes.normal, "sphere": _probes.sphere}


def shares(matrix):
    """The matrices of the leaves' shares in ``<v, H v>``."""
    places = torch.arange(len(matrix))
    return {name: torch.zeros_like(matrix).index_copy(0, places[at], matrix[at]) for name, at in LEAVES.items()}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_probes_find_the_variance_of_traces_and_squared_norms_by_leaf_too(sampler):
    H = hf.as_operator(MATRIX, LIKE)
    options = {"num_probes": 3000, "sampler": SAMPLERS[sampler], "chunk_size": 1000}
    trace, square = (f(H, **options, generator=seeded()) for f in (hf.hutchinson, hf.frobenius_squared))
    for name, form in shares(MATRIX).items():
        rows = MATRIX[LEAVES[name]]
        for estimate, exact in ((trace, variance(form, sampler)), (square, variance(rows.T @ rows, sampler))):
            assert float(estimate.per_leaf[name].stderr.square()) * 3000 == pytest.approx(exact, rel=0.25)
    for estimate, form in ((trace, MATRIX), (square, MATRIX @ MATRIX)):
        assert float(estimate.stderr.square()) * 3000 == pytest.approx(variance(form, sampler), rel=0.15)


@pytest.mark.parametrize("method", [hf.hutchinson, hf.frobenius_squared])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_errors_do_not_depend_on_how_many_probes_come_at_a_time(method, sampler):
    H = hf.as_operator(MATRIX, LIKE)
    options = {"num_probes": 12, "sampler": SAMPLERS[sampler]}
    whole, parts = (method(H, **options, chunk_size=size, generator=seeded()) for size in (12, 5))
    assert relative_error(parts.stderr, whole.stderr) < 1e-12
    assert relative_error(parts.leaf_stderr, whole.leaf_stderr) < 1e-12
    assert relative_error(parts.leaf_dof, whole.leaf_dof) < 1e-12


def test_nothing_is_left_to_chance_where_the_matrix_is_diagonal():
    H = hf.as_operator(torch.linspace(-3, 5, 30, dtype=F64).diag(), LIKE)
    result = hf.diagonal(H, num_probes=9, generator=seeded())
    for estimate in (result.trace, result.frobenius_squared):
        assert all(float(part.stderr) < 1e-12 for part in (estimate, *estimate.per_leaf.values()))


def test_the_laws_of_diagonal_are_those_of_hutchinson_and_frobenius_squared():
    H = hf.as_operator(MATRIX, LIKE)
    result = hf.diagonal(H, num_probes=9, generator=seeded())
    for mine, method in ((result.trace, hf.hutchinson), (result.frobenius_squared, hf.frobenius_squared)):
        theirs = method(H, num_probes=9, generator=seeded())
        assert mine.dof == pytest.approx(theirs.dof, rel=1e-10)
        for name in ("stderr", "leaf_stderr", "leaf_dof"):
            assert relative_error(getattr(mine, name), getattr(theirs, name)) < 1e-10, name


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])
def test_the_spread_of_many_samples_tells_where_between_its_bounds_a_leaf_is(ratio):
    samples = ratio**0.5 * torch.randn(4000, 1, generator=seeded(1), dtype=F64)
    stderr, dof = leaf_errors(samples, torch.ones(4000, 1, dtype=F64), torch.zeros(4000, 1, dtype=F64))
    assert float(stderr.square()) * 4000 == pytest.approx(ratio, rel=0.06)
    assert float(dof) == pytest.approx(4000**2 * 4 / 3)


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 1.2, 1.35), (1.5, 1.35, 1.5), (40.0, 40.0, 40.0)])
def test_few_samples_leave_a_leaf_between_its_bounds_unless_their_spread_is_larger(spread, low, high):
    samples = (1.5 * spread) ** 0.5 * torch.tensor([[1.0], [-1.0], [0.0], [0.0]], dtype=F64)
    summands = torch.tensor([[1.0], [0.5], [1.5]], dtype=F64)
    stderr, dof = leaf_errors(samples, summands, torch.zeros_like(summands))
    assert low - 1e-12 <= float(stderr.square()) * 4 <= high + 1e-12
    assert (float(dof) == 3) == (spread == 40), "those of a spread"


def test_the_share_of_a_large_leaf_in_the_known_whole_narrows_its_bounds():
    samples = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.3], [0.0, -0.3]], dtype=F64)
    summands = torch.tensor([[1.0, 0.5]], dtype=F64).expand(3, 2)
    stderr, _ = leaf_errors(samples, summands, summands)
    assert 4 / 3 < float(stderr[0].square()) * 4 < 2, "of the 3 of the whole"
    alone, _ = leaf_errors(samples[:, :1], summands[:, :1], summands[:, :1])
    assert float(alone.square()) * 4 == pytest.approx(2, rel=1e-6), "one leaf is the whole"
