"""The mean of the Gauss rules of a run's last steps."""

import math

import pytest
import torch
from helpers import F64, seeded

import hessfunc as hf
from hessfunc import _probes
from hessfunc._mean_rule import mean_rule, recurrence, usual_num_rules


def diagonal(values):
    values = torch.as_tensor(values, dtype=F64)
    return hf.Operator(torch.zeros_like(values), lambda rows: rows * values)


def network_like(size=20_000):
    """Eigenvalues of all orders of magnitude, three in four above 0, and a few large ones."""
    draw = seeded(1)
    bulk = 10 ** (-4 * torch.rand(size - 20, generator=draw, dtype=F64) - 0.5)
    signs = torch.where(torch.rand(size - 20, generator=draw) < 0.75, 1.0, -0.5).double()
    return torch.cat([signs * bulk, 4 * torch.linspace(0.3, 1, 20, dtype=F64)])


def legendre(m):
    """Diagonal and off-diagonal of the Jacobi matrix of the uniform distribution on [-1, 1]."""
    i = torch.arange(1, m, dtype=F64)
    return torch.zeros(m, dtype=F64), i / (4 * i.square() - 1).sqrt()


def moment(nodes, weights, degree):
    return (weights * nodes**degree).sum(-1)


@pytest.mark.parametrize("num_rules", [1, 2, 5, 12])
def test_is_the_mean_of_the_rules(num_rules):
    alphas, betas = (part[None] for part in legendre(12))
    nodes, weights = mean_rule(alphas, betas, num_rules)
    rules = [hf.eigh_tridiagonal(alphas[:, :k], betas[:, : k - 1]) for k in range(12, 12 - num_rules, -1)]
    assert nodes.shape == weights.shape == (1, sum(range(12, 12 - num_rules, -1)))
    assert bool((nodes.diff(dim=1) >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(1, dtype=F64), rtol=0, atol=1e-14)
    for f in (torch.exp, torch.abs, lambda x: x**22, lambda x: (x > 0.3).double()):
        single = [(rule.eigenvectors[:, 0].square() * f(rule.eigenvalues)).sum(1) for rule in rules]
        torch.testing.assert_close((weights * f(nodes)).sum(1), torch.stack(single).mean(0), rtol=1e-13, atol=1e-15)


def test_is_exact_for_the_degrees_of_its_shortest_rule():
    alphas, betas = (part[None] for part in legendre(10))
    nodes, weights = mean_rule(alphas, betas, 3)  # of 10, 9 and 8 steps
    for degree in range(2 * 8):
        expected = (1 + (-1) ** degree) / 2 / (degree + 1)
        assert float(moment(nodes, weights, degree)) == pytest.approx(expected, abs=1e-14)
    assert abs(float(moment(nodes, weights, 16)) - 1 / 17) > 1e-7


def test_a_run_that_ended_counts_alone():
    betas = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 0.5, 0.3, 0.2, 0.4]], dtype=F64)
    alphas = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 1.0, 1.0, 2.0]], dtype=F64)
    nodes, weights = mean_rule(alphas, betas, 5)
    exact = hf.eigh_tridiagonal(alphas[0, :3], betas[0, :2])
    for degree in range(12):
        expected = moment(exact.eigenvalues, exact.eigenvectors[0].square(), degree)
        torch.testing.assert_close(moment(nodes[0], weights[0], degree), expected, rtol=1e-12, atol=0)
    whole = hf.eigh_tridiagonal(alphas[1], betas[1])
    all_of_them = whole.eigenvalues, whole.eigenvectors[0].square()
    assert abs(float(moment(nodes[1], weights[1], 11) / moment(*all_of_them, 11)) - 1) > 1e-4
    _, weights = mean_rule(alphas, betas, 5, complete=True)
    torch.testing.assert_close(moment(nodes[1], weights[1], 11), moment(*all_of_them, 11), rtol=1e-12, atol=0)


def test_of_no_rows():
    nodes, weights = mean_rule(torch.empty(0, 6, dtype=F64), torch.empty(0, 5, dtype=F64), 2)
    assert nodes.shape == weights.shape == (0, 11)


@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_recurrence_of_a_gauss_rule(m):
    alphas, betas = legendre(m)
    rule = hf.eigh_tridiagonal(alphas + 0.5, 3 * betas)
    found, off_diagonal = recurrence(rule.eigenvalues, 0.25 * rule.eigenvectors[0].square())
    torch.testing.assert_close(found, alphas + 0.5, rtol=0, atol=1e-13)
    torch.testing.assert_close(off_diagonal, 3 * betas, rtol=0, atol=1e-13)


def test_usual_number_is_a_quarter_of_the_steps():
    assert [usual_num_rules(m) for m in (1, 7, 8, 40, 100)] == [1, 1, 2, 10, 25]


@pytest.mark.parametrize("exact_outliers", [False, True])
@pytest.mark.parametrize("num_steps", [24, 40])
def test_is_closer_to_spectra_with_a_mass_at_zero(exact_outliers, num_steps):
    values = network_like()
    H, width = diagonal(values), float(values.max() - values.min())
    gaps = {}
    for num_rules in (1, None):
        options = {"num_steps": num_steps, "num_probes": 2, "num_rules": num_rules, "exact_outliers": exact_outliers}
        runs = [hf.slq(H, **options, generator=seeded(seed)) for seed in range(6)]
        gaps[num_rules] = sum(run.wasserstein(values) for run in runs) / len(runs) / width
    assert gaps[None] < 0.8 * gaps[1]


WHOLE = torch.cat([torch.linspace(-1, 1, 15, dtype=F64), torch.tensor([4.0, 6.0, 9.0, 13.0, 20.0], dtype=F64)])


def root(x):
    return x.abs().sqrt()


def test_a_space_that_the_steps_span_stays_exact():
    options = {"num_steps": 20, "num_probes": 2, "exact_outliers": False, "reorthogonalize": "full"}
    run = hf.slq(diagonal(WHOLE), **options, generator=seeded())
    probes = _probes.sphere(2, 20, generator=seeded(), dtype=F64, device="cpu").square()
    expected = (probes / probes.sum(1, keepdim=True) * root(WHOLE)).sum(1) * 20
    torch.testing.assert_close(run.trace(root).samples, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", [18, 20])
def test_what_outliers_leave_over_of_a_space_stays_exact(num_steps):
    """The first run finds all or most pairs exactly, and the other steps span what is left."""
    run = hf.slq(diagonal(WHOLE), num_steps=num_steps, num_probes=3, reorthogonalize="full", generator=seeded())
    assert run.num_exact >= 2
    assert num_steps >= 20 - run.num_exact
    others = run.weights[1:, run.num_exact :] > 0
    assert int(others.sum(1).max()) <= num_steps  # one rule, not the mean of several
    if run.num_exact == 20:
        assert float(run.trace(root).value) == pytest.approx(float(root(WHOLE).sum()), rel=1e-9)


def test_the_first_probe_has_the_same_mean_as_the_others():
    """Its row is made of the Ritz pairs that are left, and has the moments that all rules share."""
    values = network_like(400)
    H = diagonal(values)
    quadrature, plain = (
        hf.krylov(H, num_steps=30, num_probes=2, num_rules=num_rules, generator=seeded(2)).quadrature
        for num_rules in (4, 1)
    )
    count, left = quadrature.num_exact, quadrature.weights[:, quadrature.num_exact :]
    assert count > 5
    torch.testing.assert_close(left.sum(1), torch.full((2,), 1 - count / 400, dtype=F64), rtol=1e-12, atol=0)
    for p in range(4):
        torch.testing.assert_close(quadrature.moment(p).samples, plain.moment(p).samples, rtol=1e-8, atol=1e-12)
    assert int((quadrature.weights[0, count:] > 0).sum()) > 30


@pytest.mark.parametrize("estimator", [hf.slq, hf.krylov])
@pytest.mark.parametrize("given", [0, 11, 2.5])
def test_more_rules_than_steps_are_refused(estimator, given):
    with pytest.raises((ValueError, TypeError), match="num_rules"):
        estimator(diagonal([1.0] * 20), num_steps=10, num_probes=2, num_rules=given, generator=seeded())


def test_error_bound_is_that_of_the_shortest_rule():
    run = hf.slq(diagonal(network_like(200)), num_steps=40, num_probes=2, exact_outliers=False, generator=seeded())
    assert run.num_rules == 10
    assert math.ceil(12 / run.error_bound().steps + 0.5 - 1e-9) == 31
