"""Every standard error against the truth over 400 seeds: 95 % intervals hold it in 92 to 98 % of runs.

One table: what is estimated, of which spectrum, with how many probes. Over 400 seeds a share of 95 % has a standard
deviation of 1.1 %: rows near an end of the band take 1600.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers import F64, seeded, symmetric
from scipy import stats

import hessfunc as hf
from hessfunc import _probes, tree

SEEDS, MANY = 400, 1600
BAND = (0.92, 0.98)


Method = Callable[[str, int, int], torch.Tensor]
"""From a spectrum, a number of probes and one of seeds: for each seed whether the truth was held."""


def powers(exponent: float, size: int = 60) -> list[float]:
    return [10.0 * i**-exponent for i in range(1, size + 1)]


SPECTRA = {
    "outliers": [*torch.linspace(-1, 3, 52).tolist(), 5.0, 7.0, 9.0, 12.0],
    "flat": torch.linspace(1, 3, 60).tolist(),
    "slow": powers(0.5),
    "fast": powers(1.5),
    "faster": powers(2.0),
    "geometric": [10 * 0.7**i for i in range(60)],
    "step": [5.0] * 6 + [0.01] * 54,
    "trained": [30.0, 18.0, 9.0, 5.0, 3.0, *powers(1.0, 55)],
    "one": [100.0, *torch.linspace(0, 1, 59).tolist()],
}
# No constant was chosen with these in view, but for what stands for a covariance below zero in xtrace and xnystrace
FURTHER = {"two": [40.0, 1.0, *[0.05] * 58], "four": [40.0, 30.0, 20.0, 10.0, *[0.05] * 56]}
LIKE = {size: {"w": torch.zeros(size - 20, dtype=F64), "b": torch.zeros(20, dtype=F64)} for size in (56, 60)}


def values(spectrum: str) -> list[float]:
    return {**SPECTRA, **FURTHER}[spectrum]


@cache
def matrix(spectrum: str) -> torch.Tensor:
    return symmetric(values(spectrum))


@cache
def parted(spectrum: str, *, within: bool) -> torch.Tensor:
    """The matrix with what couples the entries of a leaf to one another alone, or to those of the other leaf alone."""
    H = matrix(spectrum)
    leaf = torch.arange(len(H)) >= len(H) - 20
    kept = (leaf.unsqueeze(1) == leaf) == within
    return torch.where(kept | torch.eye(len(H), dtype=torch.bool), H, 0)


@cache
def operator(spectrum: str) -> hf.Operator:
    return hf.as_operator(matrix(spectrum), LIKE[len(values(spectrum))])


@cache
def pairs(spectrum: str) -> hf.Eigenpairs:
    return hf.eigsh(operator(spectrum), 5, generator=seeded())


def trace(spectrum: str) -> float:
    return sum(values(spectrum))


def trace_of(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[str], float]:
    return lambda spectrum: float(f(torch.tensor(values(spectrum), dtype=F64)).sum())


def mean_square(spectrum: str) -> float:
    return sum(x * x for x in values(spectrum)) / len(values(spectrum))


def held(estimate: hf.Estimate, truth: Any) -> torch.Tensor:
    low, high = estimate.interval(0.95)
    # Where an estimate is exact, so that its error is that of rounding
    slack = 1e-9 * abs(truth)
    return torch.tensor(low - slack <= truth <= high + slack)


def held_entries(estimate: hf.DiagonalEstimate, spectrum: str, num_probes: int) -> torch.Tensor:
    value, stderr = (torch.cat(tree.leaves(x)) for x in (estimate.value, estimate.stderr))
    return (value - matrix(spectrum).diagonal()).abs() <= stats.t.ppf(0.975, num_probes - 1) * stderr


def held_leaves(estimate: hf.Estimate, whole: torch.Tensor) -> torch.Tensor:
    truths = whole.split([len(whole) - 20, 20])
    return torch.stack([held(e, float(t.sum())) for e, t in zip(estimate.per_leaf.values(), truths, strict=True)])


def over_seeds(one: Callable[[str, int, torch.Generator], torch.Tensor]) -> Method:
    return lambda spectrum, count, seeds: torch.stack([one(spectrum, count, seeded(seed)) for seed in range(seeds)])


def scalar(method: Any, truth: Callable[[str], float] = trace, **options: Any) -> Method:
    """From a function ``(H, num_probes=, generator=) -> Estimate``."""
    return over_seeds(lambda s, k, g: held(method(operator(s), num_probes=k, generator=g, **options), truth(s)))


def by_leaf(method: Any, whole: Callable[[str], torch.Tensor] = lambda s: matrix(s).diagonal()) -> Any:
    return over_seeds(lambda s, k, g: held_leaves(method(operator(s), num_probes=k, generator=g), whole(s)))


def by_parted_leaf(*, within: bool) -> Method:
    def one(spectrum: str, count: int, generator: torch.Generator) -> torch.Tensor:
        H = parted(spectrum, within=within)
        estimate = hf.hutchinson(hf.as_operator(H, LIKE[len(H)]), num_probes=count, generator=generator)
        return held_leaves(estimate, H.diagonal())

    return over_seeds(one)


@cache
def plain_rules(spectrum: str, num_probes: int, seeds: int, num_steps: int) -> list[hf.Quadrature]:
    """Probes of a plain quadrature do not depend on one another, so one run has those of all seeds."""
    rule = hf.slq(
        operator(spectrum),
        num_steps=num_steps,
        num_probes=seeds * num_probes,
        exact_outliers=False,
        chunk_size=1000,
        generator=seeded(1),
    )
    parts = zip(rule.nodes.split(num_probes), rule.weights.split(num_probes), strict=True)
    spent = num_probes * num_steps
    return [hf.Quadrature(*part, rule.size, num_steps, spent, num_rules=rule.num_rules) for part in parts]


@cache
def krylov_runs(spectrum: str, num_probes: int, seeds: int, num_steps: int) -> list[hf.Krylov]:
    options = {"num_steps": num_steps, "num_probes": num_probes}
    return [hf.krylov(operator(spectrum), **options, generator=seeded(seed)) for seed in range(seeds)]


def plain(pick: Callable[[hf.Quadrature], hf.Estimate], truth: Callable[[str], float], num_steps: int = 6) -> Any:
    return lambda s, k, n: torch.stack([held(pick(rule), truth(s)) for rule in plain_rules(s, k, n, num_steps)])


def exact(pick: Callable[[hf.Quadrature], hf.Estimate], truth: Callable[[str], float]) -> Any:
    return lambda s, k, n: torch.stack([held(pick(run.quadrature), truth(s)) for run in krylov_runs(s, k, n, 16)])


def second(rule: hf.Quadrature) -> hf.Estimate:
    return rule.moment(2)


def decayed(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x)


def ridge(x: torch.Tensor) -> torch.Tensor:
    return x / (x + 2)


def frobenius(spectrum: str) -> float:
    return trace_of(torch.square)(spectrum)


def densities(spectrum: str, num_probes: int, seeds: int) -> torch.Tensor:
    low, high = min(values(spectrum)), max(values(spectrum))
    points, sigma = torch.linspace(low, high, 9, dtype=F64), (high - low) / 4
    kernel = torch.exp(-0.5 * ((points.unsqueeze(1) - torch.tensor(values(spectrum), dtype=F64)) / sigma).square())
    truth = kernel.mean(1) / (sigma * (2 * torch.pi) ** 0.5)
    found = [rule.density(points, sigma=sigma) for rule in plain_rules(spectrum, num_probes, seeds, 20)]
    reach = [torch.from_numpy(stats.t.ppf(0.975, d.dof.numpy())) for d in found]
    return torch.stack([(d.values - truth).abs() <= r * d.stderr + 1e-9 for d, r in zip(found, reach, strict=True)])


def in_blocks(spectrum: str, num_probes: int, generator: torch.Generator) -> torch.Tensor:
    """Both diagonal blocks."""
    H, like = matrix(spectrum), LIKE[len(values(spectrum))]
    split = len(like["w"])
    parts = {"w": H[:split, :split], "b": H[split:, split:]}
    spectra = hf.block_spectra(
        lambda _: None,
        like,
        operator=lambda _loss, selected, _data: hf.as_operator(parts[next(iter(selected))], selected),
        num_probes=num_probes,
        num_steps=0,
        tol=0.5,
        generator=generator,
    )
    return torch.stack([held(spectra[name].trace, float(part.trace())) for name, part in parts.items()])


METHODS: dict[str, Method] = {
    "hutchinson": scalar(hf.hutchinson),
    "hutchinson, by leaf": by_leaf(hf.hutchinson),
    "hutchinson, deflated": over_seeds(
        lambda s, k, g: held(hf.hutchinson(operator(s), num_probes=k, deflate=pairs(s), generator=g), trace(s))
    ),
    "hutchinson, to a tolerance": over_seeds(
        lambda s, k, g: held(hf.hutchinson(operator(s), atol=300 / k, generator=g), trace(s))
    ),
    "deflated": scalar(hf.deflated),
    "deflated, by leaf": by_leaf(hf.deflated),
    "hutchpp": scalar(hf.hutchpp),
    "hutchpp, by leaf": by_leaf(hf.hutchpp),
    "xtrace": scalar(hf.xtrace, chunk_size=100),
    "xnystrace": scalar(hf.xnystrace, chunk_size=100),
    "hutchinson of normal probes, by leaf": by_leaf(partial(hf.hutchinson, sampler=_probes.normal)),
    "hutchinson on the sphere, by leaf": by_leaf(partial(hf.hutchinson, sampler=_probes.sphere)),
    "hutchinson, deflated, by leaf": over_seeds(
        lambda s, k, g: held_leaves(
            hf.hutchinson(operator(s), num_probes=k, deflate=pairs(s), generator=g), matrix(s).diagonal()
        )
    ),
    "hutchinson, by leaf coupled within alone": by_parted_leaf(within=True),
    "hutchinson, by leaf coupled across alone": by_parted_leaf(within=False),
    "diagonal": over_seeds(lambda s, k, g: held_entries(hf.diagonal(operator(s), num_probes=k, generator=g), s, k)),
    "xdiag": over_seeds(lambda s, k, g: held_entries(hf.xdiag(operator(s), num_probes=k, generator=g), s, k)),
    "diagonal, trace": scalar(lambda H, **options: hf.diagonal(H, **options).trace),
    "diagonal, trace by leaf": by_leaf(lambda H, **options: hf.diagonal(H, **options).trace),
    "diagonal, squared norm": scalar(lambda H, **options: hf.diagonal(H, **options).frobenius_squared, frobenius),
    "xdiag, trace": scalar(lambda H, **options: hf.xdiag(H, **options).trace),
    "xdiag, squared norm": scalar(lambda H, **options: hf.xdiag(H, **options).frobenius_squared, frobenius),
    "frobenius_squared of normal probes": scalar(partial(hf.frobenius_squared, sampler=_probes.normal), frobenius),
    "frobenius_squared on the sphere": scalar(partial(hf.frobenius_squared, sampler=_probes.sphere), frobenius),
    "frobenius_squared": scalar(hf.frobenius_squared, frobenius),
    "frobenius_squared, by leaf": by_leaf(hf.frobenius_squared, lambda s: matrix(s).square().sum(1)),
    "slq, trace": plain(hf.Quadrature.trace, trace),
    "slq, second moment": plain(second, mean_square),
    "slq, exp(-H)": plain(lambda rule: rule.trace(decayed), trace_of(decayed), 20),
    "slq, effective dimension": plain(lambda rule: hf.effective_dimension(rule, 2.0), trace_of(ridge), 20),
    "slq, density": densities,
    "slq, exact outliers, trace": exact(hf.Quadrature.trace, trace),
    "slq, exact outliers, second moment": exact(second, mean_square),
    "krylov, by leaf": lambda s, k, n: torch.stack(
        [held_leaves(run.trace, matrix(s).diagonal()) for run in krylov_runs(s, k, n, 16)]
    ),
    "block_spectra": over_seeds(in_blocks),
    "sharpness": over_seeds(
        lambda s, k, g: held(
            hf.sharpness(operator(s), num_probes=k, generator=g).mean_eigenvalue, trace(s) / len(values(s))
        )
    ),
    "stable_rank": over_seeds(
        lambda s, k, g: held(
            hf.stable_rank(operator(s), num_probes=k, tol=1e-8, generator=g), frobenius(s) / max(values(s)) ** 2
        )
    ),
}


class Row(NamedTuple):
    method: str
    spectrum: str
    num_probes: int
    seeds: int = SEEDS


def coverage(row: Row) -> float:
    return float(METHODS[row.method](row.spectrum, row.num_probes, row.seeds).double().mean())


QUICK = [
    *(Row(name, "outliers", 12) for name in ("hutchinson", "hutchinson, by leaf", "hutchinson, deflated")),
    *(Row(name, "outliers", 12) for name in ("deflated", "hutchpp", "diagonal", "xdiag", "frobenius_squared")),
    *(Row("xtrace", spectrum, 12) for spectrum in ("flat", "fast", "trained")),
    *(Row("xnystrace", spectrum, 12) for spectrum in ("flat", "fast", "trained")),
    *(Row("slq, trace", spectrum, 12) for spectrum in ("outliers", "trained", "one")),
    *(Row("slq, second moment", spectrum, k) for spectrum in ("outliers", "one") for k in (4, 12, 40)),
    *(Row(name, "outliers", 12) for name in ("slq, exp(-H)", "slq, density")),
    *(Row("hutchinson", spectrum, k) for spectrum in ("fast", "one") for k in (4, 12)),
    *(Row(name, "one", 12) for name in ("hutchinson, by leaf", "frobenius_squared", "diagonal, trace")),
]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.method} of {row.spectrum} with {row.num_probes}")
def test_intervals_hold_the_truth_in_95_of_100_runs(row):
    share = coverage(row)
    assert BAND[0] <= share <= BAND[1], share


PARTED = ("within", "across")
SEMIDEFINITE = [name for name in SPECTRA if name != "outliers"]
SMOOTH = ("slq, trace", "slq, second moment", "slq, exp(-H)")


def many(num_probes: int, few: int) -> int:
    return MANY if num_probes <= few else SEEDS


SLOW = [
    *(
        Row(name, spectrum, k, MANY)
        for name, spectra, counts in (
            ("xtrace", SPECTRA, (4, 8, 12, 20)),
            ("xnystrace", SEMIDEFINITE, (4, 8, 12, 20, 40)),
        )
        for spectrum in spectra
        for k in counts
    ),
    *(Row(name, spectrum, k, MANY) for name in SMOOTH for spectrum in SPECTRA for k in (4, 8, 12)),
    *(Row(name, spectrum, 40) for name in SMOOTH for spectrum in SPECTRA),
    *(Row("slq, effective dimension", spectrum, k, MANY) for spectrum in SEMIDEFINITE for k in (4, 12)),
    *(Row("slq, density", spectrum, k) for spectrum in SPECTRA for k in (4, 8, 12, 40)),
    *(Row("xdiag", spectrum, k) for spectrum in SPECTRA for k in (5, 10, 20)),
    *(Row("diagonal", spectrum, k) for spectrum in SPECTRA for k in (12, 40)),
    *(Row("hutchinson", spectrum, k, many(k, 4)) for spectrum in SPECTRA for k in (4, 8, 12, 40)),
    *(Row("hutchinson, by leaf", spectrum, 4, MANY) for spectrum in SPECTRA),
    *(Row("hutchinson, by leaf", spectrum, k) for spectrum in SPECTRA for k in (12, 40)),
    *(Row(f"hutchinson, by leaf coupled {how} alone", spectrum, 40) for how in PARTED for spectrum in SPECTRA),
    *(
        Row(f"hutchinson{kind}, by leaf", spectrum, 12, MANY if "deflated" in kind else SEEDS)
        for kind in (" of normal probes", " on the sphere", ", deflated")
        for spectrum in SPECTRA
    ),
    *(
        Row(name, spectrum, 12)
        for name in ("xdiag, squared norm", "frobenius_squared of normal probes", "frobenius_squared on the sphere")
        for spectrum in SPECTRA
    ),
    *(Row("xdiag, trace", spectrum, 12) for spectrum in SPECTRA),
    # The probes and laws of hutchinson and frobenius_squared
    *(
        Row(name, spectrum, k)
        for name in ("diagonal, trace", "diagonal, trace by leaf", "diagonal, squared norm")
        for spectrum in ("outliers", "one")
        for k in (12, 40)
    ),
    *(
        Row(name, spectrum, k)
        for name in ("frobenius_squared", "frobenius_squared, by leaf")
        for spectrum in SPECTRA
        for k in (8, 12, 40)
    ),
    *(Row("hutchinson, deflated", spectrum, k, many(k, 4)) for spectrum in SPECTRA for k in (4, 12, 24)),
    *(
        Row(name, spectrum, k, many(k, 12))
        for name in ("hutchpp", "deflated")
        for spectrum in SPECTRA
        for k in (8, 12, 24)
    ),
    *(
        Row(name, spectrum, k, many(k, 12))
        for name in ("hutchpp, by leaf", "deflated, by leaf")
        for spectrum in SPECTRA
        for k in (12, 24)
    ),
    *(Row("hutchinson, to a tolerance", spectrum, 12) for spectrum in ("outliers", "fast", "trained", "one")),
    *(
        Row(name, spectrum, 12)
        for name in ("slq, exact outliers, trace", "slq, exact outliers, second moment")
        for spectrum in ("outliers", "flat")
    ),
    *(Row("krylov, by leaf", spectrum, 12) for spectrum in SPECTRA),
    *(
        Row(name, spectrum, 12)
        for name in (
            "hutchinson",
            "hutchinson, by leaf",
            "hutchinson, deflated",
            "deflated",
            "hutchpp",
            "xtrace",
            "xnystrace",
            "diagonal",
            "xdiag",
            "frobenius_squared",
            "slq, trace",
            "slq, second moment",
            "slq, density",
            "krylov, by leaf",
        )
        for spectrum in FURTHER
    ),
    Row("block_spectra", "outliers", 12),
    Row("sharpness", "outliers", 12),
    *(Row("stable_rank", "outliers", k) for k in (12, 40)),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=lambda row: f"{row.method} of {row.spectrum} with {row.num_probes}")
def test_over_all_spectra_intervals_hold_the_truth_in_92_to_98_of_100_runs(row):
    share = coverage(row)
    assert BAND[0] <= share <= BAND[1], share


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("how", PARTED)
def test_the_extremes_of_how_leaves_are_coupled_take_more_probes(how, spectrum):
    """With 12 a leaf's variance is known up to a factor of 2, and little more: 92.0 to 98.3 % over 1600 seeds."""
    share = coverage(Row(f"hutchinson, by leaf coupled {how} alone", spectrum, 12, MANY))
    assert 0.915 <= share <= 0.985, share
