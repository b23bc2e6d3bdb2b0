"""Masks that a model could not honour, found before it serves.

What is proved is about the union of all masks that can be in force for one token: those of every rule
that is not in a policy with `mode: off`, audit ones included, since a request may enforce these. An
exception only withholds masks, and fewer are never harder to honour. For each layer:

- Enough experts are left to choose from. Only `reroute` takes an expert out of the choice. What is
  dropped (`drop`, `drop_renorm`) keeps its place among the k and only loses its weight, down to a
  layer whose routed part is zero: that is what these words promise.
- No more experts are forced than are chosen. Experts of which `reroute` would win count too, for that
  mask may be off while the forcing one is on.
- Where a router first chooses groups of experts, any groups that it may choose hold k live experts. A
  group without a live one is never chosen before a group that has one, so those do not count.
- Where a group's score is the sum of its two best experts (routers with a correction bias), each group
  has none or at least two. One that is left alone would be scored by half of what other groups are,
  and so, under the large biases of real checkpoints, never chosen: lost without a mask on it.
- sparsemixer makes two passes, and each needs an expert of its own.

A router inside a kernel is masked through its logits: they can reroute, but neither drop nor force.

Zero experts cannot be named, so they are always live. A layer that a table routes by token id makes no
choice that a mask could change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from guard.policy.fault import Fault
from guard.policy.model import Mask, MaskMethod, PolicySet
from guard.program.topology import MoELayer, Router, Topology
from guard.program.wording import ranges

MIN_LIVE_OF_KIND: Final[Mapping[str, int]] = {"sparsemixer": 2}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one rule's mask asks of one layer."""

    rule: str  # policy/rule
    mask: Mask
    experts: frozenset[int]


@dataclass(slots=True)
class _LayerMasks:
    """What all masks ask of one layer."""

    asked: list[_Asked] = field(default_factory=list)

    def with_method(self, method: MaskMethod) -> list[_Asked]:
        return [asked for asked in self.asked if asked.mask.method is method]


def mask_faults(policies: PolicySet, topology: Topology) -> list[Fault]:
    """A fault for each layer and each reason for which the masks together cannot be honoured.

    The policies' experts are in the topology.
    """
    layers = {layer.number: _LayerMasks() for layer in topology.layers}
    for policy, rule in policies.ordered_rules():
        if isinstance(rule.then, Mask):
            for number, experts in _by_layer(rule.then).items():
                asked = _Asked(f"{policy.name}/{rule.name}", rule.then, frozenset(experts))
                layers[number].asked.append(asked)
    return [fault for layer in topology.layers for fault in _layer_faults(layer, layers[layer.number])]


def _by_layer(mask: Mask) -> dict[int, set[int]]:
    by_layer: dict[int, set[int]] = {}
    for layer, expert_id in mask.experts.weights:
        by_layer.setdefault(layer, set()).add(expert_id)
    return by_layer


def _layer_faults(layer: MoELayer, masks: _LayerMasks) -> list[Fault]:
    if layer.router.kind == "hash" and masks.asked:
        text = (
            f"layer {layer.number} is routed by a table from token ids to experts, which no mask can "
            f"change, but {_names(masks.asked)} would mask it; take that layer out of the set"
        )
        return [Fault(_worst(masks.asked).mask.location, text)]
    rerouted = masks.with_method(MaskMethod.REROUTE)
    if layer.router.is_in_kernel and (faults := _in_kernel_faults(layer, masks)):
        return faults
    faults = _live_faults(layer, rerouted)
    if not faults and layer.router.num_groups > 1:
        faults = _group_faults(layer, rerouted)
    return [*faults, *_forced_faults(layer, masks.with_method(MaskMethod.FORCE))]


def _in_kernel_faults(layer: MoELayer, masks: _LayerMasks) -> list[Fault]:
    others = [asked for asked in masks.asked if asked.mask.method is not MaskMethod.REROUTE]
    if not others:
        return []
    methods = ", ".join(sorted({asked.mask.method.value for asked in others}))
    text = (
        f"layer {layer.number} is routed inside its kernel, where a mask can reroute experts and "
        f"nothing else, but {_names(others)} would mask it by {methods}; use method: reroute, or take "
        "that layer out of the set, or serve with a kernel that leaves routing to its router"
    )
    return [Fault(_worst(others).mask.location, text)]


def _live_faults(layer: MoELayer, rerouted: Sequence[_Asked]) -> list[Fault]:
    choices = layer.num_experts + layer.router.num_zero_experts
    needed = max(layer.top_k, MIN_LIVE_OF_KIND.get(layer.router.kind, 0))
    live = choices - len(_union(rerouted))
    if live >= needed:
        return []
    text = (
        f"layer {layer.number} chooses {layer.top_k} of {choices} experts for each token, but with the "
        f"masks of {_names(rerouted)} together only {live} are left; reroute at most "
        f"{choices - needed} experts of that layer"
    )
    if needed > layer.top_k:
        text += f", for its {layer.router.kind} router needs {needed}"
    return [Fault(_worst(rerouted).mask.location, text)]


def _group_faults(layer: MoELayer, rerouted: Sequence[_Asked]) -> list[Fault]:
    router = layer.router
    size = layer.num_experts // router.num_groups
    masked = _union(rerouted)
    groups = [range(number * size, (number + 1) * size) for number in range(router.num_groups)]
    live = [sum(expert_id not in masked for expert_id in group) for group in groups]

    if _sums_two_best(router) and 1 in live and size > 1:
        alone = [number for number, left in enumerate(live) if left == 1]
        there = _within(rerouted, {e for number in alone for e in groups[number]})
        text = (
            f"layer {layer.number} scores a group of {size} experts by its two best, but with the "
            f"masks of {_names(there)} together only 1 is left in group {ranges(alone)} (experts "
            f"{_spans(groups[number] for number in alone)}), which would hardly ever be chosen; "
            "leave 2 or more of each group, or none"
        )
        return [Fault(_worst(there).mask.location, text)]

    weakest = sorted((left, number) for number, left in enumerate(live) if left)[: router.topk_groups]
    reachable = sum(left for left, _ in weakest)
    if reachable >= layer.top_k:
        return []
    numbers = sorted(number for _, number in weakest)
    there = _within(rerouted, {e for number in numbers for e in groups[number]}) or list(rerouted)
    text = (
        f"layer {layer.number} chooses {layer.top_k} experts from {router.topk_groups} of its "
        f"{router.num_groups} groups, but with the masks of {_names(there)} together only "
        f"{reachable} are left in groups {ranges(numbers)} (experts "
        f"{_spans(groups[number] for number in numbers)}), which it may choose; leave {layer.top_k} "
        f"or more in any {router.topk_groups} groups, or none in a group"
    )
    return [Fault(_worst(there).mask.location, text)]


def _sums_two_best(router: Router) -> bool:
    """DeepSeek-V3 (arXiv 2412.19437, and its model code) scores a group by the sum of its two best
    biased experts, DeepSeek-V2 (arXiv 2405.04434), which has no bias, by its best one."""
    return router.has_bias


def _forced_faults(layer: MoELayer, forced: Sequence[_Asked]) -> list[Fault]:
    count = len(_union(forced))
    if count <= layer.top_k:
        return []
    text = (
        f"layer {layer.number} chooses {layer.top_k} experts for each token, but {_names(forced)} "
        f"together force {count} in; force at most {layer.top_k} experts of that layer"
    )
    return [Fault(_worst(forced).mask.location, text)]


def _union(asked: Iterable[_Asked]) -> frozenset[int]:
    return frozenset().union(*(each.experts for each in asked))


def _within(asked: Iterable[_Asked], experts: set[int]) -> list[_Asked]:
    return [each for each in asked if each.experts & experts]


def _worst(asked: Sequence[_Asked]) -> _Asked:
    """Who names most experts of the layer; the first in deciding order among equals."""
    return max(asked, key=lambda each: len(each.experts))


def _names(asked: Iterable[_Asked]) -> str:
    return ", ".join(sorted({each.rule for each in asked}))


def _spans(groups: Iterable[range]) -> str:
    return ranges([expert_id for group in groups for expert_id in group])
