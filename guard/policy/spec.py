"""What every part of the schema shares: strict keys, the nearest word, all faults at once.

Errors leave a model as pydantic errors, so that pydantic puts the path before them; `explain` turns
them into faults. Those that we word ourselves have one of two types: KEY_FAULT, which belongs to
the key at its path, and VALUE_FAULT, which belongs to the value there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Final, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

from guard.policy.suggest import describe, did_you_mean, nearest, one_of, quote

KEY_FAULT: Final = "policy_key"
VALUE_FAULT: Final = "policy_value"


class Problem(NamedTuple):
    """A fault of a mapping that no single field can see. `path` starts at the mapping."""

    path: tuple[str | int, ...]
    text: str
    at_key: bool = False


class _Known(dict[object, object]):
    """A mapping whose keys have been judged."""


class Spec(BaseModel):
    """A mapping of the policy language."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", alias_generator=to_camel)

    BARE: ClassVar[frozenset[str]] = frozenset()
    """Keys that need no settings: `word`, `word:`, `word: true` and `word: {}` say the same."""
    HINTS: ClassVar[Mapping[str, str]] = {}
    """For keys that are no keys here, what to write instead."""

    @classmethod
    def key_names(cls) -> tuple[str, ...]:
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        """What is wrong with how the keys go together; values may still be of any type."""
        yield from ()

    @classmethod
    def exactly_one(
        cls,
        data: Mapping[object, object],
        choices: Collection[str],
        what: str,
        hint: str = "take the others out",
    ) -> Iterator[Problem]:
        """A problem unless `data` has one of `choices`. An unknown key, said already, may be it."""
        given = [key for key in data if key in choices]
        for extra in given[1:]:
            text = f"{what} has exactly one of {one_of(choices)}, and {given[0]!r} is given; {hint}"
            yield Problem((_step(extra),), text, at_key=True)
        if not given and all(key in cls.key_names() for key in data):
            yield Problem((), f"{what} needs exactly one of {one_of(choices)}")

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, _Known):  # pydantic comes twice where a model refers to itself
            return handler(data)
        if isinstance(data, str) and data in cls.BARE:
            data = {data: {}}
        if not isinstance(data, dict):
            names = ", ".join(cls.key_names())
            keys = f"a mapping with keys of {names}" if names else "{} or true"
            space = isinstance(data, str) and re.fullmatch(r"\w+:\S+", data) is not None
            hint = "; put a space behind the colon" if space else ""
            raise value_fault(f"expected {keys}, found {describe(data)}{hint}")
        data = {
            key: {} if key in cls.BARE and (value is None or value is True) else value
            for key, value in data.items()
        }
        known = _Known()
        errors: list[InitErrorDetails] = []
        for key, value in data.items():
            if key not in cls.key_names():
                errors.append(_detail((_step(key),), cls._about_unknown(key), at_key=True))
            elif value is None:
                errors.append(_detail((_step(key),), "has no value; give one", at_key=True))
            else:
                known[key] = value
        errors += [_detail(*problem) for problem in cls.problems(data)]
        try:
            checked = handler(known)
        except ValidationError as error:
            given = {(nearest(str(key), cls.key_names()),) for key in data}
            errors += [
                _again(dict(detail))
                for detail in error.errors(include_url=False)
                if not (detail["type"] == "missing" and detail["loc"] in given)
            ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return checked

    @classmethod
    def _about_unknown(cls, key: object) -> str:
        if isinstance(key, str) and key in cls.HINTS:
            return cls.HINTS[key]
        shown = quote(key) if isinstance(key, str) else describe(key)
        known = one_of(cls.key_names()) or "no key"
        hint = did_you_mean(key, cls.key_names()) or f"; expected {known}"
        return f"unknown key {shown}{hint}"


def word(choices: Collection[str]) -> Callable[[object], str]:
    """A check that a value is one of `choices`."""

    def check(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        hint = did_you_mean(value, choices)
        raise value_fault(f"expected {one_of(choices)}, found {describe(value)}{hint}")

    return check


def value_fault(text: str) -> PydanticCustomError:
    return PydanticCustomError(VALUE_FAULT, "{text}", {"text": text})


def _detail(path: tuple[str | int, ...], text: str, at_key: bool = False) -> InitErrorDetails:
    kind = PydanticCustomError(KEY_FAULT if at_key else VALUE_FAULT, "{text}", {"text": text})
    return InitErrorDetails(type=kind, loc=path, input=None)


def _again(detail: dict[str, Any]) -> InitErrorDetails:
    """An error that pydantic reported, in the form in which it takes errors."""
    kind = detail["type"]
    if kind in (KEY_FAULT, VALUE_FAULT):
        kind = PydanticCustomError(kind, "{text}", detail["ctx"])
    return InitErrorDetails(
        type=kind, loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {})
    )


def _step(key: object) -> str | int:
    return key if isinstance(key, str | int) else str(key)
