"""What an analysis found, as a record that prints, saves and loads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hessfunc import _report_files, tree
from hessfunc._eigenpairs import Eigenpairs
from hessfunc._estimate import Estimate
from hessfunc._quadrature import Quadrature
from hessfunc._tables import EIGENVALUE_COLUMNS, LEAF_COLUMNS, aligned, eigenvalue_cells, leaf_cells, number
from hessfunc._typing import Tensor
from hessfunc.surface import Surface


@dataclass(frozen=True)
class Report:
    """What [`analyze`][hessfunc.analyze] found out about a Hessian, and how.

    Attributes:
        eigenpairs: extreme eigenvalues with their residuals and vectors. In a loaded report the vectors are a flat
            dict from leaf name to tensor; empty if they were not saved.
        trace: estimate of the trace, with its samples and the shares of the leaves.
        quadrature: nodes and weights of the spectral density.
        surface: losses along the first two eigenvectors (one if there is only one), or ``None``.
        leaf_shapes: shape of every parameter tensor by dotted name.
        settings: arguments of the run, by name.
        versions: of Python, hessfunc and what it runs on.
        num_matvecs: Hessian-vector products by stage.
        seconds: wall time by stage.
    """

    eigenpairs: Eigenpairs
    trace: Estimate
    quadrature: Quadrature
    surface: Surface | None
    leaf_shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]
    versions: dict[str, str]
    num_matvecs: dict[str, int]
    seconds: dict[str, float]

    @property
    def leaf_sizes(self) -> dict[str, int]:
        """Number of parameters of every leaf."""
        return {name: math.prod(shape) for name, shape in self.leaf_shapes.items()}

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.quadrature.size

    def table(self) -> str:
        """The figures as plain text: eigenvalues, trace, density, leaves, cost."""
        low, high = self.trace.interval(0.95)
        head = f"Hessian of {self.size:,} parameters in {len(self.leaf_shapes)} tensors"
        trace = f"Trace {number(self.trace)}, 95 % interval {low:.4g} to {high:.4g}, {len(self.trace.samples)} probes"
        cost = ", ".join(f"{s} {self.num_matvecs.get(s, 0)} ({t:.1f} s)" for s, t in self.seconds.items())
        return "\n".join(
            [
                f"{head}, {self.settings['dtype']} on {self.settings['device']}",
                "",
                f"Eigenvalues ({self.settings['which']}, relative tolerance {self.settings['tol']:g})",
                *aligned(EIGENVALUE_COLUMNS, eigenvalue_cells(self.eigenpairs)),
                "",
                trace,
                str(self.quadrature),
                "",
                "Trace by parameter tensor (shares sum to the trace)",
                *aligned(LEAF_COLUMNS, leaf_cells(self.trace, self.leaf_shapes)),
                "",
                f"Products: {sum(self.num_matvecs.values())} in all; by stage {cost}",
            ]
        )

    def __str__(self) -> str:
        return self.table()

    def save(self, folder: str | os.PathLike[str], *, eigenvectors: bool = False) -> Path:
        """Write report.json, arrays.npz and, if asked for, eigenvectors.npz into ``folder``, which is made if need be.

        report.json holds every figure of [`table`][hessfunc.Report.table] with the settings and versions, and a
        checksum of each archive. arrays.npz holds the arrays in full precision; ``numpy.load`` reads it. Half-precision
        eigenvectors are saved as float32. Other files in the folder are left alone.

        Raises:
            ValueError: ``folder`` holds a report.json that hessfunc did not write.
            OSError: ``folder`` cannot be made or written to.
        """
        archives = {"arrays.npz": _arrays(self)}
        if eigenvectors:
            leaves = tree.leaves(self.eigenpairs.eigenvectors)
            if not leaves:
                raise ValueError("eigenvectors=True, but this report was loaded from a folder without eigenvectors.")
            archives["eigenvectors.npz"] = dict(zip(self.leaf_shapes, map(_numpy, leaves), strict=True))
        return _report_files.write(folder, _document(self), archives)


def load_report(folder: str | os.PathLike[str]) -> Report:
    """Read back what [`Report.save`][hessfunc.Report.save] wrote; tensors are on the CPU. Nothing is unpickled.

    Raises:
        FileNotFoundError: there is no report in ``folder``, or a file of it is missing.
        ValueError: a file is damaged, truncated, or not hessfunc's.
    """
    document, archives = _report_files.read(folder)
    try:
        return _restored(document, archives)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the report in {str(folder)!r} is damaged or incomplete: {type(error).__name__}: {error}."
        ) from error


def _document(report: Report) -> dict[str, Any]:
    """Everything that is no array, and the main figures once more for readers of the JSON alone."""
    pairs, trace, quadrature, surface = report.eigenpairs, report.trace, report.quadrature, report.surface
    negative, bound = quadrature.negative_fraction(), quadrature.error_bound()
    shares, sizes = trace.per_leaf, report.leaf_sizes
    return {
        "size": report.size,
        "eigenpairs": {
            "eigenvalues": pairs.eigenvalues.tolist(),
            "residuals": pairs.residuals.tolist(),
            "converged": pairs.converged.tolist(),
            "num_matvecs": pairs.num_matvecs,
        },
        "trace": {
            "value": float(trace),
            "stderr": float(trace.stderr),
            "interval_95": list(trace.interval(0.95)),
            "num_samples": len(trace.samples),
            "dof": trace.dof,
            "num_matvecs": trace.num_matvecs,
        },
        "density": {
            "num_probes": quadrature.num_probes,
            "num_steps": quadrature.num_steps,
            "num_exact": quadrature.num_exact,
            "num_rules": quadrature.num_rules,
            "num_matvecs": quadrature.num_matvecs,
            "sigma": quadrature.density().sigma,
            "negative_fraction": float(negative),
            "negative_fraction_stderr": float(negative.stderr),
            "wasserstein_bound_95": bound.distance,
        },
        "surface": None
        if surface is None
        else {
            "span": [float(c[-1]) for c in surface.coordinates],
            "num_points": list(surface.losses.shape),
            "lowest": float(surface.losses.min()),
        },
        "leaves": [
            {
                "name": name,
                "shape": list(shape),
                "trace": float(shares[name]),
                "stderr": float(shares[name].stderr),
                "trace_per_parameter": float(shares[name]) / max(sizes[name], 1),
            }
            for name, shape in report.leaf_shapes.items()
        ],
        "settings": report.settings,
        "versions": report.versions,
        "num_matvecs": report.num_matvecs,
        "seconds": report.seconds,
    }


def _arrays(report: Report) -> dict[str, np.ndarray]:
    pairs, trace, quadrature, surface = report.eigenpairs, report.trace, report.quadrature, report.surface
    density = quadrature.density()
    tensors = {
        "eigenvalues": pairs.eigenvalues,
        "residuals": pairs.residuals,
        "converged": pairs.converged,
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "trace_samples": trace.samples,
        "trace_leaf_samples": trace.leaf_samples,
        "trace_leaf_stderr": trace.leaf_stderr,
        "trace_leaf_dof": trace.leaf_dof,
        "nodes": quadrature.nodes,
        "weights": quadrature.weights,
        "density_grid": density.grid,
        "density": density.values,
        "density_stderr": density.stderr,
    }
    if surface is not None:
        tensors["surface_losses"] = surface.losses
        tensors.update({f"surface_coordinates_{i}": c for i, c in enumerate(surface.coordinates)})
    return {name: _numpy(tensor) for name, tensor in tensors.items() if tensor is not None}


def _restored(document: dict[str, Any], archives: dict[str, dict[str, np.ndarray]]) -> Report:
    arrays = {name: torch.from_numpy(array) for name, array in archives["arrays.npz"].items()}
    vectors = {name: torch.from_numpy(array) for name, array in archives.get("eigenvectors.npz", {}).items()}
    leaves = {entry["name"]: tuple(entry["shape"]) for entry in document["leaves"]}
    density = document["density"]
    return Report(
        eigenpairs=Eigenpairs(
            eigenvalues=arrays["eigenvalues"],
            eigenvectors=vectors,
            residuals=arrays["residuals"],
            converged=arrays["converged"],
            num_matvecs=document["eigenpairs"]["num_matvecs"],
        ),
        trace=Estimate(
            value=arrays["trace"],
            stderr=arrays["trace_stderr"],
            samples=arrays["trace_samples"],
            num_matvecs=document["trace"]["num_matvecs"],
            leaf_samples=arrays["trace_leaf_samples"],
            leaf_names=tuple(leaves),
            dof=document["trace"].get("dof"),  # reports from before it was kept, as these two
            leaf_stderr=arrays.get("trace_leaf_stderr"),
            leaf_dof=arrays.get("trace_leaf_dof"),
        ),
        quadrature=Quadrature(
            nodes=arrays["nodes"],
            weights=arrays["weights"],
            size=document["size"],
            num_steps=density["num_steps"],
            num_matvecs=density["num_matvecs"],
            num_exact=density["num_exact"],
            num_rules=density.get("num_rules", 1),  # reports from before there were several
        ),
        surface=_restored_surface(arrays, vectors) if document["surface"] else None,
        leaf_shapes=leaves,
        settings=document["settings"],
        versions=document["versions"],
        num_matvecs=document["num_matvecs"],
        seconds=document["seconds"],
    )


def _restored_surface(arrays: dict[str, Tensor], vectors: dict[str, Tensor]) -> Surface:
    losses = arrays["surface_losses"]
    coordinates = tuple(arrays[f"surface_coordinates_{i}"] for i in range(losses.dim()))
    return Surface(coordinates, losses, {name: leaf[: losses.dim()] for name, leaf in vectors.items()})


def _numpy(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16, and half precision saves little here."""
    tensor = tensor.detach().cpu()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).numpy()
