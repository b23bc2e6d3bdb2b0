"""A compiled policy set: immutable arrays, ready to be copied to a device.

Letters in shapes: L MoE layers, E experts of the largest layer, X signals, I indicators, M readings,
C conditions, R rules, A mask actions, W 64-bit mask words, N named expert sets.

A *signal* is a number per token, a *reading* is a signal summed over a window, a *condition* compares
one reading (over another, or over a count of tokens) with a threshold, a *rule* joins conditions.
Signals are integers in fixed point: a decimal weight times `scale` is whole, so sums are exact and
independent of the order and of the chunks in which tokens arrive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.policy.model import (
    ALL_REQUESTS,
    MaskMethod,
    MaskUntil,
    Mode,
    OnError,
    Phase,
    PolicyException,
    RequestMatch,
    Severity,
)
from guard.program.distribution_table import DistributionTable
from guard.program.topology import Topology

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

WORD_BITS = 64
TOKEN_SIGNAL = 0
"""The signal that is 1 for every token that was seen; its sum over a window is |W|. Signals that came
with a later program have a token signal of their own, which does not count the tokens before."""


class WindowKind(IntEnum):
    RECENT = 0  # the last `tokens` positions; `token` is RECENT with 1
    REQUEST = 1
    PROMPT = 2
    OUTPUT = 3


@dataclass(frozen=True, slots=True)
class SparseWeights:
    """The weights of some signals that are not 0, one signal after the other.

    start: [signals + 1] where each signal's weights begin, and their number
    place: int32 [weights] in a flattened [L, E], or a row of [L], rising within a signal
    value: float64 [weights], whole numbers
    """

    start: Ints
    place: NDArray[np.int32]
    value: Floats

    def __len__(self) -> int:
        return len(self.start) - 1

    def of(self, signal: int) -> tuple[NDArray[np.int32], Floats]:
        """The places and values of one signal."""
        span = slice(int(self.start[signal]), int(self.start[signal + 1]))
        return self.place[span], self.value[span]

    @property
    def signal(self) -> Ints:
        """[weights] the signal of each weight."""
        return np.repeat(np.arange(len(self)), np.diff(self.start))

    def by_place(self, num_places: int) -> Floats:
        """[num_places, signals] with the zeros."""
        table = np.zeros((num_places, len(self)))
        table[self.place, self.signal] = self.value
        return table

    @staticmethod
    def none() -> SparseWeights:
        return SparseWeights(
            np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float64)
        )


@dataclass(frozen=True, slots=True)
class IndicatorTable:
    """Signals that are 1 where another signal of the token is large enough, else 0.

    They are no sum over layers, so they are computed where that signal is whole: behind the exchange
    between ranks that have some of the layers each.

    signal: [I] row of the signal table
    least: [I]
    """

    signal: Ints
    least: Ints

    @staticmethod
    def none() -> IndicatorTable:
        return IndicatorTable(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class SignalTable:
    """Numbers of a token's routing, in the order: tokens, unit, spread, mass, layer mass, indicators.

    All but the indicators are sums over layers. They are the token's *evidence*, together with its
    experts themselves, where a condition reads how these are distributed.

    Signals that came with one program share an *epoch*, its generation: they have seen the same tokens.
    Each epoch in use has a token signal, the oldest one first.

    unit: places in [L, E]; a chosen expert adds its weight
    spread: places in [L, E]; a layer adds 1 if one of these experts is chosen there
    mass: places in [L, E]; a chosen expert adds its weight times its gate weight
    layer_mass: places in [L]; every chosen expert of the layer adds that weight times its gate weight
    scale: [X]; a signal's true value is its integer divided by this
    keys: [X]; a signal of equal content and epoch in another program is the same, and goes on
    epochs: [X]
    routing_words: columns of the evidence, behind its signals, that hold the token's experts
    routing_epoch: the oldest that a distribution is read of
    """

    unit: SparseWeights
    mass: SparseWeights
    scale: Floats
    keys: tuple[str, ...]
    epochs: tuple[int, ...]
    spread: SparseWeights = field(default_factory=SparseWeights.none)
    layer_mass: SparseWeights = field(default_factory=SparseWeights.none)
    indicators: IndicatorTable = field(default_factory=IndicatorTable.none)
    routing_words: int = 0
    routing_epoch: int = 0

    @property
    def num_signals(self) -> int:
        return len(self.scale)

    @property
    def num_linear(self) -> int:
        """Signals that are sums over layers."""
        return self.num_signals - len(self.indicators.signal)

    @property
    def num_evidence(self) -> int:
        """Columns of what is known of a token, from which everything else follows."""
        return self.num_linear + self.routing_words

    @property
    def num_narrow(self) -> int:
        """Signals of the evidence that are small whole numbers: unit and spread ones."""
        return len(self.unit) + len(self.spread)

    @property
    def num_token_signals(self) -> int:
        return self.num_linear - self.num_narrow - len(self.mass) - len(self.layer_mass)

    @property
    def num_wide(self) -> int:
        """Columns of the evidence that take 64 bits: mass signals, and those of the experts."""
        return self.num_evidence - self.num_token_signals - self.num_narrow

    @property
    def evidence_keys(self) -> tuple[str, ...]:
        """Of each column of the evidence. That of experts is the same in every program."""
        words = (f"experts, word {number}" for number in range(self.routing_words))
        return (*self.keys[: self.num_linear], *words)

    @property
    def evidence_token_signal(self) -> Ints:
        """Of each column of the evidence, the token signal of its epoch."""
        of_signals = self.token_signal[: self.num_linear].tolist()
        of_words = [self.token_epochs.index(self.routing_epoch)] if self.routing_words else []
        return np.array(of_signals + of_words * self.routing_words, dtype=np.int64)

    @property
    def token_epochs(self) -> tuple[int, ...]:
        return self.epochs[: self.num_token_signals]

    @property
    def token_signal(self) -> Ints:
        """[X] the token signal of each one's epoch."""
        tokens = self.token_epochs
        return np.array([tokens.index(epoch) for epoch in self.epochs], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ReadingTable:
    """Signals over windows.

    signal: [M] row of the signal table
    window: [M] WindowKind
    tokens: [M] length of a RECENT window, else 0
    in_output: [M] a RECENT window that does not reach back into the prompt
    """

    signal: Ints
    window: Ints
    tokens: Ints
    in_output: Bools

    @property
    def longest_tokens(self) -> int:
        return int(self.tokens.max(initial=0))


class Transform(IntEnum):
    """What makes a condition's value of its quotient."""

    NONE = 0
    LOGISTIC = 1  # 1 / (1 + exp(-(quotient + bias))); compared before it
    NEGATIVE_LOG = 2  # -ln quotient; compared behind it


@dataclass(frozen=True, slots=True)
class ConditionTable:
    """value = transform(numerator / denominator + bias), unknown below `min_tokens` or at 0/0.

    Both are whole numbers below 2^53, so the quotient is rounded once; it is compared with `limit`,
    which is threshold - bias in decimals: a value that meets its threshold on paper meets it here.
    A logarithm is not exact: there a value within `tolerance` of the limit meets it.

    numerator, tokens: [C] readings; tokens is |W| of the same window
    offset: [C] added to the numerator, times its scale
    mass_denominator: [C] reading, or -1: then the denominator is `per_token`·|W| + `constant`, times
        the numerator's scale
    transform: [C] Transform
    tolerance: [C] 0 where the comparison is exact
    sign: [C] +1 where the condition is true upwards (above, atLeast), else -1
    strict: [C] above, below
    always: [C] true whatever the readings
    """

    numerator: Ints
    tokens: Ints
    offset: Floats
    mass_denominator: Ints
    per_token: Floats
    constant: Floats
    bias: Floats
    transform: Ints
    tolerance: Floats
    min_tokens: Ints
    limit: Floats
    sign: Floats
    strict: Bools
    always: Bools

    @property
    def num_conditions(self) -> int:
        return len(self.limit)


@dataclass(frozen=True, slots=True)
class Level:
    """Nodes that read only columns below theirs: each is the least of its (negated) children.

    children: [nodes, width] columns, padded with column 0, which is true
    negated: [nodes, width]
    """

    children: Ints
    negated: Bools


@dataclass(frozen=True, slots=True)
class ExpressionTable:
    """All expressions in Kleene logic, false 0, unknown 1, true 2: not is 2 - v, all the least, and
    any is the negation of all of the negations. Column 0 is true, 1..C are the conditions, the nodes
    of each level follow.

    root, root_negated: [R] the column that holds a rule's result
    """

    levels: tuple[Level, ...]
    root: Ints
    root_negated: Bools


class ActionKind(IntEnum):
    OBSERVE = 0
    MASK = 1
    BLOCK = 2


@dataclass(frozen=True, slots=True)
class ProgramRule:
    """A rule with its policy, by name and for people; the arrays of `RuleTable` hold the rest.

    match: the requests to which it applies
    exceptions: those of its policy that name it or all rules
    """

    policy: str
    rule: str
    mode: Mode
    severity: Severity
    action: ActionKind
    phase: Phase
    on_error: OnError
    message: str
    condition_labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    key: str = ""  # of all that decides when it fires and what it does; not of its mode
    match: RequestMatch = ALL_REQUESTS
    exceptions: tuple[PolicyException, ...] = ()

    @property
    def reason(self) -> str:
        return f"moe_guard:{self.policy}/{self.rule}"


@dataclass(frozen=True, slots=True)
class RuleTable:
    """In deciding order: severity descending, policy name, rule index.

    in_prompt, in_output: [R] which positions are evaluated
    hits, of: [R] persistence
    conditions: [R, most] columns of the condition table, padded with -1
    blocks: [R]
    oldest_tokens, newest_tokens: [R] token signals of the rule's conditions: a token that the oldest
        epoch did not see is not evaluated; one that the newest did not see is unseen by some
    """

    in_prompt: Bools
    in_output: Bools
    hits: Ints
    of: Ints
    conditions: Ints
    blocks: Bools
    oldest_tokens: Ints
    newest_tokens: Ints

    @property
    def num_rules(self) -> int:
        return len(self.hits)

    @property
    def longest_persistence(self) -> int:
        return int(self.of.max(initial=1))


class MaskMethodCode(IntEnum):
    """`MaskMethod` as a number. On one (layer, expert) the least that is in force wins."""

    REROUTE = 0
    DROP_RENORM = 1
    DROP = 2
    FORCE = 3

    @staticmethod
    def of(method: MaskMethod) -> MaskMethodCode:
        return MaskMethodCode[method.name]


class MaskRelease(IntEnum):
    REQUEST_END = 0
    CLEAR = 1
    TOKENS = 2

    @staticmethod
    def of(until: MaskUntil) -> MaskRelease:
        match until:
            case "request-end":
                return MaskRelease.REQUEST_END
            case "clear":
                return MaskRelease.CLEAR
            case _:
                return MaskRelease.TOKENS


@dataclass(frozen=True, slots=True)
class MaskTable:
    """Mask actions; action a is bit a % 64 of word a // 64.

    rule: [A] row of the rule table
    method: [A] MaskMethodCode
    release: [A] MaskRelease
    tokens: [A] how many positions a TOKENS mask holds, else 0
    static: [A] in force from the request's first position, or from its first output position where
        the rule is limited to the output
    expert_bits: int64 [L, E, W]; the bits of the actions that name an expert, whatever their method
    keys: [A] of what each does to which experts: equal ones compute the same KV
    """

    rule: Ints
    method: Ints
    release: Ints
    tokens: Ints
    static: Bools
    expert_bits: Ints
    keys: tuple[str, ...] = ()

    @property
    def num_actions(self) -> int:
        return len(self.rule)

    @property
    def num_words(self) -> int:
        return int(self.expert_bits.shape[-1])


def unpack_bits(words_NW: Ints, num_actions: int) -> Bools:
    """[..., A] from [..., W]: which actions a mask word names."""
    actions = np.arange(num_actions)
    return (words_NW[..., actions // WORD_BITS] >> (actions % WORD_BITS) & 1).astype(np.bool_)


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A policy's expert set, for the metrics."""

    policy: str
    name: str
    signal: int  # a unit signal with weight 1 on the set's experts


class DistributionBytes(NamedTuple):
    """What conditions on distributions make the data plane keep: a slot for each request, and evidence
    for each cached token."""

    slot: int
    cached_token: int


@dataclass(frozen=True)
class Program:
    """What the data plane runs. Made by `compile_policies`, bound to one topology, never changed.

    generation: 0 at start, one more with each reload
    """

    revision: str
    topology: Topology
    signals: SignalTable
    readings: ReadingTable
    conditions: ConditionTable
    distributions: DistributionTable
    expressions: ExpressionTable
    rule_table: RuleTable
    masks: MaskTable
    rules: tuple[ProgramRule, ...]
    sets: tuple[NamedSet, ...]
    policies: tuple[str, ...]
    generation: int = 0

    @property
    def distribution_bytes(self) -> DistributionBytes:
        return DistributionBytes(self.distributions.slot_bytes, 8 * self.signals.routing_words)

    @cached_property
    def is_mask_rule(self) -> Bools:
        """[R] rules whose action is a mask."""
        return np.array([rule.action is ActionKind.MASK for rule in self.rules], dtype=np.bool_)

    @cached_property
    def rule_reasons(self) -> tuple[str, ...]:
        return tuple(rule.reason for rule in self.rules)

    @property
    def can_act(self) -> bool:
        """Some rule masks or blocks, if not for every request then for one that asks for it."""
        return any(rule.action is not ActionKind.OBSERVE for rule in self.rules)
