"""What tells a model from another of the same shape: its routers' weights.

A profile that has a fingerprint is for these weights alone. Shapes: E experts, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.errors import GuardError
from guard.policy.fault import Fault, PolicyError
from guard.policy.model import PolicySet, Profile

logger = logging.getLogger(__name__)

_ROUTER: Final = re.compile(
    r"(?:^|\.)(?:gate(?:\.wg)?|router(?:\.(?:layer|classifier|proj))?)\.weight$", re.ASCII
)
"""How families end the names of their routers in a checkpoint, such as `mlp.gate.weight`, `mlp.gate.wg`
(Hunyuan), `block_sparse_moe.router.layer` (Granite), `router.proj` (Gemma 4), `router.classifier`."""

_NO_ROUTER: Final = re.compile(r"attn|attention|vision|audio|visual|(?:^|\.)mtp(?:\.|$)", re.ASCII)
"""Gates of attention and of other towers, and routers of draft layers, which not every copy keeps."""

_LAYER: Final = re.compile(r"\.(\d+)\.", re.ASCII)
_MAX_HEADER_BYTES: Final = 100 << 20  # what the reference implementation of the format allows
_DTYPES: Final[Mapping[str, str]] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

_LEAST_BITS: Final = (127 - 16) << 7
"""2**-16 in bfloat16. From there on float16 holds every bfloat16 number; what is smaller counts as 0,
so that a copy in float16 is known."""


class FingerprintError(GuardError):
    """A model's folder whose weights cannot be read."""


class _Router(NamedTuple):
    """A router's place in a file. start: of its numbers, in bytes"""

    layer: int
    name: str
    shape: tuple[int, int]
    dtype: str
    file: Path
    start: int


def fingerprint_of_folder(folder: Path) -> str | None:
    """`sha256:` and the digest of all routers in a folder's safetensors files; None where there are
    none, or one is in a format that is not read (quantised).

    Numbers are rounded to bfloat16: a model that was made in it has the same fingerprint when it is
    saved as float32 or float16. One that was made in float32 may have another when saved as float16.

    Raises FingerprintError for files that are damaged.
    """
    routers = sorted(_routers(folder))
    if not routers or any(router.dtype not in _DTYPES for router in routers):
        return None
    digest = hashlib.sha256()
    for router in routers:
        rows, columns = router.shape
        digest.update(f"{router.layer}:{rows}x{columns}\n".encode())
        digest.update(_as_bfloat16(_read(router), router.dtype).tobytes())
    return f"sha256:{digest.hexdigest()}"


def check_fingerprints(policies: PolicySet, model: str | Path) -> None:
    """Raises PolicyError where a profile is of other weights; FingerprintError."""
    if faults := fingerprint_faults(policies, model):
        raise PolicyError(faults)


def fingerprint_faults(policies: PolicySet, model: str | Path) -> list[Fault]:
    """Profiles that are of other weights than the model's, each where its policy names it.

    model: its folder; of what is none, nothing can be said. Nothing is read unless a profile asks.

    Raises FingerprintError.
    """
    asking = [
        (policy.name, profile)
        for policy in policies.policies
        for profile in policy.profiles
        if profile.fingerprint is not None
    ]
    if not asking:
        return []
    folder = Path(model)
    found = fingerprint_of_folder(folder) if folder.is_dir() else None
    if found is None:
        why = "it has no routers that are known" if folder.is_dir() else "it is no local folder"
        logger.info("%s: not compared with the fingerprints of profiles, as %s", model, why)
        return []
    return [
        _fault(name, profile, found, folder) for name, profile in asking if profile.fingerprint != found
    ]


def _fault(policy: str, profile: Profile, found: str, folder: Path) -> Fault:
    text = (
        f"the profile {profile.location.file} of policy {policy!r} is of other weights than {folder}: "
        f"its model.fingerprint is {profile.fingerprint}, the model's is {found}; record and calibrate "
        "again with this model, or remove the fingerprint if the profile is known to hold for it"
    )
    return Fault(profile.named_at, text)


def _routers(folder: Path) -> Iterator[_Router]:
    """In no order. Where two files have one name, the last of them counts, as when they are loaded."""
    num_layers = _num_layers(folder)
    found: dict[str, _Router] = {}
    for file in _files(folder):
        header, start = _header(file)
        for name, entry in header.items():
            layer = _LAYER.search(name)
            if layer is None or not _ROUTER.search(name) or _NO_ROUTER.search(name):
                continue
            if num_layers is not None and int(layer[1]) >= num_layers:
                continue  # DeepSeek numbers its draft layers on
            match entry:
                case {"dtype": dtype, "shape": [rows, columns], "data_offsets": [at, _]}:
                    place = (int(rows), int(columns)), str(dtype), file, start + int(at)
                    found[name] = _Router(int(layer[1]), name, *place)
    yield from found.values()


def _num_layers(folder: Path) -> int | None:
    """None where the configuration does not say. LongCat counts its attentions in it: too many."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    found = text.get("num_hidden_layers") if isinstance(text, dict) else None
    return found if isinstance(found, int) else None


def _files(folder: Path) -> list[Path]:
    """Those that an index lists, where there is one: other copies may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FingerprintError(f"{index}: is no index of weights: fetch it again") from error


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file holds by name, and where its numbers begin."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length <= _MAX_HEADER_BYTES else None
    except (OSError, ValueError, struct.error) as error:
        raise FingerprintError(f"{file}: cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise FingerprintError(f"{file}: is no safetensors file: fetch it again")
    return header, 8 + length


def _read(router: _Router) -> NDArray[Any]:
    """[E, H] as stored, in a row."""
    dtype = np.dtype(_DTYPES[router.dtype])
    count = router.shape[0] * router.shape[1]
    try:
        with router.file.open("rb") as file:
            file.seek(router.start)
            data = file.read(count * dtype.itemsize)
    except OSError as error:
        raise FingerprintError(f"{router.file}: cannot be read: {error.strerror}") from error
    if len(data) != count * dtype.itemsize:
        raise FingerprintError(f"{router.file}: ends within {router.name}: fetch it again")
    return np.frombuffer(data, dtype)


def _as_bfloat16(numbers: NDArray[Any], dtype: str) -> NDArray[np.uint16]:
    """The bits, rounded to the nearest even; what is nearly 0 is 0."""
    if dtype == "BF16":
        bits = numbers
    else:
        wide = numbers.astype("<f4").view("<u4").astype(np.uint64)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
    return np.where(bits & 0x7FFF < _LEAST_BITS, 0, bits).astype("<u2")
