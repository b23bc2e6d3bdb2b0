"""What operators change: checked when it is asked for, applied like any policy, kept over restarts."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guard.overrides.desk
from guard.failures import Failures
from guard.overrides.apply import apply_overrides
from guard.overrides.desk import Desk, Expiry
from guard.overrides.model import (
    MAX_MASKS,
    OverrideError,
    Overrides,
    parse_duration,
    parse_experts,
)
from guard.overrides.store import AUDIT, OverrideStore
from guard.policy import PolicyError, PolicySet, PolicyTexts, load_texts, parse_policies
from guard.policy.model import Mask, Mode
from guard.policy.texts import Text
from guard.program.applicability import RequestFacts, client_ids, rules_for
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology

POLICY = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: NAME}\nspec:\n  mode: enforce\n"
    "  experts: {one: [{layer: 1, experts: 3}]}\n"
    "  rules: [{name: r, when: {count: {experts: one, above: 3}}, then: {block: {}}}]\n"
)
TOPOLOGY = Topology("TestMoeForCausalLM", tuple(MoELayer(n, 8, 2) for n in range(3)))


def policies(name: str = "a") -> PolicySet:
    return parse_policies(POLICY.replace("NAME", name))


def texts(name: str = "a") -> PolicyTexts:
    return PolicyTexts((Text("a.yaml", POLICY.replace("NAME", name)),))


def masked(*experts: tuple[int, int], **more: object) -> Overrides:
    asked = {"by": "alice", "reason": "an incident", **more}
    return Overrides().with_mask(experts, **asked)[0]  # type: ignore[arg-type]


@dataclass
class Result:
    revision: str
    fault: str | None = None


@dataclass
class Engines:
    """Compile what they get, as real ones do."""

    in_force: PolicySet = field(default_factory=policies)

    def put(self, load: Callable[[], PolicySet]) -> Result:
        try:
            found = load()
            compile_policies(found, TOPOLOGY)
        except PolicyError as error:
            return Result(self.in_force.revision, str(error))
        self.in_force = found
        return Result(found.revision)


@pytest.fixture
def store(tmp_path: Path) -> OverrideStore:
    return OverrideStore(tmp_path / "state")


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def desk(store: OverrideStore, engines: Engines) -> Desk:
    store.keep_texts(texts())
    return Desk(store, engines.put)


@pytest.mark.parametrize(
    ("text", "experts"),
    [
        ("L12/E85", ((12, 85),)),
        ("l0/e0", ((0, 0),)),
        ("L3/E7-9", ((3, 7), (3, 8), (3, 9))),
    ],
)
def test_experts_are_named_by_layer_and_id(text: str, experts: tuple[tuple[int, int], ...]) -> None:
    assert parse_experts([text]) == experts


@pytest.mark.parametrize("text", ["", "12/85", "L12", "L12/E85-", "L1/E9-3", "L1/E0-99999", "E85/L12"])
def test_what_names_no_expert_is_refused(text: str) -> None:
    with pytest.raises(OverrideError, match=r"names no expert|is no range"):
        parse_experts([text])


@given(st.integers(0, 90), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    text = f"{days}d{hours}h{minutes}m{seconds}s"
    wanted = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    assert parse_duration(text) == wanted


def test_policies_are_parsed_once_however_often_masks_change(
    desk: Desk, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[PolicyTexts] = []

    def parse(found: PolicyTexts) -> PolicySet:
        parsed.append(found)
        return load_texts(found)

    monkeypatch.setattr(guard.overrides.desk, "load_texts", parse)
    first, other = texts("a"), texts("b")
    desk.change(lambda _: masked((1, 3)))
    desk.change(lambda _: Overrides())
    desk.take(first)
    assert parsed == [first]

    assert desk.take(other).revision == desk.revision_of(other) == engines.in_force.revision
    desk.change(lambda _: masked((1, 3)))
    assert parsed == [first, other]
    assert [policy.name for policy in engines.in_force.policies if policy.name in "ab"] == ["b"]


@pytest.mark.parametrize("text", ["", "2", "h", "2 hours", "-1h", "1h2d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(OverrideError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reason": "  "}, "needs a reason"),
        ({"reason": "x" * 501}, "500 characters"),
        ({"lasts": timedelta(0)}, "up to 90 days"),
        ({"lasts": timedelta(days=91)}, "up to 90 days"),
        ({"method": "force"}, "not 'force'"),
        ({"labels": {"a": "b"}, "request": "c"}, "not for both"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(OverrideError, match=message):
        masked((1, 2), **more)
    with pytest.raises(OverrideError, match="names one expert at least"):
        masked()


def test_numbers_of_masks_are_given_out_again_and_end() -> None:
    overrides = Overrides()
    for _ in range(MAX_MASKS):
        overrides, _ = overrides.with_mask([(0, 1)], by="a", reason="r")
    with pytest.raises(OverrideError, match="there are 64 masks already"):
        overrides.with_mask([(0, 1)], by="a", reason="r")
    overrides = overrides.without_mask("mask-7")
    _, mask = overrides.with_mask([(0, 1)], by="a", reason="r")
    assert mask.id == "mask-7"
    with pytest.raises(OverrideError, match="no mask is called 'mask-99'"):
        overrides.without_mask("mask-99")


def test_a_mask_is_a_rule_of_a_policy_of_its_own() -> None:
    found = apply_overrides(policies(), masked((1, 2), (2, 5), labels={"tenant": "acme"}))
    [own] = [policy for policy in found.policies if policy.name == "operator"]
    [rule] = own.rules
    assert own.mode is Mode.ENFORCE
    assert isinstance(rule.then, Mask)
    assert sorted(rule.then.experts.weights) == [(1, 2), (2, 5)]
    assert rule.match.labels == {"tenant": frozenset(["acme"])}
    assert found.revision != policies().revision


def test_without_overrides_the_set_is_the_same() -> None:
    loaded = policies()
    assert apply_overrides(loaded, Overrides()) is loaded
    assert apply_overrides(loaded, Overrides(modes={"a": "enforce"})) is loaded


def test_modes_and_the_kill_switch() -> None:
    off = apply_overrides(policies(), Overrides(modes={"a": "off"}))
    assert [policy.mode for policy in off.policies] == [Mode.OFF]
    softened = apply_overrides(policies(), Overrides(masks=masked((1, 2)).masks, kill_switch=True))
    assert {policy.name: policy.mode for policy in softened.policies} == {
        "a": Mode.AUDIT,
        "operator": Mode.AUDIT,
    }


def test_the_operators_name_is_taken() -> None:
    with pytest.raises(PolicyError, match="the name 'operator' is that of operators' masks"):
        apply_overrides(policies("operator"), Overrides())


def test_a_mask_for_one_request_applies_to_that_one() -> None:
    found = apply_overrides(policies(), masked((1, 2), request="chatcmpl-abc"))
    program = compile_policies(found, TOPOLOGY)
    own = [rule.policy for rule in program.rules].index("operator")
    for request_id, applies in (
        ("chatcmpl-abc-0123abcd", True),
        ("2_chatcmpl-abc-0123abcd", True),
        ("chatcmpl-abd-0123abcd", False),
        ("chatcmpl-abc2-0123abcd", False),
    ):
        facts = RequestFacts(request_id=request_id)
        assert bool(rules_for(program.rules, facts).applies_R[own]) is applies, request_id
    assert "cmpl-x" in client_ids("cmpl-x-0-0123abcd")


def test_a_mask_that_leaves_too_few_experts_changes_nothing(
    desk: Desk, store: OverrideStore, engines: Engines
) -> None:
    before = engines.in_force
    _, result = desk.change(
        lambda now: now.with_mask(parse_experts(["L1/E0-6"]), by="a", reason="r")[0]
    )
    assert result.fault is not None
    assert "layer 1" in result.fault
    assert "1 of 8" in result.fault or "1 expert" in result.fault or "only 1" in result.fault
    assert store.read() == Overrides()
    assert engines.in_force is before


def test_a_change_is_kept_and_what_is_written_stays(
    desk: Desk, store: OverrideStore, engines: Engines
) -> None:
    desk.change(lambda now: now.with_mask([(1, 2)], by="a", reason="r")[0])
    desk.change(lambda now: now.with_mode("a", "audit"))
    assert {policy.name: policy.mode for policy in engines.in_force.policies} == {
        "a": Mode.AUDIT,
        "operator": Mode.ENFORCE,
    }
    restarted = Desk(OverrideStore(store.folder), engines.put)
    restarted.change(lambda now: now.without_mask("mask-1").with_mode("a", None))
    assert {policy.name: policy.mode for policy in engines.in_force.policies} == {"a": Mode.ENFORCE}


def test_a_reload_keeps_what_operators_changed(desk: Desk, engines: Engines) -> None:
    desk.change(lambda now: now.with_mask([(1, 2)], by="a", reason="r")[0])
    result = desk.take(texts("b"))
    assert result.fault is None
    assert sorted(policy.name for policy in engines.in_force.policies) == ["b", "operator"]
    assert desk.revision_of(texts("b")) == result.revision
    desk.change(lambda now: now.without_mask("mask-1"))
    assert [policy.name for policy in engines.in_force.policies] == ["b"]


def test_the_mode_of_a_policy_that_is_not_there_is_refused(desk: Desk, store: OverrideStore) -> None:
    with pytest.raises(OverrideError, match="there is no policy 'z'; there is a"):
        desk.change(lambda now: now.with_mode("z", "off"))
    assert store.read() == Overrides()


def test_a_mode_whose_policy_a_reload_took_away_stands_in_nobodys_way(
    desk: Desk, store: OverrideStore, engines: Engines
) -> None:
    desk.change(lambda now: now.with_mode("a", "audit"))
    assert desk.take(texts("b")).fault is None
    _, result = desk.change(lambda now: now.with_mask([(1, 2)], by="a", reason="r")[0])
    assert result.fault is None
    assert [mask.id for mask in store.read().masks] == ["mask-1"]
    desk.take(texts("a"))
    assert {policy.name: policy.mode for policy in engines.in_force.policies}["a"] is Mode.AUDIT


def test_masks_end_by_themselves(desk: Desk, store: OverrideStore, engines: Engines) -> None:
    soon = timedelta(seconds=0.05)
    desk.change(lambda now: now.with_mask([(1, 2)], by="a", reason="r", lasts=soon)[0])
    desk.change(lambda now: now.with_mask([(1, 4)], by="a", reason="r")[0])
    time.sleep(0.06)
    assert desk.end_expired() == ["mask-1"]
    assert [mask.id for mask in store.read().masks] == ["mask-2"]
    assert desk.end_expired() == []
    assert '"mask":"mask-1"' in (store.folder / AUDIT).read_text()


def test_the_thread_lifts_them(desk: Desk, store: OverrideStore) -> None:
    soon = timedelta(seconds=0.05)
    desk.change(lambda now: now.with_mask([(1, 2)], by="a", reason="r", lasts=soon)[0])
    failures = Failures()
    expiry = Expiry(desk, failures)
    expiry.start()
    deadline = time.monotonic() + 30
    while store.read().masks and time.monotonic() < deadline:
        time.sleep(0.05)
    expiry.stop()
    assert not store.read().masks
    assert failures.count == {}


def test_changes_from_many_sides_all_count(store: OverrideStore, engines: Engines) -> None:
    store.keep_texts(texts())
    desks = [Desk(OverrideStore(store.folder), engines.put) for _ in range(4)]

    def change(desk: Desk, number: int) -> None:
        desk.change(lambda now: now.with_mask([(number % 3, number % 4)], by="a", reason="r")[0])

    threads = [
        threading.Thread(target=change, args=(desks[number % 4], number)) for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({mask.id for mask in store.read().masks}) == 12


def test_the_state_is_its_owners_alone_and_damage_is_said(store: OverrideStore) -> None:
    store.write(masked((1, 2)))
    store.audit("alice", "mask", "r", "done")
    for file in store.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    (store.folder / "overrides.json").write_text('{"masks": 3}')
    with pytest.raises(OverrideError, match=r"overrides\.json cannot be read"):
        store.read()


def test_what_is_nested_without_end_is_damage(store: OverrideStore) -> None:
    store.keep_texts(texts())
    (store.folder / "policies-in-force.json").write_text('{"x":' + "[" * 5000)
    with pytest.raises(OverrideError, match=r"policies-in-force\.json cannot be read"):
        store.texts()


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OverrideError, match=r"the state folder .* cannot be used"):
        OverrideStore(tmp_path / "file" / "state").write(Overrides())
