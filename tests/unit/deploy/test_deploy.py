"""The compose file and the Kubernetes manifests: valid, least privilege, and commands that parse."""

from __future__ import annotations

import importlib.resources
import ipaddress
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry, start_http_server
from typer.testing import CliRunner

from guard.cli import app
from guard.cli.server import GuardedServer, ServerError, ServerSettings
from guard.events.message import Health
from guard.events.metrics import GuardMetrics
from guard.policy import load_policies
from tests.support.ports import free_port
from tests.support.synthetic_metrics import HELLO
from tools.prometheus import promtool
from tools.promql_check import ROOT

DEPLOY = ROOT / "integrations" / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text("utf-8"))
MANIFESTS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in (DEPLOY / "kubernetes").glob("*.yaml")
}
POD = MANIFESTS["deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBE = DEPLOY / "guard_ready.py"
KUBERNETES = ("1.29", "1.34")


def resolved(text: str) -> str:
    """A compose value with nothing set: `${NAME:-default}`."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


COMMANDS = {
    "compose": [resolved(word) for word in COMPOSE["services"]["vllm"]["command"]],
    "kubernetes": CONTAINER["args"],
}


def asked_for(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[ServerSettings | None, str]:
    """What `moe-guard` would start, and what it said."""
    started: list[ServerSettings] = []

    def start(settings: ServerSettings) -> NoReturn:
        started.append(settings)
        raise ServerError("nothing is started here")

    monkeypatch.setattr(GuardedServer, "start", start)
    said = CliRunner().invoke(app, words)
    return (started[0] if started else None), said.output


@pytest.mark.parametrize("place", COMMANDS)
def test_a_command_is_one_of_moe_guard(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = asked_for(COMMANDS[place], monkeypatch)

    assert settings == ServerSettings(
        model="Qwen/Qwen3-30B-A3B",
        policies=Path("/etc/moe-guard/policies"),
        decision_log=Path("/var/log/moe-guard/decisions.jsonl"),
        vllm_args=("--host", "0.0.0.0", "--port", "8000"),
    )


def test_a_command_that_is_not_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, said = asked_for(["serve", "m", "--polices", "p"], monkeypatch)

    assert settings is None
    assert "--policies" in said


def test_the_compose_file_is_valid() -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((vendored / "compose-spec.json").read_text("utf-8"))
    validator = Draft202012Validator(schema)

    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    broken = {"services": {"vllm": {"image": "x", "volume": []}}}
    assert [error.message for error in validator.iter_errors(broken)]


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_a_service_runs_with_least_privilege(service: str) -> None:
    spec = COMPOSE["services"][service]

    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"]
    assert "cap_add" not in spec
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in spec["ports"])
    user = spec.get("user") or re.search(
        r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE
    )
    assert user
    assert not str(user).startswith("0")


def test_the_compose_file_mounts_what_there_is() -> None:
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = re.match(r"(\$\{[^}]*\}|[^:])+", mount)
            assert source is not None
            path = resolved(source[0])
            if path.startswith("."):
                assert (DEPLOY / "compose" / path).exists(), path
            else:
                assert path in COMPOSE["volumes"]


def test_prometheus_takes_its_configuration() -> None:
    done = promtool("check", "config", "--syntax-only", DEPLOY / "compose" / "prometheus.yml")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", sorted(MANIFESTS.keys() - {"servicemonitor"}))
def test_a_manifest_is_valid(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_a_manifest_that_is_not_is_refused() -> None:
    broken = {**MANIFESTS["service"], "spec": {"selectors": {}}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


def test_the_pod_runs_with_least_privilege() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] > 0
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & POD.keys()
    assert not {"hostPort"} & {key for port in CONTAINER["ports"] for key in port}
    assert not [volume for volume in POD["volumes"] if "hostPath" in volume]


def test_what_the_pod_may_use_up_is_limited() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}

    assert {"memory", "nvidia.com/gpu", "ephemeral-storage"} <= CONTAINER["resources"]["limits"].keys()
    assert "cpu" in CONTAINER["resources"]["requests"]
    for name in ("tmp", "shm", "decisions"):
        assert volumes[name]["emptyDir"]["sizeLimit"], name


def test_nobody_reaches_the_port_but_who_is_named() -> None:
    spec = MANIFESTS["networkpolicy"]["spec"]
    (ingress,) = spec["ingress"]
    labels = MANIFESTS["deployment"]["spec"]["template"]["metadata"]["labels"]

    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert [port["port"] for port in ingress["ports"]] == [port["name"] for port in CONTAINER["ports"]]
    assert ingress["from"], "without it, from everywhere"
    for peer in ingress["from"]:
        (selector,) = peer.values()
        assert selector["matchLabels"], "an empty selector is everyone"


def test_the_pod_may_ask_for_names_and_talk_tls_but_not_to_the_clouds_metadata() -> None:
    rules = MANIFESTS["networkpolicy"]["spec"]["egress"]
    blocks = [to["ipBlock"] for rule in rules for to in rule["to"] if "ipBlock" in to]

    assert {port["port"] for rule in rules for port in rule["ports"]} == {53, 443}
    assert all(rule["to"] for rule in rules)
    for address in ("169.254.169.254", "fd00:ec2::254"):
        reached = [
            block
            for block in blocks
            if _holds(block["cidr"], address)
            and not any(_holds(net, address) for net in block["except"])
        ]
        assert reached == [], address


def _holds(network: str, address: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def test_the_pod_mounts_what_there_is_and_folders_of_policies_whole() -> None:
    maps = {doc["metadata"]["name"] for doc in MANIFESTS.values() if doc["kind"] == "ConfigMap"}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}

    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} == maps
    assert not [mount for mount in CONTAINER["volumeMounts"] if "subPath" in mount]


def test_what_the_guard_writes_is_on_volumes() -> None:
    variables = dict(re.findall(r"(\w+)=(/\S+)", (DEPLOY / "Dockerfile").read_text()))
    mounted = [mount["mountPath"] for mount in CONTAINER["volumeMounts"] if "readOnly" not in mount]

    assert {"HOME", "HF_HOME", "TRITON_CACHE_DIR", "MOE_GUARD_CACHE_DIR"} <= variables.keys()
    for path in [*variables.values(), "/var/log/moe-guard/decisions.jsonl", "/tmp/x"]:
        assert any(path == folder or path.startswith(f"{folder}/") for folder in mounted), path


def test_probes_ask_for_the_guard() -> None:
    script = ["python3", "/etc/moe-guard/probe/guard_ready.py"]

    assert CONTAINER["readinessProbe"]["exec"]["command"] == script
    assert CONTAINER["livenessProbe"]["exec"]["command"] == script
    assert CONTAINER["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert MANIFESTS["probe"]["data"]["guard_ready.py"] == PROBE.read_text("utf-8")
    assert COMPOSE["services"]["vllm"]["healthcheck"]["test"][-1] == "/etc/moe-guard/guard_ready.py"


@contextmanager
def serving(registry: CollectorRegistry) -> Iterator[str]:
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def probe(url: str) -> int:
    environment = {"MOE_GUARD_METRICS": url}
    return subprocess.run([sys.executable, str(PROBE)], env=environment, timeout=30).returncode


def test_the_probe_passes_while_every_engines_guard_is_up() -> None:
    registry = CollectorRegistry()
    with serving(registry) as url:
        assert probe(url) == 1  # no guard at all
        metrics = GuardMetrics("m", registry)
        metrics.greet(HELLO)
        assert probe(url) == 0
        metrics.tell(Health(0, False, 2))
        assert probe(url) == 1
    assert probe(url) == 1  # nobody answers


def test_the_policies_are_ones_and_the_same_in_both() -> None:
    (path,) = (DEPLOY / "policies").iterdir()

    assert len(load_policies(path).policies) == 1
    assert MANIFESTS["policies"]["data"] == {path.name: path.read_text("utf-8")}


def test_prometheus_finds_the_pods() -> None:
    """There is no schema of this kind to be had here, so it is compared with what it selects."""
    monitor, service = MANIFESTS["servicemonitor"], MANIFESTS["service"]
    (endpoint,) = monitor["spec"]["endpoints"]
    (port,) = service["spec"]["ports"]
    labels = MANIFESTS["deployment"]["spec"]["template"]["metadata"]["labels"]

    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(endpoint) <= {"port", "path", "interval", "metricRelabelings"}
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] == port["name"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert port["targetPort"] in {exposed["name"] for exposed in CONTAINER["ports"]}


def test_both_give_vllms_metrics_their_names_back() -> None:
    (scrape,) = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())["scrape_configs"]
    (compose,) = scrape["metric_relabel_configs"]
    (operator,) = MANIFESTS["servicemonitor"]["spec"]["endpoints"][0]["metricRelabelings"]

    def snake(name: str) -> str:
        return re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)

    assert {snake(key): value for key, value in operator.items()} == compose


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    needed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"])
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}

    allowed = [
        line.removeprefix("!")
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]

    for path in needed:
        assert any(path == kept or path.startswith(f"{kept}/") for kept in allowed), path
    assert all((ROOT / kept).exists() for kept in allowed)
