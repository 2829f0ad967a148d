"""What scaling, order and precision may change, and what they must not."""

from functools import cache

import pytest
import torch
from helpers import F64, relative_error, seeded, symmetric

import hessfunc as hf

SPECTRUM = torch.cat([torch.linspace(-1, 3, 52, dtype=F64), torch.tensor([5.0, 7.0, 9.0, 12.0], dtype=F64)])


@cache
def matrix():
    return symmetric(SPECTRUM)


@cache
def operator():
    return hf.as_operator(matrix())


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scaling_the_operator_scales_the_results_and_nothing_else(factor):
    unit, scaled = operator(), hf.as_operator(factor * matrix())
    for method, options in (
        (hf.hutchinson, {"num_probes": 6}),
        (hf.hutchinson, {"rtol": 0.3}),
        (hf.hutchpp, {"num_probes": 12}),
        (hf.xtrace, {"num_probes": 6}),
    ):
        one, other = (method(H, **options, generator=seeded(1)) for H in (unit, scaled))
        torch.testing.assert_close(other.samples / factor, one.samples, rtol=1e-9, atol=1e-9)
        assert float(other.stderr / factor) == pytest.approx(float(one.stderr), rel=1e-8)
        assert other.num_matvecs == one.num_matvecs
    one, other = (hf.diagonal(H, num_probes=6, generator=seeded(1)) for H in (unit, scaled))
    assert relative_error(other.value / factor, one.value) < 1e-12
    one, other = (hf.frobenius_squared(H, num_probes=6, generator=seeded(1)) for H in (unit, scaled))
    assert float(other.value / factor**2) == pytest.approx(float(one.value), rel=1e-12)
    one, other = (hf.slq(H, num_steps=20, num_probes=4, generator=seeded(1)) for H in (unit, scaled))
    assert other.num_exact == one.num_exact
    torch.testing.assert_close(other.nodes / factor, one.nodes, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-6, atol=1e-9)
    loss = lambda w, x: (x @ w).pow(4).mean()  # noqa: E731
    x, w = torch.randn(9, 4, generator=seeded(2), dtype=F64), torch.randn(4, generator=seeded(3), dtype=F64)
    small = hf.hessian(lambda w, x: factor * loss(w, x), w, (x,))
    assert relative_error(small.dense() / factor, hf.hessian(loss, w, (x,)).dense()) < 1e-13


def test_the_order_of_the_parameters_does_not_matter():
    order = torch.randperm(len(SPECTRUM), generator=seeded(4))
    permuted = hf.as_operator(matrix()[order][:, order])
    one, other = (hf.eigsh(H, 5, tol=1e-8, generator=seeded(1)) for H in (operator(), permuted))
    torch.testing.assert_close(other.eigenvalues, one.eigenvalues, rtol=1e-10, atol=1e-10)
    for row, image in zip(one.rows()[:, order], other.rows(), strict=True):
        assert abs(abs(float(row @ image)) - 1) < 1e-8
    start = torch.randn(len(SPECTRUM), generator=seeded(5), dtype=F64)
    runs = [hf.lanczos(H.vector, v, 12) for H, v in ((operator(), start), (permuted, start[order]))]
    torch.testing.assert_close(runs[1].alphas, runs[0].alphas, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(runs[1].basis, runs[0].basis[:, order], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{"exact_outliers": False}, {}], ids=["plain", "exact outliers"])
def test_spectral_densities_have_unit_mass_ordered_nodes_and_the_moments(options):
    rule = hf.slq(operator(), num_steps=16, num_probes=6, **options, generator=seeded())
    assert (rule.weights >= 0).all()
    assert (rule.weights.sum(1) - 1).abs().max() < 1e-12
    low, high = float(SPECTRUM.min()), float(SPECTRUM.max())
    weighty = rule.weights > 1e-12
    assert float(rule.nodes[weighty].min()) >= low - 1e-9
    assert float(rule.nodes[weighty].max()) <= high + 1e-9
    plain = rule.nodes[:, rule.num_exact :] if rule.num_exact else rule.nodes
    if not rule.num_exact:
        assert (plain.diff(dim=1) >= 0).all()
    for p in (1, 2, 3):
        low, high = rule.moment(p).interval(0.9999)
        assert low <= float((SPECTRUM**p).mean()) <= high
    density = rule.density()
    mass = torch.trapezoid(density.values, density.grid)
    assert float(mass) == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize("method", ["eigsh", "slq", "hutchinson", "hutchpp", "diagonal"])
def test_single_precision_is_within_its_rounding_of_double(method):
    single = hf.as_operator(matrix().float())
    if method == "eigsh":
        values = [hf.eigsh(H, 4, tol=1e-4, generator=seeded()).eigenvalues for H in (operator(), single)]
    elif method == "slq":
        values = [hf.slq(H, num_steps=20, num_probes=4, generator=seeded()).trace().value for H in (operator(), single)]
        assert abs(float(values[1] - values[0])) < 20  # sphere probes of another precision are other probes
        return
    elif method == "diagonal":
        values = [hf.diagonal(H, num_probes=6, generator=seeded()).value for H in (operator(), single)]
    else:
        values = [getattr(hf, method)(H, num_probes=12, generator=seeded()).value for H in (operator(), single)]
        if method == "hutchpp":  # whose sketch is drawn in the operator's precision
            assert abs(float(values[1] - values[0])) < 60
            return
    assert relative_error(values[1], values[0]) < 1e-5
