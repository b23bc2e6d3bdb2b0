"""The slow, exact evaluator: what a request's routing means under a policy set, and nothing clever.

It is the oracle for the device evaluator and shares no code with it. Every sentence of the policy
language's exact semantics is one plain loop over positions, tokens, layers and experts. Sums are
exact fractions; only a finished value is rounded, once, to the float that meets its threshold.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from guard.policy.model import (
    All,
    AnyOf,
    Block,
    Comparison,
    Condition,
    ConditionKind,
    Expert,
    ExpertSet,
    Expression,
    Mask,
    Mode,
    NamedWindow,
    Not,
    Phase,
    Policy,
    PolicySet,
    Reduce,
    RequestMatch,
    Rule,
    TogetherIn,
)
from guard.program.applicability import RequestFacts
from guard.program.topology import Topology
from guard.program.verdict import (
    CLOSE,
    BlockedAt,
    Evidence,
    Firing,
    MaskInterval,
    Routing,
    Verdict,
)


def evaluate(
    policies: PolicySet,
    topology: Topology,
    routing: Routing,
    *,
    facts: RequestFacts | None = None,
    num_computed_ahead: Callable[[int], int] | None = None,
) -> Verdict:
    """All that follows from one request's routing, taken as given: its masks do not change it.

    facts: what is known of the request; None: nothing
    num_computed_ahead: for a position, how many positions behind it were routed in the same step
        (accepted draft tokens), where a mask that the position starts or releases comes too late;
        none where it is not given. position + num_computed_ahead(position) never decreases.
    An expert of a set that the topology lacks is a bug: compiling the policies refuses it.
    """
    num_positions, prompt = len(routing.topk_ids), routing.num_prompt_tokens
    ahead = num_computed_ahead or (lambda position: 0)
    facts = facts or RequestFacts()
    states = []
    for policy, rule in policies.ordered_rules():
        if not _fits(rule.match, facts):
            continue
        exempt = policy.name not in facts.enforced and any(
            not (exception.rules and rule.name not in exception.rules)
            and not (exception.until is not None and exception.until < facts.today)
            and _fits(exception.match, facts)
            for exception in policy.exceptions
        )
        states.append(
            _RuleState(policy, rule, _is_enforced(policy, facts.enforced) and not exempt, exempt)
        )
    for state in states:
        state.start_static_mask(prompt)

    firings: list[Firing] = []
    blocks: list[tuple[int, int]] = []  # block position, place in the deciding order
    block: BlockedAt | None = None
    for position in range(routing.first_seen, num_positions):
        first_masked = max(position + ahead(position) + 1, prompt)
        for order, state in enumerate(states):
            if not _evaluates(state.rule.phase, position, prompt):
                continue
            if not routing.is_seen(position):
                state.evaluations.append(False)  # one that was not made is a miss; the result stays
                continue
            turn = state.step(position, topology, routing)
            if turn is True:
                firings.append(state.firing(position, topology, routing))
                state.start_mask(first_masked)
                if state.blocks:
                    blocks.append((max(position, prompt - 1), order))
            elif turn is False:
                state.release_mask(first_masked)
        if blocks and min(blocks)[0] == position:
            decider = states[min(blocks)[1]]
            block = BlockedAt(position, decider.policy.name, decider.rule.name)
            break

    end = num_positions if block is None else block.position + 1
    masks = [
        MaskInterval(state.policy.name, state.rule.name, start, stop)
        for state in states
        for start, stop in _united(state.intervals, end)
        if block is None or start <= block.position
    ]
    masks.sort(key=lambda mask: mask.start)  # stable: the deciding order stays within one start
    return Verdict(tuple(firings), tuple(masks), block)


def _is_enforced(policy: Policy, enforced: Collection[str]) -> bool:
    return policy.mode is Mode.ENFORCE or (policy.mode is Mode.AUDIT and policy.name in enforced)


def _fits(match: RequestMatch, facts: RequestFacts) -> bool:
    """Every word of a match that is given is true of the request."""
    of_adapter = match.lora_adapters is None or facts.lora_adapter in match.lora_adapters
    of_labels = all(
        name in facts.labels and facts.labels[name] in values for name, values in match.labels.items()
    )
    digest = hashlib.sha256(facts.request_id.encode("utf-8", "surrogatepass")).hexdigest()
    place = Fraction(int(digest[:16], 16), 2**64)  # of the request among all, from 0 up to 1
    return of_adapter and of_labels and (match.sample >= 1 or place < Fraction(match.sample))


def _evaluates(phase: Phase, position: int, num_prompt_tokens: int) -> bool:
    match phase:
        case Phase.PROMPT:
            return position < num_prompt_tokens
        case Phase.OUTPUT:
            return position >= num_prompt_tokens
        case Phase.ANY:
            return True


_Interval = tuple[int, int | None]  # start <= p < stop; None: not released


@dataclass
class _RuleState:
    """One rule at work on one request. exempt: an exception withholds its action."""

    policy: Policy
    rule: Rule
    enforced: bool
    exempt: bool = False
    evaluations: list[bool] = field(default_factory=list)  # the root, unknown being a miss
    result: bool = False
    intervals: list[_Interval] = field(default_factory=list)

    @property
    def blocks(self) -> bool:
        return self.enforced and isinstance(self.rule.then, Block)

    def step(self, position: int, topology: Topology, routing: Routing) -> bool | None:
        """Evaluate at `position`; the new result where it has just turned, else None."""
        truth = _truth(self.rule.when, self.rule.phase, position, topology, routing)
        self.evaluations.append(truth is True)
        recent = self.evaluations[-self.rule.persist.of :]
        before, self.result = self.result, sum(recent) >= self.rule.persist.hits
        return None if self.result is before else self.result

    def firing(self, position: int, topology: Topology, routing: Routing) -> Firing:
        evidence = []
        for condition in self.rule.conditions():
            value = _value(condition, self.rule.phase, position, topology, routing)
            shown = math.nan if value is None else _shown(value, condition)
            evidence.append(Evidence(condition.label, shown, condition.threshold))
        return Firing(position, self.policy.name, self.rule.name, tuple(evidence), self.exempt)

    def start_static_mask(self, num_prompt_tokens: int) -> None:
        if self.rule.is_static:
            self._add_interval(num_prompt_tokens if self.rule.phase is Phase.OUTPUT else 0)

    def start_mask(self, first_masked: int) -> None:
        if not self.rule.is_static:
            self._add_interval(first_masked)

    def release_mask(self, first_unmasked: int) -> None:
        """The result turned false: an `until: clear` mask ends, even before it began."""
        if self.intervals and not self.rule.is_static:
            start, stop = self.intervals[-1]
            if isinstance(self.rule.then, Mask) and self.rule.then.until == "clear":
                assert stop is None, "a rule fires once before its result turns false"
                self.intervals[-1] = (start, first_unmasked)

    def _add_interval(self, start: int) -> None:
        action = self.rule.then
        if self.enforced and isinstance(action, Mask):
            stop = start + action.until if isinstance(action.until, int) else None
            self.intervals.append((start, stop))


def _united(intervals: list[_Interval], end: int) -> list[_Interval]:
    """Non-empty intervals, touching ones as one; None where still in force at position `end`."""
    united: list[_Interval] = []
    for start, stop in intervals:
        if stop is not None and stop <= start:
            continue
        if united:
            last_start, last_stop = united[-1]
            if last_stop is None or start <= last_stop:
                latest = None if stop is None or last_stop is None else max(stop, last_stop)
                united[-1] = (last_start, latest)
                continue
        united.append((start, stop))
    return [(start, None if stop is None or stop > end else stop) for start, stop in united]


def _truth(
    node: Expression, phase: Phase, position: int, topology: Topology, routing: Routing
) -> bool | None:
    """Kleene's three values; None is unknown."""
    match node:
        case Condition():
            value = _value(node, phase, position, topology, routing)
            if node.kind is ConditionKind.ALWAYS:
                return True
            return None if value is None else _compare(value, node)
        case Not(child):
            truth = _truth(child, phase, position, topology, routing)
            return None if truth is None else not truth
        case All(children):
            truths = [_truth(child, phase, position, topology, routing) for child in children]
            return False if False in truths else None if None in truths else True
        case AnyOf(children):
            truths = [_truth(child, phase, position, topology, routing) for child in children]
            return True if True in truths else None if None in truths else False


_Value = Fraction | float
"""A condition's number before its bias and the probe's σ: exact, or a float where it is irrational."""


def _shown(value: _Value, condition: Condition) -> float:
    if condition.kind is ConditionKind.PROBE:
        return 1 / (1 + math.exp(-(float(value) + condition.bias)))
    return float(value + Fraction(str(condition.bias)))


def _compare(exact: _Value, condition: Condition) -> bool:
    """As nearest floats; the bias is taken off the threshold, not added to a rounded value.

    A value that is a float already meets a threshold that is close (`CLOSE`). The probability of a
    probe is p where its score is ln(p/(1-p)).
    """
    value = float(exact)
    if condition.kind is ConditionKind.PROBE:
        if not 0 < condition.threshold < 1:
            return (condition.threshold <= 0) is condition.comparison.upward
        odds = condition.threshold / (1 - condition.threshold)
        threshold = math.log(odds) - condition.bias
    else:
        threshold = float(Fraction(str(condition.threshold)) - Fraction(str(condition.bias)))
    close = CLOSE * max(1.0, abs(threshold)) if isinstance(exact, float) else 0.0
    meets = abs(value - threshold) <= close
    match condition.comparison:
        case Comparison.ABOVE:
            return value > threshold and not meets
        case Comparison.AT_LEAST:
            return value > threshold or meets
        case Comparison.BELOW:
            return value < threshold and not meets
        case Comparison.AT_MOST:
            return value < threshold or meets


def _value(
    condition: Condition, phase: Phase, position: int, topology: Topology, routing: Routing
) -> _Value | None:
    """None where it is unknown."""
    if condition.kind is ConditionKind.ALWAYS:
        return Fraction(1)
    tokens = _seen_tokens(condition, phase, position, routing)
    if not tokens or len(tokens) < condition.min_tokens:
        return None
    weights = {} if condition.experts is None else _weights_in(topology, condition.experts)
    layers = {expert.layer for expert in weights}

    count = 0
    score, mass, mass_of_layers = Fraction(0), Fraction(0), Fraction(0)
    for token in tokens:
        for expert, gate_weight in _chosen(token, topology, routing):
            if expert.layer in layers:
                mass_of_layers += gate_weight
            if expert in weights:
                count += 1
                score += weights[expert]
                mass += gate_weight

    match condition.kind:
        case ConditionKind.COUNT | ConditionKind.DORMANT:
            return Fraction(count)
        case ConditionKind.RATE:
            return Fraction(count, len(tokens) * len(weights)) if weights else None
        case ConditionKind.MASS:
            return mass / mass_of_layers if mass_of_layers else None
        case ConditionKind.SCORE | ConditionKind.PROBE:
            return score / len(tokens)
        case ConditionKind.COACTIVATION:
            return Fraction(sum(_is_together(condition, t, weights, topology, routing) for t in tokens))
        case ConditionKind.DIVERGENCE | ConditionKind.ENTROPY | ConditionKind.CONCENTRATION:
            if position < routing.num_prompt_tokens - 1:
                return None
            return _of_distribution(condition, tokens, topology, routing)
        case ConditionKind.SUPPRESSED:
            return _suppressed(condition, count, len(tokens), list(weights)) if weights else None
        case _:
            raise AssertionError(f"{condition.kind} is not evaluated yet")


def _is_together(
    condition: Condition,
    token: int,
    experts: Collection[Expert],
    topology: Topology,
    routing: Routing,
) -> bool:
    """The token chose at least so many of the experts, or some in at least so many layers."""
    assert condition.together is not None
    chosen = [expert for expert, _ in _chosen(token, topology, routing) if expert in experts]
    match condition.together.of:
        case TogetherIn.MEMBERS:
            return len(chosen) >= condition.together.least
        case TogetherIn.LAYERS:
            return len({expert.layer for expert in chosen}) >= condition.together.least


def _suppressed(condition: Condition, count: int, num_tokens: int, experts: list[Expert]) -> float:
    """ln((b+e)/(r+e)): b the experts' mean rate in the profile, r in the window, e = 0.5/(|W||F|)."""
    assert condition.baselines is not None
    selections = num_tokens * len(experts)
    smoothing = Fraction(1, 2) / selections
    baseline = sum(Fraction(condition.baselines.rate(expert)) for expert in experts) / len(experts)
    return math.log((baseline + smoothing) / (Fraction(count, selections) + smoothing))


def _of_distribution(
    condition: Condition, tokens: list[int], topology: Topology, routing: Routing
) -> float | None:
    """Of each layer's selections in the window; the mean or the greatest of layers that had any."""
    counts: dict[int, Counter[int]] = {layer.number: Counter() for layer in topology.layers}
    for token in tokens:
        for expert, _ in _chosen(token, topology, routing):
            counts[expert.layer][expert.id] += 1
    values = []
    for layer in topology.layers:
        selections = counts[layer.number].total()
        if not selections:
            continue
        shares = [counts[layer.number][e] / selections for e in range(layer.num_experts)]
        match condition.kind:
            case ConditionKind.ENTROPY:
                values.append(1 / sum(p * p for p in shares))
            case ConditionKind.CONCENTRATION:
                values.append(max(shares) * layer.num_experts / layer.top_k)
            case _:
                assert condition.baselines is not None
                rates = condition.baselines.rates.get(layer.number, ())
                if sum(rates):
                    values.append(_jensen_shannon(shares, [rate / sum(rates) for rate in rates]))
    if not values:
        return None
    if condition.kind is ConditionKind.DIVERGENCE and condition.reduce is Reduce.MAX:
        return max(values)
    return sum(values) / len(values)


def _jensen_shannon(p: list[float], q: list[float]) -> float:
    """Half of each one's divergence from their mean, in natural logarithms."""
    total = 0.0
    for one, other in ((p, q), (q, p)):
        for a, b in zip(one, other, strict=True):
            if a:
                total += a * math.log(2 * a / (a + b)) / 2
    return total


def _seen_tokens(condition: Condition, phase: Phase, position: int, routing: Routing) -> list[int]:
    """W: the positions of the window that ends at `position`, less those that were not seen."""
    prompt = routing.num_prompt_tokens
    match condition.over:
        case NamedWindow.TOKEN:
            window = range(position, position + 1)
        case NamedWindow.PROMPT:
            window = range(prompt) if position >= prompt - 1 else range(0)
        case NamedWindow.OUTPUT:
            window = range(prompt, position + 1)
        case NamedWindow.REQUEST:
            window = range(position + 1)
        case int(length):
            start = prompt if phase is Phase.OUTPUT else 0
            window = range(max(start, position - length + 1), position + 1)
    return [token for token in window if routing.is_seen(token)]


def _weights_in(topology: Topology, experts: ExpertSet) -> dict[Expert, Fraction]:
    """The weight of every distinct expert of F, as the decimal that its author wrote."""
    num_experts = {layer.number: layer.num_experts for layer in topology.layers}
    for expert in experts.weights:
        assert 0 <= expert.id < num_experts.get(expert.layer, 0), f"{expert} is not in the model"
    return {expert: Fraction(str(weight)) for expert, weight in experts.weights.items()}


def _chosen(token: int, topology: Topology, routing: Routing) -> Iterator[tuple[Expert, Fraction]]:
    """S(t,l) of every layer: the experts with a weight other than zero, and that weight."""
    for index, layer in enumerate(topology.layers):
        ids, gate_weights = routing.topk_ids[token, index], routing.topk_weights[token, index]
        for expert_id, gate_weight in zip(ids.tolist(), gate_weights.tolist(), strict=True):
            if expert_id != -1 and gate_weight != 0:
                yield Expert(layer.number, expert_id), Fraction(gate_weight)
