"""Imports go one way: policy <- program <- device <- runtime <- guard_vllm.

Read from the source, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "integrations" / "vllm")

# What each layer may import of the layers, besides itself and guard.errors.
LAYERS: dict[str, set[str]] = {
    "guard": set(),
    "guard.errors": set(),
    "guard.failures": set(),
    "guard.whole_file": set(),
    "guard.fault_injection": {"guard.failures"},
    "guard.policy": set(),
    "guard.program": {"guard.policy"},
    "guard.host": {"guard.policy", "guard.program"},
    "guard.device": {"guard.policy", "guard.program"},
    "guard.trace": {"guard.policy", "guard.program"},
    "guard.offline": {"guard.policy", "guard.program", "guard.device", "guard.trace"},
    "guard.record": {
        "guard.failures",
        "guard.policy",
        "guard.program",
        "guard.device",
        "guard.trace",
    },
    "guard.testing": {"guard.policy", "guard.program", "guard.offline"},
    "guard.events": {
        "guard.failures",
        "guard.fault_injection",
        "guard.overrides",
        "guard.policy",
        "guard.program",
    },
    "guard.source": {"guard.failures", "guard.policy", "guard.whole_file"},
    "guard.overrides": {"guard.failures", "guard.policy", "guard.whole_file"},
    "guard.discover": {"guard.policy", "guard.program", "guard.trace", "guard.offline"},
    "guard.prepared": {"guard.policy", "guard.program", "guard.device"},
    "guard.runtime": {
        "guard.prepared",
        "guard.failures",
        "guard.fault_injection",
        "guard.policy",
        "guard.program",
        "guard.host",
        "guard.device",
        "guard.events",
    },
}
LAYERS["guard.staged"] = LAYERS["guard.runtime"] | {"guard.runtime"}
LAYERS["guard.cli"] = set(LAYERS)
LAYERS["guard_vllm"] = set(LAYERS) - {"guard.cli"}

# What else a layer may not import, by the name of the module at the top.
ARRAYS = {"numpy", "torch"}
FOREIGN: dict[str, set[str]] = {
    "guard": ARRAYS,
    "guard.errors": ARRAYS,
    "guard.whole_file": ARRAYS,
    "guard.policy": ARRAYS,
    "guard.source": ARRAYS,
    "guard.overrides": ARRAYS,
    "guard.program": {"torch"},
    "guard.trace": {"torch"},
}


def layer_of(module: str) -> str:
    """The layer that a dotted module name belongs to: `guard.policy.load` is in `guard.policy`."""
    package, _, rest = module.partition(".")
    if package == "guard" and rest:
        return f"guard.{rest.partition('.')[0]}"
    return package


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, as the module of that name, imports against the rules, a line of text each."""
    layer = layer_of(module)
    if layer not in LAYERS:
        return [f"{module}: {layer} has no place in LAYERS of this test; give it one"]
    found = []
    for line, name in imported_modules(source, module, is_package):
        target = layer_of(name)
        if name.partition(".")[0] == "guard" and target not in LAYERS:
            target = "guard"  # `from guard import __version__`: a name in guard/__init__.py
        if target in LAYERS:
            allowed = target in LAYERS[layer] or target in {layer, "guard", "guard.errors"}
        else:
            top = name.partition(".")[0]
            no_vllm = set() if layer == "guard_vllm" else {"vllm", "guard_vllm"}
            allowed = top not in FOREIGN.get(layer, set()) | no_vllm
        if not allowed:
            found.append(f"{module}:{line} imports {name}, which {layer} may not")
    return found


def modules() -> Iterator[tuple[Path, str]]:
    for root, package in zip(SOURCE_ROOTS, ("guard", "guard_vllm"), strict=True):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_import_goes_the_allowed_way() -> None:
    seen = list(modules())
    assert any(name == "guard.policy.model" for _, name in seen), "the sources were not found"
    found = [
        line
        for path, name in seen
        for line in forbidden_imports(path.read_text("utf-8"), name, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("guard.policy.load", "from guard.program.compile import compile_policies"),
        ("guard.policy.load", "from guard import program"),
        ("guard.policy.load", "from ..program import compile"),
        ("guard.policy.load", "import numpy as np"),
        ("guard.policy.load", "import torch"),
        ("guard.program.compile", "import torch.nn"),
        ("guard.program.compile", "def f():\n    from guard.device import state"),
        ("guard.device.tap", "from guard.runtime import Guard"),
        ("guard.device.tap", "from guard.events.bus import Bus"),
        ("guard.events.bus", "from guard.device.readback import Readback"),
        ("guard.runtime", "from vllm.config import VllmConfig"),
        ("guard.runtime", "from guard_vllm.plugin import register"),
        ("guard.cli.serve", "def f():\n    import vllm"),
        ("guard.errors", "from guard.policy import model"),
        ("guard_vllm.plugin", "from guard.cli import main"),
        ("guard.newcomer", "import json"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert forbidden_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("guard.policy.load", "from guard.policy.model import Policy\nimport yaml"),
        ("guard.policy.load", "from .model import Policy"),
        ("guard.policy.load", "from guard.errors import GuardError"),
        ("guard.program.compile", "import numpy as np\nfrom guard.policy.model import Policy"),
        ("guard.device.tap", "import torch\nfrom guard.program.verdict import Verdict"),
        ("guard.runtime", "from guard.events.bus import Bus\nfrom guard.host import Host"),
        ("guard.cli.serve", "from guard import __version__\nfrom guard.runtime import Guard"),
        ("guard_vllm.plugin", "import vllm\nfrom guard.runtime import Guard"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert forbidden_imports(source, module) == []
