"""Writes the JSON Schema of policies, profiles and test suites into `policies/schema/`, for editors.

python -m tools.policy_schema           # write it
python -m tools.policy_schema --check   # exit with 1 if it is not up to date

It is made from the models that the loader validates with, so an editor that reads it completes what
the loader takes. What a schema cannot know, such as the names of sets, the loader alone tells.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from guard.policy.profile_schema import ProfileDocument
from guard.policy.scalars import MAX_LAYER, MAX_TOKENS
from guard.policy.schema import (
    EXPERT_SETS,
    POLICY,
    POLICY_TEST,
    EntrySpec,
    ExpertSetsDocument,
    PolicyDocument,
)
from guard.policy.spec import Problem, Spec
from guard.testing.schema import SuiteDocument

FOLDER: Final = Path(__file__).parent.parent / "policies" / "schema"
DIALECT: Final = "http://json-schema.org/draft-07/schema#"
"""What editors know best; `$defs` is a place like any other to it."""

_TEXT: Final[JsonSchemaValue] = {"type": "string", "minLength": 1}
_POSITION: Final[JsonSchemaValue] = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS},
        {"type": "string", "pattern": r"^output( *\+ *[0-9]{1,9})?$"},
    ]
}
_LAYERS: Final[JsonSchemaValue] = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": MAX_LAYER},
        {"type": "string", "pattern": r"^[0-9]{1,4}( *- *[0-9]{1,4})?$"},
    ]
}
# What validators take that pydantic cannot know, by their names.
_PLAIN: Final[Mapping[str, JsonSchemaValue]] = {
    "_position": _POSITION,
    "_positions": {"anyOf": [_POSITION, {"type": "array", "items": _POSITION, "minItems": 1}]},
    "_until": {"anyOf": [{"const": "end"}, _POSITION]},
    "_layers": {"anyOf": [*_LAYERS["anyOf"], {"type": "array", "items": _LAYERS, "minItems": 1}]},
}
_SHORT: Final[Mapping[str, JsonSchemaValue]] = {
    "_use": _TEXT,
    "_threshold": _TEXT,
    "_model": _TEXT,
    "_expect": {"const": "nothing"},
}
_SINGLE: Final = ("_some", "_some_text", "_paths", "_expect")


class _Schema(GenerateJsonSchema):
    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        inner = super().function_before_schema(schema)
        name = getattr(schema["function"]["function"], "__name__", "")
        short = [_SHORT[name]] if name in _SHORT else []
        single = [inner["items"]] if name in _SINGLE and "items" in inner else []
        return {"anyOf": [*short, *single, inner]} if short or single else inner

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        name = getattr(schema["function"]["function"], "__name__", "")
        return dict(_PLAIN[name]) if name in _PLAIN else super().function_plain_schema(schema)

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        cls = schema["cls"]
        if not issubclass(cls, Spec):
            return made
        made.pop("title", None)
        if "maxProperties" not in made:
            made |= _exactly_one(cls)
        for word in cls.BARE & made["properties"].keys():
            made["properties"][word] = _bare(made["properties"][word])
        if cls.BARE and "maxProperties" in made:
            return {"anyOf": [{"enum": sorted(cls.BARE)}, made]}
        return made


def _exactly_one(cls: type[Spec]) -> JsonSchemaValue:
    """The groups of keys of which a mapping has one, as the model's own check asks for them."""
    groups: list[list[str]] = []

    class Recorder(cls):  # type: ignore[misc,valid-type]
        @classmethod
        def exactly_one(
            cls, data: Mapping[object, object], choices: Collection[str], *_: str
        ) -> Iterator[Problem]:
            groups.append(list(choices))
            yield from ()

    list(Recorder.problems({}))
    asked = [{"oneOf": [{"required": [key]} for key in group]} for group in groups]
    if not asked:
        return {}
    if cls is EntrySpec:
        listed = [{"required": [key]} for group in groups for key in group]
        return {
            "if": {"anyOf": [{"required": ["set"]}, {"required": ["profile"]}]},
            "then": {"required": ["set"], "not": {"anyOf": listed}},
            "else": {"allOf": asked},
        }
    return {"allOf": asked} if len(asked) > 1 else asked[0]


def _bare(schema: JsonSchemaValue) -> JsonSchemaValue:
    """A key that needs no settings: nothing and `true` say the same as `{}`."""
    described = {key: schema[key] for key in ("description",) if key in schema}
    kept = [part for part in schema.get("anyOf", [schema]) if part != {"type": "null"}]
    return {"anyOf": [*kept, {"const": True}, {"type": "null"}], "x-bare": True, **described}


def _tidied(value: Any) -> Any:
    """Without titles and what is not given: absent, not null, is how a document leaves a key out."""
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {key: item for key, item in value.items() if key != "x-bare"}
    if isinstance(tidy.get("title"), str):
        del tidy["title"]
    if tidy.get("default", 0) is None:
        del tidy["default"]
    options = tidy.get("anyOf")
    if isinstance(options, list) and {"type": "null"} in options and "x-bare" not in value:
        options = [option for option in options if option != {"type": "null"}]
        tidy["anyOf"] = options
        if len(options) == 1 and "$ref" not in options[0]:
            del tidy["anyOf"]
            tidy = {**options[0], **tidy}
    arrays = [option for option in tidy.get("anyOf", ()) if option.get("type") == "array"]
    for length, items in (("minLength", "minItems"), ("maxLength", "maxItems")):
        if arrays and length in tidy:  # of a list that may also stand as its one item
            arrays[0][items] = tidy.pop(length)
    if "$ref" in tidy and len(tidy) > 1:  # beside it, draft 7 sees nothing
        tidy["allOf"] = [{"$ref": tidy.pop("$ref")}]
    return {key: _tidied(item) for key, item in tidy.items()}


def _of(model: type[BaseModel]) -> tuple[JsonSchemaValue, JsonSchemaValue]:
    """The model's schema, and what it refers to."""
    made = model.model_json_schema(by_alias=True, schema_generator=_Schema)
    definitions = made.pop("$defs", {})
    return made, definitions


def schemas() -> dict[str, JsonSchemaValue]:
    """By file name."""
    policy, definitions = _of(PolicyDocument)
    sets, more = _of(ExpertSetsDocument)
    either = {
        "title": "A document of a MoE Guard policy file",
        "required": ["kind"],
        "properties": {"kind": {"enum": [POLICY, EXPERT_SETS, POLICY_TEST]}},
        "if": {"properties": {"kind": {"const": EXPERT_SETS}}},
        "then": {"$ref": "#/$defs/ExpertSetsDocument"},
        "else": {
            "if": {"properties": {"kind": {"const": POLICY_TEST}}},
            "else": {"$ref": "#/$defs/PolicyDocument"},
        },
        "$defs": {**definitions, **more, "PolicyDocument": policy, "ExpertSetsDocument": sets},
    }
    made = {"policy": either}
    others: list[tuple[str, type[BaseModel], str]] = [
        ("profile", ProfileDocument, "A MoE Guard profile of a model"),
        ("policytest", SuiteDocument, "A MoE Guard test suite"),
    ]
    for name, model, title in others:
        schema, definitions = _of(model)
        made[name] = {"title": title, **schema, "$defs": definitions}
    return {
        f"{name}.schema.json": {"$schema": DIALECT, "title": schema["title"], **_tidied(schema)}
        for name, schema in made.items()
    }


def texts() -> dict[Path, str]:
    """What the files hold."""
    return {
        FOLDER / name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas().items()
    }


def stale() -> list[Path]:
    """The files that do not hold what they should."""
    return [
        path
        for path, text in texts().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        if paths := stale():
            names = ", ".join(path.name for path in paths)
            sys.exit(f"not up to date: {names}; run: python -m tools.policy_schema")
        return
    FOLDER.mkdir(exist_ok=True)
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
