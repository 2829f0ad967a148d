"""The error of a mean over probes uniform on the sphere, from the law of these probes and from quadrature nodes."""

from __future__ import annotations

from hessfunc._typing import Tensor

_NORMAL = 1e6
"""Degrees of freedom from which on Student's distribution is the normal one."""

_SMALLEST = 1e-300


def known_error(variance: Tensor, fourth: Tensor, *, mass: float, size: int, num_probes: int) -> tuple[Tensor, Tensor]:
    """Standard error of the mean over probes of ``sum_i weight_i f(node_i)``, and its degrees of freedom.

    Such a sum is ``<v, f(H) v>`` up to a factor, whose variance is ``2 / (size + 2)`` times that of ``f`` over the
    eigenvalues. All nodes together tell the latter, and their kurtosis how well.

    Args:
        variance: of ``f`` over the nodes of all probes, of any shape; the results have the same.
        fourth: fourth central moment, likewise.
        mass: the weights' sum for one probe.
        size: number of eigenvalues that the nodes stand for.
        num_probes: number of probes.
    """
    noise = (fourth - variance.square()).clamp(min=_SMALLEST)
    error = mass * (2 * variance / ((size + 2) * num_probes)).sqrt()
    dof = num_probes - 1 + num_probes * (size + 2) * variance.square() / noise
    return error, dof.clamp(max=_NORMAL)
