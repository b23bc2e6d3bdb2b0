"""Whether policies fit a model: what they require of it, the experts they name, what they mask."""

from __future__ import annotations

from guard.policy.fault import Fault, Location
from guard.policy.model import (
    Baselines,
    ExpertEntry,
    ExpertSet,
    Mask,
    ModelRequirement,
    Policy,
    PolicySet,
)
from guard.program.mask_proof import mask_faults
from guard.program.topology import MoELayer, Topology
from guard.program.wording import ranges


def check_against(policies: PolicySet, topology: Topology) -> list[Fault]:
    """What in the policies does not fit the model, each at the line at fault."""
    faults = [
        fault
        for policy in policies.policies
        for fault in (
            *_requirement_faults(policy, topology),
            *_profile_faults(policy, topology),
            *_expert_faults(policy, topology),
        )
    ]
    return faults or mask_faults(policies, topology)


def _requirement_faults(policy: Policy, topology: Topology) -> list[Fault]:
    required = policy.model
    if required is None:
        return []
    what, remedy = f"policy {policy.name!r}", "serve that model or mend spec.model"
    return model_faults(required, topology, what, required.location, remedy)


def _profile_faults(policy: Policy, topology: Topology) -> list[Fault]:
    faults = []
    remedy = "serve that model or name this model's profile"
    for profile in policy.profiles:
        what = f"the profile {profile.location.file} of policy {policy.name!r}"
        faults += model_faults(profile.model, topology, what, profile.named_at, remedy)
        if profile.baselines is not None:
            faults += _baseline_faults(profile.baselines, topology, what, profile.named_at)
    return faults


def _baseline_faults(
    baselines: Baselines, topology: Topology, what: str, location: Location
) -> list[Fault]:
    wanted = {layer.number: layer.num_experts for layer in topology.layers}
    found = {number: len(rates) for number, rates in baselines.rates.items()}
    if wanted == found:
        return []
    number = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    text = (
        f"{what} has baselines of {found.get(number, 0)} experts in layer {number}, where the served "
        f"model has {wanted.get(number, 0)}; measure them on this model"
    )
    return [Fault(location, text)]


def model_faults(
    required: ModelRequirement, topology: Topology, what: str, location: Location, remedy: str
) -> list[Fault]:
    """What is required and not so. what: that requires it, in words; remedy: what to do, in words"""
    experts: list[object] = [*sorted({layer.num_experts for layer in topology.layers})]
    top_ks: list[object] = [*sorted({layer.top_k for layer in topology.layers})]
    checks: list[tuple[str, object, list[object]]] = [
        ("architecture", required.architecture, [topology.architecture]),
        ("layers", required.layers, [len(topology.layers)]),
        ("experts", required.experts, experts),
        ("topK", required.top_k, top_ks),
    ]
    return [
        Fault(
            location,
            f"{what} is for a model with {key}: {wanted}, but the served model has "
            f"{key}: {', '.join(map(str, found))}; {remedy}",
        )
        for key, wanted, found in checks
        if wanted is not None and [wanted] != found
    ]


def _expert_faults(policy: Policy, topology: Topology) -> list[Fault]:
    layers = {layer.number: layer for layer in topology.layers}
    faults = []
    for expert_set in _expert_sets(policy):
        for entry in expert_set.entries:
            for number in entry.layers:
                if number not in layers:
                    text = (
                        f"set {expert_set.name!r} names layer {number}, but the MoE layers of this "
                        f"model are {ranges(sorted(layers))}; a dense layer has no experts to watch "
                        "or mask"
                    )
                    faults.append(Fault(entry.location, text))
                else:
                    faults += _outside_faults(expert_set, entry, layers[number])
    return faults


def _expert_sets(policy: Policy) -> list[ExpertSet]:
    """What the policy names, and what its rules took from a profile: a probe, dormant experts."""
    read = [condition.experts for rule in policy.rules for condition in rule.conditions()]
    masked = [rule.then.experts for rule in policy.rules if isinstance(rule.then, Mask)]
    sets = [s for s in (*policy.experts.values(), *read, *masked) if s is not None]
    return list({(s.name, s.location): s for s in sets}.values())


def _outside_faults(expert_set: ExpertSet, entry: ExpertEntry, layer: MoELayer) -> list[Fault]:
    outside = [expert_id for expert_id in entry.weights if expert_id >= layer.num_experts]
    if not outside:
        return []
    zero_experts = layer.router.num_zero_experts
    if outside[0] < layer.num_experts + zero_experts:
        why = (
            f"which is one of its {zero_experts} zero experts: they pass the token through, and can "
            f"be neither watched nor masked; its routed experts are 0-{layer.num_experts - 1}"
        )
    else:
        why = (
            f"but that layer has experts 0-{layer.num_experts - 1}; shared experts are not routed, so "
            "they have no id and cannot be masked"
        )
    text = f"set {expert_set.name!r} names expert {outside[0]} of layer {layer.number}, {why}"
    return [Fault(entry.location, text)]
