"""Type aliases used across the package; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Params: TypeAlias = Any
"""Any pytree (dict, list, tuple, named tuple, nested) whose leaves are floating-point tensors."""

Batch: TypeAlias = Any
"""One item of the data: a tuple or list is passed as ``loss(params, *batch)``, all else as ``loss(params, batch)``."""

Loss: TypeAlias = Callable[..., Tensor]
"""``loss(params, *batch) -> scalar tensor``."""

Matvec: TypeAlias = Callable[[Any], Any]
"""A symmetric linear map: a pytree goes in, a pytree of the same structure comes out."""
