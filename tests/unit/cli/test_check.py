"""`moe-guard check`: what it prints, and with what it exits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from guard.cli import app
from guard.program.fingerprint import fingerprint_of_folder

GOOD = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: NAME}\nspec:\n"
    "  experts: {f: [{layer: 1, experts: [3]}]}\n"
    "  rules:\n    - {name: r, when: {count: {experts: f, over: token, atLeast: 1}}}\n"
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD.replace("NAME", "good"))
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace("NAME", "bad").replace("atLeast", "atleast"))
    return path


def model(folder: Path, **config: int) -> Path:
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, **config}
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **shape}))
    return folder


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_good_policies_are_summed_up(good: Path) -> None:
    code, out, err = run(good)

    assert (code, err) == (0, "")
    assert out.startswith(f"{good}: ok, 1 policies, 1 rules, revision ")


def test_a_fault_is_a_line_with_its_place(bad: Path) -> None:
    code, out, err = run(bad)

    assert (code, err) == (1, "")
    assert out.startswith(f"{bad}:7:")
    assert out.count("\n") == 1
    assert "atleast" in out


def test_a_fault_in_line_100_is_no_emoji(tmp_path: Path) -> None:
    path = tmp_path / "[b]long.yaml"
    path.write_text(GOOD.replace("NAME", "p").replace("  rules", "\n" * 94 + "  rulez"))

    assert run(path)[1].startswith(f"{path}:100:3: ")


def test_faults_of_several_paths_come_together_in_order(good: Path, bad: Path) -> None:
    code, out, _ = run(good, bad, good.parent / "missing.yaml")

    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(bad), str(good.parent / "missing.yaml")
    ]  # fmt: skip


def test_several_good_paths_have_a_line_each(good: Path) -> None:
    code, out, _ = run(good, good.parent)

    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [str(good), str(good.parent)]


def test_json_is_a_list_of_faults(bad: Path, good: Path) -> None:
    code, out, _ = run(bad, "--format", "json")
    (fault,) = json.loads(out)

    assert code == 1
    assert set(fault) == {"file", "line", "column", "severity", "code", "message"}
    assert (fault["file"], fault["line"]) == (str(bad), 7)
    assert (fault["severity"], fault["code"]) == ("error", "invalid")
    assert run(good, "--format", "json")[:2] == (0, "[]\n")


def test_a_model_tells_experts_that_it_does_not_have(good: Path, tmp_path: Path) -> None:
    fits = model(tmp_path / "fits")
    small = model(tmp_path / "small", num_experts=3)

    assert run(good, "--model", fits)[0] == 0
    code, out, _ = run(good, "--model", small)
    assert code == 1
    assert out.startswith(f"{good}:5:")
    assert "experts 0-2" in out


def test_a_model_that_is_none_is_told_on_standard_error(good: Path, tmp_path: Path) -> None:
    for folder, message in [
        (tmp_path / "nowhere", "cannot be read"),
        (model(tmp_path / "dense", num_experts=0), "no routed experts"),
    ]:
        code, out, err = run(good, "--model", folder)
        assert (code, out) == (1, "")
        assert message in err


MASKING = GOOD.replace(
    "{name: r, when: {count: {experts: f, over: token, atLeast: 1}}}",
    "{name: r, when: always, then: {mask: {experts: f, method: METHOD}}}",
)


@pytest.mark.parametrize(
    ("method", "experts", "message"),
    [
        ("reroute", "0-6", "p/r together only 1 are left"),
        ("force", "0-2", "p/r together force 3 in; force at most 2"),
        ("drop", "8", "has experts 0-7; shared experts are not routed"),
        ("reorute", "1", "expected reroute, drop_renorm, drop or force"),
    ],
)
def test_masks_that_the_model_cannot_honour_are_lines_with_their_places(
    tmp_path: Path, method: str, experts: str, message: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        MASKING.replace("NAME", "p").replace("[3]", f"[{experts}]").replace("METHOD", method)
    )

    code, out, _ = run(path, "--model", model(tmp_path / "model"))

    assert code == 1
    assert out.startswith(f"{path}:")
    assert message in out
    assert out.count("\n") == 1


def test_a_mask_that_the_profile_forbids_needs_no_model_to_be_found(tmp_path: Path) -> None:
    path, profile = tmp_path / "p.yaml", tmp_path / "profile.json"
    path.write_text(
        MASKING.replace("NAME", "p")
        .replace("METHOD", "drop")
        .replace("  experts:", "  profile: profile.json\n  experts:")
    )
    profile.write_text(
        '{"apiVersion": "moe-guard/v1", "kind": "Profile", "model": {"architecture": "X"},\n'
        '"neverMask": [{"layer": 1, "experts": [3], "reason": "super expert"}]}'
    )

    code, out, _ = run(path)

    assert code == 1
    assert f"p/r masks L1/E3, which the profile {profile}:2:15 says" in out


def test_a_profile_of_another_model_is_a_fault_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        GOOD.replace("NAME", "p").replace("  experts:", "  profile: profile.json\n  experts:")
    )
    (tmp_path / "profile.json").write_text(
        '{"apiVersion": "moe-guard/v1", "kind": "Profile", "model": {"architecture": "Y"}}'
    )

    code, out, _ = run(path, "--model", model(tmp_path / "model"))

    assert code == 1
    assert out.startswith(f"{path}:5:12: the profile {tmp_path}/profile.json of policy 'p' is for a")


NEVER = GOOD.replace("NAME", "never").replace("atLeast: 1", "above: 1")
EXPIRED = NEVER.replace("above: 1", "atLeast: 1").rstrip() + (
    "\n  exceptions:\n    - {name: e, match: {labels: {t: x}}, until: 2020-01-01}\n"
)


def test_a_warning_is_a_line_with_its_place_and_code_and_fails_with_strict_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(NEVER)

    code, out, err = run(path)

    assert (code, err) == (0, "")
    warning, summary = out.splitlines()
    assert warning.startswith(f"{path}:7:24: warning: rule 'r' of policy 'never' can never fire: ")
    assert warning.endswith(" [never-fires]")
    assert summary.startswith(f"{path}: ok, ")
    assert run(path, "--strict")[0] == 1
    assert run(path, "--strict", "--ignore", "never-fires")[0] == 0


def test_an_expired_exception_fails_without_strict(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(EXPIRED)

    code, out, _ = run(path)

    assert code == 1
    assert out.startswith(f"{path}:9:7: error: exception 'e' of policy 'never' expired on 2020-01-01")
    assert run(path, "--ignore", "expired-exception", "--ignore", "idle-exception")[0] == 0


def test_findings_in_json_have_their_severity_and_code(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(NEVER)

    (finding,) = json.loads(run(path, "--format", "json")[1])

    assert (finding["severity"], finding["code"]) == ("warning", "never-fires")
    assert (finding["file"], finding["line"], finding["column"]) == (str(path), 7, 24)


def test_a_code_that_is_none_is_refused() -> None:
    assert run("p.yaml", "--ignore", "nothing")[0] == 2


def test_a_model_tells_lint_how_many_experts_a_token_chooses(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.replace("NAME", "p").replace("[3]", "[1-3]").replace("atLeast: 1", "above: 2"))

    assert "[never-fires]" not in run(path)[1]
    assert "[never-fires]" in run(path, "--model", model(tmp_path / "m"))[1]


def test_a_profile_of_other_weights_is_a_fault_where_it_is_named(tmp_path: Path) -> None:
    shape = model(tmp_path / "model")
    save_file({"model.layers.0.mlp.gate.weight": np.ones((8, 4), np.float32)}, shape / "m.safetensors")
    path, profile = tmp_path / "p.yaml", tmp_path / "profile.json"
    path.write_text(
        GOOD.replace("NAME", "p").replace("  experts:", "  profile: profile.json\n  experts:")
    )

    def check_with(fingerprint: str | None) -> tuple[int, str, str]:
        of_model = {"architecture": "X", "fingerprint": fingerprint}
        profile.write_text(
            json.dumps({"apiVersion": "moe-guard/v1", "kind": "Profile", "model": of_model})
        )
        return run(path, "--model", shape)

    assert check_with(fingerprint_of_folder(shape))[0] == 0
    code, out, _ = check_with("sha256:" + "0" * 64)
    assert code == 1
    assert out.startswith(f"{path}:5:12: the profile {profile} of policy 'p' is of other weights than")
    assert "model.fingerprint: expected sha256: and 64 digits of 0-9" in check_with("sha256:0")[1]


def test_weights_that_cannot_be_read_are_told_on_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        GOOD.replace("NAME", "p").replace("  experts:", "  profile: profile.json\n  experts:")
    )
    (tmp_path / "profile.json").write_text(
        '{"apiVersion": "moe-guard/v1", "kind": "Profile",\n'
        f'"model": {{"architecture": "X", "fingerprint": "sha256:{"0" * 64}"}}}}'
    )
    (model(tmp_path / "model") / "m.safetensors").write_bytes(b"damaged")

    code, out, err = run(path, "--model", tmp_path / "model")

    assert (code, out) == (1, "")
    assert "m.safetensors: cannot be read as safetensors" in err
