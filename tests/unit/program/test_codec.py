"""Programs as bytes: the same program comes out, or an error that says what to do."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from guard.policy import load_policies, parse_policies
from guard.program.codec import ProgramCodecError, decode_program, encode_program
from guard.program.compile import compile_policies
from guard.program.configuration import topology_from_folder
from guard.program.program import Program
from tests.unit.device.driving import BLOCK, COUNT, MASK, TOPOLOGY, policy_text, rule_text

CHECKOUT = Path(__file__).parents[3]
LIBRARY = sorted((CHECKOUT / "policies").glob("*/policy.yaml"))


def assert_equal(one: object, other: object, path: str = "program") -> None:
    assert type(one) is type(other), path
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        assert one.dtype == other.dtype, path
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), path
        assert other.flags.writeable, path
    elif is_dataclass(one) and not isinstance(one, type):
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name), f"{path}.{field.name}")
    elif isinstance(one, tuple) and isinstance(other, tuple):
        assert len(one) == len(other), path
        for number, (mine, yours) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, yours, f"{path}[{number}]")
    else:
        assert one == other, path


def compiled(path: Path) -> Program:
    return compile_policies(load_policies(path), topology_from_folder(CHECKOUT / "demo" / "model"))


@pytest.mark.parametrize("path", LIBRARY, ids=[path.parent.name for path in LIBRARY])
def test_each_policy_of_the_library_comes_out_as_it_went_in(path: Path) -> None:
    program = compiled(path)
    assert_equal(program, decode_program(encode_program(program)))


def test_a_program_that_follows_another_keeps_its_place_behind_it() -> None:
    first = compile_policies(parse_policies(policy_text(rule_text(COUNT, MASK))), TOPOLOGY)
    second = compile_policies(parse_policies(policy_text(rule_text(COUNT, BLOCK))), TOPOLOGY, first)
    program = decode_program(encode_program(second))

    assert (program.generation, program.signals.epochs) == (1, second.signals.epochs)
    assert_equal(second, program)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\xff" * 9, msgspec.msgpack.encode({"revision": "r"})],
    ids=["nothing", "no fields", "no msgpack", "some fields"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ProgramCodecError, match="no program of this version"):
        decode_program(data)


def test_an_array_of_objects_is_refused() -> None:
    program = compile_policies(parse_policies(policy_text(rule_text(COUNT))), TOPOLOGY)
    fields_of = msgspec.msgpack.decode(encode_program(program))
    fields_of["signals"]["scale"] = ["|O", [1], False, b"\0" * 8]

    with pytest.raises(ProgramCodecError):
        decode_program(msgspec.msgpack.encode(fields_of))
