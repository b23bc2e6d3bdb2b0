"""Where the policies of a server come from: at its start, in its workers, and while it runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from guard.policy import PolicySet, load_policies, load_texts
from guard.source.files import FileSource
from guard.source.remote import BundleAddress, BundleSource, fetch_at_start, is_url, kept
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

    Raises PolicyError.
    """
    address = _address(settings)
    if address is None or multiprocessing.parent_process() is not None:  # the parent has found it
        return Found(load_in_worker(settings), keep=lambda: None)
    texts, source = fetch_at_start(address)
    return Found(load_texts(texts), source.keep)


def load_in_worker(settings: Settings) -> PolicySet:
    """What the process that started this one found.

    A bundle's texts are in a file, not in the settings: those are in vLLM's compile key, and another
    policy must not cost another compilation.

    Raises PolicyError.
    """
    address = _address(settings)
    return load_policies(settings.policies) if address is None else load_texts(kept(address))


def source_to_watch(settings: Settings) -> Source | None:
    """None where a reload was ruled out, or a pinned digest leaves nothing to reload."""
    if not settings.reload or settings.bundle_sha256 is not None:
        return None
    address = _address(settings)
    if address is None:
        return FileSource(settings.policies, seconds=settings.reload_seconds or FILE_SECONDS)
    return BundleSource(address, seconds=settings.reload_seconds or URL_SECONDS)


def _address(settings: Settings) -> BundleAddress | None:
    if not is_url(settings.policies):
        return None
    address = BundleAddress(
        url=settings.policies,
        sha256=settings.bundle_sha256,
        cache=None if settings.bundle_cache is None else Path(settings.bundle_cache),
        token_variable=settings.bundle_token_variable,
        allow_http=settings.bundle_allow_http,
    )
    address.check()
    return address
