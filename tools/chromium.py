"""A headless Chromium from Debian's package, driven over its DevTools pipe: for tests of the live page
and its screenshots. Nothing is installed; libraries that the machine lacks are fetched beside it.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tools.debian_package import CACHE, DebianPackageError, unpacked

PACKAGE: Final = "chromium-headless-shell"
_PROGRAMS: Final = ("chromium", "chromium-headless-shell", "google-chrome")
_AT_3_AND_4: Final = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in enumerate(ends, 3):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Where Chromium looks for the ends of its pipe."""

_ANSWER_S: Final = 30.0
_POLL_S: Final = 0.05


class ChromiumError(Exception):
    """Chromium cannot be had here, or does not do what it is asked."""


def environment() -> tuple[str, dict[str, str]]:
    """The program, and the variables that it needs. Raises ChromiumError."""
    for name in _PROGRAMS:
        if (own := shutil.which(name)) is not None:
            return own, dict(os.environ)
    try:
        folders = _folders()
    except DebianPackageError as error:
        raise ChromiumError(str(error)) from error
    libraries = {str(path.parent) for folder in folders for path in folder.rglob("*.so*")}
    program = folders[0] / "usr" / "lib" / "chromium" / PACKAGE
    for folder in folders:
        for data in folder.glob("usr/lib/chromium/*.*"):  # which it looks for beside itself
            if not (beside := program.parent / data.name).exists():
                beside.symlink_to(data)
    return str(program), {**os.environ, "LD_LIBRARY_PATH": ":".join(sorted(libraries))}


def _folders() -> list[Path]:
    """Of Chromium and what it needs. Which packages these are is asked once, and kept."""
    kept = CACHE / f"{PACKAGE}.packages"
    if kept.exists():
        return [unpacked(name) for name in kept.read_text().split()]
    folders = list(_with_libraries(PACKAGE))
    kept.write_text(" ".join(folder.name for folder in folders))
    return folders


def _with_libraries(package: str) -> Iterator[Path]:
    """The package's folder, then those of the libraries that it needs and this machine lacks."""
    wanted, seen = [package], set[str]()
    while wanted:
        name = wanted.pop()
        if name not in seen and not _is_installed(name):
            yield unpacked(name)
            wanted += [one for one in _depends(name) if one.startswith(("lib", "chromium-common"))]
        seen.add(name)


def _is_installed(package: str) -> bool:
    asked = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    return _output(asked) == "installed"


def _depends(package: str) -> list[str]:
    lines = _output(["apt-cache", "depends", package]).splitlines()
    return [line.partition("Depends: ")[2] for line in lines if line.strip().startswith("Depends: ")]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise ChromiumError(f"{command[0]} is not here: {error.strerror}") from error
    return done.stdout.strip()


class Page:
    """One tab. Its methods wait for Chromium's answer, and raise ChromiumError where it refuses."""

    def __init__(self, to_chromium: int, from_chromium: int) -> None:
        self._to = to_chromium
        self._from = from_chromium
        self._ids = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._came = threading.Condition()
        self._is_gone = False
        self.complaints: list[str] = []
        """What the page's scripts threw, and what its content security policy refused."""
        threading.Thread(target=self._read, name="chromium", daemon=True).start()
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        with self._came:
            self._came.wait_for(lambda: number in self._answers or self._is_gone, _ANSWER_S)
            if number not in self._answers:
                raise ChromiumError(f"{method}: no answer within {_ANSWER_S:g} s")
            answer = self._answers.pop(number)
        if "error" in answer:
            raise ChromiumError(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise ChromiumError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 15.0) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise ChromiumError(f"not true within {timeout_s:g} s: {expression}")
            time.sleep(_POLL_S)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def type(self, selector: str, text: str) -> None:
        """As a keyboard would."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = "\r" if key == "Enter" else ""
            self.call(
                "Input.dispatchKeyEvent",
                **{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text},
            )

    def show_as(self, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, beyond the window too where whole."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._from, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for text in messages:
                self._take(json.loads(text))
        with self._came:
            self._is_gone = True
            self._came.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case None:
                with self._came:
                    self._answers[message["id"]] = message
                    self._came.notify_all()
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])


@contextmanager
def chromium_page() -> Iterator[Page]:
    """A fresh Chromium that ends with the block. Raises ChromiumError where there is none."""
    program, variables = environment()
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-proxy-server",
        ]
        ends = (str(command_read), str(answer_write))
        process = subprocess.Popen(
            [sys.executable, "-c", _AT_3_AND_4, *ends, program, *arguments],
            env=variables,
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        os.close(command_read)
        os.close(answer_write)
        try:
            yield _first_page(process, command_write, answer_read)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(command_write)
            if process.stderr is not None:
                process.stderr.close()


def _first_page(process: subprocess.Popen[bytes], to_chromium: int, from_chromium: int) -> Page:
    try:
        return Page(to_chromium, from_chromium)
    except (ChromiumError, BrokenPipeError) as error:
        process.terminate()
        assert process.stderr is not None
        raise ChromiumError(f"Chromium does not start: {process.stderr.read().decode()}") from error
