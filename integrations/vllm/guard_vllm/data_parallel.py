"""Data parallelism: a layer may route all engines' rows together, so masks travel with the rows."""

from __future__ import annotations

from typing import Any

import torch

from guard.device.mask import ExpertMask, MaskedExperts
from guard.errors import UnsupportedHostError
from guard_vllm.compat import seam
from guard_vllm.steps import wrap


class RoutedRows:
    """The rows that one layer's router sees: those of this engine's step, or of all engines' steps,
    by rank, each with the padding of its own.

    own: this engine's among them
    are_all_own: no other engine's rows ever are among them
    """

    def __init__(self, mask: ExpertMask | None) -> None:
        self.own = slice(None)
        self.are_all_own = True
        self._mask = mask
        self._gathered_bits_TX: torch.Tensor | None = None

    def wanted(self, layer: int, num_rows: int) -> MaskedExperts:
        """What masks in force ask of them."""
        assert self._mask is not None, "nothing is masked"
        if self._gathered_bits_TX is not None:
            return self._mask.wanted_of_all(layer, self._gathered_bits_TX)
        return self._mask.wanted(layer, self._mask.row_bits_TW[:num_rows])

    def follow(self, runner: Any) -> None:
        """Send this engine's masks wherever the layer sends its rows to be routed."""
        self.are_all_own = False
        shared = None if self._mask is None else self._mask.share()
        group = seam("vllm.distributed.parallel_state", "get_ep_group")()
        dispatch_router_logits = seam(group, "dispatch_router_logits")
        get_forward_context = seam("vllm.forward_context", "get_forward_context")
        rank = seam("vllm.distributed.parallel_state", "get_dp_group")().rank_in_group

        def dispatch(stock: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
            self.own, self._gathered_bits_TX = slice(None), None
            if not runner.do_naive_dispatch_combine:  # its kernel exchanges rows that are routed
                return stock(hidden_states, router_logits)
            self.own = _own_rows(get_forward_context(), rank)
            if self._mask is None or shared is None:
                return stock(hidden_states, router_logits)
            bits_TX = shared.sent(self._mask.row_bits_TW[: len(hidden_states)])
            hidden_states, router_logits, (self._gathered_bits_TX,) = dispatch_router_logits(
                hidden_states, router_logits, extra_tensors=[bits_TX]
            )
            return hidden_states, router_logits

        wrap(runner, "_maybe_dispatch", dispatch)


def routed_rows(runner: Any | None, mask: ExpertMask | None) -> RoutedRows:
    """runner: the layer's, if it has one. Of one engine alone it stays as it is.

    Raises UnsupportedHostError for a layer that routes a part of a step's rows on each rank.
    """
    rows = RoutedRows(mask)
    if runner is None:
        return rows
    if runner.moe_config.is_sequence_parallel:
        raise UnsupportedHostError(
            f"layer {runner.layer_name} splits a step's rows over the tensor-parallel ranks "
            "(sequence-parallel experts), which is not supported yet; set --tensor-parallel-size 1"
        )
    if int(runner.moe_config.dp_size) > 1:
        rows.follow(runner)
    return rows


def _own_rows(context: Any, rank: int) -> slice:
    """Numbers of the host: where a CUDA graph keeps them, vLLM pads all engines' rows to one count."""
    sizes = context.dp_metadata.get_chunk_sizes_across_dp_rank()
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])
