"""``python -m hessfunc`` and the console script ``hessfunc``."""

from __future__ import annotations

import importlib.util
import sys

REQUIRED = {
    "matplotlib": "matplotlib",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "typer": "typer",
}
"""Modules that the command line needs and the packages they come in."""


def main() -> None:
    """Run the command line; say what to install, and exit with status 1, if part of it is not there."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"hessfunc: the command line needs {', '.join(missing)}; run: pip install 'hessfunc[cli]'", file=sys.stderr
        )
        raise SystemExit(1)
    from hessfunc._cli import app

    app()


if __name__ == "__main__":
    main()
