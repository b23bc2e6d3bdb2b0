from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(hook: str, folder: Path) -> zipfile.ZipFile:
    """Call a hook of the build back end on the checkout, as pip does, without network."""
    code = f"import sys; from hatchling.build import {hook}; print({hook}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with build("build_wheel", tmp_path_factory.mktemp("wheel")) as built:
        yield built


@pytest.fixture(scope="module")
def names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


def test_wheel_brings_two_packages_and_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"guard", "guard_vllm", "moe_guard-0.1.0.dist-info"}


@pytest.mark.parametrize("source", ["guard", "integrations/vllm/guard_vllm"])
def test_wheel_holds_every_module(names: set[str], source: str) -> None:
    base = (ROOT / source).parent
    modules = {p.relative_to(base).as_posix() for p in (ROOT / source).rglob("*.py")}
    assert modules
    assert modules <= names


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("policies", "guard/_policies"),
        ("demo/model", "guard/_demo/model"),
        ("demo/policies", "guard/_demo/policies"),
        ("demo/prompts", "guard/_demo/prompts"),
        ("integrations/vllm/guard_vllm/admin", "guard_vllm/admin"),
    ],
)
def test_wheel_holds_the_data(names: set[str], source: str, target: str) -> None:
    found = (ROOT / source).rglob("*")
    files = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    assert files
    assert {f"{target}/{p.relative_to(ROOT / source).as_posix()}" for p in files} <= names


def test_entry_points_are_declared(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("moe_guard-0.1.0.dist-info/entry_points.txt").decode()
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read_string(text)
    assert parser["console_scripts"]["moe-guard"] == "guard.cli:main"
    assert parser["vllm.general_plugins"]["moe_guard"] == "guard_vllm.plugin:register"


def test_editable_install_reads_from_the_checkout(tmp_path: Path) -> None:
    with build("build_editable", tmp_path) as editable:
        (pth,) = (name for name in editable.namelist() if name.endswith(".pth"))
        folders = editable.read(pth).decode().split()
        assert {Path(f) for f in folders} == {ROOT, ROOT / "integrations" / "vllm"}
        assert not any(name.startswith("guard") for name in editable.namelist())


@pytest.mark.parametrize("folder", ["integrations", "integrations/vllm"])
def test_integrations_never_hide_the_real_vllm(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
