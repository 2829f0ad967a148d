"""Symmetric linear operators on parameter pytrees: what every estimator takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from hessfunc import tree
from hessfunc._checks import check_count, check_like, check_params
from hessfunc._compat import is_plain
from hessfunc._terms import Rows, Term, Terms, paired, summed_rows
from hessfunc._typing import Matvec, Params, Tensor


class Operator:
    """A symmetric linear map ``v -> H v`` on pytrees like ``like``.

    Attributes:
        like: a pytree with the structure, shapes, dtypes and device of the vectors.
        layout: how such a pytree lies in a flat vector ([`Layout`][hessfunc.tree.Layout]).
        terms: a function that makes one pass over the data and yields a [`Term`][hessfunc.Term] for each batch, for
            vectors that differ from batch to batch; ``None`` where the operator is not known as a sum over batches.

    ``H(v)`` is one product. ``H.matmat(V)`` takes pytrees with a leading axis of length K; ``H.vector(x)`` and
    ``H.rows(X)`` are the same two on flat arrays of shape ``(size,)`` and ``(K, size)``. ``torch.func.vmap`` over
    ``H`` or ``H.vector`` runs all lanes through ``rows``, in one pass over the data. The map is linear, so gradients
    through it with respect to ``v`` are products too. Operators add, subtract and scale: ``H - G``,
    ``2.0 * H``, ``H.shift(1e-4)``.
    """

    def __init__(
        self,
        like: Params,
        rows: Rows,
        *,
        move: Callable[[Params], Operator] | None = None,
        terms: Terms | None = None,
    ) -> None:
        check_params(like, name="like")
        self.like = tree.detach(like)
        self.layout = tree.Layout.of(self.like)
        self.terms = terms
        self._rows = rows
        self._move = move

    @property
    def size(self) -> int:
        """Number of rows and columns of the matrix."""
        return self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors: the leaves' promoted dtype, at least float32."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.layout.device

    def __call__(self, v: Params) -> Params:
        """``H v`` for a pytree like ``like``."""
        check_like(v, self.like, name="v", reference="H.like")
        return self.layout.unravel(self.vector(self.layout.ravel(v)))

    def matmat(self, vectors: Params) -> Params:
        """``H v`` for each of K vectors: leaves carry a leading axis of length K."""
        check_like(vectors, self.like, name="vectors", reference="H.like", rows=True)
        return self.layout.unravel_rows(self.rows(self.layout.ravel_rows(vectors)))

    def vector(self, vector: Tensor) -> Tensor:
        """``H v`` on a flat vector of shape ``(size,)`` and dtype ``H.dtype``."""
        self._check_flat(vector, dims=1)
        return _applied(vector, self._rows)

    def rows(self, rows: Tensor) -> Tensor:
        """``H v`` for each row of an array of shape ``(K, size)`` and dtype ``H.dtype``."""
        self._check_flat(rows, dims=2)
        return _applied(rows, self._rows)

    def at(self, params: Params) -> Operator:
        """The same operator of the same data at other parameters; what was traced once serves there too.

        Sums, multiples and shifts move with their operands.

        Raises:
            ValueError: ``params`` is not like ``H.like``, or the operator belongs to one point: one made from a matrix
                or a matvec, a term of a hierarchy, or a Fisher matrix of sampled targets.

        Example:
            >>> import torch, hessfunc as hf
            >>> H = hf.hessian(lambda w: (w**4).sum() / 12, torch.ones(2))
            >>> H.at(torch.tensor([2.0, 3.0]))(torch.ones(2))
            tensor([4., 9.])
        """
        if self._move is None:
            raise ValueError(
                "the operator belongs to one point and cannot move; build it anew there. hessfunc.hessian, ggn and "
                "fisher (but for kind='mc') make operators that move."
            )
        check_like(params, self.like, name="params", reference="H.like")
        return self._move(params)

    def dense(self, *, chunk_size: int = 64) -> Tensor:
        """The matrix itself, shape ``(size, size)``: ``size`` products and ``size**2`` numbers."""
        check_count(chunk_size, name="chunk_size")
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self.rows(chunk) for chunk in eye.split(chunk_size)])

    def to_scipy(self) -> LinearOperator:
        """A SciPy ``LinearOperator`` on flat NumPy vectors, for ``scipy.sparse.linalg.eigsh``, ``lobpcg`` and others.

        Example:
            >>> import torch, hessfunc as hf
            >>> from scipy.sparse.linalg import eigsh
            >>> H = hf.hessian(lambda p: (p**4).sum() / 12, torch.arange(1.0, 6.0))
            >>> [round(float(x)) for x in eigsh(H.to_scipy(), k=2, return_eigenvectors=False)]
            [16, 25]
        """
        kind = np.dtype(str(self.dtype).removeprefix("torch."))

        def columns(array: np.ndarray) -> np.ndarray:
            rows = torch.as_tensor(np.ascontiguousarray(array.T, dtype=kind), device=self.device)
            return self.rows(rows).detach().cpu().numpy().T

        def column(array: np.ndarray) -> np.ndarray:
            return columns(array.reshape(-1, 1)).reshape(-1)

        shape = (self.size, self.size)
        return LinearOperator(shape, dtype=kind, matvec=column, rmatvec=column, matmat=columns, rmatmat=columns)

    def __add__(self, other: Operator) -> Operator:
        return self._combine(other, 1.0)

    def __sub__(self, other: Operator) -> Operator:
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> Operator:
        if not isinstance(factor, int | float):
            return NotImplemented
        return self._derived(
            lambda rows: factor * self.rows(rows),
            lambda params: factor * self.at(params),
            lambda term: lambda rows: factor * term.rows(rows),
        )

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return -1.0 * self

    def shift(self, amount: float) -> Operator:
        """``H + amount * I``: the Hessian with weight decay ``amount / 2 * |params|^2`` added to the loss."""
        return self._derived(
            lambda rows: self.rows(rows).add(rows, alpha=amount),
            lambda params: self.at(params).shift(amount),
            lambda term: lambda rows: term.rows(rows).add(rows, alpha=amount * term.divisor / term.weight),
        )

    def _combine(self, other: Operator, factor: float) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        check_like(other.like, self.like, name="other.like", reference="H.like")
        return Operator(
            self.like,
            functools.partial(summed_rows, self.rows, other.rows, factor),
            move=lambda params: self.at(params)._combine(other.at(params), factor),
            terms=None if self.terms is None or other.terms is None else paired(self.terms, other.terms, factor),
        )

    def _derived(self, rows: Rows, move: Callable[[Params], Operator], by_term: Callable[[Term], Rows]) -> Operator:
        own = self.terms

        def terms() -> Iterator[Term]:
            assert own is not None
            return (term._replace(rows=by_term(term)) for term in own())

        return Operator(self.like, rows, move=move, terms=None if own is None else terms)

    def _check_flat(self, array: Tensor, *, dims: int) -> None:
        if not isinstance(array, torch.Tensor) or array.dim() != dims or array.shape[-1] != self.size:
            given = tuple(array.shape) if isinstance(array, torch.Tensor) else type(array).__name__
            wanted = f"({self.size},)" if dims == 1 else f"(K, {self.size})"
            raise ValueError(f"the flat vector has shape {given}, expected {wanted}; H.layout.ravel makes one.")
        if array.dtype != self.dtype:
            raise TypeError(f"the flat vector has dtype {array.dtype}, expected {self.dtype}; convert it with .to().")


def as_operator(matvec: Matvec | Tensor, like: Params | None = None) -> Operator:
    """An operator from a symmetric matrix, or from a matvec and a pytree like its vectors.

    The matvec is applied row by row under ``torch.func.vmap``.

    Raises:
        ValueError: the matrix is not square or does not fit ``like``, or ``like`` is missing.

    Example:
        >>> import torch, hessfunc as hf
        >>> hf.as_operator(torch.diag(torch.tensor([1.0, 2.0])))(torch.ones(2))
        tensor([1., 2.])
        >>> hf.as_operator(lambda v: {"x": 3 * v["x"]}, like={"x": torch.ones(2)})({"x": torch.ones(2)})
        {'x': tensor([3., 3.])}
    """
    if isinstance(matvec, torch.Tensor):
        matrix = matvec
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matvec is a tensor of shape {tuple(matrix.shape)}; a matrix must be square.")
        if like is not None and tree.size(like) != matrix.shape[0]:
            raise ValueError(f"like holds {tree.size(like)} numbers, but the matrix has {matrix.shape[0]} rows.")
        return Operator(matrix[0] if like is None else like, lambda rows: rows @ matrix.to(rows.dtype))
    if like is None:
        raise ValueError("like is missing; pass a pytree with the structure, shapes and dtypes of the vectors.")
    function = matvec
    layout = tree.Layout.of(like)

    def rows(rows: Tensor) -> Tensor:
        return layout.ravel_rows(torch.func.vmap(function)(layout.unravel_rows(rows)))

    return Operator(like, rows)


def _applied(array: Tensor, rows: Rows) -> Tensor:
    # The rules for transforms take longer to look up than a small network's product takes.
    if is_plain(array):
        return _Product.forward(array, rows)
    return _as_it_is(array, rows) if torch.compiler.is_compiling() else _Product.apply(array, rows)


@torch.compiler.disable
def _as_it_is(array: Tensor, rows: Rows) -> Tensor:
    """A compiler around it does not look into a product, which has its own programs and memory of what it did."""
    return _applied(array, rows)


class _Product(torch.autograd.Function):
    """A product that vmap hands over as one stack of rows, however deep it is nested."""

    @staticmethod
    def forward(array: Tensor, rows: Rows) -> Tensor:
        return rows(array.reshape(-1, array.shape[-1])).reshape(array.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, _output: Any) -> None:
        ctx.product = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Product.apply(gradients[0], ctx.product), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], ctx.product)

    @staticmethod
    def vmap(_info: Any, in_dims: Any, array: Tensor, rows: Rows) -> Any:
        return _Product.apply(array.movedim(in_dims[0], 0), rows), 0
