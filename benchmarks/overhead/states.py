"""The ways to serve that are compared, and the models that are served."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "num_experts_per_tok": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "340m": {
        **_QWEN3_MOE,
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "tie_word_embeddings": True,
    },
    # The shape of Qwen3-30B-A3B, as its configuration has it.
    "qwen3-30b-a3b": {
        **_QWEN3_MOE,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}
"""By name; the weights are random, so that no file is needed."""

NUM_MASKS = 256


@dataclass(frozen=True, slots=True)
class Engine:
    """What is started. policies: YAML, where ALL_LAYERS and ALL_EXPERTS stand for the model's; None for
    no setting, so that the guard is off; with `plugin` false, the plugin is not even loaded.

    may_fail: not every machine can run it
    """

    name: str
    policies: str | None = None
    plugin: bool = True
    may_fail: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """An engine of a kind under requests of a kind. masks: for the n-th request, the label that puts it
    under a mask, or None; it is number n modulo their count"""

    name: str
    engine: str
    masks: tuple[str | None, ...] = (None,)


def _policy(name: str, experts: str, rules: str, mode: str = "enforce") -> str:
    return f"""\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: {name}}}
spec:
  mode: {mode}
  experts: {{flagged: [{{layers: ALL_LAYERS, experts: {experts}}}]}}
  rules:
{rules}
"""


def _four(number: int) -> list[int]:
    """Of the first 48 experts, other ones for each number below 264: where all are masked at once, as a
    request may ask, enough are left."""
    first, step = number % 44, 1 + number // 44
    return sorted({(first + step * nth) % 48 for nth in range(4)})


def observing(number: int, *, experts: str | None = None, match: str = "", then: str = "") -> str:
    """A policy of two rules that never fire on random weights: a windowed rate and a running mass."""
    experts = experts or str(_four(number))
    return _policy(
        f"observe-{number}",
        experts,
        f"""\
    - name: burst
      match: {{phase: output{match}}}
      when: {{rate: {{experts: flagged, over: 16, above: 0.999}}}}{then}
    - name: share
      match: {{phase: any{match}}}
      when: {{mass: {{experts: flagged, over: request, minTokens: 16, above: 0.999}}}}{then}
""",
    )


def masking(number: int) -> str:
    """A policy that reroutes four experts of requests with its label, from the first token on; no two
    have the same four."""
    return _policy(
        f"mask-{number}",
        str(_four(number)),
        _MASK_RULE.format(match=f"{{labels: {{mask: mask-{number}}}}}"),
    )


def auditing() -> str:
    """The same for all requests, but only on paper."""
    return _policy("mask-0", str(_four(0)), _MASK_RULE.format(match="{phase: any}"), "audit")


_MASK_RULE = """\
    - name: always
      match: {match}
      when: always
      then: {{mask: {{experts: flagged}}}}
"""


def together(policies: list[str]) -> str:
    return "---\n".join(policies)


_OTHERS = ", labels: {tenant: nobody}"
_BLOCK = "\n      then: {block: {}}"

ENGINES = (
    Engine("none", plugin=False),
    Engine("none-again", plugin=False),
    Engine("off"),
    Engine("off-again"),
    Engine("armed", together([observing(n, match=_OTHERS) for n in range(16)])),
    Engine("observe-1", observing(0)),
    Engine("observe-16", together([observing(n) for n in range(16)])),
    Engine("observe-64", together([observing(n) for n in range(64)])),
    Engine("observe-all-experts", together([observing(n, experts="[ALL_EXPERTS]") for n in range(16)])),
    Engine("block", together([observing(n, then=_BLOCK) for n in range(16)])),
    Engine("audit", auditing()),
    Engine("mask-1", masking(0)),
    Engine("mask-256", together([masking(n) for n in range(NUM_MASKS)]),
           arguments={"mask_actions": NUM_MASKS}),
    Engine("capture", plugin=False, may_fail=True, arguments={"enable_return_routed_experts": True}),
)  # fmt: skip


def _each(count: int) -> tuple[str, ...]:
    return tuple(f"mask-{n}" for n in range(count))


STATES = (
    State("no plugin", "none"),
    State("no plugin again (A/A)", "none-again"),
    State("plugin, off", "off"),
    State("plugin, off, again (A/A)", "off-again"),
    State("armed, 16 policies that apply to nobody", "armed"),
    State("observing, 1 policy", "observe-1"),
    State("observing, 16 policies", "observe-16"),
    State("observing, 64 policies", "observe-64"),
    State("observing, 16 policies of all experts", "observe-all-experts"),
    State("blocking, 16 policies that never fire", "block"),
    State("auditing a mask of all requests", "audit"),
    State("masking half of the requests", "mask-1", (None, "mask-0")),
    *(
        State(f"masking all requests, {k} different masks", "mask-256", _each(k))
        for k in (1, 8, 64, 256)
    ),
    State("vLLM's own routed-experts capture", "capture"),
)

GROUPS: dict[str, tuple[str, ...]] = {
    "guard": ("off", "off-again", "armed", "observe-16", "audit", "mask-1"),
    "policies": ("off", "off-again", "observe-1", "observe-64", "observe-all-experts", "block"),
    "masks": ("off", "off-again", "mask-256"),
    "plugin": ("none", "none-again", "off", "capture"),
}
"""Of each group, all states of these engines are up at once, each with an engine of its own. The first
is the base, and the second another of its kind: what its ratio differs from 1 is what the method cannot
tell apart. The last group compares a plugin that is not configured with a vLLM that has none."""


def states_of(group: str) -> list[State]:
    """The base first."""
    engines = GROUPS[group]
    return sorted(
        (state for state in STATES if state.engine in engines),
        key=lambda state: engines.index(state.engine),
    )
