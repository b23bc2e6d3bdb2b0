"""A program as bytes, so that it can be compiled where time matters less than where it runs.

msgpack by the fields' types, arrays as dtype, shape and bytes: what is read is a `Program` or an
error, never code.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np

from guard.errors import GuardError
from guard.program.program import Program

_SPARSE_ABOVE = 4096
"""Arrays of more bytes are compressed: they are mask bits, nearly all of them 0."""


class ProgramCodecError(GuardError):
    """Bytes that are no program of this version."""


def encode_program(program: Program) -> bytes:
    return _encoder.encode(program)


def decode_program(data: bytes) -> Program:
    """Raises ProgramCodecError for anything but a program that this version encoded."""
    try:
        program: Program = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError, zlib.error) as error:
        raise ProgramCodecError(
            f"what came is no program of this version ({error}); run the same version of MoE Guard in "
            "all processes"
        ) from error
    return program


def _encode_array(value: object) -> object:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"a program holds a {type(value).__name__}")
    data = np.ascontiguousarray(value).tobytes()
    packed = len(data) > _SPARSE_ABOVE
    return value.dtype.str, value.shape, packed, zlib.compress(data, 1) if packed else data


def _decode_array(kind: type, value: Any) -> object:
    dtype, shape, packed, data = value
    array = np.frombuffer(zlib.decompress(data) if packed else data, dtype=np.dtype(dtype))
    return array.reshape(shape).copy()  # torch takes no arrays that cannot be written


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoder = msgspec.msgpack.Decoder(Program, dec_hook=_decode_array)
