"""Products against dense Hessians, on every model of the case table and on the operations torch gets wrong."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, F64, case, dense_hessian, randn_like, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import _decompositions, tree

PRODUCTS = [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward]
FORWARD = [hf.hvp, hf.hvp_reverse_over_forward]
every_product = pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.__name__)
forward_products = pytest.mark.parametrize("product", FORWARD, ids=lambda p: p.__name__)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def assert_close(value, reference, tolerance=1e-10):
    assert relative_error(value, reference) < tolerance


def by_double_backward(loss, params, v):
    """``H v`` for a tensor of parameters, by torch's tape alone."""
    point = params.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point, create_graph=True)
    return torch.autograd.grad(gradient, point, v)[0]


# The case table


@pytest.mark.parametrize("name", CASES)
@forward_products
def test_all_columns_under_vmap_are_the_dense_hessian(product, name):
    loss, params, batch = case(name)
    layout = tree.Layout.of(params)
    eye = torch.eye(layout.size, dtype=F64)
    rows = torch.func.vmap(lambda v: layout.ravel(product(loss, params, layout.unravel(v), *batch)))(eye)
    assert_close(rows, dense_hessian(name))


@pytest.mark.parametrize("name", CASES)
@every_product
def test_one_product_is_the_dense_hessian_times_the_vector(product, name, generator):
    loss, params, batch = case(name)
    layout = tree.Layout.of(params)
    v = randn_like(params, generator)
    result = product(loss, params, v, *batch)
    assert tree.flatten(result)[1] == tree.flatten(params)[1]
    assert [leaf.shape for leaf in tree.leaves(result)] == [leaf.shape for leaf in tree.leaves(params)]
    assert all(not leaf.requires_grad and leaf.dtype == F64 for leaf in tree.leaves(result))
    assert_close(layout.ravel(result), dense_hessian(name) @ layout.ravel(v))


@pytest.mark.parametrize("name", CASES)
def test_products_are_symmetric_and_leave_params_alone(name, generator):
    loss, params, batch = case(name)
    before = tree.map_leaves(torch.clone, params)
    u, v = randn_like(params, generator), randn_like(params, generator)
    left = tree.vdot(u, hf.hvp(loss, params, v, *batch))
    right = tree.vdot(v, hf.hvp(loss, params, u, *batch))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert relative_error(params, before) == 0
    assert all(leaf.grad is None and not leaf.requires_grad for leaf in tree.leaves(params))


@every_product
def test_linear_and_constant_losses_give_zeros(product):
    params = {"used": randn(3), "unused": randn(2, 2)}
    v = tree.map_leaves(torch.ones_like, params)
    for loss in (
        lambda p: (p["used"] * torch.arange(3.0)).sum(),
        lambda _: torch.tensor(4.0, dtype=F64),
        lambda p: p["used"].sum() + p["unused"].sum(),
    ):
        result = product(loss, params, v)
        assert [leaf.shape for leaf in tree.leaves(result)] == [(3,), (2, 2)]
        assert all(bool((leaf == 0).all()) for leaf in tree.leaves(result))
    curved = product(lambda p: (p["used"] ** 3).sum(), params, v)
    assert_close(curved, {"used": 6 * params["used"], "unused": torch.zeros(2, 2)})


@every_product
def test_float32_and_mixed_dtypes_keep_each_leaf_in_its_own(product):
    params = {"half": randn(3).bfloat16(), "single": randn(4).float(), "double": randn(2)}
    v = tree.map_leaves(torch.ones_like, params)

    def loss(p):
        return sum((leaf.double() ** 3).sum() for leaf in p.values())

    result = product(loss, params, v)
    assert {name: leaf.dtype for name, leaf in result.items()} == {n: leaf.dtype for n, leaf in params.items()}
    assert_close(result, tree.map_leaves(lambda leaf: 6 * leaf, params), 1e-2)
    assert_close(result["double"], 6 * params["double"])


# Parts of the loss that reverse mode takes for constants


@every_product
@pytest.mark.parametrize(
    "constant",
    [
        lambda p: p.detach() ** 2,
        lambda p: p.data**2,
        lambda p: torch.no_grad()(lambda: p**2)(),
        lambda p: torch.no_grad()(lambda: torch.sort(p).values * 2)(),
    ],
    ids=["detach", "data", "no_grad", "no_grad several outputs"],
)
def test_detached_parts_are_constants(product, constant):
    params, v = randn(4), randn(4, seed=1)
    fixed = constant(params)
    result = product(lambda p: (constant(p) * p**3).sum(), params, v)
    assert_close(result, fixed * 6 * params * v)


# Losses and layers that torch's own jvp(grad) fails on or gets wrong


@every_product
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_function", [F.mse_loss, F.huber_loss], ids=lambda f: f.__name__)
def test_mse_and_huber(product, loss_function, reduction, weighted):
    target = randn(3, 4, seed=1)
    options = {"reduction": reduction, "weight": randn(3, 4, seed=2).abs() if weighted else None}
    if loss_function is F.huber_loss:
        options["delta"] = 0.6

    def loss(p):
        return loss_function(p.tanh() * 2, target, **options).sum()

    params, v = randn(3, 4), randn(3, 4, seed=3)
    assert_close(product(loss, params, v), by_double_backward(loss, params, v))


@every_product
def test_legacy_reductions_and_unknown_ones(product):
    params, target, v = randn(4), randn(4, seed=1), torch.ones(4, dtype=F64)
    for options, scale in (({"size_average": False}, 2.0), ({"reduce": False}, 2.0), ({"size_average": True}, 0.5)):
        result = product(lambda p, options=options: F.mse_loss(p, target, **options).sum(), params, v)
        assert_close(result, scale * v)
    with pytest.raises(ValueError, match="reduction='median' is not known; expected 'mean', 'sum' or 'none'"):
        product(lambda p: F.mse_loss(p, target, reduction="median"), params, v)


def test_mse_still_warns_of_broadcasting():
    with pytest.warns(UserWarning, match=r"target has shape \(4,\), input \(4, 1\).*give them one shape"):
        hf.hvp(lambda p: F.mse_loss(p, torch.zeros(4)), torch.ones(4, 1), torch.ones(4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.hvp(lambda p: F.mse_loss(p, torch.zeros(4, 1)), torch.ones(4, 1), torch.ones(4, 1))


def _explicit_attention(q, k, v, mask, scale):
    scores = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)
    return torch.softmax(scores + mask, -1) @ v


@every_product
@pytest.mark.parametrize("option", ["plain", "causal", "bool mask", "float mask", "scale", "gqa"])
def test_scaled_dot_product_attention(product, option):
    heads = 2 if option == "gqa" else 4
    params = {"q": randn(2, 4, 3, 5), "k": randn(2, heads, 3, 5, seed=1), "v": randn(2, heads, 3, 5, seed=2)}
    v = randn_like(params, seeded(3))
    allowed = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    float_mask = randn(3, 3, seed=4)
    triangle = torch.ones(3, 3, dtype=torch.bool).tril()
    options, mask = {
        "plain": ({}, torch.zeros(3, 3)),
        "causal": ({"is_causal": True}, torch.zeros(3, 3).masked_fill(~triangle, -math.inf)),
        "bool mask": ({"attn_mask": allowed}, torch.zeros(3, 3).masked_fill(~allowed, -math.inf)),
        "float mask": ({"attn_mask": float_mask}, float_mask),
        "scale": ({"scale": 0.3}, torch.zeros(3, 3)),
        "gqa": ({"enable_gqa": True}, torch.zeros(3, 3)),
    }[option]

    def fused(p):
        return (F.scaled_dot_product_attention(p["q"], p["k"], p["v"], **options) ** 3).sum()

    def explicit(p):
        k, v = (p[name].repeat_interleave(4 // heads, 1) for name in "kv")
        return (_explicit_attention(p["q"], k, v, mask, options.get("scale")) ** 3).sum()

    assert_close(fused(params), explicit(params), 1e-12)
    assert_close(product(fused, params, v), hf.hvp_double_backward(explicit, params, v))


@every_product
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_returns_what_it_was_asked_for(product, need_weights):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    call, params = hf.functionalize(attention)
    x = randn(2, 3, 4)
    seen = []

    def loss(p):
        output, weights = call(p, x, x, x, need_weights=need_weights)
        seen.append(weights is None)
        return (output**3).sum()

    def explicit(p):
        q, k, v = (x @ w.T + b for w, b in zip(p["in_proj_weight"].chunk(3), p["in_proj_bias"].chunk(3), strict=True))
        heads = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v)]
        mixed = _explicit_attention(*heads, 0, None).transpose(1, 2).flatten(2)
        return ((mixed @ p["out_proj.weight"].T + p["out_proj.bias"]) ** 3).sum()

    v = randn_like(params, seeded(1))
    assert_close(product(loss, params, v), hf.hvp_double_backward(explicit, params, v))
    assert seen == [not need_weights]


def _rowwise(function):
    return lambda p: function(p @ p.transpose(-2, -1) + torch.eye(3, dtype=F64)).tanh().sum()


# Forward over reverse without a graph takes a formula that is wrong for these (silently), or none.
SECOND_DERIVATIVES = {
    "det": _rowwise(torch.det),
    "linalg.det": _rowwise(torch.linalg.det),
    "det method": _rowwise(lambda a: a.det()),
    "logdet": _rowwise(torch.logdet),
    "slogdet": _rowwise(lambda a: torch.linalg.slogdet(a).logabsdet),
    "solve": _rowwise(lambda a: torch.linalg.solve(a, torch.ones(3, dtype=F64))),
    "tensorsolve": _rowwise(lambda a: torch.linalg.tensorsolve(a, torch.ones(3, dtype=F64))),
}
ANY_ORDER = {
    "cumprod": lambda p: p.cumprod(0).tanh().sum(),
    "logit": lambda p: torch.logit(torch.sigmoid(p) * 0.8 + 0.1).square().sum(),
    "silu": lambda p: F.silu(p).square().sum(),
    "mish": lambda p: F.mish(p).square().sum(),
    "glu": lambda p: F.glu(p).square().sum(),
    "soft margin": lambda p: F.soft_margin_loss(p, torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 3, dtype=F64)),
    "soft margin sum": lambda p: F.soft_margin_loss(p, torch.ones(3, 4, dtype=F64), reduction="sum"),
    "group norm": lambda p: F.group_norm(p.unsqueeze(0), 1).pow(3).sum(),
    "inverse": lambda p: torch.linalg.inv(p @ p.T + torch.eye(3, dtype=F64)).tanh().sum(),
    "rms norm": lambda p: F.rms_norm(p, (4,)).pow(3).sum(),
    "layer norm": lambda p: F.layer_norm(p, (4,)).pow(3).sum(),
    "layer norm of two axes": lambda p: F.layer_norm(p, (3, 4), p.exp(), p).pow(3).sum(),
    "batch norm": lambda p: F.batch_norm(p, None, None, p[0], p[1], training=True, eps=0.1).pow(3).sum(),
    "batch norm of 1-d signals": lambda p: F.batch_norm(p.view(2, 3, 2), None, None, training=True).pow(3).sum(),
    "instance norm": lambda p: F.instance_norm(p.unsqueeze(0), weight=p[:, 0], bias=p[:, 1]).pow(3).sum(),
}


@pytest.mark.parametrize("name", [*SECOND_DERIVATIVES, *ANY_ORDER])
def test_second_derivatives_that_need_grad_mode_or_decomposition(name):
    loss = {**SECOND_DERIVATIVES, **ANY_ORDER}[name]
    params, v = randn(3, 4), randn(3, 4, seed=1)
    reference = by_double_backward(loss, params, v)
    assert_close(hf.hvp(loss, params, v), reference)
    assert_close(hf.hvp_double_backward(loss, params, v), reference)
    batched = torch.func.vmap(lambda v: hf.hvp(loss, params, v))(torch.stack([v, 2 * v]))
    assert_close(batched, torch.stack([reference, 2 * reference]))
    if name in SECOND_DERIVATIVES:
        with pytest.raises(NotImplementedError, match=r"which torch differentiates wrongly.*use hessfunc.hvp without"):
            hf.hvp_reverse_over_forward(loss, params, v)
    else:
        assert_close(hf.hvp_reverse_over_forward(loss, params, v), reference)


@every_product
def test_products_of_entries_with_two_zeros(product):
    params = torch.tensor([0.0, 2.0, 0.0, 3.0], dtype=F64)
    v = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64)
    assert_close(product(lambda p: p.prod(), params, v), torch.tensor([12.0, 0.0, 6.0, 0.0], dtype=F64))


@every_product
@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid(product, inplace):
    params = torch.tensor([-4.0, -1.0, 0.5, 2.0, 5.0], dtype=F64)
    result = product(lambda p: F.hardsigmoid(p * 1, inplace=inplace).pow(3).sum(), params, torch.ones_like(params))
    inside = params.abs() < 3
    assert_close(result, torch.where(inside, (params / 6 + 0.5) / 6, 0.0))


@every_product
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm(product, dim):
    shape = {0: (3, 1), 1: (1, 4), -1: ()}[dim]
    params = {"v": randn(3, 4), "g": randn(12, seed=1)[: math.prod(shape)].reshape(shape)}
    v = randn_like(params, seeded(2))
    axes = {0: 1, 1: 0, -1: (0, 1)}[dim]
    x = randn(4, seed=3)

    def torchs(p):
        return ((torch._weight_norm(p["v"], p["g"], dim) @ x).tanh() ** 2).sum()

    def explicit(p):
        norm = p["v"].square().sum(axes, keepdim=dim != -1).sqrt()
        return (((p["g"] * p["v"] / norm) @ x).tanh() ** 2).sum()

    assert_close(torchs(params), explicit(params), 1e-12)
    assert_close(product(torchs, params, v), hf.hvp_double_backward(explicit, params, v))


@every_product
@pytest.mark.parametrize("padding_idx", [0, 3, -2])
def test_the_padding_row_of_an_embedding_is_a_constant(product, padding_idx):
    tokens = torch.tensor([[0, 1, 3], [3, 4, 1]])
    params, v = randn(5, 2), randn(5, 2, seed=1)
    row = padding_idx % 5

    def loss(p, padding_idx=padding_idx):
        return F.embedding(tokens, p, padding_idx).sum(1).pow(4).sum()

    def explicit(p):
        mask = (torch.arange(5) == row).unsqueeze(1)
        return torch.where(mask, p.detach(), p)[tokens].sum(1).pow(4).sum()

    result = product(loss, params, v)
    assert_close(result, by_double_backward(explicit, params, v))
    assert bool((result[row] == 0).all())


@every_product
def test_an_embedding_with_max_norm_is_clipped_without_writing_to_the_weights(product):
    tokens = torch.tensor([0, 2, 2])
    params, v = randn(4, 3) * 3, randn(4, 3, seed=1)
    before = params.clone()
    result = product(lambda p: F.embedding(tokens, p, max_norm=1.0).pow(4).sum(), params, v)
    clipped = params * (1 / params.norm(dim=1, keepdim=True)).clamp(max=1)
    counts = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64).unsqueeze(1)
    assert_close(result, 12 * clipped**2 * v * counts, 1e-6)  # torch divides by the norm + 1e-7
    assert torch.equal(params, before)


@forward_products
def test_train_mode_batch_norm_updates_running_statistics_as_torch_does(product):
    x = randn(6, 3)
    mean, variance = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    F.batch_norm(x, mean, variance, training=True, momentum=0.3)

    def loss(p):
        running = [p.detach() * 0, p.detach() * 0 + 1]  # made inside, so free to be written to
        normalized = F.batch_norm(x * p, *running, training=True, momentum=0.3)
        return (normalized**3).sum() + (p**2 * (running[0].detach() + 2 * running[1].detach())).sum()

    one = torch.ones(3, dtype=F64)
    result = product(loss, one, one)
    plain = by_double_backward(lambda p: (F.batch_norm(x * p, None, None, training=True) ** 3).sum(), one, one)
    assert_close(result - plain, 2 * (mean + 2 * variance))


@forward_products
def test_a_single_value_per_channel_is_torchs_own_error(product):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        product(lambda p: F.batch_norm(p, None, None, training=True).sum(), randn(1, 3), randn(1, 3))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        product(lambda p: F.instance_norm(p).sum(), randn(2, 3, 1), randn(2, 3, 1))


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_spelled_out_normalizations_accumulate_in_float32(name):
    x = (randn(4, 3, 64) + 100).bfloat16()  # statistics in bfloat16 would be worthless so far from 0
    arguments = {"layer_norm": ((64,),), "batch_norm": (None, None, None, None, True), "instance_norm": ()}[name]
    result = getattr(_decompositions, name)(x, *arguments)
    exact = getattr(F, name)(x.double(), *arguments)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-4)


# Losses that take derivatives themselves


def _physics_informed(norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 1)).double()
    return hf.functionalize(model)


def _explicit_network(p, z):
    hidden = z @ p["0.weight"].T + p["0.bias"]
    centered = hidden - hidden.mean(-1, keepdim=True)
    normalized = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return torch.tanh(normalized * p["1.weight"] + p["1.bias"]) @ p["3.weight"].T + p["3.bias"]


@every_product
@pytest.mark.parametrize("derivative", ["gradient", "laplacian"])
def test_derivatives_of_a_network_with_layer_norm_inside_the_loss(product, derivative):
    call, params = _physics_informed(nn.LayerNorm(4))
    points = randn(3, 2)
    v = randn_like(params, seeded(1))

    def physics(network):
        def loss(p):
            def field(z):
                return network(p, z).squeeze()

            if derivative == "gradient":
                return (torch.func.vmap(torch.func.grad(field))(points).square().sum(1) - 1).square().mean()
            hessians = torch.func.vmap(torch.func.hessian(field))(points)
            return (hessians.diagonal(dim1=1, dim2=2).sum(1) - 1).square().mean()

        return loss

    explicit = hf.hvp_double_backward(physics(_explicit_network), params, v)
    assert_close(product(physics(call), params, v), explicit, 1e-9)


def test_derivatives_by_torchs_tape_inside_the_loss():
    call, params = _physics_informed(nn.LayerNorm(4))
    points = randn(3, 2)
    v = randn_like(params, seeded(1))

    def physics(network):
        def loss(p):
            z = points.clone().requires_grad_()
            (slopes,) = torch.autograd.grad(network(p, z).sum(), z, create_graph=True)
            return (slopes.square().sum(1) - 1).square().mean()

        return loss

    explicit = hf.hvp_double_backward(physics(_explicit_network), params, v)
    assert_close(hf.hvp_double_backward(physics(call), params, v), explicit)
    for product in FORWARD:
        with pytest.raises(NotImplementedError, match=r"on torch's own tape.*Use hessfunc.hvp_double_backward"):
            product(physics(call), params, v)


def test_tape_gradients_with_respect_to_activations_inside_the_loss():
    weight, v, x = randn(4, 3), randn(4, 3, seed=1), randn(5, 3, seed=2)

    def loss(p, norm=lambda h: F.layer_norm(h, (4,))):
        hidden = x @ p.T
        (slopes,) = torch.autograd.grad(norm(hidden).pow(3).sum(), hidden, create_graph=True)
        return slopes.square().sum()

    def explicit(hidden):
        centered = hidden - hidden.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    reference = by_double_backward(lambda p: loss(p, explicit), weight, v)
    for product in (hf.hvp, hf.hvp_double_backward):
        assert_close(product(loss, weight, v), reference, 1e-9)
    with pytest.raises(RuntimeError, match="does not require grad"):
        hf.hvp_reverse_over_forward(loss, weight, v)


# What cannot be done says so


@forward_products
def test_operations_without_forward_mode_name_the_way_out(product):
    grid = randn(1, 3, 3, 2).tanh()
    params, v = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)

    def loss(p):
        return F.grid_sample(p, grid, align_corners=False).pow(3).sum()

    with pytest.raises(NotImplementedError, match=r"without forward-mode.*grid_sampler_2d.*hvp_double_backward"):
        product(loss, params, v)
    assert_close(hf.hvp_double_backward(loss, params, v), by_double_backward(loss, params, v))
    assert torch.is_grad_enabled()


@forward_products
def test_products_over_groups_are_refused_by_forward_mode(product):
    index = torch.tensor([0, 0, 1, 1, 2])
    params, v = randn(5), randn(5, seed=1)

    def scattered(p, reduce):
        return torch.zeros(3, dtype=F64).scatter_reduce(0, index, p, reduce, include_self=False).tanh().sum()

    with pytest.raises(NotImplementedError, match=r"calls scatter_reduce, which torch differentiates wrongly"):
        product(lambda p: scattered(p, "prod"), params, v)
    reference = by_double_backward(lambda p: scattered(p, "sum"), params, v)
    assert_close(product(lambda p: scattered(p, "sum"), params, v), reference)
    assert_close(
        hf.hvp_double_backward(lambda p: scattered(p, "prod"), params, v),
        by_double_backward(lambda p: scattered(p, "prod"), params, v),
    )


def test_errors_of_the_user_pass_unchanged():
    def loss(_):
        raise NotImplementedError("the user's own")

    for product in PRODUCTS:
        with pytest.raises(NotImplementedError, match=r"^the user's own$"):
            product(loss, torch.ones(2), torch.ones(2))


# Memory: no graph of the backward pass is kept


def _peak(function):
    """Most bytes that a call holds at once, beyond those held at its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_hvp_keeps_no_graph_of_the_backward_pass():
    width, depth, rows = 16, 12, 512
    params = [torch.randn(width, width, generator=seeded(i)) / 4 for i in range(depth)]
    x = torch.randn(rows, width, generator=seeded(99))

    def loss(params):
        h = x
        for weight in params:
            h = F.silu(torch.tanh(h @ weight))
        return h.square().mean()

    activation = 4 * rows * width
    hvp = _peak(lambda: hf.hvp(loss, params, params))
    graph_kept = _peak(lambda: torch.func.jvp(torch.func.grad(loss), (params,), (params,)))
    gradient = _peak(lambda: torch.func.vjp(loss, params)[1](torch.ones(()), retain_graph=False, create_graph=False))
    assert hvp < 0.6 * graph_kept
    # What the backward pass needs and its tangent, and a few activations besides: none for each layer.
    assert hvp < 2 * gradient + 8 * activation


def test_nothing_of_a_product_outlives_it():
    params = [torch.randn(64, 64, generator=seeded(i)) for i in range(6)]

    def loss(params):
        h = params[0]
        for weight in params:
            h = torch.tanh(h @ weight)
        return h.sum()

    def held():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in range(3):
                hf.hvp(loss, params, params)
        return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")

    held()
    assert held() == 0
