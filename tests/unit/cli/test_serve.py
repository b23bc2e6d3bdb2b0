"""`moe-guard serve` up to the moment when vLLM would start, and how it watches it then."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from guard.cli import app, server
from guard.cli.server import GuardedServer, ServerError, ServerSettings, _take_option
from guard.errors import NotLiveError

POLICY = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
    "  rules:\n    - {name: r, when: {always: {}}}\n"
)


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("moe_guard", "guard_vllm.plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(server, "entry_points", lambda **_: (point,))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("something was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def settings(policies: Path | None, *vllm_args: str, **rest: Any) -> ServerSettings:
    return ServerSettings(model="some/model", policies=policies, vllm_args=vllm_args, **rest)


@pytest.mark.parametrize(
    ("args", "value", "rest"),
    [
        (["--port", "1"], "1", []),
        (["--port=1", "x"], "1", ["x"]),
        (["--port="], "", []),
        (["a", "--port", "--b", "c"], "--b", ["a", "c"]),
        (["--port", "1", "--port=2"], "2", []),
        (["--po_rt", "--portal", "3"], None, ["--po_rt", "--portal", "3"]),
        ([], None, []),
    ],
)
def test_an_option_is_taken_out_of_the_arguments(
    args: list[str], value: str | None, rest: list[str]
) -> None:
    assert _take_option(args, "--port") == (value, rest)


def test_an_option_is_known_in_either_of_vllms_spellings() -> None:
    assert _take_option(["--ssl_certfile=a_b"], "--ssl-certfile") == ("a_b", [])


def test_an_option_without_its_value_is_refused() -> None:
    with pytest.raises(ServerError, match="--port needs a value"):
        _take_option(["--port"], "--port")


@pytest.mark.parametrize(
    ("args", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--port", "9"], "http://127.0.0.1:9"),
        (["--host=0.0.0.0"], "http://127.0.0.1:8000"),
        (["--host", "::"], "http://[::1]:8000"),
        (["--host", "fe80::1"], "http://[fe80::1]:8000"),
        (["--host", "gpu-1", "--ssl-certfile", "c.pem"], "https://gpu-1:8000"),
    ],
)
def test_the_server_is_watched_where_it_listens(args: list[str], url: str) -> None:
    assert settings(None, *args).base_url == url


def config_of(command: list[str]) -> Any:
    return json.loads(_take_option(command, "--additional-config")[0] or "null")


def test_the_command_is_vllms_own_with_the_guards_section(policies: Path) -> None:
    command = settings(policies, "--max-model-len", "9", decision_log=Path("log")).command()

    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "some/model"]
    assert command[-2:] == ["--max-model-len", "9"]
    assert config_of(command) == {
        "moe_guard": {
            "policies": str(policies),
            "strict": True,
            "observe_only": False,
            "mask_actions": 64,
            "reload": True,
            "redact_reasons": False,
            "decision_log": str(Path("log").resolve()),
        }
    }


def test_sources_of_labels_go_into_the_section_where_they_are_given(policies: Path) -> None:
    headers, keys = {"tenant": "x-tenant", "region": "x-region"}, Path("keys.yaml")
    section = config_of(settings(policies, label_headers=headers, api_key_labels=keys).command())

    assert section["moe_guard"]["label_headers"] == headers
    assert section["moe_guard"]["api_key_labels"] == str(keys.resolve())


@pytest.mark.parametrize("text", ["tenant", "=x-tenant", "tenant="])
def test_a_label_header_without_both_names_is_refused(policies: Path, text: str) -> None:
    options = ["--policies", str(policies), "--label-header", text]
    result = CliRunner().invoke(app, ["serve", "some/model", *options])

    assert result.exit_code == 1
    assert "write LABEL=HEADER, for example tenant=x-tenant" in result.stderr


@pytest.mark.parametrize("option", ["--additional-config", "--additional_config"])
def test_an_additional_config_of_the_users_is_kept(policies: Path, option: str) -> None:
    own = '{"x": 1, "moe_guard": {"strict": false, "mask_words": 3}}'

    command = settings(policies, option, own).command()

    merged = config_of(command)
    assert (merged["x"], merged["moe_guard"]["mask_words"]) == (1, 3)
    assert merged["moe_guard"]["strict"] is True, "the command's own options win"
    assert option not in command[7:]


def test_without_policies_nothing_is_added() -> None:
    assert settings(None, "--port", "1").command()[5:] == ["--port", "1"]
    assert config_of(settings(None, "--additional-config", '{"x": 1}').command()) == {"x": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"moe_guard": "x"}'])
def test_an_additional_config_that_is_no_object_is_refused(policies: Path, text: str) -> None:
    with pytest.raises(ServerError, match="additional-config"):
        settings(policies, "--additional-config", text).command()


def serve(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *map(str, args)])
    assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.usefixtures("installed", "no_start")
def test_bad_policies_are_refused_with_their_place_before_anything_starts(policies: Path) -> None:
    policies.write_text(POLICY.replace("rules", "rulez"))

    code, err = serve("some/model", "--policies", policies, "--port", "1")

    assert code == 1
    assert err.startswith(f"{policies}:5:3: ")


@pytest.mark.usefixtures("installed", "no_start")
def test_policies_that_do_not_fit_a_local_model_are_refused(policies: Path, tmp_path: Path) -> None:
    policies.write_text(POLICY.replace("spec:\n", "spec:\n  model: {experts: 4}\n"))
    shape = {**CONFIG, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))

    code, err = serve(tmp_path, "--policies", policies)

    assert code == 1
    assert err.startswith(f"{policies}:5:3: ")
    assert "experts: 8" in err


@pytest.mark.usefixtures("no_start")
def test_a_plugin_that_vllm_would_not_find_is_refused(
    policies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "entry_points", lambda **_: ())

    assert "not installed" in serve("some/model", "--policies", policies)[1]


@pytest.mark.usefixtures("installed", "no_start")
@pytest.mark.parametrize("plugins", ["", "other", "moe_guards,other"])
def test_plugins_that_leave_the_guard_out_are_refused(
    policies: Path, monkeypatch: pytest.MonkeyPatch, plugins: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)

    code, err = serve("some/model", "--policies", policies)

    assert code == 1
    assert "VLLM_PLUGINS" in err


@pytest.mark.usefixtures("installed", "no_start")
def test_an_option_before_the_model_is_told_so(policies: Path) -> None:
    code, err = serve("--port", "1", "some/model", "--policies", policies)

    assert code == 1
    assert "name the model first" in err


@pytest.mark.usefixtures("installed", "no_start")
def test_a_port_at_which_another_server_answers_is_refused(
    policies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_get", lambda url: "")

    with pytest.raises(ServerError, match="already answers"):
        GuardedServer.start(settings(policies))


class FakeProcess:
    def __init__(self, returncode: int | None = None) -> None:
        self.returncode = returncode
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


def watched(
    monkeypatch: pytest.MonkeyPatch, process: FakeProcess, get: Callable[[str], str | None],
    *, strict: bool = True,
) -> GuardedServer:  # fmt: skip
    monkeypatch.setattr(server, "_get", lambda url: get(url.removeprefix("http://127.0.0.1:8000")))
    monkeypatch.setattr(server, "POLL_S", 0.0)
    monkeypatch.setattr(server, "GUARD_TIMEOUT_S", 0.0)
    return GuardedServer(settings(None, strict=strict), process)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metrics", "strict", "refusal"),
    [
        ('moe_guard_up{engine="0",model_name="m"} 1.0', True, None),
        ('moe_guard_up{engine="0",model_name="m"} 0.0', False, None),
        ('moe_guard_up{engine="0",model_name="m"} 0.0', True, "blind"),
        ("# HELP moe_guard_up x\nvllm_up 1.0", True, "show no MoE Guard"),
        ("", False, "show no MoE Guard"),
    ],
)
def test_a_server_that_does_not_show_its_guard_is_ended(
    monkeypatch: pytest.MonkeyPatch, metrics: str, strict: bool, refusal: str | None
) -> None:
    process = FakeProcess()
    pages = {"/health": "", "/metrics": metrics}
    guarded = watched(monkeypatch, process, pages.get, strict=strict)
    if refusal is None:
        guarded.wait_until_guarded()
        assert process.signals == []
        return
    with pytest.raises(NotLiveError, match=refusal):
        guarded.wait_until_guarded()
    assert process.signals == [signal.SIGTERM]


def test_a_server_that_ends_before_it_serves_is_told_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarded = watched(monkeypatch, FakeProcess(returncode=3), lambda _: None)

    with pytest.raises(ServerError, match="exit code 3"):
        guarded.wait_until_guarded()


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_termination_is_passed_on_while_the_server_still_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = FakeProcess()
    watched(monkeypatch, process, lambda _: None).forward_signals()
    signal.raise_signal(signal.SIGTERM)

    assert process.signals == [signal.SIGTERM]


@pytest.mark.usefixtures("handlers")
def test_a_server_that_nobody_asked_to_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's exit code is 0 where an engine died."""
    guarded = watched(monkeypatch, FakeProcess(), lambda _: None)
    guarded.forward_signals()
    assert guarded.wait() == 1

    signal.raise_signal(signal.SIGHUP)
    assert guarded.wait() == 1

    signal.raise_signal(signal.SIGTERM)
    assert guarded.wait() == 0


@pytest.mark.usefixtures("handlers")
def test_a_hangup_is_passed_on_once_the_server_is_guarded_and_ends_nothing_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = FakeProcess()
    pages = {"/health": "", "/metrics": 'moe_guard_up{engine="0"} 1.0'}
    guarded = watched(monkeypatch, process, pages.get)
    guarded.forward_signals()
    signal.raise_signal(signal.SIGHUP)
    assert process.signals == []

    guarded.wait_until_guarded()
    signal.raise_signal(signal.SIGHUP)
    assert process.signals == [signal.SIGHUP]


def test_a_link_among_the_policies_path_stays_one(policies: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(policies.parent)
    linked = settings(tmp_path / "current" / "p.yaml", reload=False)

    section = config_of(linked.command())["moe_guard"]

    assert section["policies"] == str(tmp_path / "current" / "p.yaml")
    assert section["reload"] is False


@pytest.mark.usefixtures("installed")
def test_a_bundle_goes_to_vllm_as_the_url_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def popen(command: list[str], **_: object) -> NoReturn:
        commands.append(command)
        raise ServerError("far enough")

    monkeypatch.setattr(server, "_get", lambda url: None)
    monkeypatch.setattr(subprocess, "Popen", popen)
    serve("some/model", "--policies", "https://example.org/b.tar.gz", "--no-reload")

    section = config_of(commands[0])["moe_guard"]
    assert (section["policies"], section["reload"]) == ("https://example.org/b.tar.gz", False)


def test_a_server_without_policies_inherits_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, str] = {}

    def popen(command: list[str], *, env: dict[str, str], **_: object) -> FakeProcess:
        started.update(env)
        return FakeProcess()

    monkeypatch.setattr(server, "_get", lambda url: None)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setenv("MOE_GUARD_POLICIES", "p.yaml")
    GuardedServer.start(settings(None), environment={"X": "1"})

    assert started["X"] == "1"
    assert "MOE_GUARD_POLICIES" not in started


MASKING = POLICY.replace(
    "{name: r, when: {always: {}}}",
    "{name: r, when: {always: {}}, then: {mask: {experts: f}}}",
).replace("spec:\n", "spec:\n  mode: enforce\n  experts: {f: [{layer: 0, experts: [0]}]}\n")


@pytest.mark.usefixtures("installed", "no_start")
def test_an_enforced_mask_is_refused_where_no_mask_is_provisioned(policies: Path) -> None:
    policies.write_text(MASKING)

    code, err = serve("some/model", "--policies", policies, "--observe-only")

    assert code == 1
    assert err.startswith(f"{policies}:8:")
    assert "--observe-only" in err


CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.usefixtures("installed", "no_start")
@pytest.mark.parametrize(
    ("text", "config", "line", "message"),
    [
        (MASKING.replace("mode:", "mood:"), CONFIG, 5, "did you mean 'mode'"),
        (MASKING.replace("layer: 0", "layer: 2"), CONFIG, 6, "MoE layers of this model are 0-1"),
        (MASKING.replace("[0]", "[4]"), CONFIG, 6, "that layer has experts 0-3"),
        (MASKING.replace("[0]", "[0-2]"), CONFIG, 8, "only 1 are left"),
        (f"{MASKING}---\n{MASKING}", CONFIG, 12, "'p'"),
        (MASKING.replace("{f:", "{f"), CONFIG, None, ""),
        ("", CONFIG, 1, "holds no policy"),
        (None, CONFIG, None, ""),
        (MASKING, {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}, None, "Mixture"),
    ],
    ids=[
        *("unknown-key", "layer", "expert", "live-experts", "two-of-a-name", "broken-yaml"),
        *("empty-file", "missing-file", "not-a-moe"),
    ],
)
def test_bad_input_is_told_at_its_line_and_nothing_is_started(
    policies: Path,
    tmp_path: Path,
    text: str | None,
    config: dict[str, Any],
    line: int | None,
    message: str,
) -> None:
    if text is None:
        policies.unlink()
    else:
        policies.write_text(text)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))

    code, err = serve(model, "--policies", policies)

    assert code == 1
    assert message in err
    assert "Traceback" not in err
    if line is not None:
        assert err.startswith(f"{policies}:{line}:")


@pytest.mark.usefixtures("installed", "no_start")
def test_a_profile_of_other_weights_of_a_local_model_is_refused(policies: Path, tmp_path: Path) -> None:
    policies.write_text(POLICY.replace("spec:\n", "spec:\n  profile: profile.json\n"))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["X"]}))
    (tmp_path / "profile.json").write_text(
        '{"apiVersion": "moe-guard/v1", "kind": "Profile",\n'
        f'"model": {{"architecture": "X", "fingerprint": "sha256:{"0" * 64}"}}}}'
    )
    gate = np.ones((4, 4), np.float32)
    save_file({"model.layers.0.mlp.gate.weight": gate}, tmp_path / "model.safetensors")

    code, err = serve(tmp_path, "--policies", policies)

    assert code == 1
    assert err.startswith(f"{policies}:5:12: ")
    assert f"of other weights than {tmp_path}" in err


def test_the_logs_limits_and_the_webhooks_go_into_the_section_where_they_are_given(
    policies: Path,
) -> None:
    log = {"decision_log": Path("log"), "decision_log_max_mib": 64.0, "decision_log_sync": "second"}
    section = config_of(settings(policies, webhooks=Path("hooks.yaml"), **log).command())["moe_guard"]

    assert section["decision_log_max_mib"] == 64.0
    assert section["decision_log_keep"] == 5
    assert section["decision_log_sync"] == "second"
    assert section["webhooks"] == str(Path("hooks.yaml").resolve())


def test_how_the_log_is_chained_and_sealed_goes_into_the_section(policies: Path) -> None:
    sealed = settings(policies, decision_log=Path("log"), decision_log_key=Path("key"))
    section = config_of(sealed.command())["moe_guard"]
    bare = settings(policies, decision_log=Path("log"), decision_log_chain=False)

    assert section["decision_log_key"] == str(Path("key").resolve())
    assert "decision_log_chain" not in section
    assert config_of(bare.command())["moe_guard"]["decision_log_chain"] is False


@pytest.mark.usefixtures("installed", "no_start")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--decision-log-key needs --decision-log"),
        (["--decision-log", "log", "--no-decision-log-chain"], "there is nothing to seal"),
        (["--decision-log", "log"], "cannot be opened to be read and written: No such file"),
    ],
)
def test_a_key_that_cannot_seal_the_log_is_refused_before_anything_starts(
    policies: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    key = tmp_path / "key"
    code, err = serve("some/model", "--policies", policies, "--decision-log-key", key, *options)

    assert code == 1
    assert said in err


@pytest.mark.usefixtures("installed", "no_start")
@pytest.mark.parametrize("option", [("--decision-log-max-mib", "5"), ("--decision-log-sync", "always")])
def test_limits_of_a_log_that_is_not_there_are_refused(policies: Path, option: tuple[str, str]) -> None:
    code, err = serve("some/model", "--policies", policies, *option)

    assert code == 1
    assert "need --decision-log" in err


@pytest.mark.usefixtures("installed", "no_start")
def test_bad_webhooks_are_refused_before_anything_starts(policies: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.yaml"
    hooks.write_text("- url: http://example.org/SECRET\n")

    code, err = serve("some/model", "--policies", policies, "--webhooks", hooks)

    assert code == 1
    assert err.startswith(f"{hooks}:1:8: url: is not encrypted")
    assert "SECRET" not in err
