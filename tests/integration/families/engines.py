"""An engine of each router family: a process for each runner, with and without the plugin."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from tests.integration.offline import cases, policies
from tests.integration.offline.engines import Engines
from tests.support.families import FAMILIES, VOCABULARY, Family

METHODS: Final = ("reroute", "drop", "drop_renorm", "force")
ASKED: Final = (*METHODS, "reroute-most")
"""What one request of the batch each asks for; `reroute-most` leaves no expert more than it must."""

PROMPT_TOKENS = 60
OUTPUT_TOKENS = 8


def masked_experts(family: Family, asked: str) -> dict[int, list[int]]:
    """By layer number: what that mask names. The forced ones are among those that no other names."""
    found = {}
    for layer in sorted({*family.moe_layers} - {*family.hash_layers}):
        most, live = _split(family, layer)
        if asked == "force":
            found[layer] = sorted(live[: min(2, family.top_k)])
        else:
            found[layer] = sorted(most if asked == "reroute-most" else most[: (len(most) + 1) // 2])
    return found


def _split(family: Family, layer: int) -> tuple[list[int], list[int]]:
    """As many experts as may be masked, and the others, in an order of the layer's own."""
    random = Random(f"{family.slug} {layer}")
    size = family.num_experts // family.groups
    kept = family.top_k // family.kept_groups  # any groups that are kept hold top_k live ones
    most, live = [], []
    for group in range(family.groups):
        experts = random.sample(range(group * size, (group + 1) * size), size)
        live += experts[:kept]
        most += experts[kept:]
    return random.sample(most, len(most)), random.sample(live, len(live))


def _policy(family: Family, asked: str) -> dict[str, Any]:
    method = "reroute" if asked == "reroute-most" else asked
    mask = {"mask": {"experts": "flagged", "method": method, "until": "request-end"}}
    entries = [
        {"layer": layer, "experts": experts} for layer, experts in masked_experts(family, asked).items()
    ]
    rules = [{"name": "mask", "when": {"always": {}}, "then": mask}]
    return policies.policy(asked.replace("_", "-"), rules, {"flagged": entries})


def batch(masked: bool) -> list[cases.Request]:
    """A request that asks for each mask, each behind a neighbour that asks for none."""
    requests = []
    for i, asked in enumerate(ASKED):
        for j in range(2):
            prompt = Random(10 * i + j).choices(range(2, VOCABULARY), k=PROMPT_TOKENS + i)
            enforce = [asked.replace("_", "-")] if masked and j else ()
            requests.append(cases.request(prompt, enforce=enforce, max_tokens=OUTPUT_TOKENS))
    return requests


def masked_request(asked: str) -> int:
    """Where in the batch it is."""
    return 2 * ASKED.index(asked) + 1


class FamilyEngines(Engines):
    """The groups are RUNNER-plain and RUNNER-guarded, whose engines have the families' names, and
    compiled-plain and compiled-guarded."""

    def _environment(self, group: str) -> dict[str, str]:
        environment = super()._environment(group)
        if group.startswith("compiled"):
            # On some CPUs vLLM's compiled MLA computes NaN now and then, with the plugin and without
            # it. Beside its router DeepSeek-V3 may have common attention as well.
            environment["VLLM_MLA_DISABLE"] = "1"
        return environment

    def _engines(self, group: str) -> list[dict[str, Any]]:
        mode, _, kind = group.partition("-")
        chosen = [family for family in FAMILIES if family.runs_on(mode)]
        engines = [self._family_engine(family, mode, guarded=kind == "guarded") for family in chosen]
        if group == "v1-guarded":
            refused = (family for family in FAMILIES if family.refusal)
            engines += [self._family_engine(family, mode, guarded=True) for family in refused]
        if group == "v1-plain":
            failing = (family for family in FAMILIES if family.failure)
            engines += [self._family_engine(family, mode, guarded=False) for family in failing]
        return engines

    def _family_engine(self, family: Family, mode: str, *, guarded: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(family.write(self.folder / family.slug)),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": family.config["dtype"],
            "enforce_eager": mode != "compiled",
            "max_model_len": 128,
            "max_num_seqs": 16,
            "block_size": 32,
            "enable_prefix_caching": True,
        } | family.engine
        engine_cases = [cases.case("unmasked", batch(masked=False))]
        if guarded:
            folder = self.folder / f"{family.slug}-policies"
            if not folder.exists():
                policies.write(folder, [_policy(family, asked) for asked in ASKED])
            arguments |= {
                "additional_config": {"moe_guard": {"policies": str(folder)}},
                "worker_extension_cls": "tests.support.routing_recorder.WeightsRecorder",
                "enable_return_routed_experts": mode == "v2" and family.is_recorded,
            }
            engine_cases.append(cases.case("masked", batch(masked=True)))
        return {
            "name": family.name,
            "engine": {name: value for name, value in arguments.items() if value is not None},
            "correction_bias": family.correction_bias,
            "record": guarded,
            "cases": engine_cases,
        }
