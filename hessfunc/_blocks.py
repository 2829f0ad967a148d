"""Spectra of diagonal blocks: each group of parameters with all others held fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from hessfunc import tree
from hessfunc._checks import check_count, check_generator, check_params
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._eigsh import eigsh
from hessfunc._estimate import Estimate
from hessfunc._hessian import hessian
from hessfunc._operators import Operator
from hessfunc._quadrature import Quadrature
from hessfunc._restrict import Select, restrict
from hessfunc._slq import slq
from hessfunc._trace import hutchinson
from hessfunc._typing import Loss, Params

Blocks: TypeAlias = str | Iterable[str] | Mapping[str, Select]


@dataclass(frozen=True)
class BlockSpectrum:
    """One diagonal block.

    Attributes:
        name: the block's name.
        leaf_names: dotted names of the leaves in it.
        size: number of parameters in it.
        eigenpairs: its extreme pairs, with residuals; the vectors are dicts from leaf name to tensor.
        trace: its trace, with its standard error.
        density: its quadrature (``.density()``, ``.moment(p)``), or ``None`` if ``num_steps`` was 0.
        num_matvecs: products with the block spent in all.
    """

    name: str
    leaf_names: tuple[str, ...]
    size: int
    eigenpairs: Eigenpairs = field(repr=False)
    trace: Estimate
    density: Quadrature | None = field(repr=False)
    num_matvecs: int


def block_spectra(
    loss: Loss,
    params: Params,
    data: Any = (),
    *,
    blocks: Blocks = "leaf",
    k: int = 1,
    which: str = "LM",
    tol: float = 1e-3,
    num_probes: int = 16,
    num_steps: int = 20,
    operator: Callable[..., Operator] = hessian,
    generator: torch.Generator,
    **options: Any,
) -> dict[str, BlockSpectrum]:
    """Eigenvalues, trace and spectral density of each diagonal block of the Hessian.

    Block ``b`` is ``d^2 loss / d params_b^2`` with all other parameters held fixed. Products between blocks are left
    out on purpose: the eigenvalues of the blocks are those of the block-diagonal part of the Hessian, not of the
    whole. The traces do add up to the whole trace if the blocks share no leaf and cover all; the largest eigenvalue
    of the whole is at least the largest of any block, and may be much larger.

    Where traces and diagonals are all that is wanted, [`hutchinson`][hessfunc.hutchinson] (``.per_leaf``) and
    [`diagonal`][hessfunc.diagonal] get them for all leaves in one pass from shared probes, at a somewhat larger
    variance: probes on the whole also carry the noise of the products between blocks.

    Blocks of a Gauss-Newton matrix: pass the model in place of the loss, and
    ``operator=lambda model_fn, params, data: hessfunc.ggn(model_fn, criterion, params, data)``.

    Cost: for each block ``num_probes`` matvecs for the trace, as many as ``eigsh`` takes for the eigenvalues, and
    ``num_probes * num_steps`` (twice with exact outliers) for the density.

    Args:
        loss: ``loss(params, *batch)``.
        params: pytree of floating-point tensors.
        data: as for [`hessian`][hessfunc.hessian].
        blocks: ``"leaf"`` for each leaf; ``"module"`` for the leaves that share a dotted name but for its last part;
            several names, prefixes or patterns, each a block of its own as in [`restrict`][hessfunc.restrict]; or a
            mapping from a block's name to what ``restrict`` takes, for instance ``{"stage 1": ["conv1", "layer1"]}``.
        k: eigenvalues per block; fewer where the block is smaller.
        which: which eigenvalues, as in [`eigsh`][hessfunc.eigsh].
        tol: tolerance of the eigenvalues.
        num_probes: probes per block, for trace and density each.
        num_steps: Lanczos steps of the density; fewer where the block is smaller; 0 for no density.
        operator: what makes the operator of a block, ``operator(loss, params, data, **options)``.
        generator: draws start vectors and probes, block by block in the order of the result.
        **options: passed on to ``operator``, for instance ``reduction``.

    Returns:
        A dict from the block's name to its spectrum.

    Raises:
        ValueError: ``blocks`` is not known or selects nothing, or an option is out of range.
        TypeError: a leaf is not a floating-point tensor.

    Example:
        >>> import torch, hessfunc as hf
        >>> params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
        >>> loss = lambda p: (p["a"] ** 4).sum() / 12 + (p["a"].sum() * p["b"] ** 2).sum()
        >>> spectra = hf.block_spectra(loss, params, generator=torch.Generator().manual_seed(0))
        >>> {name: round(float(block.eigenpairs.eigenvalues[0]), 3) for name, block in spectra.items()}
        {'a': 4.0, 'b': 6.0}
    """
    check_count(k, name="k")
    check_count(num_probes, name="num_probes")
    check_count(num_steps, name="num_steps", minimum=0)
    check_generator(generator)
    spectra = {}
    for name, select in _selections(blocks, params).items():
        restricted, selected = restrict(loss, params, select)
        H = operator(restricted, selected, data, **options)
        spectra[name] = _spectrum(name, H, k, which, tol, num_probes, num_steps, generator)
    return spectra


def _spectrum(
    name: str,
    H: Operator,
    k: int,
    which: str,
    tol: float,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
) -> BlockSpectrum:
    pairs = eigsh(H, min(k, H.size), which=which, tol=tol, generator=generator)
    trace = hutchinson(H, num_probes=num_probes, generator=generator)
    density = None
    if num_steps:
        density = slq(H, num_steps=min(num_steps, H.size), num_probes=num_probes, generator=generator)
    return BlockSpectrum(
        name=name,
        leaf_names=H.layout.names,
        size=H.size,
        eigenpairs=pairs,
        trace=trace,
        density=density,
        num_matvecs=pairs.num_matvecs + trace.num_matvecs + (density.num_matvecs if density else 0),
    )


def _selections(blocks: Blocks, params: Params) -> dict[str, Select]:
    check_params(params)
    names = tree.names(params)
    if isinstance(blocks, Mapping):
        selections = dict(blocks)
    elif blocks == "leaf":
        selections = {name: _exactly([name]) for name in names}
    elif blocks == "module":
        modules: dict[str, list[str]] = {}
        for name in names:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        selections = {module: _exactly(members) for module, members in modules.items()}
    elif isinstance(blocks, str):
        raise ValueError(
            f"blocks={blocks!r} is not known; expected 'leaf', 'module', a list of names or patterns such as "
            f"[{blocks!r}], or a mapping from a block's name to what hessfunc.restrict selects."
        )
    else:
        selections = {pattern: pattern for pattern in blocks}
    if not selections:
        raise ValueError("blocks is empty; name at least one block.")
    return selections


def _exactly(members: list[str]) -> Callable[[str], bool]:
    return lambda name: name in members
