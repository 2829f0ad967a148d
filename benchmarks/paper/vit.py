"""A small vision transformer (Dosovitskiy et al. 2021) with its LayerNorms before or after each branch, or without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("pre", "post", "none")


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each a branch beside a shortcut."""

    def __init__(self, dim: int, heads: int, norm: str) -> None:
        super().__init__()
        self.heads, self.order = heads, norm
        self.norm1 = nn.LayerNorm(dim) if norm != "none" else nn.Identity()
        self.norm2 = nn.LayerNorm(dim) if norm != "none" else nn.Identity()
        self.attention = nn.Linear(dim, 3 * dim)
        self.mixing = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape ``(num, tokens, dim)``."""
        for norm, branch in ((self.norm1, self._attend), (self.norm2, self._transform)):
            x = norm(x + branch(x)) if self.order == "post" else x + branch(norm(x))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.attention(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.mixing(mixed.transpose(1, 2).flatten(-2))

    def _transform(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ViT(nn.Module):
    """Patches, learned positions, ``depth`` layers, the mean of all tokens, a linear head.

    Args:
        size: height and width of the images, a multiple of ``patch``.
        channels: channels of the images.
        patch: height and width of a patch.
        dim: features of a token.
        depth: number of layers.
        heads: attention heads.
        norm: ``"pre"``, ``"post"`` or ``"none"``.
        num_classes: outputs.
        generator: draws the weights.

    Raises:
        ValueError: ``size`` is no multiple of ``patch``, or ``norm`` is not known.
    """

    def __init__(
        self,
        *,
        size: int,
        channels: int = 1,
        patch: int = 2,
        dim: int = 32,
        depth: int = 4,
        heads: int = 4,
        norm: str = "pre",
        num_classes: int = 10,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch}.")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, expected one of {NORMS}.")
        with torch.device("meta"):  # shapes without drawing weights from torch's global generator
            self.patches = nn.Conv2d(channels, dim, patch, patch)
            self.positions = nn.Parameter(torch.empty((size // patch) ** 2, dim))
            self.layers = nn.Sequential(*(Layer(dim, heads, norm) for _ in range(depth)))
            self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
            self.head = nn.Linear(dim, num_classes)
        self.to_empty(device="cpu")
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # ones and zeros
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape ``(num, channels, size, size)`` to logits of shape ``(num, num_classes)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(dim=1))
