"""The `moe_guard` section of --additional-config, and when it means off."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from guard_vllm.settings import Settings, SettingsError

from guard.events.log.file import LogLimits


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_GUARD_POLICIES", raising=False)


def of(section: object) -> Settings | None:
    return Settings.of({"moe_guard": section, "other": 1})


@pytest.mark.parametrize("config", [{}, None, "x", {"moe_guard": None}, {"moe_guard": {}},
                                    {"moe_guard": {"strict": False}}])  # fmt: skip
def test_without_policies_it_is_off(config: object) -> None:
    assert Settings.of(config) is None


def test_policies_alone_arm_it_strictly() -> None:
    settings = of({"policies": "p"})

    assert settings == Settings(policies="p")
    assert settings is not None
    assert (settings.strict, settings.observe_only, settings.redact_reasons) == (True, False, False)


def test_the_variable_stands_in_for_policies_and_the_config_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOE_GUARD_POLICIES", "from-variable")

    assert Settings.of(None) == Settings(policies="from-variable")
    assert of({"strict": False}) == Settings(policies="from-variable", strict=False)
    assert of({"policies": "mine"}) == Settings(policies="mine")
    monkeypatch.setenv("MOE_GUARD_POLICIES", "")
    assert Settings.of(None) is None


@pytest.mark.parametrize(
    ("key", "hint"),
    [("policy", "did you mean 'policies'"), ("redact", "did you mean"), ("zzz", "known: policies")],
)
def test_an_unknown_key_is_refused_with_the_nearest_even_while_off(key: str, hint: str) -> None:
    if key == "redact":
        key = "redact_reason"
    with pytest.raises(SettingsError, match=f"no setting '{key}'; {hint}"):
        of({key: "x"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"policies": 1},
        {"policies": ""},
        {"policies": "p", "strict": "false"},
        {"policies": "p", "observe_only": 0},
        {"policies": "p", "decision_log": True},
        {"policies": "p", "decision_log_max_mib": "1"},
        {"policies": "p", "decision_log_max_mib": 0},
        {"policies": "p", "decision_log_max_mib": float("nan")},
        {"policies": "p", "decision_log_max_mib": True},
        {"policies": "p", "decision_log_keep": 0},
        {"policies": "p", "decision_log_keep": 1.5},
        {"policies": "p", "decision_log_keep": True},
        {"policies": "p", "decision_log_keep": 1000},
        {"policies": "p", "decision_log_sync": "hourly"},
        {"policies": "p", "decision_log_sync": True},
        {"policies": "p", "decision_log_key": ""},
        {"policies": "p", "decision_log_key": "k"},
        {"policies": "p", "decision_log_chain": 1},
        {"policies": "p", "decision_log_key": "k", "decision_log_chain": False},
        {"policies": "p", "webhooks": ["https://a"]},
        {"policies": "p", "mask_words": "1"},
        {"policies": "p", "mask_actions": -1},
        {"policies": "p", "load_every": -1},
        {"policies": "p", "load_every": True},
        {"policies": "p", "load_every": 0.5},
        {"policies": "p", "reload": "no"},
        {"policies": "p", "reload_seconds": "1"},
        {"policies": "p", "reload_seconds": 0},
        {"policies": "p", "reload_seconds": float("nan")},
        {"policies": "p", "bundle_sha256": 1},
        {"policies": "p", "policy_key": ["k"]},
        {"policies": "p", "policy_key": "k", "allow_rollback": "yes"},
        {"policies": "p", "bundle_cache": ""},
        {"policies": "p", "bundle_token_variable": True},
        {"policies": "p", "bundle_allow_http": 1},
        {"policies": "p", "label_headers": "tenant=x-tenant"},
        {"policies": "p", "api_key_labels": ["keys.yaml"]},
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=f"moe_guard.{list(wrong)[-1]} is .*it must be"):
        of(wrong)


def test_a_rollback_is_of_signed_bundles() -> None:
    with pytest.raises(SettingsError, match="allow_rollback is for signed bundles; give policy_key"):
        of({"policies": "p", "allow_rollback": True})
    assert of({"policies": "p", "policy_key": "k", "allow_rollback": True}) is not None


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(SettingsError, match="must be a mapping"):
        of("policies")


def test_what_was_resolved_is_read_back_alike_by_every_process() -> None:
    settings = Settings(policies="p", strict=False).resolved(3)

    assert settings.mask_words == 3
    assert of(settings.as_section()) == settings
    assert settings.as_section() == asdict(settings)
    assert Settings(policies="p", observe_only=True).resolved(3).mask_words == 0


def test_room_for_mask_actions_is_provisioned_whatever_the_policies_at_start_need() -> None:
    assert Settings(policies="p").resolved(0).mask_words == 1
    assert Settings(policies="p", mask_actions=200).resolved(1).mask_words == 4
    assert Settings(policies="p", mask_actions=64).resolved(2).mask_words == 2
    assert Settings(policies="p", mask_actions=0).resolved(0).mask_words == 1


def test_the_logs_limits_are_in_bytes() -> None:
    asked = {"decision_log_max_mib": 0.5, "decision_log_keep": 3, "decision_log_sync": "second"}
    settings = of({"policies": "p", **asked})

    assert settings is not None
    assert settings.log_limits == LogLimits(max_bytes=1 << 19, keep=3, sync="second")
    assert Settings(policies="p").log_limits == LogLimits()
