"""The demo's problem: a small residual convolutional network on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hessfunc._typing import Tensor

Batches = list[tuple[Tensor, Tensor]]


class Digits(NamedTuple):
    """Images of shape ``(num, 1, 8, 8)`` with mean 0 and variance 1 over the training part, and labels 0 to 9."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class History(NamedTuple):
    """What training measured after every epoch, as tensors of shape ``(epochs,)``.

    Attributes:
        steps: optimizer steps so far.
        loss: mean training loss over the epoch's mini-batches.
        loss_stderr: its standard error over the mini-batches.
        accuracy: share of the test images that are classified correctly.
        accuracy_stderr: binomial standard error of ``accuracy``.
    """

    steps: Tensor
    loss: Tensor
    loss_stderr: Tensor
    accuracy: Tensor
    accuracy_stderr: Tensor


def load_digits(generator: torch.Generator, *, test_share: float = 0.2) -> Digits:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn, split at random.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError(
            "the demo's data comes with scikit-learn, which is not installed; run: pip install 'hessfunc[cli]'"
        ) from error
    source = bundled()
    images = torch.from_numpy(source.images).float().unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    held_out = round(test_share * len(labels))
    test, train = order[:held_out], order[held_out:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits((images[train], labels[train]), (images[test], labels[test]))


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut (He et al. 2016), a projection where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Same number of axes out as in."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A residual network of three stages for small grey images; stage s has ``width * 2**s`` channels.

    Its weights come from ``generator`` alone. 19,714 parameters at width 8, 5,094 at width 4.
    """

    def __init__(self, *, width: int = 8, num_classes: int = 10, generator: torch.Generator) -> None:
        super().__init__()
        with torch.device("meta"):  # shapes without drawing weights from torch's global generator
            self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(width)
            self.stage1 = Block(width, width, 1)
            self.stage2 = Block(width, 2 * width, 2)
            self.stage3 = Block(2 * width, 4 * width, 2)
            self.head = nn.Linear(4 * width, num_classes)
        self.to_empty(device="cpu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape ``(num, 1, height, width)`` to logits of shape ``(num, num_classes)``."""
        hidden = F.relu(self.norm(self.stem(x)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        return self.head(hidden.mean(dim=(2, 3)))


def train(
    model: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Train ``model`` in place by SGD with momentum and a one-cycle learning rate; leave it in eval mode.

    ``progress(done, total)`` is called after every step.
    """
    images, labels = digits.train
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    per_epoch = -(-len(labels) // batch_size)
    total = epochs * per_epoch
    rows = []
    done = 0
    for _ in range(epochs):
        model.train()
        losses = []
        for chosen in torch.randperm(len(labels), generator=generator, device="cpu").split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _one_cycle(done / total)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            done += 1
            if progress is not None:
                progress(done, total)
        model.eval()
        over_batches = torch.stack(losses)
        right = accuracy(model, digits.test)
        rows.append(
            (
                done,
                float(over_batches.mean()),
                float(over_batches.std()) / len(losses) ** 0.5,
                right,
                (right * (1 - right) / len(digits.test[1])) ** 0.5,
            )
        )
    model.zero_grad(set_to_none=True)
    return History(*torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1))


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of the images that ``model`` classifies correctly in the mode it is in."""
    images, labels = part
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def in_batches(part: tuple[Tensor, Tensor], batch_size: int) -> Batches:
    """A fixed list of batches, the last one ragged."""
    images, labels = part
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def _one_cycle(share: float, *, peak: float = 0.2) -> float:
    """Learning rate as a share of its maximum: up in a line until ``peak``, then down in a line to 0."""
    return share / peak if share < peak else (1 - share) / (1 - peak)
