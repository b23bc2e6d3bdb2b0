"""Exit code 0 while the server on this host serves and every engine's guard is up. For probes."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def is_ready(url: str) -> bool:
    """A server that shows no guard is not ready: its plugin is off, or failed to load."""
    try:
        with urllib.request.urlopen(url, timeout=4) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    up = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("moe_guard_up{")]
    return bool(up) and all(value == 1 for value in up)


if __name__ == "__main__":
    sys.exit(not is_ready(os.environ.get("MOE_GUARD_METRICS", "http://127.0.0.1:8000/metrics")))
