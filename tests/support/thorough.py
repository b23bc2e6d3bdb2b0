"""What `make test-all` runs and `make test` leaves out: slow, of code that other tests run as well."""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "MOE_GUARD_TEST_ALL"
IS_THOROUGH: Final = os.environ.get(VARIABLE) == "1"

FAMILIES: Final = {
    "v2": ("Qwen3-MoE", "DeepSeek-V3", "gpt-oss", "Qwen3-Next"),
    "compiled": ("Qwen3-MoE",),
}
"""Router families that run in these places all the same; in others all do."""

LEFT_OUT: Final = (
    ("tests/integration/serving/test_lives.py", "[v2-lives"),
    ("tests/integration/workload/", "[v2"),
    ("tests/integration/offline/test_running_check.py", "[compiled"),
    ("tests/integration/offline/test_running_check.py", "[v2-pp2"),
    ("tests/integration/offline/test_running_check.py", "-v2-pp2]"),
)
"""(beginning, part) of tests' ids"""


def runs_family(place: str, name: str) -> bool:
    return IS_THOROUGH or name in FAMILIES.get(place, (name,))


def is_left_out(test_id: str) -> bool:
    return not IS_THOROUGH and any(
        test_id.startswith(beginning) and part in test_id for beginning, part in LEFT_OUT
    )
