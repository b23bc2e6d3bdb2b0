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

    # The interpreter wants boolean masks; vLLM's grammar and draft kernels give it integers.
    def with_boolean_mask(name: str, place: int) -> None:
        stock = getattr(InterpreterBuilder, name)

        def wrapper(self: Any, *args: Any) -> Any:
            args[place].data = args[place].data.astype(bool)
            return stock(self, *args)

        setattr(InterpreterBuilder, name, wrapper)

    with_boolean_mask("create_masked_store", 2)
    with_boolean_mask("create_masked_load", 1)
