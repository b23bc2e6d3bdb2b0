"""The command."""

from __future__ import annotations

import argparse
import sys

import tools.fuzz
from tools.fuzz.process import TARGETS, holds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz",
        description=(tools.fuzz.__doc__ or "").partition("\n")[0],
        epilog=f"targets: {', '.join(TARGETS)}; none: all",
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each target")
    options = parser.parse_args()
    for name in options.targets:
        if name not in TARGETS:
            parser.error(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    failed = [name for name in options.targets or TARGETS if not holds(name, options.seconds)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
