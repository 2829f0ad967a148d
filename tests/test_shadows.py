"""Recording without memory: the same program as from a run in earnest, and no tensor without numbers gets about."""

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, relative_error, seeded
from test_linearize import NAMES, cases
from torch import nn

import hessfunc as hf
from hessfunc import tree
from hessfunc._linearize import Linearized
from hessfunc._recorder import NotRecordableError, record
from hessfunc._shadows import Shadow, ShadowError, Shadows


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def runs(monkeypatch):
    """How each recording was made: on shadows or not."""
    kinds = []
    original = Linearized.__init__

    def watched(self, *arguments, **options):
        kinds.append(options.get("on_shadows", False))
        original(self, *arguments, **options)

    monkeypatch.setattr(Linearized, "__init__", watched)
    return kinds


@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward])
@pytest.mark.parametrize("name", NAMES)
def test_products_without_memory_to_spare_are_the_eager_ones(name, product, runs):
    model, criterion, data = cases()[name]
    loss, params = hf.module_loss(model, criterion)
    H = hf.hessian(loss, params, data, memory_budget=0, product=product)
    vectors = torch.randn(5, H.size, dtype=H.dtype)
    expected = hf.hessian(loss, params, data, linearize=False).rows(vectors)
    for _ in range(6):  # the last in lanes
        assert relative_error(H.rows(vectors), expected) < 1e-12
    assert runs
    assert all(runs)


def test_a_recording_on_shadows_says_what_one_in_earnest_says():
    captured = torch.full((2, 3), 3.0, dtype=F64)

    def function(x, v):
        buffer = torch.zeros(2, 3, dtype=F64)
        buffer[0] += v
        first, second = (x * captured).split(2, dim=1)
        index = torch.tensor([1, 0])
        return [torch.cat([first, second], 1)[index] @ buffer.T, v.to(torch.float32).sum()]

    inputs = [torch.randn(2, 3, dtype=F64), torch.randn(3, dtype=F64)]
    (one, results), (other, shadows) = record(function, inputs), record(function, inputs, on_shadows=True)
    assert [node.target for node in one.graph.nodes] == [node.target for node in other.graph.nodes]
    assert list(one.values.values()) == list(other.values.values())
    assert list(one.storage.values()) == list(other.storage.values())
    assert [constant is captured for constant in other.constants.values()].count(True) == 1
    assert len(one.mutations) == len(other.mutations) > 0
    assert [(s.shape, s.dtype, s.device) for s in shadows] == [(r.shape, r.dtype, r.device) for r in results]


def test_shadows_hold_no_memory():
    large = Shadow(torch.empty(1 << 20, 1 << 20, device="meta"), torch.device("cpu"))  # 4 TB
    _, (result,) = record(lambda x: [(x @ x).sin() + x], [large], on_shadows=True)
    assert result.shape == large.shape
    assert result.device == torch.device("cpu")


def test_values_that_decide_are_refused_on_shadows_too():
    for function in (lambda x: [x * float(x.sum())], lambda x: [x if x.sum() > 0 else -x], lambda x: [x[x > 0]]):
        with pytest.raises(NotRecordableError, match="decide on shapes or on the way taken"):
            record(function, [torch.ones(3)], on_shadows=True)


def test_numbers_cannot_be_read_unseen():
    for read in (lambda x: x.numpy(), lambda x: x.tolist()):
        with pytest.raises((RuntimeError, TypeError, ShadowError)):
            record(lambda x, read=read: [x * torch.tensor(read(x))], [torch.ones(3)], on_shadows=True)


def test_changes_of_shape_in_place_are_refused():
    with pytest.raises(ShadowError, match="changes the shape of its argument"):
        Shadows().run(torch.ops.aten.unsqueeze_.default, (Shadow.of(torch.ones(3)), 0), {})


def test_what_is_carried_out_of_a_recording_says_so():
    carried = []
    record(lambda x: [carried.append(x * 2) or x], [torch.ones(3)], on_shadows=True)
    with pytest.raises(ShadowError, match="without numbers, which was made while the loss was being recorded"):
        carried[0] + 1


class Remembering(nn.Module):
    """Keeps what it makes at its first run on a length, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=F64))
        self.known = {}

    def forward(self, x):
        if len(x) not in self.known:
            self.known[len(x)] = torch.arange(len(x), dtype=F64).cos().unsqueeze(1)
        return (self.known[len(x)] * x * self.weight).sum(1)


def test_what_a_model_keeps_from_its_first_run_has_numbers(runs):
    model = Remembering()
    loss, params = hf.module_loss(model, F.mse_loss)
    data = [(torch.randn(n, 4, dtype=F64), torch.randn(n, dtype=F64)) for n in (3, 5, 7)]
    H = hf.hessian(loss, params, data, memory_budget=0)
    for _ in range(2):
        product = H.vector(torch.ones(4, dtype=F64))
    assert runs == [True] * 3
    whole = hf.hessian(loss, params, data, linearize=False)
    assert relative_error(product, whole.vector(torch.ones(4, dtype=F64))) < 1e-12
    assert all(float(known[0]) == 1 for known in model.known.values())


def test_what_fails_on_shadows_only_is_recorded_in_earnest(runs):
    def loss(w):
        # Under torch.func nothing can read numbers; what can tell a shadow stands for what fails on one.
        inner = w
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if isinstance(inner, Shadow):
            raise TypeError("no numbers")
        return (w**4).sum() / 12

    H = hf.hessian(loss, torch.arange(1.0, 4.0), memory_budget=0)
    torch.testing.assert_close(H.vector(torch.ones(3)), torch.tensor([1.0, 4.0, 9.0]))
    assert runs == [True, False]


def test_a_vector_without_curvature_does_not_decide():
    x = torch.randn(9, 4, generator=seeded(0), dtype=F64)
    params = {"bias": torch.zeros(4, dtype=F64), "weight": torch.eye(4, dtype=F64)}

    def loss(p):
        hidden = x @ p["weight"] + p["bias"]
        return F.gelu((hidden - hidden.mean(0)) / hidden.std(0)).pow(3).mean()

    H = hf.hessian(loss, params, memory_budget=0)
    flat = tree.Layout.of(params).ravel({"bias": torch.ones(4), "weight": torch.zeros(4, 4)}).double()
    assert float(H.vector(flat).norm()) < 1e-14
    assert float(H.vector(torch.ones(20, dtype=F64)).norm()) > 1e-3
