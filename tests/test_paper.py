"""The PyHessian study: its networks, its data, that it resumes, what its statistics say, and a run of it all."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded

import hessfunc as hf

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"
MODULES = ("claims", "images", "measurement", "records", "resnets", "settings", "study", "training", "vit")

pytest.importorskip("safetensors")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The study's modules, found as its program finds them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# 272,474 is the published count at depth 20 with projections; each further block of a stage with c channels has
# 2 * 9 c^2 weights in convolutions and 4 c in BatchNorm.
@pytest.mark.parametrize("depth", [20, 32, 38, 44, 56])
def test_resnets_have_the_published_number_of_parameters(paper, depth):
    further = (depth - 20) // 6 * sum(18 * c * c + 4 * c for c in (16, 32, 64))
    assert count(paper.resnets.ResNet(depth, generator=seeded())) == 272_474 + further


def test_what_is_taken_out_is_gone_from_that_stage_alone(paper):
    build = lambda **options: paper.resnets.ResNet(20, width=4, generator=seeded(), **options)  # noqa: E731
    names = lambda model: {name for name, _ in model.named_parameters()}  # noqa: E731
    whole = names(build())
    no_norm = build(norm=(0, 1, 3))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in no_norm.stage2.modules())
    assert {name for name in whole ^ names(no_norm) if not name.startswith("stage2.")} == set()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in build(norm=()).modules())
    # No unused projection stays behind, and a stage without shortcuts really has none.
    no_residual = build(residual=(1, 2))
    assert whole - names(no_residual) == {name for name in whole if name.startswith("stage3.0.shortcut")}
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    bare = build(residual=()).eval()
    for block in bare.stage1:
        torch.nn.init.zeros_(block.conv2.weight)
    assert not torch.equal(build().eval()(x[:1]), build().eval()(x[1:]))
    torch.testing.assert_close(bare(x[:1]), bare(x[1:]))


def test_depth_must_be_6n_plus_2(paper):
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        paper.resnets.ResNet(18, generator=seeded())


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_transformer_has_its_norms_where_it_says(paper, norm):
    model = paper.vit.ViT(size=4, dim=8, depth=2, heads=2, norm=norm, generator=seeded())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == {"pre": 5, "post": 4, "none": 0}[norm]
    tokens = 7 * torch.randn(3, 4, 8, generator=seeded())
    spread = model.layers[0](tokens).std(dim=-1, unbiased=False)
    assert torch.allclose(spread, torch.ones(3, 4), atol=1e-3) == (norm == "post")
    with pytest.raises(ValueError, match="patches of 3"):
        paper.vit.ViT(size=4, patch=3, generator=seeded())


@pytest.fixture
def cifar() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, (6, 4))


def test_cifar_is_read_alike_from_both_published_formats(paper, cifar, tmp_path):
    images, labels = cifar
    binary, python = tmp_path / "a b" / "cifar-10-batches-bin", tmp_path / "ü"
    for folder in (binary, python):
        folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows = np.concatenate([labels[i][:, None].astype(np.uint8), images[i].reshape(4, -1)], axis=1)
        rows.tofile(binary / f"{name}.bin")
        content = {b"data": images[i].reshape(4, -1), b"labels": labels[i].tolist()}
        (python / name).write_bytes(pickle.dumps(content, protocol=2))
    one, two = paper.images.load("cifar10", tmp_path / "a b"), paper.images.load("cifar10", python)
    assert one.train[0].shape == (20, 3, 32, 32)
    assert one.test[1].tolist() == labels[5].tolist()
    torch.testing.assert_close(one.train, two.train, rtol=0, atol=0)
    torch.testing.assert_close(one.test, two.test, rtol=0, atol=0)
    torch.testing.assert_close(one.train[0].mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.train[0].std(dim=(0, 2, 3)), torch.ones(3))


def test_a_pickle_that_would_run_code_is_refused(paper, tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="damaged or not CIFAR-10"):
        paper.images.load("cifar10", tmp_path)
    assert not (tmp_path / "touched").exists()


def write_idx(folder: Path, prefix: str, num: int) -> None:
    rng = np.random.default_rng(num)
    for kind, shape in (("images-idx3", (num, 28, 28)), ("labels-idx1", (num,))):
        head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        data = rng.integers(0, 10, shape, dtype=np.uint8).tobytes()
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + data))


def test_fashion_mnist_is_read_shrunk_and_checked(paper, tmp_path):
    write_idx(tmp_path, "train", 12)
    write_idx(tmp_path, "t10k", 5)
    found = paper.images.load("fashion-mnist", tmp_path, num_train=8, shrink=2)
    assert found.train[0].shape == (8, 1, 14, 14)
    assert found.test[0].shape == (5, 1, 14, 14)
    with pytest.raises(ValueError, match="13 images were asked for, but there are 12"):
        paper.images.load("fashion-mnist", tmp_path, num_train=13)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    for damaged in (path.read_bytes()[:-20], b"no gzip", gzip.compress(content[:-1]), gzip.compress(b"\0\0\x08")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            paper.images.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"), [("cifar10", "cifar-10-binary.tar.gz"), ("fashion-mnist", "apt-get install")]
)
def test_missing_images_say_where_to_get_them(paper, tmp_path, name, remedy):
    with pytest.raises(FileNotFoundError, match=remedy):
        paper.images.load(name, tmp_path)


def test_augmentation_shifts_and_mirrors(paper):
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(400, 1, 3, 3)
    out = paper.images.augmented(image, padding=1, flips=True, generator=seeded())
    padded = F.pad(image[:1], (1, 1, 1, 1))[0, 0]
    crops = [padded[i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
    allowed = {tuple(part.flatten().tolist()) for crop in crops for part in (crop, crop.flip(1))}
    assert {tuple(row) for row in out.flatten(1).tolist()} == allowed
    still = paper.images.augmented(image, padding=0, flips=False, generator=seeded())
    assert torch.equal(still, image)


@pytest.fixture
def toy(paper):
    x, y = torch.randn(40, 1, 8, 8, generator=seeded()), torch.arange(40) % 4
    return paper.images.Images("toy", (x[:32], y[:32]), (x[32:], y[32:]), flips=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_that_was_interrupted_ends_in_the_same_weights(paper, toy, tmp_path, optimizer, monkeypatch):
    recipe = paper.training.Recipe(rate=0.01, epochs=4, batch_size=8, padding=1, optimizer=optimizer)
    build = lambda: paper.resnets.ResNet(8, width=2, channels=1, num_classes=4, generator=seeded())  # noqa: E731
    models = [build(), build(), build()]
    whole = paper.training.train(models[0], toy, recipe, tmp_path / "whole", seed=3, keep=(0, 4))
    original = paper.training._epoch

    def interrupted(*arguments):
        if arguments[4] == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(paper.training, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        paper.training.train(models[1], toy, recipe, tmp_path / "parts", seed=3, keep=(0, 4))
    monkeypatch.undo()
    resumed = paper.training.train(models[2], toy, recipe, tmp_path / "parts", seed=3, keep=(0, 4))
    assert resumed == whole
    assert len({epoch.loss for epoch in whole}) == 4
    torch.testing.assert_close(models[2].state_dict(), models[0].state_dict(), rtol=0, atol=0)
    for epoch in (0, 4):
        files = [paper.training.checkpoint(tmp_path / name, epoch).read_bytes() for name in ("whole", "parts")]
        assert files[0] == files[1]
    with pytest.raises(ValueError, match="was trained otherwise"):
        paper.training.train(build(), toy, recipe, tmp_path / "parts", seed=4, keep=())


def test_training_that_diverges_stops_and_says_so(paper, toy, tmp_path):
    recipe = paper.training.Recipe(rate=1e20, epochs=5, batch_size=8, padding=1)
    model = paper.resnets.ResNet(8, width=2, channels=1, num_classes=4, norm=(), generator=seeded())
    history = paper.training.train(model, toy, recipe, tmp_path, seed=0, keep=(5,))
    assert math.isinf(history[-1].loss)
    assert len(history) < 5
    assert not paper.training.checkpoint(tmp_path, 5).exists()


def test_the_recipe_is_the_papers(paper):
    recipe = paper.training.Recipe()
    rates = [recipe.rate_in(epoch) for epoch in (0, 79, 80, 119, 120, 179)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_measurements_agree_with_the_dense_hessian(paper, toy):
    model = paper.resnets.ResNet(8, width=2, channels=1, num_classes=4, generator=seeded()).double().eval()
    part = toy.train[0][:16].double(), toy.train[1][:16]
    effort = paper.measurement.Effort(
        batch_size=8,
        num_steps=30,
        density_probes=2,
        trace_probes=40,
        tol=1e-4,
        line_points=5,
        surface_points=3,
        span=0.1,
    )
    numbers, pairs = paper.measurement.spectrum(model, part, effort, 0)
    loss, params = hf.module_loss(model, F.cross_entropy)
    H = hf.hessian(loss, params, part)
    dense = H.dense()
    exact = torch.linalg.eigvalsh(dense)
    assert numbers["eigenvalues"] == pytest.approx(exact[-2:].flip(0).tolist(), rel=1e-6)
    assert abs(numbers["trace"]["value"] - float(dense.trace())) < 4 * numbers["trace"]["stderr"]
    shares = dict.fromkeys(numbers["stages"], 0.0)
    diagonal = H.layout.unravel(dense.diagonal())
    for name, leaf in diagonal.items():
        first = name.split(".")[0]
        shares["stem" if first == "norm" else first] += float(leaf.sum())
    assert list(shares) == ["stem", "stage1", "stage2", "stage3", "head"]
    for stage, share in shares.items():
        assert abs(numbers["stages"][stage]["value"] - share) < 4 * numbers["stages"][stage]["stderr"]
    assert sum(stage["value"] for stage in numbers["stages"].values()) == pytest.approx(numbers["trace"]["value"])
    restored = paper.measurement.quadrature(json.loads(json.dumps(numbers)))
    assert restored.wasserstein(exact) < 0.01 * float(exact[-1] - exact[0])
    grids = paper.measurement.surfaces(model, part, pairs, effort)
    assert grids["plane"]["losses"][1][1] == pytest.approx(float(loss(params, *part)))
    assert grids["line"]["losses"][2] == grids["plane"]["losses"][1][1]


def record(variant: str, depth: int, seed: int, *, trace: float, accuracy: float) -> dict:
    measured = {
        "trace": {"value": trace},
        "eigenvalues": [trace / 4, trace / 8],
        "support": [-trace / 40, trace / 4],
        "accuracy": {"train": accuracy, "test": accuracy},
        "surfaces": {"plane": {"losses": [[trace, trace, trace], [trace, 0.0, trace], [trace, trace, trace]]}},
    }
    early = measured | {"support": [0.0, trace / 50 if variant == "no-norm" else trace / 4]}
    key = {"variant": variant, "label": variant, "depth": depth, "seed": seed, "rate": 0.1}
    return key | {"measured": {"1": early, "9": measured}}


def made_up(paper, *, flip: bool = False) -> object:
    """A study in which every claim is true, or with ``flip`` in which networks without BatchNorm are the flattest."""
    rng = np.random.default_rng(0)
    found = []
    for depth, growth in ((8, 1.0), (20, 1.5), (32, 4.0)):
        traces = {"resnet": 100.0, "no-norm": 400.0 if depth > 20 else 50.0, "no-residual": 200.0 * growth}
        traces |= {f"no-norm-{stage}": 100.0 + 30 * stage**2 for stage in (1, 2, 3)}
        traces |= {f"no-residual-{stage}": 101.0 + stage for stage in (1, 2, 3)}
        if flip:
            traces["no-norm"] = 10.0
        for variant, trace in traces.items():
            cost = {"no-norm": 0.2, "no-residual": 0.1}.get(variant, 1e-4 * (trace - 100))
            for seed in range(3):
                noise = rng.normal(size=2)
                values = {"trace": trace * math.exp(0.01 * noise[0]), "accuracy": 0.9 - cost + 1e-4 * noise[1]}
                found.append(record(variant, depth, seed, **values))
    return paper.records.Table(found, 9)


def test_claims_that_hold_are_found_to_hold_and_others_not(paper):
    held = {row.claim: row.verdict for row in paper.claims.rows(made_up(paper))}
    assert len(held) == 16
    assert set(held.values()) == {"holds"}
    flipped = {row.claim: row.verdict for row in paper.claims.rows(made_up(paper, flip=True))}
    changed = [claim for claim in held if flipped[claim] != held[claim]]
    assert len(changed) == 2
    for claim in changed:
        assert "BatchNorm" in claim
        assert flipped[claim] == "contradicted"


def test_networks_that_diverged_leave_claims_undecided(paper):
    table = made_up(paper)
    for seed in range(3):
        table.record("no-norm", 32, seed)["measured"].clear()
    (row,) = (row for row in paper.claims.rows(table) if row.claim.startswith("Removing BatchNorm lowers"))
    assert row.measured[2][1:] == ("not measured: training diverged", "undecided")
    assert row.verdict == "undecided"


def test_an_interval_covers_as_often_as_it_says(paper):
    rng = np.random.default_rng(0)
    intervals = [paper.records.Interval.of(rng.normal(1.0, 2.0, size=3)) for _ in range(2000)]
    covered = np.mean([interval.low < 1.0 < interval.high for interval in intervals])
    assert 0.935 < covered < 0.965
    wrong = np.mean([interval.verdict(below=1.0) == "contradicted" for interval in intervals])
    assert 0.015 < wrong < 0.035
    assert paper.records.Interval.of([1.0]).verdict(above=0.0) == "undecided"


def test_the_whole_study_small_enough_for_a_test(tmp_path):
    out = tmp_path / "a study"
    command = [
        sys.executable,
        str(FOLDER),
        "--smoke",
        "--quiet",
        "--device",
        "cpu",
        "--workers",
        "2",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True)
    page = (out / "index.html").read_text(encoding="utf-8")
    pictures = list(out.glob("*.png"))
    assert len(pictures) == 12
    assert page.count("data:image/png;base64,") == 12
    assert "http" not in page.replace("http-equiv", "")
    results = json.loads((out / "results.json").read_text())
    networks = results["networks"]
    assert results["spent"]["cpu_minutes"] > results["spent"]["training_cpu_minutes"] > 0
    assert len(networks) == 2 * 9 + 3
    for network in networks:
        last = network["measured"]["2"]
        assert last["trace"]["stderr"] > 0
        assert last["num_matvecs"] > 0
        assert ("minibatch" in last) == network["variant"].startswith("vit")
    # A second start finds everything done, and another size does not mix with it.
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    subprocess.run(command, check=True)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    refused = subprocess.run([*command, "--width", "3"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "other settings (width differ)" in refused.stderr
