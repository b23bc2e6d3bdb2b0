"""What a profile says of a set that failed its causal check."""

from __future__ import annotations

FAILED_CHECK: dict[str, object] = {
    "passed": False,
    "method": "reroute",
    "texts": 60,
    "targetIncrease": 0.1,
    "targetInterval": [-0.1, 0.2],
    "randomIncreases": [0.1, 0.2],
    "ratio": 0.7,
    "ratioLow": 0.2,
    "referenceIncrease": 0.01,
    "referenceInterval": [0.0, 0.02],
}
