"""Scalar measures of curvature: sharpness, ranks and conditioning, each from estimators of the other modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hessfunc import tree
from hessfunc._checks import check_loss_value, check_params, check_positive
from hessfunc._compat import REVERSE_ALONE, rerouted
from hessfunc._diagonal import frobenius_squared
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._eigsh import eigsh
from hessfunc._estimate import Estimate
from hessfunc._operators import Operator
from hessfunc._quadrature import Quadrature
from hessfunc._trace import hutchinson
from hessfunc._typing import Loss, Params, Tensor


@dataclass(frozen=True)
class Sharpness:
    """Usual measures of the sharpness of a minimum.

    Attributes:
        top: the pair of the largest (most positive) eigenvalue ``lambda_max``, with its residual.
        trace: ``tr H``, with ``per_leaf``.
        mean_eigenvalue: ``tr H / n``.
        num_matvecs: products spent in all.
    """

    top: Eigenpairs
    trace: Estimate
    mean_eigenvalue: Estimate
    num_matvecs: int

    @property
    def lambda_max(self) -> Tensor:
        """The largest eigenvalue, a scalar."""
        return self.top.eigenvalues[0]


def sharpness(H: Operator, *, num_probes: int = 32, tol: float = 1e-3, generator: torch.Generator) -> Sharpness:
    """Largest eigenvalue, trace and mean eigenvalue.

    Formula: ``lambda_max = max_v <v, H v> / <v, v>`` (gradient descent of step ``eta`` is stable up to ``2 / eta``);
    ``tr H``, twice the mean rise of a quadratic loss per unit of variance under isotropic noise; ``tr H / n``. None of
    them is invariant under a rescaling of layers that leaves the network's function as it is (Dinh et al. 2017).

    Cost: ``num_probes + 1`` matvecs and those of [`eigsh`][hessfunc.eigsh], whose pair deflates the trace.

    Args:
        H: symmetric operator.
        num_probes: probes for the trace.
        tol: tolerance of the eigenvalue, as in ``eigsh``.
        generator: draws start vector and probes.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([-9.0, 1.0, 5.0])))
        >>> measures = hf.sharpness(H, num_probes=4, generator=torch.Generator().manual_seed(0))
        >>> [round(float(x), 3) for x in (measures.lambda_max, measures.trace, measures.mean_eigenvalue)]
        [5.0, -3.0, -1.0]
    """
    top = eigsh(H, 1, which="LA", tol=tol, generator=generator)
    trace = hutchinson(H, num_probes=num_probes, deflate=top, generator=generator)
    return Sharpness(top, trace, trace.scaled(1 / H.size), top.num_matvecs + trace.num_matvecs)


def sam_ascent(loss: Loss, params: Params, *batch: Any, rho: float = 0.05) -> tuple[Params, Tensor]:
    """The step of sharpness-aware minimization to the worst point nearby, and how much the loss rises on it.

    Formula: ``e = rho g / |g|`` with ``g`` the gradient, which maximizes the linearized loss on ``|e| <= rho``, and
    ``loss(params + e) - loss(params)`` (Foret et al. 2021). To second order the rise is
    ``rho |g| + rho^2 <g, H g> / (2 |g|^2)``.

    Cost: one gradient and one loss.

    Args:
        loss: ``loss(params, *batch) -> scalar``.
        params: pytree of floating-point tensors.
        *batch: passed on to ``loss``.
        rho: length of the step.

    Returns:
        The step, a pytree like ``params`` (zero where the gradient is), and the rise, a scalar.

    Raises:
        ValueError: ``rho`` is not above 0, or the loss is not a scalar.

    Example:
        >>> import torch, hessfunc as hf
        >>> hf.sam_ascent(lambda w: (w**2).sum(), torch.tensor([3.0, 4.0]), rho=1.0)
        (tensor([0.6000, 0.8000]), tensor(11.))
    """
    check_params(params)
    check_positive(rho, name="rho")

    def checked(p: Params) -> Tensor:
        value = loss(p, *batch)
        check_loss_value(value)
        return value

    safe = rerouted(checked, REVERSE_ALONE)
    gradient, value = torch.func.grad_and_value(safe)(params)
    norm = tree.norm(gradient)
    inverse = torch.where(norm == 0, torch.zeros_like(norm), rho / torch.where(norm == 0, torch.ones_like(norm), norm))
    step = tree.map_leaves(lambda leaf: (inverse * leaf).to(leaf.dtype), gradient)
    return step, safe(tree.axpy(1.0, step, params)) - value


def stable_rank(H: Operator, *, num_probes: int = 32, tol: float = 1e-3, generator: torch.Generator) -> Estimate:
    """Stable rank: how many directions share the curvature; at most the rank, and not upset by small eigenvalues.

    Formula: ``|H|_F^2 / |H|_2^2 = sum_i lambda_i^2 / max_i lambda_i^2``. The error is that of the numerator; the
    denominator is an eigenvalue to relative tolerance ``tol``.

    Cost: ``num_probes`` matvecs and those of [`eigsh`][hessfunc.eigsh].

    Args:
        H: symmetric operator.
        num_probes: probes for the Frobenius norm.
        tol: tolerance of the eigenvalue of largest magnitude, as in ``eigsh``.
        generator: draws start vector and probes.

    Raises:
        ValueError: an option is out of range, or ``H`` is zero, which has no stable rank.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([2.0, -2.0, 1.0, 0.0])))
        >>> hf.stable_rank(H, num_probes=4, generator=torch.Generator().manual_seed(0)).value.round(decimals=4)
        tensor(2.2500, dtype=torch.float64)
    """
    top = eigsh(H, 1, which="LM", tol=tol, generator=generator)
    largest = float(top.eigenvalues[0])
    if largest == 0:
        raise ValueError("H is zero: no eigenvalue differs from 0, so the stable rank 0/0 is not defined.")
    square = frobenius_squared(H, num_probes=num_probes, generator=generator)
    return replace(square.scaled(largest**-2), num_matvecs=top.num_matvecs + square.num_matvecs)


def effective_dimension(quadrature: Quadrature, shift: float) -> Estimate:
    """Effective dimension: the number of directions that the data determine against a prior of precision ``shift``.

    Formula: ``tr H (H + shift I)^-1 = sum_i lambda_i / (lambda_i + shift)`` (MacKay 1992), for a positive
    semi-definite operator ([`ggn`][hessfunc.ggn], [`fisher`][hessfunc.fisher]). No further matvec.

    Args:
        quadrature: from [`slq`][hessfunc.slq].
        shift: above 0, in the units of the eigenvalues.

    Raises:
        ValueError: ``shift`` is not above 0, or a node lies at ``-shift / 2`` or below: the operator is indefinite on
            this scale.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([1.0, 3.0, 0.0])))
        >>> quadrature = hf.slq(H, num_steps=3, num_probes=64, generator=torch.Generator().manual_seed(0))
        >>> round(float(hf.effective_dimension(quadrature, 1.0)), 3)
        1.25
    """
    check_positive(shift, name="shift")
    lowest = float(quadrature.nodes[quadrature.weights > 0].min())
    if lowest <= -shift / 2:
        raise ValueError(
            f"shift={shift} does not dominate the negative node {lowest:.3g} of the quadrature; use a positive "
            "semi-definite operator (hessfunc.ggn, hessfunc.fisher) or a larger shift."
        )
    return quadrature.trace(lambda nodes: nodes / (nodes + shift))


def condition_number(H: Operator, *, tol: float = 1e-3, generator: torch.Generator) -> float:
    """Condition number of a positive definite operator, for instance ``hessfunc.ggn(...).shift(weight_decay)``.

    Formula: ``lambda_max / lambda_min``, from both ends of the spectrum by [`eigsh`][hessfunc.eigsh]. The small end
    converges slowly if the ratio is large: from inside the spectrum, so that the result is a lower bound.

    Cost: the matvecs of ``eigsh``.

    Args:
        H: symmetric operator.
        tol: tolerance of both eigenvalues, as in ``eigsh``.
        generator: draws the start vector.

    Raises:
        ValueError: the smallest eigenvalue found is not above 0.

    Example:
        >>> import torch, hessfunc as hf
        >>> H = hf.as_operator(torch.diag(torch.tensor([1.0, 2.0, 10.0])))
        >>> round(hf.condition_number(H, generator=torch.Generator().manual_seed(0)), 3)
        10.0
    """
    ends = eigsh(H, 2, which="BE", tol=tol, generator=generator) if H.size > 1 else None
    values = H.dense().reshape(1) if ends is None else ends.eigenvalues
    low, high = float(values.min()), float(values.max())
    if low <= 0:
        raise ValueError(
            f"H has the eigenvalue {low:.3g}, so it is not positive definite; shift it: H.shift(amount) with amount "
            "above that, or use hessfunc.ggn."
        )
    return high / low
