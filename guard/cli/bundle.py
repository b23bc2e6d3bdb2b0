"""`moe-guard bundle`: build a policy set into one file, sign it, and see who signed one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import fail, out
from guard.errors import GuardError
from guard.policy import load_texts
from guard.source.building import build_bundle
from guard.source.bundle import MAX_SERIAL, read_numbered_bundle
from guard.source.local import read_local
from guard.source.signature import (
    MAX_SIGNED_BYTES,
    PolicyKeys,
    key_id,
    read_private_key,
    sign,
    write_new_keys,
)

bundle = typer.Typer(
    name="bundle",
    help="Make a policy set one file, signed, for servers that take it from a URL.",
    no_args_is_help=True,
)


@bundle.command()
def build(
    folder: Annotated[Path, typer.Argument(help="The folder of policies, with their profiles in it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    serial: Annotated[
        int,
        typer.Option(
            min=1, max=MAX_SERIAL, help="Greater than that of every bundle that was published before."
        ),
    ],
    key: Annotated[
        Path | None, typer.Option("--sign", help="The private key; without it FILE.sha256 is written.")
    ] = None,
) -> None:
    """Check the policies in FOLDER as a server would, and write them into one file."""
    try:
        payload = build_bundle(folder, serial)
        if key is None:
            content, by = payload, "unsigned"
            digest = hashlib.sha256(content).hexdigest()
            _write(output.with_name(output.name + ".sha256"), f"{digest}  {output.name}\n".encode())
        else:
            private = read_private_key(key)
            content, by = sign(payload, private), f"signed by {key_id(private.public_key())}"
        _write(output, content)
    except GuardError as error:
        fail(error)
    _say(f"{output}: serial {serial}, {by}, sha256 {hashlib.sha256(content).hexdigest()}")


@bundle.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A signed bundle.")],
    policy_key: Annotated[Path, typer.Option(help="The public keys that a server would be given.")],
) -> None:
    """Say whether a server with these keys would take a bundle; exits with 1 where not."""
    try:
        keys = PolicyKeys.read(policy_key)
        content = read_local(file, max_bytes=MAX_SIGNED_BYTES).content or b""
        opened = read_numbered_bundle(keys.payload(content, str(file)), file.name)
        policies = load_texts(opened.texts)
    except GuardError as error:
        fail(error)
    count, revision = len(policies.policies), policies.revision
    _say(f"{file}: signed, serial {opened.serial}, revision {revision}, {count} policies")


@bundle.command("key")
def new_key(
    file: Annotated[Path, typer.Argument(help="The private key to make; the public one is FILE.pub.")],
) -> None:
    """Make a pair of keys. The private one signs bundles and belongs on no server."""
    try:
        public, identity = write_new_keys(file)
    except GuardError as error:
        fail(error)
    _say(f"{file}: keep it secret; {public}: for --policy-key; id {identity}")


def _write(path: Path, content: bytes) -> None:
    """Whole, so that a server that looks meanwhile sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)
