"""Vector-space algebra and flat layouts of pytrees."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from helpers import F64, randn_like, seeded

from hessfunc import tree

Pair = namedtuple("Pair", ["left", "right"])


def example():
    g = seeded(1)
    return {
        "a": [torch.randn(2, 3, generator=g), (torch.randn((), generator=g),)],
        "b": Pair(torch.randn(4, generator=g, dtype=F64), OrderedDict(x=torch.randn(1, 1, generator=g).bfloat16())),
        "empty": torch.randn(0, 3, generator=g),
    }


NAMES = ["a.0", "a.1.0", "b.left", "b.right.x", "empty"]


def test_names_sizes_and_round_trip_of_the_structure():
    point = example()
    assert tree.names(point) == NAMES
    assert [name for name, _ in tree.named_leaves(point)] == NAMES
    assert tree.size(point) == 6 + 1 + 4 + 1
    leaves, spec = tree.flatten(point)
    again = tree.unflatten(leaves, spec)
    assert type(again["b"]) is Pair
    assert type(again["b"].right) is OrderedDict
    assert all(a is b for a, b in zip(tree.leaves(again), leaves, strict=True))
    assert tree.names(torch.ones(2)) == [""]
    assert tree.names({1: torch.ones(1), (0, 1): torch.ones(1)}) == ["1", "(0, 1)"]


def test_algebra_is_that_of_the_flat_vectors():
    x = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor([[3.0]])]}
    y = {"a": torch.tensor([4.0, 5.0]), "b": [torch.tensor([[6.0]])]}
    assert float(tree.vdot(x, y)) == 4 + 10 + 18
    torch.testing.assert_close(tree.norm(x), torch.tensor(14.0).sqrt())
    assert tree.axpy(2.0, x, y)["b"][0].tolist() == [[12.0]]
    assert tree.scale(-1.0, x)["a"].tolist() == [-1.0, -2.0]
    stacked = tree.stack([x, y])
    assert stacked["a"].tolist() == [[1.0, 2.0], [4.0, 5.0]]
    assert torch.equal(tree.index(stacked, 1)["b"][0], y["b"][0])
    assert tree.map_leaves(lambda a, b: a * b, x, y)["a"].tolist() == [4.0, 10.0]


def test_inner_products_accumulate_in_float32_or_better():
    # 4096 ones in bfloat16: its own sums stop growing at 256
    ones = {"w": torch.ones(4096, dtype=torch.bfloat16)}
    assert float(tree.vdot(ones, ones)) == 4096
    assert tree.vdot(ones, ones).dtype == torch.float32
    mixed = {"w": torch.ones(3, dtype=F64)}
    assert tree.vdot(mixed, {"w": torch.ones(3)}).dtype == F64
    assert tree.accumulation_dtype(torch.float16) == torch.float32
    assert tree.accumulation_dtype(F64) == F64


def test_inner_products_need_one_structure():
    with pytest.raises(ValueError, match="zip"):
        tree.vdot({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_the_norm_has_a_derivative_at_zero():
    value, gradient = torch.func.grad_and_value(tree.norm)({"a": torch.zeros(3), "b": torch.zeros(1)})[::-1]
    assert float(value) == 0
    assert all(bool((leaf == 0).all()) for leaf in gradient.values())
    gradient = torch.func.grad(tree.norm)({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])})
    assert torch.allclose(gradient["a"], torch.tensor([0.6, 0.0]))
    assert torch.allclose(gradient["b"], torch.tensor([0.8]))


def test_detach_shares_storage_and_drops_the_tape():
    x = {"w": torch.ones(2, requires_grad=True)}
    y = tree.detach(x)
    assert not y["w"].requires_grad
    assert y["w"].data_ptr() == x["w"].data_ptr()


def test_layout():
    point = example()
    layout = tree.Layout.of(point)
    assert layout.names == tuple(NAMES)
    assert layout.sizes == (6, 1, 4, 1, 0)
    assert layout.size == 12
    assert layout.dtype == F64
    assert layout.device == torch.device("cpu")
    assert layout.shapes == ((2, 3), (), (4,), (1, 1), (0, 3))
    assert layout.dtypes == (torch.float32, torch.float32, F64, torch.bfloat16, torch.float32)
    assert "spec" not in repr(layout)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_ravel_and_unravel_are_inverse(rows):
    point = example()
    layout = tree.Layout.of(point)
    lead = () if rows is None else (rows,)
    vectors = randn_like(point, seeded(2), lead)
    ravel, unravel = (layout.ravel, layout.unravel) if rows is None else (layout.ravel_rows, layout.unravel_rows)
    flat = ravel(vectors)
    assert flat.shape == (*lead, 12)
    assert flat.dtype == F64
    back = unravel(flat)
    for leaf, original in zip(tree.leaves(back), tree.leaves(vectors), strict=True):
        assert leaf.dtype == original.dtype
        assert torch.equal(leaf, original)
    assert torch.equal(ravel(back), flat)


def test_flat_vectors_of_low_precision_leaves_are_float32():
    assert tree.Layout.of({"w": torch.ones(2, dtype=torch.bfloat16)}).dtype == torch.float32
    assert tree.Layout.of(torch.ones(2, dtype=torch.float16)).dtype == torch.float32


def test_a_single_tensor_ravels_without_a_copy():
    x = torch.arange(6.0).reshape(2, 3)
    layout = tree.Layout.of(x)
    assert layout.ravel(x).data_ptr() == x.data_ptr()
    assert layout.unravel(torch.arange(6.0)).shape == (2, 3)


def test_unravelling_a_vector_of_the_wrong_size_fails():
    with pytest.raises(RuntimeError, match="split"):
        tree.Layout.of(torch.ones(3)).unravel(torch.ones(4))
