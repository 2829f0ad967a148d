"""By which order of differentiation an operator computes its products, and what it shares between points."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

from hessfunc._checks import ProductWarning
from hessfunc._linearize import Linearized
from hessfunc._typing import Params

_T = TypeVar("_T")

Product = Callable[..., Params]
"""``product(loss, params, v, *batch)``: a curvature product such as [`hvp`][hessfunc.hvp]."""


class Rule(NamedTuple):
    """How to compute a product.

    Attributes:
        product: the product.
        vmappable: whether it runs under ``vmap``, as no custom function and nothing on torch's own tape need do.
        lighter: ``lighter(loss, params, draw, *batch)`` gives the product with the vector ``draw()`` in another way, in
            less memory where parameters outweigh activations.
    """

    product: Product
    vmappable: bool = True
    lighter: Product | None = None


class Programs:
    """What products of one loss share at all points: programs by shape of batch and number of lanes.

    Attributes:
        traced: the programs.
        requests: how often a number of lanes came up.
        eager: whether there are none, since the product cannot be traced or shall not be.
        rule: how products are computed.
    """

    def __init__(self, *rules: Rule, eager: bool) -> None:
        self.traced: dict[Hashable, Linearized] = {}
        self.requests: dict[Hashable, int] = {}
        self.eager = eager
        self.rule, self._others = rules[0], rules[1:]

    def by_a_rule_that_works(self, compute: Callable[[], _T]) -> _T:
        """``compute()`` under the first rule that it raises no ``NotImplementedError`` with, which stays the rule.

        Raises:
            NotImplementedError: under none; that of the last rule, which the others' may name as the way out.

        Warns:
            ProductWarning: it is another rule than before.
        """
        try:
            return compute()
        except NotImplementedError as error:
            if not self._others:
                raise
            before, last = (self.rule, self.eager), error
            for rule in self._others:
                self.rule, self.eager = rule, before[1]
                self.traced.clear()
                try:
                    result = compute()
                    break
                except NotImplementedError as another:
                    last = another
            else:
                self.rule, self.eager = before
                raise last from error
            self._others = ()
            problem, name = re.split(r"[.;] ", str(error))[0], f"hessfunc.{rule.product.__name__}"
        warnings.warn(
            f"{problem}. The products go on with {name}, which is slower and otherwise the same. Give the operation "
            "forward-mode derivatives (an autograd.Function of your own: setup_context and jvp), or pass "
            f"product={name} to choose it yourself, without this warning.",
            ProductWarning,
            stacklevel=2,
        )
        return result
