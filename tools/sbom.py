"""Write what is installed as a bill of materials: `python -m tools.sbom FILE`, CycloneDX in JSON.

cyclonedx-py makes it of an environment and validates it against the schema of CycloneDX.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SPEC: Final = "1.6"


def write_sbom(output: Path, python: Path | str = sys.executable) -> None:
    """python: the interpreter of the environment that is described. The same environment gives the
    same bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "environment", str(python)]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application"]
    command += ["--spec-version", SPEC, "--output-reproducible", "--validate"]
    command += ["--output-format", "JSON", "--output-file", str(output)]
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a bill of materials of this environment.")
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    try:
        write_sbom(output)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
