"""The PyHessian study, reproduced: BatchNorm, residual connections, depth, stages.

    python benchmarks/paper --small --out study      under an hour on two cores, Fashion-MNIST
    python benchmarks/paper --folder DIR --out study  in full, on CIFAR-10; wants a GPU

The page is written to OUT/index.html. Started again with the same settings, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
import typing
from dataclasses import fields
from pathlib import Path

import report
import study
from settings import SMALL, SMOKE, Settings


def main(argv: list[str] | None = None) -> int:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_const", dest="size", const=SMALL, help="under an hour on two cores")
    size.add_argument("--smoke", action="store_const", dest="size", const=SMOKE, help="under a minute, to try it out")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the results (default: study)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    own = parser.add_argument_group("settings", "see the class Settings; each replaces what the size says")
    for name, kind, many in _options():
        own.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if many else None, default=None)
    arguments = vars(parser.parse_args(argv))
    size, out, quiet = (arguments.pop(name) for name in ("size", "out", "quiet"))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items() if v is not None}
    started = time.perf_counter()
    try:
        settings = Settings(**((size or {}) | given))
        study.run(settings, out, quiet=quiet)
        page = report.write(settings, out)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page} ({(time.perf_counter() - started) / 60:.1f} minutes)")
    return 0


def _options() -> list[tuple[str, type, bool]]:
    """Name, type of a value and whether there are several, of every field of the settings."""
    kinds = typing.get_type_hints(Settings)
    found = []
    for field in fields(Settings):
        parts = [part for part in typing.get_args(kinds[field.name]) if part not in (type(None), Ellipsis)]
        many = typing.get_origin(kinds[field.name]) is tuple
        found.append((field.name, parts[0] if parts else kinds[field.name], many))
    return found


if __name__ == "__main__":
    sys.exit(main())
