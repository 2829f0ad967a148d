"""What the study measures of a network at a checkpoint, as plain numbers that go into a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from images import augmented
from torch import Tensor, nn

import hessfunc as hf
from hessfunc import tree
from hessfunc.surface import Surface, loss_surface

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Effort:
    """How much to spend on a checkpoint.

    Attributes:
        batch_size: images for which a product is made at a time.
        num_steps: Lanczos steps.
        density_probes: Lanczos runs for the spectral density.
        trace_probes: probes for the trace, which what the runs found deflates.
        tol: residual over the eigenvalue of the two eigenpairs.
        line_points: losses along the first eigenvector.
        surface_points: losses along each of the first two.
        span: how far they reach to either side.
    """

    batch_size: int
    num_steps: int
    density_probes: int
    trace_probes: int
    tol: float
    line_points: int
    surface_points: int
    span: float


def accuracy(model: nn.Module, part: Part) -> float:
    """Share of the images that the network in eval mode classifies correctly."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(part[0].split(500), part[1].split(500), strict=True)]
    return int(torch.stack(right).sum()) / len(part[1])


def spectrum(model: nn.Module, part: Part, effort: Effort, seed: int) -> tuple[dict[str, Any], hf.Eigenpairs]:
    """Largest two eigenvalues, trace, trace of each stage and spectral density of the training loss.

    The loss is the mean cross-entropy over ``part`` of the network in eval mode, without weight decay.
    """
    loss, params = hf.module_loss(model.eval(), F.cross_entropy)
    H = hf.hessian(loss, params, _batches(part, effort))
    generator = torch.Generator(part[0].device).manual_seed(seed)
    run = hf.krylov(H, num_steps=effort.num_steps, num_probes=effort.density_probes, generator=generator)
    candidates = pairs = run.candidates(2, which="LA", tol=effort.tol)
    if not bool(pairs.converged.all()) or bool(run.repeated.any()):
        pairs = hf.eigsh(H, 2, which="LA", tol=effort.tol, v0=candidates, generator=generator)
    trace = hf.hutchinson(H, num_probes=effort.trace_probes, deflate=pairs, generator=generator)
    stages = {stage: {"value": float(e), "stderr": float(e.stderr)} for stage, e in by_stage(trace).items()}
    quadrature = run.quadrature
    numbers = {
        "num_parameters": H.size,
        "num_matvecs": (0 if pairs is candidates else quadrature.num_matvecs + 2)
        + pairs.num_matvecs
        + trace.num_matvecs,
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged.tolist(),
        "support": [float(run.ritz_values[0]), max(float(run.ritz_values[-1]), float(pairs.eigenvalues[0]))],
        "trace": {"value": float(trace), "stderr": float(trace.stderr)},
        "stages": stages,
        "density": {
            "nodes": quadrature.nodes.tolist(),
            "weights": quadrature.weights.tolist(),
            "num_steps": quadrature.num_steps,
            "num_matvecs": quadrature.num_matvecs,
            "num_exact": quadrature.num_exact,
        },
    }
    return numbers, pairs


def quadrature(numbers: Mapping[str, Any]) -> hf.Quadrature:
    """The spectral density in what ``spectrum`` returned."""
    stored = dict(numbers["density"])
    nodes, weights = (torch.tensor(stored.pop(name), dtype=torch.float64) for name in ("nodes", "weights"))
    return hf.Quadrature(nodes, weights, numbers["num_parameters"], **stored)


def by_stage(trace: hf.Estimate) -> dict[str, hf.Estimate]:
    """The trace of each part of the network: what the names of its parameters begin with, up to the first dot."""
    samples = trace.leaf_samples
    columns: dict[str, list[int]] = {}
    for i, name in enumerate(trace.leaf_names):
        stage = name.split(".")[0]
        columns.setdefault("stem" if stage == "norm" else stage, []).append(i)
    return {
        stage: hf.Estimate.of(samples[:, chosen].sum(1), num_matvecs=trace.num_matvecs)
        for stage, chosen in columns.items()
    }


def surfaces(model: nn.Module, part: Part, pairs: hf.Eigenpairs, effort: Effort) -> dict[str, Any]:
    """The loss along the first eigenvector, and along the first two."""
    loss, params = hf.module_loss(model.eval(), F.cross_entropy)
    batches = _batches(part, effort)
    found = {}
    for name, count, num_points in (("line", 1, effort.line_points), ("plane", 2, effort.surface_points)):
        directions = tree.map_leaves(lambda leaf, count=count: leaf[:count], pairs.eigenvectors)
        grid = loss_surface(loss, params, directions, batches, span=effort.span, num_points=num_points)
        found[name] = {"steps": grid.coordinates[0].tolist(), "losses": grid.losses.tolist()}
    return found


def plane(numbers: Mapping[str, Any]) -> Surface:
    """The surface in what ``surfaces`` returned, without its directions."""
    steps = torch.tensor(numbers["plane"]["steps"], dtype=torch.float64)
    return Surface((steps, steps), torch.tensor(numbers["plane"]["losses"], dtype=torch.float64), {})


def minibatch_spectrum(
    model: nn.Module, part: Part, effort: Effort, *, num_batches: int, padding: int, flips: bool, seed: int
) -> dict[str, Any]:
    """The five eigenvalues of largest magnitude of each of ``num_batches`` augmented mini-batches (Park and Kim 2022).

    The L2 penalty, which would move every eigenvalue by the same amount, is left out.
    """
    loss, params = hf.module_loss(model.eval(), F.cross_entropy)
    device = part[0].device
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        chosen = torch.randint(len(part[1]), (effort.batch_size,), generator=generator).to(device)
        x = augmented(part[0][chosen], padding=padding, flips=flips, generator=generator)
        batches.append((x, part[1][chosen]))
    start = torch.Generator(device).manual_seed(seed)
    steps = max(effort.num_steps // 2, 5)
    found = hf.minibatch_eigenvalues(
        loss, params, batches, k=5, which="LM", num_steps=steps, chunk_size=4, generator=start
    )
    return {"eigenvalues": found.eigenvalues.tolist(), "residuals": found.residuals.tolist(), "num_steps": steps}


def _batches(part: Part, effort: Effort) -> list[Part]:
    return list(zip(part[0].split(effort.batch_size), part[1].split(effort.batch_size), strict=True))
