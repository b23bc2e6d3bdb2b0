"""Each reader of untrusted input holds what docs/fuzzing.md says, and a fault in it would be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guard_vllm.admin import context as admin
from guard_vllm.admin import routes

from guard.errors import GuardError
from guard.events.webhooks import WebhookError, read_webhooks
from guard.overrides.model import OverrideError, Overrides
from guard.source.serial import Serials
from tools.fuzz.process import TARGETS, open_target
from tools.fuzz.rounds import Counts, check_both_sides, run_turn

EXAMPLES = 40
"""Of each part."""


@pytest.fixture(autouse=True)
def _no_admin_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_contexts", [])


def fuzz(target: str, folder: Path, num_examples: int = EXAMPLES, only: str = "") -> None:
    parts = {name: part for name, part in open_target(target)(folder).items() if only in name}
    counts: Counts = Counter()
    for name, part in parts.items():
        run_turn(name, part, folder, counts, num_examples=num_examples, is_made_smaller=False)
    check_both_sides(counts, parts)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_and_sees_both_outcomes(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path)


def faulty(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Instead of the error that people are told, one of ours."""

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except GuardError:
            raise KeyError("planted") from None

    return called


@pytest.mark.parametrize(
    ("target", "reader"),
    [
        ("policies", "guard.source.watcher.load_texts"),
        ("profile", "tools.fuzz.profile.load_profile"),
        ("bundle", "tools.fuzz.bundle.read_bundle"),
        ("trace", "tools.fuzz.trace.TraceReader"),
        ("importers", "tools.fuzz.importers.import_sets"),
        ("keys", "tools.fuzz.keys.read_webhooks"),
        ("log", "guard.events.log.loose.is_json"),
        ("xargs", "guard_vllm.frontend.request_args.check_request_args"),
        ("admin", "guard_vllm.admin.routes.parse_experts"),
    ],
)
def test_an_error_that_is_not_documented_is_seen(
    target: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = reader.rpartition(".")
    stock = getattr(__import__(module, fromlist=[name]), name)
    planted = always_faulty if target in ("log", "admin") else faulty(stock)  # a log is never refused
    monkeypatch.setattr(reader, planted)
    with pytest.raises((KeyError, AssertionError)) as seen:
        fuzz(target, tmp_path, 200)
    assert "the smallest example: " in seen.value.__notes__[-1]


def always_faulty(*_: Any) -> bool:
    raise KeyError("planted")


def test_an_older_bundle_that_is_accepted_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Serials, "check", lambda *_: None)
    with pytest.raises(AssertionError):
        fuzz("bundle", tmp_path, 300, only="signed")


def test_a_change_that_is_refused_and_kept_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(context: Any, edit: Callable[[Overrides], Overrides]) -> str:
        context.store.write(edit(context.store.read()))
        raise OverrideError("planted")

    monkeypatch.setattr(routes, "_edit", edit)
    with pytest.raises(AssertionError, match="it was refused, but before it was"):
        fuzz("admin", tmp_path, 200)


def test_a_key_that_is_quoted_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def quoting(path: Path) -> Any:
        try:
            return read_webhooks(path)
        except GuardError as error:
            raise WebhookError(f"{error}: {path.read_bytes()!r}") from error

    monkeypatch.setattr("tools.fuzz.keys.read_webhooks", quoting)
    with pytest.raises(AssertionError, match="a secret is quoted"):
        fuzz("keys", tmp_path)
