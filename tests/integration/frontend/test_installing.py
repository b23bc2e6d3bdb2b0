"""How vLLM's functions are found and replaced, and what happens where they are not there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import is_blocked
from guard_vllm.frontend.patching import Argument, wrap

from guard.errors import UnsupportedHostError

pytestmark = pytest.mark.vllm


class Host:
    def greet(self, name: str, *, loud: bool = False) -> str:
        return name.upper() if loud else name


@pytest.mark.parametrize(
    ("stop_reason", "expected"),
    [
        ("moe_guard", True),
        ("moe_guard:policy/rule", True),
        ("moe_guard:", True),
        ("moe_guardian", False),
        ("xmoe_guard:", False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_a_block_is_told_by_its_stop_reason(stop_reason: object, expected: bool) -> None:
    assert is_blocked(stop_reason) is expected


@pytest.mark.parametrize("owner", [Host, "vllm.v1.request", "vllm.v1.engine.detokenizer"])
def test_a_missing_seam_names_the_version_and_the_attribute(
    owner: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a version of vLLM without the class, or without the whole module."""
    monkeypatch.delattr("vllm.v1.request.RequestStatus")
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.detokenizer", None)
    name = "BaseIncrementalDetokenizer" if "detokenizer" in str(owner) else "RequestStatus"
    with pytest.raises(UnsupportedHostError) as raised:
        seam(owner, name)
    assert "vLLM 0." in str(raised.value)
    assert ("detokenizer" if "detokenizer" in str(owner) else name) in str(raised.value)


def test_a_function_is_wrapped_once() -> None:
    host = type("Host", (Host,), {"greet": Host.greet})

    def twice(original: Any) -> Any:
        return lambda *args, **kwargs: original(*args, **kwargs) * 2

    wrap(host, "greet", twice)
    wrap(host, "greet", twice)
    assert host().greet("a") == "aa"


def test_a_function_of_a_module_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(greet=lambda name: name)
    monkeypatch.setitem(sys.modules, "host_module", module)
    wrap("host_module", "greet", lambda original: lambda name: original(name) + "!")
    assert module.greet("a") == "a!"


def test_an_argument_is_found_however_it_is_passed() -> None:
    name = Argument(Host.greet, "name")
    loud = Argument(Host.greet, "loud")
    assert (name.of((Host(), "a"), {}), name.of((Host(),), {"name": "a"})) == ("a", "a")
    assert (loud.of((Host(), "a"), {}), loud.of((Host(), "a"), {"loud": True})) == (None, True)
    calls: list[tuple[Any, Any]] = [((Host(), "a"), {}), ((Host(),), {"name": "a"})]
    for args, kwargs in calls:
        new_args, new_kwargs = name.replaced(args, kwargs, "b")
        assert Host.greet(*new_args, **new_kwargs) == "b"


def test_an_argument_that_is_gone_is_an_unsupported_host() -> None:
    with pytest.raises(UnsupportedHostError, match="no argument 'volume'"):
        Argument(Host.greet, "volume")


def test_install_frontend_is_idempotent() -> None:
    from guard_vllm.frontend.install import install_frontend

    state = seam("vllm.v1.engine.output_processor", "RequestState")
    install_frontend({}, (), lambda: False)
    once = state._new_completion_output
    install_frontend({}, (), lambda: False)
    assert state._new_completion_output is once
