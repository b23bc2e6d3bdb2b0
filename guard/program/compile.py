"""Policies + topology -> Program. What can be refused against a model is refused here."""

from __future__ import annotations

import numpy as np

from guard.policy.fault import Fault, PolicyError
from guard.policy.model import (
    Block,
    Mask,
    Mode,
    Observe,
    Phase,
    Policy,
    PolicySet,
    Rule,
)
from guard.policy.revision import RuleKeys, mask_key
from guard.program.condition_terms import ConditionBuilder
from guard.program.expressions import ExpressionBuilder
from guard.program.fit import check_against
from guard.program.program import (
    TOKEN_SIGNAL,
    WORD_BITS,
    ActionKind,
    Ints,
    MaskMethodCode,
    MaskRelease,
    MaskTable,
    NamedSet,
    Program,
    ProgramRule,
    RuleTable,
)
from guard.program.signals import SignalBuilder
from guard.program.topology import Topology


def compile_policies(policies: PolicySet, topology: Topology, after: Program | None = None) -> Program:
    """Bind policies to a model.

    after: the program that is to be replaced while it runs; signals that it has go on

    Raises:
        PolicyError: with every policy that does not fit the model: a `model` requirement that it does
            not meet, an expert that it does not have, masks that leave a layer too few experts.
    """
    faults = check_against(policies, topology)
    if faults:
        raise PolicyError(faults)
    ordered = list(policies.ordered_rules())
    generation = 0 if after is None else after.generation + 1
    counted = after if after is not None and after.rules else None
    builder = SignalBuilder(topology, counted, generation)
    named_sets = [
        (policy.name, name, builder.members(expert_set.weights))
        for policy in sorted({p.name: p for p, _ in ordered}.values(), key=lambda p: p.name)
        for name, expert_set in policy.experts.items()
    ]
    conditions = ConditionBuilder(builder, topology)
    expressions = ExpressionBuilder(conditions.number_of)
    condition_rows = []
    for _, rule in ordered:
        conditions.add_rule(rule)
        expressions.add_rule(rule.when)
        condition_rows.append([conditions.number_of(condition) for condition in rule.conditions()])
    distributions = conditions.distributions()
    signals, readings = builder.tables(distributions)
    condition_table, keys = conditions.table(), RuleKeys()
    return Program(
        revision=policies.revision,
        topology=topology,
        signals=signals,
        readings=readings,
        conditions=condition_table,
        distributions=distributions,
        expressions=expressions.table(len(conditions)),
        rule_table=_rule_table(
            [rule for _, rule in ordered], condition_rows, readings.signal[condition_table.tokens]
        ),
        masks=_mask_table([rule for _, rule in ordered], topology),
        rules=tuple(_program_rule(policy, rule, keys) for policy, rule in ordered),
        sets=tuple(
            NamedSet(policy, name, builder.signal_row(members)) for policy, name, members in named_sets
        ),
        policies=tuple(policy.name for policy in policies.policies),
        generation=generation,
    )


def _rule_table(rules: list[Rule], condition_rows: list[list[int]], token_signal_C: Ints) -> RuleTable:
    """token_signal_C: the token signal of each condition's |W|; `always` has the oldest"""
    width = max(map(len, condition_rows), default=1)
    conditions = np.full((len(rules), width), -1, dtype=np.int64)
    for row, numbers in enumerate(condition_rows):
        conditions[row, : len(numbers)] = numbers
    return RuleTable(
        in_prompt=np.array([rule.phase is not Phase.OUTPUT for rule in rules], dtype=np.bool_),
        in_output=np.array([rule.phase is not Phase.PROMPT for rule in rules], dtype=np.bool_),
        hits=np.array([rule.persist.hits for rule in rules], dtype=np.int64),
        of=np.array([rule.persist.of for rule in rules], dtype=np.int64),
        conditions=conditions,
        blocks=np.array([isinstance(rule.then, Block) for rule in rules], dtype=np.bool_),
        oldest_tokens=np.array(
            [min(token_signal_C[row], default=TOKEN_SIGNAL) for row in condition_rows], dtype=np.int64
        ),
        newest_tokens=np.array(
            [max(token_signal_C[row], default=TOKEN_SIGNAL) for row in condition_rows], dtype=np.int64
        ),
    )


def check_observe_only(policies: PolicySet) -> list[Fault]:
    """Enforced masks, where a server is asked to provision none: a mask is honoured or refused."""
    return [
        Fault(
            rule.then.location,
            f"{policy.name}/{rule.name} masks experts and is enforced, but the server is started with "
            "--observe-only, which provisions no masks; set mode: audit, or start without that option",
        )
        for policy, rule in policies.ordered_rules()
        if policy.mode is Mode.ENFORCE and isinstance(rule.then, Mask)
    ]


def num_mask_words(policies: PolicySet) -> int:
    """64-bit words that the policies' mask actions take for each row, at least one."""
    return _words(sum(isinstance(rule.then, Mask) for _, rule in policies.ordered_rules()))


def _words(num_actions: int) -> int:
    return max(1, -(-num_actions // WORD_BITS))


def _mask_table(rules: list[Rule], topology: Topology) -> MaskTable:
    actions = [
        (number, rule, rule.then) for number, rule in enumerate(rules) if isinstance(rule.then, Mask)
    ]
    words = _words(len(actions))
    bits = np.zeros((len(topology.layers), topology.max_experts, words), dtype=np.uint64)
    for action, (_, _, mask) in enumerate(actions):
        for layer, expert_id in mask.experts.weights:
            bits[topology.index_of_layer[layer], expert_id, action // WORD_BITS] |= np.uint64(
                1 << (action % WORD_BITS)
            )
    return MaskTable(
        rule=np.array([number for number, _, _ in actions], dtype=np.int64),
        method=np.array([MaskMethodCode.of(mask.method) for _, _, mask in actions], dtype=np.int64),
        release=np.array([MaskRelease.of(mask.until) for _, _, mask in actions], dtype=np.int64),
        tokens=np.array(
            [mask.until if isinstance(mask.until, int) else 0 for _, _, mask in actions],
            dtype=np.int64,
        ),
        static=np.array([rule.is_static for _, rule, _ in actions], dtype=np.bool_),
        expert_bits=bits.view(np.int64),
        keys=tuple(mask_key(mask) for _, _, mask in actions),
    )


def _program_rule(policy: Policy, rule: Rule, keys: RuleKeys) -> ProgramRule:
    match rule.then:
        case Observe():
            action, message = ActionKind.OBSERVE, ""
        case Mask():
            action, message = ActionKind.MASK, ""
        case Block(message):
            action = ActionKind.BLOCK
    conditions = list(rule.conditions())
    return ProgramRule(
        policy=policy.name,
        rule=rule.name,
        mode=policy.mode,
        severity=policy.severity,
        action=action,
        phase=rule.phase,
        on_error=rule.on_error,
        message=message,
        condition_labels=tuple(condition.label for condition in conditions),
        thresholds=tuple(condition.threshold for condition in conditions),
        key=keys.key(policy, rule),
        match=rule.match,
        exceptions=tuple(e for e in policy.exceptions if e.covers(rule.name)),
    )
