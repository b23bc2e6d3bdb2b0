"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import settings

# Nothing here may reach a network: not for models, not for usage statistics. Servers that a test
# starts inherit this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# No deadline, since the machine is shared with running engines. In CI the examples are the same at
# each run: a failure there is the change's fault.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
