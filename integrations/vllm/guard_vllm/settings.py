"""The plugin's settings: read once, before the engine starts, and the same in every process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from guard.device.layout import LOAD_EVERY_STEPS
from guard.errors import GuardError
from guard.events.log.file import KEEP, SYNC, LogLimits
from guard.fault_injection import (
    ALLOW_VARIABLE,
    FAULTS_VARIABLE,
    FaultInjectionError,
    parse_faults,
)
from guard.program.program import WORD_BITS

CONFIG_KEY = "moe_guard"
POLICIES_VARIABLE = "MOE_GUARD_POLICIES"
MIN_SECONDS, MAX_SECONDS = 0.1, 86_400
MAX_LOG_MIB, MAX_KEPT_LOGS = 1 << 20, 999
RECORD_WEIGHTS = ("float32", "float16", "none")
FORMAT = 4
"""Part of vLLM's compile key, by way of `additional_config`: raise it when the traced code changes."""


class SettingsError(GuardError):
    """The `moe_guard` section of --additional-config is not what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `--additional-config '{"moe_guard": {…}}'` may say. Off where there is no `policies`.

    policies: file or folder, readable at the same path by every worker; or the URL of a bundle
    observe_only: provision no masking, so that models whose routers cannot be masked are served too
    strict: refuse to start where the guard is not live; else serve, and report the guard as blind
    redact_reasons: tell clients "moe_guard" instead of which policy and rule stopped a request
    prefix_evidence: keep the evidence of cached tokens, so that prefixes taken from the cache count as
        if they had been computed; without it they are reported as unseen. Costs memory, see the log
    decision_log: file that gets one JSON line a decision
    decision_log_max_mib: a log that would grow beyond it is rotated; None: never
    decision_log_keep: so many older logs, FILE.1 the youngest
    decision_log_sync: when the disk is waited for: never, once a second, or always (after every line)
    decision_log_chain: chain each line to the one before, so that `moe-guard log verify` finds changes
    decision_log_key: file of the key that seals the chain, from `moe-guard log key`; it is changed with
        each line
    webhooks: file with the URLs that are told of decisions
    mask_actions: how many mask actions the policies of a running server may come to have; reloads that
        need more are refused
    reload: look for changed policies while the server runs, and at SIGHUP
    reload_seconds: how often; None: every second for files, every 30 for a bundle
    policy_key: file with the public keys of those who sign bundles; then nothing else is taken, from
        the URL or from the file that `policies` names
    allow_rollback: take a signed bundle that is older than the one last in force
    bundle_sha256: the only bundle to take, by its digest, as `#sha256=` on the URL says, too; else the
        one that URL.sha256 names
    bundle_cache: folder for the bundle in force, from which a server starts while the URL is down
    bundle_token_variable: environment variable with the bearer token for the URL
    bundle_allow_http: take a bundle unencrypted from other hosts than this one
    state_dir: folder for what operators change at run time (masks, modes, the kill switch), so that a
        restart keeps it; every process of the server must be able to use it. Without it nothing can be
        changed over HTTP
    admin_keys: file that maps API keys, or `sha256:` and their digest, to the names of people who may
        change it; without it there is no `/guard/v1`
    load_every: count in one step of so many which experts all requests use, for the metrics of layers;
        0: never
    label_headers: by label, the header that gives it to a request
    api_key_labels: file that maps API keys to labels
    record: folder that gets a trace of all routing, for `moe-guard replay`. It is as sensitive
        as text: the files are their owner's alone
    record_sample: record this share of requests only
    record_weights: how to keep gate weights: float32, float16 or none
    record_max_gib: a trace that is so large takes no more
    inject_faults: for drills alone, what is to fail and when; see `guard.fault_injection`
    allow_injected_faults: though the server is strict
    mask_words, kernels, format: filled in by the plugin; they decide what the compiled graph is
    """

    policies: str
    observe_only: bool = False
    strict: bool = True
    redact_reasons: bool = False
    prefix_evidence: bool = True
    decision_log: str | None = None
    decision_log_max_mib: float | None = None
    decision_log_keep: int = KEEP
    decision_log_sync: str = SYNC[0]
    decision_log_chain: bool = True
    decision_log_key: str | None = None
    webhooks: str | None = None
    mask_actions: int = 64
    reload: bool = True
    reload_seconds: float | None = None
    policy_key: str | None = None
    allow_rollback: bool = False
    bundle_sha256: str | None = None
    bundle_cache: str | None = None
    bundle_token_variable: str | None = None
    bundle_allow_http: bool = False
    state_dir: str | None = None
    admin_keys: str | None = None
    load_every: int = LOAD_EVERY_STEPS
    label_headers: dict[str, str] | None = None
    api_key_labels: str | None = None
    record: str | None = None
    record_sample: float = 1.0
    record_weights: str = "float32"
    record_max_gib: float = 10.0
    inject_faults: str | None = None
    allow_injected_faults: bool = False
    mask_words: int = 0
    kernels: str = ""
    format: int = FORMAT

    @staticmethod
    def of(additional_config: object) -> Settings | None:
        """The settings of an engine, or None where the guard is off.

        Raises SettingsError for an unknown key or a value of the wrong type.
        """
        section = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if section is None:
            section = {}
        if not isinstance(section, Mapping):
            raise SettingsError(f"additional_config.{CONFIG_KEY} must be a mapping, not {section!r}")
        known = {field.name: field for field in fields(Settings)}
        for key in section:
            if key not in known:
                near = get_close_matches(str(key), known, n=2)
                meant = " or ".join(repr(name) for name in known if name in near)
                hint = f"; did you mean {meant}?" if near else f"; known: {', '.join(known)}"
                raise SettingsError(f"additional_config.{CONFIG_KEY} has no setting {key!r}{hint}")
        values: dict[str, Any] = dict(section)
        values.setdefault("policies", os.environ.get(POLICIES_VARIABLE) or None)
        if values["policies"] is None:
            return None
        values.setdefault("inject_faults", os.environ.get(FAULTS_VARIABLE) or None)
        values.setdefault("allow_injected_faults", os.environ.get(ALLOW_VARIABLE) == "1")
        settings = Settings(**values)
        settings._check_types()
        return settings

    def _check_types(self) -> None:
        flag, path, number = (bool, "true or false"), (str, "a path"), (int, "a whole number")
        word = (str, "a text")
        expected: dict[str, tuple[type | tuple[type, ...], str]] = {
            "policies": path,
            "observe_only": flag,
            "strict": flag,
            "redact_reasons": flag,
            "prefix_evidence": flag,
            "decision_log": path,
            "decision_log_max_mib": ((int, float), "a number of MiB"),
            "decision_log_keep": number,
            "decision_log_sync": word,
            "decision_log_chain": flag,
            "decision_log_key": path,
            "webhooks": path,
            "mask_actions": number,
            "reload": flag,
            "reload_seconds": ((int, float), "a number of seconds"),
            "policy_key": path,
            "allow_rollback": flag,
            "bundle_sha256": word,
            "bundle_cache": path,
            "bundle_token_variable": word,
            "bundle_allow_http": flag,
            "state_dir": path,
            "admin_keys": path,
            "load_every": number,
            "label_headers": (dict, "a mapping of labels to headers"),
            "api_key_labels": path,
            "record": path,
            "record_sample": ((int, float), "a number"),
            "record_weights": word,
            "record_max_gib": ((int, float), "a number of GiB"),
            "inject_faults": word,
            "allow_injected_faults": flag,
            "mask_words": number,
            "format": number,
        }
        optional = {field.name for field in fields(self) if field.default is None}
        for name, (kind, words) in expected.items():
            value = getattr(self, name)
            absent = value is None and name in optional
            if not absent and (not isinstance(value, kind) or value == ""):
                raise SettingsError(
                    f"additional_config.{CONFIG_KEY}.{name} is {value!r}; it must be {words}"
                )
        if self.allow_rollback and self.policy_key is None:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.allow_rollback is for signed bundles; give "
                "policy_key, too"
            )
        if not 0 < self.record_sample <= 1:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.record_sample is {self.record_sample}; it must be "
                "above 0 and up to 1"
            )
        if self.record_weights not in RECORD_WEIGHTS:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.record_weights is {self.record_weights!r}; it must be "
                f"{' or '.join(RECORD_WEIGHTS)}"
            )
        if self.record_max_gib <= 0:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.record_max_gib is {self.record_max_gib}; it must be "
                "above 0"
            )
        if isinstance(self.load_every, bool) or self.load_every < 0:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.load_every is {self.load_every}; it must be 0 or more"
            )
        self._check_decision_log()
        self._check_drill()
        if self.mask_actions < 0:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.mask_actions is {self.mask_actions}; it must be 0 or "
                "more"
            )
        if self.reload_seconds is not None and not MIN_SECONDS <= self.reload_seconds <= MAX_SECONDS:
            raise SettingsError(
                f"additional_config.{CONFIG_KEY}.reload_seconds is {self.reload_seconds}; it must be "
                f"{MIN_SECONDS} to {MAX_SECONDS}, and `reload: false` looks for no changes at all"
            )

    def _check_decision_log(self) -> None:
        place = f"additional_config.{CONFIG_KEY}.decision_log"
        mib, keep = self.decision_log_max_mib, self.decision_log_keep
        # True is a number to Python, and no number of MiB.
        if mib is not None and (type(mib) is bool or not 0 < mib <= MAX_LOG_MIB):
            raise SettingsError(
                f"{place}_max_mib is {mib}; it must be above 0 and up to "
                f"{MAX_LOG_MIB}; leave it out for a log that is not rotated"
            )
        if isinstance(keep, bool) or not 1 <= keep <= MAX_KEPT_LOGS:
            raise SettingsError(f"{place}_keep is {keep}; it must be 1 to {MAX_KEPT_LOGS}")
        if self.decision_log_sync not in SYNC:
            raise SettingsError(
                f"{place}_sync is {self.decision_log_sync!r}; it must be {', '.join(SYNC[:-1])} or "
                f"{SYNC[-1]}"
            )
        if self.decision_log_key is not None and not self.decision_log_chain:
            raise SettingsError(
                f"{place}_chain is False; it must be true where there is a decision_log_key, which "
                "seals the chain"
            )
        if self.decision_log_key is not None and self.decision_log is None:
            raise SettingsError(
                f"{place}_key is {self.decision_log_key!r}; it must be left out where there is no "
                "decision_log: there is nothing to seal"
            )

    def _check_drill(self) -> None:
        """A server that was not told twice does not fail on purpose."""
        if self.inject_faults is None:
            return
        place = f"additional_config.{CONFIG_KEY}.inject_faults (or {FAULTS_VARIABLE})"
        try:
            parse_faults(self.inject_faults)
        except FaultInjectionError as error:
            raise SettingsError(f"{place}: {error}") from error
        if self.strict and not self.allow_injected_faults:
            raise SettingsError(
                f"{place} is {self.inject_faults!r}: a strict server does not fail on purpose; unset "
                f"it, or for a drill serve with --no-strict or set {ALLOW_VARIABLE}=1 as well"
            )

    @property
    def log_limits(self) -> LogLimits:
        mib = self.decision_log_max_mib
        return LogLimits(
            max_bytes=None if mib is None else max(int(mib * (1 << 20)), 1),
            keep=self.decision_log_keep,
            sync=self.decision_log_sync,
        )

    def resolved(self, mask_words: int, kernels: str = "torch") -> Settings:
        """With what every process must agree on.

        mask_words: what the policies at start need; kernels: what routes masked rows, see
            `kernels_on`
        """
        room = -(-self.mask_actions // WORD_BITS)
        words = 0 if self.observe_only else max(1, mask_words, room)
        return replace(self, mask_words=words, kernels=kernels)

    def as_section(self) -> dict[str, Any]:
        return asdict(self)
