"""`moe-guard mask`, `unmask`, `masks` and the other commands over `/guard/v1` of a running server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

from guard.cli.output import err, fail, out

KEY_VARIABLE = "MOE_GUARD_ADMIN_KEY"
URL_VARIABLE = "MOE_GUARD_URL"
TIMEOUT_S = 120.0

ServerUrl = Annotated[
    str,
    typer.Option("--url", envvar=URL_VARIABLE, help="The server; its key is in MOE_GUARD_ADMIN_KEY."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


class MethodOption(StrEnum):
    REROUTE = "reroute"
    DROP = "drop"
    DROP_RENORM = "drop_renorm"


class ModeOption(StrEnum):
    OFF = "off"
    AUDIT = "audit"
    ENFORCE = "enforce"
    WRITTEN = "written"


def mask(
    experts: Annotated[list[str], typer.Argument(help="L12/E85, L12/E90-95; several are one mask.")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")],
    lasts: Annotated[
        str | None, typer.Option("--for", help="2h, 90m, 1d12h; without it until it is lifted.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE: only for requests with that label. May be given again."),
    ] = None,
    request: Annotated[str, typer.Option(help="Only for the request of that id.")] = "",
    method: Annotated[MethodOption, typer.Option(help="How.")] = MethodOption.REROUTE,
    url: ServerUrl = DEFAULT_URL,
) -> None:
    """Take experts out of use in a running server, now: requests in flight included.

    Refused where it cannot be honoured, with the layer, its live experts and k. Answered when every
    rank of every engine has it. A restart keeps it.
    """
    body: dict[str, Any] = {"experts": experts, "reason": reason, "method": method.value}
    if lasts is not None:
        body["duration"] = lasts
    if label:
        body["labels"] = dict(_label(text) for text in label)
    if request:
        body["request"] = request
    made = _call(url, "POST", "/masks", body)
    one = made["mask"]
    until = "until it is lifted" if one["until"] is None else f"until {one['until']}"
    _say(f"{one['id']}: {', '.join(one['experts'])} {until}; revision {made['revision']}")


def unmask(
    mask_id: Annotated[str, typer.Argument(help="As `moe-guard masks` shows it.")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")] = "",
    url: ServerUrl = DEFAULT_URL,
) -> None:
    """Lift an operator's mask."""
    query = urllib.parse.urlencode({"reason": reason})
    made = _call(url, "DELETE", f"/masks/{urllib.parse.quote(mask_id, safe='')}?{query}")
    _say(f"{mask_id}: lifted; revision {made['revision']}")


def masks(
    url: ServerUrl = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the operators' masks that are in force."""
    found = _call(url, "GET", "/masks")
    if as_json:
        out.print_json(json.dumps(found))
        return
    table = Table("mask", "experts", "for", "until", "by", "reason")
    for one in found:
        labels = ", ".join(f"{key}={value}" for key, value in one["labels"].items())
        whom = labels or one["request"] or "everyone"
        until = one["until"] or "lifted"
        table.add_row(one["id"], ", ".join(one["experts"]), whom, until, one["by"], one["reason"])
    out.print(table)


def status(
    url: ServerUrl = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a running server's guard has in force. Exits with 2 where it is not up."""
    found = _call(url, "GET", "/status")
    if as_json:
        out.print_json(json.dumps(found))
    else:
        kill_switch = (
            "; the kill switch is on: everything only observes" if found["kill_switch"] else ""
        )
        up = "up" if found["up"] else "NOT UP"
        _say(f"{up}, revision {found['revision']}, {len(found['policies'])} policies{kill_switch}")
        for engine in found["engines"]:
            blind = f", {engine['blind_layers']} blind layers" if engine["blind_layers"] else ""
            live = "live" if engine["live"] else "not live"
            _say(f"engine {engine['engine']}: {live}, revision {engine['revision']}{blind}")
        for policy, mode in found["modes"].items():
            _say(f"{policy}: {mode}, whatever its file says")
        _say(f"{len(found['masks'])} operators' masks")
    if not found["up"]:
        raise typer.Exit(2)


def mode(
    policy: Annotated[str, typer.Argument(help="Its name.")],
    to: Annotated[ModeOption, typer.Argument(help="`written`: as its file says.")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")],
    url: ServerUrl = DEFAULT_URL,
) -> None:
    """Set the mode of a policy in a running server, over what its file says."""
    body = {"mode": None if to is ModeOption.WRITTEN else to.value, "reason": reason}
    made = _call(url, "PUT", f"/policies/{urllib.parse.quote(policy, safe='')}/mode", body)
    _say(f"{policy}: {to.value}; revision {made['revision']}")


def kill_switch(
    on: Annotated[bool, typer.Option("--on/--off", help="On: everything only observes.")],
    reason: Annotated[str, typer.Option(help="Why; it stands in the audit log.")],
    url: ServerUrl = DEFAULT_URL,
) -> None:
    """Make every policy and every operator's mask only observe, or act again."""
    made = _call(url, "PUT", "/kill-switch", {"on": on, "reason": reason})
    _say(f"the kill switch is {'on' if on else 'off'}; revision {made['revision']}")


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        fail(f"--label {text}: write KEY=VALUE, for example tenant=acme")
    return key, value


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _call(url: str, method: str, path: str, body: object = None) -> Any:
    """What the server answers. Exits where it refuses."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        fail(
            f"the environment variable {KEY_VARIABLE} holds no key; the server's admin_keys names them"
        )
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        fail(f"--url {url}: give http:// or https://")
    request = urllib.request.Request(
        f"{url.rstrip('/')}/guard/v1{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        _refused(error)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        fail(f"{url} does not answer ({reason}); did it start, and is --url right?")


def _refused(error: urllib.error.HTTPError) -> NoReturn:
    text = error.read().decode(errors="replace")
    try:
        document = json.loads(text)
        message = document.get("error", {}).get("message") or document.get("detail") or text
    except (ValueError, AttributeError):
        message = text
    if error.code == 404 and message == "Not Found":
        message = (
            "the server has no /guard/v1: start it with --admin-keys and --state-dir, and with a "
            "VLLM_PLUGINS that names moe_guard"
        )
    err.print(f"{error.code}: {message}", soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(1)
