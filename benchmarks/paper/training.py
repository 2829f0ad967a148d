"""Training with checkpoints: the same numbers under the same seed, also when it was interrupted and goes on."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images import Images, augmented
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's.

    Attributes:
        rate: initial learning rate; a tenth of it after 4/9 of the epochs, a hundredth after 2/3 (80 and 120 of 180).
        epochs: passes over the training images.
        batch_size: images for a step.
        momentum: of SGD.
        weight_decay: factor of the L2 penalty; decoupled with AdamW.
        padding: by how many pixels images are shifted at most.
        optimizer: ``"sgd"`` or ``"adamw"``.
    """

    rate: float = 0.1
    epochs: int = 180
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4
    optimizer: str = "sgd"

    def rate_in(self, epoch: int) -> float:
        """The learning rate in epoch number ``epoch``, counted from 0."""
        return self.rate * 0.1 ** ((9 * epoch >= 4 * self.epochs) + (3 * epoch >= 2 * self.epochs))


@dataclass(frozen=True)
class Epoch:
    """The mean loss over the steps of an epoch; infinite if it diverged. Epochs count from 1."""

    epoch: int
    loss: float


def checkpoint(folder: Path, epoch: int) -> Path:
    """The file of parameters and buffers after ``epoch`` epochs."""
    return folder / f"epoch-{epoch:03d}.safetensors"


def train(
    model: nn.Module, images: Images, recipe: Recipe, folder: Path, *, seed: int, keep: tuple[int, ...]
) -> list[Epoch]:
    """Train ``model`` in place and leave checkpoints after the epochs in ``keep`` (0: before training).

    Everything is written to ``folder`` after every epoch; a second call goes on from there, and returns at once if
    there is nothing left to do. A loss that is not finite ends the training: the epoch counts as diverged, with
    infinite loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = _optimizer(model, recipe)
    history = _resumed(model, optimizer, folder, recipe, seed)
    if not history:
        calibrate(model, images.train[0])
        if 0 in keep:
            save(model, checkpoint(folder, 0))
    for epoch in range(len(history), recipe.epochs):
        if history and math.isinf(history[-1].loss):
            break
        loss = _epoch(model, optimizer, images, recipe, epoch, seed)
        history.append(Epoch(epoch + 1, loss))
        if epoch + 1 in keep and math.isfinite(loss):
            save(model, checkpoint(folder, epoch + 1))
        _save_state(model, optimizer, history, folder, recipe, seed)
    return history


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of BatchNorm to those of the images, as far as the untrained weights go."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    with torch.no_grad():
        for part in images.split(512)[:4]:
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def save(model: nn.Module, path: Path) -> None:
    """Write parameters and buffers; the file is there as a whole or not at all."""
    _write(path, {name: value.contiguous() for name, value in model.state_dict().items()})


def load(model: nn.Module, path: Path) -> nn.Module:
    """Fill ``model`` from a checkpoint and put it into eval mode."""
    model.load_state_dict(load_file(path))
    return model.eval()


def _epoch(model: nn.Module, optimizer: Any, images: Images, recipe: Recipe, epoch: int, seed: int) -> float:
    # A generator of its own for every epoch: where training resumes does not matter.
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_in(epoch)
    inputs, labels = images.train
    total = torch.zeros((), device=inputs.device)
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order.split(recipe.batch_size):
        x = augmented(inputs[chosen], padding=recipe.padding, flips=images.flips, generator=generator)
        loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(chosen)
    mean = float(total) / len(labels)
    return mean if math.isfinite(mean) else math.inf


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    options = {"lr": recipe.rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), momentum=recipe.momentum, **options)


def _save_state(
    model: nn.Module, optimizer: Any, history: list[Epoch], folder: Path, recipe: Recipe, seed: int
) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{i}.{key}"] = value
    about = {"recipe": asdict(recipe), "seed": seed, "history": [asdict(epoch) for epoch in history]}
    _write(folder / "state.safetensors", tensors, {"about": json.dumps(about)})


def _resumed(model: nn.Module, optimizer: Any, folder: Path, recipe: Recipe, seed: int) -> list[Epoch]:
    path = folder / "state.safetensors"
    if not path.exists():
        return []
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    if about["recipe"] != asdict(recipe) or about["seed"] != seed:
        raise ValueError(f"{path} was trained otherwise ({about['recipe']}); choose another folder, or remove it.")
    tensors = load_file(path)
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return [Epoch(**epoch) for epoch in about["history"]]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)
