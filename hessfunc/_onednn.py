"""Products of matrices by oneDNN, where the BLAS behind torch leaves half of the processor idle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from hessfunc._recorder import Value
from hessfunc._typing import Tensor

_aten = torch.ops.aten

WORTH = 1 << 20
"""Multiplications in a product from which oneDNN makes up for what it takes to call it: measured on an AMD EPYC of
the fifth generation, where MKL took 20 microseconds for as many and oneDNN 19 to 26, and for eight times as many 153
and 76 to 102."""

_VECTOR = 16
"""Columns that MKL takes together: fewer take as long, 10 as long as 16."""

NARROW = 8
"""Rows and columns below which a product waits for memory, and takes longer in oneDNN."""

WHOLE, PIECE, LEAN_PIECE = 1 << 20, 1 << 19, 1 << 17
"""Entries of a result that is worked out apart before it is added or written elsewhere: above ``WHOLE`` memory for all
of it costs more than the product saves. A piece is a sixteenth of it, or the second size where that is more, with
``lean`` the third; small pieces take long, since each takes the other factor in anew."""


@cache
def available() -> bool:
    """Whether oneDNN multiplies matrices faster than the BLAS does.

    MKL keeps to vectors of 256 bits on processors that are not Intel's; oneDNN takes what the processor has.
    """
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not promised by torch
    return (
        bool(processor.get("avx512_f"))
        and "Intel" not in str(processor.get("cpu_name"))
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def instead(node: Node, values: Mapping[Node, Value], *, lean: bool = False) -> Any:
    """What to call in place of the operation that the node stands for, with the same arguments: mostly itself.

    The same numbers up to rounding. A batch of products with a matrix that all of them share becomes one. oneDNN has
    no product that is added to a matrix, or is written to memory that is there: that goes by way of memory of its own,
    with ``lean`` as little as it can.
    """
    if node.target not in _SINGLE and node.target not in _BATCHED:
        return node.target
    *rest, left, right = (values.get(a) if isinstance(a, Node) else None for a in node.args)
    if left is None or right is None or len(rest) != (node.target in _ADDING) or "beta" in node.kwargs:
        return node.target
    plain = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    if not (plain and torch.backends.mkldnn.enabled and available()):
        return node.target
    height, depth, width = left.shape[-2], left.shape[-1], right.shape[-1]
    each = height * depth * -(-width // _VECTOR) * _VECTOR
    if node.target in _SINGLE:
        quicker = _SINGLE | _LEAN if lean else _SINGLE
        return quicker[node.target] if each >= WORTH and min(height, width) >= NARROW else node.target
    if lean:
        return node.target
    shared_left, shared_right, apart = _BATCHED[node.target]
    if len(left.shape) == 3 and each * left.shape[0] >= WORTH:
        if left.strides[0] == 0:
            users = [user.target for user in node.users]
            any_order = node.target is _aten.bmm.default and users and all(user in _ENTRY_BY_ENTRY for user in users)
            return _wide if any_order else shared_left
        if right.strides[0] == 0:
            return shared_right
    return apart if each >= 4 * WORTH and min(height, width) >= NARROW else node.target


def _mm(a: Tensor, b: Tensor) -> Tensor:
    rows, columns = b.stride()
    if not ((columns == 1 and rows >= b.shape[1]) or (rows == 1 and columns >= b.shape[0])):
        b = b.contiguous()  # oneDNN misreads some of the other ways to lie in memory
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor, piece: int | None = None) -> Tensor:
    for part, rows in _in_pieces(out, a, piece):
        part.copy_(_mm(rows, b))
    return out


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1, piece: int | None = None) -> Tensor:
    for part, rows in _in_pieces(c, a, piece):
        part.add_(_mm(rows, b), alpha=alpha)
    return c


def _in_pieces(result: Tensor, left: Tensor, piece: int | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Rows of the result, with those of the left factor that they come from."""
    size = result.numel()
    if piece is None and size <= WHOLE:
        return ((result, left),)
    rows = max(1, max(piece or PIECE, size // 16) // result.shape[1])
    return zip(result.split(rows), left.split(rows), strict=True)


def _lean_mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return _mm_out(a, b, out=out, piece=LEAN_PIECE)


def _lean_addmm_(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    return _addmm_(c, a, b, alpha=alpha, piece=LEAN_PIECE)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    product = _mm(a, b)
    return (product if alpha == 1 else product.mul_(alpha)).add_(c)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """``a[0] @ b[i]`` for all i, next to each other in one product; in an order of its own in memory."""
    lanes, depth, width = b.shape
    if b.stride(1) == 1:  # transposed, as weights are: rows are quicker to copy than columns
        side_by_side = b.transpose(1, 2).reshape(lanes * width, depth).t()
    else:
        side_by_side = b.transpose(0, 1).reshape(depth, lanes * width)
    return _mm(a[0], side_by_side).view(a.shape[1], lanes, width).transpose(0, 1)


def _high(a: Tensor, b: Tensor) -> Tensor:
    """``a[i] @ b[0]`` for all i, on top of each other in one product."""
    lanes, height, depth = a.shape
    return _mm(a.reshape(lanes * height, depth), b[0]).view(lanes, height, b.shape[2])


def _bmm_left(a: Tensor, b: Tensor) -> Tensor:
    return _wide(a, b).contiguous()


def _baddbmm_left_(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    return c.add_(_wide(a, b), alpha=alpha)


def _baddbmm_right_(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    return c.add_(_high(a, b), alpha=alpha)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([_mm(left, right) for left, right in zip(a, b, strict=True)])


def _baddbmm_(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> Tensor:
    for into, left, right in zip(c, a, b, strict=True):
        into.add_(_mm(left, right), alpha=alpha)
    return c


_SINGLE = {
    _aten.mm.default: _mm,
    _aten.mm.out: _mm_out,
    _aten.addmm.default: _addmm,
    _aten.addmm_.default: _addmm_,
}
_LEAN = {_aten.mm.out: _lean_mm_out, _aten.addmm_.default: _lean_addmm_}
_BATCHED = {
    _aten.bmm.default: (_bmm_left, _high, _bmm),
    _aten.baddbmm_.default: (_baddbmm_left_, _baddbmm_right_, _baddbmm_),
}
_ENTRY_BY_ENTRY = {
    *(_aten.mul.Tensor, _aten.mul_.Tensor, _aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor),
    *(_aten.addcmul.default, _aten.addcmul_.default, _aten.threshold_backward.default),
}
_ADDING = {_aten.addmm.default, _aten.addmm_.default, _aten.baddbmm_.default}
