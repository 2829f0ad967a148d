"""Fisher products and operators against sums over enumerated targets and per-observation gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded
from torch import nn

import hessfunc as hf
from hessfunc import tree
from hessfunc._fisher import fisher, fishervp
from hessfunc._gauss_newton import ggn

N, T, C = 4, 3, 3


def points(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(2), dtype=F64)


def model(*inner: int) -> tuple[Any, Any]:
    """``(batch, ..., 2)`` inputs to ``(batch, ..., 3)`` outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(inner))
        return hf.functionalize(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, C)).double())


def time_last(call: Any) -> Any:
    return lambda p, x: call(p, x).transpose(1, 2)


def transposing(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z.transpose(1, 2), y)


def flattening(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.CrossEntropyLoss()(z.flatten(0, 1), y.flatten())


def observations(call: Any, params: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (positions, classes) and their Jacobian (positions, classes, parameters)."""
    layout = tree.Layout.of(params)
    z = call(params, x).reshape(-1, C)
    J = torch.autograd.functional.jacobian(lambda q: call(layout.unravel(q), x).reshape(-1, C), layout.ravel(params))
    return z, J


def mean_outer(scores: torch.Tensor, J: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum of the outer products of J^T s over positions, times a weight."""
    gradients = torch.einsum("ic,icp->ip", scores, J)
    return weight * gradients.T @ gradients


def enumerated(z: torch.Tensor, J: torch.Tensor, weight: float) -> torch.Tensor:
    """The expectation over classes, one after the other."""
    p = z.softmax(-1)
    total = torch.zeros(J.shape[2], J.shape[2], dtype=F64)
    for label in range(C):
        scores = p - F.one_hot(torch.tensor(label), C)
        total = total + mean_outer(p[:, label, None].sqrt() * scores, J, weight)
    return total


CASES: dict[str, Any] = {
    "(batch, classes)": (F.cross_entropy, (N,), lambda call: call),
    "(batch, classes, time)": (nn.CrossEntropyLoss(), (N, T), time_last),
    "(batch, time, classes), transposed": (transposing, (N, T), lambda call: call),
    "(batch, time, classes), flattened": (flattening, (N, T), lambda call: call),
}


@pytest.mark.parametrize("name", CASES)
def test_cross_entropy_in_every_layout(name):
    criterion, shape, arrange = CASES[name]
    call, params = model(*shape)
    x, y = points(*shape, 2), torch.randint(0, C, shape, generator=seeded(3))
    z, J = observations(call, params, x)
    weight = 1 / z.shape[0]
    exact = enumerated(z, J, weight)
    type2 = fisher(arrange(call), criterion, params, (x, y))
    assert relative_error(type2.dense(), exact) < 1e-12
    assert relative_error(type2.dense(), exact) < 1e-12
    assert relative_error(ggn(arrange(call), criterion, params, (x, y)).dense(), exact) < 1e-12
    scores = z.softmax(-1) - F.one_hot(y.flatten(), C)
    empirical = fisher(arrange(call), criterion, params, (x, y), kind="empirical")
    assert relative_error(empirical.dense(), mean_outer(scores, J, weight)) < 1e-12
    assert torch.linalg.eigvalsh(empirical.dense()).min() > -1e-14


def test_empirical_is_the_mean_of_outer_products_of_per_sample_gradients():
    call, params = model(N)
    x, y = points(N, 2), torch.tensor([0, 2, 1, 1])
    layout = tree.Layout.of(params)
    single = torch.func.vmap(
        torch.func.grad(lambda p, a, b: F.cross_entropy(call(p, a[None]), b[None])), in_dims=(None, 0, 0)
    )
    gradients = layout.ravel_rows(single(params, x, y))
    dense = fisher(call, F.cross_entropy, params, (x, y), kind="empirical").dense()
    assert relative_error(dense, gradients.T @ gradients / N) < 1e-12


def test_type2_does_not_look_at_the_targets():
    call, params = model(N)
    x = points(N, 2)
    left = fisher(call, F.cross_entropy, params, (x, torch.zeros(N, dtype=torch.long)))
    right = fisher(call, F.cross_entropy, params, (x, torch.full((N,), 2)))
    assert torch.equal(left.dense(), right.dense())


@pytest.mark.parametrize("criterion", [F.mse_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("shape", [(N,), (N, T)])
def test_normal_and_bernoulli(criterion, shape):
    call, params = model(*shape)
    x = points(*shape, 2)
    y = points(*shape, C).abs() if criterion is F.mse_loss else (points(*shape, C) > 0).to(F64)
    z, J = observations(call, params, x)
    weight = 1 / z.numel()
    type2 = fisher(call, criterion, params, (x, y)).dense()
    assert relative_error(type2, ggn(call, criterion, params, (x, y)).dense()) < 1e-12
    target = y.reshape(-1, C)
    scores = 2 * (z - target) if criterion is F.mse_loss else z.sigmoid() - target
    empirical = fisher(call, criterion, params, (x, y), kind="empirical").dense()
    assert relative_error(empirical, mean_outer(scores, J, weight)) < 1e-12


def test_outputs_with_one_axis_hold_one_observation_per_number():
    call = lambda w, x: torch.tanh(x @ w)  # noqa: E731
    w, x, y = points(2), points(N, 2), points(N)
    J = torch.func.jacrev(call)(w, x)
    scores = 2 * (call(w, x) - y)
    dense = fisher(call, F.mse_loss, w, (x, y), kind="empirical").dense()
    assert relative_error(dense, (J * scores[:, None]).T @ (J * scores[:, None]) / N) < 1e-12


@pytest.mark.parametrize("kind", ["type2", "empirical"])
def test_ignored_positions_do_not_count(kind):
    call, params = model(N, T)
    x, y = points(N, T, 2), torch.randint(0, C, (N, T), generator=seeded(3))
    y[0, :2], y[3, 1] = -100, -100
    keep = y.flatten() != -100
    some = fisher(call, transposing, params, (x, y), kind=kind).dense()
    only = fisher(call, F.cross_entropy, params, (x.flatten(0, 1)[keep], y.flatten()[keep]), kind=kind).dense()
    assert relative_error(some, only) < 1e-12


@pytest.mark.parametrize("kind", ["type2", "empirical", "mc"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_and_reductions(kind, reduction):
    call, params = model(N)
    x, y = points(N, 2), torch.tensor([0, 2, 1, 1])
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options = {"kind": kind, "reduction": reduction}
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]

    def dense(data: Any) -> torch.Tensor:
        generator = {"generator": seeded(6)} if kind == "mc" else {}
        return fisher(call, criterion, params, data, **options, **generator).dense()

    # The generator's stream is the same for one batch of four and for batches of three and one.
    assert relative_error(dense(batches), dense((x, y))) < 1e-12
    scale = N if reduction == "sum" else 1
    z, J = observations(call, params, x)
    if kind == "type2":
        assert relative_error(dense(batches), scale * enumerated(z, J, 1 / N)) < 1e-12


SAMPLED: dict[str, Any] = {
    "categorical": (F.cross_entropy, torch.tensor([0, 2, 1, 1])),
    "normal": (F.mse_loss, points(N, C)),
    "bernoulli": (F.binary_cross_entropy_with_logits, (points(N, C) > 0).to(F64)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_matrices_average_to_the_exact_one(name):
    criterion, y = SAMPLED[name]
    call, params = model(N)
    x = points(N, 2)
    exact = fisher(call, criterion, params, (x, y)).dense()
    v = torch.randn(exact.shape[0], generator=seeded(7), dtype=F64)
    tree_v = tree.Layout.of(params).unravel(v)
    generator = seeded(8)
    forms = torch.stack(
        [
            tree.vdot(tree_v, fishervp(call, criterion, params, tree_v, x, y, kind="mc", generator=generator))
            for _ in range(400)
        ]
    )
    stderr = forms.std() / 20
    assert abs(forms.mean() - v @ exact @ v) < 3.5 * stderr
    assert stderr < 0.1 * (v @ exact @ v)
    many = fisher(call, criterion, params, (x, y), kind="mc", num_samples=400, generator=seeded(9), linearize=False)
    assert abs(v @ many.vector(v) - v @ exact @ v) < 3.5 * stderr


def test_samples_are_fixed_so_that_the_operator_is_one_matrix():
    call, params = model(N)
    x, y = points(N, 2), torch.tensor([0, 2, 1, 1])
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    F_mc = fisher(call, F.cross_entropy, params, batches, kind="mc", generator=seeded(10))
    dense = F_mc.dense()
    assert relative_error(F_mc.dense(), dense) < 1e-14
    assert relative_error(dense, dense.T) < 1e-12
    assert torch.linalg.eigvalsh(dense).min() > -1e-14
    assert torch.linalg.matrix_rank(dense, rtol=1e-10) <= N
    again = fisher(call, F.cross_entropy, params, loader, kind="mc", generator=seeded(10))
    assert relative_error(again.dense(), dense) < 1e-12
    other = fisher(call, F.cross_entropy, params, batches, kind="mc", generator=seeded(11))
    assert relative_error(other.dense(), dense) > 0.01


def test_one_sample_for_each_token():
    call, params = model(N, T)
    x, y = points(N, T, 2), torch.randint(0, C, (N, T), generator=seeded(3))
    y[1, 2] = -100
    dense = fisher(call, transposing, params, (x, y), kind="mc", generator=seeded(12)).dense()
    # Any choice of labels gives a matrix of this form; find the one drawn.
    from hessfunc._likelihood import observe

    seen = observe(transposing, call(params, x), y)
    labels = seen.family.sample(seen, seeded(12))
    assert labels.shape == y.shape
    assert labels[1, 2] == -100
    assert not torch.equal(labels, y)
    reference = fisher(call, transposing, params, (x, labels), kind="empirical").dense()
    assert relative_error(dense, reference) < 1e-12


def test_vmap_over_vectors_and_parameters():
    call, params = model(N)
    batch = (points(N, 2), torch.tensor([0, 2, 1, 1]))
    layout = tree.Layout.of(params)
    vectors = randn_like(params, seeded(3), (4,))
    for kind in ("type2", "empirical"):
        dense = fisher(call, F.cross_entropy, params, batch, kind=kind).dense()
        lanes = torch.func.vmap(lambda v, k=kind: fishervp(call, F.cross_entropy, params, v, *batch, kind=k))(vectors)
        assert relative_error(layout.ravel_rows(lanes), layout.ravel_rows(vectors) @ dense) < 1e-12
    v = randn_like(params, seeded(4))
    ensemble = tree.stack([params, tree.scale(0.5, params)])
    members = torch.func.vmap(lambda p: fishervp(call, F.cross_entropy, p, v, *batch))(ensemble)
    for i in range(2):
        alone = fishervp(call, F.cross_entropy, tree.index(ensemble, i), v, *batch)
        assert relative_error(tree.index(members, i), alone) < 1e-12
    drawn = torch.func.vmap(
        lambda v: fishervp(call, F.cross_entropy, params, v, *batch, kind="mc", generator=seeded(5)), randomness="same"
    )(vectors)
    fixed = fisher(call, F.cross_entropy, params, batch, kind="mc", generator=seeded(5))
    assert relative_error(layout.ravel_rows(drawn), fixed.rows(layout.ravel_rows(vectors))) < 1e-12


def test_estimators_take_it():
    call, params = model(N)
    F_emp = fisher(call, F.cross_entropy, params, (points(N, 2), torch.tensor([0, 2, 1, 1])), kind="empirical")
    pairs = hf.eigsh(F_emp, 2, tol=1e-8, generator=seeded(1))
    assert relative_error(pairs.eigenvalues, torch.linalg.eigvalsh(F_emp.dense()).flip(0)[:2]) < 1e-8


@pytest.mark.parametrize(
    ("criterion", "target", "message"),
    [
        (lambda z, y: ((z - y) ** 2).mean(), points(N, C), "criterion cannot be read as a negative log-likelihood"),
        (lambda z, y: 0.5 * F.mse_loss(z, y), points(N, C), "not scaled and not added to. hessfunc.ggn takes any"),
        (
            lambda z, y: F.mse_loss(z, y) + F.mse_loss(2 * z, y),
            points(N, C),
            "criterion cannot be read as a negative log-likelihood",
        ),
        (nn.HuberLoss(), points(N, C), "criterion cannot be read as a negative log-likelihood"),
        (
            nn.CrossEntropyLoss(torch.ones(C, dtype=F64)),
            torch.tensor([0, 2, 1, 1]),
            "with weight the loss is no negative log-likelihood",
        ),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 2, 1, 1]), "with label_smoothing the loss is no"),
        (nn.CrossEntropyLoss(), points(N, C).softmax(1), "cross_entropy with class probabilities as target"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(C, dtype=F64)),
            points(N, C).sigmoid(),
            "with pos_weight the loss is no negative log-likelihood",
        ),
        (F.binary_cross_entropy_with_logits, points(N, C).sigmoid(), None),
        (nn.CrossEntropyLoss(reduction="none"), torch.tensor([0, 2, 1, 1]), "reduction='none' leaves no scalar"),
        (nn.MSELoss(), points(N, 1), r"target has shape \(4, 1\) and outputs \(4, 3\)"),
        (
            lambda z, y: F.mse_loss(z, y, reduce=True),
            points(N, C),
            "reduce is an old option of torch",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*mse_loss broadcasts them:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_what_is_no_likelihood_is_refused(criterion, target, message):
    call, params = model(N)
    batch = (points(N, 2), target)
    if message is None:
        fisher(call, criterion, params, batch)
        return
    with pytest.raises(ValueError, match=message):
        fishervp(call, criterion, params, params, *batch)
    with pytest.raises(ValueError, match=message):
        fisher(call, criterion, params, batch)


def test_errors_name_the_remedy():
    call, params = model(N)
    batch = (points(N, 2), torch.tensor([0, 2, 1, 1]))

    def product(**options: Any) -> Any:
        return fishervp(call, F.cross_entropy, params, params, *batch, **options)

    def operator(**options: Any) -> Any:
        return fisher(call, F.cross_entropy, params, batch, **options)

    for function in (product, operator):
        with pytest.raises(ValueError, match="kind='exact' is not known; expected one of 'type2', 'mc', 'empirical'"):
            function(kind="exact")
        with pytest.raises(TypeError, match=r"generator is of type NoneType, expected a torch\.Generator"):
            function(kind="mc")
        with pytest.raises(TypeError, match="generator is given, but kind='type2' draws nothing"):
            function(generator=seeded())
        with pytest.raises(ValueError, match="num_samples=2, but kind='empirical' draws nothing"):
            function(kind="empirical", num_samples=2)
        with pytest.raises(ValueError, match="num_samples=0 is out of range"):
            function(kind="mc", num_samples=0, generator=seeded())
    with pytest.raises(ValueError, match="reduction='sum', but the criterion reduces over its batch by 'mean'"):
        operator(reduction="sum")
    with pytest.raises(TypeError, match="needs inputs and a target"):
        fishervp(call, F.cross_entropy, params, params, batch[0])
    with pytest.raises(ValueError, match="v has a different pytree structure from params"):
        fishervp(call, F.cross_entropy, params, [torch.ones(2)], *batch)


def test_a_shuffling_loader_is_refused_where_samples_are_fixed():
    call, params = model(N)

    class Reversing:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            x, y = points(N, 2), torch.tensor([0, 2, 1, 1])
            order = range(2) if self.passes < 3 else range(1, -1, -1)
            return iter([(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]) for i in order])

    F_mc = fisher(call, F.cross_entropy, params, Reversing(), kind="mc", generator=seeded())
    with pytest.raises(ValueError, match=r"data: batch 0 is not the one that targets were drawn for.*shuffle=False"):
        F_mc(params)
