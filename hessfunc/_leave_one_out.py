"""The leave-one-out values of XTrace and XNysTrace, and the error of their mean; all from small matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hessfunc._deflation import inner
from hessfunc._typing import Tensor

INDEFINITE = 0.5
"""Exponent of rounding below which a negative eigenvalue of the sketch, over the largest, counts as zero."""

RAISED = 0.5
"""For XNysTrace. Eight probes of a matrix with one eigenvalue, or six, a hundred times all others then hold the truth
in 94 % of runs, without it in 92; more than that is too much for flat spectra."""


class Values(NamedTuple):
    """One value for each probe, and the standard error of their mean; float64, on the CPU.

    Each value is an unbiased estimate of the trace: the probe tests a low-rank approximation that the other
    probes made. The values depend on one another, which ``spread_and_covariance`` takes into account.
    """

    samples: Tensor
    stderr: Tensor


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
    seen = _small(basis, probes)
    # What P_i lacks of the whole basis: a direction s_i of its own. If the rank of H is below the number of probes the
    # others span all of it (up to rounding, as the probes' distribution is continuous), and nothing is lacking.
    full_rank = len(basis) == len(probes)
    own = _dual(_small(basis, images)) if full_rank else torch.zeros_like(seen)
    # In terms of the part of v_i outside all of the basis, and of its component along s_i
    outer = _small(products, probes) - inner @ seen
    quadratic = _dots(probes, images) - (seen * _small(basis, images)).sum(0) - (outer * seen).sum(0)
    length = (_dots(probes, probes) - seen.square().sum(0)).clamp(min=0)
    curved, component, mixed = own.T @ inner @ own, own.T @ seen, own.T @ outer
    diagonal, along, slope = curved.diagonal(), component.diagonal(), mixed.diagonal()
    missing = size - len(basis) + full_rank
    tested = quadratic + 2 * along * slope + along.square() * diagonal
    samples = inner.trace() - diagonal + tested * _ratio(missing, length + along.square())

    # The same with j left out as well, at [j, i]: components along s_i and s_j, which are not orthogonal
    cosine = (own.T @ own).fill_diagonal_(0)
    sine = (1 - cosine.square()).clamp(min=1e-12)
    first, second = (along - cosine * component) / sine, (component - cosine * along) / sine
    tested = quadratic + 2 * (first * slope + second * mixed)
    tested = tested + first.square() * diagonal + second.square() * diagonal[:, None] + 2 * first * second * curved
    reach = length + first * along + second * component
    lost = (diagonal + diagonal[:, None] - 2 * cosine * curved) / sine
    pairs = inner.trace() - lost + tested * _ratio(missing + full_rank, reach)
    return Values(samples, _error(samples, pairs))


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
    samples = whole - lost / b + (size - count + 1) * spread.diagonal() / b

    # The same with j left out as well, at [j, i]
    off = inverse.clone().fill_diagonal_(0)
    determinant = b * b[:, None] - off.square()
    loss = (b[:, None] * lost + b * lost[:, None] - 2 * off * weight) / determinant
    away = spread.diagonal() - spread.square() / spread.diagonal()[:, None]
    pairs = whole - loss + (size - count + 2) * away * b[:, None] / determinant
    return Values(samples, _error(samples, pairs, raised=RAISED))


def spread_and_covariance(samples: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the variance of the mean of leave-one-out values; their sum is unbiased.

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
    covariances = _covariances(samples, pairs)
    return samples.var(0) / len(samples), covariances.mean(0)


def _covariances(samples: Tensor, pairs: Tensor) -> Tensor:
    """The products ``(T_i - T_ij) (T_j - T_ji)``, one for each pair of probes, along the first axis."""
    change = samples - pairs
    upper = torch.triu_indices(len(samples), len(samples), 1)
    return (change * change.transpose(0, 1))[upper[0], upper[1]]


def _error(samples: Tensor, pairs: Tensor, *, raised: float = 0.0) -> Tensor:
    """Standard error of the mean; infinite for a single value.

    A covariance estimated below zero says that its noise is as large as the variance: its magnitude goes in. Were it cut
    off at a quarter of the spread, intervals of XTrace would hold the truth in 88 % of runs where two or ten eigenvalues
    stand high above a flat rest; as it is, they do in up to 100 % where the probes are hardly more than these.

    Args:
        samples: the values.
        pairs: those that leave out one more probe each.
        raised: standard errors of the covariance to add to it. Its noise is skewed, so that most estimates of it are
            too small.
    """
    if len(samples) == 1:
        return samples.new_tensor(torch.inf)
    covariances = _covariances(samples, pairs)
    noise = (covariances.square().mean() / len(covariances)).sqrt()
    return (samples.var() / len(samples) + covariances.mean().abs() + raised * noise).sqrt()


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
