"""What the running check found in one step, while it is on the device or between ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.program.step_report import Finding


class CheckFindings(NamedTuple):
    """`RoutingCheck`'s arrays while they are on the device."""

    findings_LF: torch.Tensor
    silent_L: torch.Tensor
    findings_BF: torch.Tensor
    violations_L: torch.Tensor
    violations_BA: torch.Tensor


class FindingsForm:
    """Findings as one row of whole numbers, as ranks pass them on.

    Numbers of layers come first, then those of one request after the other: what B requests found
    begins as what more requests would.

    Ranks that route the same rows take the greater of two numbers; ranks that route other layers of
    the same rows take the sum. So what several see is counted once.
    """

    def __init__(self, num_layers: int, num_actions: int) -> None:
        self._num_layers = num_layers
        self._num_actions = num_actions

    def size(self, num_requests: int) -> int:
        return self._num_layers * _LAYER_NUMBERS + num_requests * (Finding.NUM + self._num_actions)

    def pack(self, findings: CheckFindings) -> torch.Tensor:
        """int64 [size(B)]."""
        by_layer = [
            findings.findings_LF,
            findings.silent_L[:, None].to(torch.int64),
            findings.violations_L[:, None],
        ]
        by_request = [findings.findings_BF, findings.violations_BA]
        return torch.cat([torch.cat(by_layer, dim=1).flatten(), torch.cat(by_request, dim=1).flatten()])

    def unpack(self, numbers: torch.Tensor, num_requests: int) -> CheckFindings:
        """numbers: int64 [size(num_requests) or more]"""
        end_of_layers = self._num_layers * _LAYER_NUMBERS
        by_layer_LX = numbers[:end_of_layers].view(self._num_layers, _LAYER_NUMBERS)
        by_request_BX = numbers[end_of_layers : self.size(num_requests)].view(
            num_requests, Finding.NUM + self._num_actions
        )
        return CheckFindings(
            findings_LF=by_layer_LX[:, : Finding.NUM],
            silent_L=by_layer_LX[:, Finding.NUM].ne(0),
            findings_BF=by_request_BX[:, : Finding.NUM],
            violations_L=by_layer_LX[:, Finding.NUM + 1],
            violations_BA=by_request_BX[:, Finding.NUM :],
        )


_LAYER_NUMBERS = Finding.NUM + 2
