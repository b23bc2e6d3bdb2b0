"""Errors that a user of MoE Guard can mend. Anything else that is raised is a bug of ours."""

from __future__ import annotations


class GuardError(ValueError):
    """What is wrong, where, and what to do instead. Every error meant for users derives from it."""


class UnsupportedHostError(GuardError):
    """The engine, the model or a setting of theirs is one that the guard cannot watch truthfully."""


class ReloadRefusedError(GuardError):
    """A policy set cannot take effect in a server as it runs; the one before stays in force."""


class NotLiveError(GuardError):
    """The start-up proof failed: a layer does not report, or a masked expert is still used."""
