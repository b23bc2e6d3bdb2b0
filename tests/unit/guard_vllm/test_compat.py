"""One module knows vLLM's names: the rest of the plugin uses what `SEAMS` declares, and no other.

Read from the source, so what runs only on a GPU or in a version that is not installed counts too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_vllm.compat import SEAMS, declares, seam

from guard.errors import UnsupportedHostError

PLUGIN = Path(__file__).resolve().parents[3] / "integrations" / "vllm" / "guard_vllm"

LOOKED_UP = {"seam", "wrap", "_around", "getattr", "hasattr", "setattr", "delattr"}
"""Functions that take an owner and an attribute's name."""

MODULE = re.compile(r"vllm(\.\w+)+")
OF_OPENAI = {"item"}  # of the events that the openai package defines
PRIVATE = re.compile(r"_[^_]")
DECLARED = {name for declared in SEAMS for name in (declared.attribute, *declared.has)}


def own_names(sources: list[str]) -> set[str]:
    """What the plugin defines itself: functions, classes, fields, and attributes of self."""
    names = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Attribute) and _is_own(node) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def undeclared(source: str, own: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """`line: name` of each name of vLLM in the source that the table does not have."""
    return [f"{line}: {name}" for line, name in _used(ast.parse(source), own)]


def _used(tree: ast.Module, own: frozenset[str] | set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_of_vllm(alias.name) and not declares(alias.name, ""):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and _is_of_vllm(node.module or ""):
            assert node.module is not None
            for alias in node.names:
                is_module = declares(f"{node.module}.{alias.name}", "")
                if not is_module and not declares(node.module, alias.name):
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant):
            if MODULE.fullmatch(_text(node)) and not _holds_declared(_text(node)):
                yield node.lineno, _text(node)
        elif isinstance(node, ast.Call):
            yield from _looked_up(node, own)
        elif isinstance(node, ast.Attribute) and _is_foreign(node, own):
            yield node.lineno, node.attr


def _looked_up(node: ast.Call, own: frozenset[str] | set[str]) -> Iterator[tuple[int, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name not in LOOKED_UP or len(node.args) < 2:
        return
    owner, looked_up = _text(node.args[0]), _text(node.args[1])
    if not looked_up or looked_up.startswith("__"):
        return
    is_known = declares(owner, looked_up) if owner else looked_up in DECLARED | OF_OPENAI | own
    if not is_known:
        yield node.lineno, looked_up


def _holds_declared(package: str) -> bool:
    return any(f"{declared.module}.".startswith(f"{package}.") for declared in SEAMS)


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_of_vllm(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] == "vllm"


def _is_foreign(node: ast.Attribute, own: frozenset[str] | set[str]) -> bool:
    return not _is_own(node) and bool(PRIVATE.match(node.attr)) and node.attr not in DECLARED | own


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_the_plugin_uses_no_name_of_vllm_that_the_table_does_not_declare() -> None:
    sources = {path: path.read_text("utf-8") for path in sorted(PLUGIN.rglob("*.py"))}
    del sources[PLUGIN / "compat.py"]
    sources = {path: text for path, text in sources.items() if path.parent.name != "seams"}
    assert len(sources) > 20, "the sources were not found"
    own = own_names(list(sources.values()))
    found = [
        f"{path.relative_to(PLUGIN)}:{line}; declare it in SEAMS of compat.py"
        for path, source in sources.items()
        for line in undeclared(source, own)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import vllm.v1.spec_decode",
        "from vllm.v1.request import StreamingUpdate",
        "from vllm.v1.core import block_pool_of_old",
        "seam('vllm.v1.request', 'StreamingUpdate')",
        "seam('vllm.v1.nowhere', 'Request')",
        "wrap(scheduler, '_preempt_all', around)",
        "steps.wrap(scheduler, '_preempt_all', around)",
        "getattr(parallel, 'enable_dpo', False)",
        "def f():\n    return runner._prepare_everything()",
        "modules = {'vllm.entrypoints.pigeon'}",
    ],
)
def test_an_undeclared_name_is_found(source: str) -> None:
    assert undeclared(source)


@pytest.mark.parametrize(
    "source",
    [
        "from vllm.v1.request import RequestStatus",
        "from vllm.v1.core import kv_cache_utils",
        "seam('vllm.v1.engine.async_llm', 'AsyncLLM')",
        "wrap(scheduler, '_free_request', around)",
        "getattr(parallel, 'enable_dbo', False)",
        "getattr(event, 'item', None)",
        "getattr(kind, '__qualname__', '')",
        "def f(self):\n    return self._mine + other._theirs",
    ],
)
def test_a_declared_name_passes(source: str) -> None:
    assert undeclared(source, {"_theirs"}) == []


def test_each_name_is_declared_once() -> None:
    paths = [declared.path for declared in SEAMS]
    assert sorted(paths) == sorted(set(paths))


def test_a_name_outside_the_table_cannot_be_hooked() -> None:
    with pytest.raises(LookupError, match=r"kv_cache_utils.hash_block_tokens is not in SEAMS"):
        seam("vllm.v1.core.kv_cache_utils", "hash_block_tokens")


def test_a_method_of_a_class_that_the_table_has_not_cannot_be_hooked() -> None:
    from vllm.v1.request import Request

    with pytest.raises(LookupError, match=r"Request.append_output_token_ids is not in SEAMS"):
        seam(Request, "append_output_token_ids")


def test_a_declared_name_is_found_on_a_subclass() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert seam(AsyncScheduler, "_free_request") is Scheduler._free_request


def test_a_declared_name_that_this_vllm_has_not_is_a_host_that_is_not_supported() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Renamed(GPUModelRunner):  # type: ignore[misc]
        @property
        def _prepare_inputs(self) -> None:
            raise AttributeError

    with pytest.raises(UnsupportedHostError, match=r"vLLM 0\.\d+.* does not have '.*_prepare_inputs'"):
        seam(Renamed.__new__(Renamed), "_prepare_inputs")
