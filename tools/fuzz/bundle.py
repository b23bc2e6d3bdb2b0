"""Bundles: damaged archives, archives with members that no bundle needs, and signed ones from a file.

What is accepted is in force in a server; of a signed one a known key has signed just those bytes, and
no serial goes back. After a refusal the policies in force, the file that is kept and the serial are the
ones of before.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from guard.policy import PolicyError
from guard.source.bundle import MANIFEST, read_bundle
from guard.source.private_file import write_private
from guard.source.remote import BundleAddress, BundleSource
from guard.source.serial import SERIAL_FILE, Mark, Serials
from guard.source.signature import PAYLOAD_TYPE, PolicyKeys, sign
from tools.fuzz import policies
from tools.fuzz.mutation import JSON, mostly, mutated
from tools.fuzz.part import Part, Parts
from tools.fuzz.policy_server import PolicyServer

NAME: Final = "bundle.tar.gz"
SERIAL: Final = 5
"""Of the bundle that is in force."""

_OWN: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_OTHER: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
_KEYS: Final = PolicyKeys((_OWN.public_key(),))


Layout = Literal[0, 1, 2]
"""Of tarfile's."""


class Member(NamedTuple):
    """size: what its header says in the place of the truth; pax: what its extended header says"""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    size: int | None = None
    pax: tuple[tuple[str, str], ...] = ()


_TEXTS: Final = tuple(text.encode() for text in policies.DOCUMENTS)
_GOOD: Final = tuple(
    Member(f"policies/{name}", text) for name, text in zip(policies.FILES, _TEXTS, strict=True)
)


_OTHER_GOOD: Final = tuple(
    Member(
        f"policies/{name}.yaml",
        f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n"
        "  rules: [{name: r, when: always, then: {block: {}}}]\n".encode(),
    )
    for name in ("q", "r")
)
"""Another set with each of them."""


def archive(members: Sequence[Member], layout: Layout = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive, whatever its members say of themselves."""
    stream = io.BytesIO()
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.type, info.linkname = member.kind, member.link
        info.size = len(member.content) if member.size is None else member.size
        info.pax_headers = dict(member.pax)
        padding = b"\0" * (-len(member.content) % tarfile.BLOCKSIZE)
        stream.write(info.tobuf(layout, errors="surrogateescape") + member.content + padding)
    return stream.getvalue() + b"\0" * (2 * tarfile.BLOCKSIZE)


def manifest(serial: object) -> Member:
    return Member(MANIFEST, json.dumps({"serial": serial}).encode())


_NAMES: Final = st.one_of(
    st.sampled_from(
        [
            *(
                "p.yaml",
                "policies/p.yaml",
                "a/b.yml",
                "m.json",
                "policies/m.json",
                "readme.md",
                MANIFEST,
            ),
            *("../p.yaml", "/etc/p.yaml", "a/../../p.yaml", "a\\..\\p.yaml", "./p.yaml", "a//p.yaml"),
            *(".git/p.yaml", "p.yaml/x.yaml", "x" * 300 + ".yaml", "é.yaml", "\udcff.yaml", "a\n.yaml"),
            *("", ".", "..", "/", "a/", "\x1b[2J.yaml", "\u202e.yaml", "P.YAML", "con.yaml"),
        ]
    ),
    st.text(max_size=6),
)
_KINDS: Final = st.sampled_from(
    [
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
        *(tarfile.DIRTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
        tarfile.REGTYPE,
    ]
)
_SIZES: Final = st.one_of(
    st.none(), st.sampled_from([0, 1, 511, 512, 513, 1 << 20, 1 << 33, (1 << 63) - 1, 1 << 70, -1])
)
_PAX: Final = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("path", "linkpath", "size", "mtime", "uid", "GNU.sparse.map", "GNU.sparse.major"),
                *(
                    "GNU.sparse.size",
                    "GNU.sparse.minor",
                    "GNU.sparse.name",
                    "hdrcharset",
                    "comment",
                    "",
                ),
            ]
        ),
        st.sampled_from(
            ["0", "1", "-1", "../x.yaml", "1e9", "9" * 30, "nan", "0,1,2", "BINARY", "", "\0"]
        ),
    ),
    max_size=2,
).map(tuple)
_CONTENTS: Final = st.one_of(
    mutated(_TEXTS, most=1), st.sampled_from([b"", b"\xff", b"{}", b"a: 1", b"\x1f\x8b"])
)
_HOSTILE: Final = st.builds(Member, _NAMES, _CONTENTS, _KINDS, _NAMES, _SIZES, _PAX)
_MEMBERS: Final = st.one_of(st.sampled_from(_GOOD), st.builds(Member, _NAMES, _CONTENTS), _HOSTILE)
_LAYOUTS: Final[st.SearchStrategy[Layout]] = st.sampled_from(
    [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)


def _archived(members: Sequence[Member], layout: Layout) -> bytes:
    try:
        return gzip.compress(archive(members, layout), mtime=0)
    except (ValueError, OverflowError):  # what the layout cannot say
        return gzip.compress(archive(_GOOD), mtime=0)


_BUILT: Final = st.builds(_archived, st.lists(_MEMBERS, max_size=4), _LAYOUTS)
_TARS: Final = (archive(_GOOD), archive(_GOOD, tarfile.GNU_FORMAT), archive((*_GOOD, manifest(7))))


class Signed(NamedTuple):
    """keys: of those who sign, one after the other
    more: what else the envelope says
    """

    payload: bytes
    keys: tuple[Ed25519PrivateKey, ...]
    kind: object
    more: dict[str, Any]

    def content(self) -> bytes:
        envelopes = [json.loads(sign(self.payload, key)) for key in self.keys]
        envelope = {
            "payloadType": self.kind,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": [one for each in envelopes for one in each["signatures"]],
        }
        return json.dumps(envelope | self.more).encode()


_SERIALS: Final = mostly(st.integers(SERIAL - 1, SERIAL + 3), JSON)
_PAYLOADS: Final = st.one_of(
    st.builds(
        lambda serial, more: gzip.compress(archive([manifest(serial), *_GOOD, *more]), mtime=0),
        _SERIALS,
        st.one_of(
            st.lists(st.sampled_from(_OTHER_GOOD), max_size=1),
            st.lists(st.builds(Member, st.sampled_from(["x.yaml", "y.md"]), _CONTENTS), max_size=1),
        ),
    ),
    _BUILT,
)
_SIGNED: Final = st.builds(
    Signed,
    _PAYLOADS,
    mostly(st.just((_OWN,)), st.lists(st.sampled_from([_OWN, _OTHER]), max_size=20).map(tuple)),
    mostly(st.just(PAYLOAD_TYPE), JSON),
    mostly(
        st.just({}),
        st.dictionaries(
            st.sampled_from(["payload", "signatures", "payloadType", "keyid", "x"]),
            st.one_of(JSON, st.lists(st.fixed_dictionaries({"sig": JSON, "keyid": JSON}), max_size=2)),
            max_size=2,
        ),
    ),
)


def parts(folder: Path) -> Parts:
    server = PolicyServer(policies.texts_of(*policies.DOCUMENTS))

    def read(content: bytes) -> None:
        texts = []

        def opened() -> Any:
            texts.append(read_bundle(content, NAME))
            return texts[-1]

        try:
            server.take(opened)
        except PolicyError as error:
            _check_places(error)
            raise
        for text in (*texts[0].policies, *texts[0].profiles):
            assert text.file.startswith(f"{NAME}/")
            assert ".." not in text.file.split("/")

    publisher = _Publisher(folder, server)
    signed = st.one_of(_SIGNED.map(Signed.content), mutated([publisher.good], [b'"sig"'], most=2))
    refused = (PolicyError,)
    return {
        "damaged": Part(
            mutated([gzip.compress(one, mtime=0) for one in _TARS]), read, refused, server.state
        ),
        "damaged inside": Part(
            mutated(_TARS, [b"ustar\x0000", b"../"]).map(lambda one: gzip.compress(one, 1, mtime=0)),
            read,
            refused,
            server.state,
        ),
        "built": Part(_BUILT, read, refused, server.state),
        "signed": Part(signed, publisher.read, refused, publisher.state),
    }


class _Publisher:
    """Puts a file where a server looks for a signed bundle."""

    def __init__(self, folder: Path, server: PolicyServer) -> None:
        self._server = server
        self._state, cache = folder / "state", folder / "cache"
        self._file = folder / "bundle.json"
        self._address = BundleAddress(url=str(self._file), keys=_KEYS, cache=cache, state=self._state)
        payload = gzip.compress(archive([manifest(SERIAL), *_GOOD]), mtime=0)
        self.good = sign(payload, _OWN)
        self._mark = Mark.of(SERIAL, payload)
        self._begin()

    def state(self) -> object:
        return self._server.state(), self._kept(), (self._state / SERIAL_FILE).read_bytes()

    def _kept(self) -> bytes:
        return self._address.kept_file.read_bytes()

    def _begin(self) -> None:
        """Serial 5 is in force."""
        kept = self._address.kept_file
        if not kept.exists() or kept.read_bytes() != self.good:
            write_private(kept, self.good, "")
            Serials(self._state, allow_rollback=True).note(self._mark, "")

    def read(self, content: bytes) -> None:
        self._file.write_bytes(content)
        try:
            self._server.take_from(BundleSource(self._address))
        except PolicyError as error:
            _check_places(error)
            raise
        payload = base64.b64decode(json.loads(content)["payload"])
        signatures = [base64.b64decode(one["sig"]) for one in json.loads(content)["signatures"]]
        assert json.loads(sign(payload, _OWN))["signatures"][0]["sig"] in [
            base64.b64encode(one).decode() for one in signatures
        ], "none of the known keys signed it"
        mark = json.loads((self._state / SERIAL_FILE).read_bytes())
        assert mark["serial"] >= SERIAL
        self._begin()


def _check_places(error: PolicyError) -> None:
    assert error.faults
    for fault in error.faults:
        assert fault.message.strip(), fault
        str(fault).encode()
