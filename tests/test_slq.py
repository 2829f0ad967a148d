"""Stochastic Lanczos quadrature against exact spectra, and its error bars against what happens over many seeds."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import hessfunc as hf
from hessfunc import Estimate, Quadrature, _probes, _slq, krylov, slq

EXACT = {"exact_outliers": True}
PLAIN = {"exact_outliers": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def diagonal(eigenvalues, dtype=torch.float64):
    values = torch.as_tensor(eigenvalues, dtype=dtype)
    return hf.Operator(torch.zeros_like(values), lambda rows: rows * values)


def counting(H):
    """The operator, and a list of how many vectors each of its products took."""
    calls = []

    def rows(rows):
        calls.append(rows.shape[0])
        return H.rows(rows)

    return hf.Operator(H.like, rows), calls


def outlier_spectrum(size=300, dtype=torch.float64):
    """A bulk on both sides of 0 and nine outliers, one of them negative."""
    bulk = 0.2 * torch.randn(size - 9, generator=seeded(7), dtype=torch.float64)
    tops = torch.tensor([-4.0, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 9.0, 12.0], dtype=torch.float64)
    return torch.cat([bulk, tops]).sort().values.to(dtype)


@pytest.fixture(scope="module")
def net():
    """A network trained on digits: its Hessian operator, the dense matrix and the eigenvalues (1210 of them)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data[:300] / 16)
    y = torch.tensor(digits.target[:300])
    draw = seeded(0)
    params = {
        "first": {
            "weight": torch.randn(64, 16, generator=draw, dtype=torch.float64) / 8,
            "bias": torch.zeros(16).double(),
        },
        "second": {
            "weight": torch.randn(16, 10, generator=draw, dtype=torch.float64) / 4,
            "bias": torch.zeros(10).double(),
        },
    }

    def loss(p, x, y):
        hidden = torch.tanh(x @ p["first"]["weight"] + p["first"]["bias"])
        return torch.nn.functional.cross_entropy(hidden @ p["second"]["weight"] + p["second"]["bias"], y)

    leaves = hf.tree.map_leaves(lambda leaf: leaf.requires_grad_(), params)
    optimizer = torch.optim.Adam(hf.tree.leaves(leaves), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss(leaves, x, y).backward()
        optimizer.step()
    H = hf.hessian(loss, leaves, (x, y))
    matrix = H.dense(chunk_size=110)
    matrix = (matrix + matrix.T) / 2
    return H, hf.Operator(H.like, lambda rows: rows @ matrix.to(rows.dtype)), matrix, torch.linalg.eigvalsh(matrix)


class TestQuadrature:
    def test_integrates_polynomials_below_degree_2m(self):
        values = outlier_spectrum(60) / 4
        m = 6
        quadrature = slq(diagonal(values), num_steps=m, num_probes=3, **PLAIN, generator=seeded(1))
        probes = _probes.sphere(3, 60, generator=seeded(1), dtype=torch.float64, device="cpu") / 60**0.5
        for degree in range(2 * m):
            expected = (probes**2 * values**degree).sum(1)
            torch.testing.assert_close(quadrature.moment(degree).samples, expected, rtol=1e-9, atol=1e-12)
        beyond = (probes**2 * values ** (2 * m)).sum(1)
        assert ((quadrature.moment(2 * m).samples - beyond).abs() / beyond).min() > 1e-6

    @pytest.mark.parametrize("options", [PLAIN, EXACT, PLAIN | {"reorthogonalize": "full"}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fields(self, options, dtype):
        values = outlier_spectrum(dtype=dtype)
        quadrature = slq(diagonal(values, dtype), num_steps=30, num_probes=4, **options, generator=seeded())
        count = sum(30 - i for i in range(7)) + quadrature.num_exact
        assert quadrature.nodes.shape == quadrature.weights.shape == (4, count)
        assert quadrature.nodes.dtype == quadrature.weights.dtype == torch.float64
        assert quadrature.nodes.device.type == "cpu"
        assert (quadrature.size, quadrature.num_steps, quadrature.num_probes) == (300, 30, 4)
        assert quadrature.num_rules == 7
        assert quadrature.num_matvecs == 120
        assert bool((quadrature.weights >= 0).all())
        torch.testing.assert_close(quadrature.weights.sum(1), torch.ones(4).double(), rtol=0, atol=1e-12)
        assert quadrature.exact.shape == (quadrature.num_exact,)
        assert (quadrature.num_exact >= 9) == (options is EXACT)
        if options is EXACT:
            for value in (-4.0, 12.0, 9.0):
                assert float((quadrature.exact - value).abs().min()) < 1e-5

    def test_count_cdf_and_negative_fraction_read_the_steps(self):
        # Full depth on a simple spectrum: every eigenvalue is a node with mass 1 / 8.
        values = torch.tensor([-3.0, -1.0, -1e-9, 0.5, 1.0, 2.0, 4.0, 8.0])
        quadrature = slq(diagonal(values), num_steps=8, num_probes=2, generator=seeded())
        assert quadrature.num_exact == 8
        assert float(quadrature.count().value) == pytest.approx(8)
        assert float(quadrature.count(low=0.25, high=3.0).value) == pytest.approx(3)
        assert float(quadrature.count(high=-0.5).value) == pytest.approx(2)
        steps = quadrature.cdf(torch.tensor([[-9.0, -0.5], [3.0, 9.0]]))
        torch.testing.assert_close(steps, torch.tensor([[0, 0.25], [0.75, 1]]).double(), rtol=0, atol=1e-12)
        assert float(quadrature.cdf(-2.0)) == pytest.approx(1 / 8)
        assert float(quadrature.negative_fraction().value) == pytest.approx(2 / 8)
        assert float(quadrature.negative_fraction(tol=1e-12).value) == pytest.approx(3 / 8)
        assert float(quadrature.negative_fraction(tol=0.2).value) == pytest.approx(1 / 8)
        assert quadrature.count(low=0.25).num_matvecs == 16

    def test_wasserstein(self):
        def rule(nodes, weights):
            return Quadrature(torch.tensor(nodes).double(), torch.tensor(weights).double(), 4, 2, 4)

        left = rule([[0.0, 1.0], [0.0, 1.0]], [[0.5, 0.5], [1.0, 0.0]])
        right = rule([[2.0, 5.0]], [[1.0, 0.0]])
        assert left.wasserstein(right) == pytest.approx(0.75 * 2 + 0.25 * 1)
        assert right.wasserstein(left) == pytest.approx(1.75)
        assert left.wasserstein(torch.tensor([0.0, 0.0, 0.0, 3.0])) == pytest.approx(0.5)
        assert left.wasserstein(left) == 0

    def test_error_bound_solves_the_theorem(self):
        values = outlier_spectrum()
        for options, n in ((PLAIN, 300), (EXACT, None)):
            quadrature = slq(diagonal(values), num_steps=25, num_probes=6, **options, generator=seeded())
            n = n or 300 - quadrature.num_exact
            bound = quadrature.error_bound(confidence=0.9)
            # The smallest number of steps and probes for which the theorem gives this t is the number that was used,
            # by the shortest of the rules.
            assert math.ceil(12 / bound.steps + 0.5 - 1e-9) == 25 - 6 + 1
            assert math.ceil(4 / (n + 2) / bound.probes**2 * math.log(2 * n / 0.1) - 1e-9) == 6
            assert bound.distance == pytest.approx(max(bound.steps, bound.probes) * bound.width)
            assert bound.confidence == 0.9
            assert quadrature.wasserstein(values) < bound.distance
        assert quadrature.error_bound().confidence == 0.95
        plain = slq(diagonal(values), num_steps=25, num_probes=6, **PLAIN, generator=seeded())
        assert plain.error_bound().width == pytest.approx(16, rel=1e-6)
        assert bound.width < 2

    def test_text_names_bound_and_outliers(self):
        text = str(slq(diagonal(outlier_spectrum()), num_steps=25, num_probes=6, **EXACT, generator=seeded()))
        assert re.search(r"size 300: 6 probes x 25 steps, 150 matvecs, \d+ exact outliers", text)
        assert re.search(r"nodes from -4 to 12; trace [\d.]+ ± [\d.]+; negative fraction 0\.\d+ ± 0\.\d+", text)
        found = re.search(
            r"with probability 0\.95: Wasserstein-1 error <= ([\d.]+) = ([\d.]+) x width ([\d.]+) of the rest "
            r"\(steps allow 0\.615, probes 0\.\d+\)",
            text,
        )
        assert float(found[1]) == pytest.approx(float(found[2]) * float(found[3]), rel=0.01)
        text = str(slq(diagonal(outlier_spectrum()), num_steps=25, num_probes=1, generator=seeded()))
        assert "no exact outliers" in text
        assert "± inf" in text
        assert "of the rest" not in text

    def test_functions_against_dense(self, net):
        _, H, _, values = net
        quadrature = slq(H, num_steps=64, num_probes=8, generator=seeded(3))
        functions = {
            "logdet": lambda x: torch.log(x + 0.05),
            "schatten": lambda x: x.abs() ** 1.5,
            "effective dimension": lambda x: x.square() / (x.square() + 1e-4),
            "trace": lambda x: x,
        }
        for name, f in functions.items():
            truth, estimate = float(f(values).sum()), quadrature.trace(f)
            assert abs(float(estimate.value) - truth) < 4 * float(estimate.stderr) + 1e-4 * abs(truth), name
            assert float(estimate.stderr) < 0.05 * abs(truth), name
        assert torch.equal(quadrature.trace().samples, quadrature.trace(lambda x: x).samples)
        assert quadrature.trace().num_matvecs == 512

    def test_f_is_not_asked_about_padding(self):
        # The Krylov space of the identity ends after one step; the rows of T beyond are zeros, where log is infinite.
        quadrature = slq(diagonal(torch.full((5,), 2.0)), num_steps=5, num_probes=2, generator=seeded())
        assert float(quadrature.trace(torch.log).value) == pytest.approx(5 * math.log(2))

    def test_errors(self):
        quadrature = slq(diagonal(outlier_spectrum()), num_steps=10, num_probes=2, generator=seeded())
        with pytest.raises(ValueError, match=r"f returned \(\) for nodes of shape .* elementwise"):
            quadrature.trace(torch.sum)
        with pytest.raises(ValueError, match="f returned float for nodes"):
            quadrature.trace(lambda _: 1.0)
        with pytest.raises(FloatingPointError, match=r"f is NaN or infinite at the node -4\b.*-4.* to 12.*Shift"):
            quadrature.trace(torch.log)
        with pytest.raises(ValueError, match=r"p=-1 is out of range; expected 0 <= p"):
            quadrature.moment(-1)
        with pytest.raises(TypeError, match=r"p is 0\.5 of type float"):
            quadrature.moment(0.5)
        with pytest.raises(ValueError, match="tol=0 is out of range"):
            quadrature.negative_fraction(tol=0)
        with pytest.raises(ValueError, match=r"other has shape \(1, 2\), expected a vector of eigenvalues"):
            quadrature.wasserstein(torch.zeros(1, 2))
        with pytest.raises(ValueError, match="confidence=1 is out of range"):
            quadrature.error_bound(confidence=1)


class TestAccuracy:
    @pytest.mark.parametrize("reorthogonalize", ["none", "full"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wasserstein_distance_on_a_trained_net(self, net, reorthogonalize, dtype):
        _, _, matrix, values = net
        H = hf.as_operator(matrix.to(dtype))
        width = float(values[-1] - values[0])
        options = {"num_steps": 64, "num_probes": 8, "reorthogonalize": reorthogonalize}
        plain = slq(H, **options, **PLAIN, generator=seeded()).wasserstein(values) / width
        exact = slq(H, **options, **EXACT, generator=seeded()).wasserstein(values) / width
        assert plain < 0.003
        assert exact < 0.0003

    def test_runs_on_a_network(self, net):
        H, dense, _, _ = net
        a = slq(H, num_steps=12, num_probes=3, reorthogonalize="full", generator=seeded())
        b = slq(dense, num_steps=12, num_probes=3, reorthogonalize="full", generator=seeded())
        torch.testing.assert_close(a.nodes, b.nodes, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-6, atol=1e-8)

    def test_exact_outliers_save_variance(self, net):
        _, H, _, _ = net
        options = {"num_steps": 40, "num_probes": 24}
        plain = slq(H, **options, **PLAIN, generator=seeded()).trace().samples.var()
        exact = slq(H, **options, **EXACT, generator=seeded()).trace().samples.var()
        assert plain / exact > 40

    def test_ghosts_share_one_weight(self):
        values = outlier_spectrum(dtype=torch.float32)
        options = {"num_steps": 120, "num_probes": 4, "num_rules": 1, **PLAIN}
        ghostly = slq(diagonal(values, torch.float32), **options, generator=seeded())
        clean = slq(diagonal(values, torch.float32), **options, reorthogonalize="full", generator=seeded())

        def at_top(quadrature):
            near = (quadrature.nodes - 12).abs() < 1e-3
            return near.sum(1), (quadrature.weights * near).sum(1)

        assert at_top(ghostly)[0].min() >= 3
        assert at_top(clean)[0].tolist() == [1, 1, 1, 1]
        torch.testing.assert_close(at_top(ghostly)[1], at_top(clean)[1], rtol=1e-4, atol=0)
        grid = torch.linspace(-5, 13, 400)
        smooth = [q.density(grid, sigma=0.1).values for q in (ghostly, clean)]
        assert float((smooth[0] - smooth[1]).abs().max() / smooth[1].max()) < 0.01

    @pytest.mark.parametrize("seed", range(4))
    def test_mass_with_repeated_outliers(self, seed):
        """One run holds them among the other nodes, the others as exact ones."""
        values = torch.cat([torch.linspace(-1, 1, 51), torch.tensor([9.0, 9.0, 9.0, 5.0])]).double()
        run = hf.krylov(diagonal(values), num_steps=20, num_probes=4, generator=seeded(seed))
        assert bool(run.repeated.any())
        density = run.quadrature.density(sigma=0.05)
        assert float(torch.trapezoid(density.values, density.grid)) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("options", [PLAIN, EXACT])
    def test_scale_equivariance(self, scale, dtype, options):
        values = outlier_spectrum(dtype=dtype)
        options = options | {"num_steps": 15, "num_probes": 3, "reorthogonalize": "full"}
        one = slq(diagonal(values, dtype), **options, generator=seeded())
        other = slq(diagonal(values * scale, dtype), **options, generator=seeded())
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
        assert one.num_exact == other.num_exact
        torch.testing.assert_close(other.nodes / scale, one.nodes, **close)
        torch.testing.assert_close(other.weights, one.weights, **close)
        densities = [q.density() for q in (one, other)]
        torch.testing.assert_close(densities[1].values * scale, densities[0].values, rtol=1e-2, atol=1e-4)


class TestCalibration:
    """Errors over many seeds are what the standard errors say."""

    def test_plain_moments(self):
        values = outlier_spectrum(100)
        runs = slq(diagonal(values), num_steps=4, num_probes=3200, **PLAIN, generator=seeded(11))
        for p in (1, 2, 3):
            estimate = runs.moment(p)
            assert abs(float(estimate.value) - float((values**p).mean())) < 3.5 * float(estimate.stderr)
        # The variance on the sphere is known: 2 / (n + 2) * variance of the eigenvalues.
        expected = 2 / 102 * float(values.var(correction=0))
        assert float(runs.moment(1).samples.var()) == pytest.approx(expected, rel=0.15)

    def test_plain_interval_covers(self):
        # Without outliers a sample is close to normal, as the interval takes it to be.
        values = torch.linspace(-1, 3, 100)
        runs = slq(diagonal(values), num_steps=4, num_probes=3200, **PLAIN, generator=seeded(1))
        for f in (lambda x: x, torch.exp):
            samples = runs.trace(f).samples.reshape(400, 8)
            intervals = [Estimate.of(group, num_matvecs=0).interval() for group in samples]
            covered = np.mean([low <= float(f(values).sum()) <= high for low, high in intervals])
            assert 0.92 <= covered <= 0.98

    @pytest.mark.parametrize(("num_steps", "num_probes"), [(12, 2), (20, 4)])
    def test_exact_outliers_leave_moments_unbiased(self, num_steps, num_probes):
        # Twelve steps leave some outliers unconverged, twenty find them all.
        values = outlier_spectrum(120)
        trials = 80
        runs = [
            slq(diagonal(values), num_steps=num_steps, num_probes=num_probes, **EXACT, generator=seeded(s))
            for s in range(trials)
        ]
        found = [quadrature.num_exact for quadrature in runs]
        assert (min(found) < 9) == (num_steps == 12)
        for truth, estimates in (
            (float(values.sum()), [q.trace() for q in runs]),
            (float((values**2).mean()), [q.moment(2) for q in runs]),
        ):
            errors = torch.tensor([float(e.value) - truth for e in estimates])
            reported = torch.tensor([float(e.stderr) for e in estimates])
            spread = float(errors.std())
            assert abs(float(errors.mean())) < 3.5 * spread / trials**0.5
            # The larger of two estimates, so above the true one with few probes.
            assert 0.8 * spread <= float(reported.square().mean().sqrt()) <= 1.35 * spread
        covered = [low <= float(values.sum()) <= high for low, high in (q.trace().interval() for q in runs)]
        assert 0.91 <= np.mean(covered) <= 0.99

    def test_choice_of_pairs_hardly_depends_on_their_weight(self):
        # Judged by the plain residual, the first probe's own row would be off by a quarter of its noise.
        values = outlier_spectrum(120)
        H = diagonal(values)
        options = {"num_steps": 12, "num_probes": 1}
        samples = [slq(H, **options, **EXACT, generator=seeded(s)).trace().value - values.sum() for s in range(240)]
        errors = torch.stack(samples)
        assert abs(float(errors.mean())) < 0.15 * float(errors.std())


class TestRuns:
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
    def test_chunks_change_nothing(self, chunk_size):
        H = diagonal(outlier_spectrum())
        for options in (PLAIN, EXACT):
            full = options | {"num_steps": 30, "num_probes": 5, "reorthogonalize": "full"}
            whole = slq(H, **full, generator=seeded())
            parts = slq(H, **full, chunk_size=chunk_size, generator=seeded())
            torch.testing.assert_close(parts.nodes, whole.nodes, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-7, atol=1e-9)
            # Without reorthogonalization rounding grows until nodes differ; the measure does not.
            short = options | {"num_steps": 60, "num_probes": 5}
            whole = slq(H, **short, generator=seeded())
            parts = slq(H, **short, chunk_size=chunk_size, generator=seeded())
            assert parts.wasserstein(whole) < 1e-3 * 16
            torch.testing.assert_close(parts.moment(2).samples, whole.moment(2).samples, rtol=1e-10, atol=0)

    def test_lockstep_equals_single_runs(self):
        values = outlier_spectrum()
        H = diagonal(values)
        options = {"num_steps": 20, "num_rules": 1, "reorthogonalize": "full", **PLAIN}
        together = slq(H, num_probes=4, **options, generator=seeded())
        probes = _probes.sphere(4, 300, generator=seeded(), dtype=torch.float64, device="cpu")
        for row, probe in zip(together.nodes, probes, strict=True):
            run = hf.lanczos(lambda v: v * values, probe, 20)
            torch.testing.assert_close(row, hf.eigh_tridiagonal(run.alphas, run.betas).eigenvalues)

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_matvecs_are_counted(self, chunk_size):
        H, calls = counting(diagonal(outlier_spectrum()))
        chunks = 1 if chunk_size is None else 2
        given = {"deflate": pairs_of(H)}
        for options, passes, checks in ((PLAIN, 7 * chunks, 0), (EXACT, 7 + 7 * chunks, 0), (given, 7 * chunks, 1)):
            calls.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hf.ConvergenceWarning)
                quadrature = slq(H, num_steps=7, num_probes=4, **options, chunk_size=chunk_size, generator=seeded())
            assert sum(calls) == quadrature.num_matvecs == 28 + checks
            assert len(calls) == passes + checks

    def test_determinism(self):
        H = diagonal(outlier_spectrum())
        for options in (PLAIN, EXACT):
            a, b, c = (slq(H, num_steps=20, num_probes=3, **options, generator=seeded(s)) for s in (1, 1, 2))
            assert torch.equal(a.nodes, b.nodes)
            assert torch.equal(a.weights, b.weights)
            assert not torch.equal(a.trace().samples, c.trace().samples)
        state = torch.get_rng_state()
        slq(H, num_steps=5, num_probes=2, generator=seeded())
        assert torch.equal(state, torch.get_rng_state())

    def test_when_outliers_are_sought_by_default(self, monkeypatch):
        H = diagonal(outlier_spectrum())
        options = {"num_steps": 30, "generator": seeded()}
        assert slq(H, num_probes=2, **options).num_exact >= 9
        assert slq(H, num_probes=1, **options).num_exact == 0
        assert slq(H, num_probes=1, **EXACT, **options).num_exact >= 9
        assert slq(H, num_probes=2, **PLAIN, **options).num_exact == 0
        assert slq(H, num_probes=2, deflate=pairs_of(H, 3), **options).num_exact == 3
        monkeypatch.setattr(_slq, "BASIS_BYTES", 30 * 300 * 8 - 1)
        assert slq(H, num_probes=2, **options).num_exact == 0
        assert slq(H, num_probes=2, **EXACT, **options).num_exact >= 9
        monkeypatch.setattr(_slq, "BASIS_BYTES", 30 * 300 * 8)
        assert slq(H, num_probes=2, **options).num_exact >= 9

    def test_errors(self):
        H = diagonal(outlier_spectrum(20))
        good = {"num_steps": 5, "num_probes": 2, "generator": seeded()}
        for bad, error, text in [
            ({"num_steps": 0}, ValueError, r"num_steps=0 is out of range; expected 1 <= num_steps <= 20, the size"),
            ({"num_steps": 21}, ValueError, r"num_steps=21 is out of range; expected 1 <= num_steps <= 20, the size"),
            ({"num_steps": 2.0}, TypeError, r"num_steps is 2\.0 of type float, expected an int"),
            ({"num_probes": 0}, ValueError, "num_probes=0 is out of range; expected 1 <= num_probes"),
            ({"chunk_size": 0}, ValueError, "chunk_size=0 is out of range"),
            ({"reorthogonalize": "half"}, ValueError, "reorthogonalize='half' is not known; expected one of 'none'"),
            ({"generator": 3}, TypeError, r"generator is of type int, expected a torch\.Generator"),
        ]:
            for function in (slq, krylov):
                with pytest.raises(error, match=text):
                    function(H, **(good | bad))
        with pytest.raises(ValueError, match="exact_outliers=True and deflate= exclude each other"):
            slq(H, **good, exact_outliers=True, deflate=pairs_of(H))
        with pytest.warns(hf.ConvergenceWarning, match="slq: no Ritz pair was isolated after 1 steps; raise num_steps"):
            slq(diagonal(torch.linspace(0, 1, 500)), **(good | {"num_steps": 1}), exact_outliers=True)


def pairs_of(H, k=2):
    return hf.eigsh(H, k, tol=1e-8, generator=seeded(5))


class TestDegenerate:
    def test_zero_operator(self):
        for num_probes in (1, 3):
            quadrature = slq(diagonal(torch.zeros(50)), num_steps=10, num_probes=num_probes, generator=seeded())
            assert float(quadrature.trace().value) == quadrature.num_exact == 0
            assert quadrature.wasserstein(torch.zeros(50)) == 0
            assert quadrature.error_bound().distance == 0
            assert float(quadrature.negative_fraction().value) == 0
            assert "trace 0 ±" in str(quadrature)

    def test_identity(self):
        quadrature = slq(diagonal(torch.full((50,), 3.0)), num_steps=10, num_probes=3, generator=seeded())
        assert float(quadrature.trace().value) == pytest.approx(150, rel=1e-12)
        assert quadrature.num_exact == 0
        assert float(quadrature.count(low=2.999, high=3.001).value) == pytest.approx(50)

    def test_one_by_one(self):
        for num_probes in (1, 2):
            for options in ({}, PLAIN, EXACT):
                quadrature = slq(diagonal([-3.0]), num_steps=1, num_probes=num_probes, **options, generator=seeded())
                assert float(quadrature.trace().value) == pytest.approx(-3)
                assert quadrature.wasserstein(torch.tensor([-3.0])) < 1e-12

    def test_low_rank_is_exact(self):
        values = torch.tensor([5.0, -3.0, 2.0] + [0.0] * 60)
        quadrature = slq(diagonal(values), num_steps=12, num_probes=3, generator=seeded())
        assert quadrature.exact.tolist() == pytest.approx([-3, 2, 5])
        assert float(quadrature.trace().value) == pytest.approx(4, abs=1e-12)
        assert float(quadrature.trace().stderr) < 1e-12
        assert quadrature.wasserstein(values) < 1e-12

    def test_all_pairs_exact_at_full_depth(self):
        values = torch.arange(1.0, 13.0)
        for num_probes in (1, 4):
            quadrature = slq(diagonal(values), num_steps=12, num_probes=num_probes, **EXACT, generator=seeded())
            assert quadrature.num_exact == 12
            assert float(quadrature.trace(torch.log).value) == pytest.approx(math.lgamma(13))
            assert quadrature.wasserstein(values) < 1e-10

    def test_repeated_eigenvalues_keep_their_mass(self):
        # What the last layer of a regression has: every eigenvalue once for each output.
        values = torch.cat([outlier_spectrum(80)] * 3)
        results = [krylov(diagonal(values), num_steps=24, num_probes=6, generator=seeded(s)) for s in range(20)]
        for result in results:
            # Now and then rounding brings a second copy into the space; it is exact as well then. So is the edge of
            # the bulk, 0.53, where the run has found it.
            exact = {round(value, 2) for value in result.quadrature.exact.tolist()}
            assert exact - {0.53} == {-4, 2, 2.5, 3, 4, 5, 7, 9, 12}
            assert bool(result.repeated.all())
        counts = [result.quadrature.count(low=4.5) for result in results]
        errors = torch.tensor([float(count.value) - 12 for count in counts])
        assert abs(float(errors.mean())) < 3.5 * float(errors.std()) / 20**0.5
        with pytest.warns(hf.ConvergenceWarning, match=r"the eigenvalue 12 is repeated, but one Krylov space holds it"):
            results[0].eigenpairs(2)

    def test_one_probe_notices_a_gross_excess_of_mass(self):
        values = torch.cat([outlier_spectrum(80)] * 12)
        result = krylov(diagonal(values), num_steps=24, num_probes=1, generator=seeded())
        assert result.quadrature.num_exact == 0
        twice = torch.tensor([1.0] * 3 + [2.0] * 3)
        assert krylov(diagonal(twice), num_steps=6, num_probes=1, generator=seeded()).quadrature.num_exact == 0


class TestDeflate:
    def test_given_pairs_are_exact_and_the_rest_unbiased(self):
        values = outlier_spectrum(120)
        H = diagonal(values)
        pairs = pairs_of(H, 6)
        quadrature = slq(H, num_steps=6, num_probes=2000, deflate=pairs, generator=seeded())
        assert quadrature.num_exact == 6
        torch.testing.assert_close(quadrature.exact, pairs.eigenvalues)
        assert torch.equal(quadrature.weights[:, :6], torch.full((2000, 6), 1 / 120, dtype=torch.float64))
        for p in (1, 2, 3):
            estimate = quadrature.moment(p)
            assert abs(float(estimate.value - (values**p).mean())) < 3.5 * float(estimate.stderr)
        plain = slq(H, num_steps=6, num_probes=2000, **PLAIN, generator=seeded())
        assert float(plain.trace().samples.var() / quadrature.trace().samples.var()) > 10

    def test_rounding_does_not_bring_the_pairs_back(self):
        values = outlier_spectrum(dtype=torch.float32)
        H = diagonal(values, torch.float32)
        quadrature = slq(H, num_steps=150, num_probes=3, deflate=pairs_of(H, 9), generator=seeded())
        rest = quadrature.nodes[:, 9:]
        assert float(rest.abs().max()) < 1.5

    def test_pairs_in_a_coarse_dtype(self):
        values = outlier_spectrum(120, torch.float32)
        H = hf.Operator({"w": torch.zeros(120, dtype=torch.bfloat16)}, lambda rows: rows * values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hf.ConvergenceWarning)
            pairs = hf.eigsh(H, 5, generator=seeded())
        assert hf.tree.leaves(pairs.eigenvectors)[0].dtype == torch.bfloat16
        quadrature = slq(H, num_steps=20, num_probes=8, deflate=pairs, generator=seeded())
        assert quadrature.num_exact == int(pairs.converged.sum()) > 0
        trace = quadrature.trace()
        assert abs(float(trace.value - values.double().sum())) < 4 * float(trace.stderr)

    def test_only_converged_pairs_count(self):
        H = diagonal(outlier_spectrum(120))
        pairs = pairs_of(H, 3)
        some = type(pairs)(*[*vars(pairs).values()][:3], torch.tensor([True, False, True]), 0)
        assert slq(H, num_steps=5, num_probes=2, deflate=some, generator=seeded()).exact.tolist() == pytest.approx(
            [12, 7]
        )
        none = type(pairs)(*[*vars(pairs).values()][:3], torch.zeros(3, dtype=torch.bool), 0)
        with pytest.warns(hf.ConvergenceWarning, match="slq: no pair in deflate has converged, so nothing is deflated"):
            quadrature = slq(H, num_steps=5, num_probes=2, deflate=none, generator=seeded())
        plain = slq(H, num_steps=5, num_probes=2, **PLAIN, generator=seeded())
        assert torch.equal(quadrature.nodes, plain.nodes)

    def test_errors(self):
        H = diagonal(outlier_spectrum(120))
        pairs = pairs_of(H, 2)
        with pytest.raises(ValueError, match=r"deflate\.eigenvectors has shape .*, expected \('K', 80\)"):
            slq(diagonal(outlier_spectrum(80)), num_steps=5, num_probes=2, deflate=pairs, generator=seeded())
        options = {"num_steps": 5, "num_probes": 2, "generator": seeded()}
        fields = vars(pairs) | {"eigenvectors": 2 * pairs.eigenvectors}
        with pytest.raises(ValueError, match=r"deflate\.eigenvectors are not orthonormal: .* off by 4\.2"):
            slq(H, **options, deflate=type(pairs)(**fields))
        for other in (diagonal(outlier_spectrum(120) * 1.01), diagonal(outlier_spectrum(120).flip(0))):
            with pytest.raises(ValueError, match=r"deflate holds no eigenpairs of this operator: .*v0=pairs"):
                slq(other, **options, deflate=pairs)


class TestKrylov:
    @pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
    def test_eigenpairs(self, which):
        values = outlier_spectrum()
        H, calls = counting(diagonal(values))
        result = krylov(H, num_steps=60, num_probes=3, generator=seeded())
        assert sum(calls) == result.quadrature.num_matvecs == result.trace.num_matvecs == 180
        pairs = result.eigenpairs(3, which=which)
        assert sum(calls) == pairs.num_matvecs == 183
        expected = {"LM": [12, 9, 7], "LA": [12, 9, 7], "SA": [-4, values[1], values[2]], "BE": [12, 9, -4]}[which]
        torch.testing.assert_close(pairs.eigenvalues, torch.tensor(expected).double(), rtol=1e-6, atol=0)
        rows = pairs.rows()
        torch.testing.assert_close(rows @ rows.T, torch.eye(3).double(), rtol=0, atol=1e-10)
        true = (rows * values - pairs.eigenvalues[:, None] * rows).norm(dim=1)
        torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-14)
        assert bool(pairs.converged.all())

    def test_unconverged_pairs_are_told(self):
        result = krylov(diagonal(outlier_spectrum()), num_steps=14, num_probes=2, generator=seeded())
        with pytest.warns(
            hf.ConvergenceWarning, match=r"krylov: \d+ of 12 pairs have a residual above tol=0\.001.*v0=pairs"
        ):
            pairs = result.eigenpairs(12)
        assert bool(pairs.converged[0])
        assert not bool(pairs.converged[-1])
        limit = 1e-3 * pairs.eigenvalues.abs()
        assert torch.equal(pairs.converged, pairs.residuals <= limit)
        with pytest.warns(hf.ConvergenceWarning, match=r"tol=1e-12"):
            result.eigenpairs(8, tol=1e-12)

    def test_recurrence_residuals_are_true(self):
        values = outlier_spectrum()
        result = krylov(diagonal(values), num_steps=14, num_probes=2, generator=seeded())
        rows = result._pairs.rows(torch.arange(14))
        true = (rows * values - result.ritz_values[:, None] * rows).norm(dim=1)
        torch.testing.assert_close(result.ritz_residuals, true, rtol=1e-6, atol=1e-12)
        assert result.ritz_values.shape == (14,)
        assert bool((result.ritz_values.diff() > 0).all())

    def test_pairs_start_eigsh(self):
        H, calls = counting(diagonal(outlier_spectrum()))
        result = krylov(H, num_steps=40, num_probes=2, generator=seeded())
        pairs = result.eigenpairs(4)
        calls.clear()
        again = hf.eigsh(H, 4, v0=pairs, verify_steps=0, generator=seeded())
        assert sum(calls) <= 4 + 6
        torch.testing.assert_close(again.eigenvalues, pairs.eigenvalues, rtol=1e-6, atol=0)

    def test_trace_by_leaf(self, net):
        _, H, matrix, _ = net
        result = krylov(H, num_steps=30, num_probes=24, chunk_size=8, generator=seeded(2))
        torch.testing.assert_close(result.trace.samples, result.quadrature.trace().samples, rtol=1e-9, atol=1e-9)
        leaves = result.trace.leaf_samples
        torch.testing.assert_close(leaves.sum(1), result.trace.samples)
        assert result.trace.leaf_names == ("first.weight", "first.bias", "second.weight", "second.bias")
        blocks = matrix.diagonal().split(H.layout.sizes)
        for block, estimate in zip(blocks, result.trace.per_leaf.values(), strict=True):
            assert abs(float(estimate.value - block.sum())) < 4 * float(estimate.stderr)
            # Four times the error of the mean says little unless that is small itself.
            assert float(estimate.stderr) < 0.1 * float(block.sum())

    def test_leaf_samples_are_those_of_projected_probes(self, net):
        _, H, matrix, _ = net
        result = krylov(H, num_steps=40, num_probes=3, generator=seeded())
        count, n = result.quadrature.num_exact, H.size
        values, vectors = torch.linalg.eigh(matrix)
        known = (values[:, None] - result.quadrature.exact).abs().argmin(0)
        u = vectors[:, known]
        probes = _probes.sphere(3, n, generator=seeded(), dtype=torch.float64, device="cpu")
        probes = probes - (probes @ u) @ u.T
        terms = probes * (probes @ matrix) * ((n - count) / (probes**2).sum(1, keepdim=True))
        terms = terms + (u**2) @ values[known]
        expected = torch.stack([part.sum(1) for part in terms.split(H.layout.sizes, dim=1)], dim=1)
        torch.testing.assert_close(result.trace.leaf_samples, expected, rtol=1e-3, atol=1e-4)

    def test_same_as_slq(self):
        H = diagonal(outlier_spectrum())
        options = {"num_steps": 20, "num_probes": 3}
        quadrature = slq(H, **options, **EXACT, generator=seeded())
        assert torch.equal(krylov(H, **options, generator=seeded()).quadrature.nodes, quadrature.nodes)

    def test_one_probe(self):
        result = krylov(diagonal(outlier_spectrum()), num_steps=60, num_probes=1, generator=seeded())
        assert result.quadrature.num_exact >= 9
        assert result.repeated.tolist() == [False] * result.quadrature.num_exact
        assert float(result.trace.stderr) == math.inf
        assert result.eigenpairs(1).eigenvalues.tolist() == pytest.approx([12])

    def test_pairs_at_full_depth_of_an_exhausted_space(self):
        result = krylov(diagonal([3.0, 1.0] + [0.0] * 30), num_steps=10, num_probes=2, generator=seeded())
        assert result.ritz_values.tolist() == pytest.approx([0, 1, 3], abs=1e-12)
        assert result.eigenpairs(3).eigenvalues.tolist() == pytest.approx([3, 1, 0], abs=1e-12)

    def test_errors(self):
        result = krylov(diagonal(outlier_spectrum()), num_steps=10, num_probes=2, generator=seeded())
        for bad, error, text in [
            ({"k": 11}, ValueError, "k=11 is out of range; expected 1 <= k <= 10, the number of Ritz pairs"),
            ({"k": 1, "which": "top"}, ValueError, "which='top' is not known; expected one of 'LM', 'LA', 'SA', 'BE'"),
            ({"k": 1, "tol": 0.0}, ValueError, r"tol=0\.0 is out of range"),
        ]:
            with pytest.raises(error, match=text):
                result.eigenpairs(**bad)


def test_chi_squared_noise_of_one_eigenvalue():
    # The reason for exact outliers, and the law behind the test for repeated eigenvalues.
    values = outlier_spectrum()
    quadrature = slq(diagonal(values), num_steps=25, num_probes=2000, **PLAIN, generator=seeded(1))
    mass = quadrature.count(low=11.5).samples
    assert stats.kstest(mass.numpy(), stats.chi2(1).cdf).pvalue > 0.01
    assert float(mass.std() / mass.mean()) == pytest.approx(2**0.5, rel=0.1)
