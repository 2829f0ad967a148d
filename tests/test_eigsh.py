"""eigsh against prescribed spectra, dense Hessians and SciPy; repeated eigenvalues; certificates, limits and errors."""

import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import F64, SPECTRA, CountingRows, case, dense_hessian, relative_error, seeded, symmetric
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc import tree

WHICH = ("LM", "LA", "SA", "BE")
BULK = torch.linspace(-0.9, 1, 300).tolist()
REPEATED = [5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 2.0, *BULK]
NETLIKE = [*(5 * 0.75 ** torch.arange(30, dtype=F64)).tolist(), *torch.linspace(-0.02, 0.05, 370).tolist()]
DECAYING = {
    "geometric": (10 * 0.9 ** torch.arange(400, dtype=F64)).tolist(),
    "1 / i": (1 / torch.arange(1, 401, dtype=F64)).tolist(),
    "1 / i^2": (1 / torch.arange(1, 401, dtype=F64) ** 2).tolist(),
    "like a net's": NETLIKE,
    "both signs": (3 * 0.8 ** torch.arange(200.0)).tolist() + (-2.9 * 0.8 ** torch.arange(200.0)).tolist(),
}


def extreme(spectrum, k, which):
    """The k wanted eigenvalues in the documented order."""
    values = torch.as_tensor(spectrum, dtype=F64)
    rising = values.sort().values
    if which == "LM":
        return values[torch.argsort(-values.abs(), stable=True)][:k]
    if which == "SA":
        return rising[:k]
    upper = k if which == "LA" else (k + 1) // 2
    return torch.cat([rising.flip(0)[:upper], rising[: k - upper].flip(0)])


def assert_right(pairs, matrix, spectrum, which, *, rtol):
    """Values, order, vectors, residuals and flags; rtol is relative to the largest eigenvalue."""
    k = len(pairs)
    scale = max(float(torch.as_tensor(spectrum).abs().max()), 1e-300)
    expected = extreme(spectrum, k, which).to(pairs.eigenvalues)
    found = pairs.eigenvalues
    if which == "LM":  # a tie of +x and -x may come in either order
        assert bool((found.abs().diff() <= 1e-6 * scale).all())
        expected, found = expected.abs().sort().values, found.abs().sort().values
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * scale)
    if which != "LM":
        assert bool((pairs.eigenvalues.diff() * (1 if which == "SA" else -1) >= 0).all())
    rows = pairs.rows()
    eps = torch.finfo(rows.dtype).eps
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=rows.dtype), rtol=0, atol=100 * eps)
    true = torch.linalg.vector_norm(rows @ matrix - pairs.eigenvalues[:, None] * rows, dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=0, atol=100 * eps * scale)
    assert pairs.converged.tolist() == [True] * k


# Agreement


# Where eigenvalues crowd at zero, to which the tolerance is relative, nothing converges.
ENDS = [(name, which) for name in [*SPECTRA, *DECAYING] for which in WHICH]
ENDS = [(name, which) for name, which in ENDS if which in ("LM", "LA") or min(DECAYING.get(name, [-1.0])) < 0]


@pytest.mark.parametrize(("name", "which"), ENDS)
def test_prescribed_spectra(name, which, generator):
    spectrum = {**SPECTRA, **DECAYING}[name]
    matrix = symmetric(spectrum)
    for k in {1, min(2, len(spectrum)), min(5, len(spectrum))}:
        pairs = hf.eigsh(hf.as_operator(matrix), k, which=which, tol=1e-9, generator=generator)
        assert_right(pairs, matrix, spectrum, which, rtol=1e-8)


@pytest.mark.parametrize("which", WHICH)
def test_agrees_with_scipy(which, generator):
    matrix = symmetric(torch.randn(200, generator=generator, dtype=F64))
    pairs = hf.eigsh(hf.as_operator(matrix), 7, which=which, tol=1e-9, generator=generator)
    values, vectors = scipy.sparse.linalg.eigsh(matrix.numpy(), k=7, which=which, v0=np.ones(200))
    order = np.argsort({"LM": -np.abs(values), "SA": values}.get(which, -values))
    torch.testing.assert_close(pairs.eigenvalues, torch.from_numpy(values[order]), rtol=1e-8, atol=0)
    overlap = (pairs.rows() @ torch.from_numpy(vectors[:, order])).diagonal().abs()
    torch.testing.assert_close(overlap, torch.ones(7, dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_restarts_with_the_smallest_basis(block_size, which, generator):
    spectrum = [*NETLIKE, -3.0, -1.5, -1.0, -0.5]
    matrix = symmetric(spectrum)
    k = 4
    pairs = hf.eigsh(
        hf.as_operator(matrix),
        k,
        which=which,
        tol=1e-9,
        block_size=block_size,
        max_basis=k + max(2 * block_size, 5) + 1,
        max_matvecs=5000,
        generator=generator,
    )
    assert_right(pairs, matrix, spectrum, which, rtol=1e-8)
    roomy = hf.eigsh(
        hf.as_operator(matrix), k, which=which, tol=1e-9, block_size=block_size, max_basis=200, generator=generator
    )
    assert roomy.num_matvecs <= pairs.num_matvecs


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_scaling_leaves_relative_results_alone(factor, dtype):
    matrix = symmetric(NETLIKE, dtype=dtype)
    unit = hf.eigsh(hf.as_operator(matrix), 5, generator=seeded(1))
    scaled = hf.eigsh(hf.as_operator(factor * matrix), 5, generator=seeded(1))
    rtol = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(scaled.eigenvalues / factor, unit.eigenvalues, rtol=rtol, atol=0)
    assert scaled.num_matvecs == unit.num_matvecs
    assert bool(scaled.converged.all())
    assert bool((scaled.residuals <= 1e-3 * scaled.eigenvalues.abs()).all())


def test_many_restarts_in_float32_stay_orthonormal(generator):
    spectrum = [*(1.0 + 0.005 * torch.arange(10.0)).tolist(), *torch.linspace(-0.9, 0.9, 290).tolist()]
    matrix = symmetric(spectrum, dtype=torch.float32)
    pairs = hf.eigsh(hf.as_operator(matrix), 4, tol=1e-5, max_basis=10, max_matvecs=3000, generator=generator)
    assert pairs.num_matvecs > 100
    assert_right(pairs, matrix, spectrum, "LM", rtol=1e-5)


# Repeated and close eigenvalues


@pytest.mark.parametrize("which", ["LM", "LA"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_repeated_eigenvalues_come_with_their_multiplicity(block_size, which):
    matrix = symmetric(REPEATED)
    H = hf.as_operator(matrix)
    for seed in range(20):
        pairs = hf.eigsh(H, 4, which=which, block_size=block_size, generator=seeded(seed))
        assert_right(pairs, matrix, REPEATED, which, rtol=1e-5)


def test_a_single_krylov_space_misses_copies():
    """What the check is for: without it, and in ARPACK at the same tolerance, 5, 4, 3, 2 pass for the top four."""
    matrix = symmetric(REPEATED)
    pairs = hf.eigsh(hf.as_operator(matrix), 4, verify_steps=0, generator=seeded(0))
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=F64), rtol=1e-5, atol=0)
    values = scipy.sparse.linalg.eigsh(matrix.numpy(), k=4, tol=1e-3, v0=np.ones(307), return_eigenvectors=False)
    assert values.min() < 3.5


@pytest.mark.parametrize("which", ["SA", "BE"])
def test_repeated_eigenvalues_at_the_lower_end(which):
    spectrum = [-6.0, -6.0, -5.0, -5.0, -5.0, 7.0, 7.0, 7.0, 6.0, *BULK]
    matrix = symmetric(spectrum)
    for seed in range(10):
        pairs = hf.eigsh(hf.as_operator(matrix), 5, which=which, generator=seeded(seed))
        assert_right(pairs, matrix, spectrum, which, rtol=1e-5)


def test_tenfold_eigenvalue():
    spectrum = [4.0] * 10 + BULK
    matrix = symmetric(spectrum)
    pairs = hf.eigsh(hf.as_operator(matrix), 10, generator=seeded(0))
    assert_right(pairs, matrix, spectrum, "LM", rtol=1e-5)
    assert pairs.num_matvecs < 200


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-9])
def test_pairs_closer_than_the_tolerance_are_both_found(gap):
    spectrum = [3.0, 2.0 + gap, 2.0, 1.5, *torch.linspace(-0.5, 0.5, 200).tolist()]
    matrix = symmetric(spectrum)
    for seed in range(10):
        pairs = hf.eigsh(hf.as_operator(matrix), 4, generator=seeded(seed))
        assert_right(pairs, matrix, spectrum, "LM", rtol=1e-5)


@pytest.mark.parametrize(("gap", "copies", "k"), [(3e-3, 3, 6), (1e-2, 2, 5), (3e-2, 3, 3)])
def test_clusters_about_the_tolerance_apart_lose_no_pair(gap, copies, k):
    """Rows that wait to be expanded can hold a wanted eigenvector: the check must not leave them out."""
    clusters = [*[10.0] * copies, *[10.0 - gap] * copies, *[8.0] * 3, *[5.0] * 3]
    diagonal = torch.tensor([*clusters, *torch.linspace(-0.03, 0.03, 388).tolist()], dtype=F64)
    H = hf.Operator(diagonal, lambda rows: rows * diagonal)
    for seed in range(30):
        pairs = hf.eigsh(H, k, generator=seeded(seed))
        torch.testing.assert_close(pairs.eigenvalues, diagonal[:k], rtol=1.001e-3, atol=0)
        assert bool(pairs.converged.all())


def test_plus_and_minus_of_one_magnitude(generator):
    spectrum = [3.0, -3.0, 3.0, -3.0, 1.0, *torch.linspace(-0.5, 0.5, 100).tolist()]
    matrix = symmetric(spectrum)
    pairs = hf.eigsh(hf.as_operator(matrix), 4, generator=generator)
    assert_right(pairs, matrix, spectrum, "LM", rtol=1e-5)
    assert int((pairs.eigenvalues > 0).sum()) == 2


# Degenerate operators


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("spectrum", [[0.0] * 30, [2.5] * 30, [4.0, -1.0] + [0.0] * 28], ids=["zero", "cI", "rank 2"])
@pytest.mark.parametrize("which", WHICH)
def test_exhausted_krylov_spaces(spectrum, which, block_size, generator):
    matrix = symmetric(spectrum)
    for k in (1, 6, 30):
        pairs = hf.eigsh(hf.as_operator(matrix), k, which=which, block_size=block_size, generator=generator)
        assert_right(pairs, matrix, spectrum, which, rtol=1e-12)


def test_one_by_one(generator):
    for value in (0.0, -2.5):
        pairs = hf.eigsh(hf.as_operator(torch.tensor([[value]])), generator=generator)
        assert pairs.eigenvalues.tolist() == [value]
        assert pairs.eigenvectors.abs().tolist() == [[1.0]]
        assert pairs.residuals.tolist() == [0.0]
        assert pairs.num_matvecs == 2


def test_every_pair_of_a_matrix(generator):
    matrix = torch.randn(25, 25, generator=generator, dtype=F64)
    matrix = matrix + matrix.T
    pairs = hf.eigsh(hf.as_operator(matrix), 25, which="SA", tol=1e-12, generator=generator)
    torch.testing.assert_close(pairs.eigenvalues, torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-12)
    assert pairs.num_matvecs == 50


# Start vectors


def drifted(matrix, generator, amount):
    noise = torch.randn(matrix.shape, generator=generator, dtype=F64)
    return matrix + amount * (noise + noise.T) / (2 * len(matrix)) ** 0.5


@pytest.mark.parametrize("amount", [1e-6, 1e-3, 1e-1, 3.0])
def test_warm_start_from_the_last_checkpoint(amount, generator):
    matrix = symmetric(NETLIKE)
    last = hf.eigsh(hf.as_operator(matrix), 5, generator=generator)
    moved = drifted(matrix, generator, amount)
    spectrum = torch.linalg.eigvalsh(moved).tolist()
    cold = hf.eigsh(hf.as_operator(moved), 5, generator=seeded(1))
    for v0 in (last, last.eigenvectors):
        warm = hf.eigsh(hf.as_operator(moved), 5, v0=v0, generator=seeded(1))
        assert_right(warm, moved, spectrum, "LM", rtol=1e-3)
        if amount <= 1e-3:
            assert warm.num_matvecs <= cold.num_matvecs - 5


def test_exact_start_costs_one_product_a_pair(generator):
    matrix = symmetric(NETLIKE)
    pairs = hf.eigsh(hf.as_operator(matrix), 5, tol=1e-12, generator=generator)
    again = hf.eigsh(hf.as_operator(matrix), 5, v0=pairs, verify_steps=0, generator=generator)
    assert again.num_matvecs == 5 + 1
    torch.testing.assert_close(again.eigenvalues, pairs.eigenvalues, rtol=1e-9, atol=0)


def test_start_at_the_wrong_eigenvectors(generator):
    matrix = symmetric(NETLIKE)
    H = hf.as_operator(matrix)
    wrong = torch.linalg.eigh(matrix).eigenvectors[:, 100:103].T
    for v0 in (wrong[0], wrong):
        assert_right(hf.eigsh(H, 2, v0=v0, generator=generator), matrix, NETLIKE, "LM", rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_any_start_vector_will_do(block_size, generator):
    matrix = symmetric(NETLIKE)
    H = hf.as_operator(matrix)
    row = torch.randn(400, generator=generator, dtype=F64)
    starts = [
        torch.zeros(400, dtype=F64),
        torch.zeros(3, 400, dtype=F64),
        torch.stack([row, -row, row]),
        1e-300 * row,
        1e300 * row,
        torch.eye(400, dtype=F64)[:7],
    ]
    for v0 in starts:
        pairs = hf.eigsh(H, 3, v0=v0, block_size=block_size, generator=generator)
        assert_right(pairs, matrix, NETLIKE, "LM", rtol=1e-5)


def test_start_is_left_alone(generator):
    v0 = torch.randn(2, 400, generator=generator, dtype=F64)
    copy = v0.clone()
    hf.eigsh(hf.as_operator(symmetric(NETLIKE)), 3, v0=v0, block_size=2, generator=generator)
    assert torch.equal(v0, copy)


# Counts, limits, reproducibility


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_products_and_passes_are_counted(block_size, generator):
    counting = CountingRows(symmetric(NETLIKE))
    pairs = hf.eigsh(counting.operator, 3, block_size=block_size, generator=generator)
    assert pairs.num_matvecs == sum(counting.passes)
    assert counting.passes[-6:] == [1] * 6  # the search for missed pairs, then the check of the residuals
    assert counting.passes[:-6] == [block_size] * (len(counting.passes) - 6)


def test_a_block_makes_fewer_passes():
    passes = []
    for block_size in (1, 2, 4):
        counting = CountingRows(symmetric(NETLIKE))
        hf.eigsh(counting.operator, 8, block_size=block_size, generator=seeded(0))
        passes.append(len(counting.passes))
    assert passes[0] > passes[1] > passes[2]


def test_verify_steps_are_what_the_check_costs():
    counts = [
        hf.eigsh(hf.as_operator(symmetric(NETLIKE)), 3, verify_steps=steps, generator=seeded(0)).num_matvecs
        for steps in (0, 1, 5, 9)
    ]
    assert [count - counts[0] for count in counts] == [0, 1, 5, 9]


def test_the_check_goes_on_while_a_missed_pair_emerges():
    """Seeds with random vectors nearly orthogonal to the missed eigenvector, too much so for five steps."""
    matrix = symmetric(REPEATED)
    for seed in (5, 11):
        pairs = hf.eigsh(hf.as_operator(matrix), 4, block_size=2, generator=seeded(seed))
        assert_right(pairs, matrix, REPEATED, "LM", rtol=1e-5)


@pytest.mark.parametrize("name", DECAYING)
def test_the_search_takes_no_more_products_than_arpack(name, generator):
    matrix = symmetric(DECAYING[name])
    for k, which, tol in [(1, "LM", 1e-3), (4, "LM", 1e-3), (10, "LM", 1e-3), (5, "LA", 1e-6), (10, "LA", 1e-9)]:
        v0 = torch.randn(400, generator=generator, dtype=F64)
        counting = CountingRows(matrix)
        scipy.sparse.linalg.eigsh(counting.operator.to_scipy(), k=k, which=which, tol=tol, v0=v0.numpy())
        pairs = hf.eigsh(hf.as_operator(matrix), k, which=which, tol=tol, v0=v0, generator=generator)
        assert pairs.num_matvecs - k - 5 <= sum(counting.passes), (k, which, tol)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("max_matvecs", [15, 17, 25, 30])
def test_the_limit_on_products_is_kept(max_matvecs, block_size, generator):
    matrix = symmetric(torch.linspace(-1, 1, 400, dtype=F64))
    counting = CountingRows(matrix)
    with pytest.warns(hf.ConvergenceWarning, match="the search ended at max_matvecs after"):
        pairs = hf.eigsh(counting.operator, 4, max_matvecs=max_matvecs, block_size=block_size, generator=generator)
    assert sum(counting.passes) == pairs.num_matvecs <= max_matvecs
    assert pairs.num_matvecs > max_matvecs - 5 - block_size
    true = torch.linalg.vector_norm(pairs.rows() @ matrix - pairs.eigenvalues[:, None] * pairs.rows(), dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=0, atol=1e-13)
    assert pairs.converged.tolist() == (true <= 1e-3 * pairs.eigenvalues.abs()).tolist()
    assert not bool(pairs.converged.all())


def test_running_out_while_checking_for_missed_pairs_is_said():
    H = hf.as_operator(symmetric(REPEATED))
    searched = hf.eigsh(H, 4, verify_steps=0, generator=seeded(0)).num_matvecs
    # The first search fits, the check finds a missed pair, and no products are left to go on or to check again.
    with pytest.warns(hf.ConvergenceWarning) as caught:
        pairs = hf.eigsh(H, 4, max_matvecs=searched + 5, generator=seeded(0))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"eigsh: the search ended at max_matvecs after {pairs.num_matvecs} matvecs; {int(pairs.converged.sum())} of 4 "
        "pairs have residuals within tol=0.001, and others may have been missed. See the fields converged and "
        "residuals; raise max_matvecs, tol or max_basis."
    )


def test_a_generator_determines_the_result():
    H = hf.as_operator(symmetric(NETLIKE))
    before = torch.get_rng_state()
    generator = seeded(3)
    first, second = hf.eigsh(H, 4, generator=generator), hf.eigsh(H, 4, generator=generator)
    again = hf.eigsh(H, 4, generator=seeded(3))
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert torch.equal(first.residuals, again.residuals)
    assert not torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(torch.get_rng_state(), before)


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by tensors made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree.leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                held, size = self.live.get(key, (0, tensor.untyped_storage().nbytes()))
                self.now += 0 if held else size
                self.live[key] = (held + 1, size)
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._release, key)
        return result

    def _release(self, key):
        held, size = self.live.pop(key)
        if held > 1:
            self.live[key] = (held - 1, size)
        else:
            self.now -= size


@pytest.mark.parametrize(
    ("k", "block_size", "max_basis"), [(1, 1, 7), (4, 1, 10), (4, 1, None), (4, 4, 13), (1, 4, 10)]
)
def test_memory_is_as_documented(k, block_size, max_basis, generator):
    size = 100_000
    diagonal = torch.linspace(-1, 1, size, dtype=F64) ** 9
    diagonal[:4] = torch.tensor([5.0, 4.0, 4.0, 3.0])
    H = hf.Operator(diagonal, lambda rows: rows * diagonal)
    with PeakMemory() as memory:
        pairs = hf.eigsh(H, k, block_size=block_size, max_basis=max_basis, generator=generator)
    rounds = 1 + (k == 4)  # one pair is missed at first, unless a block sees it
    held = (4 * k + 40 if max_basis is None else max_basis) + k + 2 * block_size + rounds
    assert memory.peak / (8 * size) < held + 0.1
    del H
    assert memory.now / (8 * size) < k + 0.1
    assert len(pairs) == k


# Networks


@pytest.mark.parametrize("name", ["conv batch norm eval", "transformer block", "nested pytree"])
@pytest.mark.parametrize("which", ["LM", "BE"])
def test_hessian_of_a_network(name, which, generator):
    loss, params, batch = case(name)
    dense = dense_hessian(name)
    H = hf.hessian(loss, params, batch)
    pairs = hf.eigsh(H, 3, which=which, tol=1e-6, generator=generator)
    assert_right(pairs, dense, torch.linalg.eigvalsh(dense).tolist(), which, rtol=1e-8)
    assert tree.names(pairs.eigenvectors) == tree.names(params)
    for i in range(3):
        v = tree.index(pairs.eigenvectors, i)
        assert relative_error(H(v), tree.scale(pairs.eigenvalues[i], v)) < 1e-5


def test_hessian_over_ragged_batches(generator):
    loss, params, (x, y) = case("mlp tanh")
    data = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]
    dense = dense_hessian("mlp tanh")
    pairs = hf.eigsh(hf.hessian(loss, params, data), 5, tol=1e-8, block_size=2, generator=generator)
    assert_right(pairs, dense, torch.linalg.eigvalsh(dense).tolist(), "LM", rtol=1e-10)


def test_low_precision_leaves_get_honest_residuals(generator):
    matrix = symmetric(NETLIKE[:60], dtype=torch.float32)
    like = {"a": torch.zeros(20, dtype=torch.bfloat16), "b": torch.zeros(40)}
    layout = tree.Layout.of(like)

    def rows(rows):
        return layout.ravel_rows(layout.unravel_rows(rows)) @ matrix  # as a network does with bfloat16 tangents

    H = hf.Operator(like, rows)
    with pytest.warns(hf.ConvergenceWarning, match=re.escape("when |Hv - lambda v| is computed anew, though all had")):
        pairs = hf.eigsh(H, 2, tol=1e-4, generator=generator)
    assert pairs.eigenvectors["a"].dtype == torch.bfloat16
    assert pairs.eigenvectors["b"].dtype == torch.float32
    assert pairs.eigenvalues.dtype == torch.float32
    v = pairs.rows()
    torch.testing.assert_close(v @ v.T, torch.eye(2), rtol=0, atol=1e-2)
    true = torch.linalg.vector_norm(H.rows(v) - pairs.eigenvalues[:, None] * v, dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-3, atol=0)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor(NETLIKE[:2]), rtol=1e-2, atol=0)
    coarse = hf.eigsh(H, 2, tol=0.02, v0=pairs, generator=generator)
    assert bool(coarse.converged.all())


# Warnings and errors


def test_products_that_do_not_repeat_are_told(generator):
    matrix, noise = symmetric(NETLIKE), seeded(9)

    def rows(rows):
        return rows @ matrix + 0.02 * torch.randn(rows.shape, generator=noise, dtype=F64)

    with pytest.warns(hf.ConvergenceWarning) as caught:
        pairs = hf.eigsh(hf.Operator(matrix[0], rows), 2, tol=1e-3, max_matvecs=60, generator=generator)
    assert not bool(pairs.converged.all())
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k=0 is out of range; expected 1 <= k <= 20, the size of the operator."),
        ({"k": 21}, "k=21 is out of range; expected 1 <= k <= 20, the size of the operator."),
        ({"which": "SM"}, "which='SM' is not known; expected one of 'LM', 'LA', 'SA', 'BE'."),
        ({"tol": 0.0}, "tol=0.0 is out of range; expected a finite number above 0."),
        ({"tol": float("nan")}, "tol=nan is out of range; expected a finite number above 0."),
        ({"verify_steps": -1}, "verify_steps=-1 is out of range; expected 0 <= verify_steps."),
        ({"block_size": 0}, "block_size=0 is out of range; expected 1 <= block_size <= 20, the size of the operator."),
        (
            {"block_size": 21},
            "block_size=21 is out of range; expected 1 <= block_size <= 20, the size of the operator.",
        ),
        (
            {"max_basis": 8},
            "max_basis=8 is out of range; expected 9 <= max_basis <= 20; k and 2 * block_size or verify_steps fit "
            "below it.",
        ),
        ({"max_basis": 21}, "max_basis=21 is out of range; expected 9 <= max_basis <= 20"),
        ({"max_basis": 10, "block_size": 4}, "max_basis=10 is out of range; expected 12 <= max_basis <= 20"),
        (
            {"max_matvecs": 10},
            "max_matvecs=10 is out of range; expected 11 <= max_matvecs; k to start with, verify_steps and k for "
            "checks.",
        ),
        ({"max_matvecs": 11, "block_size": 2}, "max_matvecs=11 is out of range; expected 12 <= max_matvecs"),
        ({"v0": torch.zeros(19)}, "v0 has shape (19,), expected (20,) as in H.like."),
        ({"v0": torch.zeros(2, 19)}, "v0 has shape (2, 19), expected ('K', 20) as in H.like."),
        ({"v0": torch.zeros(0, 20)}, "the number of vectors in v0=0 is out of range"),
        ({"v0": {"w": torch.zeros(20)}}, "v0 has a different pytree structure from H.like"),
        ({"v0": {}}, "v0 has a different pytree structure from H.like"),
    ],
)
def test_options_out_of_range(options, text, generator):
    H = hf.as_operator(torch.eye(20))
    with pytest.raises(ValueError, match=re.escape(text)):
        hf.eigsh(H, **{"k": 3, **options}, generator=generator)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 2.0}, "k is 2.0 of type float, expected an int."),
        ({"tol": "small"}, "tol is 'small' of type str, expected a positive number."),
        ({"v0": torch.zeros(20, dtype=F64)}, "v0 has dtype torch.float64, but H.like has torch.float32 there"),
        ({"v0": "random"}, "v0 is of type str, expected a tensor like H.like."),
        ({"generator": 0}, "generator is of type int, expected a torch.Generator"),
    ],
)
def test_options_of_the_wrong_type(options, text, generator):
    H = hf.as_operator(torch.eye(20))
    with pytest.raises(TypeError, match=re.escape(text)):
        hf.eigsh(H, **{"generator": generator, **options})


def test_values_that_are_not_finite(generator):
    H = hf.as_operator(torch.eye(20))
    start = torch.full((20,), torch.nan)
    with pytest.raises(FloatingPointError, match=re.escape("v0 is NaN or infinite; leave it out for a random start.")):
        hf.eigsh(H, v0=start, generator=generator)
    broken = hf.Operator(torch.zeros(20), lambda rows: rows / 0)
    with pytest.raises(FloatingPointError, match="a product of the operator is NaN or infinite"):
        hf.eigsh(broken, generator=generator)


# At scale


@pytest.mark.slow
def test_resnet_20_in_float32_agrees_with_arpack(monkeypatch, generator):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "_models", raising=False)
    from _models import build

    problem = build("resnet-20", train_steps=30)
    H = hf.hessian(problem.loss, problem.params, problem.batch)
    assert H.size == 272_474
    pairs = hf.eigsh(H, 10, generator=generator)
    assert bool(pairs.converged.all())
    calls = SimpleNamespace(count=0)

    def product(x):
        calls.count += 1
        return H.vector(torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(-1))).numpy()

    operator = scipy.sparse.linalg.LinearOperator((H.size, H.size), matvec=product, dtype=np.float32)
    v0 = torch.randn(H.size, generator=generator).numpy()
    values = scipy.sparse.linalg.eigsh(operator, k=10, tol=1e-3, v0=v0, return_eigenvectors=False)
    expected = torch.from_numpy(values[np.argsort(-np.abs(values))].copy())
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-3, atol=0)
    assert pairs.num_matvecs - 10 - 5 <= calls.count


# The check of all residuals with one product


def true_residuals(pairs, matrix):
    return torch.linalg.vector_norm(pairs.rows() @ matrix - pairs.eigenvalues[:, None] * pairs.rows(), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("which", ["LM", "BE", "SA"])
def test_residuals_checked_together_are_those_of_each(which, dtype):
    matrix = symmetric(NETLIKE).to(dtype)
    for seed in range(10):
        pairs = hf.eigsh(hf.as_operator(matrix), 4, which=which, generator=seeded(seed))
        true = true_residuals(pairs, matrix)
        rounding = 50 * torch.finfo(dtype).eps * max(map(abs, NETLIKE))
        assert bool((pairs.residuals >= true - rounding).all())
        assert bool((pairs.residuals <= true + rounding).all())
        torch.testing.assert_close(pairs.rows() @ pairs.rows().T, torch.eye(4, dtype=dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotation", [0.3, 3.0])
def test_a_recurrence_that_is_off_is_found_out(rotation):
    """The operator is another one from the check on, as if the recurrence had not been that of the operator."""
    matrix = symmetric(NETLIKE)
    other = matrix + rotation * symmetric([1.0] + [0.0] * (len(NETLIKE) - 1), seed=5)
    for seed in range(10):
        spent = hf.eigsh(hf.as_operator(matrix), 4, generator=seeded(seed)).num_matvecs
        calls = []

        def rows(rows, calls=calls, spent=spent):
            calls.extend(rows)
            return rows @ (matrix if len(calls) < spent else other)

        with pytest.warns(hf.ConvergenceWarning, match="are not accurate or not repeatable enough"):
            pairs = hf.eigsh(hf.Operator(matrix[0], rows), 4, generator=seeded(seed))
        assert pairs.num_matvecs == len(calls) == spent + 4, "one for each after the one for all"
        torch.testing.assert_close(pairs.residuals, true_residuals(pairs, other), rtol=1e-9, atol=1e-12)


def test_tolerances_near_rounding_have_a_product_for_each_residual():
    counting = CountingRows(symmetric(NETLIKE))
    pairs = hf.eigsh(counting.operator, 3, tol=1e-15, generator=seeded())
    assert counting.passes[-1] == 3
    torch.testing.assert_close(pairs.residuals, true_residuals(pairs, symmetric(NETLIKE)), rtol=0, atol=1e-13)


def test_vectors_in_a_lower_precision_have_a_product_for_each_residual():
    passes, matrix = [], symmetric(NETLIKE, dtype=torch.float32)

    def rows(rows):
        passes.append(len(rows))
        return rows @ matrix

    H = hf.Operator(torch.zeros(len(matrix), dtype=torch.bfloat16), rows)
    pairs = hf.eigsh(H, 3, tol=0.05, generator=seeded())
    assert passes[-1] == 3
    assert pairs.num_matvecs == sum(passes)
    assert pairs.eigenvectors.dtype == torch.bfloat16
