"""Expert lists of others' tools, as the `sets` of a profile.

A file may come from anywhere: nothing in it is executed, and no size is believed.

| format | file |
|---|---|
| steermoe | SteerMoE's pickled table of counts (`frames.py`); experts by their risk difference |
| easysteer | EasySteer's JSON: `layer_configs`, each with `mode` and `expert_ids` |
| esft | ESFT's JSON: `experts`, by layer a list of ids |
| mask | JSON, a list of 0 or 1 for each expert of each layer; 1 is named |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from guard.discover.errors import DiscoverError
from guard.discover.frames import read_frame
from guard.policy.suggest import one_of, quote

MAX_BYTES: Final = 64 << 20
MAX_LAYER: Final = 4096
MAX_EXPERT: Final = 65_535


class Expert(NamedTuple):
    layer: int
    id: int


class ImportedSets(NamedTuple):
    """sets: experts by name, each in order; note: what the numbers are, for the profile's provenance"""

    sets: Mapping[str, Sequence[Expert]]
    note: str


def import_sets(path: Path, kind: str, *, least_effect: float = 0.3) -> ImportedSets:
    """least_effect: of the risk difference, for a table of counts

    Raises DiscoverError for a file that is not of that kind.
    """
    if kind not in _READERS:
        raise DiscoverError(f"unknown format {quote(kind)}; there is {one_of(sorted(_READERS), 'and')}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DiscoverError(f"{path}: is larger than {MAX_BYTES >> 20} MiB: no list of experts is")
        data = path.read_bytes()
    except OSError as error:
        raise DiscoverError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found = _READERS[kind](data, least_effect)
    except DiscoverError as error:
        raise DiscoverError(f"{path}: {error}") from error
    if not any(found.sets.values()):
        raise DiscoverError(f"{path}: names no expert")
    return found


def as_profile_sets(sets: Mapping[str, Sequence[Expert]]) -> dict[str, list[dict[str, Any]]]:
    """As a profile's `sets` has them; empty ones are left out."""
    return {
        name: [
            {"layer": layer, "experts": sorted({e.id for e in experts if e.layer == layer})}
            for layer in sorted({e.layer for e in experts})
        ]
        for name, experts in sets.items()
        if experts
    }


def _steermoe(data: bytes, least_effect: float) -> ImportedSets:
    frame = read_frame(data)
    for column in ("layer", "expert", "risk_diff"):
        if column not in frame:
            raise DiscoverError(
                f"the table has no column {quote(column)}; it has {one_of(sorted(frame), 'and')}"
            )
    sets: dict[str, list[Expert]] = {"raised": [], "lowered": []}
    for layer, expert, effect in zip(frame["layer"], frame["expert"], frame["risk_diff"], strict=True):
        difference = _real(effect)
        if abs(difference) >= least_effect:
            sets["raised" if difference > 0 else "lowered"].append(_expert(layer, expert))
    return ImportedSets(
        {name: sorted(experts) for name, experts in sets.items()},
        f"risk difference of pooled tokens, {least_effect:g} at least: neither its pairs nor its "
        "lengths are known",
    )


def _easysteer(data: bytes, _: float) -> ImportedSets:
    layers = _object(_json(data), "layer_configs")
    sets: dict[str, list[Expert]] = {}
    for layer, config in layers.items():
        if not isinstance(config, dict):
            raise DiscoverError(f"layer_configs[{quote(layer)}]: is no object")
        named = {key: config[key] for key in ("activate", "deactivate") if key in config}
        if "expert_ids" in config:
            named[str(config.get("mode", "activate"))] = config["expert_ids"]
        for mode, ids in named.items():
            name = _set_name(mode)
            sets.setdefault(name, []).extend(_experts(layer, ids))
    return ImportedSets({name: sorted(experts) for name, experts in sets.items()}, "EasySteer's lists")


def _esft(data: bytes, _: float) -> ImportedSets:
    layers = _object(_json(data), "experts")
    experts = sorted(expert for layer, ids in layers.items() for expert in _experts(layer, ids))
    return ImportedSets({"tuned": experts}, "the experts that ESFT tunes for a task")


def _mask(data: bytes, _: float) -> ImportedSets:
    rows = _json(data)
    if not isinstance(rows, list) or not rows or len(rows) > MAX_LAYER:
        raise DiscoverError("is no list with a list of 0 and 1 for each layer")
    named = []
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or any(type(bit) is not int or bit not in (0, 1) for bit in row):
            raise DiscoverError(f"row {layer}: is no list of 0 and 1")
        named += [_expert(layer, expert) for expert, bit in enumerate(row) if bit]
    return ImportedSets({"named": named}, "a 0/1 mask; layers are counted from the first row on")


_READERS: Final[Mapping[str, Callable[[bytes, float], ImportedSets]]] = {
    "steermoe": _steermoe,
    "easysteer": _easysteer,
    "esft": _esft,
    "mask": _mask,
}
FORMATS: Final = tuple(sorted(_READERS))


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DiscoverError(f"cannot be read as JSON: {error}") from error


def _object(document: object, key: str) -> Mapping[str, Any]:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise DiscoverError(f"has no {quote(key)} with an object by layer")
    return found


def _set_name(mode: str) -> str:
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in mode.lower())
    return name.strip("-")[:40] or "named"


def _experts(layer: object, ids: object) -> Iterator[Expert]:
    if not isinstance(ids, list):
        raise DiscoverError(f"layer {quote(str(layer))}: its experts are no list")
    for expert in ids:
        yield _expert(layer, expert)


def _expert(layer: object, expert: object) -> Expert:
    return Expert(_whole(layer, "layer", MAX_LAYER), _whole(expert, "expert", MAX_EXPERT))


def _whole(value: object, what: str, most: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 6:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= most:
        raise DiscoverError(f"{quote(str(value))} is no {what} number from 0 to {most}")
    return value


def _real(value: object) -> float:
    if not isinstance(value, int | float) or value != value:
        raise DiscoverError(f"{quote(str(value))} is no risk difference")
    return float(value)
