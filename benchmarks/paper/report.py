"""The study's page: claims, tables and figures in one HTML file, the figures beside it, the numbers as JSON."""

from __future__ import annotations

import base64
import io
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import jinja2
import numpy as np
import study
import torch
from files import write_json
from records import Quantity, Row, Table, accuracy, support, top, trace
from settings import Settings

import hessfunc as hf

TEMPLATE = Path(__file__).with_name("page.html.jinja")
NAMES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "digits": "scikit-learn's digits"}


def write(settings: Settings, out: Path) -> Path:
    """Write ``index.html``, ``results.json``, ``results.md`` and the PNGs into ``out``; return the page's path."""
    records = list(study.results(settings, out))
    table = Table(records, settings.epochs)
    spent = study.spent(settings, out)
    document = {"settings": settings.document(), "machine": machine(settings), "spent": spent, "networks": records}
    write_json(out / "results.json", document)
    pictures = []
    for name, caption, figure in figures.draw(table, settings.measured_epochs):
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        (out / f"{name}.png").write_bytes(buffer.getvalue())
        pictures.append((name, caption, base64.b64encode(buffer.getvalue()).decode()))
    rows = claims.rows(table)
    content = {
        "data": NAMES[settings.data],
        "settings": document["settings"],
        "machine": document["machine"],
        "spent": spent,
        "claims": rows,
        "wholes": wholes(table),
        "stages": stages(table),
        "transformers": transformers(table),
        "pictures": pictures,
        "seeds": len(table.seeds),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    (out / "results.md").write_text(markdown(content), encoding="utf-8")
    return path


def wholes(table: Table) -> list[list[str]]:
    """A row for each depth and network: parameters, rate, accuracies, trace, largest eigenvalues, support."""
    return [_row(table, variant, depth) for depth in table.depths for variant in figures.WHOLES]


def stages(table: Table) -> list[list[str]]:
    """A row for each depth and network with something taken out of one stage."""
    variants = ["resnet", *(v for v in table.variants if v[-1].isdigit())]
    return [_row(table, variant, depth) for depth in table.depths for variant in variants]


def transformers(table: Table) -> list[list[str]]:
    """A row for each vision transformer."""
    return [_row(table, v, depth) for v in figures.VITS for depth in table.depths_of(v)]


HEADER = (
    *("depth", "network", "parameters", "rate", "train accuracy %", "test accuracy %"),
    *("trace", "largest eigenvalue", "support", "trained"),
)


def _row(table: Table, variant: str, depth: int) -> list[str]:
    found = [table.measured(variant, depth, seed) for seed in table.seeds]
    known = [measured for measured in found if measured is not None]
    rate = f"{table.record(variant, depth, table.seeds[0])['rate']:g}"
    if not known:
        return [str(depth), table.label(variant), "", rate, *["diverged"] * 5, f"0 of {len(found)}"]
    quantities: list[tuple[Quantity, float]] = [
        (lambda m: m["accuracy"]["train"], 100.0),
        (accuracy, 100.0),
        (trace, 1.0),
        (top, 1.0),
        (support, 1.0),
    ]
    cells = [_spread([scale * quantity(measured) for measured in known]) for quantity, scale in quantities]
    count = f"{known[0]['num_parameters']:,}"
    return [str(depth), table.label(variant), count, rate, *cells, f"{len(known)} of {len(found)}"]


def _spread(values: Sequence[float]) -> str:
    """Mean and standard error over seeds, to the digits that the error leaves."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3g}"
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    if error == 0:
        return f"{mean:.4g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"


def markdown(content: dict[str, Any]) -> str:
    """The claims and the tables for a README."""
    lines = [
        f"# The PyHessian study on {content['data']}",
        "",
        f"Seeds: {content['seeds']}. Intervals are 95 % over seeds, paired by seed; errors are standard errors.",
        f"{content['machine']['device']}, {content['machine']['processor']}, torch {content['machine']['torch']}; "
        f"{content['spent']['cpu_minutes']:.0f} minutes of processor time in all.",
        "",
        *_lines(("claim", "paper", "measured", "verdict"), [_claim(row) for row in content["claims"]]),
        "",
        "## Networks",
        "",
        *_lines(HEADER, content["wholes"]),
        "",
        "## Stages",
        "",
        *_lines(HEADER, content["stages"]),
    ]
    if content["transformers"]:
        lines += ["", "## Vision transformers", "", *_lines(HEADER, content["transformers"])]
    return "\n".join(lines) + "\n"


def _claim(row: Row) -> list[str]:
    measured = "; ".join(f"{where}: {text}" for where, text, _ in row.measured)
    return [row.claim, row.paper, measured, f"**{row.verdict}**"]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def machine(settings: Settings) -> dict[str, Any]:
    """What the times depend on."""
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else settings.device,
        "workers": settings.workers,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hessfunc": hf.__version__,
    }
