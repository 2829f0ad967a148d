"""Smoothed spectral densities: mass, bandwidth, heights and error bands."""

import math

import pytest
import torch
from scipy import stats

import hessfunc as hf
from hessfunc import Quadrature, slq
from hessfunc._density import smooth


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def diagonal(values):
    return hf.Operator(torch.zeros_like(values), lambda rows: rows * values)


def rule(nodes, weights, size=10, num_steps=2, num_exact=0):
    nodes, weights = (torch.tensor(rows, dtype=torch.float64) for rows in (nodes, weights))
    return Quadrature(nodes, weights, size, num_steps, nodes.numel(), num_exact)


def bump(x, center, sigma):
    return torch.exp(-0.5 * ((x - center) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def mass(density):
    return float(torch.trapezoid(density.values, density.grid))


BULK = torch.cat([torch.linspace(-0.5, 0.5, 190), torch.tensor([3.0, 4.0, 5.0, 7.0, 10.0])]).double()


@pytest.fixture(scope="module")
def quadrature():
    return slq(diagonal(BULK), num_steps=30, num_probes=6, generator=seeded())


class TestValues:
    def test_closed_form(self):
        grid = torch.tensor([-1.0, 0.0, 0.3, 2.0])
        density = rule([[0.0, 1.0], [0.5, 2.0]], [[0.25, 0.75], [0.9, 0.1]], size=10**6).density(grid, sigma=0.4)
        first = 0.25 * bump(density.grid, 0, 0.4) + 0.75 * bump(density.grid, 1, 0.4)
        second = 0.9 * bump(density.grid, 0.5, 0.4) + 0.1 * bump(density.grid, 2, 0.4)
        torch.testing.assert_close(density.grid, grid.double())
        torch.testing.assert_close(density.values, (first + second) / 2)
        torch.testing.assert_close(density.stderr, (first - second).abs() / 2)
        assert density.sigma == 0.4
        assert density.linthresh is None

    def test_symlog_closed_form(self):
        grid = torch.tensor([-1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
        density = rule([[0.0, 1.0]], [[0.25, 0.75]]).density(grid, sigma=0.4, linthresh=0.1)
        y = torch.asinh(grid / 0.1)
        stretched = 0.25 * bump(y, 0, 0.4) + 0.75 * bump(y, math.asinh(10), 0.4)
        torch.testing.assert_close(density.values, stretched / (grid**2 + 0.01).sqrt())
        assert density.linthresh == 0.1

    @pytest.mark.parametrize("options", [{}, {"sigma": 0.01}, {"sigma": 2.0}, {"linthresh": 0.05}])
    @pytest.mark.parametrize("num_probes", [1, 3])
    def test_unit_mass(self, options, num_probes):
        for exact in (True, False):
            quadrature = slq(
                diagonal(BULK), num_steps=30, num_probes=num_probes, exact_outliers=exact, generator=seeded()
            )
            density = quadrature.density(**options)
            # The trapezoidal rule is exact on even grids; the symlog grid is stretched.
            assert mass(density) == pytest.approx(1, abs=1e-3 if "linthresh" in options else 1e-7)
            assert bool((density.grid.diff() > 0).all())
            assert bool((density.values >= 0).all())
            assert density.grid.dtype == density.values.dtype == density.stderr.dtype == torch.float64
            assert density.grid.shape == density.values.shape == density.stderr.shape

    def test_outlier_has_the_height_of_one_eigenvalue(self, quadrature):
        assert quadrature.num_exact >= 5
        density = quadrature.density(torch.tensor([10.0]))
        assert float(density.values) == pytest.approx(1 / (195 * density.sigma * math.sqrt(2 * math.pi)), rel=1e-6)
        assert float(density.stderr) < 1e-9 * float(density.values)
        noisy = slq(diagonal(BULK), num_steps=30, num_probes=6, exact_outliers=False, generator=seeded())
        noisy = noisy.density(torch.tensor([10.0]), sigma=density.sigma)
        assert float(noisy.stderr) > 0.2 * float(noisy.values)

    @pytest.mark.parametrize(("scale", "shift"), [(1e-12, 0.0), (1e12, 0.0), (1.0, 3.0), (-2.0, 1.0)])
    def test_scale_and_shift(self, scale, shift):
        options = {"num_steps": 12, "num_probes": 3, "reorthogonalize": "full"}
        one = slq(diagonal(BULK), **options, generator=seeded()).density()
        other = slq(diagonal(scale * BULK + shift), **options, generator=seeded())
        other = other.density(scale * one.grid + shift)
        assert other.sigma == pytest.approx(abs(scale) * one.sigma, rel=1e-6)
        torch.testing.assert_close(abs(scale) * other.values, one.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(abs(scale) * other.stderr, one.stderr, rtol=1e-4, atol=1e-6)


class TestBandwidth:
    def test_default_is_the_width_of_the_rest_over_the_steps(self, quadrature):
        rest = quadrature.nodes[:, quadrature.num_exact :][quadrature.weights[:, quadrature.num_exact :] > 1e-3 / 195]
        width = float(rest.max() - rest.min())
        assert width < 1.01
        density = quadrature.density()
        assert density.sigma == pytest.approx(width / 30)
        assert float(density.grid[0]) == pytest.approx(-0.5 - 6 * density.sigma, rel=1e-3)
        assert float(density.grid[-1]) == pytest.approx(10 + 6 * density.sigma, rel=1e-3)
        assert float(density.grid.diff().max()) <= density.sigma / 4 * (1 + 1e-9)
        plain = slq(diagonal(BULK), num_steps=30, num_probes=6, exact_outliers=False, generator=seeded())
        assert plain.density().sigma == pytest.approx(10.5 / 30, rel=1e-3)
        stretch = math.asinh(10 / 0.1) + math.asinh(0.5 / 0.1)
        assert plain.density(linthresh=0.1).sigma == pytest.approx(stretch / 30, rel=1e-3)

    def test_default_shows_no_comb(self):
        # An even bulk of density 1 and enough eigenvalues to keep the probes' noise at two percent.
        values = torch.cat([torch.linspace(-0.5, 0.5, 2000), torch.tensor([3.0, 4.0])]).double()
        for num_probes, noise in ((16, 0.1), (1, 0.3)):
            quadrature = slq(
                diagonal(values), num_steps=30, num_probes=num_probes, exact_outliers=True, generator=seeded()
            )
            density = quadrature.density()
            inside = density.values[density.grid.abs() < 0.35]
            assert float((inside - 1).abs().max()) < noise
            comb = quadrature.density(sigma=density.sigma / 20)
            assert float(comb.values[comb.grid.abs() < 0.35].max()) > 1 + 2 * noise

    def test_narrow_rest_keeps_the_grid_finite(self):
        values = torch.cat([1e-7 * torch.linspace(-1, 1, 100), torch.tensor([1.0])]).double()
        density = slq(diagonal(values), num_steps=20, num_probes=2, generator=seeded()).density()
        assert density.sigma == pytest.approx(2.0**-12, rel=1e-3)
        assert len(density.grid) < 20_000

    @pytest.mark.parametrize(("value", "sigma"), [(0.0, 1e-6), (3.0, 3e-6), (-5e-9, 5e-15)])
    def test_spectrum_of_one_point(self, value, sigma):
        density = slq(
            diagonal(torch.full((30,), value).double()), num_steps=5, num_probes=2, generator=seeded()
        ).density()
        assert density.sigma == pytest.approx(sigma)
        assert mass(density) == pytest.approx(1, abs=1e-6)
        assert float(density.grid[density.values.argmax()]) == pytest.approx(value, abs=sigma)

    def test_padding_of_weight_zero_is_ignored(self):
        quadrature = rule([[2.0, 2.0, 0.0]], [[1.0, 0.0, 0.0]])
        assert float(quadrature.density(sigma=0.1).grid[0]) == pytest.approx(1.4)


class TestError:
    def test_band_is_calibrated(self):
        # At full depth a row is the exact measure of its probe, so that only the probes' noise remains.
        values = torch.linspace(-1, 1, 24, dtype=torch.float64)
        grid = torch.linspace(-0.8, 0.8, 5)
        truth = smooth(
            values[None], torch.full((1, 24), 1 / 24).double(), size=24, num_exact=0, resolution=0.3, grid=grid
        ).values
        many = slq(diagonal(values), num_steps=24, num_probes=3000, exact_outliers=False, generator=seeded())
        inside = []
        for nodes, weights in zip(many.nodes.split(10), many.weights.split(10), strict=True):
            density = Quadrature(nodes, weights, 24, 24, 240).density(grid, sigma=0.3)
            reach = torch.from_numpy(stats.t.ppf(0.975, density.dof.numpy()))
            inside.append((density.values - truth).abs() < reach * density.stderr)
        assert 0.92 <= float(torch.stack(inside).double().mean()) <= 0.98
        whole = many.density(grid, sigma=0.3)
        assert float(((whole.values - truth) / whole.stderr).abs().max()) < 3.5

    def test_one_probe_has_no_error(self):
        density = slq(diagonal(BULK), num_steps=10, num_probes=1, generator=seeded()).density()
        assert bool(torch.isinf(density.stderr).all())


class TestChecks:
    @pytest.mark.parametrize("sigma", [0, 0.0, -1.0, math.inf, math.nan])
    def test_sigma(self, quadrature, sigma):
        with pytest.raises(ValueError, match=rf"sigma={sigma} is out of range; expected a finite number above 0"):
            quadrature.density(sigma=sigma)

    def test_other_errors(self, quadrature):
        with pytest.raises(TypeError, match="sigma is 'auto' of type str"):
            quadrature.density(sigma="auto")
        with pytest.raises(ValueError, match=r"linthresh=-1 is out of range"):
            quadrature.density(linthresh=-1)
        with pytest.raises(ValueError, match=r"grid has shape \(1, 2\), expected a vector of points"):
            quadrature.density(torch.zeros(1, 2))
        with pytest.raises(ValueError, match=r"grid has shape \(0,\)"):
            quadrature.density(torch.zeros(0))
        with pytest.raises(FloatingPointError, match="grid is NaN or infinite"):
            quadrature.density(torch.tensor([0.0, math.nan]))
        with pytest.raises(
            ValueError, match=r"sigma=1e-06 is too small for a default grid from -0\.5 to 10.*pass grid="
        ):
            quadrature.density(sigma=1e-6)
        assert len(quadrature.density(torch.tensor([0.0, 1.0]), sigma=1e-6).values) == 2

    def test_grid_may_be_a_list_of_numbers(self, quadrature):
        density = quadrature.density([0, 1, 2], sigma=0.1)
        assert density.grid.tolist() == [0, 1, 2]
