"""A curvature product summed over all batches of a data set, as an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch._C import _functorch

from hessfunc import tree
from hessfunc._checks import check_count, check_finite, check_loss_value, check_params
from hessfunc._compat import evaluated
from hessfunc._data import Batches
from hessfunc._fingerprint import Fingerprint
from hessfunc._operators import Operator
from hessfunc._rules import Programs, Rule
from hessfunc._soundness import Soundness
from hessfunc._terms import Rows, Term, Terms
from hessfunc._traced import TracedProduct
from hessfunc._typing import Batch, Loss, Params, Tensor


def over_batches(
    rules: Sequence[Rule],
    loss: Loss,
    params: Params,
    data: Any,
    *,
    name: str,
    reduction: str,
    count: Callable[[Batch], float] | None,
    chunk_size: int | None,
    linearize: bool,
    memory_budget: int | None,
    compile: bool = False,
    check: bool = True,
    extend: Callable[[int, tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Operator:
    """A product over ``data``, weighted as the loss is; the arguments are those of [`hessian`][hessfunc.hessian].

    Args:
        rules: ways to compute the product, each for where those before it lack a derivative.
        loss: what the product is of.
        params: the point.
        data: one batch or a re-iterable of batches.
        name: what to call a product in error messages.
        reduction: ``"mean"`` or ``"sum"``.
        count: what a batch weighs under ``"mean"``.
        chunk_size: largest number of vectors to push through one batch together.
        linearize: whether to trace the product.
        memory_budget: bytes for residuals kept from pass to pass.
        compile: whether to compile the tangent program.
        check: whether to check the loss, the product and the data ([`Soundness`][hessfunc._soundness.Soundness]).
        extend: ``extend(position, batch)`` gives the arguments of the product from those of the loss; it must return
            the same objects in every pass where the batch is the same object.
    """
    programs, check_first = Programs(*rules, eager=not linearize), check

    def product(*arguments: Any) -> Params:
        return programs.rule.product(*arguments)

    def at(point: Params, check: bool = False) -> Operator:
        params, batches = checked_point(
            loss, point, data, reduction=reduction, count=count, chunk_size=chunk_size, memory_budget=memory_budget
        )
        rows, terms = summed(
            loss,
            params,
            batches,
            name=name,
            programs=programs,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            compile=compile,
            compare=check_first,
            extend=extend,
            sound=Soundness(product, loss, params, data, name=name) if check else None,
        )
        # What extends the batches may depend on the point, as sampled targets do.
        return Operator(params, rows, move=at if extend is None else None, terms=terms)

    return at(params, check)


def checked_point(
    loss: Loss,
    params: Params,
    data: Any,
    *,
    reduction: str,
    count: Callable[[Batch], float] | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Params, Batches]:
    """Detached parameters and the data in batches, once both and the loss of the first batch are as they must be."""
    check_params(params)
    if any(_functorch.is_functorch_wrapped_tensor(leaf) for leaf in tree.leaves(params)):
        raise TypeError(
            "params are inside a torch.func transform (vmap, grad or jvp); an operator is built outside. Give kernels "
            "the product itself: hessfunc.lanczos(lambda v: hessfunc.hvp(loss, params, v, *batch), v0, num_steps)."
        )
    if chunk_size is not None:
        check_count(chunk_size, name="chunk_size")
    if memory_budget is not None:
        check_count(memory_budget, name="memory_budget", minimum=0)
    params = tree.detach(params)
    batches = Batches.of(data, reduction=reduction, count=count, device=tree.leaves(params)[0].device)
    _check_first_batch(loss, params, batches)
    return params, batches


def summed(
    loss: Loss,
    params: Params,
    batches: Batches,
    *,
    name: str,
    programs: Programs,
    chunk_size: int | None,
    memory_budget: int | None,
    compile: bool = False,
    compare: bool = True,
    extend: Callable[[int, tuple[Any, ...]], tuple[Any, ...]] | None = None,
    domain: tree.Layout | None = None,
    image: tree.Layout | None = None,
    sound: Soundness | None = None,
) -> tuple[Rows, Terms]:
    """The product of ``programs`` summed over the batches with their weights, as a map on flat rows, and its terms.

    It is linear, but need not be from parameters to parameters: ``domain`` and ``image`` say how vectors and results
    lie where they are of another kind. ``sound`` looks at the first products, ``compare`` says that the recorded one is
    to be compared with an eager one. The other arguments are those of [`over_batches`][].
    """
    traced = TracedProduct(
        loss,
        params,
        programs=programs,
        max_lanes=chunk_size,
        memory_budget=memory_budget,
        compile=compile,
        compare=compare,
        domain=domain,
        image=image,
    )

    def terms() -> Iterator[Term]:
        seen = Fingerprint()
        for position, (batch, weight) in enumerate(batches):
            arguments = batch if extend is None else extend(position, batch)
            held = batches.holds(arguments, position)
            way: dict[str, Any] = {"batch": arguments, "position": position, "keep": batches.stable, "held": held}
            if sound is not None:
                if position == 0:
                    sound.of_batch(batch, arguments, partial(traced.rows, **way), partial(traced.prepare, **way))
                if not batches.stable:
                    seen.add(batch)
            yield Term(partial(_finite, traced, name, **way), weight, batches.divisor(position, weight))
        if sound is not None and not batches.stable:
            sound.of_pass(seen)

    @torch.no_grad()
    def rows(rows: Tensor) -> Tensor:
        total, divisor = None, 0.0
        for products_of, weight, share in terms():
            products = products_of(rows)
            divisor += share
            if total is None:
                total = products if weight == 1 else weight * products
            else:
                total.add_(products, alpha=weight)
        assert total is not None  # an empty pass raises
        return total if divisor == 1 else total.div_(divisor)

    return rows, terms


@torch.no_grad()
def _finite(traced: TracedProduct, name: str, rows: Tensor, *, position: int, **way: Any) -> Tensor:
    """Products with rows on one batch, none of them NaN or infinite."""
    products = traced.rows(rows, position=position, **way)
    check_finite(
        products,
        what=f"the {name} on batch {position}",
        remedy="look at the loss and its gradient there (log of 0, sqrt at 0, overflow in low precision).",
    )
    return products


def _check_first_batch(loss: Loss, params: Params, batches: Batches) -> None:
    batch, _ = next(iter(batches))
    try:
        value = evaluated(loss, params, *batch)
    except TypeError as error:
        raise TypeError(
            f"loss(params, *batch) failed on the first batch, which holds {len(batch)} item(s): {error}. A tuple "
            "as data is one batch; a list is several. Does the loss take params first and then these items?"
        ) from error
    check_loss_value(value)
    check_finite(
        value.detach(), what="the loss of batch 0", remedy="curvature is not defined there; check params and data."
    )
