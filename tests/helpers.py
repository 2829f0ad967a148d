"""Matrices with prescribed spectra, counting matvecs, and the table of small models that tests run over."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc import tree

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(value: Any, reference: Any) -> float:
    """Distance of two pytrees over the reference's norm (absolute where the reference is zero)."""
    gap = tree.norm(tree.map_leaves(lambda a, b: a.to(F64) - b.to(F64), value, reference))
    scale = tree.norm(tree.map_leaves(lambda a: a.to(F64), reference))
    return float(gap / scale) if scale > 0 else float(gap)


def randn_like(params: Any, generator: torch.Generator, lead: tuple[int, ...] = ()) -> Any:
    """A random pytree like ``params``, with further leading axes."""
    return tree.map_leaves(
        lambda leaf: torch.randn((*lead, *leaf.shape), generator=generator, dtype=F64).to(leaf.dtype), params
    )


@contextlib.contextmanager
def world_of_one() -> Iterator[Any]:
    """Distributed torch with this process alone; yields its mesh."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=60))
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


# Matrices


def symmetric(eigenvalues: Any, *, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=F64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(seed), dtype=F64))[0]
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def variance(form: torch.Tensor, sampler: str) -> float:
    """Of ``<v, form v>`` for probes ``v`` from the sampler of that name."""
    form = (form + form.T) / 2
    if sampler == "signs":
        form = form - form.diagonal().diag()
    if sampler == "sphere":
        form = form - form.trace() / len(form) * torch.eye(len(form), dtype=F64)
    return float(2 * form.square().sum()) * (len(form) / (len(form) + 2) if sampler == "sphere" else 1)


SPECTRA: dict[str, list[float]] = {
    "distinct": [-3.0, -1.0, 0.5, 1.0, 2.0, 4.0, 7.0],
    "repeated": [2.0, 2.0, 2.0, 5.0, 5.0, -1.0],
    "negative": [-9.0, -4.0, -2.0, -1.0, -0.5],
    "rank deficient": [0.0, 0.0, 0.0, 0.0, 3.0, 8.0],
    "zero": [0.0] * 5,
    "identity": [1.0] * 5,
    "plus and minus": [-4.0, 4.0, 1.0, -1.0],
    "wide": [1e-6, 1e-3, 1.0, 1e3],
    "one by one": [-2.5],
    "one by one zero": [0.0],
}


class Counting:
    """A matvec that counts its calls."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.calls = 0

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.matrix @ v


class CountingRows:
    """An operator on flat rows that records how many rows each pass carried."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.passes: list[int] = []

        def rows(array: torch.Tensor) -> torch.Tensor:
            self.passes.append(array.shape[0])
            return array @ matrix

        self.operator = hf.Operator(matrix[0], rows)


class LargestTensor(TorchDispatchMode):
    """Records the most entries that any result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


# Models


class Case(NamedTuple):
    """A loss at a point: ``loss(params, *batch)``."""

    loss: Callable[..., torch.Tensor]
    params: Any
    batch: tuple[Any, ...]


def _module(
    model: nn.Module,
    inputs: torch.Tensor,
    criterion: Callable[..., torch.Tensor] | None = None,
    target: Any = None,
    train: bool = False,
) -> Case:
    loss, params = hf.module_loss(model.double().train(train), criterion or _smooth)
    return Case(loss, params, (inputs, target))


def _smooth(output: torch.Tensor, _target: Any) -> torch.Tensor:
    return (output**3).mean() + output.cos().mean()


def _images() -> torch.Tensor:
    return torch.randn(3, 2, 5, 5, generator=seeded(1), dtype=F64)


def _points() -> torch.Tensor:
    return torch.randn(6, 4, generator=seeded(2), dtype=F64)


def _sequences() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=seeded(3), dtype=F64)


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])


def _mlp(activation: nn.Module, width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, width))


def _regression(criterion: nn.Module) -> Case:
    target = 2 * torch.randn(6, 3, generator=seeded(4), dtype=F64)
    return _module(_mlp(nn.Tanh()), _points(), criterion, target)


def _convolutional(norm: nn.Module, activation: nn.Module, train: bool) -> Case:
    layers = [nn.Conv2d(2, 4, 3), norm, activation, nn.Conv2d(4, 3, 3, bias=False), nn.Flatten()]
    model = nn.Sequential(*layers).double()
    if not train and isinstance(norm, nn.BatchNorm2d):  # statistics of its own, not the initial 0 and 1
        with torch.no_grad():
            norm.running_mean.copy_(torch.linspace(-0.3, 0.3, 4))
            norm.running_var.copy_(torch.linspace(0.5, 1.5, 4))
    return _module(model, _images(), nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]), train)


class _Block(nn.Module):
    """A pre-norm transformer block around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class _Causal(nn.Module):
    """Causal self-attention by ``F.scaled_dot_product_attention`` with RMSNorm and a gated SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.gate = nn.Linear(4, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        left, right = self.gate(x).chunk(2, -1)
        return F.silu(left) * right


class _Recurrent(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0]


class _Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens)))).flatten(0, 1)


def _tied() -> Case:
    tokens = torch.randint(0, 6, (3, 4), generator=seeded(5))
    return _module(_Tied(), tokens, nn.CrossEntropyLoss(), tokens.roll(1).flatten())


def _nested() -> Case:
    g = seeded(6)
    params = {
        "layers": [
            {"weight": torch.randn(3, 4, generator=g, dtype=F64), "bias": torch.randn(3, generator=g, dtype=F64)},
            (torch.randn(2, 3, generator=g, dtype=F64), torch.randn((), generator=g, dtype=F64)),
        ],
        "scale": torch.randn(1, generator=g, dtype=F64),
    }

    def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
        first, (weight, shift) = params["layers"]
        hidden = torch.tanh(x @ first["weight"].T + first["bias"])
        return ((params["scale"] * hidden @ weight.T + shift) ** 4).mean()

    return Case(loss, params, (_points(),))


def _cross_entropy() -> Case:
    criterion = nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64), label_smoothing=0.1, ignore_index=2
    )
    return _module(_mlp(nn.Softplus()), _points(), criterion, CLASSES)


CASES: dict[str, Callable[[], Case]] = {
    "mlp tanh": lambda: _module(_mlp(nn.Tanh()), _points(), nn.CrossEntropyLoss(), CLASSES),
    "mlp relu": lambda: _module(_mlp(nn.ReLU()), _points(), nn.CrossEntropyLoss(), CLASSES),
    "conv batch norm eval": lambda: _convolutional(nn.BatchNorm2d(4), nn.ReLU(), train=False),
    "conv batch norm train": lambda: _convolutional(nn.BatchNorm2d(4), nn.Tanh(), train=True),
    "conv instance norm": lambda: _convolutional(nn.InstanceNorm2d(4, affine=True), nn.GELU(), train=True),
    "conv group norm": lambda: _convolutional(nn.GroupNorm(2, 4), nn.SiLU(), train=False),
    "transformer block": lambda: _module(_Block(), _sequences()),
    "causal attention": lambda: _module(_Causal(), _sequences()),
    "encoder layer eval": lambda: _module(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), _sequences()),
    "lstm": lambda: _module(_Recurrent(nn.LSTM(4, 3, batch_first=True)), _sequences()),
    "gru": lambda: _module(_Recurrent(nn.GRU(4, 3, batch_first=True)), _sequences()),
    "tied embedding": _tied,
    "nested pytree": _nested,
    "mse": lambda: _regression(nn.MSELoss()),
    "huber": lambda: _regression(nn.HuberLoss(delta=0.7)),
    "cross entropy options": _cross_entropy,
}


@cache
def case(name: str) -> Case:
    """A case of the table; modules are initialized from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name]()


@cache
def dense_hessian(name: str) -> torch.Tensor:
    """The Hessian of a case by torch's own double backward, which shares no code with hessfunc: shape (n, n).

    ``jacrev(jacrev)`` would not do: it is wrong for LayerNorm and for BatchNorm in train mode.
    """
    loss, params, batch = case(name)
    layout = tree.Layout.of(params)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda x: loss(layout.unravel(x), *batch), layout.ravel(params))
