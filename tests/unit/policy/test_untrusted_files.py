"""Policies of an author who does not run the server: what of its host they reach, and what they run."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

from guard.policy import PolicyError, load_policies, parse_policies
from guard.policy import texts as texts_module
from guard.policy.regular_file import NotRegularError, open_regular
from guard.policy.texts import read_policies
from tests.unit.source.writing import PROFILE, policy, write

ROOT = Path(__file__).resolve().parents[3]


def problems(path: Path) -> list[str]:
    return [text.problem for text in read_policies(path).profiles]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """host/etc/policies is served; host/m.json is nobody's business."""
    for place in ("etc/policies", "etc/policies/sub", "etc/profiles", "."):
        folder = tmp_path / "host" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "m.json").write_text(PROFILE)
    return tmp_path / "host" / "etc" / "policies"


@pytest.mark.parametrize("named", ["m.json", "sub/m.json", "../profiles/m.json", "sub/../m.json"])
def test_a_profile_lies_beside_the_policies_or_in_the_folder_that_they_are_in(
    served: Path, named: str
) -> None:
    write(served, a=policy(profile=named))
    assert problems(served) == [""]
    assert problems(served / "a.yaml") == [""]


@pytest.mark.parametrize(
    "named", ["../../m.json", "sub/../../../m.json", "/etc/hostname", "/proc/self/environ", "/dev/zero"]
)
def test_a_profile_elsewhere_is_not_read_and_the_fault_shows_nothing_of_it(
    served: Path, named: str
) -> None:
    write(served, a=policy(profile=named))

    assert problems(served) == [f"lies outside of {served.parent}; put it beside the policies"]
    with pytest.raises(PolicyError, match="lies outside of"):
        load_policies(served)


def test_an_absolute_path_to_where_profiles_may_lie_is_one_of_them(served: Path) -> None:
    write(served, a=policy(profile=str(served.parent / "profiles" / "m.json")))
    assert problems(served) == [""]


def test_a_folder_at_the_root_of_a_disk_does_not_open_all_of_it() -> None:
    assert texts_module._reach_of("/policies-of-nobody/a.yaml") == Path("/policies-of-nobody")
    assert texts_module._reach_of("/etc") == Path("/etc")


def test_a_mounted_config_map_is_read_through_its_links(tmp_path: Path) -> None:
    mount = tmp_path / "mnt" / "policies"
    data = write(mount / "..2026_11_30_08_00_00.1", a=policy(profile="m.json"))
    (data / "m.json").write_text(PROFILE)
    (mount / "..data").symlink_to(data.name)
    for name in ("a.yaml", "m.json"):
        (mount / name).symlink_to(f"..data/{name}")

    assert problems(mount) == [""]
    assert [one.name for one in load_policies(mount).policies] == ["p"]


def test_a_link_is_the_operators_own_and_followed(tmp_path: Path) -> None:
    """Releases are links; who may make one here may as well write what it leads to."""
    release = write(tmp_path / "releases" / "7", a=policy("a"))
    (tmp_path / "current").symlink_to(release)
    assert [one.name for one in load_policies(tmp_path / "current").policies] == ["a"]


def test_a_link_to_all_of_a_disk_is_a_fault_and_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "MAX_NAMES", 50)
    folder = write(tmp_path / "p", a=policy("a"))
    (folder / "root").symlink_to("/usr")

    (fault,) = read_policies(folder).faults
    assert "holds more than 50 files and folders" in str(fault)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / f"{name}.yaml" for name in ("pipe", "socket", "device", "folder")}
    os.mkfifo(made["pipe"])
    made["device"].symlink_to("/dev/zero")
    made["folder"].mkdir()
    os.mknod(made["socket"], stat.S_IFSOCK | 0o600)
    return made


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_opened_for_long(odd: dict[str, Path], kind: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(NotRegularError):
            open_regular(odd[kind])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_load_neither_waits_for_a_pipe_nor_reads_a_device(
    tmp_path: Path, odd: dict[str, Path]
) -> None:
    faults = [str(fault) for fault in read_policies(tmp_path).faults]
    assert len([one for one in faults if "is no regular file" in one]) == 2, "the pipe and the device"
    assert len(faults) == 3, "and the socket, which cannot be opened"

    folder = write(tmp_path / "q", a=policy(profile="p.json"), b=policy("b", profile="d.json"))
    os.mkfifo(folder / "p.json")
    (folder / "d.json").symlink_to("/dev/zero")
    assert problems(folder) == ["is no file; give its path relative to the policy's folder"] * 2


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch pwned"]',
        "!!python/name:os.system",
        '!!python/object/new:os.system ["touch pwned"]',
        "!!binary aGk=",
        "!ref x",
        "!<tag:yaml.org,2002:python/name:os.system> x",
    ],
)
def test_a_tag_of_yaml_makes_nothing_and_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match="tag"):
        parse_policies(policy().replace("{name: p}", f"{{name: {value}}}"))
    assert not (tmp_path / "pwned").exists()


RUNS_WHAT_IT_READS = {
    ("pickle", "*"),
    ("cPickle", "*"),
    ("cloudpickle", "*"),
    ("dill", "*"),
    ("joblib", "*"),
    ("marshal", "*"),
    ("shelve", "*"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("torch", "load"),
    ("pandas", "read_pickle"),
}


def running(source: str) -> list[str]:
    """Uses, in a source, of what runs code that is in the data that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [
                    one.name for one in names if (one.name.partition(".")[0], "*") in RUNS_WHAT_IT_READS
                ]
            case ast.ImportFrom(module=str(module), names=names):
                top = module.partition(".")[0]
                found += [
                    f"{module}.{one.name}"
                    for one in names
                    if {(top, "*"), (top, one.name)} & RUNS_WHAT_IT_READS
                ]
            case ast.Attribute(value=ast.Name(id=top), attr=name) if (top, name) in RUNS_WHAT_IT_READS:
                found.append(f"{top}.{name}")
            case ast.Call(func=ast.Name(id=("eval" | "exec") as name)):
                found.append(name)
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append("allow_pickle")
    return found


def test_nothing_that_runs_what_it_reads_is_used() -> None:
    sources = [
        path
        for folder in ("guard", "integrations/vllm/guard_vllm")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    found = {path.relative_to(ROOT).as_posix(): running(path.read_text("utf-8")) for path in sources}
    # `moe-guard import` alone: it reads others' tables with an unpickler that calls nothing.
    assert {path: uses for path, uses in found.items() if uses} == {
        "guard/discover/frames.py": ["pickle"]
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml\nyaml.load(x)",
        "from yaml import unsafe_load",
        "import torch\ntorch.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_a_use_would_be_found(source: str) -> None:
    assert running(source)
