"""Convolutions on images in channels_last: the same product, whatever images come in, and nothing else is turned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import F64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc._linearize import Linearized

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

LAST = torch.channels_last


class Net(nn.Module):
    """A strided, a grouped, a dilated and a 1 x 1 convolution, a skip, pooling, and what flattens images."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.wide, self.narrow = nn.Conv2d(4, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x):
        x = F.softplus(self.norm(self.first(x)))
        x = x + self.narrow(torch.tanh(self.wide(self.grouped(x))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Seen(TorchDispatchMode):
    """Whether the images and kernels that convolutions are given lie in channels_last."""

    def __init__(self):
        super().__init__()
        self.turned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.turned.append(
                all(a.dim() == 4 and a.is_contiguous(memory_format=LAST) for a in args[:2] if a.shape[1] > 1)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", ["as usual", "in channels_last", "seen from another side"])
@pytest.mark.parametrize("product", [hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward])
def test_products_are_those_in_double_precision(given, product, generator):
    model = Net().eval()
    loss, params = hf.module_loss(model, F.cross_entropy)
    images, targets = torch.randn(6, 3, 14, 14, generator=generator), torch.randint(0, 5, (6,), generator=generator)
    if given == "in channels_last":
        images = images.to(memory_format=LAST)
    if given == "seen from another side":
        images = images.transpose(2, 3)
    H = hf.hessian(loss, params, (images, targets), product=product)
    exact = hf.hessian(*hf.module_loss(copy.deepcopy(model).double(), F.cross_entropy), (images.double(), targets))
    rows = torch.randn(3, H.size, generator=generator)
    strides = images.stride(), {name: p.stride() for name, p in params.items()}
    expected = exact.rows(rows.double())
    for _ in range(3):
        assert float((H.rows(rows).to(F64) - expected).norm() / expected.norm()) < 3e-6
    assert (images.stride(), {name: p.stride() for name, p in params.items()}) == strides


def linearized(function, *inputs):
    *primals, tangent = inputs
    program = Linearized(function, primals, tangent)
    residuals = program.residuals(primals)
    with Seen() as seen:
        program.residuals(primals)
        result = program.apply(primals, residuals, tangent)
    return result, seen.turned


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_images_of_single_precision_are_turned(dtype, generator):
    x, w, t = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((2, 3, 8, 8), (4, 3, 3, 3), (2, 3, 8, 8))
    )
    result, turned = linearized(lambda x, w, t: F.conv2d(t * x, w).relu(), x, w, t)
    assert turned == [dtype == torch.float32]
    torch.testing.assert_close(result, F.conv2d(t * x, w).relu())


def test_other_convolutions_are_left_alone(generator):
    x, w = torch.randn(2, 3, 8, generator=generator), torch.randn(4, 3, 3, generator=generator)
    result, turned = linearized(lambda x, w, t: F.conv1d(t * x, w), x, w, x)
    assert turned == [False]
    torch.testing.assert_close(result, F.conv1d(x * x, w))
    x, w = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(3, 4, 3, 3, generator=generator)
    result, turned = linearized(lambda x, w, t: F.conv_transpose2d(t * x, w), x, w, x)
    assert turned == [False]
    torch.testing.assert_close(result, F.conv_transpose2d(x * x, w))

    def strided(x, w, t):
        return F.conv2d(t * x, w).as_strided((2, 4), (4, 1))

    x, w = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)
    result, turned = linearized(strided, x, w, x)
    assert turned == [False]
    torch.testing.assert_close(result, strided(x, w, x))
