"""A curvature product on one batch as a function of tensors: run, recorded, and compared with its recording."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch

from hessfunc import _probes, tree
from hessfunc._agreement import Summary
from hessfunc._compat import evaluated
from hessfunc._linearize import Linearized, cast_to
from hessfunc._rules import Rule
from hessfunc._shadows import Shadow
from hessfunc._typing import Loss, Params, Tensor

OUTWEIGHED = 10
"""What does not depend on the vector takes this many times the memory of the parameters where they are outweighed."""


class Point(NamedTuple):
    """Parameters taken apart, and how vectors and products there lie in memory."""

    leaves: list[Tensor]
    spec: Any
    strides: tuple[tuple[int, ...], ...]
    domain: tree.Layout
    image: tree.Layout

    @classmethod
    def of(cls, params: Params, domain: tree.Layout | None, image: tree.Layout | None) -> Point:
        """Take parameters apart; vectors and products lie like them unless they are said not to."""
        leaves, spec = tree.flatten(params)
        layout = tree.Layout.of(params)
        return cls(leaves, spec, tuple(leaf.stride() for leaf in leaves), domain or layout, image or layout)


class Trial:
    """A product on a batch.

    Attributes:
        rule: how it is computed.
        signature: equal for those that one program serves; None if that cannot be told.
        primals: the parameters' leaves and the batch's tensors.
    """

    def __init__(self, rule: Rule, loss: Loss, point: Point, batch: tuple[Any, ...]) -> None:
        self.rule = rule
        self._loss = loss
        self._point = point
        self._leaves, self._spec = tree.flatten(batch)
        self._looks = self._look()
        known = None not in self._looks[0]
        self.signature: Hashable = (str(self._spec), point.strides, self._looks) if known else None
        self.primals = [*point.leaves, *(leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor))]

    def is_current(self, rule: Rule) -> bool:
        """Whether a trial by this rule, made now, would be the same."""
        return self.rule is rule and self._looks == self._look()

    def _look(self) -> tuple[tuple[Hashable, ...], torch.dtype | None]:
        """What a traced program depends on besides the values of tensors."""
        return tuple([_look(leaf) for leaf in self._leaves]), cast_to(self._point.domain.device)

    def function(self, *inputs: Tensor) -> Tensor:
        """Products with rows, ``(*primals, rows) -> products``."""
        num, domain, image = len(self._point.leaves), self._point.domain, self._point.image
        params = tree.unflatten(inputs[:num], self._point.spec)
        given = iter(inputs[num:-1])
        whole = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        batch = tree.unflatten(whole, self._spec)

        def single(row: Tensor) -> Tensor:
            return image.ravel(self.rule.product(self._loss, params, domain.unravel(row), *batch))

        rows = inputs[-1]
        if rows.shape[0] == 1:
            return single(rows[0]).unsqueeze(0).contiguous()
        if not self.rule.vmappable:
            return torch.stack([single(row) for row in rows])
        return torch.func.vmap(single, randomness="same")(rows)

    def rows(self, rows: Tensor) -> Tensor:
        """Products with rows."""
        return self.function(*self.primals, rows)

    def probe(self, num: int) -> Tensor:
        """Random rows, the same each time."""
        generator, layout = torch.Generator().manual_seed(0), self._point.domain
        return _probes.normal(num, layout.size, generator=generator, dtype=layout.dtype, device=layout.device)

    def recorded(
        self, rows: Tensor, probe: Callable[[], Tensor], *, on_shadows: bool, **options: bool
    ) -> tuple[Linearized, Summary]:
        """A program for rows like these, and what to compare it with: the eager product with ``probe()``.

        Raises:
            NotRecordableError, ShadowError: it cannot be recorded, or not without numbers.
        """

        def record(rows: Tensor) -> Linearized:
            return Linearized(self.function, self.primals, rows, on_shadows=on_shadows, **options)

        if not on_shadows:
            program = record(probe())
            return program, Summary.of(program.take_result())
        # Something runs in earnest first: what a loss makes at its first run and keeps shall have numbers.
        if self.rule.lighter is None:
            eager = Summary.of(self.rows(probe()))
            return record(rows), eager
        params = tree.unflatten(self._point.leaves, self._point.spec)
        batch = tree.unflatten(self._leaves, self._spec)
        evaluated(self._loss, params, *batch)
        program = record(rows)
        weight = sum(leaf.numel() * leaf.element_size() for leaf in self._point.leaves)
        if rows.shape[0] == 1 and program.residual_bytes < OUTWEIGHED * weight:
            with contextlib.suppress(NotImplementedError):
                product = self.rule.lighter(self._loss, params, partial(self._drawn, probe), *batch)
                return program, Summary.of(self._point.image.ravel(product))
        return program, Summary.of(self.rows(probe()))

    def unseen(self, rows: Tensor) -> Linearized:
        """A program for rows like these, recorded without numbers and compared with nothing.

        Raises:
            NotRecordableError, ShadowError: it cannot be recorded so.
        """
        # What a loss makes at its first run with such a batch and keeps shall have numbers.
        params = tree.unflatten(self._point.leaves, self._point.spec)
        evaluated(self._loss, params, *tree.unflatten(self._leaves, self._spec))
        program = Linearized(self.function, self.primals, Shadow.of(rows), on_shadows=True)
        program.checked |= {False, True}
        return program

    def _drawn(self, probe: Callable[[], Tensor]) -> Params:
        # Forward mode would copy views of a flat vector, and does not copy these.
        return tree.map_leaves(torch.clone, self._point.domain.unravel(probe()[0]))

    def check_repeats(self, program: Linearized, probe: Callable[[], Tensor]) -> None:
        """Raise a ``ValueError`` if two products with one vector differ."""
        if not torch.equal(self.rows(probe()), self.rows(probe())):
            raise ValueError(
                "the loss is not deterministic: two products with the same vector differ, and it draws random "
                f"numbers ({', '.join(sorted(set(program.random)))}). Call model.eval() if that is dropout, or fix "
                "the randomness inside the loss; a Hessian that changes between products has no eigenvalues."
            )


def _look(leaf: Any) -> Hashable:
    """Equal for leaves that one program serves; None for what cannot be compared."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, int | float | bool | str | type(None)) else None
