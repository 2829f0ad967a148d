"""The leave-one-out values of XTrace and XNysTrace, and the error of their mean; all from small matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hessfunc._deflation import inner
from hessfunc._probe_law import law_mean
from hessfunc._typing import Tensor

ROWS = 16
"""Vectors to make anew at a time."""

INDEFINITE = 0.5
"""Exponent of rounding below which a negative eigenvalue of the sketch, over the largest, counts as zero."""

BELOW = 0.25
"""Largest part of the values' variance that a covariance below zero stands for.

Where eigenvalues fall fast all of its magnitude would make intervals that hold the truth in up to 100 % of runs, and
none of it such that do in 92 to 93 %."""


class Values(NamedTuple):
    """One value for each probe, the standard error of their mean, and its degrees of freedom; float64, on the CPU.

    Each value is an unbiased estimate of the trace: the probe tests a low-rank approximation that the other
    probes made. The values depend on one another, which the error takes into account. ``dof`` is ``None`` for those of
    a spread of samples.
    """

    samples: Tensor
    stderr: Tensor
    dof: float | None = None


def xtrace_values(probes: Tensor, images: Tensor, basis: Tensor, products: Tensor) -> Values:
    """XTrace (Epperly, Tropp and Webber 2024, section 2) with probes respherized in each complement.

    With ``P_i`` the projector onto the images of all probes but ``v_i``, the values are
    ``tr(P_i H P_i) + c_i <w_i, H w_i>`` for ``w_i = (I - P_i) v_i`` and ``c_i = rank(I - P_i) / |w_i|^2``.

    Args:
        probes: uniform on the sphere of radius ``sqrt(size)``, shape ``(k, size)``.
        images: ``H`` times each.
        basis: orthonormal rows that span the images, shape ``(r, size)``.
        products: ``H`` times each of these.
    """
    size = probes.shape[1]
    inner = _small(basis, products)
    inner = (inner + inner.T) / 2
    seen, reached = _small(basis, probes), _small(basis, images)
    # What P_i lacks of the whole basis: a direction s_i of its own. If the rank of H is below the number of probes the
    # others span all of it (up to rounding, as the probes' distribution is continuous), and nothing is lacking.
    full_rank = len(basis) == len(probes)
    own = _dual(reached) if full_rank else torch.zeros_like(seen)
    # In terms of the part of v_i outside all of the basis, and of its component along s_i
    outer = _small(products, probes) - inner @ seen
    quadratic = _dots(probes, images) - (seen * reached).sum(0) - (outer * seen).sum(0)
    length = (_dots(probes, probes) - seen.square().sum(0)).clamp(min=0)
    curved, component, mixed = own.T @ inner @ own, own.T @ seen, own.T @ outer
    diagonal, along, slope = curved.diagonal(), component.diagonal(), mixed.diagonal()
    missing = size - len(basis) + full_rank
    tested = quadratic + 2 * along * slope + along.square() * diagonal
    ratio = _ratio(missing, length + along.square())
    samples = inner.trace() - diagonal + tested * ratio
    # What the law asks for: with w_i = v_i - P_i v_i the image outside P_i, off w_i
    quotient = tested * ratio / max(1, missing)
    taken = seen - own * along
    behind = reached - inner @ taken
    behind = behind - own * (own * behind).sum(0) - quotient * taken
    unit = torch.eye(len(probes), dtype=seen.dtype, device="cpu")
    laws = 2 * ratio * _squares((unit, images), (-quotient * unit, probes), (-taken, products), (-behind, basis))

    # The same with j left out as well, at [j, i]: components along s_i and s_j, which are not orthogonal
    cosine = (own.T @ own).fill_diagonal_(0)
    sine = (1 - cosine.square()).clamp(min=1e-12)
    first, second = (along - cosine * component) / sine, (component - cosine * along) / sine
    tested = quadratic + 2 * (first * slope + second * mixed)
    tested = tested + first.square() * diagonal + second.square() * diagonal[:, None] + 2 * first * second * curved
    reach = length + first * along + second * component
    lost = (diagonal + diagonal[:, None] - 2 * cosine * curved) / sine
    pairs = inner.trace() - lost + tested * _ratio(missing + full_rank, reach)
    return Values(samples, *_error(samples, pairs, laws))


def nystrom_values(probes: Tensor, images: Tensor) -> Values:
    """XNysTrace (Epperly, Tropp and Webber 2024, section 2.3) from an eigendecomposition, for any rank.

    With ``N_i`` the Nystrom approximation ``Y (V^T Y)^+ Y^T`` from the images ``Y`` of all probes ``V`` but ``v_i``,
    the values are ``tr N_i + c_i <v_i, (H - N_i) v_i>``, where ``c_i`` respherizes ``v_i`` in the complement of the
    other probes.

    Args:
        probes: uniform on the sphere of radius ``sqrt(size)``, shape ``(k, size)``, with ``k < size``.
        images: ``H`` times each.

    Raises:
        ValueError: ``V^T H V`` has an eigenvalue clearly below zero.
    """
    count, size = probes.shape
    gram = _small(probes, images)
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    epsilon = torch.finfo(probes.dtype).eps
    largest = float(eigenvalues.abs().max())
    overlaps = _small(probes, probes)
    if float(eigenvalues[0]) < -(epsilon**INDEFINITE) * largest:
        quotient = float(eigenvalues[0] / (vectors[:, 0] @ overlaps @ vectors[:, 0]))
        raise ValueError(
            f"H is not positive semi-definite, as xnystrace needs it: it has the Rayleigh quotient {quotient:.3g}. "
            "hessfunc.xtrace, hutchpp and hutchinson take every symmetric operator; Gauss-Newton and Fisher operators "
            "are positive semi-definite."
        )
    floor = 100 * epsilon * largest
    kept = eigenvalues > floor
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    factor = vectors.T.to(images) @ images
    traces = _small(factor, factor)
    whole = (traces.diagonal() / eigenvalues).sum()
    if len(eigenvalues) < count:  # the rank of H, up to rounding: any of the others make the same approximation
        return Values(whole.expand(count), torch.as_tensor(floor, device="cpu"))
    # Leaving out v_i takes off g_i g_i^T, with g_i = Y B e_i / sqrt(B_ii) and B the inverse of V^T Y
    scaled = vectors / eigenvalues
    inverse, weight = scaled @ vectors.T, scaled @ traces @ scaled.T
    b, lost = inverse.diagonal(), weight.diagonal()
    spread = torch.linalg.inv(overlaps)
    missing = size - count + 1
    samples = whole - lost / b + missing * spread.diagonal() / b
    # As in xtrace_values: (H - N_i) v_i = Y B e_i / B_ii, and w_i = V S e_i / S_ii with S the inverse of V^T V
    laws = 2 * missing * spread.diagonal() * _squares((inverse / b, images), (-spread / b, probes))

    # The same with j left out as well, at [j, i]
    off = inverse.clone().fill_diagonal_(0)
    determinant = b * b[:, None] - off.square()
    loss = (b[:, None] * lost + b * lost[:, None] - 2 * off * weight) / determinant
    away = spread.diagonal() - spread.square() / spread.diagonal()[:, None]
    pairs = whole - loss + (missing + 1) * away * b[:, None] / determinant
    return Values(samples, *_error(samples, pairs, laws))


def spread_and_covariance(samples: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The spread of leave-one-out values as the variance of a mean, and their covariance; the sum has no bias.

    Formula: ``sum_i (T_i - mean T)^2 / (k (k - 1))``, and the mean of ``(T_i - T_ij) (T_j - T_ji)`` over all i other
    than j, where ``T_ij`` tests probe i and leaves j out as well.

    Exchangeable values whose mean has variance ``V`` have a spread of ``V - cov(T_i, T_j)`` in expectation. The
    expectation of ``T_i`` and of ``T_ij`` over probe i is the truth, whatever the other probes. So of the four products
    in the second part only ``T_i T_j`` has a covariance: in each of the others one factor does not know the probe that
    the other tests.

    The spread alone is up to 4 times too small (as a standard error, measured). The jackknife's, of the means that
    leave one probe out, is up to 6 times too large: it counts what r probes have in common r times (Efron and Stein
    1981).

    Args:
        samples: the values ``T_i``, at least two, shape ``(k,)``, or ``(k, n)`` for n of them at once.
        pairs: at ``[j, i]`` the value ``T_ij``, shape ``(k, k)`` or ``(k, k, n)``; the diagonal is not used.
    """
    count = len(samples)
    others = torch.ones_like(pairs)
    others[range(count), range(count)] = 0
    change = (samples - pairs) * others
    covariance = (change * change.transpose(0, 1)).sum((0, 1)) / (count * (count - 1))
    return samples.var(0) / count, covariance


def _error(samples: Tensor, pairs: Tensor, laws: Tensor) -> tuple[Tensor, float | None]:
    """Standard error of the mean, infinite for a single value, and its degrees of freedom.

    Each of ``laws`` estimates the variance of one value without bias, as the law of probes on the sphere has it (see
    [`ProbeLaw`][]): ``2 |B w - (<w, B w> / |w|^2) w|^2`` for a probe w that tests B. These are squares: where a few
    eigenvalues make up most of B, the spread of the values, which has fourth powers, seldom shows it.

    A covariance estimated below zero says that its noise is as large as it is: its magnitude goes in, up to ``BELOW``
    of the variance.
    """
    count = len(samples)
    if count == 1:
        return samples.new_tensor(torch.inf), None
    variance, dof = law_mean(laws)
    if not float(variance) > 0:  # exact, up to rounding
        return samples.std() / count**0.5, None
    covariance = spread_and_covariance(samples, pairs)[1]
    covariance = torch.where(covariance < 0, torch.minimum(-covariance, BELOW * variance / count), covariance)
    return ((variance + (count - 1) * covariance) / count).sqrt(), float(dof)


def _squares(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """Squared norms of the sums of ``columns.T @ rows``."""
    parts = []
    for start in range(0, terms[0][0].shape[1], ROWS):
        some = torch.stack([columns[:, start : start + ROWS].T.to(rows) @ rows for columns, rows in terms]).sum(0)
        parts.append(_dots(some, some))
    return torch.cat(parts)


def _small(left: Tensor, right: Tensor) -> Tensor:
    return inner(left, right).cpu().double()


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1).cpu().double()


def _ratio(dimension: int, length: Tensor) -> Tensor:
    """``dimension / length``, and 0 where the length is rounding error: nothing is left there."""
    return torch.where(length > 1e-9 * dimension, dimension / length, torch.zeros_like(length))


def _dual(columns: Tensor) -> Tensor:
    """For each column of a square matrix the unit vector orthogonal to all others."""
    left, lengths, right = torch.linalg.svd(columns)
    dual = (left / lengths) @ right
    return dual / torch.linalg.vector_norm(dual, dim=0)
