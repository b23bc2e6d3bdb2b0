"""What is valid but unwise: a finding has a place, a code that stays the same, and advice."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from guard.policy.fault import Location


class Level(StrEnum):
    """An error fails `moe-guard check`; a warning only with --strict."""

    ERROR = "error"
    WARNING = "warning"


class Code(StrEnum):
    """What a finding is about, for --ignore. Codes do not change; docs/policy-lint.md lists them."""

    NEVER_FIRES = "never-fires"
    ALWAYS_FIRES = "always-fires"
    CONSTANT_CONDITION = "constant-condition"
    UNRELEASED_MASK = "unreleased-mask"
    SELF_RELEASING_MASK = "self-releasing-mask"
    READS_MASKED = "reads-masked"
    FORCE_MASKED = "force-masked"
    SHADOWED_MASK = "shadowed-mask"
    DUPLICATE_RULE = "duplicate-rule"
    ENFORCES_NOTHING = "enforces-nothing"
    DEPRECATED_ENFORCED = "deprecated-enforced"
    UNTESTED = "untested"
    UNUSED_SET = "unused-set"
    EXPIRED_EXCEPTION = "expired-exception"
    EXPIRING_EXCEPTION = "expiring-exception"
    IDLE_EXCEPTION = "idle-exception"
    MODEL_MISMATCH = "model-mismatch"

    @property
    def level(self) -> Level:
        errors = (Code.EXPIRED_EXCEPTION, Code.MODEL_MISMATCH)
        return Level.ERROR if self in errors else Level.WARNING


class Finding(NamedTuple):
    """Sorts as its place in the file. `message` says what, why it matters and what to write instead."""

    location: Location
    code: Code
    message: str

    @property
    def level(self) -> Level:
        return self.code.level

    def __str__(self) -> str:
        return f"{self.location}: {self.level}: {self.message} [{self.code}]"
