"""Experts that a model cannot do without, from its weights and prompts: no vLLM, no GPU needed.

Two measures of a routed expert e, over the tokens x that chose it, with output f_e and gate weight g_e:

| | |
|---|---|
| largest output | max over x and dimensions of \\|f_e(x)\\|; marks super experts (arXiv 2507.23279) |
| saliency | mean over x of g_e(x) · ‖f_e(x)‖₂; REAP (arXiv 2510.13999) |

Letters: T tokens, K chosen, H hidden, X experts of all layers in a row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.discover.errors import DiscoverError
from guard.policy.suggest import one_of, quote

SUPER_PERCENTILE: Final = 99.5
SUPER_SHARE_OF_LARGEST: Final = 0.1
SUPER_LAYERS: Final = 0.75
"""Super experts are in this share of the layers, from the first one on."""

SUPER_REASON: Final = "super expert: largest down-projection output "
SALIENT_REASON: Final = "REAP saliency "

_SIGNATURES: Final = (
    ("self", "hidden_states", "top_k_index", "top_k_weights"),
    ("self", "hidden_states", "router_indices", "routing_weights"),
)
_TOLERANCE: Final = 0.05
"""Of what a layer gives and what its experts give here, by the largest number: beyond rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStatistics:
    """experts_X: (the model's own layer number, expert id)
    tokens_X: how many chose it
    saliency_X, largest_X: 0 where none did
    num_layers: of the model, dense ones as well
    tokens: that were seen
    """

    experts_X: tuple[tuple[int, int], ...]
    tokens_X: NDArray[np.int64]
    saliency_X: NDArray[np.float64]
    largest_X: NDArray[np.float64]
    num_layers: int
    tokens: int

    @property
    def ranks_X(self) -> NDArray[np.int64]:
        """By saliency, 1 for the most salient expert; of equal ones the first."""
        order = np.argsort(-self.saliency_X, kind="stable")
        ranks_X = np.empty(len(order), np.int64)
        ranks_X[order] = np.arange(1, len(order) + 1)
        return ranks_X

    @property
    def is_super_X(self) -> NDArray[np.bool_]:
        """Larger than the 99.5th percentile of all experts, and than a tenth of the largest, in the
        first three quarters of the layers. Something nearly always is: how far it stands out from the
        median tells whether it means anything."""
        least = max(
            float(np.percentile(self.largest_X, SUPER_PERCENTILE)),
            float(self.largest_X.max()) * SUPER_SHARE_OF_LARGEST,
        )
        layer_X = np.array([layer for layer, _ in self.experts_X])
        return (self.largest_X > least) & (layer_X < SUPER_LAYERS * self.num_layers)

    @property
    def median_largest(self) -> float:
        """Of the experts that some token chose."""
        return float(np.median(self.largest_X[self.tokens_X > 0]))


def never_mask_entries(statistics: ExpertStatistics, top_saliency: float) -> list[dict[str, Any]]:
    """Entries of a profile's `neverMask`: super experts, then the most salient of the others.

    top_saliency: the share of all experts, rounded up
    """
    num_experts, median = len(statistics.experts_X), statistics.median_largest
    num_top = math.ceil(top_saliency * num_experts - 1e-9)
    is_super_X, ranks_X = statistics.is_super_X, statistics.ranks_X
    reasons = {}
    for x in np.argsort(ranks_X).tolist():
        if is_super_X[x]:
            largest = statistics.largest_X[x]
            reasons[x] = f"{SUPER_REASON}{largest:.4g}, the median expert's is {median:.4g}"
    for x in np.argsort(ranks_X)[:num_top].tolist():
        if x not in reasons and statistics.tokens_X[x]:
            saliency = statistics.saliency_X[x]
            reasons[x] = f"{SALIENT_REASON}{saliency:.4g}: number {ranks_X[x]} of {num_experts}"
    return [
        {"layer": layer, "experts": [expert], "reason": reason}
        for x, reason in reasons.items()
        for layer, expert in (statistics.experts_X[x],)
    ]


def is_own_entry(entry: object) -> bool:
    """Of `neverMask`: made by `never_mask_entries`, to be told by its reason."""
    reason = entry.get("reason") if isinstance(entry, Mapping) else None
    return isinstance(reason, str) and reason.startswith((SUPER_REASON, SALIENT_REASON))


class Loaded(NamedTuple):
    """A model for inference, and its tokenizer."""

    model: Any
    tokenizer: Any


def load_model(folder: Path, device: str, dtype: str) -> Loaded:
    """Runs no code of the folder. dtype: as transformers takes it; `auto` is that of the weights

    Raises DiscoverError.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DiscoverError(f"{folder}: transformers cannot load it: {error}") from error
    try:
        return Loaded(model.to(device).eval(), tokenizer)
    except (RuntimeError, AssertionError) as error:
        raise DiscoverError(f"the device {quote(device)} cannot hold the model: {error}") from error


def tokens_of(tokenizer: Any, prompts: Sequence[Mapping[str, Any]], most: int) -> list[list[int]]:
    """Of each prompt no more than the first `most`.

    prompts: each with `prompt`, or with `messages` for the tokenizer's chat template

    Raises DiscoverError for messages that the template does not take.
    """
    found = []
    for number, one in enumerate(prompts, start=1):
        if "messages" in one:
            try:
                text = tokenizer.apply_chat_template(
                    one["messages"], tokenize=False, add_generation_prompt=True
                )
            except (ValueError, TypeError, KeyError, TemplateError) as error:
                raise DiscoverError(
                    f"prompt {number}: the model's chat template does not take its messages: {error}"
                ) from error
            ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = tokenizer(one["prompt"]).input_ids
        if ids:
            found.append(list(ids[:most]))
    if not found:
        raise DiscoverError("no prompt has a token")
    return found


@torch.inference_mode()
def measure(model: Any, prompts: Iterable[Sequence[int]]) -> ExpertStatistics:
    """Feeds each prompt by itself, and generates nothing.

    model: of transformers, causal, with a module `experts` in each MoE layer
    prompts: token ids

    Raises DiscoverError for experts of a kind that is not known, or outputs that are not finite.
    """
    sums = _expert_sums(model)
    tokens = 0
    handles = [one.module.register_forward_hook(one, with_kwargs=True) for one in sums]
    try:
        for token_ids in prompts:
            ids_1T = torch.tensor([list(token_ids)], device=model.device)
            model(input_ids=ids_1T, use_cache=False)
            tokens += len(token_ids)
    finally:
        for handle in handles:
            handle.remove()
    tokens_X = np.concatenate([one.tokens_E.numpy() for one in sums])
    totals_X = np.concatenate([one.total_E.numpy() for one in sums])
    largest_X = np.concatenate([one.largest_E.numpy() for one in sums])
    if not (np.isfinite(totals_X).all() and np.isfinite(largest_X).all()):
        raise DiscoverError(
            f"some outputs are not finite in {model.dtype}; use --dtype float32 or bfloat16"
        )
    if not tokens_X.any():
        raise DiscoverError("no token reached an expert; give longer prompts")
    config = model.config.get_text_config()
    return ExpertStatistics(
        tuple((one.layer, expert) for one in sums for expert in range(len(one.tokens_E))),
        tokens_X,
        totals_X / np.maximum(tokens_X, 1),
        largest_X,
        int(config.num_hidden_layers),
        tokens,
    )


def _expert_sums(model: Any) -> list[_ExpertSums]:
    found = [
        _ExpertSums(_layer_of(name), module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    if not found:
        raise DiscoverError(
            f"{type(model).__name__} has no modules `experts`: it is no Mixture-of-Experts model, or "
            "names them in a way that is not known"
        )
    return sorted(found, key=lambda one: one.layer)


def _layer_of(name: str) -> int:
    number = next((part for part in name.split(".") if part.isdecimal()), None)
    if number is None:
        raise DiscoverError(f"the module {name} has no layer number in its name")
    return int(number)


class _ExpertSums:
    """A hook on a layer's experts. It computes what each expert gives, which the layer only sums.

    tokens_E, total_E, largest_E: on the CPU; total of g · ‖f‖
    """

    def __init__(self, layer: int, module: nn.Module) -> None:
        self.layer = layer
        self.module = module
        self._experts = _Experts.of(module)
        num_experts = self._experts.num_experts
        self.tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        self.total_E = torch.zeros(num_experts, dtype=torch.float64)
        self.largest_E = torch.zeros(num_experts, dtype=torch.float64)
        self._is_understood = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output_TH: Tensor
    ) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        x_TH, index_TK, weights_TK = bound.arguments.values()
        if index_TK.ndim != 2 or index_TK.shape != weights_TK.shape:
            raise self._experts.refusal("its weights are not given by the experts that a token chose")
        sum_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for expert in index_TK.unique().tolist():
            if not 0 <= expert < self._experts.num_experts:
                continue
            token_N, place_N = torch.where(index_TK == expert)
            output_NH = self._experts.output(expert, x_TH[token_N]).float()
            weight_N = weights_TK[token_N, place_N].float()
            self.tokens_E[expert] += len(token_N)
            self.total_E[expert] += (weight_N * output_NH.norm(dim=-1)).double().sum().cpu()
            largest = output_NH.abs().max().double().cpu()
            self.largest_E[expert] = torch.maximum(self.largest_E[expert], largest)
            sum_TH.index_add_(0, token_N, weight_N[:, None] * output_NH)
        if not self._is_understood:
            self._check(sum_TH, output_TH)

    def _check(self, sum_TH: Tensor, output_TH: Tensor) -> None:
        """A family may lay its weights out in a way that looks like one that is known."""
        if not torch.isfinite(output_TH).all():
            return
        expected_TH = output_TH.reshape(sum_TH.shape).float()
        most = float(expected_TH.abs().max())
        if float((sum_TH - expected_TH).abs().max()) > _TOLERANCE * most:
            raise self._experts.refusal("what it computes is not what its weights say here")
        self._is_understood = most > 0


@dataclass(frozen=True, slots=True)
class _Experts:
    """The fused weights of transformers 5, as `use_experts_implementation` describes them.

    first: E × 2I × H, gate above up; E × I × H where there is no gate
    down: E × H × I; both the other way round where they are transposed
    """

    name: str
    first: Tensor
    first_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    is_transposed: bool
    activate: Callable[[Tensor], Tensor]

    @staticmethod
    def of(module: nn.Module) -> _Experts:
        """Raises DiscoverError for a class that is laid out differently."""
        name = type(module).__name__
        names = tuple(inspect.signature(type(module).forward).parameters)
        if names not in _SIGNATURES:
            raise _refusal(name, f"it is called with {one_of(names[1:], 'and') or 'nothing'}")
        has_gate = bool(getattr(module, "has_gate", True))
        has_bias = bool(getattr(module, "has_bias", False))
        is_transposed = bool(getattr(module, "is_transposed", False))
        first_name = "gate_up_proj" if has_gate else "up_proj"
        first, down = getattr(module, first_name, None), getattr(module, "down_proj", None)
        if not _are_fused(first, down, width=2 if has_gate else 1, is_transposed=is_transposed):
            raise _refusal(name, f"it has no fused {first_name} and down_proj of matching shapes")
        assert isinstance(first, Tensor)
        assert isinstance(down, Tensor)
        biases = [getattr(module, f"{key}_bias", None) for key in (first_name, "down_proj")]
        if [bias is not None for bias in biases] != [has_bias] * 2:
            raise _refusal(name, "its biases are not where they are looked for")
        activate = getattr(module, "_apply_gate", None) if has_gate else getattr(module, "act_fn", None)
        if activate is None:
            raise _refusal(name, "its activation is not where it is looked for")
        return _Experts(name, first, biases[0], down, biases[1], is_transposed, activate)

    @property
    def num_experts(self) -> int:
        return int(self.down.shape[0])

    def output(self, expert: int, x_NH: Tensor) -> Tensor:
        """[N, H], before the gate weight."""
        inner_NI = self.activate(self._linear(x_NH, self.first, self.first_bias, expert))
        return self._linear(inner_NI, self.down, self.down_bias, expert)

    def _linear(self, x: Tensor, weights: Tensor, biases: Tensor | None, expert: int) -> Tensor:
        weight = weights[expert].T if self.is_transposed else weights[expert]
        return nn.functional.linear(x, weight, None if biases is None else biases[expert])

    def refusal(self, why: str) -> DiscoverError:
        return _refusal(self.name, why)


def _are_fused(first: object, down: object, *, width: int, is_transposed: bool) -> bool:
    """width: how many times the inner size the first projection has"""
    if not (isinstance(first, Tensor) and isinstance(down, Tensor) and first.ndim == down.ndim == 3):
        return False
    if not (first.is_floating_point() and first.dtype == down.dtype and first.dtype.itemsize > 1):
        return False
    experts, outer, inner = down.shape
    if is_transposed:
        inner, outer = outer, inner
        return tuple(first.shape) == (experts, outer, width * inner)
    return tuple(first.shape) == (experts, width * inner, outer)


def _refusal(name: str, why: str) -> DiscoverError:
    return DiscoverError(
        f"the experts are {name}, which saliency does not know: {why}. Qwen-MoE, Mixtral, OLMoE, "
        "DeepSeek-V3 and others with transformers' fused layout work"
    )
