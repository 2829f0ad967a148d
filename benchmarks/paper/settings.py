"""Everything the study can be told, and its three sizes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measurement import Effort
from resnets import DEPTHS
from training import Recipe


@dataclass(frozen=True)
class Settings:
    """The full study, as in the paper; ``SMALL`` and ``SMOKE`` below replace what they make smaller.

    Attributes:
        data: name of the images.
        folder: where they are; None for where the package puts them.
        num_train: how many training images, from the first on; None for all.
        num_test: how many test images; None for all.
        shrink: images are averaged over squares of that many pixels a side.
        depths: depths of the ResNets.
        width: channels of their first stage.
        seeds: seeds of the weights and of the order of the images.
        epochs: passes over the training images.
        checkpoints: epochs after which to measure; the last is always among them.
        batch_size: images for a step of training.
        padding: by how many pixels training images are shifted at most.
        rates: initial learning rates; the best one under the first seed serves all seeds.
        measured_images: training images that the Hessian averages over, unaugmented.
        products_batch: images for which a product is made at a time.
        num_steps: Lanczos steps.
        density_probes: Lanczos runs for a spectral density.
        trace_probes: probes for a trace.
        line_points: losses along the first eigenvector.
        surface_points: losses along each of the first two.
        span: how far both reach to either side.
        vit_depth: layers of the vision transformers; 0 leaves them out.
        vit_dim: features of a token.
        vit_patch: pixels on a side of a patch.
        vit_rates: initial learning rates, for AdamW.
        minibatches: mini-batches for the spectra of largest eigenvalues, under the first seed.
        workers: processes; by default one per core, or 1 on a GPU.
        device: of the networks.
    """

    data: str = "cifar10"
    folder: Path | None = None
    num_train: int | None = None
    num_test: int | None = None
    shrink: int = 1
    depths: tuple[int, ...] = DEPTHS
    width: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 180
    checkpoints: tuple[int, ...] = (0, 1, 5, 10, 20, 40, 80, 100, 120, 150)
    batch_size: int = 128
    padding: int = 4
    rates: tuple[float, ...] = (0.1, 0.05, 0.01)
    measured_images: int = 2048
    products_batch: int = 512
    num_steps: int = 80
    density_probes: int = 10
    trace_probes: int = 64
    line_points: int = 101
    surface_points: int = 41
    span: float = 0.5
    vit_depth: int = 8
    vit_dim: int = 128
    vit_patch: int = 4
    vit_rates: tuple[float, ...] = (3e-3, 1e-3)
    minibatches: int = 100
    workers: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        if self.workers < 1:
            object.__setattr__(self, "workers", (os.cpu_count() or 1) if self.device == "cpu" else 1)

    @property
    def effort(self) -> Effort:
        """How much to spend on a checkpoint."""
        return Effort(
            batch_size=self.products_batch,
            num_steps=self.num_steps,
            density_probes=self.density_probes,
            trace_probes=self.trace_probes,
            tol=1e-2,
            line_points=self.line_points,
            surface_points=self.surface_points,
            span=self.span,
        )

    def recipe(self, rate: float, *, vit: bool) -> Recipe:
        """How to train at ``rate``."""
        shared = {"rate": rate, "epochs": self.epochs, "batch_size": self.batch_size, "padding": self.padding}
        return Recipe(**shared, optimizer="adamw", weight_decay=0.05) if vit else Recipe(**shared)

    @property
    def measured_epochs(self) -> tuple[int, ...]:
        """Epochs after which there is a measurement, the last one included."""
        return tuple(sorted({epoch for epoch in self.checkpoints if epoch < self.epochs} | {self.epochs}))

    def document(self) -> dict[str, Any]:
        """What the results depend on."""
        content = asdict(self) | {"checkpoints": self.measured_epochs}
        for name in ("folder", "workers", "device"):
            del content[name]
        return content


SMALL = {
    "data": "fashion-mnist",
    "num_train": 5000,
    "num_test": 5000,
    "shrink": 2,
    "depths": (8, 20, 32),
    "width": 8,
    "epochs": 8,
    "checkpoints": (0, 1, 2),
    "padding": 2,
    "rates": (0.1, 0.02, 0.005),
    "measured_images": 256,
    "products_batch": 128,
    "num_steps": 24,
    "density_probes": 3,
    "trace_probes": 12,
    "line_points": 41,
    "surface_points": 15,
    "vit_depth": 4,
    "vit_dim": 32,
    "vit_patch": 2,
    "minibatches": 24,
}
"""Under an hour on two cores."""

SMOKE = SMALL | {
    "data": "digits",
    "num_train": 128,
    "num_test": 64,
    "shrink": 1,
    "depths": (8, 14),
    "width": 2,
    "seeds": (0,),
    "epochs": 2,
    "checkpoints": (1,),
    "padding": 1,
    "rates": (0.02,),
    "measured_images": 32,
    "products_batch": 32,
    "num_steps": 4,
    "density_probes": 2,
    "trace_probes": 2,
    "line_points": 5,
    "surface_points": 3,
    "vit_depth": 1,
    "vit_dim": 8,
    "vit_rates": (1e-3,),
    "minibatches": 2,
}
"""Under a minute, to see whether everything runs; its numbers mean nothing."""
