"""Gather elementwise operations on tangents into sums of few terms, whose factors are worked out beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from hessfunc._elementwise import ADD, DIVIDE, MASKS, MULTIPLY, SLOPES
from hessfunc._factors import TOO_LARGE, Factor, Plan, Term, combined
from hessfunc._recorder import Recording
from hessfunc._simplify import VIEWS, is_layout_free, merge_storage
from hessfunc._zeros import zeros

_aten = torch.ops.aten

_LARGE = 1 << 15
"""Mean number of entries of an operation's result from which on masks are worked out each time, and not held."""

_PRODUCT = {_aten.mm.default: _aten.addmm_.default, _aten.bmm.default: _aten.baddbmm_.default}
"""Products of matrices, and what adds one to a matrix in place."""


def reassociate(recording: Recording) -> None:
    """Rewrite sums and products of tangents with fixed factors in the recording's graph, in place.

    A tree of elementwise operations is linear in the tangents below it: ``sum_i factor_i * base_i``. The factors do not
    depend on the vector, so the primal program can work them out, and a product passes over memory once for each
    base instead of once for each operation. A base that is a product of matrices is accumulated by that product.
    Only rounding changes. A tree ends where a result is used more than once and where a factor would be larger than
    what it is made of, and is left alone unless fewer operations remain.
    """
    if not is_layout_free(recording):
        return  # results may lie in memory in another order than they did
    rewriter = _Rewriter(recording)
    for root in rewriter.roots():
        rewriter.rewrite(root)


class _Rewriter:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._graph = recording.graph
        self._outputs = set(recording.outputs)
        self._position = {node: i for i, node in enumerate(self._graph.nodes)}
        self._last_write: dict[int, int] = {}
        for writer, storage in recording.mutations:
            self._last_write[storage] = max(self._position[writer], self._last_write.get(storage, 0))
        self._moving = {recording.inputs[-1]}
        for node in self._graph.nodes:
            if any(argument in self._moving for argument in node.all_input_nodes):
                self._moving.add(node)
        self._zeros = zeros(recording)
        self._made: dict[Factor, Node] = {}
        held = sum(recording.elements) < _LARGE * len(recording.elements)
        self._slopes = SLOPES | MASKS if held else SLOPES

    def roots(self) -> list[Node]:
        """Where the trees end, in the order of execution."""
        absorbed: set[Node] = set()
        found = []
        for node in reversed(self._graph.nodes):
            if node not in absorbed and self._is_linear(node):
                self._terms(node, None, 1.0, absorbed, node)
                found.append(node)
        return found[::-1]

    def _is_linear(self, node: Node) -> bool:
        """Whether this is an elementwise operation of the kinds that are gathered."""
        if node not in self._moving or not self._plain(node) or len(node.args) < 2:
            return node.target is _aten.neg.default and node in self._moving and self._plain(node)
        first, second = node.args[:2]
        if node.target in ADD:
            added = [a for a in (first, second) if a not in self._zeros]
            return all(isinstance(a, Node) and a in self._moving and self._alike(a, node) for a in added)
        if node.target in MULTIPLY:
            return self._one_moves(first, second, node) or self._one_moves(second, first, node)
        if node.target in DIVIDE:
            return self._one_moves(first, second, node)
        if node.target in self._slopes:
            others = [a for a in node.args[1:] if isinstance(a, Node)]
            fixed = [a for a in others if a not in self._moving and self._alike(a, node) and self._plain(a)]
            return bool(fixed) and len(fixed) == len(others) and isinstance(first, Node) and self._alike(first, node)
        return False

    def rewrite(self, root: Node) -> None:
        """Replace the tree that ends in ``root`` if that leaves fewer operations."""
        tree: set[Node] = set()
        terms = self._gathered(self._terms(root, None, 1.0, tree, root))
        first = min(map(self._position.__getitem__, tree), default=-1)
        if any(self._last_write.get(self._recording.storage[term.base], -1) > first for term in terms):
            return  # read before a write, it may not be read later
        plans = [plan for plan in (self._plan(terms, tree, root), self._factored_out(terms, tree, root)) if plan]
        if not plans:
            return
        plan = min(plans[::-1], key=lambda plan: plan.operations)  # one factor for all is read once
        own = self._is_own_memory(plan.start, tree) and plan.start.scale == 1
        if plan.operations > len(tree) or (plan.operations == len(tree) and not own):
            return
        values = self._recording.values
        with self._graph.inserting_before(root):
            result, fresh = self._first(plan.start, own)
            values.setdefault(result, values[root])
            for term in sorted(plan.rest, key=lambda term: term in plan.joined):
                result = self._accumulated(result, term, in_place=fresh, joined=fresh and term in plan.joined)
                values[result] = values[root]
                fresh = True
            if plan.factor is not None:
                result = self._graph.call_function(_aten.mul.Tensor, (result, self._made_of(plan.factor)))
                values[result] = values[root]
        self._replace(root, result, tree)

    def _plan(self, terms: list[Term], tree: set[Node], root: Node) -> Plan | None:
        """Where to start the sum, and how many operations it takes; None where no term has the shape of the result."""
        shape = self._shape(root)
        whole = [term for term in terms if self._term_shape(term) == shape]
        if not whole:
            return None
        # Best is the view of a product, which cannot be joined to what comes before it; then a product.
        start = min(
            whole,
            key=lambda term: (
                *(not self._is_own_memory(term, tree), self._is_own_product(term, tree), term.factor is None),
                term.factor is not None and term.scale != 1,
            ),
        )
        rest = [term for term in terms if term is not start]
        joined = [term for term in rest if self._is_own_product(term, tree) and self._shape(term.base) == shape]
        operations = len(rest) - len(joined) + (start.factor is not None or start.scale != 1)
        return Plan(start, rest, joined, None, operations)

    def _factored_out(self, terms: list[Term], tree: set[Node], root: Node) -> Plan | None:
        """The same where all terms have one factor: their sum times it, into which products can be joined."""
        factor = terms[0].factor
        if factor is None or len(terms) < 2 or any(term.factor != factor for term in terms):
            return None
        plan = self._plan([replace(term, factor=None) for term in terms], tree, root)
        if plan is None:
            return None
        scale = plan.start.scale
        rest = [replace(term, scale=term.scale / scale) for term in plan.rest]
        joined = [other for term, other in zip(plan.rest, rest, strict=True) if term in plan.joined]
        factor = factor if scale == 1 else self._scaled(factor, scale)
        return Plan(replace(plan.start, scale=1.0), rest, joined, factor, len(rest) - len(joined) + 1)

    def _terms(self, node: Node, factor: Any, scale: float, tree: set[Node], root: Node) -> list[Term]:
        inner = node is root or (len(node.users) == 1 and node not in self._outputs)
        if not inner or not self._is_linear(node):
            return [Term(node, factor, scale)]
        arguments: tuple[Any, ...] = (*node.args, None)
        first, second = arguments[:2]
        keywords: dict[str, Any] = node.kwargs
        branches: list[tuple[Node, Any, float]] = []
        if node.target in ADD:
            sign = ADD[node.target] * keywords.get("alpha", 1)
            branches = [(first, factor, scale), (second, factor, scale * sign)]
            branches = [branch for branch in branches if branch[0] not in self._zeros]
        elif node.target is _aten.neg.default:
            branches = [(first, factor, -scale)]
        elif node.target in self._slopes:
            place = next(argument for argument in node.args[1:] if isinstance(argument, Node))
            shape = self._shape(place)
            one = Factor(_aten.new_ones.default, (place, ()), (), torch.Size())
            ones = Factor(_aten.expand.default, (one, tuple(shape)), (), shape)
            slope = Factor(node.target, (ones, *node.args[1:]), tuple(sorted(keywords.items())), shape)
            branches = [(first, self._times(factor, slope), scale)]
        else:
            moving, fixed = (first, second) if first in self._moving else (second, first)
            if not isinstance(fixed, Node):
                branches = [(moving, factor, scale / fixed if node.target in DIVIDE else scale * fixed)]
            else:
                if node.target in DIVIDE:
                    fixed = Factor(_aten.reciprocal.default, (fixed,), (), self._shape(fixed))
                branches = [(moving, self._times(factor, fixed), scale)]
        if any(new is TOO_LARGE for _, new, _ in branches):
            return [Term(node, factor, scale)]
        tree.add(node)
        return [term for branch in branches for term in self._terms(*branch, tree, root)]

    def _gathered(self, terms: list[Term]) -> list[Term]:
        """One term for each base, where its factor is not larger than the factors that it is the sum of."""
        kept: list[Term] = []
        for term in terms:
            same = next((i for i, other in enumerate(kept) if other.base is term.base), None)
            total = None if same is None else self._sum(kept[same], term)
            if same is None or total is None:
                kept.append(term)
            else:
                kept[same] = total
        return kept

    def _sum(self, left: Term, right: Term) -> Term | None:
        if left.factor == right.factor:
            return Term(left.base, left.factor, left.scale + right.scale)
        if left.factor is None:
            left, right = right, left
        scaled = self._scaled(left.factor, left.scale)
        if right.factor is None:
            return Term(left.base, Factor(_aten.add.Scalar, (scaled, right.scale), (), scaled.shape), 1.0)
        other = self._scaled(right.factor, right.scale)
        total = combined(_aten.add.Tensor, scaled, other, scaled.shape, other.shape)
        return None if total is TOO_LARGE else Term(left.base, total, 1.0)

    def _scaled(self, factor: Node | Factor | None, scale: float) -> Factor:
        return Factor(_aten.mul.Scalar, (factor, scale), (), self._shape(factor))

    def _times(self, left: Any, right: Any) -> Any:
        if left is None:
            return right
        return combined(_aten.mul.Tensor, left, right, self._shape(left), self._shape(right))

    def _first(self, term: Term, own: bool) -> tuple[Node, bool]:
        """The first term, and whether its memory may be written to."""
        if own or (term.factor is None and term.scale == 1):
            return term.base, own
        base, scale = term.base, term.scale
        smaller = isinstance(term.factor, Node) and self._shape(base).numel() < self._shape(term.factor).numel()
        if smaller and scale != 1:  # a scaled factor would be one more to keep
            base, scale = self._graph.call_function(_aten.mul.Scalar, (base, scale)), 1.0
        factor = scale if term.factor is None else self._made_of(term.factor, scale)
        operation = _aten.mul.Scalar if term.factor is None else _aten.mul.Tensor
        return self._graph.call_function(operation, (base, factor)), True

    def _accumulated(self, result: Node, term: Term, *, in_place: bool, joined: bool) -> Node:
        keywords: dict[str, Any] = {"alpha": term.scale} if term.scale != 1 else {}
        if joined:
            operation = _PRODUCT[term.base.target]  # type: ignore[index]  # a node of that kind
            return self._graph.call_function(operation, (result, *term.base.args), keywords)
        if term.factor is None:
            operation = _aten.add_.Tensor if in_place else _aten.add.Tensor
            return self._graph.call_function(operation, (result, term.base), keywords)
        operation = _aten.addcmul_.default if in_place else _aten.addcmul.default
        keywords = {"value": term.scale} if term.scale != 1 else {}  # a scaled factor would be one more to keep
        return self._graph.call_function(operation, (result, term.base, self._made_of(term.factor)), keywords)

    def _made_of(self, factor: Node | Factor, scale: float = 1.0) -> Node:
        """The node of a factor, made where it does not exist."""
        if scale != 1:
            return self._made_of(self._scaled(factor, scale))
        if isinstance(factor, Node):
            return factor
        if factor not in self._made:
            arguments = tuple(self._made_of(a) if isinstance(a, Factor) else a for a in factor.arguments)
            self._made[factor] = self._graph.call_function(factor.target, arguments, dict(factor.keywords))
        return self._made[factor]

    def _replace(self, root: Node, result: Node, tree: set[Node]) -> None:
        recording = self._recording
        storage = recording.storage[root]
        root.replace_all_uses_with(result)
        recording.outputs = [result if output is root else output for output in recording.outputs]
        if result in recording.storage:  # the tree was worth no more than its only base
            merge_storage(recording, storage, recording.storage[result])
        else:
            recording.storage[result] = storage
            recording.values[result] = recording.values[root]
            self._position[result] = self._position[root]
            self._moving.add(result)
        if root in self._outputs:
            self._outputs.add(result)
        pending = [root]
        while pending:
            node = pending.pop()
            if node.users or not (node is root or node in tree or node.target in _PRODUCT):
                continue
            pending += node.all_input_nodes
            self._graph.erase_node(node)
            recording.storage.pop(node, None)

    def _is_own_product(self, term: Term, tree: set[Node]) -> bool:
        """Whether the base is a product of matrices for this tree alone, to be taken as it is."""
        base = term.base
        alone = len(base.users) == 1 and next(iter(base.users)) in tree and base not in self._outputs
        return base.target in _PRODUCT and alone and term.factor is None and all(map(self._plain, self._with(base)))

    def _is_own_memory(self, term: Term, tree: set[Node]) -> bool:
        """Whether the base is a product for this tree alone, or a view of one."""
        base = term.base
        if base.target not in VIEWS or term.factor is not None or not self._plain(base):
            return self._is_own_product(term, tree)
        (source, *_) = base.all_input_nodes
        alone = all(len(node.users) == 1 and node not in self._outputs for node in (base, source))
        return alone and next(iter(base.users)) in tree and source.target in _PRODUCT

    @staticmethod
    def _with(node: Node) -> list[Node]:
        return [node, *node.all_input_nodes]

    def _one_moves(self, moving: Any, fixed: Any, node: Node) -> bool:
        if not (isinstance(moving, Node) and moving in self._moving and self._alike(moving, node)):
            return False
        if isinstance(fixed, Node):
            return fixed not in self._moving and self._alike(fixed, node) and self._plain(fixed)
        return isinstance(fixed, int | float) and math.isfinite(fixed) and fixed != 0

    def _plain(self, node: Node) -> bool:
        """Whether memory is only ever written to by the operation itself, and values are floating-point numbers."""
        known = self._recording.values.get(node)
        return (
            known is not None
            and known.dtype.is_floating_point
            and self._recording.storage[node] not in self._last_write
        )

    def _alike(self, node: Node, other: Node) -> bool:
        values = self._recording.values
        return node in values and values[node].dtype == values[other].dtype

    def _shape(self, factor: Any) -> torch.Size:
        return self._recording.values[factor].shape if isinstance(factor, Node) else factor.shape

    def _term_shape(self, term: Term) -> torch.Size:
        shape = self._shape(term.base)
        return shape if term.factor is None else torch.broadcast_shapes(shape, self._shape(term.factor))
