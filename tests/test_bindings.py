"""Operations called by way of torch's functions and methods instead of their overloads."""

import pytest
import torch
from helpers import seeded

from hessfunc import _bindings
from hessfunc._bindings import quick_binding

aten = torch.ops.aten
SQUARE, OTHER, STACK = (
    torch.rand(*shape, generator=seeded(i)) + 0.5 for i, shape in enumerate([(4, 4), (4, 4), (3, 4, 4)])
)
CALLS = [
    (aten.mm.default, (SQUARE, OTHER), {}),
    (aten.mm.out, (SQUARE, OTHER), {"out": torch.empty(4, 4)}),
    (aten.bmm.default, (STACK, STACK), {}),
    (aten.addmm.default, (SQUARE, OTHER, SQUARE), {"beta": 0.5, "alpha": 2}),
    (aten.baddbmm.default, (STACK, STACK, STACK), {"alpha": -1}),
    (aten.addcmul.default, (SQUARE, OTHER, SQUARE), {"value": 3}),
    (aten.mul.Tensor, (SQUARE, OTHER), {}),
    (aten.mul.Tensor, (SQUARE, 2.5), {}),
    (aten.mul.Scalar, (SQUARE, 3), {}),
    (aten.add.Tensor, (SQUARE, OTHER), {"alpha": 2}),
    (aten.sub.Tensor, (SQUARE, OTHER), {"alpha": 2}),
    (aten.div.Tensor, (SQUARE, OTHER), {}),
    (aten.div.Tensor_mode, (SQUARE, OTHER), {"rounding_mode": "floor"}),
    (aten.neg.default, (SQUARE,), {}),
    (aten.exp.default, (SQUARE,), {}),
    (aten.sum.default, (SQUARE,), {"dtype": torch.float64}),
    (aten.sum.dim_IntList, (STACK, [0, 2], True), {}),
    (aten.sum.IntList_out, (STACK, [0], False), {"out": torch.empty(4, 4)}),
    (aten.cat.default, ([SQUARE, OTHER], 1), {}),
    (aten.transpose.int, (STACK, 0, 2), {}),
    (aten.t.default, (SQUARE,), {}),
    (aten.select.int, (STACK, 1, 2), {}),
    (aten.squeeze.dim, (STACK[:1], 0), {}),
    (aten.squeeze.dims, (STACK[:1], [0, 1]), {}),
    (aten.unsqueeze.default, (SQUARE, 1), {}),
    (aten.permute.default, (STACK, [2, 0, 1]), {}),
    (aten.reshape.default, (STACK, [3, -1]), {}),
    (aten.split_with_sizes.default, (SQUARE, [1, 3], 1), {}),
    (aten.view.default, (STACK, [12, 4]), {}),
    (aten.view.dtype, (SQUARE, torch.int32), {}),
    (aten.expand.default, (SQUARE, [3, 4, 4]), {}),
    (aten.contiguous.default, (SQUARE.t(),), {}),
    (aten.mul_.Tensor, (SQUARE, OTHER), {}),
    (aten.add_.Tensor, (SQUARE, OTHER), {"alpha": -2}),
    (aten.sub_.Tensor, (SQUARE, 1.5), {}),
    (aten.div_.Tensor, (SQUARE, OTHER), {}),
    (aten.addcmul_.default, (SQUARE, OTHER, OTHER), {"value": 0.5}),
    (aten.addmm_.default, (SQUARE, OTHER, OTHER), {"alpha": 2}),
    (aten.baddbmm_.default, (STACK, STACK, STACK), {"beta": 2, "alpha": 0.5}),
    (aten.copy_.default, (SQUARE, OTHER), {}),
]


def fresh(value):
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.preserve_format)
    return [fresh(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("operation", "arguments", "keywords"), CALLS, ids=[str(call[0]) for call in CALLS])
def test_the_same_operation(operation, arguments, keywords):
    binding = quick_binding(operation)
    assert binding is not operation
    found, expected = (
        function(*map(fresh, arguments), **{name: fresh(value) for name, value in keywords.items()})
        for function in (binding, operation)
    )
    for one, other in zip(*((x if isinstance(x, list | tuple) else [x]) for x in (found, expected)), strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())


def test_each_listed_name_is_tested():
    called = {call[0]._schema.name.removeprefix("aten::") for call in CALLS}
    assert called == _bindings._FUNCTIONS | _bindings._METHODS


@pytest.mark.parametrize(
    "target", [torch.ops.prims.mul.default, aten.threshold_backward.default, aten.sub.Scalar, aten.add_.Scalar, len]
)
def test_others_stay(target):
    assert quick_binding(target) is target
