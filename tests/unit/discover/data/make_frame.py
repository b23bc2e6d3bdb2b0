"""Made `steermoe_like.pkl`, a table as SteerMoE's: run by hand, with pandas 2.3."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FRAME = pd.DataFrame(
    {
        "layer": [12, 12, 3],
        "expert": [85, 4, 7],
        "a1": [48824, 10, 500],
        "d1": [15764, 64578, 64088],
        "a1_n": [0.7559, 0.1, 0.2],
        "a2_n": [0.0293, 0.5, 0.1],
        "risk_diff": [0.7266, -0.4, 0.1],
        "task": ["safety", "safety", "safety"],
    }
)

if __name__ == "__main__":
    FRAME.to_pickle(Path(__file__).with_name("steermoe_like.pkl"))
