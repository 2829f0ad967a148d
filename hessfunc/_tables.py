"""Plain-text tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from hessfunc._eigenpairs import Eigenpairs
from hessfunc._estimate import Estimate

Rows: TypeAlias = list[tuple[str, ...]]

EIGENVALUE_COLUMNS = ("#", "eigenvalue", "residual", "converged")
LEAF_COLUMNS = ("tensor", "shape", "trace", "stderr", "trace / n")


def eigenvalue_cells(pairs: Eigenpairs) -> Rows:
    """One row of text per eigenpair, under ``EIGENVALUE_COLUMNS``."""
    columns = (pairs.eigenvalues.tolist(), pairs.residuals.tolist(), pairs.converged.tolist())
    return [
        (str(i), f"{value:.6g}", f"{residual:.1e}", "yes" if converged else "NO")
        for i, (value, residual, converged) in enumerate(zip(*columns, strict=True), start=1)
    ]


def leaf_cells(trace: Estimate, shapes: Mapping[str, tuple[int, ...]]) -> Rows:
    """One row of text per parameter tensor, under ``LEAF_COLUMNS``."""
    return [
        (
            name,
            " x ".join(map(str, shapes[name])) or "1",
            f"{float(share):.4g}",
            f"{float(share.stderr):.2g}",
            f"{float(share) / max(math.prod(shapes[name]), 1):.3g}",
        )
        for name, share in trace.per_leaf.items()
    ]


def number(estimate: Estimate) -> str:
    """Value and standard error.

    >>> import torch
    >>> number(Estimate.of(torch.tensor([9.0, 10.0, 11.0, 10.0]), num_matvecs=4))
    '10 ± 0.41'
    """
    return f"{float(estimate.value):.5g} ± {float(estimate.stderr):.2g}"


def aligned(header: Sequence[str], rows: Rows) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right.

    >>> aligned(("name", "x"), [("a", "10"), ("b", "2")])
    ['  name   x', '  a     10', '  b      2']
    """
    table = [tuple(header), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
