"""A recorder in an engine of several ranks, with faults on one of them alone: for tests only."""

from __future__ import annotations

import os
import signal
import threading

from guard import fault_injection
from tests.support.routing_recorder import RoutingRecorder

_ANSWERED_S = 0.5


class RankedRecorder(RoutingRecorder):
    """vLLM mixes this into its worker class, where `rank` is the worker's own."""

    rank: int

    def fail_next_evaluation(self, rank: int) -> None:
        """The guard of one rank meets a fault in its next step, and none later."""
        if self.rank == rank:
            fault_injection.begin(fault_injection.parse_faults("evaluate@1"))

    def end_rank(self, rank: int) -> None:
        """The process of one rank is killed, once this call has been answered."""
        if self.rank == rank:
            threading.Timer(_ANSWERED_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
