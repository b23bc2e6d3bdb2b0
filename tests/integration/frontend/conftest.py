"""A real vLLM server with a tiny model, in which the stand-in blocks; started once per session."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from tests.integration.frontend.tiny_model import write_tiny_model
from tests.support.ports import free_port

_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[2]
_START_TIMEOUT_SECONDS = 240


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH from which vLLM loads the stand-in as it loads any plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copy(_HERE / "stand_in" / "block_stand_in.py", folder)
    metadata = folder / "block_stand_in-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: block_stand_in\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nblock_stand_in = block_stand_in:register\n"
    )
    return folder


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def api_key_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that knows two keys, one of them by its digest."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    digest = hashlib.sha256(b"sk-hidden").hexdigest()
    file.write_text(
        f"sk-plain: {{tenant: red-team}}\nsha256:{digest}: {{tenant: blue-team, tier: gold}}\n"
    )
    file.chmod(0o600)
    return file


@pytest.fixture(scope="session")
def vllm_env(plugin_path: Path, api_key_labels: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(plugin_path), str(_CHECKOUT), str(_CHECKOUT / "integrations" / "vllm")]
        ),
        "VLLM_PLUGINS": "block_stand_in",
        "TEST_API_KEY_LABELS": str(api_key_labels),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }


@pytest.fixture(scope="package")
def server(
    model_path: Path, vllm_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The server's address, without the /v1."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model_path), "--served-model-name", "tiny", "--enforce-eager"]
    command += ["--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=vllm_env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_healthy(address, process, log)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            if process.poll() is not None:
                break
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def messages_client(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        yield client
