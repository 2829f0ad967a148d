"""Restriction to some leaves is the diagonal block of the whole Hessian."""

import re
from collections import OrderedDict, namedtuple

import pytest
import torch
from helpers import CASES, F64, case, dense_hessian, randn_like, relative_error, seeded

import hessfunc as hf
from hessfunc import tree

PARAMS = {
    "layer1": {"0": {"weight": torch.randn(2, 2, generator=seeded(1), dtype=F64)}, "bias": torch.ones(2, dtype=F64)},
    "layer10": [torch.randn(2, generator=seeded(2), dtype=F64), torch.ones(1, dtype=F64)],
    "head.weight": torch.randn(3, generator=seeded(3), dtype=F64),
}
NAMES = ["layer1.0.weight", "layer1.bias", "layer10.0", "layer10.1", "head.weight"]


def loss(p):
    flat = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(p)])
    return (flat.sum() ** 3 + (flat**4).sum()) / 10


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("layer1", ["layer1.0.weight", "layer1.bias"]),
        ("layer1.0", ["layer1.0.weight"]),
        ("layer10", ["layer10.0", "layer10.1"]),
        ("layer10.1", ["layer10.1"]),
        ("head", ["head.weight"]),
        ("*.weight", ["layer1.0.weight", "head.weight"]),
        ("layer1*", NAMES[:4]),
        ("layer?.bias", ["layer1.bias"]),
        ("layer10.[01]", ["layer10.0", "layer10.1"]),
        (["head", "layer1.bias"], ["layer1.bias", "head.weight"]),
        (("layer10", "layer10.0"), ["layer10.0", "layer10.1"]),
        ({"head.weight"}, ["head.weight"]),
        ((name for name in ["layer10.0", "head"]), ["layer10.0", "head.weight"]),
        (lambda name: name.endswith("1"), ["layer10.1"]),
        (lambda name: re.search(r"bias|0$", name), ["layer1.bias", "layer10.0"]),
        ("*", NAMES),
    ],
    ids=lambda value: str(value) if isinstance(value, str | list | tuple | set) else type(value).__name__,
)
def test_selection(select, expected):
    restricted, selected = hf.restrict(loss, PARAMS, select)
    assert list(selected) == expected
    whole = dict(tree.named_leaves(PARAMS))
    assert all(selected[name] is whole[name] for name in expected)
    assert torch.equal(restricted(selected), loss(PARAMS))


@pytest.mark.parametrize("name", ["conv batch norm train", "transformer block", "nested pytree", "tied embedding"])
def test_the_hessian_of_a_restriction_is_a_diagonal_block(name, generator):
    whole, params, batch = case(name)
    layout = tree.Layout.of(params)
    names = tree.names(params)
    chosen = names[1::2] or names
    restricted, selected = hf.restrict(whole, params, chosen)
    offsets = torch.tensor([0, *layout.sizes]).cumsum(0).tolist()
    rows = [i for k, leaf in enumerate(names) if leaf in chosen for i in range(offsets[k], offsets[k + 1])]
    block = dense_hessian(name)[rows][:, rows]
    H = hf.hessian(restricted, selected, batch)
    assert H.layout.names == tuple(chosen)
    assert relative_error(H.dense(), block) < 1e-10
    v = randn_like(selected, generator)
    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        result = product(restricted, selected, v, *batch)
        assert relative_error(H.layout.ravel(result), block @ H.layout.ravel(v)) < 1e-10


def test_restrictions_nest():
    inner, once = hf.restrict(loss, PARAMS, "layer1")
    twice_loss, twice = hf.restrict(inner, once, "*.bias")
    assert list(twice) == ["layer1.bias"]
    direct_loss, direct = hf.restrict(loss, PARAMS, "layer1.bias")
    assert torch.equal(hf.hessian(twice_loss, twice).dense(), hf.hessian(direct_loss, direct).dense())


def test_restriction_of_a_single_tensor_and_of_other_containers():
    restricted, selected = hf.restrict(lambda p: (p**3).sum(), torch.ones(2), lambda _: True)
    assert hf.hvp(restricted, selected, {"": torch.ones(2)})[""].tolist() == [6.0, 6.0]
    Pair = namedtuple("Pair", ["left", "right"])
    pair = Pair(torch.ones(2), OrderedDict(x=torch.ones(3)))
    restricted, selected = hf.restrict(lambda p: (p.left.sum() * p.right["x"].sum()) ** 2, pair, "right.x")
    assert list(selected) == ["right.x"]
    assert hf.hessian(restricted, selected).dense().tolist() == [[8.0] * 3] * 3


def test_what_matches_nothing_says_what_there_is():
    with pytest.raises(ValueError, match=r"select: 'layer2' matches no leaf; the leaves are 'layer1.0.weight', "):
        hf.restrict(loss, PARAMS, "layer2")
    with pytest.raises(ValueError, match=r"select: 'tail' matches no leaf"):
        hf.restrict(loss, PARAMS, ["head", "tail"])
    with pytest.raises(ValueError, match=r"select=\[\] matches no leaf"):
        hf.restrict(loss, PARAMS, [])
    with pytest.raises(ValueError, match=r"select=<function .*> matches no leaf"):
        hf.restrict(loss, PARAMS, lambda _: False)
    many = {f"w{i}": torch.ones(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"'w11', \.\.\. \(20 in all\)\.$"):
        hf.restrict(loss, many, "x")


@pytest.mark.parametrize("select", [3, ["head", 3], None])
def test_a_selection_of_the_wrong_type(select):
    with pytest.raises(TypeError, match=r"select holds (3|None) of type (int|NoneType); expected names or patterns"):
        hf.restrict(loss, PARAMS, select)


def test_leaves_of_one_name_cannot_be_told_apart():
    twins = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}, "c": torch.ones(1)}
    with pytest.raises(ValueError, match=r"params has 2 leaves named 'a.b'; rename one"):
        hf.restrict(loss, twins, "a")
    assert list(hf.restrict(loss, twins, "c").params) == ["c"]


def test_every_case_of_the_table_restricts_to_all_of_itself():
    for name in CASES:
        whole, params, batch = case(name)
        restricted, selected = hf.restrict(whole, params, "*")
        assert torch.equal(restricted(selected, *batch), whole(params, *batch))
