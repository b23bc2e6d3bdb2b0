"""Which blocks of KV may be shared between requests under masks: told by their extra keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.kv_isolation import Isolation
from guard_vllm.proof import Proof
from guard_vllm.worker import WorkerStatus
from vllm.v1.core import kv_cache_utils

from guard.overrides.apply import apply_overrides
from guard.overrides.model import Overrides
from guard.policy import PolicySet, parse_policies
from guard.program.compile import compile_policies
from tests.unit.device.driving import TOPOLOGY, policy_text, rule_text

STATIC = rule_text("{always: {}}", "{mask: {experts: f}}")
OUTPUT = STATIC.replace("name: r", "name: o").replace("}}}", "}}, match: {phase: output}}")


def status(rules: str, mode: str = "enforce") -> WorkerStatus:
    return status_of(parse_policies(policy_text(rules, mode=mode)))


def status_of(policies: PolicySet) -> WorkerStatus:
    program = compile_policies(policies, TOPOLOGY)
    masks = program.masks
    return WorkerStatus(
        revision=program.revision,
        policies=program.policies,
        rules=program.rules,
        sets=program.sets,
        mask_rules=tuple(masks.rule.tolist()),
        static_mask_rules=tuple(masks.rule[masks.static].tolist()),
        mask_keys=masks.keys,
        masked_experts={},
        masking=True,
        proof=Proof(2, (), 2, ()),
    )


def request(
    req_id: str = "a",
    prompt: int = 20,
    enforce: list[str] | None = None,
    labels: dict[str, str] | None = None,
) -> Any:
    extra: dict[str, Any] = {}
    if enforce is not None:
        extra["moe_guard_enforce"] = enforce
    if labels is not None:
        extra["moe_guard_labels"] = labels
    return SimpleNamespace(
        request_id=req_id,
        num_prompt_tokens=prompt,
        sampling_params=SimpleNamespace(extra_args=extra or None),
        lora_request=None,
    )


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """keys(status)(request, end): the extra keys of the block of 16 that ends there."""

    def stock(request: Any, start: int, end: int, mm: int) -> tuple[Any, int]:
        return getattr(request, "stock_keys", None), mm + 1

    def install(given: WorkerStatus | Isolation) -> Any:
        monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", stock)
        isolation = given if isinstance(given, Isolation) else Isolation(given)
        isolation.install()

        def of(request: Any, end: int) -> Any:
            found, mm = kv_cache_utils.generate_block_hash_extra_keys(request, end - 16, end, 4)
            assert mm == 5, "the multimodal index is vLLM's own"
            return found

        return of

    return install


def test_without_masks_vllms_own_keys_stay_as_they_are(keys: Any) -> None:
    of = keys(status(rule_text("{always: {}}")))
    with_stock = request()
    with_stock.stock_keys = ("lora",)

    assert of(request(), 16) is None
    assert of(with_stock, 16) == ("lora",)


def test_an_operators_mask_for_one_request_keeps_its_blocks_from_all_others(keys: Any) -> None:
    layer = TOPOLOGY.layers[0].number
    overrides, _ = Overrides().with_mask([(layer, 0)], by="a", reason="r", request="cmpl-x")
    of = keys(
        status_of(apply_overrides(parse_policies(policy_text(rule_text("{always: {}}"))), overrides))
    )
    # Alike in all but their ids, and the unmasked one asked about first.
    assert of(request("cmpl-y-0123abcd"), 16) is None
    masked = of(request("cmpl-x-0123abcd"), 16)
    assert masked is not None
    assert of(request("cmpl-y-89abcdef"), 16) is None


def test_blocks_that_end_behind_the_start_of_a_mask_belong_to_their_request(keys: Any) -> None:
    isolation = Isolation(status(rule_text("{always: {}}")))
    of = keys(isolation)
    masked = request("a", 20)
    masked.stock_keys = ("lora",)
    isolation.isolate_from(masked, 32)

    assert of(masked, 32) == ("lora",), "position 31 is its last, and not masked"
    assert of(masked, 48) == ("lora", ("moe_guard", "a"))


def test_the_first_start_stays(keys: Any) -> None:
    isolation = Isolation(status(rule_text("{always: {}}")))
    of = keys(isolation)
    masked = request()
    isolation.isolate_from(masked, 20)
    isolation.isolate_from(masked, 90)

    assert of(masked, 32) == (("moe_guard", "a"),)


LATE = rule_text("{count: {experts: f, over: output, atLeast: 9}}", "{mask: {experts: f}}")


@pytest.mark.parametrize(("position", "shared"), [(10, 20), (31, 32), (40, 41)])
def test_behind_a_step_that_may_have_begun_a_mask_blocks_belong_to_their_request(
    keys: Any, position: int, shared: int
) -> None:
    """The prompt has 20 positions, which no mask that begins can reach."""
    isolation = Isolation(status(LATE))
    of = keys(isolation)
    unjudged = request("a", 20)

    isolation.suspect(unjudged, position)

    assert of(unjudged, shared) is None
    assert of(unjudged, shared + 1) == (("moe_guard", "a"),)


@pytest.mark.parametrize(("mode", "enforce", "own"), [("audit", None, False), ("audit", ["p"], True)])
def test_where_no_mask_can_begin_an_unjudged_step_leaves_blocks_shared(
    keys: Any, mode: str, enforce: list[str] | None, own: bool
) -> None:
    isolation = Isolation(status(LATE, mode))
    of = keys(isolation)
    unjudged = request("a", 5, enforce)

    isolation.suspect(unjudged, 10)

    assert (of(unjudged, 16) is not None) == own
    static = request("b", 5)
    Isolation(status(STATIC)).suspect(static, 10)
    assert of(static, 16) is None


def test_requests_under_the_same_static_masks_share_and_no_other_does(keys: Any) -> None:
    enforced, audited = status(STATIC), status(STATIC, "audit")
    of = keys(enforced)
    shared = of(request("a"), 16)
    assert shared is not None
    assert of(request("b", 99), 16) == shared

    of = keys(audited)
    assert of(request("a"), 16) is None
    assert of(request("a", enforce=["p"]), 16) == shared, "another revision, but the same mask"
    assert keys(status(STATIC.replace("{experts: f}", "{experts: f, method: drop}")))(
        request("a"), 16
    ) not in (None, shared)


EXCEPTION = """
  exceptions: [{name: e, match: {labels: {tenant: red}}}]
"""


def test_only_requests_on_which_a_static_mask_acts_are_kept_apart(keys: Any) -> None:
    matched = STATIC.replace("name: r", "name: r, match: {labels: {tenant: [red, blue]}}")
    of = keys(status(matched))
    red, blue = request(labels={"tenant": "red"}), request(labels={"tenant": "blue"})
    assert of(request(), 16) is None
    assert of(red, 16) == of(blue, 16) is not None

    of = keys(status(STATIC + EXCEPTION))
    red = request(labels={"tenant": "red"})
    assert of(red, 16) is None, "it is exempt"
    assert of(request(), 16) is not None
    assert of(request(labels={"tenant": "red"}, enforce=["p"]), 16) == of(request(), 16)


def test_an_unjudged_step_leaves_blocks_of_an_exempt_request_shared(keys: Any) -> None:
    isolation = Isolation(status(LATE + EXCEPTION))
    of = keys(isolation)
    for labels, own in (({}, True), ({"tenant": "red"}, False)):
        unjudged = request(prompt=5, labels=labels)
        isolation.suspect(unjudged, 10)
        assert (of(unjudged, 16) is not None) == own


def test_static_masks_of_the_output_key_the_blocks_that_hold_output(keys: Any) -> None:
    of = keys(status(OUTPUT))

    assert of(request(prompt=16), 16) is None
    assert of(request(prompt=15), 16) is not None


def test_equal_tokens_masked_from_different_positions_are_told_apart(keys: Any) -> None:
    of = keys(status(OUTPUT))

    assert of(request("a", 5), 16) != of(request("b", 10), 16)
    assert of(request("a", 5), 16) == of(request("b", 5), 16)


def test_a_request_without_sampling_parameters_is_keyed_too(keys: Any) -> None:
    pooled = request()
    pooled.sampling_params = None

    assert keys(status(STATIC))(pooled, 16) is not None


BEGINS = LATE.replace("name: r", "name: begins")


class Hashed:
    """A request with blocks of 4 tokens, hashed as soon as they are full."""

    def __init__(self, req_id: str, of: Any, tokens: int = 16, **more: Any) -> None:
        self.__dict__.update(vars(request(req_id, 8)))
        self.num_tokens = tokens
        self.num_computed_tokens = self.num_output_tokens = self.num_preemptions = 0
        self.num_in_flight_tokens = 0
        self.__dict__.update(more)
        self._of = of
        self.block_hashes: list[Any] = []
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        while (end := 4 * (len(self.block_hashes) + 1)) <= self.num_tokens:
            self.block_hashes.append(self._of(self, end))


def scheduler_of(*requests: Any) -> Any:
    return SimpleNamespace(hash_block_size=4, requests={r.request_id: r for r in requests})


def test_blocks_that_are_not_computed_yet_are_named_after_the_masks_in_force(keys: Any) -> None:
    isolation = Isolation(status(BEGINS))
    of = keys(isolation)
    waiting, running = Hashed("w", of), Hashed("r", of, num_computed_tokens=9)
    late = Hashed("l", of)
    isolation.follow(status(BEGINS + STATIC), scheduler_of(waiting, running))
    masked = of(request("new", 8), 4)

    assert masked is not None
    assert waiting.block_hashes == [masked] * 4
    assert running.block_hashes == [(("moe_guard", "r"),)] * 4
    isolation.admit(late)  # it was hashed as it came in, and admitted behind the change
    assert late.block_hashes == [masked] * 4


def test_equal_masks_share_across_reloads_and_a_change_of_another_rule_renames_nothing(
    keys: Any,
) -> None:
    isolation = Isolation(status(STATIC))
    of = keys(isolation)
    running = Hashed("r", of, num_computed_tokens=9)
    before = list(running.block_hashes)
    isolation.follow(status(BEGINS + STATIC), scheduler_of(running))

    assert running.block_hashes == before
    assert of(request("new", 8), 4) == before[0]


@pytest.mark.parametrize("mode", ["audit", None], ids=["audit", "removed"])
def test_what_is_computed_behind_the_end_of_a_static_mask_is_the_requests_own(
    keys: Any, mode: str | None
) -> None:
    isolation = Isolation(status(STATIC))
    of = keys(isolation)
    running = Hashed("r", of, num_computed_tokens=9)
    isolation.follow(status(STATIC, mode) if mode else status(LATE), scheduler_of(running))

    assert running.block_hashes == [(("moe_guard", "r"),)] * 4
    assert of(request("new", 8), 4) is None


def test_a_request_under_an_equal_mask_of_another_rule_shares_no_blocks(keys: Any) -> None:
    """Its worker goes by rules: positions from before the reload are computed again without a mask."""
    isolation = Isolation(status(STATIC))
    of = keys(isolation)
    running = Hashed("r", of, num_computed_tokens=9)
    masked = running.block_hashes[0]
    renamed = STATIC.replace("name: r", "name: renamed")
    assert renamed != STATIC
    isolation.follow(status(renamed), scheduler_of(running))

    assert running.block_hashes == [(("moe_guard", "r"),)] * 4
    assert of(request("new", 8), 4) == masked


def test_a_step_of_the_policies_before_may_still_have_begun_one_of_their_masks(keys: Any) -> None:
    isolation = Isolation(status(LATE))
    of = keys(isolation)
    unjudged = request("a", 5)
    isolation.follow(status(rule_text("{always: {}}")), scheduler_of())
    isolation.suspect(unjudged, 10)

    assert of(unjudged, 16) == (("moe_guard", "a"),)
