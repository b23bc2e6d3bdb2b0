"""What a user of `discover` and `calibrate` is told."""

from __future__ import annotations

from guard.errors import GuardError


class DiscoverError(GuardError):
    """Prompts or traces from which nothing can be concluded, with what to do instead."""
