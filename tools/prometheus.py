"""Prometheus itself, from Debian's package: its checker and a running server."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.ports import free_port
from tools.debian_package import unpacked

SHIPPED = Path(__file__).parents[1] / "integrations" / "deploy" / "compose" / "prometheus.yml"
_PACKAGE = "prometheus"
_START_TIMEOUT_S = 30.0
_POLL_S = 0.2


def program(name: str) -> str:
    """`prometheus` or `promtool`: this machine's own, or the package's, fetched at first use."""
    return shutil.which(name) or str(unpacked(_PACKAGE) / "usr" / "bin" / name)


def promtool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


class PromQLError(Exception):
    """Prometheus refused a query, and says why."""


class Prometheus:
    """The HTTP API of a server."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")

    def query(self, expr: str, *, at: float | None = None) -> list[dict[str, Any]]:
        """The samples that an expression gives, now or at a time. Raises PromQLError."""
        asked = {"query": expr} | ({} if at is None else {"time": str(at)})
        data: dict[str, Any] = self.get("query", asked)
        result = data["result"]
        return result if isinstance(result, list) else [result]

    def get(self, endpoint: str, parameters: Mapping[str, str]) -> Any:
        url = f"{self._base_url}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise PromQLError(json.load(error)["error"]) from error

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base_url}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def relabelling() -> list[dict[str, Any]]:
    """What the shipped scrape configuration does to metrics: `vllm_` becomes `vllm:` again."""
    (scrape,) = yaml.safe_load(SHIPPED.read_text("utf-8"))["scrape_configs"]
    relabel: list[dict[str, Any]] = scrape["metric_relabel_configs"]
    return relabel


@contextmanager
def running(
    folder: Path, targets: Sequence[str], rules: str, *, is_hasty: bool = False, scrape_s: int = 1
) -> Iterator[str]:
    """A Prometheus that scrapes targets (`host:port`) every `scrape_s`, and its base URL.

    rules: the text of a rule file; its groups are evaluated every second, whatever they say
    is_hasty: alerts fire at once, however long they say that they wait
    """
    document = yaml.safe_load(rules)
    for group in document["groups"]:
        group.pop("interval", None)
        for rule in group["rules"] if is_hasty else ():
            rule.pop("for", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(document))
    config = {
        "global": {"scrape_interval": f"{scrape_s}s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [
            {
                "job_name": "vllm",
                "static_configs": [{"targets": list(targets)}],
                "metric_relabel_configs": relabelling(),
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not Prometheus(f"http://{address}").is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "prometheus.log").read_text())
            time.sleep(_POLL_S)
        yield f"http://{address}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
