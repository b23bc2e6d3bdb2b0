"""The example of the policy language, cut to what this version has, and the objects it means."""

from __future__ import annotations

from textwrap import dedent

from guard.policy import Location, PolicySet, parse_policies
from guard.policy.model import (
    All,
    Block,
    Comparison,
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Mask,
    MaskMethod,
    Maturity,
    Mode,
    ModelRequirement,
    NamedWindow,
    Not,
    OnError,
    Persist,
    Phase,
    Policy,
    Rule,
    Severity,
)

EXAMPLE = dedent("""\
    apiVersion: moe-guard/v1
    kind: Policy
    metadata:
      name: restricted-chemistry        # unique in a policy set
      description: Output drifts into restricted synthesis.
      severity: high
      maturity: sandbox
      labels: {owner: trust-safety}
    spec:
      mode: audit
      onError: open
      model:
        architecture: Qwen3MoeForCausalLM
        layers: 48
        experts: 128
        topK: 8
      experts:
        flagged:
          - {layer: 12, experts: [85, 90-95]}
          - {layers: 20-23, experts: [7]}
        weighted:
          - {layer: 3, weights: {17: 0.8, 42: -0.2}}
      rules:
        - name: burst
          match: {phase: output}
          when:
            rate: {experts: flagged, over: 64, minTokens: 16, above: 0.12}
          persist: {hits: 2, of: 3}
          then:
            mask: {experts: flagged, method: reroute, until: request-end}
        - name: stop
          when:
            all:
              - mass: {experts: flagged, over: request, minTokens: 32, above: 0.30}
              - not: {count: {experts: flagged, over: token, atMost: 0}}
          then:
            block: {message: This request was stopped by policy.}
    """)


def at(line: int, column: int) -> Location:
    return Location("p.yaml", line, column)


def test_example_loads_to_exactly_the_objects_that_it_means() -> None:
    flagged = ExpertSet(
        name="flagged",
        entries=(
            ExpertEntry((12,), dict.fromkeys([85, *range(90, 96)], 1.0), at(19, 9)),
            ExpertEntry((20, 21, 22, 23), {7: 1.0}, at(20, 9)),
        ),
        location=at(18, 5),
    )
    weighted = ExpertSet(
        name="weighted",
        entries=(ExpertEntry((3,), {17: 0.8, 42: -0.2}, at(22, 9)),),
        location=at(21, 5),
    )
    burst = Rule(
        name="burst",
        when=Condition(
            kind=ConditionKind.RATE,
            label="rate",
            location=at(27, 9),
            experts=flagged,
            over=64,
            min_tokens=16,
            comparison=Comparison.ABOVE,
            threshold=0.12,
        ),
        then=Mask(flagged, at(30, 9), method=MaskMethod.REROUTE, until="request-end"),
        location=at(24, 7),
        phase=Phase.OUTPUT,
        persist=Persist(2, 3),
        on_error=OnError.OPEN,
    )
    mass = Condition(
        kind=ConditionKind.MASS,
        label="mass",
        location=at(34, 13),
        experts=flagged,
        over=NamedWindow.REQUEST,
        min_tokens=32,
        comparison=Comparison.ABOVE,
        threshold=0.3,
    )
    count = Condition(
        kind=ConditionKind.COUNT,
        label="count",
        location=at(35, 19),
        experts=flagged,
        over=NamedWindow.TOKEN,
        min_tokens=1,
        comparison=Comparison.AT_MOST,
        threshold=0.0,
    )
    stop = Rule(
        name="stop",
        when=All((mass, Not(count))),
        then=Block("This request was stopped by policy."),
        location=at(31, 7),
        phase=Phase.ANY,
    )
    policy = Policy(
        name="restricted-chemistry",
        location=at(4, 9),
        mode=Mode.AUDIT,
        description="Output drifts into restricted synthesis.",
        severity=Severity.HIGH,
        maturity=Maturity.SANDBOX,
        labels={"owner": "trust-safety"},
        model=ModelRequirement(at(12, 3), "Qwen3MoeForCausalLM", 48, 128, 8),
        experts={"flagged": flagged, "weighted": weighted},
        rules=(burst, stop),
    )

    loaded = parse_policies(EXAMPLE, "p.yaml")

    assert loaded == PolicySet((policy,), loaded.revision)
    assert len(loaded.revision) == 12
    assert int(loaded.revision, 16) >= 0


def test_json_text_of_a_policy_is_a_policy() -> None:
    text = (
        '{"apiVersion": "moe-guard/v1", "kind": "Policy", "metadata": {"name": "a"},'
        ' "spec": {"rules": [{"name": "r", "when": {"always": {}}}]}}'
    )

    assert parse_policies(text).policies[0].rules[0].is_static
