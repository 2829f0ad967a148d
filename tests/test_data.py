"""Batches of every form, weighed so that the result is exact however ragged they are."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from helpers import F64, relative_error, seeded
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import hessfunc as hf

X = torch.randn(10, 3, generator=seeded(1), dtype=F64)
Y = torch.randn(10, generator=seeded(2), dtype=F64)
W = torch.randn(3, generator=seeded(3), dtype=F64)


def mean_loss(w, x, y):
    return ((x @ w - y).tanh() ** 2).mean()


def sum_loss(w, x, y):
    return ((x @ w - y).tanh() ** 2).sum()


def dict_loss(w, batch):
    return mean_loss(w, batch["x"], batch["y"])


WHOLE = torch.autograd.functional.hessian(lambda w: mean_loss(w, X, Y), W)
RAGGED = [(X[:4], Y[:4]), (X[4:7], Y[4:7]), (X[7:9], Y[7:9]), (X[9:], Y[9:])]


class Rereadable:
    """A user's own re-iterable."""

    def __init__(self, batches):
        self.batches = batches
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


class Sequence:
    """Old-style sequence: ``__getitem__`` alone."""

    def __getitem__(self, index):
        return RAGGED[index]


class Lines(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class BatchEncoding(UserDict):
    """What a tokenizer returns: a mapping that is neither a dict nor a pytree node."""


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [(X, Y)],
        RAGGED,
        [list(batch) for batch in RAGGED],
        [Pair(*batch) for batch in RAGGED],
        Rereadable(RAGGED),
        Sequence(),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=10),
        DataLoader(Lines(), batch_size=3),
        [(X[i : i + 1], Y[i : i + 1]) for i in range(10)],
    ],
    ids=[
        *("one batch", "list of one", "ragged list", "lists", "named tuples", "re-iterable", "sequence"),
        *("loader", "loader of one", "iterable dataset", "single samples"),
    ],
)
@pytest.mark.parametrize("linearize", [True, False])
def test_every_form_gives_the_hessian_of_the_mean_over_all_samples(data, linearize):
    H = hf.hessian(mean_loss, W, data, linearize=linearize)
    for _ in range(2):  # again and again
        assert relative_error(H.dense(), WHOLE) < 1e-12


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_ragged_batches_are_exact_with_every_product_and_chunk_size(product, chunk_size):
    H = hf.hessian(mean_loss, W, RAGGED, product=product, chunk_size=chunk_size)
    assert relative_error(H.dense(), WHOLE) < 1e-12
    v = torch.ones(3, dtype=F64)
    assert relative_error(H(v), WHOLE @ v) < 1e-12


def test_sum_reduction_adds_up():
    for data in ((X, Y), RAGGED, DataLoader(TensorDataset(X, Y), batch_size=3)):
        H = hf.hessian(sum_loss, W, data, reduction="sum")
        assert relative_error(H.dense(), 10 * WHOLE) < 1e-12


def test_count_weighs_batches_by_what_their_loss_divides_by():
    """Tokens that count: a loss that ignores some of its samples divides by the rest."""
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0], dtype=F64)

    def masked(w, x, y, mask):
        return (mask * (x @ w - y).tanh() ** 2).sum() / mask.sum()

    whole = torch.autograd.functional.hessian(lambda w: masked(w, X, Y, keep), W)
    batches = [(X[:4], Y[:4], keep[:4]), (X[4:8], Y[4:8], keep[4:8]), (X[8:], Y[8:], keep[8:])]
    H = hf.hessian(masked, W, batches, count=lambda batch: batch[2].sum())
    assert relative_error(H.dense(), whole) < 1e-12
    assert relative_error(hf.hessian(masked, W, batches).dense(), whole) > 1e-3, "the default would be wrong"


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_mappings_are_batches(kind):
    whole = hf.hessian(dict_loss, W, kind(x=X, y=Y))
    assert relative_error(whole.dense(), WHOLE) < 1e-12
    ragged = hf.hessian(dict_loss, W, [kind(x=x, y=y) for x, y in RAGGED])
    assert relative_error(ragged.dense(), WHOLE) < 1e-12


def test_mappings_from_a_loader():
    class Rows(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"x": X[i], "y": Y[i]}

    H = hf.hessian(dict_loss, W, DataLoader(Rows(), batch_size=4))
    assert relative_error(H.dense(), WHOLE) < 1e-12


def test_batches_of_a_single_tensor_and_nested_ones():
    batches = [X[:6], X[6:]]
    H = hf.hessian(lambda w, x: ((x @ w) ** 4).mean(), W, batches)
    whole = hf.hessian(lambda w, x: ((x @ w) ** 4).mean(), W, (X,))
    assert relative_error(H.dense(), whole.dense()) < 1e-12
    nested = [({"x": x}, [y, "text", None, 3]) for x, y in RAGGED]
    H = hf.hessian(lambda w, inputs, rest: mean_loss(w, inputs["x"], rest[0]), W, nested)
    assert relative_error(H.dense(), WHOLE) < 1e-12


def test_a_loss_of_the_parameters_alone_needs_no_data():
    H = hf.hessian(lambda w: (w**3).sum(), W)
    assert relative_error(H.dense(), torch.diag(6 * W)) < 1e-12
    assert relative_error(hf.hessian(lambda w: (w**3).sum(), W, [()], count=lambda _: 1).dense(), H.dense()) < 1e-12


def test_one_pass_over_the_data_serves_all_vectors():
    data = Rereadable(RAGGED)
    H = hf.hessian(mean_loss, W, data)
    before = data.passes
    torch.func.vmap(H)(torch.eye(3, dtype=F64))
    H.matmat(torch.eye(3, dtype=F64))
    H.rows(torch.eye(3, dtype=F64))
    assert data.passes - before == 3


def test_the_order_of_batches_does_not_matter_and_shuffling_gives_the_same_hessian():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=generator)
    assert relative_error(hf.hessian(mean_loss, W, loader).dense(), WHOLE) < 1e-12


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (iter(RAGGED), "list_iterator"),
        ((batch for batch in RAGGED), "generator"),
        (zip(X, Y, strict=True), "zip"),
        (map(tuple, RAGGED), "map"),
        (iter(DataLoader(TensorDataset(X, Y))), "_SingleProcessDataLoaderIter"),
    ],
    ids=["iterator", "generator", "zip", "map", "loader iterator"],
)
def test_iterators_are_refused(data, kind):
    with pytest.raises(TypeError, match=rf"data is a {kind}, which is exhausted after one pass.*Pass list\(data\)"):
        hf.hessian(mean_loss, W, data)


def test_data_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"data is a tensor; pass a tuple for one batch, data=\(inputs,\)"):
        hf.hessian(mean_loss, W, X)
    for data, kind in ((3, "int"), (None, "NoneType"), (lambda: RAGGED, "function")):
        with pytest.raises(TypeError, match=rf"data is of type {kind}; expected a tuple \(one batch\), or a list"):
            hf.hessian(mean_loss, W, data)


@pytest.mark.parametrize(
    "data", [[], Rereadable([]), DataLoader(TensorDataset(X[:0], Y[:0]))], ids=["list", "own class", "loader"]
)
def test_empty_data(data):
    with pytest.raises(ValueError, match="data is empty: a pass over it yielded no batch"):
        hf.hessian(mean_loss, W, data)


def test_data_that_runs_dry_is_found_at_the_next_pass():
    class Once:
        def __init__(self):
            self.batches = iter(RAGGED)

        def __iter__(self):
            return (batch for batch in self.batches)

    data = Once()
    H = hf.hessian(mean_loss, W, data)
    list(data)
    with pytest.raises(ValueError, match=r"only once: pass list\(data\)"):
        H(W)


def test_sample_counts_that_are_unclear():
    odd = [(X[:4], Y[:3])]
    with pytest.raises(ValueError, match=r"count of batch 0 is unclear: it holds tensors of leading lengths \[3, 4\]"):
        hf.hessian(lambda w, x, y: (x @ w).sum() + y.sum(), W, odd)
    with pytest.raises(ValueError, match=r"it holds no tensors. Pass count=.*or reduction='sum'"):
        hf.hessian(lambda w, _: (w**2).sum(), W, [("text",)])
    later = [(X, Y), (X[:2], Y[0])]
    H = hf.hessian(lambda w, x, y: ((x @ w) ** 2).mean() + y.sum(), W, later)
    assert relative_error(H.dense(), 2 * (X.T @ X / 10 * 10 + X[:2].T @ X[:2] / 2 * 2) / 12) < 1e-12
    assert hf.hessian(lambda w, _: (w**2).sum(), W, [("a",), ("b",)], reduction="sum")(W).tolist() == (4 * W).tolist()


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), torch.tensor(0)])
def test_counts_out_of_range(bad):
    with pytest.raises(ValueError, match=r"count is .* for batch 0; every batch needs a positive sample count"):
        hf.hessian(mean_loss, W, RAGGED, count=lambda _: bad)


def test_count_that_is_no_function_and_reduction_that_is_not_known():
    with pytest.raises(TypeError, match=r"count is 4, expected a function from a batch to its number of samples"):
        hf.hessian(mean_loss, W, RAGGED, count=4)
    with pytest.raises(ValueError, match=r"reduction='none' is not known; expected one of 'mean', 'sum'"):
        hf.hessian(mean_loss, W, RAGGED, reduction="none")


def test_a_list_of_two_tensors_is_two_batches_and_the_error_says_so():
    with pytest.raises(TypeError, match=r"first batch, which holds 1 item.*A tuple as data is one batch; a list is"):
        hf.hessian(mean_loss, W, [X, Y])


def test_arrays_of_numpy_are_passed_through():
    batches = [(np.asarray(x), np.asarray(y)) for x, y in RAGGED]

    def loss(w, x, y):
        return mean_loss(w, torch.from_numpy(x), torch.from_numpy(y))

    H = hf.hessian(loss, W, batches, count=lambda batch: len(batch[0]), linearize=False)
    assert relative_error(H.dense(), WHOLE) < 1e-12
    with pytest.raises(ValueError, match="it holds no tensors"):
        hf.hessian(loss, W, batches)


def test_the_data_is_not_changed():
    copies = [(x.clone(), y.clone()) for x, y in RAGGED]
    hf.hessian(mean_loss, W, RAGGED).dense()
    assert all(
        torch.equal(a, b) for now, was in zip(RAGGED, copies, strict=True) for a, b in zip(now, was, strict=True)
    )
