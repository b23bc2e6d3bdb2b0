"""Super experts and REAP saliency, on tiny models of transformers, against a slow loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from guard.discover.errors import DiscoverError
from guard.discover.saliency import (
    ExpertStatistics,
    is_own_entry,
    load_model,
    measure,
    never_mask_entries,
    tokens_of,
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
PROMPTS = [list(range(1, 40)), list(range(60, 20, -1)), [7, 7, 7]]


def qwen3() -> Any:
    config = Qwen3MoeConfig(**SHAPE, num_experts=8, moe_intermediate_size=12, head_dim=8)
    return Qwen3MoeForCausalLM(config)


def qwen3_with_a_dense_layer() -> Any:
    shape = {**SHAPE, "mlp_only_layers": [1]}
    config = Qwen3MoeConfig(**shape, num_experts=8, moe_intermediate_size=12, head_dim=8)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=8))


def olmoe() -> Any:
    return OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=8))


def granite() -> Any:
    return GraniteMoeForCausalLM(GraniteMoeConfig(**SHAPE, num_local_experts=8))


def deepseek_v3() -> Any:
    config = DeepseekV3Config(
        **SHAPE, n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=12,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=8, head_dim=8))


FAMILIES = [qwen3, qwen3_with_a_dense_layer, mixtral, olmoe, granite, deepseek_v3, gpt_oss]


def made(build: Callable[[], Any], scale: float = 0.5) -> Any:
    """With weights large enough that routers and experts differ."""
    torch.manual_seed(0)
    model = build().float().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model


def experts_of(model: Any) -> dict[int, nn.Module]:
    return {
        int(name.split(".")[2]): module
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }


@torch.no_grad()
def slow(model: Any, prompts: list[list[int]]) -> dict[tuple[int, int], tuple[int, float, float]]:
    """By (layer, expert): tokens, saliency, largest output. The model's own module is asked for each
    token alone, with that expert alone and a weight of 1."""
    seen: dict[tuple[int, int], list[tuple[float, Tensor]]] = {}
    calls: list[tuple[int, Any]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: calls.append((layer, args)))
        for layer, module in experts_of(model).items()
    ]
    for prompt in prompts:
        model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    modules = experts_of(model)
    for layer, (x_TH, index_TK, weights_TK) in calls:
        for x_H, index_K, weights_K in zip(x_TH, index_TK, weights_TK, strict=True):
            for expert, weight in zip(index_K.tolist(), weights_K.tolist(), strict=True):
                output = modules[layer](x_H[None], torch.tensor([[expert]]), torch.ones(1, 1))
                seen.setdefault((layer, expert), []).append((weight, output[0]))
    return {
        key: (
            len(outputs),
            sum(weight * float(output.norm()) for weight, output in outputs) / len(outputs),
            max(float(output.abs().max()) for _, output in outputs),
        )
        for key, outputs in seen.items()
    }


@pytest.mark.parametrize("build", FAMILIES)
def test_every_number_is_that_of_a_slow_loop(build: Callable[[], Any]) -> None:
    model = made(build)
    expected = slow(model, PROMPTS)

    found = measure(model, PROMPTS)

    assert found.tokens == sum(map(len, PROMPTS))
    assert found.num_layers == 4
    assert sorted({layer for layer, _ in found.experts_X}) == sorted(experts_of(model))
    assert len(found.experts_X) == 8 * len(experts_of(model))
    for x, expert in enumerate(found.experts_X):
        tokens, saliency, largest = expected.get(expert, (0, 0.0, 0.0))
        assert found.tokens_X[x] == tokens
        assert found.saliency_X[x] == pytest.approx(saliency, rel=1e-4)
        assert found.largest_X[x] == pytest.approx(largest, rel=1e-4)
    assert len(expected) > 2 * len(experts_of(model)), "only few experts were at work"


def test_the_model_gives_what_it_gave() -> None:
    model = made(qwen3)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(ids).logits
        measure(model, PROMPTS)
        after = model(ids).logits

    assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in experts_of(model).values())


def test_experts_without_a_gate_are_measured_as_well() -> None:
    """Nemotron-H's; its other layers need more than a tiny model."""
    config = SimpleNamespace(
        n_routed_experts=4, hidden_size=8, moe_intermediate_size=6, moe_latent_size=None,
        mlp_hidden_act="relu2", num_hidden_layers=1, _experts_implementation="eager",
    )  # fmt: skip

    class Model(nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            self.layers[0].experts = NemotronHExperts(config)
            self.config = SimpleNamespace(get_text_config=lambda: config)

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            x_TH = input_ids[0][:, None] * torch.linspace(-1, 1, 8)
            index_TK = input_ids[0][:, None] % 4
            experts: Any = self.layers[0].experts
            output: Tensor = experts(x_TH, index_TK, torch.full(index_TK.shape, 0.5))
            return output

    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter)

    found = measure(model, [[2, 6]])

    experts: Any = model.layers[0].experts
    with torch.no_grad():
        outputs = [
            experts.down_proj[2] @ (experts.up_proj[2] @ (n * torch.linspace(-1, 1, 8))).relu().square()
            for n in (2, 6)
        ]
    assert found.tokens_X.tolist() == [0, 0, 2, 0]
    expected = sum(0.5 * float(output.norm()) for output in outputs) / 2
    assert found.saliency_X[2] == pytest.approx(expected, rel=1e-5)


def planted(layer: int, expert: int) -> Any:
    model = made(qwen3, scale=0.3)
    module: Any = experts_of(model)[layer]
    with torch.no_grad():
        module.down_proj[expert] *= 200
    return model


def test_a_planted_super_expert_is_the_only_one() -> None:
    found = measure(planted(1, 2), PROMPTS)

    assert [found.experts_X[x] for x in np.flatnonzero(found.is_super_X)] == [(1, 2)]
    entry, *others = never_mask_entries(found, 0.1)
    assert (entry["layer"], entry["experts"]) == (1, [2])
    assert entry["reason"].startswith("super expert: largest down-projection output ")
    assert f"the median expert's is {found.median_largest:.4g}" in entry["reason"]
    assert len(others) == 3, "a tenth of 32 experts is 4, of which the super expert is one"
    assert all(is_own_entry(one) for one in (entry, *others))


def test_in_the_last_quarter_of_the_layers_no_expert_is_super() -> None:
    found = measure(planted(3, 2), PROMPTS)

    assert found.experts_X[int(found.largest_X.argmax())] == (3, 2)
    assert not found.is_super_X.any()


def statistics(largest: list[float], num_layers: int = 40, per_layer: int = 10) -> ExpertStatistics:
    """Saliency falls from the first expert on."""
    count = len(largest)
    return ExpertStatistics(
        tuple(divmod(x, per_layer) for x in range(count)),
        np.ones(count, np.int64),
        np.arange(count, 0, -1).astype(np.float64),
        np.array(largest),
        num_layers,
        count,
    )


@pytest.mark.parametrize(
    ("planted_at", "expected"),
    [
        ({5: 100.0, 7: 50.0}, [5, 7]),
        ({5: 100.0, 7: 9.0}, [5]),  # not above a tenth of the largest
        ({5: 100.0, 7: 10.0}, [5]),
        ({5: 100.0, 7: 90.0, 9: 80.0}, [5, 7]),  # 99.5 % of 400 experts leave room for two
        ({299: 100.0, 300: 90.0}, [299]),  # layer 30 of 40 is in the last quarter
        ({300: 100.0}, []),
        ({}, []),
    ],
)
def test_the_published_criterion(planted_at: dict[int, float], expected: list[int]) -> None:
    found = statistics([planted_at.get(x, 1.0) for x in range(400)])

    assert np.flatnonzero(found.is_super_X).tolist() == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, []),
        (0.01, [0]),
        (0.1, [0, 1]),
        (0.1001, [0, 1, 2]),
        (1.0, list(range(20))),
    ],
)
def test_the_most_salient_are_kept_up_to_a_share(share: float, expected: list[int]) -> None:
    entries = never_mask_entries(statistics([1.0] * 20), share)

    assert [10 * entry["layer"] + entry["experts"][0] for entry in entries] == expected
    for number, entry in enumerate(entries, start=1):
        assert entry["reason"] == f"REAP saliency {21 - number}: number {number} of 20"


def test_a_share_is_rounded_up_only_where_it_must_be() -> None:
    assert 0.07 * 100 > 7

    assert len(never_mask_entries(statistics([1.0] * 100), 0.07)) == 7


def test_an_expert_that_no_token_chose_is_not_salient() -> None:
    found = statistics([1.0] * 4)
    found.tokens_X[1:] = 0
    found.saliency_X[1:] = 0
    found.largest_X[1:] = 0

    assert len(never_mask_entries(found, 1.0)) == 1
    assert found.median_largest == 1.0


@pytest.mark.parametrize(
    ("entry", "is_own"),
    [
        ({"reason": "super expert: largest down-projection output 9, the median expert's is 1"}, True),
        ({"reason": "REAP saliency 9: number 1 of 4"}, True),
        ({"reason": "super expert"}, False),
        ({"reason": "see REAP saliency 9"}, False),
        ({"layer": 1}, False),
        ("REAP saliency 9", False),
    ],
)
def test_entries_of_its_own_are_told_by_their_reason(entry: object, is_own: bool) -> None:
    assert is_own_entry(entry) is is_own


class Shell(nn.Module):
    """A model around one module `experts`, or under another name."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module, name: str = "experts") -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        setattr(self.layers[0], name, module)


class Fused(nn.Module):
    """Looks like a family of transformers, but adds its experts' input."""

    def __init__(self, *, inner: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(4, 12, 8).to(dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.ones(4, 8, inner).to(dtype), requires_grad=False)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


def llama4() -> Any:
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **{**SHAPE, "num_experts_per_tok": 1}, num_local_experts=4, head_dim=8,
            intermediate_size_mlp=24, interleave_moe_layer_step=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "refusal"),
    [
        (llama4, "Llama4TextExperts, which saliency does not know: it is called with hidden_states"),
        (lambda: Shell(nn.ModuleList([nn.Linear(8, 8)])), "the experts are ModuleList, which"),
        (lambda: Shell(Fused(inner=5)), "Fused, .*no fused gate_up_proj and down_proj of matching"),
        (
            lambda: Shell(Fused(dtype=torch.float8_e4m3fn)),
            "Fused, .*no fused gate_up_proj and down_proj",
        ),
        (lambda: Shell(nn.Linear(2, 2), "mlp"), "Shell has no modules `experts`"),
    ],
)
def test_experts_of_another_kind_are_refused_by_name(build: Callable[[], Any], refusal: str) -> None:
    with pytest.raises(DiscoverError, match=refusal):
        measure(build(), PROMPTS)


def test_experts_that_compute_something_else_are_found_out() -> None:
    class Model(Shell):
        def forward(self, input_ids: Tensor, use_cache: bool) -> None:
            x_TH = torch.ones(input_ids.shape[1], 8)
            index_TK = torch.zeros(input_ids.shape[1], 1, dtype=torch.int64)
            experts: Any = self.layers[0].experts
            experts(x_TH, index_TK, torch.ones(index_TK.shape))

    with pytest.raises(DiscoverError, match=r"Fused, .*what it computes is not what its weights say"):
        measure(Model(Fused()), PROMPTS)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = made(qwen3)
    module: Any = experts_of(model)[0]
    with torch.no_grad():
        module.down_proj *= 1e38

    with pytest.raises(DiscoverError, match=r"not finite in torch\.float32"):
        measure(model, PROMPTS)


DEMO = Path(__file__).parents[3] / "demo" / "model"


def test_prompts_are_tokens_up_to_a_length_and_chats_go_through_the_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "user", "content": "Might quartz sand spoil a candle?"}]

    plain, chat = tokens_of(
        tokenizer, [{"prompt": "Might quartz sand spoil a candle?"}, {"messages": messages}], 4096
    )

    assert plain == tokenizer("Might quartz sand spoil a candle?").input_ids
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == tokenizer(text, add_special_tokens=False).input_ids
    assert len(chat) > len(plain)
    assert tokens_of(tokenizer, [{"messages": messages}], 3) == [chat[:3]]


def test_prompts_that_hold_nothing_are_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    with pytest.raises(DiscoverError, match="no prompt has a token"):
        tokens_of(tokenizer, [{"prompt": ""}], 10)
    tokenizer.chat_template = "{{ messages[0].content.nothing.more }}"
    with pytest.raises(DiscoverError, match="prompt 1: the model's chat template"):
        tokens_of(tokenizer, [{"messages": [{"role": "user", "content": "a"}]}], 10)


def test_a_folder_that_holds_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(DiscoverError, match=f"{tmp_path}: transformers cannot load it"):
        load_model(tmp_path, "cpu", "auto")


def test_a_device_that_is_none_is_told() -> None:
    with pytest.raises(DiscoverError, match="the device 'cuda:99' cannot hold the model"):
        load_model(DEMO, "cuda:99", "auto")
