"""The Hessian of a loss over a data set, as an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hessfunc._batched import over_batches
from hessfunc._operators import Operator
from hessfunc._products import hvp, hvp_double_backward, hvp_drawn, hvp_reverse_over_forward, hvp_unchecked
from hessfunc._rules import Product, Rule
from hessfunc._typing import Batch, Loss, Params


def hessian(
    loss: Loss,
    params: Params,
    data: Any = (),
    *,
    reduction: str = "mean",
    count: Callable[[Batch], float] | None = None,
    product: Product | None = None,
    chunk_size: int | None = None,
    linearize: bool = True,
    memory_budget: int | None = None,
    compile: bool = False,
    check: bool = True,
) -> Operator:
    """The Hessian of ``loss`` at ``params`` over all of ``data``, as a matvec.

    With ``reduction="mean"`` it is that of ``sum_b n_b loss_b / sum_b n_b`` over batches ``b`` of ``n_b`` samples,
    which is exact for a ragged last batch; with ``"sum"`` that of ``sum_b loss_b``. Each call of ``rows`` or
    ``matmat`` makes one pass over the data, whatever the number of vectors.

    Which matrix: the Hessian for questions about the loss itself: saddle points and negative curvature, sharpness, the
    largest stable step size. [`ggn`][hessfunc.ggn] where no eigenvalue may be negative, and for the outliers of
    classifiers. [`fisher`][hessfunc.fisher] with ``kind="empirical"`` for the second moment of the gradients, that is
    their noise. ``hessian(...) - ggn(...)`` and ``hessian(...).shift(weight_decay)`` are operators as well.

    Args:
        loss: ``loss(params, *batch) -> scalar``, mean-reduced over its batch unless ``reduction="sum"``.
        params: pytree of floating-point tensors; taken detached, so ``requires_grad`` does not matter.
        data: a tuple is one batch, passed as ``loss(params, *batch)``; a mapping is one batch, passed as
            ``loss(params, batch)``; a list, DataLoader or other re-iterable is many such batches. The default is
            for a loss of the parameters alone. Tensors are moved to the parameters' device.
        reduction: ``"mean"`` or ``"sum"``: how ``loss`` reduces over a batch.
        count: what a batch weighs under ``"mean"``, for instance the number of tokens that count; by default the
            length of the leading axis its tensors share.
        product: the product to use: ``hessfunc.hvp``, ``hvp_reverse_over_forward`` or ``hvp_double_backward``. The
            default is the first, and another of them after a ``ProductWarning`` where the loss uses an operation that
            lacks a derivative for it; one that is given here is the only one.
        chunk_size: largest number of vectors to push through one batch together; by default at most 8, and fewer
            where operations are large enough not to gain, or are convolutions, which lose.
        linearize: trace the product once for each shape of batch and evaluate what does not depend on the vector once
            per batch and pass (see ``hessfunc/_linearize.py``). The loss must then not depend on anything that changes
            between products besides its arguments. What cannot be traced runs without, after a ``ProductWarning``.
        memory_budget: bytes to spend on what does not depend on the vector, so that it is not evaluated anew for each:
            up to twice the memory of a gradient for each batch. Batches that it has room for keep theirs from pass to
            pass; those of a DataLoader share theirs between the vectors of one pass. Without room a product runs as one
            program that frees each value at its last use, which takes two thirds of the memory of double backprop and
            about 1.5 times as long as with room; 0 asks for that throughout, from the first product on. The default
            keeps a quarter of the free memory and always shares within a pass.
        compile: compile what depends on the vector with ``torch.compile``, which takes a minute or so for each
            shape of batch and a compiler on the machine; the first product is checked against the eager one.
        check: find out at the first product whether the loss gives the same value twice and whether the product is
            symmetric, and in each pass over a loader whether it yields what it did in the first. Costs two evaluations
            of the loss and two products on the first batch, which no ``num_matvecs`` counts, and a sum over the data
            per pass over a loader. Rounding is not taken for asymmetry. Without it a product with 65,536 parameters and
            more is not compared with an eager one either, which takes several gradients.

    Raises:
        ValueError: empty data, non-scalar loss, unclear sample count, an option out of range; later ``check`` found a
            random loss, an asymmetric product, or data that change from pass to pass.
        TypeError: an integer leaf, an exhausted iterator, arguments that do not fit the loss.
        NonFiniteError: the loss of the first batch, or later a product, is NaN or infinite.
        NotImplementedError: at the first product; an operation lacks the derivatives that every ``product`` needs.

    Warns:
        ProductWarning: the product could not be traced, or ``hvp`` could not give it and another ``product`` does.

    Example:
        >>> import torch, hessfunc as hf
        >>> loss = lambda w, x, y: ((x @ w - y) ** 2).mean() / 2
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> whole = hf.hessian(loss, torch.zeros(2), (x, torch.zeros(3)))
        >>> batched = hf.hessian(loss, torch.zeros(2), [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))])
        >>> whole(torch.ones(2)), batched(torch.ones(2))
        (tensor([0.3333, 1.3333]), tensor([0.3333, 1.3333]))
    """
    by_default = Rule(hvp_unchecked, lighter=hvp_drawn)
    if product is None:
        others = (Rule(other, vmappable=False) for other in (hvp_reverse_over_forward, hvp_double_backward))
        rules = [by_default, *others]
    else:
        rules = [by_default if product is hvp else Rule(product, vmappable=product is not hvp_double_backward)]
    return over_batches(
        rules,
        loss,
        params,
        data,
        name="Hessian-vector product",
        reduction=reduction,
        count=count,
        chunk_size=chunk_size,
        linearize=linearize,
        memory_budget=memory_budget,
        compile=compile,
        check=check,
    )
