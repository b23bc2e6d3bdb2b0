"""Where the policies of a server come from: at its start, in its workers, and while it runs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from guard.overrides.apply import apply_overrides
from guard.overrides.store import OverrideStore
from guard.policy import PolicySet, PolicyTexts, load_texts, read_policies
from guard.source.files import FileSource
from guard.source.remote import BundleAddress, BundleSource, fetch_at_start, is_url, kept
from guard.source.signature import PolicyKeys
from guard.source.source import Source
from guard_vllm.settings import Settings

FILE_SECONDS: Final = 1.0
URL_SECONDS: Final = 30.0


class Found(NamedTuple):
    """A policy set, and what to do once it is known to fit the model."""

    policies: PolicySet
    keep: Callable[[], None]


def find_policies(settings: Settings) -> Found:
    """In the process that starts a server, what its other processes are to load, too.

    Raises PolicyError, and OverrideError where the state folder cannot be used.
    """
    if multiprocessing.parent_process() is not None:  # the parent has found it
        return Found(load_in_worker(settings), keep=lambda: None)
    address, store = _address(settings), override_store(settings)
    texts, keep_source = _texts_at_start(settings, address)
    if store is None:
        return Found(load_texts(texts), keep_source)
    with store.locked():
        before = store.read()
        overrides = before.without_expired(time.time())
        policies = apply_overrides(load_texts(texts), overrides)
        if overrides is not before:
            store.write(overrides)

    def keep() -> None:
        keep_source()
        store.keep_texts(texts)

    return Found(policies, keep)


def texts_now(settings: Settings) -> tuple[PolicyTexts, Callable[[], None]]:
    """What lies where the policies come from (a bundle is fetched), and what to do once it is in force.

    Raises PolicyError: whoever asks for a reload is not told that the last one is as good.
    """
    address = _address(settings)
    if address is None:
        return read_policies(settings.policies), lambda: None
    source = BundleSource(address)
    texts = source.poll(force=True)
    assert texts is not None, "it was forced"
    return texts, source.keep


def _texts_at_start(
    settings: Settings, address: BundleAddress | None
) -> tuple[PolicyTexts, Callable[[], None]]:
    if address is None:
        return read_policies(settings.policies), lambda: None
    texts, source = fetch_at_start(address)
    return texts, source.keep


def override_store(settings: Settings) -> OverrideStore | None:
    """None where operators change nothing at run time."""
    return None if settings.state_dir is None else OverrideStore(Path(settings.state_dir))


def load_in_worker(settings: Settings) -> PolicySet:
    """What the process that started this one found.

    A bundle's texts are in a file, not in the settings: those are in vLLM's compile key, and another
    policy must not cost another compilation.

    Raises PolicyError, OverrideError.
    """
    address, store = _address(settings), override_store(settings)
    texts = read_policies(settings.policies) if address is None else kept(address)
    return load_texts(texts) if store is None else apply_overrides(load_texts(texts), store.read())


def source_to_watch(settings: Settings) -> Source | None:
    """None where a reload was ruled out, or a pinned digest leaves nothing to reload."""
    if not settings.reload:
        return None
    address = _address(settings)
    if address is None:
        return FileSource(settings.policies, seconds=settings.reload_seconds or FILE_SECONDS)
    if address.sha256 is not None:
        return None
    seconds = URL_SECONDS if address.is_remote else FILE_SECONDS
    source = BundleSource(address, seconds=settings.reload_seconds or seconds)
    source.resume()
    return source


def _address(settings: Settings) -> BundleAddress | None:
    """None where the policies lie in plain files.

    Raises PolicyError, PolicyKeyError.
    """
    keys = None if settings.policy_key is None else PolicyKeys.read(Path(settings.policy_key))
    if not is_url(settings.policies) and keys is None:
        return None
    url, pin = settings.policies, None
    if is_url(url):
        url, pin = BundleAddress.pinned(url)
    address = BundleAddress(
        url=url,
        sha256=settings.bundle_sha256 or pin,
        cache=None if settings.bundle_cache is None else Path(settings.bundle_cache),
        token_variable=settings.bundle_token_variable,
        allow_http=settings.bundle_allow_http,
        keys=keys,
        state=None if settings.state_dir is None else Path(settings.state_dir),
        allow_rollback=settings.allow_rollback,
    )
    address.check()
    return address
