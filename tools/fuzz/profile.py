"""Profiles, as a policy names them: damaged JSON, and JSON with other values in known places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from guard.policy import Location, PolicyError
from guard.policy.profile import load_profile
from guard.policy.texts import profile_text
from tools.fuzz.mutation import JSON, mostly, mutated
from tools.fuzz.part import Part, Parts
from tools.fuzz.policies import PROFILE, check

NAMED_AT: Final = Location("p.yaml", 7, 3)
_FILE: Final = "m.json"

_WHOLE: Final[dict[str, Any]] = json.loads(PROFILE) | {
    "statistics": {},
    "causal": {},
    "protective": {"s": {"override": "for a drill"}},
}
_RANGES: Final = st.one_of(
    st.integers(0, 5),
    st.sampled_from(["0-1", "0-4095", "0-65535", "65535", "4096", "3-1", "0", " 1 - 2 ", "-1", "1-"]),
)
_ENTRY: Final = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.integers(0, 3),
        "layers": mostly(st.lists(_RANGES, max_size=3), _RANGES),
        "experts": st.lists(_RANGES, max_size=3),
        "weights": st.dictionaries(st.integers(0, 5).map(str), st.floats(-2, 2), max_size=3),
        "reason": st.text(max_size=3),
    },
)
_GOOD_ENTRY: Final = st.one_of(
    st.fixed_dictionaries(
        {"layer": st.integers(0, 3), "experts": st.lists(_RANGES, min_size=1, max_size=2)}
    ),
    st.fixed_dictionaries({"layers": _RANGES, "experts": st.lists(_RANGES, min_size=1, max_size=2)}),
)
_ENTRIES: Final = st.lists(mostly(_GOOD_ENTRY, _ENTRY), min_size=1, max_size=3)
_MANY: Final = st.builds(
    lambda entry, times: [entry] * times, _GOOD_ENTRY, st.sampled_from([10, 300, 3000])
)
_SETS: Final = st.fixed_dictionaries(
    {"s": _ENTRIES, "w": mostly(_ENTRIES, _MANY)},
    optional=dict.fromkeys(["a.b", "-", ""], _ENTRIES),
)


def _rates(num_experts: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0, 1), min_size=num_experts, max_size=num_experts)


_OTHER: Final[dict[str, st.SearchStrategy[Any]]] = {
    "sets": _SETS,
    "neverMask": st.lists(mostly(_GOOD_ENTRY, _ENTRY), max_size=2),
    "baselines": st.fixed_dictionaries(
        {
            "tokens": st.integers(-1, 10),
            "rates": st.dictionaries(st.integers(0, 5).map(str), _rates(4), max_size=3),
        }
    ),
    "protective": st.dictionaries(
        st.sampled_from(["s", "w", "x"]),
        st.fixed_dictionaries({}, optional={"override": JSON}),
        max_size=2,
    ),
    "statistics": st.dictionaries(st.sampled_from(["s", "q", "x"]), JSON, max_size=2),
    "causal": st.dictionaries(st.sampled_from(["s", "w", "x"]), JSON, max_size=2),
    "provenance": JSON,
    "model": st.fixed_dictionaries(
        {},
        optional={
            "architecture": JSON,
            "layers": JSON,
            "experts": st.integers(0, 9),
            "topK": st.integers(0, 9),
            "fingerprint": JSON,
        },
    ),
}


@st.composite
def made(draw: st.DrawFn) -> bytes:
    document = dict(_WHOLE)
    for key in draw(st.lists(st.sampled_from(sorted(_OTHER)), max_size=2, unique=True)):
        document[key] = draw(_OTHER[key])
    if draw(st.integers(0, 7)) == 7:
        path = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
        document = _with(document, path, draw(JSON))
    return json.dumps(document).encode()


def _with(value: Any, path: list[int], other: Any) -> Any:
    """The value with another at the place that the path leads to."""
    if not path or not isinstance(value, dict | list) or not value:
        return other
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = _with(value[key], path[1:], other)
    return changed


def parts(_: Path) -> Parts:
    def read(content: bytes) -> None:
        text = profile_text(_FILE, content)
        try:
            profile = load_profile(text, NAMED_AT)
        except PolicyError as error:
            named = text._replace(file=NAMED_AT.file, text="\n" * NAMED_AT.line)
            check(error.faults, [text, named])
            raise
        assert len(profile.digest) == 64
        for experts in profile.sets.values():
            assert experts.entries

    words = [b"NaN", b"1e999", b"-Infinity", b"\\ud800", b"\xef\xbb\xbf", b"0-65535", b"0-4095"]
    whole = json.dumps(_WHOLE).encode()
    return {
        "damaged": Part(mutated([whole, PROFILE.encode()], words), read, (PolicyError,)),
        "made": Part(made(), read, (PolicyError,)),
    }
