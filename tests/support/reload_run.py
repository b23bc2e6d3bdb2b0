"""Reloads the weights of a running engine, once as it is and once with a router that lost its guard.

python reload_run.py MODEL POLICIES RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Reloading:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    def is_blind(self) -> bool:
        status: Any = self.moe_guard_status  # type: ignore[attr-defined]
        blind: bool = status.__self__._hooks.guard.blind
        return blind

    def take_the_guard_off_one_router(self) -> None:
        from guard_vllm.routers import routed_layers

        router = routed_layers(self.model_runner.get_model())[1].router  # type: ignore[attr-defined]
        self._guarded = router._compute_routing
        del router._compute_routing

    def put_it_back(self) -> None:
        from guard_vllm.routers import routed_layers

        router = routed_layers(self.model_runner.get_model())[1].router  # type: ignore[attr-defined]
        router._compute_routing = self._guarded


def main() -> None:
    from guard_vllm.client import decisions
    from vllm import LLM, SamplingParams

    model, policies, result = sys.argv[1:]
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        additional_config={"moe_guard": {"policies": policies}},
        worker_extension_cls="tests.support.reload_run.Reloading",
    )
    sampling = SamplingParams(
        detokenize=False,
        max_tokens=8,
        temperature=0.0,
        ignore_eos=True,
        extra_args={"moe_guard_enforce": ["isolate"]},
    )

    def answer() -> dict[str, Any]:
        llm.reset_prefix_cache()
        seen = len(decisions())
        [output] = llm.generate([{"prompt_token_ids": list(range(5, 40))}], sampling, use_tqdm=False)
        return {
            "tokens": list(output.outputs[0].token_ids),
            "decisions": sorted((d.policy, d.rule, d.position) for d in decisions()[seen:]),
            "blind": llm.collective_rpc("is_blind")[0],
        }

    answers = {"before": answer()}
    llm.collective_rpc("reload_weights")
    answers["reloaded"] = answer()
    llm.collective_rpc("take_the_guard_off_one_router")
    llm.collective_rpc("reload_weights")
    answers["unproved"] = answer()
    llm.collective_rpc("put_it_back")
    llm.collective_rpc("reload_weights")
    answers["proved again"] = answer()
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
