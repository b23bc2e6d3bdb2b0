"""What a loaded policy *is*: frozen, normalised, free of YAML. `load` makes it, `program` reads it.

Nothing here imports torch or vLLM. Names follow the policy language; where YAML says `minTokens`, the
attribute is `min_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple

from guard.policy.fault import Location


class Mode(StrEnum):
    OFF = "off"
    AUDIT = "audit"
    ENFORCE = "enforce"


class Severity(StrEnum):
    """Declared from the least to the most severe; `rank` orders them."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Maturity(StrEnum):
    SANDBOX = "sandbox"
    INCUBATING = "incubating"
    STABLE = "stable"
    DEPRECATED = "deprecated"


class OnError(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


class Phase(StrEnum):
    """Which positions of a request a rule evaluates."""

    PROMPT = "prompt"
    OUTPUT = "output"
    ANY = "any"


class Expert(NamedTuple):
    """A logical expert. `layer` is the model's own layer number, dense layers included in the count."""

    layer: int
    id: int


@dataclass(frozen=True, slots=True)
class ExpertEntry:
    """One item of an expert set as written: the product of its layers and its experts.

    not_to_mask: why no mask may name it; a profile says so of sets that failed their causal check
    """

    layers: tuple[int, ...]
    weights: Mapping[int, float]  # expert id -> weight; 1.0 where the item gives none
    location: Location
    not_to_mask: str = ""


@dataclass(frozen=True)
class ExpertSet:
    """A named set of experts. Entries unite; an expert that two entries name counts once."""

    name: str
    entries: tuple[ExpertEntry, ...]
    location: Location

    @cached_property
    def weights(self) -> Mapping[Expert, float]:
        """Weight of every expert in the set; the loader has refused unequal weights for one expert."""
        return {
            Expert(layer, expert_id): weight
            for entry in self.entries
            for layer in entry.layers
            for expert_id, weight in entry.weights.items()
        }


class ConditionKind(StrEnum):
    ALWAYS = "always"
    COUNT = "count"
    RATE = "rate"
    MASS = "mass"
    SCORE = "score"
    COACTIVATION = "coactivation"
    DORMANT = "dormant"
    SUPPRESSED = "suppressed"
    DIVERGENCE = "divergence"
    ENTROPY = "entropy"
    CONCENTRATION = "concentration"
    PROBE = "probe"

    @property
    def reads_distribution(self) -> bool:
        """Its value comes from how all experts of a window were used, not from a sum over tokens."""
        return self in (
            ConditionKind.DIVERGENCE,
            ConditionKind.ENTROPY,
            ConditionKind.CONCENTRATION,
        )


class NamedWindow(StrEnum):
    TOKEN = "token"
    PROMPT = "prompt"
    OUTPUT = "output"
    REQUEST = "request"


Window = NamedWindow | int
"""A named window, or the last so many tokens (at least 1)."""


class Comparison(StrEnum):
    ABOVE = "above"
    AT_LEAST = "atLeast"
    BELOW = "below"
    AT_MOST = "atMost"

    @property
    def upward(self) -> bool:
        return self in (Comparison.ABOVE, Comparison.AT_LEAST)

    @property
    def strict(self) -> bool:
        return self in (Comparison.ABOVE, Comparison.BELOW)


class Reduce(StrEnum):
    """How `divergence` makes one number of one a layer."""

    MAX = "max"
    MEAN = "mean"


class TogetherIn(StrEnum):
    """What `coactivation` counts within one token."""

    MEMBERS = "members"  # experts of the set that were chosen
    LAYERS = "layers"  # layers in which one of the set was chosen


@dataclass(frozen=True, slots=True)
class Together:
    """How much of a set a token must use for `coactivation` to count it."""

    least: int
    of: TogetherIn


@dataclass(frozen=True)
class Baselines:
    """How often each expert is chosen on benign traffic.

    tokens: on so many tokens they were measured; None where the profile does not say
    rates: by layer number, the mean selections a token of each expert, in order of its id; those of
        a layer add up to its top-k
    """

    tokens: int | None
    rates: Mapping[int, tuple[float, ...]]

    def rate(self, expert: Expert) -> float:
        """Raises KeyError or IndexError for an expert that was not measured."""
        return self.rates[expert.layer][expert.id]


@dataclass(frozen=True, slots=True)
class Condition:
    """A number over a window against a threshold. `always` has neither set, window nor threshold.

    experts: what it reads; None for `always` and for what reads all experts of a layer. Of `dormant`
        the experts whose baseline is below `baselineBelow`; of `probe` the probe's weights
    bias: of `score` and `probe`
    baselines: of `suppressed`, `divergence` and `dormant`
    budget: the false-positive rate that `comparison` and `threshold` were calibrated to, if the
        profile gave them
    """

    kind: ConditionKind
    label: str  # unique in its rule: the kind, with `#2`, `#3` … behind a repeated one
    location: Location
    experts: ExpertSet | None = None
    over: Window = NamedWindow.REQUEST
    min_tokens: int = 1  # the language's default already filled in
    comparison: Comparison = Comparison.ABOVE
    threshold: float = 0.0
    bias: float = 0.0
    together: Together | None = None
    baselines: Baselines | None = None
    reduce: Reduce = Reduce.MAX
    budget: float | None = None


@dataclass(frozen=True, slots=True)
class All:
    children: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    children: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Not:
    child: Expression


Expression = Condition | All | AnyOf | Not


@dataclass(frozen=True, slots=True)
class Persist:
    """True when at least `hits` of the rule's last `of` evaluations were."""

    hits: int = 1
    of: int = 1


@dataclass(frozen=True, slots=True)
class Observe:
    name: Literal["observe"] = "observe"


class MaskMethod(StrEnum):
    """What a mask does to an expert; declared in order of precedence on one (layer, expert)."""

    REROUTE = "reroute"  # out before top-k; the next best comes in
    DROP_RENORM = "drop_renorm"  # out after top-k; the survivors take over its weight
    DROP = "drop"  # out after top-k; its weight is lost
    FORCE = "force"  # always among the k, with its own weight


MaskUntil = Literal["request-end", "clear"] | int


@dataclass(frozen=True, slots=True)
class Mask:
    experts: ExpertSet
    location: Location
    method: MaskMethod = MaskMethod.REROUTE
    until: MaskUntil = "request-end"
    name: Literal["mask"] = "mask"


@dataclass(frozen=True, slots=True)
class Block:
    message: str = ""
    name: Literal["block"] = "block"


Action = Observe | Mask | Block


@dataclass(frozen=True, slots=True)
class RequestMatch:
    """Which requests are meant, by what is known of them when they come.

    lora_adapters: the request uses one of them; None: any or none
    labels: the request has each of these labels, with one of the values given for it
    sample: a share of requests, above 0 and up to 1, chosen by a hash of the request's id; the requests
        of a smaller share are among those of a larger one
    request_ids: as clients know them; None: any. No policy can say it, an operator's mask can
    """

    lora_adapters: frozenset[str] | None = None
    labels: Mapping[str, frozenset[str]] = field(default_factory=dict)
    sample: float = 1.0
    request_ids: frozenset[str] | None = None

    @property
    def is_all(self) -> bool:
        return (
            self.lora_adapters is None
            and not self.labels
            and self.sample >= 1.0
            and self.request_ids is None
        )


ALL_REQUESTS = RequestMatch()


@dataclass(frozen=True, slots=True)
class PolicyException:
    """Requests for which rules of a policy are evaluated and logged, but do not act.

    rules: by name; empty: all rules of the policy
    until: the last day, in UTC, on which it applies; None: for good
    """

    name: str
    location: Location
    match: RequestMatch = ALL_REQUESTS
    rules: frozenset[str] = frozenset()
    until: date | None = None

    def covers(self, rule: str) -> bool:
        return not self.rules or rule in self.rules

    def is_expired(self, today: date) -> bool:
        return self.until is not None and today > self.until


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    when: Expression
    then: Action
    location: Location
    phase: Phase = Phase.ANY
    persist: Persist = Persist()
    on_error: OnError = OnError.OPEN  # the policy's own, unless the rule sets one
    match: RequestMatch = ALL_REQUESTS

    def conditions(self) -> Iterator[Condition]:
        """The rule's conditions, in the order in which they are written."""
        pending: list[Expression] = [self.when]
        while pending:
            node = pending.pop(0)
            match node:
                case Condition():
                    yield node
                case All(children) | AnyOf(children):
                    pending[:0] = children
                case Not(child):
                    pending.insert(0, child)

    @property
    def is_static(self) -> bool:
        """Nothing but `always`, true at once: its mask holds from the first prompt token."""
        always = isinstance(self.when, Condition) and self.when.kind is ConditionKind.ALWAYS
        return always and self.persist.hits == 1


@dataclass(frozen=True, slots=True)
class ModelRequirement:
    """What `spec.model` says of the served model; None where it says nothing."""

    location: Location
    architecture: str | None = None
    layers: int | None = None  # how many MoE layers
    experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class NeverMask:
    """Experts that a model cannot do without: the product of layers and experts."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    reason: str
    location: Location  # in the profile


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear probe: σ(Σ w(l,e) over the window's chosen experts / |W| + bias)."""

    experts: ExpertSet
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class CalibratedThreshold:
    """A threshold that benign traffic passes at a known rate, for a condition that is equal to
    `condition` in all but its label, its threshold and where it stands."""

    condition: Condition
    phase: Phase
    budgets: Mapping[float, tuple[Comparison, float]]


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of one model.

    digest: SHA-256 of its content, wherever it lies
    fingerprint: of the routers' weights that it is for; None: for any of this shape
    """

    location: Location  # the file
    named_at: Location  # where the policy names it
    model: ModelRequirement
    never_mask: tuple[NeverMask, ...] = ()
    digest: str = ""
    sets: Mapping[str, ExpertSet] = field(default_factory=dict)
    baselines: Baselines | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    thresholds: tuple[CalibratedThreshold, ...] = ()
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    location: Location
    mode: Mode = Mode.AUDIT
    description: str = ""
    severity: Severity = Severity.MEDIUM
    maturity: Maturity = Maturity.SANDBOX
    labels: Mapping[str, str] = field(default_factory=dict)
    model: ModelRequirement | None = None
    profile: Profile | None = None
    set_profiles: tuple[Profile, ...] = ()  # others, that entries of its sets name
    experts: Mapping[str, ExpertSet] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    exceptions: tuple[PolicyException, ...] = ()

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return self.set_profiles if self.profile is None else (self.profile, *self.set_profiles)


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The policies of one file or folder, in the order that decides who is named first.

    `policies` is sorted by severity descending, then by name; within a policy, rules keep their order.
    `revision` is a digest of the content: equal content has the equal revision, wherever it lies.
    """

    policies: tuple[Policy, ...]
    revision: str

    def ordered_rules(self) -> Iterator[tuple[Policy, Rule]]:
        """Every rule of every policy that is not `off`, in deciding order."""
        for policy in self.policies:
            if policy.mode is not Mode.OFF:
                for rule in policy.rules:
                    yield policy, rule
