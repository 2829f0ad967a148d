"""One set of Lanczos runs that gives eigenpairs, trace and density together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch

from hessfunc import _probes
from hessfunc._certify import certified
from hessfunc._checks import ConvergenceWarning, NonFiniteError, check_choice, check_count, check_positive
from hessfunc._deflation import leaf_sums
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._estimate import Estimate
from hessfunc._lanczos import Tridiagonal
from hessfunc._mean_rule import mean_rule, recurrence
from hessfunc._operators import Operator
from hessfunc._outliers import Outliers, RitzPairs
from hessfunc._probe_law import leaf_errors
from hessfunc._quadrature import Quadrature
from hessfunc._runs import check_options, continued, deflated_rows, normalized, run_deflated
from hessfunc._semiorthogonal import run_semiorthogonal
from hessfunc._typing import Tensor
from hessfunc._wanted import WHICH, wanted


@dataclass(frozen=True)
class Krylov:
    """What a set of Lanczos runs tells of an operator; see [`krylov`][hessfunc.krylov].

    Attributes:
        quadrature: the spectrum, exact outliers included ([`Quadrature`][hessfunc.Quadrature]).
        trace: trace with the share of every leaf, from the same probes with the exact outliers projected off. Standard
            errors, by leaf too, are from the known law of these probes.
        ritz_values: all Ritz values of the reorthogonalized run, ascending, float64.
        ritz_residuals: their residual norms by the Lanczos recurrence, float64.
        repeated: exact outliers of which a further copy showed up in the other probes, shape ``(num_exact,)``, bool.
    """

    quadrature: Quadrature
    trace: Estimate
    ritz_values: Tensor = field(repr=False)
    ritz_residuals: Tensor = field(repr=False)
    repeated: Tensor = field(repr=False)
    _operator: Operator = field(repr=False)
    _pairs: RitzPairs = field(repr=False)

    def eigenpairs(self, k: int, *, which: str = "LM", tol: float = 1e-3) -> Eigenpairs:
        """The k most extreme Ritz pairs, each with a true residual from a product made for it. Cost: k matvecs.

        A pair counts as converged if ``|H v - lambda v| <= tol * |lambda|``, as in [`eigsh`][hessfunc.eigsh], which
        goes on from here if some did not: ``eigsh(H, k, v0=pairs, generator=generator)``. One Krylov space
        holds one copy of a repeated eigenvalue; the other probes tell if there are more.

        Args:
            k: number of pairs.
            which: ``"LM"`` largest magnitude, ``"LA"`` largest, ``"SA"`` smallest, ``"BE"`` both ends.
            tol: residual of a pair over its ``|lambda|``.

        Raises:
            ValueError: an option is out of range.

        Warns:
            ConvergenceWarning: a pair has not converged, or an eigenvalue listed once is repeated.
        """
        pairs = self.candidates(k, which=which, tol=tol)
        if not bool(pairs.converged.all()):
            warnings.warn(
                f"krylov: {int((~pairs.converged).sum())} of {k} pairs have a residual above tol={tol}; see the fields "
                "converged and residuals. Raise num_steps, or go on with eigsh(H, k, v0=pairs, generator=generator).",
                ConvergenceWarning,
                stacklevel=2,
            )
        copies = self.quadrature.exact[self.repeated]
        listed = copies[torch.isin(copies, self.ritz_values[self._chosen(k, which)])]
        if listed.numel():
            warnings.warn(
                f"krylov: the eigenvalue {float(listed[0]):.6g} is repeated, but one Krylov space holds it once, so a "
                "further copy may be missing from the list; hessfunc.eigsh finds all copies.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return pairs

    def candidates(self, k: int, *, which: str = "LM", tol: float = 1e-3) -> Eigenpairs:
        """The same as ``eigenpairs`` without its warnings, for those who look at ``converged`` and ``repeated``."""
        H = self._operator
        check_count(k, name="k", maximum=self.ritz_values.shape[0], why=", the number of Ritz pairs")
        check_choice(which, WHICH, name="which")
        check_positive(tol, name="tol")
        with torch.no_grad():
            rows = self._pairs.rows(self._chosen(k, which))
            scale = float(self.ritz_values.abs().max())
            spent = self.quadrature.num_matvecs + k
            return certified(H, rows, which=which, tol=tol, scale=scale, num_matvecs=spent)

    def _chosen(self, k: int, which: str) -> Tensor:
        return torch.from_numpy(wanted(self.ritz_values.numpy(), which)[:k].copy())


def krylov(
    H: Operator,
    *,
    num_steps: int,
    num_probes: int,
    num_rules: int | None = None,
    reorthogonalize: str = "none",
    chunk_size: int | None = None,
    generator: torch.Generator,
) -> Krylov:
    """Eigenpairs, trace, trace of every leaf, and spectral density from the same products.

    The first probe gets a Lanczos run whose vectors are kept orthogonal to the square root of the rounding unit, by
    reorthogonalizing two of them whenever that is about to fail (Simon 1984). Those of its Ritz pairs that are
    isolated eigenpairs (residual below a hundredth of the gap to the next) get their exact mass ``1 / size``: this is
    variance-reduced stochastic Lanczos quadrature (Bhattacharjee, Jayaram, C. Musco, C. Musco and Ray 2025, arXiv
    2410.21690). All other probes have these eigenvectors projected off before they run, in lockstep, so that only the
    rest of the spectrum is left to chance::

        tr f(H) ~ sum_exact f(lambda) + (size - num_exact) * mean_probes sum_i weight_i f(node_i)

    The projected probes do not depend on the first one, so that a trace is unbiased for them whether or not the pairs
    have converged, and a repeated eigenvalue keeps its full mass: its other copies are found among the rest and
    told as ``repeated``. In the first probe's own row the choice of pairs depends on the probe; the bias is a small
    part of the row's noise, and the row is one of ``num_probes``. With ``num_probes=1`` there is nothing to check that
    eigenvalues are simple; only a gross excess of mass is noticed.

    Cost: ``num_probes * num_steps`` matvecs in ``2 * num_steps`` passes. Memory: ``num_steps + num_exact`` vectors that
    stay with the result, ``num_probes`` probes, and three vectors for each probe of a chunk (``num_steps`` with
    ``reorthogonalize="full"``).

    Args:
        H: symmetric operator.
        num_steps: Lanczos steps per probe, between 1 and ``H.size``.
        num_probes: number of probes.
        num_rules: rules whose mean the quadrature is, as in [`slq`][hessfunc.slq].
        reorthogonalize: ``"none"`` or ``"full"``, for the probes other than the first.
        chunk_size: probes run at a time; by default all. Changes memory, not the answer.
        generator: draws the probes, uniform on the sphere.

    Raises:
        ValueError: an option is out of range.
        NonFiniteError: a product is NaN or infinite; its ``partial`` is the quadrature of the first probe.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([9.0, 5.0] + [0.01 * i for i in range(50)])))
        >>> result = hf.krylov(H, num_steps=20, num_probes=4, generator=torch.Generator().manual_seed(0))
        >>> result.eigenpairs(2).eigenvalues.round(decimals=3)
        tensor([9., 5.])
    """
    num_rules = check_options(H, num_steps, num_probes, num_rules, reorthogonalize, chunk_size, generator)
    with torch.no_grad():
        probes = _probes.sphere(num_probes, H.size, generator=generator, dtype=H.dtype, device=H.device)
        unit, product, run = _pilot(H, probes[0], num_steps)
        pairs = RitzPairs.of(run)
        which = pairs.isolated(H.size)
        if num_probes == 1 and not pairs.consistent(which, H.size):
            which = which[:0]
        found = pairs.select(which, H.size)
        try:
            rest = run_deflated(H, found, probes[1:], num_steps, reorthogonalize, chunk_size)
        except NonFiniteError as error:
            alone = _pilot_row(pairs, found.subset(which < 0), which[:0], which[:0] > 0, H.size, num_steps, num_rules)
            partial = Quadrature(*alone, H.size, num_steps, num_steps, num_exact=0, num_rules=num_rules)
            raise error.keeping(partial) from None
        repeated = found.repeated(rest.nodes, rest.weights, H.size)
        simple = ~repeated if pairs.consistent(which[~repeated], H.size) else torch.zeros_like(repeated)
        own = found.subset(simple)
        spent = num_probes * num_steps
        nodes, weights = deflated_rows(found.values, rest, H.size, num_rules)
        first_nodes, first_weights = _pilot_row(pairs, found, which, simple, H.size, num_steps, num_rules)
        quadrature = Quadrature(
            nodes=torch.cat([first_nodes, nodes]),
            weights=torch.cat([first_weights, weights]),
            size=H.size,
            num_steps=num_steps,
            num_matvecs=spent,
            num_exact=len(which),
            num_rules=num_rules,
        )
        parts_of_leaves = leaf_sums(found.rows.square(), H)
        first = _leaves(H, own, parts_of_leaves[simple], *_pilot_leaves(H, unit, product, own))
        others = _leaves(H, found, parts_of_leaves, rest.shares, rest.squares)
        shares, *known = (torch.cat(parts) for parts in zip(first, others, strict=True))
    law = quadrature.trace()
    trace = Estimate.of(
        shares.sum(dim=1),
        num_matvecs=spent,
        leaf_samples=shares,
        leaf_names=H.layout.names,
        stderr=law.stderr,
        dof=law.dof,
    )
    if num_probes > 1:
        leaf_stderr, leaf_dof = leaf_errors(shares, *known)
        trace = replace(trace, leaf_stderr=leaf_stderr, leaf_dof=leaf_dof)
    return Krylov(quadrature, trace, pairs.values, pairs.residuals, repeated, H, pairs)


def _pilot(H: Operator, probe: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tridiagonal]:
    unit = normalized(probe.unsqueeze(0))[0]
    product = H.vector(unit)
    return unit, product, run_semiorthogonal(continued(H, product), unit, num_steps)


def _pilot_row(
    pairs: RitzPairs,
    found: Outliers,
    which: Tensor,
    simple: Tensor,
    size: int,
    num_steps: int,
    num_rules: int,
) -> tuple[Tensor, Tensor]:
    """The row of the first probe: the weights of ``simple`` pairs replaced, the others as a rule of what is left."""
    others = pairs.weights > 0
    others[which[simple]] = False
    nodes, weights = pairs.values[others], pairs.weights[others]
    if bool(simple.any()):
        weights = weights * (1 - int(simple.sum()) / size) / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    if len(pairs.values) == num_steps < size and len(nodes):
        mass, (alphas, betas) = weights.sum(), recurrence(nodes, weights)
        num_own = max(1, num_rules * len(nodes) // num_steps)  # those of as large a part of the steps
        (nodes,), (weights,) = mean_rule(alphas[None], betas[None], num_own)
        weights = mass * weights
    padding = sum(num_steps - i for i in range(num_rules)) - len(nodes)
    nodes = torch.cat([found.values, nodes, pairs.values[-1:].expand(padding)])
    weights = torch.cat([simple.double() / size, weights, weights.new_zeros(padding)])
    return nodes.unsqueeze(0), weights.unsqueeze(0)


def _pilot_leaves(H: Operator, unit: Tensor, product: Tensor, own: Outliers) -> tuple[Tensor, Tensor]:
    """Shares and squares as in ``Runs`` from the first probe, the pairs ``own`` projected off it after the run."""
    along = own.rows @ unit
    rest = unit - along @ own.rows
    product = product - (own.values.to(along) * along) @ own.rows
    squared = rest.square().sum().cpu().double().clamp(min=torch.finfo(rest.dtype).tiny)
    shares, squares = (leaf_sums(row.unsqueeze(0), H) / squared for row in (rest * product, product.square()))
    return shares, squares


def _leaves(H: Operator, outliers: Outliers, parts: Tensor, shares: Tensor, squares: Tensor) -> tuple[Tensor, ...]:
    """Samples of the trace of every leaf, that of the outliers included; and what ``leaf_errors`` takes.

    ``parts`` are those of the outliers' unit vectors that lie in each leaf.
    """
    dimension = H.size - len(outliers.values)
    known = outliers.values @ parts
    summands = dimension * (squares - shares.square())
    return known + dimension * shares, summands, dimension * (squares - shares * shares.sum(1, keepdim=True))
