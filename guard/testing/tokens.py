"""Segments of a case -> routing: what they say is met exactly, and spread evenly."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.policy.model import Baselines, Expert
from guard.program.topology import Topology
from guard.program.verdict import Routing
from guard.testing.experts import SuiteError, Words
from guard.testing.schema import BASELINE, SegmentSpec, UseSpec

MAX_DENOMINATOR: Final = 1 << 20
"""Of a share of gate weight: then the weights that show it are exact in float32."""
FINEST_WEIGHT: Final = 512
"""The smallest part of 1 in gate weights that meet a share exactly: it is whole in the nine decimals of
the evidence's fixed point. Where that is too coarse, the weights add up to more than 1."""

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]
_Token = list[list[int]]  # by layer, the experts chosen on purpose


class Tokens(NamedTuple):
    """topk_ids, topk_weights: [tokens, L, K], as in `Routing`."""

    topk_ids: Ids
    topk_weights: Weights
    seen: bool = True


class TokenMaker:
    """Makes the tokens of segments, the same ones each time."""

    def __init__(self, topology: Topology, words: Words, baselines: Baselines | None) -> None:
        self.topology = topology
        self._words = words
        self._baselines = baselines

    def make(self, segment: SegmentSpec) -> Tokens:
        """Raises SuiteError."""
        num_layers = len(self.topology.layers)
        gate_weights: dict[int, dict[int, float]] = {}
        shares: dict[int, Fraction] = {}
        avoided: Collection[Expert] = ()
        rest = segment.rest
        if segment.experts is not None or segment.weights is not None:
            chosen, gate_weights = self._listed(segment)
            tokens: list[_Token] = [chosen] * segment.tokens
        elif segment.use is None or segment.use.is_quiet:
            tokens = [[[]] * num_layers] * segment.tokens
        elif segment.use.is_baseline:
            tokens, rest = [[[]] * num_layers] * segment.tokens, "baseline"
        else:
            avoided = experts = self._experts(segment.use)
            if segment.mass is not None:
                tokens, shares = self._by_mass(experts, segment.tokens, Fraction(str(segment.mass)))
            else:
                tokens = self.spread(experts, self._per_token(experts, segment))
        return self.fill(tokens, avoided, rest, gate_weights, shares)._replace(seen=segment.seen)

    def spread(self, experts: Collection[Expert], per_token: Sequence[int]) -> list[_Token]:
        """Tokens of which each chooses so many of the experts, all of them in turn.

        Raises SuiteError where a token cannot choose so many, or so few.
        """
        fewest, most = self.bounds(experts)
        queue = deque(self._in_turn(experts))
        room = {layer.number: layer.top_k for layer in self.topology.layers}
        index_of = self.topology.index_of_layer
        tokens = []
        for number in per_token:
            if not fewest <= number <= most:
                text = (
                    f"a token can choose from {fewest} to {most} of these {len(experts)} experts, "
                    f"and would have to choose {number}"
                )
                raise SuiteError("", text)
            token: _Token = [[] for _ in self.topology.layers]
            needed = self._needed(experts)
            skipped: list[Expert] = []
            left = number
            while left:
                expert = queue.popleft()
                of_layer = token[index_of[expert.layer]]
                still_needed = sum(needed.values())
                is_needed = needed[expert.layer] > 0
                if len(of_layer) < room[expert.layer] and (is_needed or left > still_needed):
                    of_layer.append(expert.id)
                    needed[expert.layer] -= is_needed
                    queue.append(expert)
                    left -= 1
                else:
                    skipped.append(expert)

            queue.extendleft(reversed(skipped))
            tokens.append(token)
        return tokens

    def bounds(self, experts: Collection[Expert]) -> tuple[int, int]:
        """The fewest and the most of the experts that one token can choose."""
        by_layer = self._by_layer(experts)
        most = sum(
            min(layer.top_k, len(by_layer.get(layer.number, ()))) for layer in self.topology.layers
        )
        return sum(self._needed(experts).values()), most

    def fill(
        self,
        tokens: Sequence[_Token],
        avoided: Collection[Expert] = (),
        rest: str = "quiet",
        gate_weights: dict[int, dict[int, float]] | None = None,
        shares: dict[int, Fraction] | None = None,
    ) -> Tokens:
        """Fill each layer's top-k with experts that no rule reads, or by the baselines.

        avoided: never taken to fill
        gate_weights: by row of a layer, those of the chosen experts; others share what is left to 1
        shares: by row of a layer, the share of the gate weight that the one chosen expert has
        """
        topology = self.topology
        shape = (len(tokens), len(topology.layers), topology.max_top_k)
        topk_ids, topk_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for index, layer in enumerate(topology.layers):
            out_of_bounds = {expert.id for expert in avoided if expert.layer == layer.number}
            filler: _Quiet | _Baseline
            if rest == BASELINE:
                filler = _Baseline(self._rates(layer.number), out_of_bounds)
            else:
                filler = _Quiet(
                    [id_ for id_ in self._words.quiet[index] if id_ not in out_of_bounds],
                    [id_ for id_ in self._words.read[index] if id_ not in out_of_bounds],
                )
                if not any(token[index] for token in tokens):
                    topk_ids[:, index, : layer.top_k] = filler.rows(len(tokens), layer.top_k)
                    topk_weights[:, index, : layer.top_k] = 1 / layer.top_k
                    continue
            given = (gate_weights or {}).get(index)
            share = (shares or {}).get(index)
            for row, token in enumerate(tokens):
                chosen = token[index]
                filled = filler.take(layer.top_k - len(chosen), chosen)
                topk_ids[row, index, : layer.top_k] = [*chosen, *filled]
                topk_weights[row, index, : layer.top_k] = _weights(chosen, len(filled), given, share)
        return Tokens(topk_ids, topk_weights)

    def _experts(self, use: UseSpec) -> list[Expert]:
        try:
            experts = self._words.experts(use)
        except SuiteError as error:
            raise SuiteError("use", error.text) from error
        return self.fitting(experts, "use")

    def fitting(self, experts: Iterable[Expert], key: str = "") -> list[Expert]:
        """The experts in order. Raises SuiteError where the model lacks one."""
        num_experts = {layer.number: layer.num_experts for layer in self.topology.layers}
        for expert in sorted(experts):
            if expert.id >= num_experts.get(expert.layer, 0):
                text = f"the model has no expert {expert.id} in a MoE layer {expert.layer}"
                raise SuiteError(key, text)
        return sorted(experts)

    def with_share(self, experts: Collection[Expert], tokens: int, share: Fraction) -> Tokens:
        """Tokens of which each has so much of its gate weight, in the experts' layers, on them."""
        chosen, shares = self._by_mass(experts, tokens, share)
        return self.fill(chosen, experts, shares=shares)

    def _per_token(self, experts: Collection[Expert], segment: SegmentSpec) -> list[int]:
        """How many of the experts each token chooses."""
        fewest, most = self.bounds(experts)
        tokens, key = segment.tokens, "rate" if segment.selections is None else "selections"
        if segment.selections is not None:
            total = Fraction(segment.selections)
        elif segment.rate is not None:
            total = Fraction(str(segment.rate)) * tokens * len(experts)
        else:
            total = Fraction(most * tokens)
        of_all = tokens * len(experts)
        if not fewest * tokens <= total <= most * tokens:
            span = [float(fewest * tokens), float(most * tokens)]
            if key == "rate":
                span = [bound / of_all for bound in span]
            text = f"{tokens} tokens can use these experts with {key} from {span[0]:g} to {span[1]:g}"
            raise SuiteError(key, text)
        if total.denominator != 1:
            below, above = (float(Fraction(n, of_all)) for n in (math.floor(total), math.ceil(total)))
            text = (
                f"{tokens} tokens and {len(experts)} experts meet no rate of {segment.rate!r} exactly, "
                f"but {below!r} and {above!r}; take one of them, or another number of tokens"
            )
            raise SuiteError(key, text)
        return even(int(total), tokens)

    def _by_mass(
        self, experts: Collection[Expert], tokens: int, share: Fraction
    ) -> tuple[list[_Token], dict[int, Fraction]]:
        by_layer = self._by_layer(experts)
        chosen, shares = [], {}
        for index, layer in enumerate(self.topology.layers):
            ids = by_layer.get(layer.number, [])
            if ids and layer.top_k == 1 and share != 1:
                text = f"layer {layer.number} chooses one expert a token: its mass is all or nothing"
                raise SuiteError("mass", text)
            if ids and share.denominator > MAX_DENOMINATOR:
                raise SuiteError("mass", f"{float(share)!r} has too many digits; give at most six")
            if ids:
                shares[index] = share
        for number in range(tokens):
            token: _Token = [[] for _ in self.topology.layers]
            for index, layer in enumerate(self.topology.layers):
                if of_layer := by_layer.get(layer.number):
                    token[index] = [of_layer[number % len(of_layer)]]
            chosen.append(token)
        return chosen, shares

    def _listed(self, segment: SegmentSpec) -> tuple[_Token, dict[int, dict[int, float]]]:
        token: _Token = [[] for _ in self.topology.layers]
        gate_weights: dict[int, dict[int, float]] = {}
        listed = {
            number: [id_ for ids in ranges for id_ in ids]
            for number, ranges in (segment.experts or {}).items()
        }
        for number, weights in (segment.weights or {}).items():
            if number in listed:
                raise SuiteError("weights", f"layer {number} has experts and weights; keep the weights")
            listed[number] = list(weights)
        index_of = self.topology.index_of_layer
        for number, ids in listed.items():
            key = "experts" if number in (segment.experts or {}) else "weights"
            if number not in index_of:
                known = ", ".join(map(str, list(index_of)[:12]))
                raise SuiteError(key, f"the model has no MoE layer {number}; its layers are {known}")
            layer = self.topology.layers[index_of[number]]
            if len(set(ids)) != len(ids):
                raise SuiteError(key, f"an expert of layer {number} is listed twice")
            if len(ids) > layer.top_k:
                text = f"{len(ids)} experts in layer {number}, where a token chooses {layer.top_k}"
                raise SuiteError(key, text)
            if max(ids, default=0) >= layer.num_experts:
                text = f"layer {number} has {layer.num_experts} experts, and no expert {max(ids)}"
                raise SuiteError(key, text)
            token[index_of[number]] = ids
            if key == "weights":
                assert segment.weights is not None
                gate_weights[index_of[number]] = dict(segment.weights[number])
        return token, gate_weights

    def _rates(self, number: int) -> Sequence[float]:
        rates = None if self._baselines is None else self._baselines.rates.get(number)
        if rates is None:
            text = (
                f"no profile of the policies has baselines of layer {number}; name one in spec.profile"
            )
            raise SuiteError("use", text)
        return rates

    def _by_layer(self, experts: Collection[Expert]) -> dict[int, list[int]]:
        by_layer: dict[int, list[int]] = {}
        for expert in sorted(experts):
            by_layer.setdefault(expert.layer, []).append(expert.id)
        return by_layer

    def _needed(self, experts: Collection[Expert]) -> dict[int, int]:
        """By layer, how many of the experts each token has to choose because others are too few."""
        by_layer = self._by_layer(experts)
        return {
            layer.number: max(
                0, layer.top_k - (layer.num_experts - len(by_layer.get(layer.number, ())))
            )
            for layer in self.topology.layers
        }

    def _in_turn(self, experts: Collection[Expert]) -> list[Expert]:
        """A layer after the other, then the second expert of each, and so on."""
        by_layer = self._by_layer(experts)
        longest = max(map(len, by_layer.values()), default=0)
        return [
            Expert(layer, ids[rank])
            for rank in range(longest)
            for layer, ids in by_layer.items()
            if rank < len(ids)
        ]


def even(total: int, tokens: int) -> list[int]:
    """`total` over so many tokens; the first n never have more than their part."""
    return [total * (n + 1) // tokens - total * n // tokens for n in range(tokens)]


def routing_of(prompt: Sequence[Tokens], output: Sequence[Tokens]) -> Routing:
    """Segments in a row, as one request's routing."""
    parts = [*prompt, *output]
    unseen: list[int] = []
    start = 0
    for part in parts:
        stop = start + len(part.topk_ids)
        unseen += [] if part.seen else range(start, stop)
        start = stop
    return Routing(
        np.concatenate([part.topk_ids for part in parts]),
        np.concatenate([part.topk_weights for part in parts]),
        sum(len(part.topk_ids) for part in prompt),
        unseen=frozenset(unseen),
    )


class _Quiet:
    """Experts in turn, those that no rule reads as long as there are enough of them."""

    def __init__(self, quiet: Sequence[int], others: Sequence[int]) -> None:
        self._queue, self._others = deque(quiet), deque(others)

    def rows(self, tokens: int, number: int) -> Ids:
        """[tokens, number]: as `take` again and again, with nothing chosen."""
        pool = [*self._queue] if len(self._queue) >= number else [*self._queue, *self._others]
        if len(pool) < number:
            raise SuiteError("", "the layer has too few other experts to fill its top-k")
        turn = np.arange(tokens * number).reshape(tokens, number) % len(pool)
        rows: Ids = np.array(pool, dtype=np.int32)[turn]
        return rows

    def take(self, number: int, chosen: Collection[int]) -> list[int]:
        taken: list[int] = []
        for queue in (self._queue, self._others):
            for _ in range(len(queue)):
                if len(taken) == number:
                    return taken
                id_ = queue.popleft()
                queue.append(id_)
                if id_ not in chosen:
                    taken.append(id_)
        if len(taken) < number:
            raise SuiteError("", "the layer has too few other experts to fill its top-k")
        return taken


class _Baseline:
    """Experts as often as a profile says: those that are furthest behind their rate come next."""

    def __init__(self, rates: Sequence[float], avoided: Collection[int]) -> None:
        self._rates = np.array(rates)
        self._rates[list(avoided)] = -np.inf
        self._due = np.zeros(len(rates))

    def take(self, number: int, chosen: Collection[int]) -> list[int]:
        self._due += self._rates
        self._due[list(chosen)] -= 1
        due = self._due.copy()
        due[list(chosen)] = -np.inf
        taken = np.lexsort((np.arange(len(due)), -due))[:number]
        if np.isneginf(due[taken]).any():
            raise SuiteError("", "the layer has too few other experts to fill its top-k")
        self._due[taken] -= 1
        return [int(id_) for id_ in taken]


def _weights(
    chosen: Sequence[int], num_filled: int, given: dict[int, float] | None, share: Fraction | None
) -> list[float]:
    """Gate weights of the chosen, then of those that fill the rest."""
    if given is not None:
        left = max(0.0, 1.0 - sum(given.values()))
        return [given[id_] for id_ in chosen] + [left / max(1, num_filled)] * num_filled
    if share is None:
        number = len(chosen) + num_filled
        return [1.0 / number] * number
    if not num_filled:
        return [1.0] * len(chosen)
    inside = share.numerator * num_filled
    outside = share.denominator - share.numerator
    whole = min(1 << (share.denominator * num_filled - 1).bit_length(), FINEST_WEIGHT)
    return [inside / whole] * len(chosen) + [outside / whole] * num_filled
