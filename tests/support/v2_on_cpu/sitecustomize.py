"""Lets Model Runner V2, the one of every current GPU, run on a CPU in tests. Slow, eager only.

V2 needs Triton, and vLLM's CPU build turns Triton off unless it has a back end named "cpu". This
registers an empty one and lets Triton interpret each kernel. Put this folder on PYTHONPATH, and set
VLLM_USE_V2_MODEL_RUNNER=1 and MOE_GUARD_TEST_V2=1.
"""

import os

if os.environ.get("MOE_GUARD_TEST_V2"):
    os.environ["TRITON_INTERPRET"] = "1"

    from types import SimpleNamespace
    from typing import Any

    import triton.backends
    from triton.runtime.interpreter import InterpreterBuilder

    class _AlwaysActive:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_AlwaysActive, compiler=None)

    # The interpreter wants a boolean mask; vLLM's grammar kernel gives it an integer one.
    stock_masked_store = InterpreterBuilder.create_masked_store

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return stock_masked_store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_store = create_masked_store
