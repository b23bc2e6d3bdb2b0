"""How a server is made to fail on purpose, and how it is not by accident."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm import plugin
from guard_vllm.settings import Settings, SettingsError

from guard import fault_injection
from guard.failures import Stage
from guard.fault_injection import ALLOW_VARIABLE, FAULTS_VARIABLE

DRILL = "evaluate@3,decision_log@*"


@pytest.fixture(autouse=True)
def no_drill(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (FAULTS_VARIABLE, ALLOW_VARIABLE, "MOE_GUARD_POLICIES"):
        monkeypatch.delenv(variable, raising=False)
    yield
    fault_injection.end()


def of(**section: Any) -> Settings | None:
    return Settings.of({"moe_guard": {"policies": "p", **section}})


def test_a_strict_server_does_not_fail_on_purpose_unless_it_is_told_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SettingsError, match=r"does not fail on purpose; unset it, or .*--no-strict"):
        of(inject_faults=DRILL)
    for section in ({"strict": False}, {"allow_injected_faults": True}):
        settings = of(inject_faults=DRILL, **section)
        assert settings is not None
        assert settings.inject_faults == DRILL

    monkeypatch.setenv(FAULTS_VARIABLE, DRILL)
    with pytest.raises(SettingsError, match=f"or {FAULTS_VARIABLE}.* is '{DRILL[:8]}"):
        of()
    for value in ("", "0", "true"):
        monkeypatch.setenv(ALLOW_VARIABLE, value)
        with pytest.raises(SettingsError, match="does not fail on purpose"):
            of()
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    settings = of()
    assert settings is not None
    assert settings.inject_faults == DRILL


def test_what_cannot_be_read_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"inject_faults.*did you mean 'evaluate'"):
        of(inject_faults="evalute@3", strict=False)


def test_without_a_guard_nothing_is_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, DRILL)
    assert Settings.of({}) is None
    assert plugin._settings(SimpleNamespace(additional_config={})) is None
    assert fault_injection.drill is None


def test_every_process_that_reads_the_settings_has_the_drill() -> None:
    """They are in the config that the server's first process hands on to all others."""
    settings = of(inject_faults=DRILL, strict=False)
    assert settings is not None
    handed_on = SimpleNamespace(additional_config={"moe_guard": settings.as_section()})
    assert plugin._settings(handed_on) == settings
    drill = fault_injection.drill
    assert drill is not None
    assert [str(fault.name) for fault in drill.faults] == [Stage.EVALUATE, Stage.DECISION_LOG]
    plugin._settings(handed_on)
    assert fault_injection.drill is drill

    plugin._settings(SimpleNamespace(additional_config={"moe_guard": {"policies": "p"}}))
    assert fault_injection.drill is None
