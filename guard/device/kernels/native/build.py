"""The C++ of this folder, compiled once for each torch and compiler and kept for the next start.

With torch's headers, but not with its `cpp_extension.load`: that one waits for a lock file, and for
ever where the process that took it was killed. Here each process compiles for itself and renames what
it got.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MOE_GUARD_CACHE_DIR"
"""Folder for compiled kernels; by default `moe-guard` in the user's cache folder."""

_NAMES = ("distributions.cpp", "judge.cpp", "load.cpp", "python_calls.cpp", "route.cpp", "step.cpp")
_SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("distributions.h", "judge.h", "route.h"))
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # of evidence, some words hold smaller numbers
    "-fvisibility=default",
)
_LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")
_EXTENSION = "moe_guard_cpu"
"""As `python_calls.cpp` calls it."""


@cache
def library() -> ctypes.PyDLL | None:
    """The compiled library, its operations known to torch; None where it cannot be compiled, which is
    logged. Calls keep Python's lock: giving it up and getting it back takes longer than most of them.
    """
    path = _path()
    return None if path is None else ctypes.PyDLL(str(path))


@cache
def extension() -> ModuleType | None:
    """The functions of the library that are Python's own kind. None where Python's headers were not
    there to compile them, or where Python cannot load them, which is logged."""
    path = _path()
    if path is None or not _python_headers():
        return None
    loader = ExtensionFileLoader(_EXTENSION, str(path))
    spec = spec_from_loader(_EXTENSION, loader)
    assert spec is not None, "made for this loader"
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        logger.warning(
            "the kernels' functions for Python cannot be loaded, so ctypes calls them: %s", error
        )
        return None
    return module


@cache
def _path() -> Path | None:
    compiler = _compiler()
    if compiler is None:
        logger.info(
            "there is no C++ compiler (g++ or clang++, or the one that CXX names), so torch judges "
            "each step and routes masked rows, which takes longer"
        )
        return None
    try:
        path = _compiled(compiler)
        torch.ops.load_library(path)
        return path
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning(
            "the kernels for CPUs could not be compiled, so torch judges each step and routes masked "
            "rows, which takes longer; is %s complete? %s",
            compiler,
            str(said)[-2000:],
        )
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def _python_headers() -> list[str]:
    """Their folder; a system's Python may come without."""
    folder = sysconfig.get_path("include")
    return [folder] if Path(folder, "Python.h").exists() else []


def _cache_folder() -> Path:
    """Raises OSError where the user has none."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):
        raise OSError("this user has no home folder")
    return Path(caches) / "moe-guard"


def _compiled(compiler: str) -> Path:
    """Raises OSError or SubprocessError."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    sources = [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    parts = [*sources, *_FLAGS, version, torch.__version__, sys.version, *_python_headers()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        folder = _cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = folder / f"cpu-{digest}.so"
        if target.exists():
            return target
        descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="moe-guard-"))
        logger.info(
            "moe-guard compiles its kernels at each start, since it cannot keep them (%s). Let %s name "
            "a folder that can be written to",
            error,
            CACHE_VARIABLE,
        )
        target = folder / f"cpu-{digest}.so"
        descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        _compile(compiler, Path(unfinished))
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _compile(compiler: str, target: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.info("compiling MoE Guard's kernels for this CPU's torch, once")
    flags = [
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in [*include_paths(), *_python_headers()]),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch, source.stem).with_suffix(".o") for source in _SOURCES]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(_SOURCES, objects, strict=True)
        ]
        # Without -fopenmp here: threads are those of torch's own OpenMP, whatever its file is called.
        libraries = [*(f"-L{path}" for path in library_paths()), *_LIBRARIES]
        if _python_headers():
            libraries.append("-ltorch_python")
        commands.append([compiler, "-shared", *map(str, objects), "-o", str(target), *libraries])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
