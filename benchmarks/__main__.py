"""All benchmarks, one after the other, each in a process of its own: ``python benchmarks --out results``.

Every option but ``--only`` is passed on; see the single scripts for their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = (
    *("bench_hvp", "bench_options", "bench_eigsh", "bench_trace", "bench_density", "bench_eigs", "bench_esd"),
    *("bench_trace_peers", "bench_scaling"),
)


def main(argv: list[str] | None = None) -> int:
    """Run them all, also after a failure; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="which benchmarks to run")
    arguments, passed_on = parser.parse_known_args(argv)
    failed = []
    for name in arguments.only:
        print(f"\n=== {name}", flush=True)
        script = Path(__file__).with_name(f"{name}.py")
        if subprocess.run([sys.executable, str(script), *passed_on], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
