"""Modules as pure functions: the right parameters, and nothing of the user's model changed."""

import copy

import pytest
import torch
from helpers import F64, relative_error, seeded
from torch import nn

import hessfunc as hf


def build(factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().double()


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(8, 3)
    )


IMAGES = torch.randn(4, 1, 4, 4, generator=seeded(1), dtype=F64)
CLASSES = torch.tensor([0, 2, 1, 1])


class Snapshot:
    """All that a user could notice of a model: modes, values, identities, gradients, hooks, attributes."""

    def __init__(self, model):
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.identities = {k: id(t) for k, t in [*model.named_parameters(), *model.named_buffers()]}
        self.gradients = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
        self.trainable = {k: p.requires_grad for k, p in model.named_parameters()}
        self.modes = {k: m.training for k, m in model.named_modules()}
        self.hooks = {
            k: [len(getattr(m, name)) for name in vars(m) if name.endswith("_hooks")] for k, m in model.named_modules()
        }
        self.attributes = {k: sorted(vars(m)) for k, m in model.named_modules()}
        self.random_state = torch.random.get_rng_state()
        self.versions = {k: t._version for k, t in [*model.named_parameters(), *model.named_buffers()]}

    def assert_unchanged(self):
        now = Snapshot(self.model)
        assert now.identities == self.identities
        assert now.modes == self.modes
        assert now.trainable == self.trainable
        assert now.hooks == self.hooks
        assert now.attributes == self.attributes
        assert now.versions == self.versions
        assert torch.equal(now.random_state, self.random_state)
        for name, tensor in self.state.items():
            assert torch.equal(now.state[name], tensor), name
        for name, gradient in self.gradients.items():
            assert (gradient is None) == (now.gradients[name] is None), name
            assert gradient is None or torch.equal(now.gradients[name], gradient), name


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_of_the_model_changes(train, gradients):
    model = build(convolutional).train(train)
    model[0].bias.requires_grad_(False)
    model[1].eval()  # a mode of its own
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    if gradients:
        nn.functional.cross_entropy(model(IMAGES), CLASSES).backward()
    before = Snapshot(model)
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    v = {name: torch.ones_like(p) for name, p in params.items()}
    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        product(loss, params, v, IMAGES, CLASSES)
    H = hf.hessian(loss, params, [(IMAGES, CLASSES), (IMAGES[:3], CLASSES[:3])])
    H(v)
    H.dense()
    torch.func.vmap(lambda x: hf.lanczos(H.vector, x, 2))(torch.eye(H.size, dtype=F64)[:3])
    before.assert_unchanged()
    assert calls, "the user's hooks run"


def test_train_mode_batch_norm_keeps_its_running_statistics_and_product():
    model = build(convolutional).train()
    before = Snapshot(model)
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    v = {name: torch.ones_like(p) for name, p in params.items()}
    first = hf.hvp(loss, params, v, IMAGES, CLASSES)
    second = hf.hvp(loss, params, v, IMAGES, CLASSES)
    before.assert_unchanged()
    assert relative_error(second, first) == 0
    evaluated = hf.hvp(*hf.module_loss(model.eval(), nn.CrossEntropyLoss()), v, IMAGES, CLASSES)
    assert relative_error(evaluated, first) > 0.1, "train mode normalizes by the batch, eval mode by the statistics"


def test_the_mode_at_the_time_of_the_call_counts():
    model = build(convolutional).train()
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    trained = loss(params, IMAGES, CLASSES)
    model.eval()
    assert not torch.isclose(loss(params, IMAGES, CLASSES), trained)


def test_nothing_changes_when_the_loss_raises():
    model = build(convolutional).train()
    before = Snapshot(model)

    def criterion(_output, _target):
        raise ArithmeticError("the user's own")

    loss, params = hf.module_loss(model, criterion)
    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        with pytest.raises(ArithmeticError, match=r"^the user's own$"):
            product(loss, params, params, IMAGES, CLASSES)
    with pytest.raises(ArithmeticError):
        hf.hessian(loss, params, (IMAGES, CLASSES))
    wrong = torch.zeros(2, 7, dtype=F64)
    with pytest.raises(RuntimeError, match="conv2d"):
        hf.hvp(loss, params, params, wrong, CLASSES)
    before.assert_unchanged()


def test_parameters_are_detached_copies():
    model = build(lambda: nn.Linear(2, 3))
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    x, y = torch.ones(1, 2, dtype=F64), torch.tensor([1])
    before = loss(params, x, y)
    assert set(params) == {"weight", "bias"}
    assert not any(p.requires_grad or isinstance(p, nn.Parameter) for p in params.values())
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(loss(params, x, y), before), "training on does not move them"
    with torch.no_grad():
        params["weight"].mul_(2.0)
    assert not torch.equal(loss(params, x, y), before)
    assert not torch.equal(model.weight, params["weight"])


def test_buffers_are_copies_too():
    model = build(convolutional).eval()
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    before = loss(params, IMAGES, CLASSES)
    with torch.no_grad():
        model[1].running_var.mul_(9)
    assert torch.equal(loss(params, IMAGES, CLASSES), before)


def test_tied_weights_appear_once_and_count_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = build(Tied)
    loss, params = hf.module_loss(model, nn.MSELoss())
    assert list(params) == ["first.weight"]
    x, y = torch.randn(2, 3, generator=seeded(2), dtype=F64), torch.zeros(2, 3, dtype=F64)
    v = {"first.weight": torch.ones(3, 3, dtype=F64)}

    def explicit(w):
        return (torch.tanh(x @ w["first.weight"].T) @ w["first.weight"].T).square().mean()

    assert relative_error(hf.hvp(loss, params, v, x, y), hf.hvp(explicit, params, v)) < 1e-12


def test_a_module_used_twice_appears_once():
    shared = nn.Linear(3, 3)
    model = build(lambda: nn.Sequential(shared, nn.Tanh(), shared))
    _, params = hf.functionalize(model)
    assert list(params) == ["0.weight", "0.bias"]


def test_frozen_parameters_are_constants_and_follow_the_module():
    model = build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    model[0].requires_grad_(False)
    loss, params = hf.module_loss(model, nn.MSELoss())
    assert list(params) == ["2.weight", "2.bias"]
    x, y = torch.ones(3, 2, dtype=F64), torch.zeros(3, 1, dtype=F64)
    hidden = torch.tanh(model[0](x)).detach()

    def explicit(p):
        return (hidden @ p["2.weight"].T + p["2.bias"]).square().mean()

    v = {name: torch.ones_like(p) for name, p in params.items()}
    assert relative_error(hf.hvp(loss, params, v, x, y), hf.hvp(explicit, params, v)) < 1e-12


def test_unused_parameters_have_zero_curvature():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(2, 1)
            self.unused = nn.Linear(5, 5)

        def forward(self, x):
            return self.used(x)

    model = build(Partial)
    loss, params = hf.module_loss(model, nn.MSELoss())
    v = {name: torch.ones_like(p) for name, p in params.items()}
    result = hf.hvp(loss, params, v, torch.ones(1, 2, dtype=F64), torch.zeros(1, 1, dtype=F64))
    assert {name: bool((leaf == 0).all()) for name, leaf in result.items()} == {
        "used.weight": False,
        "used.bias": False,
        "unused.weight": True,
        "unused.bias": True,
    }


def test_several_inputs_go_before_the_target():
    model = build(lambda: nn.Bilinear(2, 3, 1))
    loss, params = hf.module_loss(model, nn.MSELoss())
    a, b, y = torch.ones(4, 2, dtype=F64), torch.ones(4, 3, dtype=F64), torch.zeros(4, 1, dtype=F64)
    assert torch.equal(loss(params, a, b, y), nn.functional.mse_loss(model(a, b), y))


def test_functionalize_takes_keyword_arguments_and_returns_the_modules_own_output():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, *, inputs, labels):
            logits = self.layer(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = build(Output)
    call, params = hf.functionalize(model)
    batch = {"inputs": torch.eye(2, dtype=F64), "labels": torch.tensor([1, 0])}
    assert torch.equal(call(params, **batch)["loss"], model(**batch)["loss"])
    H = hf.hessian(lambda p, batch: call(p, **batch)["loss"], params, batch)
    assert H.size == 6


def test_parametrized_weights_are_functions_of_their_originals():
    model = build(lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))))
    before = Snapshot(model)
    loss, params = hf.module_loss(model, nn.CrossEntropyLoss())
    assert sorted(params) == ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    v = {name: torch.ones_like(p) for name, p in params.items()}
    x, y = torch.randn(4, 3, generator=seeded(3), dtype=F64), torch.tensor([0, 1, 1, 0])

    def explicit(p):
        direction = p["0.parametrizations.weight.original1"]
        norm = direction.square().sum(1, keepdim=True).sqrt()
        weight = p["0.parametrizations.weight.original0"] * direction / norm
        return nn.functional.cross_entropy(x @ weight.T + p["0.bias"], y)

    assert relative_error(hf.hvp(loss, params, v, x, y), hf.hvp_double_backward(explicit, params, v)) < 1e-12
    before.assert_unchanged()


def test_an_ensemble_of_modules_is_a_batch_of_parameters():
    models = [build(lambda i=i: nn.Sequential(nn.Linear(2, 3 + 0 * i), nn.Tanh(), nn.Linear(3, 1))) for i in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            model[0].weight.mul_(1 + i)
    loss, _ = hf.module_loss(models[0], nn.MSELoss())
    stacked = {k: p.detach() for k, p in torch.func.stack_module_state(models)[0].items()}
    x, y = torch.randn(4, 2, generator=seeded(4), dtype=F64), torch.zeros(4, 1, dtype=F64)
    v = {name: torch.ones_like(p[0]) for name, p in stacked.items()}
    together = torch.func.vmap(lambda p: hf.hvp(loss, p, v, x, y))(stacked)
    for i, model in enumerate(models):
        own, params = hf.module_loss(model, nn.MSELoss())
        alone = hf.hvp(own, params, v, x, y)
        assert relative_error({k: t[i] for k, t in together.items()}, alone) < 1e-12


def test_what_cannot_be_made_functional_says_why():
    linear = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"model is of type function, expected an nn.Module; a plain function needs no"):
        hf.functionalize(lambda x: x)
    with pytest.raises(TypeError, match=r"model is wrapped in DataParallel; pass the bare module, model.module"):
        hf.functionalize(nn.DataParallel(linear))
    with pytest.raises(TypeError, match=r"criterion is of type str, expected a callable \(output, target\)"):
        hf.module_loss(linear, "mse")
    with pytest.raises(ValueError, match=r"no trainable parameter.*Unfreeze those to analyze"):
        hf.functionalize(nn.Linear(2, 1).requires_grad_(False))
    with pytest.raises(ValueError, match=r"no trainable parameter"):
        hf.functionalize(nn.ReLU())
    loss, params = hf.module_loss(linear, nn.MSELoss())
    with pytest.raises(TypeError, match=r"inputs and a target, got 1 item\(s\).*hessfunc.functionalize\(model\)"):
        loss(params, torch.ones(1, 2))


def test_a_scripted_module_is_refused():
    scripted = torch.jit.script(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"model is a ScriptModule, which torch.func cannot run; pass the original"):
        hf.functionalize(scripted)
