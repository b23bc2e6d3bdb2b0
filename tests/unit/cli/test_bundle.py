"""`moe-guard bundle`: from a folder to a signed file and back, the same bytes each time."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app
from guard.policy import load_policies, load_texts
from guard.source.bundle import read_bundle
from guard.source.remote import BundleAddress, BundleSource
from guard.source.signature import PolicyKeys
from tests.unit.source.test_remote import PATH, Host, host
from tests.unit.source.writing import PROFILE, policy, write

__all__ = ["host"]  # a fixture

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write(tmp_path / "policies", a=policy("a", profile="profiles/m.json"))
    write(made / "more", b=policy("b"))
    (made / "profiles").mkdir()
    (made / "profiles" / "m.json").write_text(PROFILE)
    (made / "profiles" / "unused.json").write_text("nobody's")
    (made / ".hidden.yaml").write_text("nonsense")
    (made / "README.md").write_text("read me")
    return made


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bundle", *map(str, words)])
    return done.exit_code, done.output


def built(folder: Path, output: Path, *more: object) -> Path:
    code, said = run("build", folder, "-o", output, *more)
    assert code == 0, said
    return output


def test_a_signed_bundle_is_what_a_server_with_the_key_takes(
    tmp_path: Path, folder: Path, host: Host
) -> None:
    code, said = run("key", tmp_path / "k")
    assert code == 0
    assert "keep it secret" in said
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    file = built(folder, tmp_path / "b.json", "--serial", 7, "--sign", tmp_path / "k")

    code, said = run("verify", file, "--policy-key", tmp_path / "k.pub")
    revision = load_policies(folder).revision
    assert (code, said) == (0, f"{file}: signed, serial 7, revision {revision}, 2 policies\n")
    host.documents = {PATH: file.read_bytes()}
    texts = BundleSource(BundleAddress(url=host.url, keys=PolicyKeys.read(tmp_path / "k.pub"))).poll()
    assert texts is not None
    assert load_texts(texts).revision == revision
    assert [Path(one.file).name for one in texts.profiles] == ["m.json"]


def test_an_unsigned_bundle_has_its_checksum_beside_it(
    tmp_path: Path, folder: Path, host: Host
) -> None:
    file = built(folder, tmp_path / "b.tar.gz", "--serial", 7)
    checksum = (tmp_path / "b.tar.gz.sha256").read_text()

    assert checksum == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  b.tar.gz\n"
    host.documents = {PATH: file.read_bytes(), PATH + ".sha256": checksum.encode()}
    assert BundleSource(BundleAddress(url=host.url)).poll() is not None


def test_the_same_folder_is_the_same_bundle(tmp_path: Path, folder: Path) -> None:
    one = built(folder, tmp_path / "one", "--serial", 7).read_bytes()
    os.utime(folder / "a.yaml", (1, 1))
    (folder / "a.yaml").chmod(0o600)
    two = built(folder, tmp_path / "two", "--serial", 7).read_bytes()

    assert one == two
    assert one != built(folder, tmp_path / "three", "--serial", 8).read_bytes()


def test_the_policy_library_can_be_built(tmp_path: Path) -> None:
    file = built(ROOT / "policies", tmp_path / "b", "--serial", 1)
    assert (
        load_texts(read_bundle(file.read_bytes(), "b")).revision
        == load_policies(ROOT / "policies").revision
    )


def test_what_a_server_would_refuse_is_not_built(tmp_path: Path, folder: Path) -> None:
    write(folder, c=policy("c").replace("rules", "rulez"), d=policy("d", profile="../m.json"))
    (folder.parent / "m.json").write_text(PROFILE)
    code, said = run("build", folder, "-o", tmp_path / "b", "--serial", 1)
    assert code == 1
    assert f"{tmp_path / 'm.json'}" in said.replace("policies/../", "")
    assert "lies outside of" in said
    (folder / "d.yaml").unlink()
    code, said = run("build", folder, "-o", tmp_path / "b", "--serial", 1)
    assert code == 1
    assert "c.yaml:6:3: " in said
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "none", "-o", "b", "--serial", "1"], "is no folder"),
        (["build", "none", "-o", "b", "--serial", "0"], "--serial"),
        (["build", "none", "-o", "b"], "--serial"),
        (["verify", "none", "--policy-key", "none"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_said_so(words: list[str], message: str) -> None:
    code, said = run(*words)
    assert code != 0
    assert message in said


def test_a_bundle_of_somebody_else_is_not_verified(tmp_path: Path, folder: Path) -> None:
    for name in ("mine", "other"):
        run("key", tmp_path / name)
    file = built(folder, tmp_path / "b", "--serial", 1, "--sign", tmp_path / "other")
    code, said = run("verify", file, "--policy-key", tmp_path / "mine.pub")
    assert code == 1
    assert "is not signed by a key of policy_key" in said
    unsigned = built(folder, tmp_path / "u", "--serial", 1)
    assert "is not signed" in run("verify", unsigned, "--policy-key", tmp_path / "mine.pub")[1]


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    run("key", tmp_path / "k")
    before = (tmp_path / "k").read_bytes()
    code, said = run("key", tmp_path / "k")
    assert code == 1
    assert "cannot be made" in said
    assert (tmp_path / "k").read_bytes() == before
