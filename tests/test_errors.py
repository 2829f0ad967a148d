"""Every error of the foundation, reached through the public functions: what is wrong, and what to do about it."""

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded, world_of_one
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

import hessfunc as hf

PACKAGE = Path(hf.__file__).parent
MODULES = [
    *("_checks", "_products", "_compat", "_decompositions", "_module", "_restrict", "_data", "_operators"),
    *("_batched", "_lanczos", "_power", "_explain", "_witness", "_fingerprint", "_soundness"),
]
# Raised and caught inside, to start a product anew in another order.
INTERNAL = {"DeeperError", "_TrackedError"}

W = torch.tensor([1.0, 2.0])
H = hf.as_operator(torch.eye(2))
BAG = torch.tensor([[0, 1]])
TREE = {"a": torch.ones(2), "b": [torch.ones(1, 3)]}


def quartic(p, *_batch):
    return (p**4).sum()


def total(p):
    return p["a"].sum() ** 2 + p["b"][0].sum() ** 2


class Row(NamedTuple):
    call: Callable[[], object]
    error: type[Exception]
    text: str


def with_mesh(call):
    with world_of_one() as mesh:
        call(mesh)


def scripted():
    return torch.jit.script(nn.Linear(1, 1))


def physics(p):
    z = torch.ones(2, requires_grad=False).requires_grad_()
    return torch.autograd.grad((p * z**2).sum(), z, create_graph=True)[0].square().sum()


class Skewed(torch.autograd.Function):
    """A linear map whose backward pass is not its transpose."""

    @staticmethod
    def forward(x):
        return torch.stack([x[0] ** 2 + x[1], x[1]])

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.stack([2 * x[0] * gradient[0], gradient[1]])

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return torch.stack([2 * x[0] * tangent[0] + tangent[1], tangent[1]])


class Growing:
    """One batch, larger in each pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(self.passes * torch.ones(3, 2),)])


ROWS = {
    # params
    "no leaves": Row(
        lambda: hf.hvp(quartic, {}, {}), ValueError, r"^params holds no tensors; pass a tensor or a dict, list or tuple"
    ),
    "None as a leaf": Row(
        lambda: hf.hvp(total, {"a": None}, {"a": None}),
        TypeError,
        r"^params\['a'\] is of type NoneType, not a tensor; .* torch's pytrees count None as a leaf: leave "
        r"the entry out",
    ),
    "number as a leaf": Row(
        lambda: hf.hessian(total, {"a": W, "b": [3.0]}),
        TypeError,
        r"^params\['b.0'\] is of type float, not a tensor; every leaf must be one\.$",
    ),
    "integer leaf": Row(
        lambda: hf.hvp(quartic, torch.ones(2, dtype=torch.int64), W),
        TypeError,
        r"^params has dtype torch.int64; curvature needs real floating-point leaves. Close over integer, boolean and "
        r"complex tensors in the loss instead \(hessfunc.restrict selects leaves\)",
    ),
    "boolean leaf": Row(
        lambda: hf.restrict(quartic, {"m": W > 0}, "m"), TypeError, r"^params\['m'\] has dtype torch.bool"
    ),
    "complex leaf": Row(
        lambda: hf.hvp_double_backward(quartic, W + 0j, W), TypeError, r"^params has dtype torch.complex64"
    ),
    "several devices": Row(
        lambda: hf.hvp(total, {"a": W, "b": [torch.ones(1, device="meta")]}, TREE),
        ValueError,
        r"^params has leaves on several devices \(cpu, meta\); move them to one",
    ),
    "empty leaves": Row(
        lambda: hf.hessian(quartic, torch.ones(0)),
        ValueError,
        r"^params has leaves but no entries: every leaf is empty",
    ),
    "inside a transform": Row(
        lambda: torch.func.grad(lambda p: hf.hessian(quartic, p).vector(W).sum())(W),
        TypeError,
        r"^params are inside a torch.func transform \(vmap, grad or jvp\); an operator is built outside",
    ),
    # vectors
    "structure": Row(
        lambda: hf.hvp(total, TREE, {"a": TREE["a"], "b": (TREE["b"][0],)}),
        ValueError,
        r"^v has a different pytree structure from params: got dict with leaves \['a', 'b.0'\], expected dict with "
        r"leaves \['a', 'b.0'\]. Build it with hessfunc.tree.map_leaves over params",
    ),
    "structure of many leaves": Row(
        lambda: hf.hvp(total, {f"w{i}": W for i in range(9)}, W),
        ValueError,
        r"got Tensor with leaves \[''\], expected dict with leaves \['w0', .* 'w5', ... \(9 in all\)\]",
    ),
    "vector with a number in it": Row(
        lambda: hf.hvp(total, TREE, {"a": 1.0, "b": TREE["b"]}),
        TypeError,
        r"^v\['a'\] is of type float, expected a tensor like params",
    ),
    "shape": Row(
        lambda: hf.hvp_reverse_over_forward(total, TREE, {"a": torch.ones(3), "b": TREE["b"]}),
        ValueError,
        r"^v\['a'\] has shape \(3,\), expected \(2,\) as in params",
    ),
    "dtype": Row(
        lambda: hf.hvp_double_backward(quartic, W, W.double()),
        TypeError,
        r"^v has dtype torch.float64, but params has torch.float32 there; convert it with .to\(torch.float32\)",
    ),
    "device": Row(
        lambda: hf.hvp(quartic, W, torch.ones(2, device="meta")),
        ValueError,
        r"^v is on meta, but params is on cpu; move it",
    ),
    "leading axes": Row(
        lambda: hf.as_operator(lambda v: v, TREE).matmat({"a": torch.ones(2, 2), "b": [torch.ones(3, 1, 3)]}),
        ValueError,
        r"^vectors has leading axes of different lengths \[2, 3\]; all leaves need one K",
    ),
    "no leading axis": Row(
        lambda: hf.as_operator(lambda v: v, torch.tensor(1.0)).matmat(torch.tensor(1.0)),
        ValueError,
        r"^vectors has shape \(\), expected \('K',\) as in H.like",
    ),
    "flat shape": Row(
        lambda: H.vector(torch.ones(3)),
        ValueError,
        r"^the flat vector has shape \(3,\), expected \(2,\); H.layout.ravel makes one",
    ),
    "flat dtype": Row(
        lambda: H.rows(torch.ones(1, 2).double()),
        TypeError,
        r"^the flat vector has dtype torch.float64, expected torch.float32; convert it with .to\(\)",
    ),
    # losses
    "loss of the wrong type": Row(
        lambda: hf.hvp(lambda p: {"loss": p.sum()}, W, W),
        TypeError,
        r"^loss returned dict, expected a scalar tensor; for a model output with a .loss field return that field",
    ),
    "loss of the wrong shape": Row(
        lambda: hf.hvp(lambda p: p**2, W, W),
        ValueError,
        r"^loss returned a tensor of shape \(2,\), expected a scalar of shape \(\); reduce it with .mean\(\) "
        r"or .sum\(\)",
    ),
    "loss of one entry": Row(
        lambda: hf.hvp_double_backward(lambda p: p.sum().reshape(1), W, W), ValueError, r"tensor of shape \(1,\)"
    ),
    "integer loss": Row(
        lambda: hf.hvp_reverse_over_forward(lambda p: (p > 0).sum(), W, W),
        TypeError,
        r"^loss returned dtype torch.int64, expected a real floating-point scalar",
    ),
    "complex loss": Row(
        lambda: hf.hvp(lambda p: (p * 1j).sum(), W, W), TypeError, r"^loss returned dtype torch.complex64"
    ),
    "loss not finite": Row(
        lambda: hf.hessian(lambda p: (p - 3).sum().log(), W),
        hf.NonFiniteError,
        r"^the loss of batch 0 is NaN or infinite; curvature is not defined there; check params and data",
    ),
    "loss arguments": Row(
        lambda: hf.hessian(lambda p: p.sum(), W, (W, W)),
        TypeError,
        r"^loss\(params, \*batch\) failed on the first batch, which holds 2 item\(s\): .*Does the loss take "
        r"params first",
    ),
    "product not finite": Row(
        lambda: hf.hessian(lambda p: p.abs().pow(1.5).sum(), W * 0)(W),
        hf.NonFiniteError,
        r"^the Hessian-vector product on batch 0 is NaN or infinite; look at the loss and its gradient there",
    ),
    # operations
    "no forward mode": Row(
        lambda: hf.hvp(lambda p: torch.cdist(p.reshape(1, 2), W.reshape(1, 2)).sum(), W, W),
        NotImplementedError,
        r"^the loss uses an operation without forward-mode derivatives: .*_cdist_forward.*Use "
        r"hessfunc.hvp_double_backward; "
        r"for an operator, product=hessfunc.hvp_double_backward",
    ),
    "no forward mode in the other order": Row(
        lambda: hf.hvp_reverse_over_forward(lambda p: torch.cdist(p.reshape(1, 2), W.reshape(1, 2)).sum(), W, W),
        NotImplementedError,
        r"^the loss uses an operation without forward-mode derivatives",
    ),
    "torch's tape inside": Row(
        lambda: hf.hvp(physics, W, W),
        NotImplementedError,
        r"^the loss takes derivatives on torch's own tape, which torch.func forbids \(torch.func.grad would do\): .*"
        r"Use hessfunc.hvp_double_backward",
    ),
    "wrong order": Row(
        lambda: hf.hvp_reverse_over_forward(lambda p: torch.linalg.det(torch.outer(p, p)), W, W),
        NotImplementedError,
        r"^the loss calls linalg_det, which torch differentiates wrongly or not at all in this order; use hessfunc.hvp "
        r"without differentiating it further, or an equivalent \(linalg.inv, linalg.lu and the normalizations of",
    ),
    "wrong in forward mode": Row(
        lambda: hf.hvp(lambda p: torch.ones(1).scatter_reduce(0, torch.tensor([0, 0]), p, reduce="prod").sum(), W, W),
        NotImplementedError,
        r"^the loss calls scatter_reduce, which torch differentiates wrongly .*; use hessfunc.hvp_double_backward\.$",
    ),
    "third derivative of a determinant": Row(
        lambda: torch.func.grad(lambda p: hf.hvp(lambda q: torch.logdet(q), p, torch.eye(2)).sum())(torch.eye(2)),
        NotImplementedError,
        r"^the loss calls logdet",
    ),
    "unknown reduction": Row(
        lambda: hf.hvp(lambda p: F.huber_loss(p, W, reduction="max"), W, W),
        ValueError,
        r"^reduction='max' is not known; expected 'mean'",
    ),
    "unknown reduction of mse": Row(
        lambda: hf.hvp(lambda p: F.mse_loss(p, W, reduction="max"), W, W),
        ValueError,
        r"^reduction='max' is not known; expected 'mean', 'sum' or 'none'",
    ),
    "no second derivative": Row(
        lambda: hf.hvp_double_backward(lambda p: F.embedding_bag(BAG, p.reshape(2, 1)).square().sum(), W, W),
        NotImplementedError,
        r"^the loss uses an operation without a second derivative in torch: .*_embedding_bag_backward.*Write it in "
        r"other operations",
    ),
    "gradient checkpointing": Row(
        lambda: hf.hvp_double_backward(lambda p: checkpoint(torch.tanh, p, use_reentrant=False).sum(), W, W),
        NotImplementedError,
        r"^the loss uses gradient checkpointing, which cannot be differentiated twice. Switch it off",
    ),
    # the checks at the first product
    "random loss": Row(
        lambda: hf.hessian(lambda p: (p * F.dropout(torch.linspace(1, 2, 64).outer(p), 0.5)).square().sum(), W)(W),
        ValueError,
        r"^the loss is not deterministic: on one batch it is .* and then .* It draws random numbers in aten.bernoulli.*"
        r"Call model.eval\(\) if that is dropout.*check=False leaves this check out\.$",
    ),
    "asymmetric product": Row(
        lambda: hf.hessian(lambda p: Skewed.apply(p).square().sum(), W)(W),
        ValueError,
        r"^the Hessian-vector product is not symmetric: .* differ by .* of their size on the first batch.*It calls the "
        r"autograd.Function Skewed\. .*check=False leaves this check out\.$",
    ),
    "data that change": Row(
        lambda: [H(W) for H in [hf.hessian(lambda p, x: (p * x).pow(4).sum(), W, Growing())] for _ in range(2)],
        ValueError,
        r"^data: this pass over the Growing saw other numbers than the first one, .* Pass a fixed list of batches, "
        r"such as list\(loader\)\. check=False leaves this check out\.$",
    ),
    # modules
    "no module": Row(
        lambda: hf.functionalize(torch.tanh),
        TypeError,
        r"^model is of type builtin_function_or_method, expected an nn.Module; a plain function needs no "
        r"wrapping: pass",
    ),
    "script": Row(
        lambda: hf.functionalize(scripted()),
        TypeError,
        r"^model is a ScriptModule, which torch.func cannot run; pass the",
    ),
    "wrapped": Row(
        lambda: hf.functionalize(nn.DataParallel(nn.Linear(1, 1))),
        TypeError,
        r"^model is wrapped in DataParallel; pass the bare module, model.module",
    ),
    "wrapped inside": Row(
        lambda: hf.functionalize(nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))),
        TypeError,
        r"^model.0 is wrapped in DataParallel; put the bare module in its place, model.0.module",
    ),
    "module split over processes": Row(
        lambda: with_mesh(lambda mesh: hf.functionalize(fully_shard(nn.Linear(1, 1), mesh=mesh))),
        TypeError,
        r"^model is a FSDPLinear with parameters that are split over processes \(FSDP, tensor parallelism\), .*Load "
        r"the whole state dict, .* into a plain module",
    ),
    "parameter split over processes": Row(
        lambda: with_mesh(lambda mesh: hf.hessian(total, {"a": distribute_tensor(W, mesh)})),
        TypeError,
        r"^params\['a'\] is a DTensor, .*Pass the whole tensor, leaf.full_tensor\(\)",
    ),
    "frozen": Row(
        lambda: hf.functionalize(nn.ReLU()),
        ValueError,
        r"^model has no trainable parameter: every parameter has requires_grad=False. Unfreeze those to analyze",
    ),
    "criterion": Row(
        lambda: hf.module_loss(nn.Linear(1, 1), "mse"),
        TypeError,
        r"^criterion is of type str, expected a callable \(output, target\)",
    ),
    "batch of a module": Row(
        lambda: hf.module_loss(nn.Linear(1, 1), nn.MSELoss()).loss({}, W),
        TypeError,
        r"^a batch of module_loss needs inputs and a target, got 1 item\(s\). For other batches write the loss closure",
    ),
    # restrictions
    "nothing selected": Row(
        lambda: hf.restrict(total, TREE, lambda _: False), ValueError, r"matches no leaf; the leaves are 'a', 'b.0'\.$"
    ),
    "pattern without a match": Row(
        lambda: hf.restrict(total, TREE, ["a", "c*"]),
        ValueError,
        r"^select: 'c\*' matches no leaf; the leaves are 'a', ",
    ),
    "names shared": Row(
        lambda: hf.restrict(total, {"a.b": W, "a": {"b": W}}, "a.b"),
        ValueError,
        r"^params has 2 leaves named 'a.b'; rename one to tell them apart",
    ),
    "selection of the wrong type": Row(
        lambda: hf.restrict(total, TREE, 0),
        TypeError,
        r"^select holds 0 of type int; expected names or patterns of leaves",
    ),
    # data
    "tensor as data": Row(
        lambda: hf.hessian(quartic, W, W),
        TypeError,
        r"^data is a tensor; pass a tuple for one batch, data=\(inputs,\) or data=\(inputs, targets\), or a "
        r"list of such",
    ),
    "iterator as data": Row(
        lambda: hf.hessian(quartic, W, iter([(W,)])),
        TypeError,
        r"^data is a list_iterator, which is exhausted after one pass; every product needs a pass of its own. "
        r"Pass list",
    ),
    "number as data": Row(
        lambda: hf.hessian(quartic, W, 3),
        TypeError,
        r"^data is of type int; expected a tuple \(one batch\), or a list, DataLoader or other re-iterable of batches",
    ),
    "empty data": Row(
        lambda: hf.hessian(quartic, W, []),
        ValueError,
        r"^data is empty: a pass over it yielded no batch. If it worked before, it can be iterated over only once",
    ),
    "unclear count": Row(
        lambda: hf.hessian(quartic, W, [(torch.ones(2), torch.ones(3))]),
        ValueError,
        r"^the sample count of batch 0 is unclear: it holds tensors of leading lengths \[2, 3\]. Pass count=, "
        r"a function",
    ),
    "count that is no function": Row(
        lambda: hf.hessian(quartic, W, [(W,)], count="size"),
        TypeError,
        r"^count is 'size', expected a function from a batch to its number of samples",
    ),
    "count out of range": Row(
        lambda: hf.hessian(quartic, W, [(W,)], count=lambda _: -2),
        ValueError,
        r"^count is -2.0 for batch 0; every batch needs a positive sample count",
    ),
    "reduction": Row(
        lambda: hf.hessian(quartic, W, reduction="batchmean"),
        ValueError,
        r"^reduction='batchmean' is not known; expected one of 'mean', 'sum'",
    ),
    # operators
    "matrix": Row(
        lambda: hf.as_operator(torch.ones(2, 3)),
        ValueError,
        r"^matvec is a tensor of shape \(2, 3\); a matrix must be square",
    ),
    "matrix and like": Row(
        lambda: hf.as_operator(torch.eye(2), torch.ones(3)),
        ValueError,
        r"^like holds 3 numbers, but the matrix has 2 rows",
    ),
    "no like": Row(
        lambda: hf.as_operator(lambda v: v),
        ValueError,
        r"^like is missing; pass a pytree with the structure, shapes and dtypes of the vectors",
    ),
    "operator of one point": Row(
        lambda: H.at(torch.ones(2)),
        ValueError,
        r"^the operator belongs to one point and cannot move; build it anew there\. hessfunc\.hessian, ggn and fisher",
    ),
    "terms of operators over other data": Row(
        lambda: list(
            (hf.hessian(quartic, W, reduction="sum") + hf.hessian(quartic, W, [(), ()], reduction="sum")).terms()
        ),
        ValueError,
        r"^the operators that were added are over other batches, or weigh them otherwise",
    ),
    "operators that do not fit": Row(
        lambda: H + hf.as_operator(torch.eye(3)),
        ValueError,
        r"^other.like has shape \(3,\), expected \(2,\) as in H.like",
    ),
    # options
    "count of the wrong type": Row(
        lambda: hf.lanczos(H.vector, W, 1.5), TypeError, r"^num_steps is 1.5 of type float, expected an int"
    ),
    "bool as a count": Row(
        lambda: hf.hessian(quartic, W, chunk_size=True), TypeError, r"^chunk_size is True of type bool, expected an int"
    ),
    "count above its range": Row(
        lambda: hf.lanczos(H.vector, W, 3),
        ValueError,
        r"^num_steps=3 is out of range; expected 1 <= num_steps <= 2, the number of entries of v0",
    ),
    "count below its range": Row(
        lambda: hf.power_iteration(H.vector, W, 0),
        ValueError,
        r"^num_steps=0 is out of range; expected 1 <= num_steps\.$",
    ),
    "choice": Row(
        lambda: hf.lanczos(H.vector, W, 1, reorthogonalize="half"),
        ValueError,
        r"^reorthogonalize='half' is not known; expected one of 'full', 'none'",
    ),
    "number of the wrong type": Row(
        lambda: hf.eigsh(H, 1, tol="1e-3", generator=seeded()),
        TypeError,
        r"^tol is '1e-3' of type str, expected a positive number",
    ),
    "number out of range": Row(
        lambda: hf.eigsh(H, 1, tol=float("inf"), generator=seeded()),
        ValueError,
        r"^tol=inf is out of range; expected a finite number above 0",
    ),
    "generator": Row(
        lambda: hf.eigsh(H, 1, generator=0),
        TypeError,
        r"^generator is of type int, expected a torch.Generator, for example torch.Generator\(\).manual_seed\(0\)",
    ),
    "start vector": Row(lambda: hf.lanczos(H.vector, [], 1), ValueError, r"^v0 holds no tensors"),
    "tridiagonal shapes": Row(
        lambda: hf.eigh_tridiagonal(W, W),
        ValueError,
        r"^alphas has shape \(2,\), betas \(2,\); expected \(..., m\) and",
    ),
    "tridiagonal values": Row(
        lambda: hf.eigh_tridiagonal(W * float("nan"), W[:1]),
        hf.NonFiniteError,
        r"^alphas or betas are NaN or infinite; a product of the operator was not finite",
    ),
}


def raised_at(row):
    """File and line of the ``raise`` that a row reaches inside the package."""
    try:
        row.call()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == PACKAGE]
        return Path(frames[-1].filename).stem, frames[-1].lineno
    raise AssertionError("no error")


@pytest.mark.parametrize("name", ROWS)
def test_the_error_says_what_is_wrong_and_what_to_do(name):
    row = ROWS[name]
    with pytest.raises(row.error, match=row.text) as caught:
        row.call()
    assert type(caught.value) is row.error


def test_every_raise_of_the_foundation_is_reached():
    reached = {raised_at(row) for row in ROWS.values()}
    missed = []
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if not isinstance(node, ast.Raise) or (isinstance(node.exc, ast.Name) and node.exc.id in INTERNAL):
                continue
            if not any(name == module and node.lineno <= line <= node.end_lineno for name, line in reached):
                missed.append(f"{module}.py:{node.lineno} {ast.unparse(node)[:90]}")
    assert not missed, missed


def test_errors_leave_no_transform_behind():
    """A product works after each kind of failure inside the nested transforms."""
    for name in ("loss of the wrong shape", "no forward mode", "torch's tape inside", "wrong order", "loss arguments"):
        with pytest.raises(ROWS[name].error):
            ROWS[name].call()
        assert hf.hvp(quartic, W, W).tolist() == [12.0, 96.0]
        assert torch._C._functorch.get_interpreter_stack() is None
        assert torch.autograd.forward_ad._current_level == -1
        assert torch.is_grad_enabled()
