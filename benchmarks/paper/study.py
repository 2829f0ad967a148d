"""The networks of the study and the work on each: training at every rate, then measurements. Resumes file by file."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measurement
import torch
import training
from files import read_json, write_json
from images import Images, load
from resnets import EVERYWHERE, STAGES, ResNet
from settings import Settings
from torch import nn
from tqdm import tqdm
from vit import NORMS, ViT

import hessfunc as hf


@dataclass(frozen=True)
class Variant:
    """A network: a ResNet with things taken out, or a vision transformer.

    Attributes:
        key: ``"resnet"``, ``"no-norm"``, ``"no-residual"``, ``"no-norm-3"`` (from stage 3 alone) and so on,
            ``"vit-pre"``, ``"vit-post"``, ``"vit-none"``.
        depth: layers.
    """

    key: str
    depth: int

    @property
    def staged(self) -> bool:
        """Whether something is taken out of a single stage."""
        return self.key[-1].isdigit()

    @property
    def is_vit(self) -> bool:
        """Whether it is a vision transformer."""
        return self.key.startswith("vit")

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        names = {"resnet": "ResNet", "no-norm": "no BN", "no-residual": "no residual"}
        if self.is_vit:
            return {"pre": "pre-norm", "post": "post-norm", "none": "no norm"}[self.key[4:]]
        return f"{names[self.key[:-2]]} in stage {self.key[-1]}" if self.staged else names[self.key]

    def build(self, images: Images, settings: Settings, seed: int) -> nn.Module:
        """The untrained network, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        _, channels, size, _ = images.train[0].shape
        num_classes = int(images.train[1].max()) + 1
        if self.is_vit:
            options = {"depth": self.depth, "dim": settings.vit_dim, "patch": settings.vit_patch, "norm": self.key[4:]}
            return ViT(size=size, channels=channels, num_classes=num_classes, generator=generator, **options)
        gone = (int(self.key[-1]),) if self.staged else EVERYWHERE
        norm = tuple(s for s in EVERYWHERE if s not in gone) if "norm" in self.key else EVERYWHERE
        residual = tuple(s for s in STAGES if s not in gone) if "residual" in self.key else STAGES
        return ResNet(
            self.depth,
            width=settings.width,
            channels=channels,
            num_classes=num_classes,
            norm=norm,
            residual=residual,
            generator=generator,
        )


def variants(settings: Settings) -> list[Variant]:
    """All networks, the dearest first, so that no core idles at the end."""
    wholes = ("resnet", "no-norm", "no-residual")
    staged = tuple(f"{key}-{stage}" for key in wholes[1:] for stage in STAGES)
    found = [Variant(key, depth) for depth in sorted(settings.depths, reverse=True) for key in wholes + staged]
    if settings.vit_depth:
        found += [Variant(f"vit-{norm}", settings.vit_depth) for norm in NORMS]
    return found


@dataclass(frozen=True)
class Task:
    """A network under a seed, and where its files are."""

    variant: Variant
    seed: int
    settings: Settings
    out: Path

    def folder(self, rate: float) -> Path:
        """Where the training at ``rate`` leaves its files."""
        return self.out / "runs" / f"{self.variant.key}-{self.variant.depth}" / f"seed-{self.seed}" / f"rate-{rate:g}"

    @property
    def keep(self) -> tuple[int, ...]:
        """Epochs after which there is a measurement."""
        return (self.settings.epochs,) if self.variant.staged else self.settings.measured_epochs

    @property
    def rates(self) -> tuple[float, ...]:
        """Initial learning rates to try."""
        return self.settings.vit_rates if self.variant.is_vit else self.settings.rates

    def train(self, rate: float) -> list[training.Epoch]:
        """Train at ``rate``, or return at once if that is done."""
        images = _images(self.settings)
        model = self.variant.build(images, self.settings, self.seed).to(self.settings.device)
        recipe = self.settings.recipe(rate, vit=self.variant.is_vit)
        return training.train(model, images, recipe, self.folder(rate), seed=self.seed, keep=self.keep)

    def measure(self, rate: float) -> None:
        """Measure every checkpoint that has not been measured."""
        images = _images(self.settings)
        count = self.settings.measured_images
        part = images.train[0][:count], images.train[1][:count]
        model = self.variant.build(images, self.settings, self.seed).to(self.settings.device)
        folder = self.folder(rate)
        for epoch in self.keep:
            source, target = training.checkpoint(folder, epoch), folder / f"epoch-{epoch:03d}.json"
            if target.exists() or not source.exists():
                continue
            busy = time.process_time()
            training.load(model, source)
            effort = self.settings.effort
            right = {name: measurement.accuracy(model, getattr(images, name)) for name in ("train", "test")}
            try:
                spectrum, pairs = measurement.spectrum(model, part, effort, self.seed)
            except hf.NonFiniteError as error:
                write_json(target, {"accuracy": right, "failed": str(error), "cpu_seconds": time.process_time() - busy})
                continue
            numbers: dict[str, Any] = {"accuracy": right, **spectrum}
            if epoch == self.settings.epochs and not self.variant.staged:
                numbers["surfaces"] = measurement.surfaces(model, part, pairs, effort)
                if self.variant.is_vit and self.seed == self.settings.seeds[0]:
                    options = {"num_batches": self.settings.minibatches, "padding": self.settings.padding}
                    numbers["minibatch"] = measurement.minibatch_spectrum(
                        model, images.train, effort, flips=images.flips, seed=self.seed, **options
                    )
            write_json(target, {**numbers, "cpu_seconds": time.process_time() - busy})


def run(settings: Settings, out: Path, *, quiet: bool = False) -> None:
    """Train and measure everything that is not there yet."""
    _claim(settings, out)
    _images(settings)  # a missing file is told before anything starts
    tasks = [Task(variant, seed, settings, out) for variant in variants(settings) for seed in settings.seeds]
    first = [task for task in tasks if task.seed == settings.seeds[0]]
    searches = [(task, rate) for task in first for rate in task.rates]
    with _pool(settings) as pool:
        _each(pool, [(_train, task, rate) for task, rate in searches], "learning rates", quiet)
        rates = {variant: best_rate(settings, out, variant) for variant in variants(settings)}
        _each(pool, [(_finish, task, rates[task.variant]) for task in tasks], "networks", quiet)


def best_rate(settings: Settings, out: Path, variant: Variant) -> float:
    """The rate with the smallest training loss in the last epoch, under the first seed; the same for all seeds."""
    task = Task(variant, settings.seeds[0], settings, out)
    histories = {rate: read_json(task.folder(rate) / "history.json") for rate in task.rates}
    return min(task.rates, key=lambda rate: _number(histories[rate]["epochs"][-1]["loss"]))


def results(settings: Settings, out: Path) -> Iterator[dict[str, Any]]:
    """One record for each network and seed: its history, and its measurements by epoch."""
    for variant in variants(settings):
        rate = best_rate(settings, out, variant)
        for seed in settings.seeds:
            task = Task(variant, seed, settings, out)
            folder = task.folder(rate)
            measured = {epoch: folder / f"epoch-{epoch:03d}.json" for epoch in task.keep}
            yield {
                "variant": variant.key,
                "label": variant.label,
                "depth": variant.depth,
                "seed": seed,
                "rate": rate,
                "epochs": read_json(folder / "history.json")["epochs"],
                "measured": {str(epoch): read_json(path) for epoch, path in measured.items() if path.exists()},
            }


def spent(settings: Settings, out: Path) -> dict[str, float]:
    """Processor time of everything in ``out``, the search for rates included, in minutes."""
    training_seconds = measuring_seconds = 0.0
    for variant in variants(settings):
        for seed in settings.seeds:
            task = Task(variant, seed, settings, out)
            for rate in task.rates:
                folder = task.folder(rate)
                if (folder / "history.json").exists():
                    training_seconds += read_json(folder / "history.json")["cpu_seconds"]
                measuring_seconds += sum(read_json(path)["cpu_seconds"] for path in folder.glob("epoch-*.json"))
    return {
        "training_cpu_minutes": training_seconds / 60,
        "cpu_minutes": (training_seconds + measuring_seconds) / 60,
    }


def _train(task: Task, rate: float) -> None:
    started, busy = time.perf_counter(), time.process_time()
    folder = task.folder(rate)
    if (folder / "history.json").exists():
        return
    history = task.train(rate)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    write_json(folder / "history.json", {"epochs": [vars(epoch) for epoch in history], **spent})


def _finish(task: Task, rate: float) -> None:
    _train(task, rate)
    task.measure(rate)


def _each(
    pool: ProcessPoolExecutor, calls: list[tuple[Callable[..., None], Task, float]], title: str, quiet: bool
) -> None:
    waiting = [pool.submit(*call) for call in calls]
    try:
        for done in tqdm(as_completed(waiting), total=len(waiting), desc=title, disable=quiet, file=sys.stderr):
            done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _pool(settings: Settings) -> ProcessPoolExecutor:
    # One network per process and thread: small networks leave cores idle that work on one together.
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    return ProcessPoolExecutor(
        settings.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )


def _claim(settings: Settings, out: Path) -> None:
    """Make the folder this study's, or see that it is already. Seeds and depths may come and go."""
    out.mkdir(parents=True, exist_ok=True)
    path, mine = out / "settings.json", json.loads(json.dumps(settings.document()))
    del mine["seeds"], mine["depths"]
    if not path.exists():
        write_json(path, mine)
    theirs = read_json(path)
    if different := sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)):
        raise ValueError(
            f"{out} has a study with other settings ({', '.join(different)} differ); choose another --out or remove it."
        )


@functools.cache
def _images(settings: Settings) -> Images:
    options = {"num_train": settings.num_train, "num_test": settings.num_test, "shrink": settings.shrink}
    return load(settings.data, settings.folder, **options).to(settings.device)


def _number(value: float | None) -> float:
    return math.inf if value is None else value
