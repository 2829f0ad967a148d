"""What an accelerator would trip over, on a machine that has none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import randn_like, relative_error, seeded
from test_architectures import INPUTS, MODELS, images, made, randint, resnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc import _probes, tree

MAKING_TENSORS_ON_THE_CPU = {"mixture of experts", "graph convolution"}  # the models themselves do


@pytest.mark.parametrize("name", sorted(set(MODELS) - MAKING_TENSORS_ON_THE_CPU))
def test_products_stay_on_the_device_of_their_arguments(name):
    """On torch's device without memory, which takes no tensor of the CPU beside its own."""
    build, kind = MODELS[name]
    x = INPUTS[kind]()
    model = made(build, x).train("train" in name)
    output = model(x)
    target = randint(output.shape[1], output.shape[0], *output.shape[2:]).to("meta")
    model, x = model.to("meta"), x.to("meta")
    loss, params = hf.module_loss(model, F.cross_entropy)
    call, _ = hf.functionalize(model)
    products = [product(loss, params, params, x, target) for product in (hf.hvp, hf.hvp_double_backward)]
    products.append(hf.hvp_reverse_over_forward(loss, params, params, x, target))
    products += [hf.ggnvp(call, F.cross_entropy, params, params, x, target)]
    products += [hf.fishervp(call, F.cross_entropy, params, params, x, target, kind="empirical")]
    for product in products:
        assert {leaf.device.type for leaf in tree.leaves(product)} == {"meta"}


# With torch.set_default_device("cuda") a tensor made without a device lies on the accelerator; here on "meta".


def cpu_seeded(seed):
    return torch.Generator(device="cpu").manual_seed(seed)


def point():
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), X)
    return hf.module_loss(model, F.cross_entropy), hf.functionalize(model).call


X, Y = INPUTS["points"](), randint(3, 6)
(LOSS, PARAMS), CALL = point()
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
H = hf.hessian(LOSS, PARAMS, DATA)
G = hf.ggn(CALL, F.cross_entropy, PARAMS, DATA)
BIG = hf.as_operator(torch.diag(torch.linspace(1, 9, 60, dtype=torch.float64)))
PAIRS = hf.eigsh(H, 2, generator=seeded(0))
RIDGE = G.shift(1.0)
YES_OR_NO = (Y.unsqueeze(1) == torch.arange(3)).double()

CALLS = {
    "hvp": lambda _: hf.hvp(LOSS, PARAMS, PARAMS, *DATA[0]),
    "hessian": lambda _: hf.hessian(LOSS, PARAMS, DATA)(PARAMS),
    "hessian in one program": lambda _: hf.hessian(LOSS, PARAMS, DATA, memory_budget=0).dense(),
    "scipy": lambda _: torch.from_numpy(H.to_scipy() @ H.layout.ravel(PARAMS).numpy()),
    "ggn": lambda _: hf.ggn(CALL, F.cross_entropy, PARAMS, DATA)(PARAMS),
    "fisher": lambda _: hf.fisher(CALL, F.cross_entropy, PARAMS, DATA, kind="empirical")(PARAMS),
    "fisher of classes": lambda g: hf.fisher(CALL, F.cross_entropy, PARAMS, DATA, kind="mc", generator=g)(PARAMS),
    "fisher of numbers": lambda g: hf.fisher(CALL, F.mse_loss, PARAMS, (X, YES_OR_NO), kind="mc", generator=g)(PARAMS),
    "fisher of yes or no": lambda g: hf.fisher(
        CALL, F.binary_cross_entropy_with_logits, PARAMS, (X, YES_OR_NO), kind="mc", generator=g
    )(PARAMS),
    "hierarchy": lambda _: hf.ggn_hierarchy(CALL, F.cross_entropy, PARAMS, DATA).class_means(),
    "eigsh": lambda g: hf.eigsh(H, 3, generator=g).eigenvalues,
    "power": lambda _: hf.power_iteration(H, PARAMS, num_steps=5).eigenvalue,
    "power_eigenpairs": lambda g: hf.power_eigenpairs(G, 2, generator=g).eigenvalues,
    "lanczos": lambda _: hf.eigh_tridiagonal(*hf.lanczos(H, PARAMS, num_steps=5)[:2]).eigenvalues,
    "hutchinson": lambda g: hf.hutchinson(H, num_probes=4, generator=g).interval(),
    "hutchinson with pairs": lambda g: hf.hutchinson(H, num_probes=4, deflate=PAIRS, generator=g).interval(),
    "deflated": lambda g: hf.deflated(H, num_probes=12, generator=g).interval(),
    "hutchpp": lambda g: hf.hutchpp(BIG, num_probes=24, generator=g).interval(),
    "xtrace": lambda g: hf.xtrace(BIG, num_probes=24, generator=g).interval(),
    "xtrace of all": lambda g: hf.xtrace(H, num_probes=200, generator=g).interval(),
    "xnystrace": lambda g: hf.xnystrace(RIDGE, num_probes=24, generator=g).interval(),
    "slq": lambda g: hf.slq(H, num_steps=10, num_probes=3, generator=g).density().values,
    "slq with one probe": lambda g: hf.slq(H, num_steps=10, num_probes=1, generator=g).trace().interval(),
    "share of eigenvalues": lambda g: hf.slq(H, num_steps=10, num_probes=3, generator=g).cdf(0.1),
    "krylov": lambda g: hf.krylov(H, num_steps=20, num_probes=3, generator=g).quadrature.trace().interval(),
    "diagonal": lambda g: hf.diagonal(H, num_probes=8, generator=g).value,
    "frobenius_squared": lambda g: hf.frobenius_squared(H, num_probes=8, generator=g).interval(),
    "xdiag": lambda g: hf.xdiag(BIG, num_probes=12, generator=g).value,
    "xdiag of all": lambda g: hf.xdiag(H, num_probes=200, generator=g).value,
    "sharpness": lambda g: hf.sharpness(H, num_probes=4, generator=g).trace.interval(),
    "stable_rank": lambda g: hf.stable_rank(H, num_probes=4, generator=g).interval(),
    "condition_number": lambda g: hf.condition_number(RIDGE, generator=g),
    "blocks": lambda g: hf.block_spectra(LOSS, PARAMS, DATA, generator=g)["0.weight"].eigenpairs.eigenvalues,
    "mini-batches": lambda g: hf.minibatch_eigenvalues(LOSS, PARAMS, DATA, generator=g).eigenvalues,
    "track": lambda g: hf.Trajectory.of(hf.track(H, [PARAMS, PARAMS], num_probes=3, generator=g)).trace,
    "wasserstein": lambda g: hf.slq(H, num_steps=10, num_probes=3, generator=g).wasserstein(PAIRS.eigenvalues),
    "surface": lambda g: (
        hf.loss_surface(
            LOSS, PARAMS, tree.stack([hf.filter_normalized(PARAMS, generator=g)]), DATA, num_points=5
        ).losses
    ),
    "analyze": lambda g: hf.analyze(LOSS, PARAMS, DATA, k=2, surface_points=3, generator=g).trace.interval(),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_plays_no_part(name):
    expected = CALLS[name](cpu_seeded(1))
    with torch.device("meta"):
        result = CALLS[name](cpu_seeded(1))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", [_probes.signs, _probes.jittered, _probes.normal, _probes.sphere])
def test_probes_are_drawn_where_the_generator_is_and_lie_where_the_parameters_are(sampler):
    assert sampler(2, 9, generator=cpu_seeded(1), dtype=torch.float32, device="meta").device.type == "meta"


DEVICES = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("its_own", [False, True], ids=["generator on the CPU", "generator on the device"])
def test_results_on_a_device_are_those_on_the_cpu(device, its_own):
    if not DEVICES[device]():
        pytest.skip(f"no {device} here")
    loss, params = LOSS, tree.map_leaves(torch.Tensor.float, PARAMS)
    data = [(x.float(), y) for x, y in DATA]
    moved = tree.map_leaves(lambda leaf: leaf.to(device), params)
    operators = hf.hessian(loss, params, data), hf.hessian(loss, moved, [(x.to(device), y.to(device)) for x, y in data])
    dense = [H.dense().cpu() for H in operators]
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-3, atol=1e-3)
    drawn = torch.Generator(device=device if its_own else "cpu")
    values = [hf.eigsh(H, 2, tol=1e-4, generator=drawn.manual_seed(1)).eigenvalues.cpu() for H in operators]
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-3)
    for estimate in (hf.hutchinson, hf.xtrace, hf.deflated):
        low, high = estimate(operators[1], num_probes=8, generator=drawn.manual_seed(2)).interval(0.9999)
        assert low <= float(dense[0].trace()) <= high
    rule = hf.slq(operators[1], num_steps=10, num_probes=4, generator=drawn.manual_seed(3))
    assert float(rule.cdf(1e3)) == pytest.approx(1, abs=1e-4)


class SimulatedTF32(TorchDispatchMode):
    """Rounds what goes into a convolution to 10 bits, as torch's default on CUDA does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rounded = tuple(map(self.rounded, args)) if "convolution" in str(func) else args
        return func(*rounded, **(kwargs or {}))

    @staticmethod
    def rounded(value):
        if not isinstance(value, torch.Tensor):
            return value
        return (value.contiguous().view(torch.int32) + 2**12 & -(2**13)).view(torch.float32)


def test_convolutions_in_tf32_are_traced_and_pass_the_checks():
    model = made(resnet, images()).float().train()
    loss, params = hf.module_loss(model, F.cross_entropy)
    batch, v = (images().float(), randint(4, 3)), randn_like(params, seeded(1))
    exact = hf.hvp(loss, params, v, *batch)
    with SimulatedTF32(), warnings.catch_warnings():
        warnings.simplefilter("error")
        product = hf.hessian(loss, params, batch)(v)
    assert 1e-4 < relative_error(product, exact) < 0.05
