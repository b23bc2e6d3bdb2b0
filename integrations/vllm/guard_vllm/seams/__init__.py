"""What the plugin relies on in vLLM: the table of private names, which `compat` looks up for it.

To use another name of vLLM, add one line to the `SEAMS` of its subject here:

    Seam("vllm.v1.engine.core", "EngineCore.post_step", "sends events", leading=("model_executed",)),

and, where it was not in every supported version or the plugin does without it, `since="0.28"` or
`optional=True`. A class or module of which only attributes are read has them in `has=(...)`. Then
`make seams` checks it in the published versions and rewrites docs/vllm-versions.md.
"""

from __future__ import annotations

from guard_vllm.seams import engine_core, front_end, ranks, routers, start, steps
from guard_vllm.seams.seam import Seam

__all__ = ["SEAMS", "Seam"]

SEAMS: tuple[Seam, ...] = (
    *start.SEAMS,
    *steps.SEAMS,
    *engine_core.SEAMS,
    *routers.SEAMS,
    *ranks.SEAMS,
    *front_end.SEAMS,
)
