"""Settings that every test shares."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
from hypothesis import settings

from tests.support.support_recorder import SupportRecord, SupportRecorder
from tests.support.thorough import is_left_out

# Nothing here may reach a network: not for models, not for usage statistics. Servers that a test
# starts inherit this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# Engines of tiny models run side by side: a second thread of one would mostly be waited for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# Inductor's pool of compilers lives as long as the process, and then fails whichever test it is
# collected under, as a process that nobody waited for.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# No deadline, since the machine is shared with running engines. In CI the examples are the same at
# each run: a failure there is the change's fault.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

_recorder = SupportRecorder()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_recorder, "support-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item.nodeid)]
    _refuse_unstable_ids(items)


def _refuse_unstable_ids(items: list[pytest.Item]) -> None:
    """An object without a name of its own puts its address into the test's id, which then differs
    between the processes of one run, and pytest-xdist gives up."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"name these cases with `ids`: {', '.join(unstable)}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`make test` runs two processes side by side. Tests of a folder of tests/integration share running
    engines, so they share a process; others share one with their file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolderOfEngines(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            if path.startswith("tests/integration/"):
                return "/".join(path.split("/")[:3])
            return path

    return ByFolderOfEngines(config, log)


@pytest.fixture
def support_record(request: pytest.FixtureRequest) -> SupportRecord:
    """Says which cells of docs/support.md the calling test shows; what counts is that it passes.

    Call it in the test that holds the assertions, once for each family and place:

        support_record("Mixtral", "reroute", "drop")  # in a real engine: V1, eager, one worker
        support_record("Mixtral", "observe", runner="v2", parallelism="PP=2")
        support_record("Phi-3.5-MoE", "force", runner="router")  # its routing code alone
        support_record("LongCat", "force", refused="zero experts cannot be forced")
        support_record("MiniMax-M2", "observe", untestable="vLLM fails on a CPU: ...")
        support_record.feature("chunked prefill", runner="v2")
        support_record.feature("LoRA adapters", refused="the message of the refusal")

    Methods: observe, reroute, drop, drop_renorm, force; runner: v1, v2, router; mode: eager,
    compiled; parallelism: none, or a layout such as TP=2; features: `support_facts.FEATURES`.
    `refused` is for a test that shows the guard's refusal, `untestable` for one that shows vLLM's
    own. Reasons must not vary from run to run. `make support` writes the table from what the last
    whole run recorded.
    """
    return _recorder.record(request.node.nodeid)


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> None:
    """Engines and libraries that ran in this process before may have set the root's level, or taken the
    guard's lines for vLLM's handlers; a test that reads log lines would find none."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name, logger in logging.Logger.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in ("guard", "guard_vllm"):
            logger.setLevel(logging.NOTSET)
            logger.propagate, logger.disabled = True, False
