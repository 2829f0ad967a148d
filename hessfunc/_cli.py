"""The command line: ``hessfunc demo`` and ``hessfunc analyze``."""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hessfunc import _demo, _report_files, plot
from hessfunc._analyze import analyze as run_analysis
from hessfunc._module import module_loss
from hessfunc._problem import DTYPES, ProblemError, location, user_problem
from hessfunc._terminal import Bars, print_report
from hessfunc.report import Report

app = typer.Typer(
    help="Hessian spectral analysis of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Which(str, enum.Enum):
    """Which end of the spectrum."""

    LM = "LM"
    LA = "LA"
    SA = "SA"
    BE = "BE"


class Reduction(str, enum.Enum):
    """How a loss reduces over its batch."""

    mean = "mean"
    sum = "sum"


Dtype = enum.Enum("Dtype", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]

Out = Annotated[Path, typer.Option(help="Folder for report.json, arrays.npz and the figures; made if need be.")]
K = Annotated[int, typer.Option("--k", help="Number of eigenpairs.", min=1)]
WhichOption = Annotated[Which, typer.Option(help="Largest magnitude, largest, smallest, or both ends.")]
Tol = Annotated[float, typer.Option(help="Residual of an eigenpair over its eigenvalue.")]
Probes = Annotated[int, typer.Option(help="Probes for the trace.", min=2)]
Steps = Annotated[int | None, typer.Option(help="Lanczos steps for the density; 64, or n if that is less.", min=1)]
DensityProbes = Annotated[int, typer.Option(help="Probes for the density.", min=1)]
SurfaceSwitch = Annotated[bool, typer.Option("--surface/--no-surface", help="Evaluate the loss surface.")]
SurfacePoints = Annotated[int, typer.Option(help="Grid points of the surface per direction.", min=3)]
SurfaceSpan = Annotated[float, typer.Option(help="How far the surface reaches to either side.")]
Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the PNG figures.")]
Vectors = Annotated[bool, typer.Option("--eigenvectors", help="Save the eigenvectors as well.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.", min=0)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def _commands() -> None:
    """Hessian spectral analysis of neural networks."""


@app.command()
def demo(
    out: Out,
    width: Annotated[int, typer.Option(help="Channels of the first stage.", min=1)] = 6,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    k: K = 5,
    tol: Tol = 1e-3,
    probes: Probes = 32,
    steps: Steps = 40,
    density_probes: DensityProbes = 4,
    surface: SurfaceSwitch = True,
    surface_points: SurfacePoints = 21,
    surface_span: SurfaceSpan = 0.4,
    figures: Figures = True,
    eigenvectors: Vectors = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train a small residual network on scikit-learn's digits and analyze the Hessian of its training loss."""
    with _errors(debug), Bars() as bars:
        _report_files.check_folder(out)
        generator = torch.Generator().manual_seed(seed)
        digits = _demo.load_digits(generator)
        model = _demo.ResidualNet(width=width, generator=generator)
        history = _demo.train(
            model,
            digits,
            epochs=epochs,
            generator=generator,
            progress=lambda done, total: bars("training", done, total),
        )
        bars.close()
        accuracy = float(history.accuracy[-1])
        typer.echo(f"Trained for {int(history.steps[-1])} steps; test accuracy {100 * accuracy:.1f} %")
        loss, params = module_loss(model, torch.nn.functional.cross_entropy)
        report = run_analysis(
            loss,
            params,
            _demo.in_batches(digits.train, 1024),
            k=k,
            tol=tol,
            num_probes=probes,
            num_steps=steps,
            density_probes=density_probes,
            surface_points=surface_points if surface else None,
            surface_span=surface_span,
            generator=generator,
            progress=bars,
        )
        bars.close()
        problem = {"data": "digits", "width": width, "epochs": epochs, "test_accuracy": accuracy}
        report = replace(report, settings={**report.settings, "seed": seed, "problem": problem})
        written = _finish(report, out, eigenvectors=eigenvectors, figures=figures)
        if figures:
            _training_figure(history).savefig(out / "training.png", dpi=200)
            written.append("training.png")
        _say_where(written, out)


@app.command()
def analyze(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="A function without arguments that returns (model, criterion, data) or (loss, params, data).",
        ),
    ],
    out: Out,
    k: K = 5,
    which: WhichOption = Which.LM,
    tol: Tol = 1e-3,
    probes: Probes = 32,
    steps: Steps = None,
    density_probes: DensityProbes = 4,
    surface: SurfaceSwitch = True,
    surface_points: SurfacePoints = 21,
    surface_span: SurfaceSpan = 0.5,
    reduction: Annotated[Reduction, typer.Option(help="How the loss reduces over a batch.")] = Reduction.mean,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Convert parameters and data; as they are by default."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Move to this device, for example cuda; as they are by default.")
    ] = None,
    figures: Figures = True,
    eigenvectors: Vectors = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Analyze the Hessian of your own loss.

    Only the code of the file you name is run, and what it imports.
    """
    with _errors(debug, target), Bars() as bars:
        _report_files.check_folder(out)
        _check_device(device)
        converted = None if dtype is None else DTYPES[dtype.value]
        with user_problem(target, dtype=converted, device=device, seed=seed) as problem:
            for note in problem.notes:
                typer.secho(f"Note: {note}", err=True, fg="yellow")
            report = run_analysis(
                problem.loss,
                problem.params,
                problem.data,
                k=k,
                which=which.value,
                tol=tol,
                num_probes=probes,
                num_steps=steps,
                density_probes=density_probes,
                surface_points=surface_points if surface else None,
                surface_span=surface_span,
                reduction=reduction.value,
                generator=torch.Generator().manual_seed(seed),
                progress=bars,
            )
        bars.close()
        report = replace(report, settings={**report.settings, "problem": {"target": target}})
        _say_where(_finish(report, out, eigenvectors=eigenvectors, figures=figures), out)


def _finish(report: Report, out: Path, *, eigenvectors: bool, figures: bool) -> list[str]:
    """Print the tables and write the files; return their names."""
    print_report(report)
    report.save(out, eigenvectors=eigenvectors)
    drawn = {"density.png": plot.density(report), "layers.png": plot.layers(report)} if figures else {}
    if figures and report.surface is not None:
        drawn["surface.png"] = plot.surface(report)
    for name, figure in drawn.items():
        figure.savefig(out / name, dpi=200)
    return ["report.json", "arrays.npz", *(["eigenvectors.npz"] if eigenvectors else []), *drawn]


def _say_where(written: list[str], out: Path) -> None:
    typer.echo(f"Wrote {', '.join(written)} to {out}")


def _training_figure(history: _demo.History) -> Any:
    curves = {
        "training loss": (history.loss, history.loss_stderr),
        "test error": (1 - history.accuracy, history.accuracy_stderr),
    }
    title = f"Training on digits, final test accuracy {100 * float(history.accuracy[-1]):.1f} %"
    return plot.training(history.steps, curves, title=title, ylabel="mean over an epoch", log=True)


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ProblemError(f"--device {device}: torch cannot use it here: {error}") from error


@contextlib.contextmanager
def _errors(debug: bool, target: str = "") -> Iterator[None]:
    """Errors that are the user's to mend as one message and status 1; warnings as a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ProblemError, ImportError, ValueError, TypeError, RuntimeError, ArithmeticError, OSError) as error:
            if debug:
                raise
            where = location(error, str(Path(target.rpartition(":")[0]).expanduser().absolute()))
            typer.secho(f"Error: {error}{where}", err=True, fg="red")
            raise typer.Exit(1) from error
        finally:
            for warning in caught:
                typer.secho(f"Warning: {warning.message}", err=True, fg="yellow")
