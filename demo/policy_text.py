"""The demo's policies as text, from what `choose_experts` chose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

Expert = tuple[int, int]
"""Layer, expert."""


class Choice(NamedTuple):
    """Everything that the policies say of the model."""

    weights: Mapping[Expert, float]
    bias: float
    flagged: tuple[Expert, ...]
    python: tuple[Expert, ...]
    prompt_above: float
    output_above: float
    mention_above: float
    python_above: float
    mention_window: int
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
_REROUTE: Final = """metadata:
  name: reroute-restricted
  description: A prompt touches on invented substances; answer without the experts that know them.
  severity: high
  labels: {demo: mask}
spec:
  mode: enforce
MODEL  experts:
    flagged:
FLAGGED
  rules:
    - name: mention
      match: {phase: prompt}
      when:
        mass: {experts: flagged, over: MENTION_WINDOW, above: MENTION_ABOVE}
      then:
        mask: {experts: flagged, method: reroute, until: request-end}
"""
_PYTHON: Final = """metadata:
  name: observe-python
  description: Counts requests that are about Python code; changes nothing.
  severity: info
  labels: {demo: observe}
spec:
  mode: audit
MODEL  experts:
    python:
PYTHON
  rules:
    - name: code
      when:
        mass: {experts: python, over: OUTPUT_WINDOW, above: PYTHON_ABOVE}
"""


def _sets(experts: Iterable[Expert]) -> str:
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in experts:
        by_layer[layer].append(expert)
    return "\n".join(
        f"      - {{layer: {layer}, experts: {ids}}}" for layer, ids in sorted(by_layer.items())
    )


def _weights(weights: Mapping[Expert, float]) -> str:
    by_layer: dict[int, list[str]] = defaultdict(list)
    for (layer, expert), weight in sorted(weights.items()):
        by_layer[layer].append(f"{expert}: {weight}")
    return "\n".join(
        f"      - {{layer: {layer}, weights: {{{', '.join(items)}}}}}"
        for layer, items in sorted(by_layer.items())
    )


def write_policies(choice: Choice, folder: Path) -> None:
    """Write the three policies; what stood in their files is replaced."""
    fill = {
        "MODEL": _MODEL,
        "WEIGHTS": _weights(choice.weights),
        "BIAS": str(choice.bias),
        "PROMPT_ABOVE": str(choice.prompt_above),
        "OUTPUT_ABOVE": str(choice.output_above),
        "OUTPUT_WINDOW": str(choice.output_window),
        "MENTION_WINDOW": str(choice.mention_window),
        "MENTION_ABOVE": str(choice.mention_above),
        "FLAGGED": _sets(choice.flagged),
        "PYTHON_ABOVE": str(choice.python_above),
        "PYTHON": _sets(choice.python),
    }
    texts = {
        "restricted-topic": _RESTRICTED,
        "reroute-restricted": _REROUTE,
        "observe-python": _PYTHON,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        for key in sorted(fill, key=len, reverse=True):
            text = text.replace(key, fill[key])
        (folder / f"{name}.yaml").write_text(_HEADER + text)
