"""A model's profile: what is known of its experts. Today the experts that no policy may mask.

A profile is JSON, named by `spec.profile` relative to the folder of the policy that names it. Its
baselines, thresholds, probes and sets are for later versions, and passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from guard.policy.explain import explain
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.json_nodes import read_json
from guard.policy.model import ModelRequirement, NeverMask, Profile
from guard.policy.nodes import Node, locate, plain
from guard.policy.scalars import Count, ExpertRanges, Layer, LayerRanges
from guard.policy.schema import API_VERSION
from guard.policy.spec import Problem, Spec, word
from guard.policy.texts import Text


class ProfileModelSpec(Spec):
    """The model that was profiled."""

    architecture: Annotated[str, Field(min_length=1)] = Field(description="As in its config.json.")
    layers: Count | None = Field(default=None, description="How many MoE layers.")
    experts: Count | None = Field(default=None, description="How many routed experts a layer.")
    top_k: Count | None = Field(default=None, description="How many a token is routed to.")


class NeverMaskSpec(Spec):
    """Experts that the model cannot do without."""

    layer: Layer | None = Field(default=None, description="The model's own layer number.")
    layers: LayerRanges | None = Field(default=None, description="Several of them.")
    experts: ExpertRanges = Field(description="Logical expert ids, and ranges such as 90-95.")
    reason: str = Field(default="", description="Why, for people.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, ["layer", "layers"], "the entry")


class ProfileDocument(Spec):
    api_version: Annotated[Literal["moe-guard/v1"], BeforeValidator(word([API_VERSION]))] = Field(
        description="The version of the policy language."
    )
    kind: Annotated[Literal["Profile"], BeforeValidator(word(["Profile"]))] = Field(
        description="What the document is."
    )
    model: ProfileModelSpec = Field(description="The model that was profiled.")
    never_mask: tuple[NeverMaskSpec, ...] = Field(
        default=(), description="Experts that no policy may mask."
    )
    sets: Any = Field(default=None, description="Named sets of experts; not read yet.")
    baselines: Any = Field(default=None, description="Activation rates; not read yet.")
    thresholds: Any = Field(default=None, description="Calibrated thresholds; not read yet.")
    probes: Any = Field(default=None, description="Linear probes; not read yet.")


def load_profile(file: Text, named_at: Location) -> Profile:
    """Raises PolicyError: at `named_at` if the file could not be read, else at the place in it."""
    if file.problem:
        text = f"spec.profile: the profile {file.file} {file.problem}"
        raise PolicyError([Fault(named_at, text)])
    root = read_json(file.text, file.file)
    try:
        document = ProfileDocument.model_validate(plain(root))
    except ValidationError as error:
        raise PolicyError(explain(error, root)) from error
    return _build(document, root, Location(file.file), named_at)


def _build(document: ProfileDocument, root: Node, place: Location, named_at: Location) -> Profile:
    model = document.model
    return Profile(
        location=place,
        named_at=named_at,
        digest=_digest(root),
        model=ModelRequirement(
            location=locate(root, ("model",), key=True),
            architecture=model.architecture,
            layers=model.layers,
            experts=model.experts,
            top_k=model.top_k,
        ),
        never_mask=tuple(
            NeverMask(
                layers=_numbers([entry.layer] if entry.layer is not None else [], entry.layers or ()),
                experts=_numbers([], entry.experts),
                reason=entry.reason,
                location=locate(root, ("neverMask", index)),
            )
            for index, entry in enumerate(document.never_mask)
        ),
    )


def _digest(root: Node) -> str:
    text = json.dumps(plain(root), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(single: list[int], ranges: tuple[range, ...]) -> tuple[int, ...]:
    return tuple(sorted({*single, *(number for numbers in ranges for number in numbers)}))
