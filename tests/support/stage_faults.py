"""Drills in an engine that is one process: for tests only.

vLLM mixes `StageFaults` into its worker class (`worker_extension_cls`), and a test reaches it with
`LLM.collective_rpc`.
"""

from __future__ import annotations

from guard import fault_injection


class StageFaults:
    """Methods of the worker. In one process the engine core and the front end have its drill, too."""

    def inject_faults(self, faults: str) -> None:
        """faults: as in MOE_GUARD_INJECT_FAULTS"""
        fault_injection.begin(fault_injection.parse_faults(faults))

    def end_drill(self) -> None:
        fault_injection.end()
