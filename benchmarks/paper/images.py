"""Images for the study, read from local files: CIFAR-10, Fashion-MNIST, or scikit-learn's digits."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("cifar10", "fashion-mnist", "digits")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
WHERE = {
    "cifar10": "unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html) and pass "
    "the folder as --folder",
    "fashion-mnist": "run: apt-get install dataset-fashion-mnist, or pass as --folder a folder that holds "
    "train-images-idx3-ubyte.gz and the other three files",
    "digits": "run: pip install scikit-learn",
}


class Images(NamedTuple):
    """A training and a test set: images ``(num, channels, height, width)``, float32, and labels ``(num,)``, int64.

    Every channel has mean 0 and variance 1 over the training images. ``flips`` tells whether mirror images belong
    to the same class.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flips: bool

    def to(self, device: torch.device | str) -> Images:
        """The same on ``device``."""
        move = lambda part: (part[0].to(device), part[1].to(device))  # noqa: E731
        return self._replace(train=move(self.train), test=move(self.test))


def load(
    name: str,
    folder: Path | None = None,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    shrink: int = 1,
) -> Images:
    """The first ``num_train`` and ``num_test`` images, averaged over ``shrink`` x ``shrink`` pixels.

    Raises:
        FileNotFoundError: the files are not there; the message says where to get them and where to put them.
        ValueError: a file is damaged, or of another format.
    """
    train, test = _READERS[name](folder)
    parts = [_prepared(*part, count, shrink) for part, count in ((train, num_train), (test, num_test))]
    mean = parts[0][0].mean(dim=(0, 2, 3), keepdim=True)
    std = parts[0][0].std(dim=(0, 2, 3), keepdim=True)
    normalized = [((images - mean) / std, labels) for images, labels in parts]
    return Images(name, *normalized, flips=name != "digits")


def augmented(images: Tensor, *, padding: int, flips: bool, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to ``padding`` pixels, with zeros moving in, and mirrored half of the time."""
    num, _, height, width = images.shape
    top = torch.randint(0, 2 * padding + 1, (num, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (num, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if flips:
        mirrored = torch.rand(num, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(num).reshape(-1, 1, 1)
    index = [part.to(images.device) for part in (sample, rows.unsqueeze(2), columns.unsqueeze(1))]
    padded = F.pad(images, (padding,) * 4)
    return padded.movedim(1, 3)[index[0], index[1], index[2]].movedim(3, 1).contiguous()


def _prepared(images: np.ndarray, labels: np.ndarray, count: int | None, shrink: int) -> tuple[Tensor, Tensor]:
    if count is not None and count > len(labels):
        raise ValueError(f"{count} images were asked for, but there are {len(labels)}.")
    scaled = torch.from_numpy(images[:count].copy()).float() / 255
    if shrink > 1:
        scaled = F.avg_pool2d(scaled, shrink)
    return scaled, torch.from_numpy(labels[:count].astype(np.int64))


def _cifar10(folder: Path | None) -> Any:
    folder = Path("." if folder is None else folder)
    names = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    for inner, suffix, read in (
        ("cifar-10-batches-bin", ".bin", _cifar_binary),
        ("cifar-10-batches-py", "", _cifar_python),
    ):
        for place in (folder, folder / inner):
            if (place / f"data_batch_1{suffix}").is_file():
                return tuple(_joined([read(place / (name + suffix)) for name in part]) for part in names)
    raise FileNotFoundError(
        f"no CIFAR-10 in {folder.resolve()}: neither data_batch_1.bin nor data_batch_1; {WHERE['cifar10']}."
    )


def _cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(path, dtype=np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise ValueError(
            f"{path} has {len(raw)} bytes, no multiple of 3073: it is damaged or not CIFAR-10; get it anew."
        )
    records = raw.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing that could run code."""

    _allowed = frozenset(
        {
            *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
            *(("numpy", name) for name in ("ndarray", "dtype")),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def _cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        return content[b"data"].reshape(-1, 3, 32, 32), np.asarray(content[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not CIFAR-10 ({error}); get it anew.") from error


def _fashion_mnist(folder: Path | None) -> Any:
    folder = Path(folder or FASHION_MNIST_FOLDER)
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        raise FileNotFoundError(f"no Fashion-MNIST in {folder.resolve()}; {WHERE['fashion-mnist']}.")
    parts = []
    for prefix in ("train", "t10k"):
        images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        if len(images) != len(labels):
            raise ValueError(f"{folder} has {len(images)} {prefix} images and {len(labels)} labels; get it anew.")
        parts.append((images[:, None], labels))
    return tuple(parts)


def _idx(path: Path, *, dimensions: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: magic number 0x000008dd, sizes as big-endian int32, data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it anew.") from error
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">i4")) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != np.prod(shape):
        raise ValueError(f"{path} is damaged or no IDX file of {dimensions} dimensions; get it anew.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _digits(folder: Path | None) -> Any:
    if folder is not None:
        raise ValueError(f"--folder is {folder}, but the digits come with scikit-learn; leave it out.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileNotFoundError(f"no digits: {WHERE['digits']}.") from error
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    images = (source.images[order, None] * (255 / 16)).astype(np.float32)
    labels = source.target[order]
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


_READERS: dict[str, Callable[[Path | None], Any]] = {
    "cifar10": _cifar10,
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
}
