"""The demo: its data, network and training, and the whole command against exact traces."""

import sys

import numpy as np
import pytest
import torch
from helpers import seeded
from matplotlib import image
from typer.testing import CliRunner

import hessfunc as hf
from hessfunc import _demo
from hessfunc._cli import app
from hessfunc.report import load_report


def test_digits_are_split_at_random_and_standardized():
    digits = _demo.load_digits(seeded(0))
    (images, labels), (test_images, test_labels) = digits.train, digits.test
    assert images.shape == (1438, 1, 8, 8)
    assert test_images.shape == (359, 1, 8, 8)
    assert labels.shape == (1438,)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10)) == set(test_labels.tolist())
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std()) - 1) < 1e-5
    again, other = _demo.load_digits(seeded(0)), _demo.load_digits(seeded(1))
    assert torch.equal(again.train[0], images)
    assert not torch.equal(other.train[1], labels)
    assert len(_demo.load_digits(seeded(0), test_share=0.5).test[1]) == 898


def test_split_parts_are_disjoint():
    digits = _demo.load_digits(seeded(0))
    rows = torch.cat([digits.train[0], digits.test[0]]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    raw = load_digits().data
    assert len(np.unique(raw, axis=0)) == len(torch.unique(rows, dim=0))
    assert len(rows) == len(raw)


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed; run: pip install 'hessfunc\[cli\]'"):
        _demo.load_digits(seeded(0))


def test_network_has_three_residual_stages():
    for width, size in ((8, 19714), (4, 5094)):
        model = _demo.ResidualNet(width=width, generator=seeded(0))
        assert sum(p.numel() for p in model.parameters()) == size
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert _demo.ResidualNet(width=2, num_classes=4, generator=seeded(0))(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    names = dict(model.named_parameters())
    assert "stage1.shortcut.weight" not in names
    assert names["stage2.shortcut.weight"].shape == (8, 4, 1, 1)
    assert names["stage3.shortcut.weight"].shape == (16, 8, 1, 1)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 7
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


def test_block_adds_its_shortcut():
    block = _demo.ResidualNet(width=2, generator=seeded(0)).stage1.eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 2, 4, 4, generator=seeded(1))
    assert torch.equal(block(x), x.relu())


def test_network_comes_from_the_generator():
    one, same, other = (_demo.ResidualNet(width=2, generator=seeded(seed)) for seed in (0, 0, 1))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_training_history_and_learning_rate(monkeypatch):
    digits = _demo.load_digits(seeded(0))
    digits = _demo.Digits(tuple(t[:100] for t in digits.train), tuple(t[:50] for t in digits.test))
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    calls = []
    model = _demo.ResidualNet(width=2, generator=seeded(0))
    history = _demo.train(
        model, digits, epochs=5, batch_size=32, generator=seeded(1), progress=lambda *call: calls.append(call)
    )
    assert history.steps.tolist() == [4, 8, 12, 16, 20]
    assert calls == [(i, 20) for i in range(1, 21)]
    assert rates[0] == 0
    assert rates[4] == max(rates) == 0.1  # a fifth of the steps up, the rest down
    assert rates[-1] == pytest.approx(0.1 / 16)
    assert float(history.loss[-1]) < float(history.loss[0])
    assert (history.loss_stderr > 0).all()
    share = float(history.accuracy[-1])
    assert share == _demo.accuracy(model, digits.test)
    assert float(history.accuracy_stderr[-1]) == pytest.approx((share * (1 - share) / 50) ** 0.5)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    again = _demo.ResidualNet(width=2, generator=seeded(0))
    _demo.train(again, digits, epochs=5, batch_size=32, generator=seeded(1))
    assert torch.equal(again.head.weight, model.head.weight)


def test_batches_are_ragged():
    batches = _demo.in_batches((torch.arange(10.0), torch.arange(10)), 4)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(10))


def exact_traces(model, images):
    """Trace of every parameter tensor's block of the Hessian of the mean cross-entropy, without a Hessian.

    The network is piecewise linear in each tensor, so the block is its Gauss-Newton block: the mean over samples of
    ``sum_c p_c |J_c|^2 - |sum_c p_c J_c|^2`` with the Jacobian of the logits and the predicted probabilities.
    """
    call, params = hf.functionalize(model)

    def shares(image):
        logits, jacobian = call(params, image[None])[0], torch.func.jacrev(lambda p: call(p, image[None])[0])(params)
        p = logits.softmax(0)
        rows = {name: j.flatten(1) for name, j in jacobian.items()}
        return {name: (p * j.square().sum(1)).sum() - (p @ j).square().sum() for name, j in rows.items()}

    with torch.no_grad():
        each = torch.func.vmap(shares, chunk_size=100)(images)
    return {name: float(value.double().mean()) for name, value in each.items()}


def test_demo_from_end_to_end(tmp_path):
    """One run with small settings, everything about it asserted; in one test, so that it runs once."""
    folder = tmp_path / "out put"
    options = ["--width", "4", "--epochs", "6", "--k", "3", "--probes", "12", "--steps", "12", "--density-probes", "2"]
    options += ["--eigenvectors", "--surface-points", "5", "--surface-span", "0.4"]
    result = CliRunner().invoke(app, ["demo", "--out", str(folder), *options])
    assert result.exit_code == 0, result.output
    report = load_report(folder)
    generator = seeded(0)  # the command's own seed: the same network again
    digits = _demo.load_digits(generator)
    model = _demo.ResidualNet(width=4, generator=generator)
    _demo.train(model, digits, epochs=6, generator=generator)

    share = _demo.accuracy(model, digits.test)
    assert share > 0.95
    assert f"test accuracy {100 * share:.1f} %" in result.output
    assert report.settings["problem"] == {"data": "digits", "width": 4, "epochs": 6, "test_accuracy": share}
    assert report.settings["seed"] == 0
    assert report.size == 5094
    check_eigenpairs(report, model, digits)
    check_traces(report, exact_traces(model, digits.train[0]))
    check_surface(report.surface)
    check_files(folder, result)
    for text in ("Eigenvalues", "Trace by parameter tensor", "stage3.conv2.weight", f"{report.size:,} parameters"):
        assert text in result.output
    for value in report.eigenpairs.eigenvalues.tolist():
        assert f"{value:.6g}" in result.output
    for label in ("training", "eigenpairs", "trace", "density", "loss surface"):
        assert label in result.stderr  # progress bars


def check_eigenpairs(report, model, digits):
    pairs = report.eigenpairs
    assert len(pairs) == 3
    assert bool(pairs.converged.all())
    assert bool((pairs.residuals <= 1e-3 * pairs.eigenvalues.abs()).all())
    loss, params = hf.module_loss(model, torch.nn.functional.cross_entropy)
    H = hf.hessian(loss, params, _demo.in_batches(digits.train, 1024))
    products = H.matmat(pairs.eigenvectors)
    rows, images = pairs.rows(), H.layout.ravel_rows(products)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    residuals = (images - pairs.eigenvalues[:, None] * rows).norm(dim=1)
    assert bool((residuals <= 1e-3 * pairs.eigenvalues).all())
    rest = torch.randn(H.size, generator=seeded(5))
    for _ in range(4):  # power iteration on what the pairs leave over stays below them
        rest = rest - (rows @ rest) @ rows
        rest = H.vector(rest / rest.norm())
    assert float(rest.norm()) < float(pairs.eigenvalues[-1])


def check_traces(report, exact):
    total = sum(exact.values())
    assert abs(float(report.trace) - total) < 4 * float(report.trace.stderr)
    assert float(report.trace.stderr) < 0.1 * total
    scores = [(float(share) - exact[name]) / float(share.stderr) for name, share in report.trace.per_leaf.items()]
    assert max(map(abs, scores)) < 6  # 12 samples: Student's t with 11 degrees of freedom, 25 tensors
    assert sum(map(abs, scores)) / len(scores) < 1.6
    distances = (report.eigenpairs.eigenvalues.double().unsqueeze(1) - report.quadrature.exact).abs()
    assert bool((distances.amin(dim=1) <= 1e-3 * report.eigenpairs.eigenvalues).all())  # exact outliers, all three
    assert abs(float(report.quadrature.trace()) - total) < 0.5 * total


def check_surface(surface):
    assert surface.losses.shape == (5, 5)
    assert [float(c[-1]) for c in surface.coordinates] == [0.4, 0.4]
    centre = surface.losses[2, 2]
    assert float(centre) < 0.05
    assert bool((surface.losses[[0, -1]] > centre).all())


def check_files(folder, result):
    sizes = {
        "density.png": (6.4, 4.0),
        "layers.png": (7.2, 1.3 + 0.19 * 25),
        "surface.png": (9.6, 4.2),
        "training.png": (6, 3.6),
    }
    listed = {"report.json", "arrays.npz", "eigenvectors.npz", *sizes}
    assert {path.name for path in folder.iterdir()} == listed
    assert all(name in result.output for name in listed)
    for name, (width, height) in sizes.items():
        pixels = image.imread(folder / name)
        assert pixels.shape[:2] == (int(200 * height), int(200 * width))
        assert pixels[..., :3].std() > 0.05
        packed = (pixels[..., :3] * 255).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        assert len(np.unique(packed)) > 50
