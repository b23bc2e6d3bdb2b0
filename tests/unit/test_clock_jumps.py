"""The wall clock jumps, back by an hour or forward by a year: what must not follow it does not."""

from __future__ import annotations

import ast
import re
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from guard_vllm.request_facts import facts_of_request, send_day

from guard.events.ledger import Ledger
from guard.events.rulebook import RuleBook
from guard.events.tally import FLUSH_SECONDS
from guard.overrides.desk import Desk
from guard.overrides.model import Overrides
from guard.overrides.store import OverrideStore
from guard.policy import parse_policies
from guard.program.applicability import RequestFacts, rules_for
from guard.program.compile import compile_policies
from tests.unit.device.driving import BLOCK, COUNT, TOPOLOGY, policy_text, rule_text
from tests.unit.events.reports import Row, everyone, report, rule
from tests.unit.overrides.test_overrides import Engines, texts

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2027, 3, 31, 12, tzinfo=UTC).timestamp()
BACK, FORWARD = -3600.0, 365 * 86_400.0
JUMPS = pytest.mark.parametrize("jump", [BACK, FORWARD], ids=["back", "forward"])


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What `time.time` says; nothing else moves."""
    clock = Clock(NOON)
    monkeypatch.setattr(time, "time", clock)
    return clock


@JUMPS
def test_counters_are_told_in_time_whatever_the_clock_says(jump: float) -> None:
    wall, timer = Clock(NOON), Clock(10.0)
    ledger = Ledger(0, RuleBook("rev-1", (rule("watch"),), (), 1), clock=wall, timer=timer)

    def due() -> bool:
        ledger.begin_step(report(Row("a"), num_rules=1), everyone)
        ledger.end_step()
        return ledger.take(idle=False) is not None

    assert due()
    wall.now += jump
    assert not due(), "counters wait for a moment"
    timer.now += 2 * FLUSH_SECONDS
    assert due()


@JUMPS
def test_a_decision_has_the_time_that_the_clock_says(jump: float) -> None:
    wall = Clock(NOON + jump)
    ledger = Ledger(0, RuleBook("rev-1", (rule("watch"),), (), 1), clock=wall)
    ledger.begin_step(report(Row("a", events=[(0, 3, True)]), num_rules=1), everyone)
    delta = ledger.take(idle=False)
    assert delta is not None
    [decision] = delta.decisions
    assert datetime.fromisoformat(decision.time).timestamp() == NOON + jump


@pytest.mark.parametrize(
    ("jump", "stays"), [(0.0, True), (BACK, True), (FORWARD, False)], ids=["none", "back", "forward"]
)
def test_an_operators_mask_ends_by_the_clock(
    tmp_path: Path, wall: Clock, jump: float, stays: bool
) -> None:
    """It is kept over restarts, so it can end by nothing else: back, it holds for as much longer."""
    store = OverrideStore(tmp_path / "state")
    store.keep_texts(texts())
    desk = Desk(store, Engines().put)

    def mask(overrides: Overrides) -> Overrides:
        lasts = timedelta(minutes=30)
        return overrides.with_mask([(1, 2)], by="a", reason="r", lasts=lasts)[0]

    desk.change(mask)
    wall.now += jump
    assert bool(desk.end_expired()) is not stays
    wall.now += 1800.0
    desk.end_expired()
    assert bool(store.read().masks) is (jump == BACK)
    wall.now += -min(jump, 0.0)
    desk.end_expired()
    assert not store.read().masks


EXEMPT = "  exceptions: [{name: e, match: {labels: {tenant: red}}, until: 2027-03-31}]\n"


@pytest.mark.parametrize(
    ("day", "exempt"),
    [(date(2027, 3, 31), True), (date(2027, 3, 30), True), (date(2028, 3, 30), False)],
    ids=["none", "back", "forward"],
)
def test_an_exception_is_judged_by_the_day_on_which_its_request_came(day: date, exempt: bool) -> None:
    program = compile_policies(
        parse_policies(policy_text(rule_text(COUNT, BLOCK), extra=EXEMPT)), TOPOLOGY
    )
    facts = RequestFacts("a", labels={"tenant": "red"}, today=day)
    assert rules_for(program.rules, facts).exempt_R.tolist() == [exempt]


def test_a_jump_while_a_request_runs_changes_no_rule_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    today = [date(2027, 3, 31)]
    monkeypatch.setattr("guard_vllm.request_facts.utc_today", lambda: today[0])
    params = SimpleNamespace(extra_args={})
    request = SimpleNamespace(request_id="a", sampling_params=params, lora_request=None)
    send_day(request)
    today[0] += timedelta(days=365)
    assert facts_of_request(request).today == date(2027, 3, 31)
    assert request.sampling_params.extra_args["moe_guard_day"] == "2027-03-31", "as the workers read it"


@JUMPS
def test_waits_are_over_when_their_time_is(wall: Clock, jump: float) -> None:
    """Threads of the guard wait for events with a time limit, and so do its queues."""
    passed = threading.Event()

    def wait() -> None:
        threading.Event().wait(0.05)
        passed.set()

    threading.Thread(target=wait, daemon=True).start()
    wall.now += jump
    assert passed.wait(60)


_CLOCKS = re.compile(
    r"\btime\.time\b|\bdatetime\.(now|utcnow|today)\b|\bdate\.today\b|\butc_today\(|\bgmtime\b|\blocaltime\b"
)


def uses_of_the_clock() -> set[str]:
    """`file function` of each place that reads the wall clock."""
    found = set()
    for folder in (ROOT / "guard", ROOT / "integrations" / "vllm" / "guard_vllm"):
        for path in sorted(folder.rglob("*.py")):
            source = path.read_text("utf-8")
            if not _CLOCKS.search(source):
                continue
            lines = {
                number
                for number, line in enumerate(source.splitlines(), 1)
                if _CLOCKS.search(line) and not line.lstrip().startswith(("#", "def "))
            }
            found |= {f"{path.relative_to(ROOT)} {_function(source, line)}" for line in lines}
    return found


def _function(source: str, line: int) -> str:
    inside = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.lineno <= line <= (node.end_lineno or line)
    ]
    return ".".join(node.name for node in inside)


def documented() -> set[str]:
    """The same, as docs/fail-modes.md lists them."""
    section = (ROOT / "docs" / "fail-modes.md").read_text("utf-8").partition("## The clock")[2]
    return set(re.findall(r"^\| `([^`]+)` \|", section.partition("\n## ")[0], re.MULTILINE))


def test_every_use_of_the_wall_clock_is_known_and_what_a_jump_does_there() -> None:
    """A time limit or an interval reads `time.monotonic`; what is new here belongs into that table."""
    assert uses_of_the_clock() == documented()
