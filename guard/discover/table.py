"""What each prompt's tokens chose, from traces: the table that everything else here is computed from.

Letters: N prompts, P pairs of prompts, X experts of all layers in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard.discover.errors import DiscoverError
from guard.discover.same_token import SameToken, SameTokenSum
from guard.policy.model import Phase
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.program.topology import Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files

NO_PARTNER = "no partner of the other label"
"""Why a prompt does not count."""

LEAST_TOKENS = 4
"""Of a prompt with fewer tokens that count a rate says little: it is left out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tokens of which prompts are compared.

    label, pair, category: names of labels, as the prompts' file has them
    target, reference: the values of `label` that are compared; other prompts are left out
    phase: the positions that count
    first_tokens: of the output no more than so many from its beginning on; answers of different
        lengths differ in their routing by that alone
    is_paired: a prompt counts only together with one of the other label and the same `pair`; both are
        cut to the shorter output of the two
    """

    target: str
    reference: str
    label: str = "label"
    pair: str = "pair_id"
    category: str = "category"
    phase: Phase = Phase.OUTPUT
    first_tokens: int = 64
    is_paired: bool = True


@dataclass(frozen=True)
class PromptTable:
    """rates_NX: float32; of the prompt's tokens the share that chose the expert with weight
    masses_NX: float32; the gate weight that a token gave it, on average; None: the trace has no weights
    tokens_N: that count
    is_target_N: it has the label that is looked for, else the other one
    pairs_N, categories_N: "" where it has none; pairs_N also where pairs do not count
    groups_N: its pair, whether pairs count or not
    left_out: how many prompts do not count, by the reason
    same_token: None: the trace has no token ids
    """

    topology: Topology
    rates_NX: NDArray[np.float32]
    masses_NX: NDArray[np.float32] | None
    tokens_N: NDArray[np.int64]
    is_target_N: NDArray[np.bool_]
    pairs_N: tuple[str, ...]
    categories_N: tuple[str, ...]
    groups_N: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    same_token: SameToken | None = None

    @cached_property
    def experts_X(self) -> tuple[tuple[int, int], ...]:
        """(the model's own layer number, expert id) of each column."""
        return tuple(
            (layer.number, expert)
            for layer in self.topology.layers
            for expert in range(layer.num_experts)
        )

    @property
    def num_prompts(self) -> int:
        return len(self.tokens_N)

    def differences(self, values_NX: NDArray[np.float32]) -> NDArray[np.float64]:
        """[P, X]: of each pair its target prompts' mean less its reference prompts' mean."""
        sums: dict[str, list[NDArray[np.float64]]] = {}
        for pair in dict.fromkeys(self.pairs_N):
            own_N = np.array([other == pair for other in self.pairs_N])
            sides = [values_NX[own_N & (self.is_target_N == side)] for side in (True, False)]
            if all(map(len, sides)):
                sums[pair] = [side.mean(axis=0, dtype=np.float64) for side in sides]
        return np.stack([target - reference for target, reference in sums.values()])


def read_table(paths: Iterable[Path], choice: Choice) -> PromptTable:
    """Reads each trace twice: how long the answers are decides which of their tokens count.

    Raises DiscoverError, TraceError.
    """
    readers = [TraceReader(file) for path in paths for file in trace_files(path)]
    topology = _same_topology(readers)
    lengths, token_ids = [], []
    for reader in readers:
        for request in reader:
            lengths.append((request.labels, _num_tokens(request.routing, choice)))
            if request.token_ids is not None:
                token_ids.append(request.token_ids[_positions(request.routing, choice)])
    tokens, left_out = _tokens_that_count(lengths, choice)
    builder = _Builder(topology, with_masses=all(r.header.weights is not None for r in readers))
    if all(reader.header.tokens for reader in readers):
        builder.compare_same_tokens(lengths, token_ids, tokens, choice)
    requests = (request for reader in readers for request in reader)
    for request, num_tokens in zip(requests, tokens, strict=True):
        if num_tokens:
            builder.add(request, num_tokens, choice)
    return builder.table(choice, left_out)


def _same_topology(readers: Sequence[TraceReader]) -> Topology:
    first = readers[0].header.topology
    for reader in readers[1:]:
        if reader.header.topology != first:
            raise DiscoverError(
                f"{reader.path}: is of another model than {readers[0].path}; "
                "compare prompts of one model"
            )
    return first


def _positions(routing: Routing, choice: Choice) -> NDArray[np.int64]:
    """Those of the phase that were seen."""
    prompt, stop = routing.num_prompt_tokens, len(routing.topk_ids)
    first = prompt if choice.phase is Phase.OUTPUT else 0
    last = min(prompt, stop) if choice.phase is Phase.PROMPT else stop
    found = np.arange(max(first, routing.first_seen), last)
    if routing.unseen:
        found = found[[position not in routing.unseen for position in found.tolist()]]
    return found


def _num_tokens(routing: Routing, choice: Choice) -> int:
    num_tokens = len(_positions(routing, choice))
    return min(num_tokens, choice.first_tokens) if choice.phase is Phase.OUTPUT else num_tokens


def _tokens_that_count(
    lengths: Sequence[tuple[Mapping[str, str], int]], choice: Choice
) -> tuple[list[int], Counter[str]]:
    """Of each request, and how many have none, by the reason."""
    sides = {choice.target: True, choice.reference: False}
    left_out: Counter[str] = Counter()
    side_of = [sides.get(labels.get(choice.label, "")) for labels, _ in lengths]
    _check_labels(lengths, side_of, choice)
    shortest: dict[str, dict[bool, int]] = {}
    if choice.is_paired:
        for (labels, num_tokens), side in zip(lengths, side_of, strict=True):
            if side is not None and num_tokens >= LEAST_TOKENS and choice.pair in labels:
                of_pair = shortest.setdefault(labels[choice.pair], {})
                of_pair[side] = min(num_tokens, of_pair.get(side, num_tokens))
    tokens = []
    for (labels, num_tokens), side in zip(lengths, side_of, strict=True):
        of_pair = shortest.get(labels.get(choice.pair, ""), {})
        reason = ""
        if side is None:
            reason = f"{choice.label} is neither of the two"
        elif num_tokens < LEAST_TOKENS:
            reason = f"fewer than {LEAST_TOKENS} tokens"
        elif choice.is_paired and len(of_pair) < 2:
            reason = NO_PARTNER
        elif choice.is_paired and choice.phase is Phase.OUTPUT:
            num_tokens = min(of_pair.values())
        elif choice.phase is Phase.OUTPUT and num_tokens < choice.first_tokens:
            reason = f"an output of fewer than {choice.first_tokens} tokens"
        left_out[reason] += bool(reason)
        tokens.append(0 if reason else num_tokens)
    return tokens, +left_out


def _check_labels(
    lengths: Sequence[tuple[Mapping[str, str], int]], side_of: Sequence[bool | None], choice: Choice
) -> None:
    names = sorted({name for labels, _ in lengths for name in labels})
    if choice.label not in names:
        known = f"they have {one_of(names, 'and')}" if names else "they have none"
        hint = did_you_mean(choice.label, names) or f"; {known}"
        raise DiscoverError(f"no prompt has the label {quote(choice.label)}{hint}")
    values = sorted({labels[choice.label] for labels, _ in lengths if choice.label in labels})
    for side, value in ((True, choice.target), (False, choice.reference)):
        if side not in side_of:
            hint = did_you_mean(value, values) or f"; they have {one_of(values, 'and')}"
            raise DiscoverError(f"no prompt has {choice.label} {quote(value)}{hint}")
    if not choice.is_paired:
        return
    pairs: dict[str, set[bool]] = {}
    for (labels, _), own in zip(lengths, side_of, strict=True):
        if own is not None and choice.pair in labels:
            pairs.setdefault(labels[choice.pair], set()).add(own)
    if not any(len(sides) == 2 for sides in pairs.values()):
        raise DiscoverError(
            f"no two prompts of {quote(choice.target)} and {quote(choice.reference)} have the same "
            f"{quote(choice.pair)}: without pairs that match in topic, what differs is as likely the "
            "topic. Give the prompts pairs, or say --unpaired if you know better"
        )


class _Builder:
    def __init__(self, topology: Topology, *, with_masses: bool) -> None:
        self._topology = topology
        sizes = [layer.num_experts for layer in topology.layers]
        self._num_experts = sum(sizes)
        self._offset_L1 = np.concatenate([[0], np.cumsum(sizes)[:-1]])[:, None]
        self._with_masses = with_masses
        self._rates: list[NDArray[np.float32]] = []
        self._masses: list[NDArray[np.float32]] = []
        self._tokens: list[int] = []
        self._labels: list[Mapping[str, str]] = []
        self._same_token: SameTokenSum | None = None

    def compare_same_tokens(
        self,
        lengths: Sequence[tuple[Mapping[str, str], int]],
        token_ids: Sequence[NDArray[np.int32]],
        tokens: Sequence[int],
        choice: Choice,
    ) -> None:
        """token_ids, tokens: of each request, and how many of them count"""
        counted = [ids[:number] for ids, number in zip(token_ids, tokens, strict=True)]
        is_target = [labels.get(choice.label) == choice.target for labels, _ in lengths]
        self._same_token = SameTokenSum(counted, is_target, self._num_experts)

    def add(self, request: TracedRequest, num_tokens: int, choice: Choice) -> None:
        routing = request.routing
        positions = _positions(routing, choice)[:num_tokens]
        ids_TLK, weights_TLK = routing.topk_ids[positions], routing.topk_weights[positions]
        at_work_TLK = (ids_TLK >= 0) & (weights_TLK != 0)
        columns = (ids_TLK + self._offset_L1)[at_work_TLK]
        counts = np.bincount(columns, minlength=self._num_experts)
        self._rates.append((counts / num_tokens).astype(np.float32))
        if self._with_masses:
            masses = np.bincount(columns, weights_TLK[at_work_TLK], minlength=self._num_experts)
            self._masses.append((masses / num_tokens).astype(np.float32))
        if self._same_token is not None and request.token_ids is not None:
            is_target = request.labels[choice.label] == choice.target
            self._same_token.add(request.token_ids[positions], is_target, columns, at_work_TLK)
        self._tokens.append(num_tokens)
        self._labels.append(request.labels)

    def table(self, choice: Choice, left_out: Mapping[str, int]) -> PromptTable:
        if not self._tokens:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise DiscoverError(f"no prompt is left to compare: {reasons}")
        return PromptTable(
            self._topology,
            np.stack(self._rates),
            np.stack(self._masses) if self._with_masses else None,
            np.array(self._tokens, dtype=np.int64),
            np.array([labels[choice.label] == choice.target for labels in self._labels]),
            tuple(labels.get(choice.pair, "") if choice.is_paired else "" for labels in self._labels),
            tuple(labels.get(choice.category, "") for labels in self._labels),
            tuple(labels.get(choice.pair, "") for labels in self._labels),
            left_out,
            None if self._same_token is None else self._same_token.result(),
        )
