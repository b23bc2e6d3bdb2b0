"""A bundle is a policy set in an archive; an archive that holds anything else is refused whole."""

from __future__ import annotations

import gzip
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy import PolicyError, PolicyTexts, load_texts
from guard.source import bundle as bundles
from guard.source.bundle import read_bundle
from tests.unit.source.writing import PROFILE, Member, archive, bundle, member, policy

GOOD = member("policies/a.yaml", policy("a"))


def refusal(data: bytes) -> str:
    with pytest.raises(PolicyError) as caught:
        load_texts(read_bundle(data, "b.tar.gz"))
    return str(caught.value)


def names(texts: PolicyTexts) -> list[str]:
    return [loaded.name for loaded in load_texts(texts).policies]


def test_a_bundle_is_read_as_a_folder_is() -> None:
    data = archive(
        member("./policies", type=tarfile.DIRTYPE),
        member("./policies/a.yaml", policy("a", profile="../profiles/m.json")),
        member("policies/more/b.YML", policy("b")),
        member("profiles/m.json", PROFILE),
        member("policies/.hidden.yaml", "nonsense"),
        member("._policies/a.yaml", b"\x00\x05\x16\x07"),
        member("README.md", "read me"),
    )

    texts = read_bundle(data, "b.tar.gz")

    assert [text.file for text in texts.policies] == [
        "b.tar.gz/policies/a.yaml",
        "b.tar.gz/policies/more/b.YML",
    ]
    assert names(texts) == ["a", "b"]


def test_faults_in_a_bundle_name_the_file_in_it() -> None:
    assert refusal(bundle(a=policy().replace("rules", "rulez"))).startswith(
        "b.tar.gz/policies/a.yaml:6:3: "
    )


@pytest.mark.parametrize(
    "profile", ["../../m.json", "../../../../etc/hosts", "/etc/hosts", "m.txt", "none.json"]
)
def test_a_profile_that_the_bundle_does_not_hold_is_not_looked_for_elsewhere(profile: str) -> None:
    data = archive(
        member("policies/a.yaml", policy(profile=profile)), member("policies/m.txt", PROFILE)
    )
    assert "is no file of the bundle" in refusal(data)


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (member("/etc/a.yaml", policy("e")), "'/etc/a.yaml' points outside"),
        (member("policies/../../a.yaml", policy("e")), "points outside"),
        (member("policies\\..\\a.yaml", policy("e")), "points outside"),
        (member("policies/b\n.yaml", policy("e")), "cannot be shown"),
        (member("b.yaml", type=tarfile.SYMTYPE, linkname="/etc/hosts"), "no plain file"),
        (member("b.yaml", type=tarfile.LNKTYPE, linkname="policies/a.yaml"), "no plain file"),
        (member("b.yaml", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "no plain file"),
        (member("b.yaml", type=tarfile.BLKTYPE), "no plain file"),
        (member("b.yaml", type=tarfile.FIFOTYPE), "no plain file"),
        (member("folder/../b.yaml", policy("e")), "points outside"),
        (member("./policies/a.yaml", policy("e")), "'policies/a.yaml' twice"),
    ],
    ids=[
        *(
            "absolute",
            "above",
            "backslashes",
            "unprintable",
            "symlink",
            "hard link",
            "character device",
        ),
        *("block device", "pipe", "through a folder", "twice"),
    ],
)
def test_a_member_that_no_bundle_needs_refuses_the_bundle(evil: Member, message: str) -> None:
    assert message in refusal(archive(GOOD, evil))


def test_a_sparse_member_is_refused_before_it_grows() -> None:
    tall = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
    info, data = member("b.yaml", b"0\n".ljust(512, b"\0"))
    info.pax_headers = {**tall, "GNU.sparse.name": "b.yaml"}

    assert "no plain file" in refusal(archive(GOOD, (info, data)))


def test_a_bundle_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_UNPACKED_BYTES", 1 << 16)
    assert "unpacks to more than 65536 bytes" in refusal(gzip.compress(bytes(1 << 20)))


def test_a_bundle_is_measured_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_BUNDLE_BYTES", 100)
    assert "is larger than 100 bytes" in refusal(bytes(101))


def test_a_bundle_of_too_many_members_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_MEMBERS", 3)
    assert "more than 3 members" in refusal(archive(*(member(f"{n}.txt") for n in range(4))))


def test_a_file_in_it_that_is_too_large_or_no_text_is_a_fault_of_its_own() -> None:
    data = archive(member("a.yaml", b"#" * ((1 << 20) + 1)), member("b.yaml", b"\xff"))

    a, b = refusal(data).split("\n")
    assert a == "b.tar.gz/a.yaml: is larger than 1048576 bytes; split it"
    assert b.startswith("b.tar.gz/b.yaml:1:1: is not UTF-8")


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "with aliases written out" in refusal(bundle(bomb="\n".join(lines)))


GOOD_BUNDLE = archive(GOOD, member("policies/b.yaml", policy("b")))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        GOOD_BUNDLE[:-1],
        GOOD_BUNDLE[: len(GOOD_BUNDLE) // 2],
        GOOD_BUNDLE + b"more",
        gzip.compress(b"no archive"),
        gzip.compress(gzip.decompress(GOOD_BUNDLE)[:700]),
        gzip.compress(gzip.decompress(GOOD_BUNDLE).replace(b"policies/b.yaml", b"policies/c.yaml")),
    ],
    ids=[
        *("empty", "text", "one byte short", "half", "more behind it", "compressed text"),
        *("half a member", "damaged header"),
    ],
)
def test_what_is_no_whole_archive_is_refused(data: bytes) -> None:
    assert refusal(data).startswith("b.tar.gz: the bundle ")


def test_an_empty_bundle_is_an_empty_set() -> None:
    assert names(read_bundle(archive(), "b.tar.gz")) == []


PLAIN = gzip.decompress(
    archive(
        member("policies/a.yaml", policy("a", profile="../m.json")),
        member("m.json", PROFILE),
        (tarfile.TarInfo("x" * 150 + ".yaml"), b""),
    )
)


@given(
    st.lists(st.tuples(st.integers(0, len(PLAIN) - 1), st.integers(0, 255)), min_size=1, max_size=20),
    st.integers(0, len(PLAIN)),
)
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(
    changes: list[tuple[int, int]], end: int
) -> None:
    data = bytearray(PLAIN)
    for place, value in changes:
        data[place] = value
    for damaged in (data, data[:end]):
        try:
            load_texts(read_bundle(gzip.compress(bytes(damaged), 1), "b.tar.gz"))
        except PolicyError as error:
            if not str(error).startswith("b.tar.gz"):
                raise
