"""The traps of torch.func and of real models: each works, or says what is wrong and what to do. One test a trap.

The trusted references share no code with hessfunc: central differences of a gradient from torch's own tape, a dense
Hessian by ``torch.autograd.functional.hessian``, or the same function written by hand.
"""

import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hessfunc as hf
from hessfunc import _probes, tree
from hessfunc._explain import explained
from hessfunc._traced import PATIENCE

PRODUCTS = [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward]
FORWARD = PRODUCTS[:2]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


X, Y = randn(11, 3), randn(11, 2, seed=1)
W = randn(3, 2, seed=2)


def mean_loss(w, x, y):
    return (torch.tanh(x @ w) - y).square().mean()


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def by_differences(loss, params, v, step=1e-5):
    """``H v`` by central differences of gradients on torch's tape."""

    def gradient(p):
        leaves, spec = tree.flatten(p)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        with sdpa_kernel(SDPBackend.MATH):
            slopes = torch.autograd.grad(loss(tree.unflatten(leaves, spec)), leaves, materialize_grads=True)
        return tree.unflatten(list(slopes), spec)

    ahead, behind = (gradient(tree.map_leaves(lambda p, t, s=s: p + s * t, params, v)) for s in (step, -step))
    return tree.map_leaves(lambda a, b: (a - b) / (2 * step), ahead, behind)


def assert_right(loss, params, *batch, products=PRODUCTS, reference=None, tolerance=1e-7):
    """Every product, and the operator from its trace, agree with the reference."""
    v = randn_like(params, seeded(9))
    if reference is None:
        reference = by_differences(lambda p: loss(p, *batch), params, v)
    for product in products:
        assert relative_error(product(loss, params, v, *batch), reference) < tolerance, product.__name__
        H = hf.hessian(loss, params, batch, product=product)
        for _ in range(2):
            assert relative_error(H(v), reference) < tolerance, product.__name__


def assert_refused(text, loss, params, *batch, products=PRODUCTS, error=NotImplementedError):
    for product in products:
        with pytest.raises(error, match=text):
            product(loss, params, tree.map_leaves(torch.ones_like, params), *batch)
        with pytest.raises(error, match=text):
            hf.hessian(loss, params, batch, product=product)(params)


def assert_goes_on(text, loss, params, *batch, by="hvp_double_backward"):
    """The operator warns once, at its first product, and then is right, however vectors come in."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf.ProductWarning)
        reference = hf.hessian(loss, params, batch, product=getattr(hf, by)).dense()
    vectors = randn(5, *reference.shape[:1], seed=9)
    v = tree.Layout.of(params).unravel(vectors[0])
    assert (
        relative_error(
            hf.tree.Layout.of(params).ravel(by_differences(lambda p: loss(p, *batch), params, v)),
            reference @ vectors[0],
        )
        < 1e-6
    )
    for options in ({}, {"linearize": False}, {"memory_budget": 0}, {"check": False}):
        H = hf.hessian(loss, params, batch, **options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                assert relative_error(H.vector(vectors[0]), reference @ vectors[0]) < 1e-9
            for _ in range(PATIENCE + 1):
                assert relative_error(H.rows(vectors), vectors @ reference) < 1e-9
            assert relative_error(torch.func.vmap(H.vector)(vectors), vectors @ reference) < 1e-9
            moved = H.at(tree.scale(0.5, params)).vector(vectors[0])
        (warning,) = seen
        assert warning.category is hf.ProductWarning
        told = rf"{text}.*go on with hessfunc\.{by}, which is slower .* jvp.*, or pass product=hessfunc\.{by}"
        assert re.search(told, str(warning.message))
        there = hf.hessian(loss, tree.scale(0.5, params), batch, product=getattr(hf, by)).vector(vectors[0])
        assert relative_error(moved, there) < 1e-9


# Losses


def test_mse_with_mean_reduction():
    assert_right(lambda w, x, y: nn.MSELoss()(torch.tanh(x @ w), y), W, X, Y)


def test_huber():
    assert_right(lambda w, x, y: F.huber_loss(x @ w, y, delta=0.5), W, X, Y, tolerance=1e-6)


def test_sum_reduction_over_ragged_batches():
    data = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]
    H = hf.hessian(lambda w, x, y: (torch.tanh(x @ w) - y).square().sum(), W, data, reduction="sum")
    exact = torch.autograd.functional.hessian(lambda w: (torch.tanh(X @ w) - Y).square().sum(), W).reshape(6, 6)
    assert relative_error(H.dense(), exact) < 1e-12


def test_ragged_last_batch():
    H = hf.hessian(mean_loss, W, DataLoader(TensorDataset(X, Y), batch_size=4))
    exact = torch.autograd.functional.hessian(lambda w: mean_loss(w, X, Y), W).reshape(6, 6)
    assert relative_error(H.dense(), exact) < 1e-12


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.__name__)
def test_ctc_loss_has_no_second_derivative(product):
    def loss(w):
        return F.ctc_loss(w.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))

    match = r"operation without (forward-mode derivatives|a second derivative in torch): .*_ctc_loss.*(Use|Write)"
    with pytest.raises(NotImplementedError, match=match):
        product(loss, randn(4, 1, 3), randn(4, 1, 3))


def test_embedding_bag_names_its_equivalent():
    tokens = torch.tensor([[0, 1, 1]])
    text = r"without (forward-mode derivatives|a second derivative in torch): .*_embedding_bag"
    assert_refused(text, lambda w: F.embedding_bag(tokens, w, mode="sum").pow(3).sum(), randn(4, 3))
    assert_refused(
        r"embedding_bag: F\.embedding\(\.\.\.\)\.sum\(1\)",
        lambda w: F.embedding_bag(tokens, w, mode="sum").pow(3).sum(),
        randn(4, 3),
        products=[hf.hvp_double_backward],
    )
    assert_right(lambda w: F.embedding(tokens, w).sum(1).pow(3).sum(), randn(4, 3))


def test_cdist_names_its_equivalent():
    other = randn(5, 3, seed=1)

    def loss(w):
        return torch.cdist(w, other).sum()

    assert_refused(r"without forward-mode derivatives: .*_cdist", loss, randn(4, 3), products=FORWARD)
    if torch.__version__ >= "2.14":  # which brought the second derivative, in reverse mode alone
        assert_right(loss, randn(4, 3), products=[hf.hvp_double_backward])
    else:
        text = r"without a second derivative in torch: .*_cdist.*cdist: differences and norms"
        assert_refused(text, loss, randn(4, 3), products=[hf.hvp_double_backward])
    assert_right(lambda w: (w.unsqueeze(1) - other).norm(dim=-1).sum(), randn(4, 3))


def test_grid_sample_needs_double_backward():
    grid = randn(1, 3, 3, 2).tanh()

    def loss(p):
        return F.grid_sample(p, grid, align_corners=False).pow(3).sum()

    assert_refused(r"grid_sampler_2d.*Use hessfunc\.hvp_double_backward", loss, randn(1, 1, 4, 4), products=FORWARD)
    assert_right(loss, randn(1, 1, 4, 4), products=[hf.hvp_double_backward])
    assert_goes_on("grid_sampler_2d", loss, randn(1, 1, 4, 4))


def test_grouped_products_of_a_mixture_of_experts_need_double_backward():
    x, ends, params = randn(8, 8).float(), torch.tensor([3, 5, 8], dtype=torch.int32), randn(3, 8, 8).float()

    def loss(w):
        return F.grouped_mm(x, w, offs=ends).tanh().pow(2).sum()

    def one_by_one(w):
        return torch.cat([x[:3] @ w[0], x[3:5] @ w[1], x[5:] @ w[2]]).tanh().pow(2).sum()

    assert_refused(r"_grouped_mm.*Use hessfunc\.hvp_double_backward", loss, params, products=FORWARD)
    reference = hf.hvp(one_by_one, params, randn_like(params, seeded(9)))
    with warnings.catch_warnings():
        # Torch 2.13 works out the shape of a result for bfloat16 alone, so that there the product cannot be traced.
        warnings.simplefilter("ignore", hf.ProductWarning)
        assert_right(loss, params, products=[hf.hvp_double_backward], reference=reference, tolerance=1e-5)


def test_norm_at_zero_is_a_kink():
    """Torch's conventions, 0 or NaN; an operator stops at the NaN. The squared norm has its curvature."""
    zero, v = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    assert hf.hvp(lambda w: w.norm(), zero, v).tolist() == [0.0, 0.0]
    with pytest.raises(hf.NonFiniteError, match="the Hessian-vector product on batch 0 is NaN or infinite; look at"):
        hf.hessian(lambda w: w.norm(), zero, product=hf.hvp_double_backward)(v)
    for product in PRODUCTS:
        assert product(lambda w: w.square().sum(), zero, v).tolist() == [2.0, 2.0]


# Attention


def attention(q, k, v, mask=0.0):
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask, -1) @ v


@pytest.mark.parametrize("kind", ["plain", "mask", "causal"])
def test_fused_attention(kind):
    params = {name: randn(2, 2, 4, 3, seed=i) for i, name in enumerate("qkv")}
    triangle = torch.ones(4, 4, dtype=torch.bool).tril()
    options = {"plain": {}, "mask": {"attn_mask": triangle.T}, "causal": {"is_causal": True}}[kind]
    allowed = {"plain": triangle | True, "mask": triangle.T, "causal": triangle}[kind]
    mask = torch.zeros(4, 4, dtype=F64).masked_fill(~allowed, -torch.inf)
    v = randn_like(params, seeded(9))
    reference = by_differences(lambda p: attention(p["q"], p["k"], p["v"], mask).pow(3).sum(), params, v)
    assert_right(
        lambda p: F.scaled_dot_product_attention(p["q"], p["k"], p["v"], **options).pow(3).sum(),
        params,
        reference=reference,
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_names_its_equivalent():
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q, k, v = (torch.randn(1, 1, 4, 8, generator=seeded(i)) for i in range(3))
    text = r"uses flex_attention, which has neither .*F\.scaled_dot_product_attention and attn_mask"
    for product in PRODUCTS:
        with pytest.raises(NotImplementedError, match=text):
            product(lambda w: flex(w, k, v).pow(2).sum(), q, q)


def test_multihead_attention_without_weights():
    call, params = hf.functionalize(made(lambda: nn.MultiheadAttention(4, 2, batch_first=True)))
    x = randn(2, 3, 4)
    assert_right(lambda p: call(p, x, x, x, need_weights=False)[0].pow(3).sum(), params)


@pytest.mark.parametrize("train", [False, True])
def test_transformer_encoder_layer(train):
    """In eval mode torch has a fast path of its own."""
    model = made(lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True)).train(train)
    call, params = hf.functionalize(model)
    x = randn(2, 3, 4)
    assert_right(lambda p: call(p, x).pow(3).mean(), params)


# Grad mode


def test_no_grad_in_the_loss_is_a_constant():
    def loss(w, x):
        with torch.no_grad():
            scale = (x @ w).exp().mean()
        return (scale * (x @ w).pow(3)).mean()

    fixed = (X @ W).exp().mean()
    v = randn_like(W, seeded(9))
    assert_right(loss, W, X, reference=by_differences(lambda w: (fixed * (X @ w).pow(3)).mean(), W, v))


def test_inference_mode_around_a_product():
    with torch.inference_mode():
        inside = [product(mean_loss, W, W, X, Y) for product in PRODUCTS]
        made_inside = [product(mean_loss, W.clone(), W, X, Y) for product in PRODUCTS]
        operator = hf.hessian(mean_loss, W, (X, Y))(W)
    reference = by_differences(lambda w: mean_loss(w, X, Y), W, W)
    for result in [*inside, *made_inside, operator]:
        assert relative_error(result, reference) < 1e-7


def test_inference_mode_in_the_loss():
    def loss(w, x):
        with torch.inference_mode():
            scale = (x @ w).exp().mean()
        return (scale * (x @ w).pow(3)).mean()

    text = r"uses tensors made under torch\.inference_mode\(\): .*Make them under torch\.no_grad\(\)"
    assert_refused(text, loss, W, X)


# Modules


@pytest.mark.parametrize("train", [False, True])
def test_weight_norm(train):
    """Torch's own double backward of it is off, so that only differences of gradients can be the reference."""
    layers = [parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)]
    loss, params = hf.module_loss(made(lambda: nn.Sequential(*layers)).train(train), F.mse_loss)
    assert_right(loss, params, X, Y)


def test_spectral_norm_in_eval_mode():
    model = made(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    loss, params = hf.module_loss(model.eval(), F.mse_loss)
    assert_right(loss, params, X, Y)


def test_spectral_norm_in_train_mode_takes_its_power_iteration_for_constant():
    model = made(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    before = {name: b.clone() for name, b in model.named_buffers()}
    loss, params = hf.module_loss(model.train(), F.mse_loss)
    v = randn_like(params, seeded(9))
    results = [product(loss, params, v, X, Y) for product in PRODUCTS]
    assert relative_error(results[0], results[2]) < 1e-10
    assert relative_error(results[1], results[2]) < 1e-10
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers()), "the module keeps its vectors"
    assert relative_error(hf.hessian(loss, params, (X, Y))(v), results[2]) < 1e-10


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.options = {} if use_reentrant is None else {"use_reentrant": use_reentrant}

    def hidden(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        hidden = checkpoint(self.hidden, x, **self.options) if self.options else self.hidden(x)
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """In double backward both variants would be wrong in silence: the parameters are not the module's."""
    loss, params = hf.module_loss(made(lambda: Checkpointed(use_reentrant)), F.mse_loss)
    params = {name: p + 0.3 for name, p in params.items()}
    for product in PRODUCTS:
        with pytest.raises(NotImplementedError, match=r"checkpointing.*[Ss]witch (it|checkpointing) off"):
            product(loss, params, params, X, Y)
        with pytest.raises(NotImplementedError, match=r"the loss uses gradient checkpointing.*Switch it off"):
            hf.hessian(loss, params, (X, Y), product=product)
    without, params = hf.module_loss(made(lambda: Checkpointed(None)), F.mse_loss)
    assert_right(without, params, X, Y)


def batch_normed():
    return made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))


def test_batch_norm_in_train_mode():
    model = batch_normed().train()
    loss, params = hf.module_loss(model, F.mse_loss)
    assert_right(loss, params, X, Y)
    assert model[1].num_batches_tracked == 0
    assert not model[1].running_mean.any()


def test_batch_norm_in_train_mode_in_a_closure_that_shares_its_buffers():
    model = batch_normed().train()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, x, y):
        return F.mse_loss(torch.func.functional_call(model, p, (x,)), y)

    text = r"writes to a tensor made outside of it, as BatchNorm does .*hessfunc\.functionalize .*model\.eval\(\)"
    for product in FORWARD:
        with pytest.raises(NotImplementedError, match=text):
            product(loss, params, params, X, Y)


def test_batch_norm_in_train_mode_over_a_loader_that_shuffles():
    loss, params = hf.module_loss(batch_normed().train(), F.mse_loss)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=seeded())
    H = hf.hessian(loss, params, loader)
    H(params)
    with pytest.raises(
        ValueError,
        match=r"DataLoader of TensorDataset makes up its batches anew in each pass, and "
        r"BatchNorm1d '1' normalizes by the batch.*Pass shuffle=False or a fixed list.*model\.eval\(\)",
    ):
        H(params)
    loss, params = hf.module_loss(batch_normed().eval(), F.mse_loss)
    H = hf.hessian(loss, params, loader)
    assert relative_error(H(params), H(params)) < 1e-12


@pytest.mark.parametrize("linearize", [True, False])
def test_dropout_in_train_mode(linearize):
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), nn.Linear(4, 2)))
    loss, params = hf.module_loss(model, F.mse_loss)
    text = r"the loss is not deterministic: .* draws random numbers in Dropout '1\.1'\. Call model\.eval\(\)"
    with pytest.raises(ValueError, match=text):
        hf.hessian(loss, params, (X, Y), linearize=linearize)(params)
    with pytest.raises(ValueError, match=text):
        hf.ggn(hf.functionalize(model).call, F.mse_loss, params, (X, Y))(params)
    model.eval()
    assert_right(loss, params, X, Y)


def test_dropout_of_attention_is_named():
    model = made(lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.3, batch_first=True))
    call, params = hf.functionalize(model)
    with pytest.raises(ValueError, match=r"draws random numbers in MultiheadAttention 'self_attn', Dropout 'dropout"):
        hf.hessian(lambda p, x: call(p, x).square().mean(), params, (randn(2, 3, 4),))(params)


def test_randomness_that_is_not_torchs():
    calls = []

    def loss(w, x):
        calls.append(0)
        return (x @ w).pow(4).mean() * len(calls)

    with pytest.raises(
        ValueError, match=r"No operation of torch draws random numbers in it, so it uses another source"
    ):
        hf.hessian(loss, W, (X,))(W)


def test_the_check_can_be_left_out():
    calls = []

    def loss(w, x):
        calls.append(0)
        return (x @ w).pow(4).mean()

    counts = []
    for check in (True, False):
        H = hf.hessian(loss, W, (X,), check=check, linearize=False)
        calls.clear()
        H(W)
        H(W)
        counts.append(len(calls))
    assert counts == [6, 2], "two evaluations and two products, once"


class Augmented(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.01 * torch.randn(3, dtype=F64), Y[i]


def test_data_augmentation():
    H = hf.hessian(mean_loss, W, DataLoader(Augmented(), batch_size=4))
    H(W)
    with pytest.raises(
        ValueError, match=r"DataLoader of Augmented saw other numbers.*data augmentation.*list\(loader\)"
    ):
        H(W)
    fixed = hf.hessian(mean_loss, W, list(DataLoader(Augmented(), batch_size=4)))
    assert torch.equal(fixed(W), fixed(W))


def test_a_loader_that_shuffles_and_drops_the_rest():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True, generator=seeded())
    for build in (
        lambda: hf.hessian(mean_loss, W, loader),
        lambda: hf.ggn(lambda w, x: torch.tanh(x @ w), F.mse_loss, W, loader),
        lambda: hf.fisher(lambda w, x: torch.tanh(x @ w), F.mse_loss, W, loader, kind="empirical"),
    ):
        H = build()
        H(W)
        with pytest.raises(ValueError, match=r"saw other numbers than the first one.*shuffle=True, drop_last=True"):
            H(W)


def test_a_loader_that_shuffles():
    """The order of samples does not change the sum over them."""
    H = hf.hessian(mean_loss, W, DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=seeded()))
    exact = torch.autograd.functional.hessian(lambda w: mean_loss(w, X, Y), W).reshape(6, 6)
    for _ in range(3):
        assert relative_error(H.dense(), exact) < 1e-12


def test_a_product_that_is_not_symmetric():
    skew = randn(3, 3, seed=5)

    class Wrong(torch.autograd.Function):
        """A matrix product whose backward leaves the transposition out."""

        @staticmethod
        def forward(x):
            return x @ skew

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(_ctx, gradient):
            return gradient @ skew

        @staticmethod
        def jvp(_ctx, tangent):
            return tangent @ skew

    def loss(w):
        return (Wrong.apply(w) ** 4).sum()

    for dtype in (F64, torch.float32):
        point = randn(1, 3).to(dtype)
        if dtype == torch.float32:

            def loss(w):
                return (Wrong.apply(w.double()) ** 4).sum()

        for product in FORWARD:  # twice the same mistake is symmetric
            H = hf.hessian(loss, point, product=product)
            with pytest.raises(
                ValueError, match=r"is not symmetric: .* on the first batch.*autograd\.Function Wrong\."
            ):
                H(point)


def test_rounding_is_not_taken_for_asymmetry():
    """All that is left of some of these products is rounding, in others there is much of it."""
    x = torch.randn(64, 40, generator=seeded())
    params = {"a": torch.randn(40, 30, generator=seeded(1)), "b": torch.randn(30, generator=seeded(2))}
    layers = [layer for _ in range(6) for layer in (nn.Linear(30, 30), nn.Tanh(), nn.LayerNorm(30))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deep = nn.Sequential(nn.Linear(40, 30), *layers, nn.Linear(30, 4))
    labels = torch.arange(64) % 4
    saturated = lambda p, x: F.cross_entropy(60 * (x @ p["a"]), (x @ p["a"]).argmax(1).detach())  # noqa: E731
    cases = [
        (lambda p, x: ((x @ p["a"]) * 1e3).sum() + (p["b"] * 1e3 - p["b"] * 999.9).sum(), params, (x,)),
        (saturated, params, (x,)),
        (*hf.module_loss(deep, F.cross_entropy), (x, labels)),
        (*hf.module_loss(deep.bfloat16(), F.cross_entropy), (x.bfloat16(), labels)),
        (*hf.module_loss(deep.half(), F.cross_entropy), (x.half(), labels)),
    ]
    for loss, point, batch in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hf.ProductWarning)
            hf.hessian(loss, point, batch)(point)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    loss, params = hf.module_loss(made(Tied), F.mse_loss)
    assert sorted(params) == ["first.bias", "first.weight", "second.bias"]

    def by_hand(p):
        hidden = torch.tanh(X @ p["first.weight"].T + p["first.bias"])
        return F.mse_loss(hidden @ p["first.weight"].T + p["second.bias"], X)

    v = randn_like(params, seeded(9))
    assert_right(loss, params, X, X, reference=by_differences(by_hand, params, v))


def test_shared_submodules():
    def build():
        shared = nn.Linear(3, 3)
        return nn.Sequential(shared, nn.Tanh(), shared)

    loss, params = hf.module_loss(made(build), F.mse_loss)
    assert len(params) == 2
    assert_right(loss, params, X, X)


def test_frozen_and_unused_leaves():
    model = made(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model[0].weight.requires_grad_(False)
    model.spare = nn.Parameter(torch.ones(2, dtype=F64))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    loss, params = hf.module_loss(model, F.mse_loss)
    assert "0.weight" not in params
    assert_right(loss, params, X, Y)
    assert not hf.hessian(loss, params, (X, Y))(params)["spare"].any()


def test_integer_buffers():
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, x):
            self.seen += 1
            return torch.tanh(self.linear(x[:, self.order]))

    model = made(Permuted)
    loss, params = hf.module_loss(model, F.mse_loss)
    assert_right(loss, params, X, Y)
    assert model.seen == 0


def test_embedding_with_padding():
    """The padding row is a constant, whatever the vector has there."""
    tokens, params = torch.tensor([[0, 1, 2], [2, 0, 0]]), randn(4, 3)

    def by_hand(w):
        return torch.cat([params[:1], w[1:]])[tokens].sum(1).tanh().pow(3).sum()

    reference = by_differences(by_hand, params, randn_like(params, seeded(9)))
    assert_right(
        lambda w: F.embedding(tokens, w, padding_idx=0).sum(1).tanh().pow(3).sum(), params, reference=reference
    )


def test_data_parallel_and_scripts_are_refused():
    with pytest.raises(TypeError, match=r"wrapped in DataParallel; pass the bare module, model\.module"):
        hf.functionalize(nn.DataParallel(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match=r"is a ScriptModule, which torch\.func cannot run; pass the original"):
        hf.functionalize(torch.jit.script(nn.Linear(1, 1)))


# Custom functions


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class LegacyCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_custom_function_without_jvp():
    text = r"calls an autograd\.Function without a jvp method: .*Write one.*Use hessfunc\.hvp_double_backward"
    assert_refused(text, lambda w: Cube.apply(w).sum(), W, products=FORWARD)
    with pytest.raises(NotImplementedError, match=r"the model calls an autograd\.Function without a jvp"):
        hf.ggnvp(lambda w, x: x @ Cube.apply(w), F.mse_loss, W, W, X, Y)
    assert_right(lambda w: Cube.apply(w).sum(), W, products=[hf.hvp_double_backward])
    assert_goes_on(r"autograd\.Function without a jvp", lambda w: Cube.apply(w).sum(), W)


def test_custom_function_of_the_old_style():
    text = r"autograd\.Function of the old style, without setup_context.*give a function of your own setup_context"
    assert_refused(text, lambda w: LegacyCube.apply(w).sum(), W, products=FORWARD)
    assert_right(lambda w: LegacyCube.apply(w).sum(), W, products=[hf.hvp_double_backward])
    assert_goes_on("of the old style", lambda w: LegacyCube.apply(w).sum(), W)


class CubeWithJvp(Cube):
    """Its backward pass cannot be differentiated; what its jvp makes can."""

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return Opaque.apply(3 * ctx.saved_tensors[0] ** 2 * gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        raise NotImplementedError("no second derivative")


def test_custom_function_with_a_backward_that_forward_mode_cannot_take():
    assert_goes_on("without a jvp", lambda w: CubeWithJvp.apply(w).sum(), W, by="hvp_reverse_over_forward")


class NumpyCube(LegacyCube):
    """Numbers that no operation of torch sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)


@pytest.mark.parametrize("options", [{}, {"product": hf.hvp_double_backward}])
def test_custom_function_by_way_of_numpy_is_not_traced(options):
    batches = [(X[:4],), (X[4:8],)]

    def loss(w, x):
        return NumpyCube.apply(x @ w).pow(2).sum()

    H = hf.hessian(loss, W, batches, reduction="sum", **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        H.vector(torch.ones(6, dtype=F64))
    told = [str(warning.message) for warning in seen]
    assert len(told) == (1 if options else 2)
    assert any("the product cannot be traced" in text for text in told)
    for point in (W, 2 * W):
        exact = torch.autograd.functional.hessian(lambda w: ((X[:8] @ w) ** 6).sum(), point).reshape(6, 6)
        assert relative_error(H.at(point).dense(), exact) < 1e-10


def test_the_choice_of_a_product_is_not_overruled():
    for product in FORWARD:
        H = hf.hessian(lambda w: Cube.apply(w).sum(), W, product=product)
        with pytest.raises(NotImplementedError, match="without a jvp"):
            H(W)


def test_where_no_product_works_the_last_one_says_why():
    def loss(w):
        return F.ctc_loss(w.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))

    H = hf.hessian(loss, randn(4, 1, 3))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"without a second derivative.*_ctc_loss"):
            H.vector(torch.ones(12, dtype=F64))


def test_the_other_product_is_checked_too():
    class Wrong(Cube):
        @staticmethod
        def backward(ctx, gradient):
            return torch.arange(1.0, 7.0, dtype=F64).reshape(3, 2) * ctx.saved_tensors[0].roll(1, 0) * gradient

    H = hf.hessian(lambda w: Wrong.apply(w).sum(), W)
    with (
        pytest.warns(hf.ProductWarning, match="without a jvp"),
        pytest.raises(ValueError, match=r"not symmetric.*Wrong"),
    ):
        H(W)


# Precision


def layered():
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where):
    loss, params = hf.module_loss(made(layered), F.mse_loss)
    v = randn_like(params, seeded(9))
    reference = by_differences(lambda p: loss(p, X, Y), params, v)
    single = [tree.map_leaves(lambda x: x.float(), value) for value in (params, v, (X, Y))]

    loss, _ = hf.module_loss(made(layered).float(), F.mse_loss)

    def cast(p, *batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside"):
            return loss(p, *batch)

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        inner = cast if where == "inside" else loss
        for product in PRODUCTS:
            assert 1e-5 < relative_error(product(inner, single[0], single[1], *single[2]), reference) < 0.05
            H = hf.hessian(inner, single[0], single[2], product=product)
            assert relative_error(H(single[1]), reference) < 0.05
            assert relative_error(H(single[1]), reference) < 0.05


@pytest.mark.parametrize("first", ["with", "without"])
def test_autocast_around_a_call_counts_for_that_call(first):
    loss, params = hf.module_loss(made(layered).float(), F.mse_loss)
    batch = tuple(x.float() for x in (X, Y))
    v = randn_like(params, seeded(9))
    eager = hf.hessian(loss, params, batch, linearize=False)
    with torch.autocast("cpu", torch.bfloat16):
        lower = eager(v)
    whole = eager(v)
    apart = relative_error(lower, whole)
    assert apart > 1e-4
    H = hf.hessian(loss, params, batch)
    for around in (first == "with", first != "with", first == "with"):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                found = H(v)
            assert relative_error(found, lower if around else whole) < (0.8 * apart if around else 1e-5)
            assert relative_error(found, whole) < 1.2 * apart  # no less accurate than the eager one


def test_mixed_dtypes():
    params = {"half": randn(3, 4).bfloat16(), "single": randn(4, seed=1).float(), "double": randn(4, 2, seed=2)}

    def loss(p, x, y):
        return F.mse_loss(torch.tanh(x @ p["half"].double() + p["single"].double()) @ p["double"], y)

    v = randn_like(params, seeded(9))
    exact = tree.map_leaves(lambda x: x.double(), params)
    reference = by_differences(lambda p: loss(p, X, Y), exact, tree.map_leaves(lambda x: x.double(), v))
    for product in PRODUCTS:
        result = product(loss, params, v, X, Y)
        assert [leaf.dtype for leaf in result.values()] == [torch.bfloat16, torch.float32, F64]
        assert relative_error(result, reference) < 5e-3
    assert relative_error(hf.hessian(loss, params, (X, Y))(v), reference) < 5e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-2), (torch.bfloat16, 0.15)])
def test_low_precision_against_float64(dtype, tolerance):
    loss, params = hf.module_loss(made(layered), F.mse_loss)
    v = randn_like(params, seeded(9))
    reference = by_differences(lambda p: loss(p, X, Y), params, v)
    loss, _ = hf.module_loss(made(layered).to(dtype), F.mse_loss)
    low = [tree.map_leaves(lambda x: x.to(dtype), value) for value in (params, v, (X, Y))]
    for product in PRODUCTS:
        assert relative_error(product(loss, low[0], low[1], *low[2]), reference) < tolerance
    assert relative_error(hf.hessian(loss, low[0], low[2])(low[1]), reference) < tolerance


# Data and sizes


def test_generators_that_are_exhausted():
    with pytest.raises(TypeError, match=r"is a generator, which is exhausted after one pass.*Pass list\(data\)"):
        hf.hessian(mean_loss, W, ((X, Y) for _ in range(2)))


def test_empty_data():
    for data in ([], DataLoader(TensorDataset(X[:0], Y[:0]))):
        with pytest.raises(ValueError, match=r"data is empty: a pass over it yielded no batch"):
            hf.hessian(mean_loss, W, data)


def test_more_pairs_or_steps_than_the_size():
    H = hf.as_operator(torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"k=4 is out of range; expected 1 <= k <= 3, the size of the operator"):
        hf.eigsh(H, 4, generator=seeded())
    with pytest.raises(ValueError, match=r"num_steps=4 is out of range; expected 1 <= num_steps <= 3"):
        hf.slq(H, num_steps=4, num_probes=2, generator=seeded())
    with pytest.raises(ValueError, match=r"num_steps=4 is out of range; expected 1 <= num_steps <= 3"):
        hf.lanczos(H.vector, torch.ones(3, dtype=F64), 4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_breakdown_on_zero_and_low_rank(rank):
    basis = torch.linalg.qr(randn(8, 8))[0]
    values = torch.tensor([3.0, -2.0] + [0.0] * 6, dtype=F64)
    values[rank:] = 0
    H = hf.as_operator((basis * values) @ basis.T)
    pairs = hf.eigsh(H, 3, generator=seeded())
    assert (pairs.eigenvalues - values[:3]).abs().max() < 1e-10
    assert pairs.converged.all()
    rule = hf.slq(H, num_steps=8, num_probes=4, exact_outliers=False, generator=seeded())
    assert torch.isfinite(rule.nodes).all()
    assert (rule.weights.sum(1) - 1).abs().max() < 1e-12
    trace = hf.hutchinson(H, num_probes=50, generator=seeded())
    low, high = trace.interval(0.9999)
    assert low - 1e-12 <= float(values.sum()) <= high + 1e-12


# NaN and infinity


def failing(after):
    """An operator whose products are NaN after this many."""
    count = [0]
    matrix = torch.diag(torch.linspace(1, 9, 40, dtype=F64))

    def rows(rows):
        count[0] += rows.shape[0]
        return rows @ matrix if count[0] <= after else rows * torch.nan

    return hf.Operator(matrix[0], rows)


def test_nan_in_the_loss():
    with pytest.raises(hf.NonFiniteError, match=r"the loss of batch 0 is NaN or infinite; curvature is not defined"):
        hf.hessian(mean_loss, W * torch.nan, (X, Y))


def test_nan_in_a_later_batch_names_it():
    H = hf.hessian(mean_loss, W, [(X, Y), (X, Y), (X, Y / 0)])
    with pytest.raises(hf.NonFiniteError, match=r"the Hessian-vector product on batch 2 is NaN or infinite") as caught:
        hf.hutchinson(H, num_probes=4, generator=seeded())
    assert caught.value.partial is None


def test_nan_keeps_the_trace_so_far():
    with pytest.raises(
        hf.NonFiniteError, match=r"in this error's \.partial, Estimate\(200 ± 0, num_samples=10"
    ) as caught:
        hf.hutchinson(failing(12), num_probes=40, chunk_size=5, generator=seeded())
    expected = hf.hutchinson(failing(99), num_probes=10, chunk_size=5, generator=seeded())
    assert torch.equal(caught.value.partial.samples, expected.samples)
    assert caught.value.partial.num_matvecs == 10


def test_nan_keeps_the_eigenpairs_so_far():
    with pytest.raises(
        hf.NonFiniteError, match=r"a product of the operator is NaN.*\.partial, an Eigenpairs"
    ) as caught:
        hf.eigsh(failing(12), 2, generator=seeded())
    pairs = caught.value.partial
    H = failing(99)
    for row, value, residual in zip(pairs.rows(), pairs.eigenvalues, pairs.residuals, strict=True):
        assert abs(float((H.vector(row) - value * row).norm() - residual)) < 1e-10
    assert pairs.num_matvecs == 12
    assert not pairs.converged.any()
    with pytest.raises(hf.NonFiniteError) as caught:
        hf.eigsh(failing(0), 2, generator=seeded())
    assert caught.value.partial is None


@pytest.mark.parametrize(("tol", "last", "what"), [(1e-3, 1, "eigenvectors"), (1e-14, 2, "an eigenvector")])
def test_nan_in_the_last_products_keeps_the_eigenpairs(tol, last, what):
    """Those that check the residuals together, or one by one near rounding, when all the work is done."""
    whole = hf.eigsh(failing(10**6), 2, tol=tol, generator=seeded())
    with pytest.raises(hf.NonFiniteError, match=rf"the product with {what} is NaN.*\.partial, an Eigenpairs") as caught:
        hf.eigsh(failing(whole.num_matvecs - last), 2, tol=tol, generator=seeded())
    pairs = caught.value.partial
    assert pairs.num_matvecs == whole.num_matvecs - last
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(pairs.residuals, whole.residuals, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("options", "probes"), [({"exact_outliers": False, "chunk_size": 2}, 2), ({}, 1)])
def test_nan_keeps_the_quadrature_so_far(options, probes):
    with pytest.raises(hf.NonFiniteError, match=r"in this error's \.partial, a Quadrature") as caught:
        hf.slq(failing(12), num_steps=5, num_probes=4, generator=seeded(), **options)
    rule = caught.value.partial
    assert rule.nodes.shape == (probes, 5)
    assert (rule.weights.sum(1) - 1).abs().max() < 1e-12
    assert rule.num_matvecs == 5 * probes
    with pytest.raises(hf.NonFiniteError) as caught:
        hf.slq(failing(0), num_steps=5, num_probes=4, generator=seeded(), **options)
    assert caught.value.partial is None


def test_half_precision_overflow_is_found():
    with pytest.raises(hf.NonFiniteError, match="the loss of batch 0 is NaN or infinite"):
        hf.hessian(lambda w, x: (x @ w).pow(6).sum(), (30 * W).half(), (100 * X.half(),))


# Devices that are not here: the text of torch's error stands in for them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN "
            "RNNs due to limitations in the CuDNN API.",
            r"runs a recurrent layer of cuDNN, .*with torch\.backends\.cudnn\.flags\(enabled=False\)",
        ),
        (
            "Trying to use forward AD with _cudnn_rnn that does not support it because it has not been implemented.",
            r"runs a recurrent layer of cuDNN",
        ),
        (
            "The operator 'aten::linalg_qr' is not currently implemented for the MPS device.",
            r"missing on the MPS device: .*PYTORCH_ENABLE_MPS_FALLBACK=1",
        ),
    ],
)
def test_errors_of_other_devices_are_explained(text, expected):
    def loss(_):
        raise RuntimeError(text)

    for product in PRODUCTS:
        with pytest.raises(NotImplementedError, match=expected):
            product(loss, W, W)


def test_other_errors_pass_unchanged():
    error = RuntimeError("the user's own")
    assert explained(error) is error


# Seeds


def test_one_seed_for_weights_and_probes():
    """The weights are no random direction for the loss, and a seed is often the same for everything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = torch.nn.init.normal_(torch.empty(20_000))
    first = []
    H = hf.Operator(weights, lambda rows: first.append(rows[0].clone()) or 2 * rows)
    for estimate in (
        lambda draw: hf.slq(H, num_steps=1, num_probes=1, generator=draw),
        lambda draw: hf.hutchinson(H, num_probes=1, sampler=_probes.normal, generator=draw),
        lambda draw: hf.eigsh(H, 1, generator=draw),
    ):
        first.clear()
        estimate(seeded(0))
        cosine = F.cosine_similarity(weights, first[0], dim=0)
        assert abs(float(cosine)) < 4 / 20_000**0.5


# Modes


def test_modes_are_off_after_errors_and_belong_to_a_thread():
    def broken(_):
        raise KeyError("mine")

    for product in PRODUCTS:
        with pytest.raises(KeyError, match="mine"):
            product(broken, W, W)
        assert _len_torch_function_stack() == 0
    inside, elsewhere = threading.Event(), threading.Event()
    depths = []

    def slow(w):
        inside.set()
        elsewhere.wait(10)
        depths.append(_len_torch_function_stack())
        return w.pow(3).sum()

    thread = threading.Thread(target=hf.hvp, args=(slow, W, W))
    thread.start()
    assert inside.wait(10)
    depths.append(_len_torch_function_stack())
    elsewhere.set()
    thread.join()
    assert depths == [0, 1]
