"""What torch's errors mean for the user of a product: the cause in their terms, and the remedy."""

from __future__ import annotations

from typing import NamedTuple

_DOUBLE_BACKWARD = "Use hessfunc.hvp_double_backward; for an operator, product=hessfunc.hvp_double_backward."
_CHECKPOINTING_REMEDY = (
    "Switch it off (model.gradient_checkpointing_disable(), or no torch.utils.checkpoint): a product keeps less for "
    "several small batches, data=[...], than for one large. In double backward it would recompute with other "
    "parameters and be wrong."
)
CHECKPOINTED = f"the loss uses gradient checkpointing, which cannot be differentiated twice. {_CHECKPOINTING_REMEDY}"


class _Cause(NamedTuple):
    """Fragments of torch's message, one of which tells the cause."""

    fragments: tuple[str, ...]
    problem: str
    remedy: str


# The first that fits counts.
_CAUSES = (
    _Cause(
        ("saved tensor hooks",),
        "uses gradient checkpointing, or other hooks on saved tensors, which torch.func cannot run",
        _CHECKPOINTING_REMEDY,
    ),
    _Cause(
        ("setup_context",),
        "calls an autograd.Function of the old style, without setup_context (reentrant checkpointing is one)",
        "Switch checkpointing off; give a function of your own setup_context and jvp, or use "
        "hessfunc.hvp_double_backward (product=hessfunc.hvp_double_backward).",
    ),
    _Cause(
        ("flex_attention", "FlexAttention"),
        "uses flex_attention, which has neither forward-mode nor second derivatives",
        "Write it with F.scaled_dot_product_attention and attn_mask, which a product runs in its elementary form.",
    ),
    _Cause(
        ("implement the jvp function",),
        "calls an autograd.Function without a jvp method",
        f"Write one (its tangents, from those of the inputs). Otherwise: {_DOUBLE_BACKWARD}",
    ),
    _Cause(
        ("CuDNN", "cudnn", "Cudnn"),
        "runs a recurrent layer of cuDNN, which cannot be differentiated twice",
        "Put the products inside `with torch.backends.cudnn.flags(enabled=False):`.",
    ),
    _Cause(
        ("MPS", "mps"),
        "uses an operation that is missing on the MPS device",
        "Move params and data to the CPU, or set PYTORCH_ENABLE_MPS_FALLBACK=1 before torch is imported.",
    ),
    _Cause(
        ("forward AD", "forward mode AD"),
        "uses an operation without forward-mode derivatives",
        _DOUBLE_BACKWARD,
    ),
    _Cause(
        ("requires_grad_()",),
        "takes derivatives on torch's own tape, which torch.func forbids (torch.func.grad would do)",
        _DOUBLE_BACKWARD,
    ),
    _Cause(
        ("mutate a captured Tensor",),
        "writes to a tensor made outside of it, as BatchNorm does in train mode to its running statistics",
        "Make the module functional with hessfunc.functionalize or hessfunc.module_loss, which copy the buffers for "
        "each call; or call model.eval(); or pass clones of the buffers.",
    ),
    _Cause(
        ("Inference tensors",),
        "uses tensors made under torch.inference_mode()",
        "Make them under torch.no_grad(), or clone them outside of inference mode.",
    ),
    _Cause(
        ("derivative for",),
        "uses an operation without a second derivative in torch",
        "Write it in other operations (embedding_bag: F.embedding(...).sum(1); cdist: differences and norms).",
    ),
)


def explained(error: RuntimeError, *, subject: str = "loss", remedy: str | None = None) -> RuntimeError:
    """A ``NotImplementedError`` that says what is wrong and what to do, or the error itself if it is none of torch's.

    Args:
        error: what torch raised in a product.
        subject: whose operations were run: ``"loss"`` or ``"model"``.
        remedy: what to say where the remedy would be another order of differentiation, if there is none.
    """
    text = str(error)
    for cause in _CAUSES:
        if any(fragment in text for fragment in cause.fragments):
            way_out = cause.remedy if remedy is None else cause.remedy.replace(_DOUBLE_BACKWARD, remedy)
            first = text.split(". ")[0].splitlines()[0].rstrip(".")
            return NotImplementedError(f"the {subject} {cause.problem}: {first}. {way_out}")
    return error
