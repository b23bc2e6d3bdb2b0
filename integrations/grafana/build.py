"""Writes the dashboards: `python -m integrations.grafana.build`; `--check` says which are stale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from integrations.grafana.health import health
from integrations.grafana.overview import overview
from integrations.grafana.policy import policy
from integrations.grafana.routing import routing

FOLDER = Path(__file__).with_name("dashboards")
DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "overview": overview,
    "policy": policy,
    "routing": routing,
    "health": health,
}


def texts() -> dict[Path, str]:
    """What each file should hold."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    return {
        FOLDER / f"moe-guard-{name}.json": encoder.encode(made().build()) + "\n"
        for name, made in DASHBOARDS.items()
    }


def stale() -> list[Path]:
    """Files that are not what this code makes, and files that it does not make."""
    wanted = texts()
    known = set(FOLDER.glob("*.json"))
    return sorted(
        {path for path, text in wanted.items() if path not in known or path.read_text("utf-8") != text}
        | (known - wanted.keys())
    )


def main(arguments: list[str]) -> None:
    if arguments == ["--check"]:
        if found := stale():
            sys.exit(f"stale: {', '.join(path.name for path in found)}")
        return
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
