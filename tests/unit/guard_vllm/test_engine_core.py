"""The guard in the engine core, on a core and a scheduler that only have what it hooks."""

from __future__ import annotations

import dataclasses
import math
import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.engine_core import EngineCoreGuard, external_request_id
from guard_vllm.parallel import reports_for_all
from guard_vllm.proof import Proof
from guard_vllm.settings import Settings
from guard_vllm.steps import REPORT_ATTRIBUTE
from guard_vllm.worker import WorkerStatus
from vllm.v1.core import kv_cache_utils
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from guard.errors import NotLiveError
from guard.events.ledger import Ledger
from guard.events.message import Delta, Health, Hello, News, decode
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.step_report import PackedReport, StepReport
from tests.unit.device.driving import BLOCK, COUNT, FLAGGED, MASK, OTHER, Engine, policy_text, rule_text
from tests.unit.events.reports import packed

CLOSED = "  onError: closed\n"
HOLDS = Proof(2, (), 2, ())


def status_of(text: str, proof: Proof = HOLDS) -> WorkerStatus:
    program = compile_policies(parse_policies(text), Engine(text).program.topology)
    return WorkerStatus(
        revision=program.revision,
        policies=program.policies,
        rules=program.rules,
        sets=program.sets,
        mask_rules=(),
        static_mask_rules=(),
        masked_experts={},
        masking=True,
        proof=proof,
    )


class Scheduler:
    """Accepts every step's tokens, 7 for each request where `sampled` has no others."""

    stop_token = 99

    def __init__(self) -> None:
        self.sampled: dict[str, list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.got: dict[str, tuple[list[int], bool]] = {}

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def update_from_output(self, scheduler_output: Any, output: Any) -> str:
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            self.got[req_id] = self._update_request_with_output(request, self.sampled.get(req_id, [7]))
            if self.got[req_id][1]:
                self._free_request(request)
        return "outputs"

    def _update_request_with_output(self, request: Any, tokens: list[int]) -> tuple[list[int], bool]:
        kept = [t for i, t in enumerate(tokens) if self.stop_token not in tokens[:i]]
        request.num_tokens += len(kept)
        return kept, self.stop_token in kept

    def _free_request(self, request: Any) -> None:
        del self.requests[request.request_id]


def parallel_config(backend: str, ranks: int = 1, engines: int = 1) -> Any:
    return SimpleNamespace(
        distributed_executor_backend=backend, world_size=ranks * engines, data_parallel_size=engines
    )


class Core:
    engine_index = 0

    def __init__(self, *statuses: WorkerStatus) -> None:
        self.model_executor = SimpleNamespace(collective_rpc=lambda _: list(statuses))
        self.vllm_config = SimpleNamespace(parallel_config=parallel_config("mp"))
        self.addresses = SimpleNamespace(outputs=["first", "second"])
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.scheduler: Any = None

    def add_request(self, request: Any) -> None:
        self.scheduler.requests[request.request_id] = request

    def post_step(self, model_executed: bool) -> None: ...

    def sent(self) -> list[tuple[int, Any]]:
        messages = []
        while not self.output_queue.empty():
            client, outputs = self.output_queue.get_nowait()
            messages.append((client, decode(outputs.utility_output.result.result)))
        return messages


def request(req_id: str, *enforce: str, tenant: str | None = None) -> Any:
    extra_args: dict[str, Any] = {"moe_guard_enforce": list(enforce)}
    if tenant is not None:
        extra_args["moe_guard_labels"] = {"tenant": tenant}
    return SimpleNamespace(
        request_id=req_id,
        num_tokens=1,
        num_prompt_tokens=1,
        status=RequestStatus.RUNNING,
        stop_reason=None,
        resumable=False,
        skip_reading_prefix_cache=False,
        sampling_params=SimpleNamespace(extra_args=extra_args),
        lora_request=None,
    )


@pytest.fixture(autouse=True)
def own_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard replaces for the whole process is put back."""
    stock = kv_cache_utils.generate_block_hash_extra_keys
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", stock)


def guarded(text: str, **settings: Any) -> tuple[Core, Scheduler]:
    core = Core(status_of(text))
    EngineCoreGuard(core, Settings(policies="p", **settings))
    core.scheduler = Scheduler()
    return core, core.scheduler


def step(
    core: Core, report: StepReport | PackedReport | None, *req_ids: str, computed: int = 0
) -> None:
    """computed: positions of each request that earlier steps computed"""
    output = ModelRunnerOutput(req_ids=list(req_ids), req_id_to_index={})
    if report is not None:
        setattr(output, REPORT_ATTRIBUTE, report)
    cached = SimpleNamespace(req_ids=req_ids, num_computed_tokens=[computed] * len(req_ids))
    scheduled = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(req_ids, 1),
        scheduled_cached_reqs=cached,
        scheduled_new_reqs=[],
    )
    assert core.scheduler.update_from_output(scheduled, output) == "outputs"
    core.post_step(model_executed=True)


def test_every_api_server_is_greeted_before_anything_else() -> None:
    core, _ = guarded(policy_text(rule_text(COUNT, BLOCK)))

    (first, hello), (second, again) = core.sent()

    assert (first, second) == (0, 1)
    assert isinstance(hello, Hello)
    assert hello == again
    assert hello.live


def test_workers_that_disagree_are_refused() -> None:
    texts = policy_text(rule_text(COUNT)), policy_text(rule_text(COUNT, BLOCK))

    with pytest.raises(NotLiveError, match="worker 1 has policy revision"):
        EngineCoreGuard(Core(*map(status_of, texts)), Settings(policies="p"))


def test_a_rank_that_is_blind_makes_the_engine_blind() -> None:
    text = policy_text(rule_text(COUNT))
    core = Core(status_of(text), status_of(text, Proof(2, (1,), 0, ())))
    EngineCoreGuard(core, Settings(policies="p", strict=False))

    hello = core.sent()[0][1]

    assert not hello.live
    assert hello.blind_layers == 1


@pytest.mark.parametrize(("redact", "reason"), [(False, "moe_guard:p/r"), (True, "moe_guard")])
def test_a_blocked_request_ends_without_the_tokens_of_its_step(redact: bool, reason: str) -> None:
    text = policy_text(rule_text(COUNT, BLOCK))
    engine = Engine(text)
    core, scheduler = guarded(text, redact_reasons=redact)
    bad, good = request("cmpl-bad-01234567"), request("cmpl-good-01234567")
    for one in (bad, good):
        core.add_request(one)
        engine.guard.add_request(one.request_id, 1)
    report = engine.step({bad.request_id: (0, [FLAGGED]), good.request_id: (0, [OTHER])})
    core.sent()

    step(core, report, bad.request_id, good.request_id)

    assert scheduler.got[bad.request_id] == ([], True)
    assert scheduler.got[good.request_id] == ([7], False)
    assert bad.status is RequestStatus.FINISHED_STOPPED
    assert bad.stop_reason == reason
    (client, delta), *_ = core.sent()
    assert client == 0
    assert isinstance(delta, Delta)
    assert [(d.request_id, d.outcome) for d in delta.decisions] == [("cmpl-bad", "blocked")]
    assert delta.outcomes == {"blocked": 1}


@pytest.mark.parametrize(
    ("text", "enforce", "blocked"),
    [
        (policy_text(rule_text(COUNT, BLOCK)), (), False),
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED), (), True),
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED, mode="audit"), (), False),
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED, mode="audit"), ("p",), True),
    ],
    ids=["open", "closed", "closed-in-audit", "closed-and-tightened"],
)
def test_a_step_without_a_report_follows_the_fail_mode(
    text: str, enforce: tuple[str, ...], blocked: bool
) -> None:
    core, scheduler = guarded(text)
    one = request("cmpl-a-01234567", *enforce)
    core.add_request(one)
    core.sent()

    step(core, None, one.request_id)
    scheduler.requests.clear()
    core.post_step(model_executed=False)

    assert scheduler.got[one.request_id][1] is blocked
    assert one.skip_reading_prefix_cache is blocked, "its prefix must be judged too"
    deltas = [message for _, message in core.sent() if isinstance(message, Delta)]
    assert sum(delta.failures.get("readback", 0) for delta in deltas) == 1


def two_requests() -> tuple[Core, Scheduler, Callable[[int], PackedReport]]:
    """`a` and `b`, and what is reported of them at a position at which no rule fires."""
    text = policy_text(rule_text(COUNT))
    engine = Engine(text)
    core, scheduler = guarded(text)
    for req_id in ("a", "b"):
        core.add_request(request(req_id))
        engine.guard.add_request(req_id, 1)

    def quiet_report(position: int) -> PackedReport:
        return packed(engine.step({req_id: (position, [OTHER]) for req_id in ("a", "b")}))

    return core, scheduler, quiet_report


def test_quiet_steps_are_told_when_counters_are_due_or_the_last_request_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = [0.0], []
    stock = Ledger.take

    def take(ledger: Ledger, **arguments: Any) -> Any:
        asked.append(now[0])
        return stock(ledger, **arguments)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Ledger, "take", take)
    core, scheduler, quiet_report = two_requests()

    def quiet_step(position: int) -> None:
        step(core, quiet_report(position), "a", "b")

    quiet_step(0)  # counters have waited for ever
    core.sent()
    asked.clear()
    quiet_step(1)
    assert not asked
    assert core.sent() == []
    now[0] = math.inf
    quiet_step(2)
    assert asked
    now[0] = 0.0
    scheduler.sampled = {"a": [7, Scheduler.stop_token], "b": [7, Scheduler.stop_token]}
    quiet_step(3)
    [(client, delta)] = [sent for sent in core.sent() if isinstance(sent[1], Delta)]
    assert client == 0
    assert (delta.steps, delta.outcomes, delta.tokens["output"]) == (3, {"passed": 2}, 6)


def test_a_quiet_step_of_a_request_that_has_ended_counts_for_the_others_alone() -> None:
    core, scheduler, quiet_report = two_requests()
    step(core, quiet_report(0), "a", "b")
    scheduler.requests["b"].status = RequestStatus.FINISHED_ABORTED
    core.sent()
    step(core, quiet_report(1), "a", "b")
    scheduler.requests.clear()
    core.post_step(model_executed=False)
    deltas = [message for _, message in core.sent() if isinstance(message, Delta)]
    assert sum(delta.tokens.get("output", 0) for delta in deltas) == 1


EXCEPTION = "  exceptions: [{name: e, match: {labels: {tenant: red}}}]\n"
OF_BLUE = rule_text(COUNT, BLOCK, rest=", match: {labels: {tenant: blue}}")


@pytest.mark.parametrize(
    ("text", "tenant", "enforce", "blocked"),
    [
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED + EXCEPTION), "red", (), False),
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED + EXCEPTION), "red", ("p",), True),
        (policy_text(rule_text(COUNT, BLOCK), extra=CLOSED + EXCEPTION), "blue", (), True),
        (policy_text(OF_BLUE, extra=CLOSED), "red", (), False),
        (policy_text(OF_BLUE, extra=CLOSED), "red", ("p",), False),
        (policy_text(OF_BLUE, extra=CLOSED), "blue", (), True),
    ],
    ids=["exempt", "named", "not-exempt", "not-matched", "not-matched-but-named", "matched"],
)
def test_a_fault_blocks_only_requests_on_which_a_closed_rule_acts(
    text: str, tenant: str, enforce: tuple[str, ...], blocked: bool
) -> None:
    core, scheduler = guarded(text)
    one = request("cmpl-a-01234567", *enforce, tenant=tenant)
    core.add_request(one)

    step(core, None, one.request_id)

    assert scheduler.got[one.request_id][1] is blocked
    assert one.skip_reading_prefix_cache is blocked
    assert "moe_guard_day" in one.sampling_params.extra_args


def test_an_expired_exception_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    expired = EXCEPTION.replace("}}}]", "}}, until: 2020-01-31}]")
    guarded(policy_text(rule_text(COUNT, BLOCK), extra=expired))
    assert "the exception p/e ended on 2020-01-31 and is not applied" in caplog.text


def drafting(
    sampled: list[int], rows: list[int], rejected: int = 0, rule: str = COUNT, then: str = BLOCK
) -> tuple[Any, tuple[list[int], bool], Delta]:
    """A request of two prompt tokens whose second step verifies drafts.

    rows: the experts of the rows from position 2 on
    """
    text = policy_text(rule_text(rule, then, rest=", match: {phase: output}"))
    engine = Engine(text, max_draft_tokens=3)
    core, scheduler = guarded(text)
    one = request("cmpl-a-01234567")
    one.num_tokens = 2
    core.add_request(one)
    engine.guard.add_request(one.request_id, 2)
    step(core, engine.step({one.request_id: (0, [OTHER, OTHER])}, [0]), one.request_id)
    assert one.num_tokens == 3
    core.sent()
    scheduler.sampled[one.request_id] = list(sampled)
    step(core, engine.step({one.request_id: (2, rows)}, [rejected]), one.request_id)
    got = scheduler.got[one.request_id]
    if not got[1]:
        core.scheduler._free_request(one)
        core.post_step(model_executed=False)
    deltas = [message for _, message in core.sent() if isinstance(message, Delta)]
    merged = deltas[0]
    for delta in deltas[1:]:
        merged.outcomes.update(delta.outcomes)
        merged.values.extend(delta.values)
    return one, got, merged


@pytest.mark.parametrize("first", range(4))
def test_a_block_among_accepted_drafts_keeps_the_tokens_sampled_before_it(first: int) -> None:
    """Positions 2 to 5 sample the tokens 10 to 13; the one at the block and all after it go."""
    rows = [OTHER] * first + [FLAGGED] * (4 - first)

    one, got, delta = drafting([10, 11, 12, 13], rows)

    assert got == ([10, 11, 12, 13][:first], True)
    assert one.num_tokens == 3 + first
    assert one.stop_reason == "moe_guard:p/r"
    assert [(d.position, d.outcome) for d in delta.decisions] == [(2 + first, "blocked")]
    assert delta.outcomes == {"blocked": 1}
    assert delta.tokens == {"prompt": 0, "output": first + 1}
    assert delta.selections == [1], "what was computed behind the block does not count"


def test_a_stop_among_accepted_drafts_comes_before_a_block_behind_it() -> None:
    one, got, delta = drafting([10, Scheduler.stop_token, 12, 13], [OTHER, OTHER, FLAGGED, FLAGGED])

    assert got == ([10, Scheduler.stop_token], True)
    assert one.stop_reason is None
    assert delta.decisions == []
    assert delta.outcomes == {"passed": 1}
    assert delta.tokens == {"prompt": 0, "output": 2}
    assert delta.selections == [0]


def test_a_block_ahead_of_a_stop_among_accepted_drafts_wins() -> None:
    one, got, _ = drafting([10, 11, Scheduler.stop_token], [OTHER, FLAGGED, OTHER], rejected=0)

    assert got == ([10], True)
    assert one.stop_reason == "moe_guard:p/r"


def test_a_rejected_draft_blocks_nobody() -> None:
    one, got, delta = drafting([10, 11], [OTHER, OTHER, FLAGGED, FLAGGED], rejected=2)

    assert got == ([10, 11], False)
    assert one.stop_reason is None
    assert delta.decisions == []
    assert delta.tokens == {"prompt": 0, "output": 2}


def test_a_mask_that_fires_behind_a_stop_among_accepted_drafts_masked_nothing() -> None:
    _, _, delta = drafting([10, Scheduler.stop_token, 12], [OTHER, OTHER, FLAGGED], then=MASK)

    assert delta.decisions == []
    assert delta.outcomes == {"passed": 1}


def test_the_value_furthest_beyond_was_ahead_of_what_is_cut() -> None:
    when = "{rate: {experts: f, over: 2, minTokens: 2, above: 0.9}}"
    tokens = [10, 11, Scheduler.stop_token, 13]

    _, _, delta = drafting(tokens, [FLAGGED, FLAGGED, OTHER, OTHER], rule=when, then="")

    assert [value for _, _, values in delta.values for value in values] == [1.0]


@pytest.mark.parametrize(("stop_at", "furthest"), [(0, []), (1, [0.0]), (2, [0.5]), (3, [1.0])])
def test_the_value_furthest_beyond_is_that_of_the_tokens_that_count(
    stop_at: int, furthest: list[float]
) -> None:
    tokens = [10, 11, 12, 13]
    tokens[stop_at] = Scheduler.stop_token
    when = "{rate: {experts: f, over: 2, minTokens: 2, above: 0.9}}"

    _, _, delta = drafting(tokens, [OTHER, OTHER, FLAGGED, FLAGGED], rule=when, then="")

    assert [value for _, _, values in delta.values for value in values] == furthest


def test_of_a_message_that_did_not_get_out_the_counters_go_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def deltas(breaks: bool) -> list[Delta]:
        core, scheduler = guarded(policy_text(rule_text(COUNT)))
        engine = Engine(policy_text(rule_text(COUNT)))
        engine.guard.add_request("a", 1)
        core.add_request(request("a"))
        with monkeypatch.context() as patch:
            if breaks:
                patch.setattr(core.output_queue, "put_nowait", 7)  # which cannot be called
            scheduler.sampled["a"] = [Scheduler.stop_token]
            step(core, engine.step({"a": (0, [FLAGGED])}), "a")
        core.post_step(True)
        return [message for _, message in core.sent() if isinstance(message, Delta)]

    [whole], [late] = deltas(False), deltas(True)
    assert len(whole.decisions) == 1
    assert late.decisions == []
    assert late.dropped == {"deliver": 1}
    assert late.failures == {"deliver": 1}
    for name in ("tokens", "outcomes", "decision_counts", "selections", "values"):
        assert getattr(late, name) == getattr(whole, name), name


def _step_with_a_decision(core: Core, scheduler: Scheduler) -> None:
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", 1)
    core.add_request(request("a"))
    scheduler.sampled["a"] = [Scheduler.stop_token]
    core.sent()
    step(core, engine.step({"a": (0, [FLAGGED])}), "a")


def test_api_servers_behind_the_first_hear_of_decisions_and_count_none() -> None:
    core, scheduler = guarded(policy_text(rule_text(COUNT)))

    _step_with_a_decision(core, scheduler)

    [(client, delta), (other, news)] = core.sent()
    assert (client, type(delta), other, type(news)) == (0, Delta, 1, News)
    assert news.decisions == delta.decisions
    assert len(news.decisions) == 1


def test_a_decision_that_other_api_servers_do_not_hear_of_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, scheduler = guarded(policy_text(rule_text(COUNT)))
    stock = core.output_queue.put_nowait

    def put_nowait(item: tuple[int, Any]) -> None:
        if item[0] == 1:
            raise RuntimeError("injected")
        stock(item)

    monkeypatch.setattr(core.output_queue, "put_nowait", put_nowait)
    _step_with_a_decision(core, scheduler)
    core.post_step(True)

    first, second = (message for _, message in core.sent() if isinstance(message, Delta))
    assert [sum(count.count for count in one.decision_counts) for one in (first, second)] == [1, 0]
    assert second.failures == {"deliver": 1}


def test_that_the_guard_fell_is_told_until_it_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    core, _ = guarded(policy_text(rule_text(COUNT)))
    core.add_request(request("a"))
    core.sent()
    with monkeypatch.context() as patch:
        patch.setattr(core.output_queue, "put_nowait", 7)  # which cannot be called
        step(core, None, "a")
    assert core.sent() == []
    core.post_step(True)
    assert [message for _, message in core.sent()].count(Health(0, False, 0)) == 2


@pytest.mark.parametrize("fault", ["no report", "ledger", "ledger twice"])
def test_a_step_of_which_nobody_says_whether_it_began_a_mask_may_have_begun_one(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    count = "{count: {experts: f, over: output, atLeast: 1}}"
    text = policy_text(rule_text(count, MASK))
    masking = dataclasses.replace(status_of(text), mask_rules=(0,), mask_keys=("k",))
    core = Core(masking)
    EngineCoreGuard(core, Settings(policies="p"))
    core.scheduler = Scheduler()
    core.add_request(request("a"))
    engine = Engine(text)
    engine.guard.add_request("a", 1)
    fired = [engine.step({"a": (0, [FLAGGED])}), engine.step({"a": (1, [FLAGGED])})][1]
    calls = [0]
    stock = Ledger.begin_step

    def begin_step(ledger: Ledger, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] <= ("no report", "ledger", "ledger twice").index(fault):
            raise RuntimeError("injected")
        return stock(ledger, *arguments)

    monkeypatch.setattr(Ledger, "begin_step", begin_step)
    step(core, None if fault == "no report" else fired, "a", computed=1)
    assert core.scheduler.requests["a"].moe_guard_masked_from == 2


def test_the_client_knows_its_request_by_the_id_in_the_log() -> None:
    assert external_request_id("chatcmpl-abc-01234567") == "chatcmpl-abc"
    assert external_request_id("2_cmpl-abc-0-01234567") == "cmpl-abc-0"
    assert external_request_id("unknown form") == "unknown form"


def test_every_api_server_is_told_when_the_guard_falls_and_when_it_is_up_again() -> None:
    core, _ = guarded(policy_text(rule_text(COUNT)))
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", 1)
    core.add_request(request("a"))
    core.sent()

    def health() -> list[tuple[int, Health]]:
        return [(to, message) for to, message in core.sent() if isinstance(message, Health)]

    step(core, None, "a")
    assert health() == [(0, Health(0, False, 0)), (1, Health(0, False, 0))]
    step(core, None, "a")
    assert health() == []
    step(core, engine.step({"a": (0, [OTHER])}), "a")
    assert health() == [(0, Health(0, True, 0)), (1, Health(0, True, 0))]


def test_the_guard_falls_where_not_even_a_failed_step_can_be_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, _ = guarded(policy_text(rule_text(COUNT)))
    core.add_request(request("a"))
    core.sent()

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Ledger, "begin_step", broken)
    step(core, None, "a")
    told = [message for _, message in core.sent()]
    assert Health(0, False, 0) in told
    assert [m.failures for m in told if isinstance(m, Delta)] == [{"ledger": 2}]


@pytest.mark.parametrize(
    ("on_error", "got", "outcome"),
    [(CLOSED, ([], True), "blocked"), ("", ([7], False), "unjudged")],
    ids=["closed", "open"],
)
def test_requests_follow_on_error_where_not_even_a_failed_step_can_be_entered(
    monkeypatch: pytest.MonkeyPatch, on_error: str, got: tuple[list[int], bool], outcome: str
) -> None:
    core, scheduler = guarded(policy_text(rule_text(COUNT), extra=on_error))
    core.add_request(request("a"))

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "begin_step", broken)
        step(core, None, "a")
    assert scheduler.got["a"] == got
    if not got[1]:
        scheduler._free_request(scheduler.requests["a"])
    core.post_step(True)
    outcomes = [m.outcomes for _, m in core.sent() if isinstance(m, Delta)]
    assert {name: n for found in outcomes for name, n in found.items()} == {outcome: 1}


@pytest.mark.parametrize(
    ("ranks", "engines", "reporting"), [(2, 1, [0]), (2, 2, [0, 2]), (1, 3, [0, 1, 2])]
)
def test_of_ranks_with_an_engine_core_each_the_first_of_each_replica_reports(
    monkeypatch: pytest.MonkeyPatch, ranks: int, engines: int, reporting: list[int]
) -> None:
    config = parallel_config("external_launcher", ranks, engines)
    for rank in range(ranks * engines):
        monkeypatch.setenv("RANK", str(rank))
        assert reports_for_all(config) == (rank in reporting)


def test_an_engine_core_of_all_ranks_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # of a launcher that has nothing to do with it
    assert reports_for_all(parallel_config("mp", ranks=2))
