"""Models and data of the benchmarks: plain torch, fixed seeds, one constructor per name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessfunc as hf

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model in eval mode with its loss as a pure function, and batches of one shape.

    ``model`` and ``criterion`` are for the peers, which take modules; ``loss`` and ``params`` are the same thing for
    everyone else.
    """

    name: str
    model: nn.Module
    criterion: nn.Module
    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    batches: list[Batch]

    @property
    def batch(self) -> Batch:
        """The first batch, for benchmarks on a single one."""
        return self.batches[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return hf.tree.size(self.params)

    def gradient(self) -> list[Tensor]:
        """The unit of all costs: loss and gradient of one batch on torch's own tape, as training computes them."""
        value = self.criterion(self.model(self.batch[0]), self.batch[1])
        return list(torch.autograd.grad(value, list(self.model.parameters())))


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, projected where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, width_in, h, w)`` to ``(batch, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth ``6 n + 2`` (He et al. 2016) with projections; n = 3 has 272,474 parameters."""

    def __init__(self, n: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for i in range(n):
                blocks.append(Block(channels, width * 2**stage, 2 if stage and not i else 1))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, 3, h, w)`` to logits ``(batch, classes)``."""
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))


class Layer(nn.Module):
    """Pre-norm transformer layer: causal self-attention and a GELU feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, time, width)`` to the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only transformer over bytes; the defaults have 875,264 parameters."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, vocab: int = 256, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(batch, time)`` to logits ``(batch, vocab, time)``, the layout that cross-entropy takes."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x))).transpose(1, 2)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _classes(shape: tuple[int, ...], *, generator: torch.Generator) -> Callable[[int], Batch]:
    """Ten classes, each a pattern with noise on top and one label in ten wrong: learnable, not separable."""
    patterns = torch.randn(10, *shape, generator=generator)
    if len(shape) == 3:  # images vary slowly over space
        patterns = F.interpolate(patterns[:, :, :4, :4], size=shape[1:], mode="bilinear", align_corners=False) * 1.5

    def sample(num: int) -> Batch:
        labels = torch.randint(0, 10, (num,), generator=generator)
        inputs = patterns[labels] + torch.randn(num, *shape, generator=generator)
        flipped = torch.rand(num, generator=generator) < 0.1
        return inputs, torch.where(flipped, torch.randint(0, 10, (num,), generator=generator), labels)

    return sample


def _text(context: int, vocab: int, *, generator: torch.Generator) -> Callable[[int], Batch]:
    """A Markov chain over bytes in which each has a few likely successors; the target is the next byte."""
    transition = torch.softmax(3.0 * torch.randn(vocab, vocab, generator=generator), dim=1)

    def sample(num: int) -> Batch:
        tokens = [torch.randint(0, vocab, (num,), generator=generator)]
        for _ in range(context):
            tokens.append(torch.multinomial(transition[tokens[-1]], 1, generator=generator)[:, 0])
        text = torch.stack(tokens, dim=1)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return sample


@dataclass(frozen=True)
class _Recipe:
    model: Callable[[], nn.Module]
    data: Callable[..., Callable[[int], Batch]]
    batch_size: int
    quick_batch_size: int
    learning_rate: float


_RECIPES = {
    "mlp-9k": _Recipe(
        lambda: _mlp(64, 64, 64, 10), lambda generator: _classes((64,), generator=generator), 128, 128, 1e-3
    ),
    "mlp-670k": _Recipe(
        lambda: _mlp(784, 512, 512, 10), lambda generator: _classes((784,), generator=generator), 128, 16, 1e-3
    ),
    "resnet-20": _Recipe(ResNet, lambda generator: _classes((3, 32, 32), generator=generator), 64, 2, 3e-3),
    "gpt": _Recipe(GPT, lambda generator: _text(128, 256, generator=generator), 8, 1, 1e-3),
}

NAMES = tuple(_RECIPES)


def build(
    name: str,
    *,
    num_batches: int = 1,
    train_steps: int = 0,
    quick: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """The problem of that name: the same model and batches for the same arguments.

    ``train_steps`` of Adam on fresh batches give the spectrum the outliers that a trained network has. BatchNorm gets
    running statistics in either case. ``quick`` takes a small batch, for a run that only looks for breakage.
    """
    return _build(name, _RECIPES[name], num_batches, train_steps, quick, dtype, device, seed)


def _build(
    name: str,
    recipe: _Recipe,
    num_batches: int,
    train_steps: int,
    quick: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # module constructors draw from the global generator
        model = recipe.model().to(device)
    sample = recipe.data(generator=generator)
    size = recipe.quick_batch_size if quick else recipe.batch_size

    def batch(num: int) -> Batch:
        inputs, targets = sample(num)
        return inputs.to(device), targets.to(device)

    criterion = nn.CrossEntropyLoss()
    _train(model, criterion, [batch(max(size, 8)) for _ in range(max(train_steps, 2))], train_steps, recipe)
    model = model.to(dtype).eval()
    batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in (batch(size) for _ in range(num_batches))]
    loss, params = hf.module_loss(model, criterion)
    return Problem(name, model, criterion, loss, params, batches)


def mlp_of_size(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Problem:
    """An MLP with two hidden layers of one width, about ``size`` parameters, and one batch of 32."""
    width = round(-38 + (38**2 - 10 + size) ** 0.5)  # width^2 + (64 + 10 + 2) width + 10 parameters
    recipe = _Recipe(lambda: _mlp(64, width, width, 10), _RECIPES["mlp-9k"].data, 32, 32, 1e-3)
    return _build(f"mlp of {size}", recipe, 1, 0, False, dtype, device, 0)


def in_float64(problem: Problem) -> Problem:
    """The same network on the same batches, in float64: the reference for everyone's answers."""
    model = copy.deepcopy(problem.model).double()
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in problem.batches]
    loss, params = hf.module_loss(model, problem.criterion)
    return Problem(problem.name, model, problem.criterion, loss, params, batches)


def _train(model: nn.Module, criterion: nn.Module, batches: list[Batch], steps: int, recipe: _Recipe) -> None:
    model.train()
    if not steps:
        for inputs, _ in batches:
            model(inputs)
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    for inputs, targets in batches:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
