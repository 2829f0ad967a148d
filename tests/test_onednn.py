"""Products of matrices by oneDNN: the same numbers, wherever the matrices lie, and only where it is the quicker way."""

import pytest
import torch
from helpers import F64, seeded
from torch import nn

import hessfunc as hf
from hessfunc import _onednn
from hessfunc._recorder import record

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def _taken_for_every_product(monkeypatch):
    monkeypatch.setattr(_onednn, "WORTH", 1)
    monkeypatch.setattr(_onednn, "NARROW", 1)
    monkeypatch.setattr(_onednn, "available", lambda: True)


def random(*shape, generator):
    return torch.randn(*shape, generator=generator)


# How a matrix of the last two sizes of the shape may lie in memory.
LAYOUTS = {
    "rows": lambda shape, g: random(*shape, generator=g),
    "columns": lambda shape, g: random(*shape[:-2], shape[-1], shape[-2], generator=g).transpose(-1, -2),
    "part of longer rows": lambda shape, g: random(*shape[:-1], shape[-1] + 7, generator=g)[..., 3:-4],
    "part of longer columns": lambda shape, g: LAYOUTS["part of longer rows"](
        (*shape[:-2], shape[-1], shape[-2]), g
    ).transpose(-1, -2),
    "every second": lambda shape, g: random(*shape[:-1], 2 * shape[-1], generator=g)[..., ::2],
    "one row for all": lambda shape, g: random(*shape[:-2], 1, shape[-1], generator=g).expand(shape),
    "one column for all": lambda shape, g: random(*shape[:-1], 1, generator=g).expand(shape),
    "one number for all": lambda shape, g: random(*shape[:-2], 1, 1, generator=g).expand(shape),
    "overlapping": lambda shape, g: random(*shape[:-2], sum(shape[-2:]), generator=g).unfold(-1, shape[-1], 1)[
        ..., : shape[-2], :
    ],
}
SIZES = [(3, 5, 7), (16, 16, 16), (1, 9, 4), (9, 1, 4), (4, 9, 1)]


def chosen(operation, *arguments, lean=False, **keywords):
    """What a program calls in place of the operation on these arguments."""
    recording, _ = record(lambda *inputs: [operation(*inputs, **keywords)], arguments)
    (node,) = [node for node in recording.graph.nodes if node.target is operation]
    return _onednn.instead(node, recording.values, lean=lean)


def agree(result, expected):
    assert result.shape == expected.shape
    assert float((result - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_a_product_is_the_same_however_its_factors_lie(left, right, size, generator):
    height, depth, width = size
    a, b = LAYOUTS[left]((height, depth), generator), LAYOUTS[right]((depth, width), generator)
    call = chosen(aten.mm.default, a, b)
    assert call is not aten.mm.default
    agree(call(a, b), (a.double() @ b.double()).float())


@pytest.mark.parametrize("right", ["shared", *LAYOUTS])
@pytest.mark.parametrize("left", ["shared", *LAYOUTS])
def test_batches_are_the_same_and_a_shared_matrix_is_multiplied_once(left, right, generator, monkeypatch):
    calls = []
    single = _onednn._mm
    monkeypatch.setattr(_onednn, "_mm", lambda a, b: calls.append(1) or single(a, b))

    def factor(layout, shape):
        shared = random(1, *shape[1:], generator=generator).expand(shape)
        return shared if layout == "shared" else LAYOUTS[layout](shape, generator)

    a, b = factor(left, (3, 4, 6)), factor(right, (3, 6, 5))
    c = random(3, 4, 5, generator=generator)
    expected = (a.double() @ b.double()).float()
    call = chosen(aten.bmm.default, a, b)
    agree(call(a, b), expected)
    assert call(a, b).is_contiguous()
    assert len(calls) == 2 * (1 if "shared" in (left, right) else 3)
    sum_, alpha = c.clone(), 0.5
    result = chosen(aten.baddbmm_.default, c.clone(), a, b, alpha=alpha)(sum_, a, b, alpha=alpha)
    assert result is sum_
    agree(result, c + alpha * expected)


@pytest.mark.parametrize(
    ("function", "is_copied"),
    [(lambda x: x + 1, False), (lambda x: x.mul(2).view(12, 5), False), (lambda x: x.view(12, 5), True)],
)
def test_what_is_used_entry_by_entry_keeps_its_order_in_memory(function, is_copied, generator):
    a, b = random(1, 4, 6, generator=generator).expand(3, 4, 6), random(3, 6, 5, generator=generator)
    recording, _ = record(lambda a, b: [function(torch.bmm(a, b))], [a, b])
    (node,) = [node for node in recording.graph.nodes if node.target is aten.bmm.default]
    result = _onednn.instead(node, recording.values)(a, b)
    assert result.is_contiguous() == is_copied
    agree(result, torch.bmm(a, b))


@pytest.mark.parametrize("alpha", [1, -0.5])
def test_products_are_added_where_they_belong(alpha, generator):
    a, b, c = (random(*shape, generator=generator) for shape in ((4, 6), (6, 5), (4, 5)))
    expected = c + alpha * (a @ b)
    agree(chosen(aten.addmm.default, c, a, b, alpha=alpha)(c, a, b, alpha=alpha), expected)
    agree(chosen(aten.addmm.default, c[0], a, b)(c[0], a, b), c[0] + a @ b)
    into = c.clone()
    assert chosen(aten.addmm_.default, c.clone(), a, b, alpha=alpha)(into, a, b, alpha=alpha) is into
    agree(into, expected)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("piece", [1, 11, 1000])
@pytest.mark.parametrize("turned", [False, True])
def test_large_results_are_worked_out_piece_by_piece(piece, turned, lean, generator, monkeypatch):
    monkeypatch.setattr(_onednn, "WHOLE", 30)
    monkeypatch.setattr(_onednn, "LEAN_PIECE" if lean else "PIECE", piece)
    single, taken = _onednn._mm, []
    monkeypatch.setattr(_onednn, "_mm", lambda a, b: taken.append(a.shape[0] * b.shape[1]) or single(a, b))
    a, b, c = (random(*shape, generator=generator) for shape in ((7, 6), (6, 5), (7, 5)))
    a = a.t().contiguous().t() if turned else a
    for alpha in (1, -0.5):
        into = c.clone()
        call = chosen(aten.addmm_.default, c.clone(), a, b, alpha=alpha, lean=lean)
        assert call(into, a, b, alpha=alpha) is into
        agree(into, c + alpha * (a @ b))
    out = torch.empty(7, 5)
    assert (_onednn._LEAN if lean else _onednn._SINGLE)[aten.mm.out](a, b, out=out) is out
    agree(out, a @ b)
    assert max(taken) <= max(5, piece)
    assert sum(taken) == 3 * out.numel()


def test_small_results_are_whole_unless_memory_is_scarce(generator, monkeypatch):
    single, calls = _onednn._mm, []
    monkeypatch.setattr(_onednn, "_mm", lambda a, b: calls.append(1) or single(a, b))
    monkeypatch.setattr(_onednn, "LEAN_PIECE", 5)
    a, b, c = (random(*shape, generator=generator) for shape in ((7, 6), (6, 5), (7, 5)))
    chosen(aten.addmm_.default, c.clone(), a, b)(c.clone(), a, b)
    assert len(calls) == 1
    chosen(aten.addmm_.default, c.clone(), a, b, lean=True)(c.clone(), a, b)
    assert len(calls) == 1 + 7
    assert chosen(aten.bmm.default, a[None], b[None], lean=True) is aten.bmm.default


def test_other_products_are_left_to_torch(generator, monkeypatch):
    a, b, c = (random(*shape, generator=generator) for shape in ((4, 6), (6, 5), (4, 5)))
    assert chosen(aten.mm.default, a.double(), b.double()) is aten.mm.default
    assert chosen(aten.mm.default, a.bfloat16(), b.bfloat16()) is aten.mm.default
    assert chosen(aten.mm.default, a.to("meta"), b.to("meta")) is aten.mm.default
    assert chosen(aten.addmm.default, c, a, b, beta=2) is aten.addmm.default
    assert chosen(aten.mul.Tensor, a, a) is aten.mul.Tensor
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert chosen(aten.mm.default, a, b) is aten.mm.default
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
    monkeypatch.setattr(_onednn, "WORTH", 4 * 6 * 16)  # five columns take as long as 16
    assert chosen(aten.mm.default, a, b) is not aten.mm.default
    assert chosen(aten.mm.default, a[1:], b) is aten.mm.default
    monkeypatch.setattr(_onednn, "WORTH", 1)
    monkeypatch.setattr(_onednn, "NARROW", 5)
    assert chosen(aten.mm.default, a, b) is aten.mm.default
    assert chosen(aten.mm.default, b.t(), a.t()) is aten.mm.default
    assert chosen(aten.mm.default, b.t(), b) is not aten.mm.default


def test_a_processor_that_torch_serves_well_is_left_to_it(monkeypatch):
    monkeypatch.undo()
    _onednn.available.cache_clear()
    try:
        for processor in ({"avx512_f": True, "cpu_name": "Intel Xeon"}, {"avx512_f": False, "cpu_name": "AMD"}, {}):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cpu, "get_capabilities", lambda known=processor: known)
                assert not _onednn.available()
            _onednn.available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "AMD EPYC"})
            assert _onednn.available() == torch.backends.mkl.is_available()
    finally:
        _onednn.available.cache_clear()


@pytest.mark.parametrize("num_batches", [1, 3])
def test_a_whole_product_is_that_in_double_precision(num_batches, generator):
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    loss, params = hf.module_loss(model, nn.functional.mse_loss)
    data = [(random(9, 6, generator=generator), random(9, 5, generator=generator)) for _ in range(num_batches)]
    exact = hf.hessian(
        loss, {name: p.double() for name, p in params.items()}, [(x.double(), y.double()) for x, y in data]
    )
    H = hf.hessian(loss, params, data)
    rows = random(8, H.size, generator=seeded())
    expected = exact.rows(rows.double())
    for _ in range(12):  # one by one, then in lanes, into memory that is there
        assert float((H.rows(rows).to(F64) - expected).norm() / expected.norm()) < 1e-6
