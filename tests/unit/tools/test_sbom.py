"""The bill of materials of an environment: valid, the same each time, without this machine."""

from __future__ import annotations

import json
import venv
from pathlib import Path

import pytest

from tools.sbom import SPEC, write_sbom

pytestmark = pytest.mark.slow


def test_an_environment_is_written_down_with_its_packages_licences_and_dependencies(
    tmp_path: Path,
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    for name, requires in (("first", "second"), ("second", "")):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n"
        (info / "METADATA").write_text(text + (f"Requires-Dist: {requires}\n" if requires else ""))

    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    for output in outputs:
        write_sbom(output, environment / "bin" / "python")
    document = json.loads(outputs[0].read_text("utf-8"))

    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", SPEC)
    assert document["metadata"]["component"]["name"] == "moe-guard"
    assert {one["name"]: one["purl"] for one in document["components"]} == {
        "first": "pkg:pypi/first@1.0",
        "second": "pkg:pypi/second@1.0",
    }
    assert all(one["licenses"] for one in document["components"])
    depends = {one["ref"]: one.get("dependsOn", []) for one in document["dependencies"]}
    assert depends["first==1.0"] == ["second==1.0"]
    assert str(tmp_path) not in outputs[0].read_text("utf-8")
