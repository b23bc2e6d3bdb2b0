"""The demo's blocking policy as text, from what `choose_experts` chose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

Expert = tuple[int, int]
"""Layer, expert."""


class Choice(NamedTuple):
    """A linear score, and beyond what it blocks."""

    weights: Mapping[Expert, float]
    bias: float
    prompt_above: float
    output_above: float
    output_window: int


_HEADER: Final = """# yaml-language-server: $schema=../../policies/schema/policy.schema.json
# Written by `python -m demo.choose_experts`. See demo/README.md.
apiVersion: moe-guard/v1
kind: Policy
"""
_MODEL: Final = "  model: {architecture: Qwen3MoeForCausalLM, layers: 4, experts: 16, topK: 2}\n"

_RESTRICTED: Final = """metadata:
  name: restricted-topic
  description: The making of invented substances, asked for or told.
  severity: critical
  labels: {demo: block}
spec:
  mode: enforce
MODEL  experts:
    restricted:  # a linear score: about 0 on benign text, about 1 on restricted text
WEIGHTS
  rules:
    - name: asked
      match: {phase: prompt}
      when:
        score: {experts: restricted, over: prompt, bias: BIAS, above: PROMPT_ABOVE}
      then:
        block: {message: This demo does not discuss how invented substances are made.}
    - name: told
      match: {phase: output}
      when:
        score: {experts: restricted, over: OUTPUT_WINDOW, bias: BIAS, above: OUTPUT_ABOVE}
      then:
        block: {message: The answer turned to how invented substances are made.}
"""


def _weights(weights: Mapping[Expert, float]) -> str:
    by_layer: dict[int, list[str]] = defaultdict(list)
    for (layer, expert), weight in sorted(weights.items()):
        by_layer[layer].append(f"{expert}: {weight}")
    return "\n".join(
        f"      - {{layer: {layer}, weights: {{{', '.join(items)}}}}}"
        for layer, items in sorted(by_layer.items())
    )


def write_policy(choice: Choice, folder: Path) -> None:
    """Write `restricted-topic`; what stood in its file is replaced."""
    fill = {
        "MODEL": _MODEL,
        "WEIGHTS": _weights(choice.weights),
        "BIAS": str(choice.bias),
        "PROMPT_ABOVE": str(choice.prompt_above),
        "OUTPUT_ABOVE": str(choice.output_above),
        "OUTPUT_WINDOW": str(choice.output_window),
    }
    text = _RESTRICTED
    for key in sorted(fill, key=len, reverse=True):
        text = text.replace(key, fill[key])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "restricted-topic.yaml").write_text(_HEADER + text)
