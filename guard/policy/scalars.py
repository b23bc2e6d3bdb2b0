"""The values of the policy language that YAML does not know: names, ranges, windows, bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from enum import StrEnum
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from guard.policy.model import (
    MaskMethod,
    MaskUntil,
    Maturity,
    Mode,
    NamedWindow,
    OnError,
    Phase,
    Reduce,
    Severity,
    Window,
)
from guard.policy.spec import value_fault, word
from guard.policy.suggest import describe, did_you_mean, one_of, quote

MAX_NAME_LENGTH: Final = 63
MAX_WINDOW_TOKENS: Final = 4096
MAX_TOKENS: Final = 2**31 - 1
MAX_PERSIST: Final = 64
MAX_LAYER: Final = 4095
MAX_EXPERT: Final = 65_535
MAX_RANGES: Final = 1024
MAX_WEIGHT: Final = 1e6
MAX_LABELS: Final = 32
MAX_LABEL_LENGTH: Final = 256
MAX_NUMBER: Final = 1e12
"""Thresholds and biases; no sum of weights over a request comes near it."""

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
SET_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LABEL_PATTERN: Final = r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"
FINGERPRINT_PATTERN: Final = r"^sha256:[0-9a-f]{64}$"

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_RANGE = re.compile(r"(?P<first>[0-9]{1,9}) *- *(?P<last>[0-9]{1,9})|(?P<only>[0-9]{1,9})")


def _ids(what: str, largest: int) -> Callable[[object], range]:
    def parse(value: object) -> range:
        first = last = -1
        if isinstance(value, int) and not isinstance(value, bool):
            first = last = value
        elif isinstance(value, str) and (match := _RANGE.fullmatch(value)):
            first = int(match["first"] or match["only"])
            last = int(match["last"] or match["only"])
            if last < first:
                raise value_fault(f"the range {quote(value)} runs backwards; write {last}-{first}")
        else:
            raise value_fault(
                f"expected {what} such as 7 or a range such as 4-7, found {describe(value)}"
            )
        if first < 0 or last > largest:
            raise value_fault(f"expected {what} from 0 to {largest}, found {describe(value)}")
        return range(first, last + 1)

    return parse


def _one_layer(value: object) -> object:
    if isinstance(value, str) and "-" in value and _RANGE.fullmatch(value):
        raise value_fault(f"expected one layer number, found {describe(value)}; write `layers`")
    return value


def _set_reference(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise value_fault(
            "expected the name of a set in spec.experts, or file-name/set for one of another file, "
            f"found {describe(value)}"
        )
    if value.count("/") > 1 or value[0] == "/" or value[-1] == "/":
        raise value_fault(
            f"{quote(value)} is no set: write the name of a set in spec.experts, or file-name/set, "
            "the file's name without folder and ending"
        )
    return value


def _day(value: object) -> date:
    if isinstance(value, str) and _DAY.fullmatch(value):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise value_fault(f"expected a day such as 2027-03-31, found {describe(value)}")


def _positive(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _window(value: object) -> Window:
    names = [window.value for window in NamedWindow]
    if isinstance(value, str) and value in names:
        return NamedWindow(value)
    if isinstance(value, int) and _positive(value, MAX_WINDOW_TOKENS):
        return value
    raise value_fault(
        f"expected a number of tokens from 1 to {MAX_WINDOW_TOKENS}, {one_of(names)}, "
        f"found {describe(value)}{did_you_mean(value, names)}"
    )


def _until(value: object) -> MaskUntil:
    if value == "request-end" or value == "clear":
        return value
    if isinstance(value, int) and _positive(value, MAX_TOKENS):
        return value
    raise value_fault(
        f"expected request-end, clear or a number of tokens of at least 1, "
        f"found {describe(value)}{did_you_mean(value, ('request-end', 'clear'))}"
    )


def _word_of(words: type[StrEnum]) -> Callable[[object], StrEnum]:
    check = word([member.value for member in words])
    return lambda value: words(check(value))


def _some(value: object) -> object:
    """A single id where a list of ids may stand."""
    return (value,) if isinstance(value, int | str) and not isinstance(value, bool) else value


def _ids_schema(largest: int) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": largest},
                {"type": "string", "pattern": r"^[0-9]+( *- *[0-9]+)?$"},
            ]
        }
    )


def _some_text(value: object) -> object:
    """A single text where a list of texts may stand."""
    if not isinstance(value, str | tuple):
        found = describe(value)
        quotes = "; put it in quotes" if isinstance(value, bool | int | float) else ""
        raise value_fault(f"expected text or a list of texts, found {found}{quotes}")
    return (value,) if isinstance(value, str) else value


Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
Fingerprint = Annotated[str, Field(pattern=FINGERPRINT_PATTERN)]
SetName = Annotated[str, Field(pattern=SET_NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
SetReference = Annotated[str, BeforeValidator(_set_reference)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Budget = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Layer = Annotated[int, BeforeValidator(_one_layer), Field(ge=0, le=MAX_LAYER)]
ExpertId = Annotated[int, Field(ge=0, le=MAX_EXPERT)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]

LayerRange = Annotated[range, PlainValidator(_ids("a layer number", MAX_LAYER)), _ids_schema(MAX_LAYER)]
ExpertRange = Annotated[
    range, PlainValidator(_ids("an expert id", MAX_EXPERT)), _ids_schema(MAX_EXPERT)
]
LayerRanges = Annotated[
    tuple[LayerRange, ...], BeforeValidator(_some), Field(min_length=1, max_length=MAX_RANGES)
]
ExpertRanges = Annotated[
    tuple[ExpertRange, ...], BeforeValidator(_some), Field(min_length=1, max_length=MAX_RANGES)
]

WindowValue = Annotated[
    Window,
    PlainValidator(_window),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [window.value for window in NamedWindow]},
                {"type": "integer", "minimum": 1, "maximum": MAX_WINDOW_TOKENS},
            ]
        }
    ),
]
UntilValue = Annotated[
    MaskUntil,
    PlainValidator(_until),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["request-end", "clear"]},
                {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
            ]
        }
    ),
]

LabelName = Annotated[str, Field(pattern=LABEL_PATTERN, max_length=MAX_NAME_LENGTH)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(_some_text), Field(min_length=1, max_length=MAX_RANGES)
]
Labels = Annotated[dict[LabelName, Texts], Field(min_length=1, max_length=MAX_LABELS)]
Day = Annotated[date, PlainValidator(_day), WithJsonSchema({"type": "string", "format": "date"})]

ModeWord = Annotated[Mode, BeforeValidator(_word_of(Mode))]
SeverityWord = Annotated[Severity, BeforeValidator(_word_of(Severity))]
MaturityWord = Annotated[Maturity, BeforeValidator(_word_of(Maturity))]
MaskMethodWord = Annotated[MaskMethod, BeforeValidator(_word_of(MaskMethod))]
OnErrorWord = Annotated[OnError, BeforeValidator(_word_of(OnError))]
ReduceWord = Annotated[Reduce, BeforeValidator(_word_of(Reduce))]
PhaseWord = Annotated[Phase, BeforeValidator(_word_of(Phase))]
