"""Criteria read as likelihoods: what a model predicts is a distribution, with scores, a covariance and samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hessfunc import tree
from hessfunc._fingerprint import in_double
from hessfunc._typing import Tensor


class Observed(NamedTuple):
    """The negative log-likelihood at the end of a criterion, as it was called.

    Attributes:
        family: the kind of distribution.
        outputs: its parameters, as the criterion handed them over: logits or means.
        target: the observations.
        options: the other arguments by name.
    """

    family: Family
    outputs: Tensor
    target: Tensor
    options: dict[str, Any]

    @property
    def weight(self) -> Tensor | float:
        """What one observation counts in the loss; what the criterion averages over is read from its options."""
        if self.options["reduction"] == "sum":
            return 1.0
        return 1.0 / self.family.count(self)


class Family:
    """A distribution: scores and their covariance with respect to its parameters, and samples.

    An observation is one position of a categorical distribution, and otherwise the numbers along the last axis of the
    outputs (each of its own where there is but one axis). ``along`` is the axis that holds one observation.
    """

    unsupported: tuple[str, ...] = ()

    def check(self, outputs: Tensor, target: Tensor, options: dict[str, Any]) -> None:
        """Raise unless the arguments make the loss a negative log-likelihood."""
        if options["reduction"] not in ("mean", "sum"):
            raise ValueError(f"criterion: reduction={options['reduction']!r} leaves no scalar; use 'mean' or 'sum'.")
        for name in self.unsupported:
            value = options.get(name)
            if isinstance(value, torch.Tensor) or value:
                raise ValueError(
                    f"criterion: with {name} the loss is no negative log-likelihood, so it has no Fisher matrix; "
                    "leave it out, or use hessfunc.ggn, which takes any criterion."
                )
        if target.shape != outputs.shape:
            raise ValueError(
                f"criterion: target has shape {tuple(target.shape)} and outputs {tuple(outputs.shape)}; give them one."
            )

    def along(self, outputs: Tensor) -> int | None:
        """Axis of one observation, or ``None`` if each number is one."""
        return -1 if outputs.dim() > 1 else None

    def count(self, seen: Observed) -> Tensor | float:
        """What a mean over the loss divides by."""
        return float(seen.outputs.numel())

    def inner(self, outputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Inner product within each observation, broadcast against the outputs."""
        axis = self.along(outputs)
        product = left * right
        return product if axis is None else product.sum(axis, keepdim=True)

    def score(self, seen: Observed, target: Tensor) -> Tensor:
        """Gradient of the negative log-likelihood of ``target`` with respect to the outputs."""
        raise NotImplementedError

    def covariance(self, seen: Observed, tangents: Tensor) -> Tensor:
        """Covariance of the score under the model's own distribution, times ``tangents``."""
        raise NotImplementedError

    def roots(self, seen: Observed) -> Tensor:
        """Columns of a square root of the covariance of the score, shape ``(k, *outputs.shape)``.

        Positions that are independent of one another share a column here; [`columns`][] takes them apart.
        """
        raise NotImplementedError

    def sample(self, seen: Observed, generator: torch.Generator) -> Tensor:
        """Observations drawn from the distribution, shaped as ``target``."""
        raise NotImplementedError


class Categorical(Family):
    """``F.cross_entropy``: one of ``classes`` at each position, along the second axis of the outputs."""

    unsupported = ("weight", "label_smoothing")

    def check(self, outputs: Tensor, target: Tensor, options: dict[str, Any]) -> None:
        """Also refuse targets that are probabilities."""
        if target.is_floating_point():
            raise ValueError(
                "criterion: cross_entropy with class probabilities as target is the likelihood of no observation; pass "
                "class indices, or use hessfunc.ggn, which takes any criterion."
            )
        super().check(outputs, target.unsqueeze(self.along(outputs)).expand(outputs.shape), options)

    def along(self, outputs: Tensor) -> int:
        """The class axis."""
        return 1 if outputs.dim() > 1 else 0

    def count(self, seen: Observed) -> Tensor:
        """Positions that are not to be ignored."""
        return self.counted(seen).sum().to(tree.accumulation_dtype(seen.outputs.dtype))

    def score(self, seen: Observed, target: Tensor) -> Tensor:
        """``softmax(outputs) - onehot(target)``, 0 where the target is to be ignored."""
        axis = self.along(seen.outputs)
        counted = self.counted(seen)
        labels = torch.where(counted, target, torch.zeros_like(target)).unsqueeze(axis)
        classes = torch.arange(seen.outputs.shape[axis], device=labels.device)
        shape = [-1 if i == axis else 1 for i in range(seen.outputs.dim())]
        score = seen.outputs.softmax(axis) - (labels == classes.reshape(shape)).to(seen.outputs.dtype)
        return score * counted.unsqueeze(axis)

    def covariance(self, seen: Observed, tangents: Tensor) -> Tensor:
        """``diag(p) - p p^T``."""
        axis = self.along(seen.outputs)
        p = seen.outputs.softmax(axis) * self.counted(seen).unsqueeze(axis)
        weighted = p * tangents
        return weighted - p * weighted.sum(axis, keepdim=True)

    def roots(self, seen: Observed) -> Tensor:
        """``sqrt(p_c) (e_c - p)`` for each class c: the expectation over labels, written out."""
        axis = self.along(seen.outputs)
        p = seen.outputs.softmax(axis).movedim(axis, 0)
        unit = torch.eye(len(p), dtype=p.dtype, device=p.device).reshape(*[len(p)] * 2, *[1] * (p.dim() - 1))
        roots = p.sqrt().unsqueeze(1) * (unit - p) * self.counted(seen)
        return roots.movedim(1, axis + 1)

    def sample(self, seen: Observed, generator: torch.Generator) -> Tensor:
        """Class indices by inversion of the distribution function; those to be ignored stay."""
        axis = self.along(seen.outputs)
        cumulative = in_double(seen.outputs).softmax(axis).cumsum(axis)
        level = _uniform(cumulative.select(axis, -1), generator) * cumulative.select(axis, -1)
        drawn = (cumulative <= level.unsqueeze(axis)).sum(axis).clamp(max=cumulative.shape[axis] - 1)
        return torch.where(self.counted(seen), drawn.to(seen.target), seen.target)

    @staticmethod
    def counted(seen: Observed) -> Tensor:
        """Which positions are not to be ignored."""
        return seen.target != seen.options["ignore_index"]


class Gaussian(Family):
    """``F.mse_loss``: normal around the outputs with variance 1/2, whose negative log-likelihood is the square."""

    unsupported = ("weight",)

    def score(self, seen: Observed, target: Tensor) -> Tensor:
        """``2 (outputs - target)``."""
        return 2 * (seen.outputs - target)

    def covariance(self, _seen: Observed, tangents: Tensor) -> Tensor:
        """Twice the identity."""
        return 2 * tangents

    def roots(self, seen: Observed) -> Tensor:
        """``sqrt(2)``."""
        return torch.full_like(seen.outputs, 2**0.5).unsqueeze(0)

    def sample(self, seen: Observed, generator: torch.Generator) -> Tensor:
        """The outputs with noise."""
        noise = torch.randn(seen.target.shape, generator=generator, device=generator.device, dtype=seen.outputs.dtype)
        return seen.outputs + noise.to(seen.outputs.device) * 0.5**0.5


class Bernoulli(Family):
    """``F.binary_cross_entropy_with_logits``: independent yes or no for each number."""

    unsupported = ("weight", "pos_weight")

    def score(self, seen: Observed, target: Tensor) -> Tensor:
        """``sigmoid(outputs) - target``."""
        return seen.outputs.sigmoid() - target

    def covariance(self, seen: Observed, tangents: Tensor) -> Tensor:
        """``p (1 - p)`` on the diagonal."""
        p = seen.outputs.sigmoid()
        return p * (1 - p) * tangents

    def roots(self, seen: Observed) -> Tensor:
        """``sqrt(p (1 - p))``."""
        p = seen.outputs.sigmoid()
        return (p * (1 - p)).sqrt().unsqueeze(0)

    def sample(self, seen: Observed, generator: torch.Generator) -> Tensor:
        """Zeros and ones."""
        chances = in_double(seen.outputs).sigmoid()
        return (_uniform(chances, generator) < chances).to(seen.target)


FAMILIES: dict[Callable[..., Any], Family] = {
    F.cross_entropy: Categorical(),
    F.mse_loss: Gaussian(),
    F.binary_cross_entropy_with_logits: Bernoulli(),
}


def observe(criterion: Callable[..., Tensor], outputs: Any, target: Any) -> Observed:
    """Run ``criterion`` and return the negative log-likelihood that it ends in.

    What it does to outputs and target before (transposing, flattening, shifting by a token) stays its own affair.

    Raises:
        ValueError: the criterion is no log-likelihood that is known here, or an option makes it none.
    """
    watch = _Watch()
    with watch:
        value = criterion(outputs, target)
    if not watch.calls or watch.calls[-1][0] is not value:
        raise ValueError(
            "criterion cannot be read as a negative log-likelihood: it must return the value of F.cross_entropy, "
            "F.mse_loss or F.binary_cross_entropy_with_logits as it is (also through their nn modules or a function "
            "that prepares their arguments), not scaled and not added to. hessfunc.ggn takes any criterion."
        )
    _, family, bound = watch.calls[-1]
    options = dict(bound)
    seen = Observed(family, options.pop("input"), options.pop("target"), options)
    for name in ("size_average", "reduce"):
        if options.get(name) is not None:
            raise ValueError(f"criterion: {name} is an old option of torch; use reduction='mean' or 'sum'.")
    family.check(seen.outputs, seen.target, options)
    return seen


def columns(seen: Observed, num_samples: int, chunk: int) -> Iterator[Tensor]:
    """Columns of a square root of the covariance for each of ``num_samples``, which share the columns handed out.

    Every position of a sample (a token, a pixel) has columns of its own, so there are ``outputs.numel() / num_samples``
    in all. Each tensor is of shape ``(at most chunk, *outputs.shape)``.
    """
    roots = seen.family.roots(seen)
    shape = list(seen.outputs.shape)
    if isinstance(seen.family, Categorical):
        shape[seen.family.along(seen.outputs)] = 1
    inner = math.prod(shape) // num_samples
    position = torch.arange(math.prod(shape), device=roots.device).reshape(shape) % inner
    for numbers in torch.arange(inner * len(roots), device=roots.device).split(chunk):
        chosen = (numbers // len(roots)).reshape(-1, *[1] * len(shape))
        yield roots[numbers % len(roots)] * (position == chosen)


class _Watch(TorchFunctionMode):
    """Notes calls of the known likelihoods, with their values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Family, dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FAMILIES:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.calls.append((result, FAMILIES[func], dict(bound.arguments)))
        return result


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the generator's own device: the same samples whatever the model's device.
    level = torch.rand(like.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return level.to(like.device)
