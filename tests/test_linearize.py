"""Partial evaluation: the traced product is the eager one, on every batch, and nothing stale is ever used."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, case, seeded
from torch import nn

import hessfunc as hf
from hessfunc import _linearize, _traced, _trial
from hessfunc._linearize import Linearized
from hessfunc._recorder import NotRecordableError, record
from hessfunc._traced import PATIENCE


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


def conv_net() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 4)).double()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.token(tokens))
        hidden[:, 0] = 2 * hidden[:, 0]  # writes in place, into memory that depends on the parameters
        return (hidden @ self.token.weight.T).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def images(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (num,))


def cases() -> dict[str, tuple[nn.Module, object, object]]:
    tokens = torch.randint(0, 11, (4, 6))
    sequences = torch.randn(4, 7, 5, dtype=torch.float64)
    return {
        "convolutions": (conv_net().eval(), F.cross_entropy, images(12)),
        "batch statistics": (conv_net().train(), F.cross_entropy, images(12)),
        "ragged batches": (conv_net().eval(), F.cross_entropy, [images(5), images(5), images(3)]),
        "attention, tied": (Attention().double().eval(), F.cross_entropy, (tokens, tokens)),
        "recurrent": (Recurrent().double(), F.cross_entropy, (sequences, torch.randint(0, 4, (4,)))),
        "mean squared error": (nn.Linear(5, 5).double(), F.mse_loss, (sequences, sequences.roll(1))),
    }


NAMES = ["convolutions", "batch statistics", "ragged batches", "attention, tied", "recurrent", "mean squared error"]


@pytest.mark.parametrize("name", NAMES)
def test_replayed_products_are_the_eager_ones(name):
    model, criterion, data = cases()[name]
    loss, params = hf.module_loss(model, criterion)
    H = hf.hessian(loss, params, data)
    eager = hf.hessian(loss, params, data, linearize=False)
    vectors = torch.randn(5, H.size, dtype=H.dtype)
    expected = eager.rows(vectors)
    for _ in range(4):  # traced, replayed one by one, then in lanes
        assert relative(H.rows(vectors), expected) < 1e-12
    assert relative(torch.func.vmap(H.vector)(vectors), expected) < 1e-12


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward])
def test_every_product_can_be_traced(product):
    model, criterion, data = cases()["convolutions"]
    loss, params = hf.module_loss(model, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ProductWarning)
        H = hf.hessian(loss, params, data, product=product)
        v = torch.randn(H.size, dtype=H.dtype)
        H.vector(v)
        assert relative(H.vector(v), hf.hessian(loss, params, data, linearize=False).vector(v)) < 1e-12


def counting(loss):
    calls = []

    def counted(params, *batch):
        calls.append(tuple(b.shape for b in batch))
        return loss(params, *batch)

    return counted, calls


def test_one_trace_serves_all_batches_of_a_shape():
    def loss(w, x):
        return ((x @ w) ** 4).mean()

    counted, calls = counting(loss)
    batches = [(torch.randn(6, 3),) for _ in range(5)] + [(torch.randn(2, 3),)]
    H = hf.hessian(counted, torch.randn(3), batches, check=False)  # which evaluates the loss on its own
    calls.clear()
    for _ in range(4):
        H.vector(torch.randn(3))
    assert sorted(calls) == [((2, 3),), ((6, 3),)]


@pytest.fixture
def evaluated(monkeypatch):
    """Which programs run: "primal", "tangent" or "all" in one."""
    names = {"residuals": "primal", "apply": "tangent", "apply_once": "all"}
    counts = Counter()

    def watched(method, name):
        original = getattr(Linearized, method)

        def counted(self, *inputs):
            counts[name] += 1
            return original(self, *inputs)

        return counted

    for method, name in names.items():
        monkeypatch.setattr(Linearized, method, watched(method, name))
    return counts


@pytest.mark.parametrize(
    ("budget", "num", "stable", "expected"),
    [
        (None, 1, True, {"tangent": 3}),
        (1 << 30, 2, True, {"tangent": 6}),
        (0, 1, True, {"all": 3}),
        (0, 2, True, {"all": 6}),
        (None, 1, False, {"all": 3}),
        (None, 2, False, {"primal": 3, "tangent": 6}),  # shared within the pass
        (0, 2, False, {"all": 6}),
    ],
)
def test_residuals_are_kept_within_the_budget(evaluated, budget, num, stable, expected):
    params = torch.randn(3, dtype=torch.float64)
    batches = [(torch.randn(6, 3, dtype=torch.float64),) for _ in range(3)]
    data = batches if stable else torch.utils.data.DataLoader(torch.cat([b for (b,) in batches]), batch_size=6)

    def loss(w, x):
        return ((x @ w) ** 4).mean()

    H = hf.hessian(loss, params, data, memory_budget=budget, chunk_size=1)
    vectors = torch.randn(num, 3, dtype=torch.float64)
    expected_product = hf.hessian(loss, params, batches, linearize=False).rows(vectors)
    for _ in range(2):
        assert relative(H.rows(vectors), expected_product) < 1e-12
    evaluated.clear()
    assert relative(H.rows(vectors), expected_product) < 1e-12
    assert dict(evaluated) == expected


@pytest.mark.parametrize("changed", ["params", "data", "captured"])
def test_residuals_kept_are_not_used_after_a_change_in_place(changed):
    params = {"w": torch.randn(3, dtype=torch.float64)}
    x = torch.randn(6, 3, dtype=torch.float64)
    captured = torch.ones(3, dtype=torch.float64)

    def loss(p, x):
        return ((x @ (captured * p["w"])) ** 4).mean()

    H = hf.hessian(loss, params, (x,))
    v = torch.randn(3, dtype=torch.float64)
    for _ in range(3):
        before = H.vector(v)
    {"params": params["w"], "data": x, "captured": captured}[changed].mul_(2)
    after = H.vector(v)
    assert relative(after, hf.hessian(loss, params, (x,), linearize=False).vector(v)) < 1e-12
    assert relative(after, before) > 1


def quartic(p, x):
    return ((x @ p) ** 4).mean()


@pytest.mark.parametrize("as_list", [False, True])
def test_another_shape_in_the_same_tensor_is_noticed(as_list):
    p, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    batch = (torch.randn(6, 3, dtype=torch.float64),)
    H = hf.hessian(quartic, p, [batch] if as_list else batch)
    for _ in range(2):
        H.vector(v)
    batch[0].data = torch.randn(4, 3, dtype=torch.float64)
    assert relative(H.vector(v), hf.hessian(quartic, p, batch, linearize=False).vector(v)) < 1e-12


def test_another_batch_in_its_place_is_noticed():
    p, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    batches = [(torch.randn(6, 3, dtype=torch.float64),) for _ in range(2)]
    H = hf.hessian(quartic, p, batches)
    for _ in range(2):
        H.vector(v)
    batches[1] = (torch.randn(6, 3, dtype=torch.float64),)
    assert relative(H.vector(v), hf.hessian(quartic, p, batches, linearize=False).vector(v)) < 1e-12


def test_batches_of_a_loader_are_let_go():
    class Loader:
        def __iter__(self):
            for seed in range(3):
                x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                made.append(weakref.ref(x))
                yield (x,)

    made = []
    H = hf.hessian(quartic, torch.randn(3, dtype=torch.float64), Loader())
    for _ in range(2):
        H.vector(torch.randn(3, dtype=torch.float64))
    assert len(made) >= 6
    assert all(reference() is None for reference in made)


def test_value_dependent_python_falls_back_loudly():
    def loss(p, x):
        value = (p * x).sum() ** 2
        return value * 2 if value > 1 else value

    p, x = torch.full((3,), 2.0), torch.ones(3)
    H = hf.hessian(loss, p, (x,))
    with pytest.warns(hf.ProductWarning, match="cannot be traced .the values of a tensor decide"):
        assert torch.allclose(H.vector(torch.ones(3)), torch.full((3,), 12.0))
    small = hf.hessian(loss, p / 100, (x,))
    with pytest.warns(hf.ProductWarning, match="slower and otherwise the same"):
        assert torch.allclose(small.vector(torch.ones(3)), torch.full((3,), 6.0))


def test_random_loss_is_refused():
    loss, params = hf.module_loss(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)), F.mse_loss)
    H = hf.hessian(loss, params, (torch.randn(8, 4), torch.randn(8, 2)))
    with pytest.raises(ValueError, match=r"not deterministic.*model\.eval\(\)"):
        H.vector(torch.randn(H.size))


def test_randomness_fixed_inside_the_loss_is_accepted_eagerly():
    def loss(p, x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mask = torch.rand(3) > 0.5
        return ((p * x * mask) ** 4).sum()

    H = hf.hessian(loss, torch.ones(3), (torch.ones(3),))
    with pytest.warns(hf.ProductWarning, match="draws random numbers"):
        first = H.vector(torch.ones(3))
    assert torch.equal(first, H.vector(torch.ones(3)))


def test_batches_with_what_cannot_be_compared_run_eagerly():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

    def loss(p, x, scale):
        return scale.factor * ((p * x) ** 2).sum() / 2

    batches = [(torch.ones(3), Scale(1.0)), (torch.ones(3), Scale(3.0))]
    H = hf.hessian(loss, torch.ones(3), batches, reduction="sum")
    for _ in range(3):
        assert torch.allclose(H.vector(torch.ones(3)), torch.full((3,), 4.0))


def test_python_numbers_in_a_batch_are_part_of_what_is_traced():
    def loss(p, x, factor):
        return factor * ((p * x) ** 2).sum() / 2

    H = hf.hessian(loss, torch.ones(3), [(torch.ones(3), 1.0), (torch.ones(3), 3.0)], reduction="sum")
    for _ in range(3):
        assert torch.allclose(H.vector(torch.ones(3)), torch.full((3,), 4.0))


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize(
    "model", [conv_net, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()]
)
def test_pieces_are_written_to_one_result(model, chunk_size):
    """Each where it ends up, and nothing of it is touched again by later products."""
    model = model().eval()
    inputs = torch.randn(6, 3, 8, 8).double() if isinstance(model[0], nn.Conv2d) else torch.randn(6, 4).double()
    loss, params = hf.module_loss(model, F.cross_entropy)
    batches = [(inputs, torch.tensor([0, 1, 2, 0, 1, 2])), (inputs[:4], torch.tensor([2, 1, 0, 0]))]
    for data in (batches[0], batches):
        H = hf.hessian(loss, params, data, chunk_size=chunk_size)
        vectors = torch.randn(5, H.size).double()
        expected = torch.stack([H.vector(vector) for vector in vectors])
        found = [H.rows(vectors) for _ in range(PATIENCE + 3)]
        assert all(relative(rows, expected) < 1e-12 for rows in found)
        assert H.rows(vectors[:0]).shape == (0, H.size)


def test_most_of_a_product_is_computed_in_place():
    """A result that parts are joined to in the end would exist twice."""
    loss, params = hf.module_loss(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), F.cross_entropy)
    H = hf.hessian(loss, params, (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), chunk_size=1)
    vectors = torch.randn(3, H.size)
    H.rows(vectors)
    joined = Counter()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= H.size:
                joined[func] += 1
            return result

    with Watch():
        H.rows(vectors)
    assert torch.ops.aten.cat.default not in joined


def test_lanes_follow_chunk_size():
    sizes = []

    def loss(w, x):
        return ((x @ w) ** 4).mean()

    H = hf.hessian(loss, torch.randn(3), (torch.randn(6, 3),), chunk_size=2)
    vectors = torch.randn(7, 3)
    expected = H.rows(vectors)
    original = Linearized.apply

    def watched(self, primals, residuals, tangent, out=None):
        sizes.append(tangent.shape[0])
        return original(self, primals, residuals, tangent, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linearized, "apply", watched)
        for _ in range(PATIENCE + 1):
            assert torch.allclose(H.rows(vectors), expected, rtol=1e-4)
        assert sizes[:7] == [1] * 7  # not worth a program of its own yet
        sizes.clear()
        assert torch.allclose(H.rows(vectors), expected, rtol=1e-4)
    assert sizes == [2, 2, 2, 1]


def test_lanes_are_powers_of_two_and_all_rows_come_in_order():
    H = hf.hessian(lambda w: (w**4).sum() / 12, torch.arange(1.0, 4.0), chunk_size=8)
    for count in (1, 13, 13, 13, 13, 13, 13, 21, 6):
        vectors = torch.arange(3.0 * count).reshape(count, 3)
        torch.testing.assert_close(H.rows(vectors), vectors * torch.tensor([1.0, 4.0, 9.0]))


def test_recorder_refuses_writes_into_inputs():
    def function(x, v):
        x.add_(1)
        return [x * v]

    with pytest.raises(NotRecordableError, match="writes into a parameter, the batch or a captured tensor"):
        Linearized(lambda x, v: function(x, v)[0], [torch.ones(2)], torch.ones(2))


def test_memory_written_for_one_tangent_is_not_seen_by_the_next():
    def function(x, v):
        buffer = torch.zeros(3)
        buffer[:2] += x
        buffer[1:] += v
        return buffer * 2

    program = Linearized(function, [torch.tensor([1.0, 2.0])], torch.tensor([5.0, 7.0]))
    primals = [torch.tensor([3.0, 4.0])]
    residuals = program.residuals(primals)
    for tangent in (torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])):
        assert torch.equal(program.apply(primals, residuals, tangent), function(*primals, tangent))


def test_value_read_before_a_write_keeps_the_old_value():
    def function(x, v):
        state = x.clone()
        first = state * v
        state.mul_(10)
        return first + state

    program = Linearized(function, [torch.ones(2)], torch.ones(2))
    primals = [torch.tensor([3.0, 4.0])]
    residuals = program.residuals(primals)
    for tangent in (torch.ones(2), 2 * torch.ones(2)):
        assert torch.equal(program.apply(primals, residuals, tangent), function(*primals, tangent))


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_after_a_recording(enabled):
    was, seen = gc.isenabled(), []

    def function(a, t):
        seen.append(gc.isenabled())
        return float(t.sum()) * t if len(seen) > 1 else t * a

    try:
        (gc.enable if enabled else gc.disable)()
        Linearized(function, [torch.ones(3)], torch.ones(3))
        assert gc.isenabled() == enabled
        with pytest.raises(NotRecordableError):
            Linearized(function, [torch.ones(3)], torch.ones(3))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == [False, False]


def test_record_reports_what_it_saw():
    captured = torch.full((2,), 3.0)
    recording, results = record(lambda x: [x * captured], [torch.ones(2)])
    assert torch.equal(results[0], captured)
    assert next(iter(recording.constants.values())) is captured
    assert len(recording.inputs) == len(recording.outputs) == 1
    assert recording.elements == [2]
    assert recording.random == []


@pytest.mark.parametrize("kind", ["identity", "zero"])
def test_results_have_memory_of_their_own(kind):
    losses = {"identity": lambda p: p.square().sum() / 2, "zero": lambda p: p.sum()}
    H = hf.hessian(losses[kind], torch.ones(3))
    v = torch.ones(3)
    expected = v.clone() if kind == "identity" else torch.zeros(3)
    for _ in range(3):
        result = H.vector(v)
        assert torch.equal(result, expected)
        result.add_(7)
        assert torch.equal(v, torch.ones(3))


@pytest.mark.slow
def test_compiled_products_are_the_eager_ones():
    model, criterion, data = cases()["convolutions"]
    loss, params = hf.module_loss(model, criterion)
    H = hf.hessian(loss, params, data, compile=True)
    v = torch.randn(H.size, dtype=H.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ProductWarning)
        for _ in range(2):
            assert relative(H.vector(v), hf.hessian(loss, params, data, linearize=False).vector(v)) < 1e-12


def test_a_vector_without_curvature_is_no_reason_to_give_up():
    """The bias before a normalization: its product is rounding error, which replaying rounds otherwise."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = {"bias": torch.zeros(4, dtype=torch.float64), "weight": torch.eye(4, dtype=torch.float64)}

    def loss(p):
        hidden = x @ p["weight"] + p["bias"]
        hidden = (hidden - hidden.mean(0)) / hidden.std(0)
        return torch.nn.functional.gelu(hidden).pow(3).mean()

    H = hf.hessian(loss, params)
    flat = torch.cat([torch.ones(4), torch.zeros(16)]).double()
    assert float(H.vector(flat).norm()) < 1e-14  # the first product, so the one that is traced
    assert float(H.vector(flat).norm()) < 1e-14
    assert float(H.vector(torch.ones(20).double()).norm()) > 1e-3


def test_operations_that_want_their_memory_in_order_get_it(generator):
    """The backward pass of a loss over (batch, classes, time) takes no other layout than the recorded one."""
    x, y = torch.randn(2, 5, 3, generator=generator), torch.randint(0, 4, (2, 5), generator=generator)
    params = {"w": torch.randn(3, 4, generator=generator), "b": torch.zeros(4)}

    def loss(p):
        return F.cross_entropy(F.layer_norm(x @ p["w"] + p["b"], (4,)).transpose(1, 2), y)

    reference = hf.hessian(loss, params, linearize=False).dense()
    for product in (hf.hvp, hf.hvp_reverse_over_forward):
        H = hf.hessian(loss, params, product=product)
        for _ in range(2):
            torch.testing.assert_close(H.dense(), reference, rtol=1e-4, atol=1e-6)


class TestWithoutChecks:
    """With many parameters and ``check=False`` nothing runs for the recording, and nothing is compared."""

    @pytest.fixture(autouse=True)
    def _every_size_is_large(self, monkeypatch):
        monkeypatch.setattr(_traced, "MANY", 1)

    @staticmethod
    def batch():
        return (torch.randn(6, 3, dtype=torch.float64),)

    @pytest.mark.parametrize("num", [1, 3])
    def test_products_are_right_and_not_compared(self, num, monkeypatch):
        compared = []
        replayed = _traced.replayed
        monkeypatch.setattr(_traced, "replayed", lambda *a: compared.append(1) or replayed(*a))
        p, batches = torch.randn(3, dtype=torch.float64), [self.batch(), self.batch()]
        rows = torch.randn(num, 3, dtype=torch.float64)
        expected = hf.hessian(quartic, p, batches, linearize=False).rows(rows)
        H = hf.hessian(quartic, p, batches, check=False)
        for _ in range(2):
            assert relative(H.rows(rows), expected) < 1e-12
        assert relative(H.at(2 * p).rows(rows), 4 * expected) < 1e-12
        assert not compared
        assert relative(hf.hessian(quartic, p, batches).rows(rows), expected) < 1e-12
        assert compared

    def test_few_parameters_are_compared(self, monkeypatch):
        monkeypatch.setattr(_traced, "MANY", 4)
        monkeypatch.setattr(_trial.Trial, "unseen", lambda *_: pytest.fail("recorded unseen"))
        p = torch.randn(3, dtype=torch.float64)
        hf.hessian(quartic, p, self.batch(), check=False).vector(p)

    def test_what_the_loss_keeps_of_its_first_run_has_numbers(self):
        kept = {}

        def loss(p, x):
            mask = kept.setdefault(len(x), torch.ones(len(x), dtype=torch.float64))  # as models keep causal masks
            return ((x @ p) ** 4 * mask).mean()

        p, batches = torch.randn(3, dtype=torch.float64), [self.batch(), (torch.randn(4, 3, dtype=torch.float64),)]
        product = hf.hessian(loss, p, batches, check=False).vector(p)
        assert relative(product, hf.hessian(quartic, p, batches).vector(p)) < 1e-12
        assert all(bool(torch.isfinite(loss(p, *batch))) for batch in batches)

    def test_what_cannot_be_recorded_goes_the_usual_way(self):
        def loss(p, x):
            value = ((x @ p) ** 4).mean()
            return value * 2 if value > 0 else value

        p, batch = torch.randn(3, dtype=torch.float64), self.batch()
        with pytest.warns(hf.ProductWarning, match="decide"):
            product = hf.hessian(loss, p, batch, check=False).vector(p)
        assert relative(product, 2 * hf.hessian(quartic, p, batch).vector(p)) < 1e-12

    def test_random_losses_are_refused(self):
        H = hf.hessian(
            lambda p, x: ((torch.rand(6, 3) * x @ p) ** 4).mean(), torch.ones(3), (torch.ones(6, 3),), check=False
        )
        with pytest.raises(ValueError, match="not deterministic"):
            H.vector(torch.ones(3))

    def test_what_is_not_finite_is_told(self):
        H = hf.hessian(lambda p: (p.abs() ** 0.5).sum(), torch.zeros(3), check=False)
        with pytest.raises(hf.NonFiniteError):
            H.vector(torch.ones(3))


def raising(*_, **__):
    raise KeyError("a node")


@pytest.mark.parametrize("stage", ["reassociate", "thrifty", "lowered"])
@pytest.mark.parametrize("budget", [None, 0])
def test_a_fault_in_rewriting_costs_time_and_is_told(monkeypatch, stage, budget):
    loss, params, batch = case("mlp tanh")[:3]
    expected, found = [], []
    for results in (expected, found):
        H = hf.hessian(loss, params, batch, memory_budget=budget)
        v = torch.randn(H.size, generator=seeded(1), dtype=F64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", hf.ProductWarning)
            results += [H.vector(v), H.vector(v)]
        monkeypatch.setattr(_linearize, stage, raising)
    assert all(relative(one, expected[0]) < 1e-12 for one in found)
    assert [w.category for w in caught] == [hf.ProductWarning]
    assert all(re.search("not rewritten to do less.*KeyError.*please report", str(w.message)) for w in caught)


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_errors_of_the_loss_come_as_they_are(error):
    def loss(_w, _x):
        raise error("no such thing")

    with pytest.raises(error, match="no such thing"):
        hf.hessian(loss, torch.ones(3), (torch.ones(1),), check=False).vector(torch.ones(3))
