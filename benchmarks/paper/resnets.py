"""The paper's CIFAR ResNets (He et al. 2016, section 4.2), with BatchNorm and shortcuts on or off in each stage."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (20, 32, 38, 44, 56)
STAGES = (1, 2, 3)
EVERYWHERE = (0, *STAGES)
"""The stem is stage 0: it has a BatchNorm and no shortcut."""


class Block(nn.Module):
    """Two 3 x 3 convolutions, around them a shortcut, which is a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, norm: bool, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, norm=norm)
        self.norm1 = _norm(outputs, norm=norm)
        self.conv2 = _conv(outputs, outputs, 3, 1, norm=norm)
        self.norm2 = _norm(outputs, norm=norm)
        self.has_shortcut = shortcut
        if shortcut and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride, norm=norm), _norm(outputs, norm=norm))
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape ``(num, channels, height, width)``."""
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(hidden + self.shortcut(x) if self.has_shortcut else hidden)


class ResNet(nn.Module):
    """ResNet of ``depth = 6 n + 2`` weighted layers: a stem, three stages of n blocks, a linear head.

    Stage s has ``width * 2**(s - 1)`` channels. A convolution that no BatchNorm follows has a bias. All weights come
    from ``generator``. Depth 20 at width 16 has 272,474 parameters for colour images.

    Args:
        depth: 6 n + 2.
        width: channels of the first stage; 16 in the paper.
        channels: channels of the images.
        num_classes: outputs.
        norm: stages that have BatchNorm, among 0 (the stem), 1, 2 and 3.
        residual: stages that have shortcuts, among 1, 2 and 3.
        generator: draws the weights.

    Raises:
        ValueError: ``depth`` is not 6 n + 2.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = 16,
        channels: int = 3,
        num_classes: int = 10,
        norm: Collection[int] = EVERYWHERE,
        residual: Collection[int] = STAGES,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}, expected 6 n + 2: 8, 14, 20, 26, 32, 38, 44, 50, 56, ...")
        with torch.device("meta"):  # shapes without drawing weights from torch's global generator
            self.stem = _conv(channels, width, 3, 1, norm=0 in norm)
            self.norm = _norm(width, norm=0 in norm)
            for stage in STAGES:
                outputs = width * 2 ** (stage - 1)
                inputs = width if stage == 1 else outputs // 2
                options = {"norm": stage in norm, "shortcut": stage in residual}
                blocks = [Block(inputs, outputs, 1 if stage == 1 else 2, **options)]
                blocks += [Block(outputs, outputs, 1, **options) for _ in range((depth - 2) // 6 - 1)]
                setattr(self, f"stage{stage}", nn.Sequential(*blocks))
            self.head = nn.Linear(4 * width, num_classes)
        initialize(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape ``(num, channels, height, width)`` to logits of shape ``(num, num_classes)``."""
        hidden = F.relu(self.norm(self.stem(x)))
        return self.head(self.stage3(self.stage2(self.stage1(hidden))).mean(dim=(2, 3)))


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Replace a model on the meta device by one on the CPU, its weights drawn as in He et al. (2015)."""
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()  # ones and zeros
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _conv(inputs: int, outputs: int, size: int, stride: int, *, norm: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=not norm)


def _norm(channels: int, *, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()
