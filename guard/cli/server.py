"""Starts vLLM's server as a child process, and finds out from outside whether the guard is in it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any

from guard.errors import GuardError, NotLiveError
from guard.events.log.file import KEEP, SYNC
from guard.events.log.key import KeyFile
from guard.events.webhooks import read_webhooks
from guard.policy import PolicyError, load_policies
from guard.program.compile import check_observe_only, compile_policies
from guard.program.configuration import EXACT_ARCHITECTURES, topology_from_folder
from guard.program.fingerprint import check_fingerprints
from guard.source.signature import PolicyKeys

PLUGIN = "moe_guard"
POLICIES_VARIABLE = "MOE_GUARD_POLICIES"
START_TIMEOUT_S = 3600.0
"""Large models load for long; vLLM itself ends where it cannot start."""

ENDED_BY_ITSELF = 1
"""Exit code of a server that ended without being asked to."""

GUARD_TIMEOUT_S = 15.0
"""How long a server that answers may leave open whether its guard is up."""

POLL_S = 0.25


class ServerError(GuardError):
    """The server cannot be started as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What to serve. policies: a path, or a bundle's URL; None: without the guard, for comparison."""

    model: str
    policies: Path | str | None
    policy_key: Path | None = None
    allow_rollback: bool = False
    strict: bool = True
    observe_only: bool = False
    mask_actions: int = 64
    reload: bool = True
    redact_reasons: bool = False
    decision_log: Path | None = None
    decision_log_max_mib: float | None = None
    decision_log_keep: int = KEEP
    decision_log_sync: str = SYNC[0]
    decision_log_chain: bool = True
    decision_log_key: Path | None = None
    webhooks: Path | None = None
    label_headers: Mapping[str, str] = field(default_factory=dict)
    api_key_labels: Path | None = None
    admin_keys: Path | None = None
    state_dir: Path | None = None
    record: Path | None = None
    record_sample: float = 1.0
    vllm_args: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what can be refused before vLLM is started.

        Raises PolicyError, TopologyError, FingerprintError, WebhookError, LogKeyError, ServerError.
        """
        if self.policies is None:
            return
        if self.policy_key is not None:
            PolicyKeys.read(self.policy_key)
        elif isinstance(self.policies, Path):  # a bundle is read once, by vLLM's process
            self._check_policies(self.policies)
        if self.allow_rollback and self.policy_key is None:
            raise ServerError("--allow-rollback needs --policy-key: only signed bundles have an order")
        if not entry_points(group="vllm.general_plugins", name=PLUGIN):
            raise ServerError(
                "vLLM would not find MoE Guard: its entry point is not installed in this "
                "environment; install moe-guard with pip where vLLM is"
            )
        if self.webhooks is not None:
            read_webhooks(self.webhooks)
        if self.decision_log is None and (self.decision_log_max_mib, self.decision_log_sync) != (
            None,
            SYNC[0],
        ):
            raise ServerError(
                "--decision-log-max-mib and --decision-log-sync need --decision-log: there is no log"
            )
        if self.decision_log_key is not None:
            self._check_log_key(self.decision_log_key)
        if self.admin_keys is not None and self.state_dir is None:
            raise ServerError("--admin-keys needs --state-dir: what operators change is kept there")
        chosen = os.environ.get("VLLM_PLUGINS")
        if chosen is not None and PLUGIN not in chosen.split(","):
            raise ServerError(
                f"VLLM_PLUGINS={chosen!r} leaves MoE Guard out; add {PLUGIN!r} to it, or unset it"
            )

    def _check_log_key(self, key: Path) -> None:
        if self.decision_log is None or not self.decision_log_chain:
            raise ServerError(
                "--decision-log-key needs --decision-log, and its chain: there is nothing to seal"
            )
        KeyFile(key).close()

    def _check_policies(self, path: Path) -> None:
        policies = load_policies(path)
        if self.observe_only and (faults := check_observe_only(policies)):
            raise PolicyError(faults)
        if Path(self.model).is_dir():
            topology = topology_from_folder(Path(self.model))
            if topology.architecture in EXACT_ARCHITECTURES:
                compile_policies(policies, topology)
            check_fingerprints(policies, self.model)

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        additional, rest = _take_option(self.vllm_args, "--additional-config")
        section = self._section()
        if additional is not None or section is not None:
            config = _json_object("--additional-config", additional or "{}")
            if section is not None:
                own = config.get(PLUGIN, {})
                if not isinstance(own, dict):
                    raise ServerError(f"{PLUGIN} in --additional-config must be a JSON object")
                config[PLUGIN] = {**own, **section}
            command += ["--additional-config", json.dumps(config)]
        return [*command, *rest]

    def _section(self) -> dict[str, Any] | None:
        if self.policies is None:
            return None
        policies, log = self.policies, self.decision_log
        if isinstance(policies, Path):
            policies = os.path.abspath(policies)  # links stay in it: a reload sees them change
        section: dict[str, Any] = {
            "policies": policies,
            "strict": self.strict,
            "observe_only": self.observe_only,
            "mask_actions": self.mask_actions,
            "reload": self.reload,
            "redact_reasons": self.redact_reasons,
            "decision_log": None if log is None else str(log.resolve()),
        }
        if self.policy_key is not None:
            section["policy_key"] = os.path.abspath(self.policy_key)
            section["allow_rollback"] = self.allow_rollback
        if self.decision_log_max_mib is not None:
            section["decision_log_max_mib"] = self.decision_log_max_mib
            section["decision_log_keep"] = self.decision_log_keep
        if self.decision_log_sync != SYNC[0]:
            section["decision_log_sync"] = self.decision_log_sync
        if not self.decision_log_chain:
            section["decision_log_chain"] = False
        if self.decision_log_key is not None:
            section["decision_log_key"] = os.path.abspath(self.decision_log_key)
        if self.webhooks is not None:
            section["webhooks"] = os.path.abspath(self.webhooks)
        if self.record is not None:
            section["record"] = str(self.record.resolve())
            section["record_sample"] = self.record_sample
        if self.label_headers:
            section["label_headers"] = dict(self.label_headers)
        if self.api_key_labels is not None:
            section["api_key_labels"] = os.path.abspath(self.api_key_labels)
        if self.admin_keys is not None:
            section["admin_keys"] = os.path.abspath(self.admin_keys)
        if self.state_dir is not None:
            section["state_dir"] = os.path.abspath(self.state_dir)
        return section

    @property
    def base_url(self) -> str:
        host = _take_option(self.vllm_args, "--host")[0] or "127.0.0.1"
        port = _take_option(self.vllm_args, "--port")[0] or "8000"
        scheme = "https" if _take_option(self.vllm_args, "--ssl-certfile")[0] else "http"
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{scheme}://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


class GuardedServer:
    """A server in a child process, which ends with this one."""

    def __init__(self, settings: ServerSettings, process: subprocess.Popen[bytes]) -> None:
        self._settings = settings
        self._process = process
        self._is_guarded = False
        self._is_asked_to_end = False

    @property
    def base_url(self) -> str:
        return self._settings.base_url

    @property
    def metrics_url(self) -> str:
        return f"{self.base_url}/metrics"

    @staticmethod
    def start(
        settings: ServerSettings,
        *,
        environment: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> GuardedServer:
        """Check, then start. log: where the server's output goes, if not to this one's.

        Raises PolicyError, TopologyError, ServerError.
        """
        settings.check()
        if _get(f"{settings.base_url}/health") is not None:
            raise ServerError(
                f"a server already answers at {settings.base_url}; stop it, or choose another --port"
            )
        variables = {**os.environ, **(environment or {})}
        if settings.policies is None:
            variables.pop(POLICIES_VARIABLE, None)
        if settings.admin_keys is not None:
            # vLLM loads routes of plugins that are named alone; so all others are named as well.
            variables.setdefault("VLLM_PLUGINS", ",".join(_installed_plugins()))
        process = subprocess.Popen(
            settings.command(),
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT if log is not None else None,
        )
        return GuardedServer(settings, process)

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises ServerError if the server ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while self._get("/health") is None:
            if self._process.poll() is not None:
                raise ServerError(
                    f"vLLM ended with exit code {self._process.returncode} before it served; "
                    "its own messages say why"
                )
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"vLLM did not serve within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def wait_until_guarded(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for the server, and for its metrics to say that the guard is up.

        vLLM only logs a plugin that fails to import, and serves on without it: so the server is
        ended here unless it shows its guard. Raises ServerError, NotLiveError.
        """
        self.wait_until_healthy(timeout_s)
        deadline = time.monotonic() + GUARD_TIMEOUT_S
        while not (up := self._guards_up()):
            if time.monotonic() > deadline:
                self.stop()
                raise NotLiveError(
                    "vLLM serves, but its metrics show no MoE Guard, so it was stopped; look for "
                    "'Failed to load plugin' in its log"
                )
            time.sleep(POLL_S)
        if not all(up) and self._settings.strict:
            self.stop()
            raise NotLiveError(
                "MoE Guard reports itself blind, so the server was stopped; --no-strict serves all "
                "the same"
            )
        self._is_guarded = True

    def forward_signals(self) -> None:
        """From now on an interrupt or a termination of this process is passed on to the server's, and
        a hangup, too, once the server has a use for it; before that, it would end it."""

        def forward(number: int, _: object) -> None:
            if number != signal.SIGHUP:
                self._is_asked_to_end = True
            if number != signal.SIGHUP or self._is_guarded:
                self._process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)

    def wait(self) -> int:
        """Until the server ends. Its exit code; one that nobody asked to end has failed, whatever vLLM
        says: where an engine dies that is 0."""
        code = self._process.wait()
        return code if code or self._is_asked_to_end else ENDED_BY_ITSELF

    def stop(self, timeout_s: float = 30.0) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def metrics(self) -> str:
        return self._get("/metrics") or ""

    def _guards_up(self) -> list[bool]:
        """Of each engine. One that is not shown does not pass the API servers, which wait for all."""
        return [
            float(line.rsplit(" ", 1)[1]) == 1
            for line in self.metrics().splitlines()
            if line.startswith("moe_guard_up{")
        ]

    def _get(self, path: str) -> str | None:
        return _get(self.base_url + path)


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            body: bytes = response.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return None
    return body.decode()


def _installed_plugins() -> list[str]:
    known = entry_points()
    groups = [group for group in known.groups if group.startswith("vllm.")]
    return sorted({PLUGIN, *(name for group in groups for name in known.select(group=group).names)})


def _take_option(args: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name value` or `--name=value`, and the arguments without it.

    As vLLM reads it: '_' in a name is '-', and the last of several values counts.
    """
    value, rest, pending = None, [], False
    for argument in args:
        option, equals, given = argument.partition("=")
        if pending:
            value, pending = argument, False
        elif option.replace("_", "-") != name:
            rest.append(argument)
        elif equals:
            value = given
        else:
            pending = True
    if pending:
        raise ServerError(f"{name} needs a value")
    return value, rest


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ServerError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ServerError(f"{name} must be a JSON object")
    return value
