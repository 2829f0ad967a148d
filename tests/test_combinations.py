"""Every estimator on every kind of operator, and every kernel on it under vmap, against its dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from helpers import F64, LargestTensor, relative_error, seeded, symmetric
from torch import nn

import hessfunc as hf
from hessfunc import tree

C, N = 4, 11


@cache
def setting() -> Any:
    """Model, loss, parameters and ragged batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        call, params = hf.functionalize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).double())
    x = 2 * torch.randn(N, 3, generator=seeded(1), dtype=F64)
    y = torch.randint(0, C, (N,), generator=seeded(2))

    def loss(p: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(call(p, x), y)

    return call, loss, params, [(x[:4], y[:4]), (x[4:], y[4:])]


def hessian(**options: Any) -> hf.Operator:
    _, loss, params, data = setting()
    return hf.hessian(loss, params, data, **options)


def ggn() -> hf.Operator:
    call, _, params, data = setting()
    return hf.ggn(call, F.cross_entropy, params, data)


def fisher(kind: str) -> hf.Operator:
    call, _, params, data = setting()
    options = {"generator": seeded(3), "num_samples": 2} if kind == "mc" else {}
    return hf.fisher(call, F.cross_entropy, params, data, kind=kind, **options)


def term(name: str) -> hf.Operator:
    call, _, params, data = setting()
    return hf.ggn_hierarchy(call, F.cross_entropy, params, data).terms[name]


def block() -> hf.Operator:
    _, loss, params, data = setting()
    return hf.hessian(*hf.restrict(loss, params, "0"), data)


def block_of_the_ggn() -> hf.Operator:
    call, _, params, data = setting()
    model_fn, selected = hf.restrict(call, params, "*.weight")
    return hf.ggn(model_fn, F.cross_entropy, selected, data)


def moved() -> hf.Operator:
    _, loss, params, data = setting()
    return hf.hessian(loss, tree.map_leaves(torch.zeros_like, params), data).at(params)


def matvec() -> hf.Operator:
    matrix = symmetric([*torch.linspace(-1, 2, 12).tolist(), 5.0, -3.0], seed=4)
    like = {"a": torch.zeros(2, 5, dtype=F64), "b": torch.zeros(4, dtype=F64)}
    layout = tree.Layout.of(like)
    return hf.as_operator(lambda v: layout.unravel(matrix @ layout.ravel(v)), like)


KINDS: dict[str, Callable[[], hf.Operator]] = {
    "hessian": hessian,
    "hessian untraced": lambda: hessian(linearize=False),
    "hessian by double backward": lambda: hessian(product=hf.hvp_double_backward),
    "hessian moved": moved,
    "ggn": ggn,
    "fisher type 2": lambda: fisher("type2"),
    "fisher sampled": lambda: fisher("mc"),
    "fisher empirical": lambda: fisher("empirical"),
    "residual": lambda: hessian() - ggn(),
    "shifted": lambda: hessian().shift(0.3),
    "scaled sum": lambda: 2.0 * hessian() + 0.5 * ggn(),
    "class term": lambda: term("class"),
    "cross term": lambda: term("cross"),
    "within term": lambda: term("within"),
    "label term": lambda: term("label"),
    "block": block,
    "block of the ggn": block_of_the_ggn,
    "matrix": lambda: hf.as_operator(symmetric([-4.0, *torch.linspace(-1, 1, 15).tolist(), 6.0], seed=5)),
    "matvec": matvec,
}
SEMIDEFINITE = {name for name in KINDS if any(word in name for word in ("ggn", "fisher", "term"))}


@cache
def subject(kind: str) -> tuple[hf.Operator, torch.Tensor, torch.Tensor]:
    """Operator, dense matrix, and eigenvalues, decreasing."""
    H = KINDS[kind]()
    dense = H.dense()
    assert relative_error(dense, dense.T) < 1e-10
    return H, dense, torch.linalg.eigvalsh(dense).flip(0)


def within(estimate: hf.Estimate, exact: torch.Tensor | float) -> bool:
    slack = 1e-9 * (abs(float(exact)) + 1e-3)
    return abs(float(estimate) - float(exact)) <= 5 * float(estimate.stderr) + slack


def check_eigsh(H: hf.Operator, _dense: torch.Tensor, exact: torch.Tensor) -> None:
    magnitude = exact[exact.abs().argsort(descending=True)]
    for which, expected in (("LM", magnitude[:2]), ("LA", exact[:2]), ("BE", exact[[0, -1]])):
        found = hf.eigsh(H, 2, which=which, tol=1e-6, max_matvecs=5000, generator=seeded(1))
        # To the tolerance where eigenvalues lie at the rounding level of the operator
        assert float((found.eigenvalues - expected).abs().max()) < 1e-7 * float(magnitude[0].abs())
        rows = found.rows()
        assert relative_error(rows @ rows.T, torch.eye(2, dtype=F64)) < 1e-8


def check_power(H: hf.Operator, _dense: torch.Tensor, exact: torch.Tensor) -> None:
    found = hf.power_eigenpairs(H, 1, tol=1e-4, max_matvecs=4000, generator=seeded(1))
    assert float(found.eigenvalues[0].abs()) == pytest.approx(float(exact.abs().max()), rel=1e-4)


def check_traces(H: hf.Operator, dense: torch.Tensor, _exact: torch.Tensor) -> None:
    pairs = hf.eigsh(H, 2, generator=seeded(1))
    for estimate in (
        hf.hutchinson(H, num_probes=30, generator=seeded(2)),
        hf.hutchinson(H, num_probes=30, deflate=pairs, generator=seeded(2)),
        hf.hutchpp(H, num_probes=12, generator=seeded(3)),
        hf.deflated(H, pairs, num_probes=12, generator=seeded(2)),
        hf.xtrace(H, num_probes=H.size // 2, generator=seeded(2)),
    ):
        assert within(estimate, dense.trace())
    shares = hf.hutchinson(H, num_probes=60, generator=seeded(3)).per_leaf
    ends = torch.tensor(H.layout.sizes).cumsum(0).tolist()
    for (name, share), end, size in zip(shares.items(), ends, H.layout.sizes, strict=True):
        assert name in H.layout.names
        assert within(share, dense[end - size : end, end - size : end].trace())


def check_nystrom(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    lowest = float(exact[-1])
    positive = H if lowest > -1e-10 * float(exact[0]) else H.shift(0.1 - lowest)
    trace = dense.trace() + (0 if positive is H else (0.1 - lowest) * H.size)
    assert within(hf.xnystrace(positive, num_probes=H.size // 2, generator=seeded(2)), trace)


def check_diagonals(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    for estimate in (
        hf.diagonal(H, num_probes=40, generator=seeded(2)),
        hf.xdiag(H, num_probes=H.size // 3, generator=seeded(2)),
    ):
        error = H.layout.ravel(estimate.value) - dense.diagonal()
        stderr = H.layout.ravel(estimate.stderr)
        assert float(error.norm()) < 2 * float(stderr.norm()) + 1e-10
        assert within(estimate.trace, dense.trace())
        assert within(estimate.frobenius_squared, exact.square().sum())
    assert within(hf.frobenius_squared(H, num_probes=40, generator=seeded(2)), exact.square().sum())


def check_slq(H: hf.Operator, _dense: torch.Tensor, exact: torch.Tensor) -> None:
    for options in ({}, {"exact_outliers": False}):
        quadrature = hf.slq(H, num_steps=8, num_probes=16, generator=seeded(2), **options)
        assert within(quadrature.moment(2), exact.square().mean())
        density = quadrature.density()
        assert float(torch.trapezoid(density.values, density.grid)) == pytest.approx(1, abs=0.02)


def check_krylov(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    run = hf.krylov(H, num_steps=min(12, H.size), num_probes=20, generator=seeded(2))
    assert within(run.trace, dense.trace())
    top = run.eigenpairs(1, tol=0.1)
    assert abs(float(top.eigenvalues[0].abs()) - float(exact.abs().max())) <= float(top.residuals[0]) + 1e-9


def check_sharpness(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    measures = hf.sharpness(H, num_probes=30, tol=1e-6, generator=seeded(2))
    assert float(measures.lambda_max - exact[0]) == pytest.approx(0, abs=1e-7 * float(exact.abs().max()))
    assert within(measures.trace, dense.trace())
    rank = hf.stable_rank(H, num_probes=30, tol=1e-6, generator=seeded(2))
    assert within(rank, exact.square().sum() / exact.abs().max() ** 2)
    positive = H.shift(0.5 - float(exact[-1]))
    values = exact + 0.5 - float(exact[-1])
    assert hf.condition_number(positive, tol=1e-5, generator=seeded(2)) == pytest.approx(
        float(values[0] / values[-1]), rel=1e-3
    )
    quadrature = hf.slq(positive, num_steps=10, num_probes=30, generator=seeded(2))
    assert within(hf.effective_dimension(quadrature, 0.2), (values / (values + 0.2)).sum())


def check_track(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    state, first = hf.track_step(H, num_probes=10, generator=seeded(2))
    _, second = hf.track_step(H, state, num_probes=10, verify_steps=0, generator=seeded(2))
    for record in (first, second):
        assert abs(float(record.eigenvalues[0] - exact[0])) <= float(record.residuals[0]) + 1e-12
        assert within(record.trace, dense.trace())
    assert second.num_matvecs < first.num_matvecs


def check_scipy(H: hf.Operator, dense: torch.Tensor, exact: torch.Tensor) -> None:
    vector = torch.randn(H.size, generator=seeded(3), dtype=F64)
    assert relative_error(torch.from_numpy(H.to_scipy() @ vector.numpy()), dense @ vector) < 1e-10
    found = scipy.sparse.linalg.eigsh(H.to_scipy(), k=1, which="LM", v0=vector.numpy(), return_eigenvectors=False)
    assert abs(float(found[0])) == pytest.approx(float(exact.abs().max()), rel=1e-7)


def check_kernels_under_vmap(H: hf.Operator, dense: torch.Tensor, _exact: torch.Tensor) -> None:
    V = torch.randn(2, 3, H.size, generator=seeded(4), dtype=F64)
    nested = torch.func.vmap(torch.func.vmap(H.vector))(V)
    assert relative_error(nested, V @ dense) < 1e-10
    trees = H.layout.unravel_rows(V[0])
    assert relative_error(H.layout.ravel_rows(torch.func.vmap(H)(trees)), V[0] @ dense) < 1e-10
    assert relative_error(H.layout.ravel_rows(H.matmat(trees)), V[0] @ dense) < 1e-10
    runs = torch.func.vmap(lambda v: hf.lanczos(H.vector, v, 3))(V[0])
    exact = [hf.lanczos(lambda v: dense @ v, v, 3) for v in V[0]]
    assert relative_error(runs.alphas, torch.stack([run.alphas for run in exact])) < 1e-9
    power = torch.func.vmap(lambda v: hf.power_iteration(H.vector, v, 4))(V[0])
    alone = [hf.power_iteration(lambda v: dense @ v, v, 4) for v in V[0]]
    assert relative_error(power.eigenvalue, torch.stack([run.eigenvalue for run in alone])) < 1e-9
    # Linear, so its derivative is itself.
    gradient = torch.func.grad(lambda v: H.vector(v) @ V[0, 1])(V[0, 0])
    assert relative_error(gradient, dense @ V[0, 1]) < 1e-10


CHECKS = {
    "eigsh": check_eigsh,
    "power": check_power,
    "traces": check_traces,
    "nystrom": check_nystrom,
    "diagonals": check_diagonals,
    "slq": check_slq,
    "krylov": check_krylov,
    "sharpness": check_sharpness,
    "track": check_track,
    "scipy": check_scipy,
    "vmap": check_kernels_under_vmap,
}


@pytest.mark.filterwarnings("ignore::hessfunc.ConvergenceWarning")  # of loose pairs that only deflate
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimator_on_operator(kind, check):
    CHECKS[check](*subject(kind))


@pytest.mark.parametrize("kind", sorted(SEMIDEFINITE))
def test_matrices_that_are_semidefinite_by_definition(kind):
    _, _, exact = subject(kind)
    assert float(exact[-1]) > -1e-12 * float(exact[0])


CRITERIA: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross-entropy": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "squared error": F.mse_loss,
    "convex": lambda z, y: z.logsumexp(-1).square().mean() - z.gather(-1, y.unsqueeze(-1)).mean(),
}


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("name", CRITERIA)
def test_no_tensor_of_batch_times_classes_times_classes_arises_on_sequences(name, linearize):
    batch, time, classes = 4, 5, 40
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        call, params = hf.functionalize(nn.Linear(3, classes).double())
    x = torch.randn(batch, time, 3, generator=seeded(1), dtype=F64)
    y = torch.randint(0, classes, (batch, time), generator=seeded(2))
    target = F.one_hot(y, classes).to(F64)
    criterion, data = CRITERIA[name], (x, target if name == "squared error" else y)
    operators = [hf.ggn(call, criterion, params, data, linearize=linearize)]
    if name != "convex":
        for kind in ("type2", "empirical", "mc"):
            options = {"generator": seeded(3)} if kind == "mc" else {}
            operators.append(hf.fisher(call, criterion, params, data, kind=kind, linearize=linearize, **options))
        assert relative_error(operators[1].dense(), operators[0].dense()) < 1e-12
    for operator in operators:
        for _ in range(2):
            with LargestTensor() as largest:
                operator.vector(torch.ones(operator.size, dtype=F64))
            assert 0 < largest.entries <= 2 * batch * time * classes
