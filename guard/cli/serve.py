"""`moe-guard serve`: vLLM's own server with the guard in it, refused unless the guard is up."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail
from guard.cli.server import GuardedServer, ServerSettings
from guard.errors import GuardError
from guard.events.log.file import KEEP
from guard.source.remote import is_url


class LogSync(StrEnum):
    NEVER = "never"
    SECOND = "second"
    ALWAYS = "always"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model, as vLLM takes it.")],
    policies: Annotated[
        str, typer.Option(help="A policy file, a folder of them, or the URL of a bundle.")
    ],
    policy_key: Annotated[
        Path | None,
        typer.Option(
            help="The public keys of those who sign bundles: --policies is then a signed bundle, "
            "by URL or in a file, and nothing else is taken."
        ),
    ] = None,
    allow_rollback: Annotated[
        bool, typer.Option(help="Take a signed bundle that is older than the one last in force.")
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse to serve where the guard is not proved live.")
    ] = True,
    observe_only: Annotated[
        bool,
        typer.Option(help="Provision no masks: for models whose routers cannot be masked yet."),
    ] = False,
    mask_actions: Annotated[
        int,
        typer.Option(min=0, help="Room for so many mask actions, so that reloads can bring some."),
    ] = 64,
    reload: Annotated[
        bool, typer.Option(help="Put changed policies in force while the server runs; SIGHUP: at once.")
    ] = True,
    redact_reasons: Annotated[
        bool, typer.Option(help="Tell clients 'moe_guard', not which rule stopped a request.")
    ] = False,
    decision_log: Annotated[
        Path | None, typer.Option(help="A file that gets a JSON line for each decision.")
    ] = None,
    decision_log_max_mib: Annotated[
        float | None,
        typer.Option(help="Rotate the decision log at so many MiB; without it, it grows."),
    ] = None,
    decision_log_keep: Annotated[
        int, typer.Option(min=1, help="Keep so many rotated decision logs, FILE.1 the youngest.")
    ] = KEEP,
    decision_log_sync: Annotated[
        LogSync,
        typer.Option(help="When to wait for the disk: never, once a second, or after every line."),
    ] = LogSync.NEVER,
    decision_log_chain: Annotated[
        bool,
        typer.Option(help="Chain each line to the one before, for `moe-guard log verify`."),
    ] = True,
    decision_log_key: Annotated[
        Path | None,
        typer.Option(help="Seal the decision log with this key, from `moe-guard log key`."),
    ] = None,
    webhooks: Annotated[
        Path | None, typer.Option(help="A YAML file of URLs that are told of decisions.")
    ] = None,
    label_header: Annotated[
        list[str] | None,
        typer.Option(help="LABEL=HEADER: the header gives requests the label. May be repeated."),
    ] = None,
    api_key_labels: Annotated[
        Path | None, typer.Option(help="A YAML or JSON file that maps API keys to labels.")
    ] = None,
    admin_keys: Annotated[
        Path | None,
        typer.Option(
            help="A YAML or JSON file of keys for /guard/v1: `sha256:DIGEST: {name: alice, role: "
            "admin}`; without it there is no admin API."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps operators' masks and modes over restarts."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="A folder that gets a trace of every request's routing, for `moe-guard replay`. It is "
            "as sensitive as text."
        ),
    ] = None,
    record_sample: Annotated[
        float, typer.Option(help="Record this share of requests only, above 0 and up to 1.")
    ] = 1.0,
) -> None:
    """Serve MODEL with vLLM, guarded by policies. Any other option goes to vLLM as it is."""
    if model.startswith("-"):
        fail("name the model first: moe-guard serve MODEL --policies PATH, then what is for vLLM")
    headers = dict(_label_header(text) for text in label_header or ())
    settings = ServerSettings(
        model=model,
        policies=policies if is_url(policies) else Path(policies),
        policy_key=policy_key,
        allow_rollback=allow_rollback,
        strict=strict,
        observe_only=observe_only,
        mask_actions=mask_actions,
        reload=reload,
        redact_reasons=redact_reasons,
        decision_log=decision_log,
        decision_log_max_mib=decision_log_max_mib,
        decision_log_keep=decision_log_keep,
        decision_log_sync=decision_log_sync.value,
        decision_log_chain=decision_log_chain,
        decision_log_key=decision_log_key,
        webhooks=webhooks,
        label_headers=headers,
        api_key_labels=api_key_labels,
        admin_keys=admin_keys,
        state_dir=state_dir,
        record=record,
        record_sample=record_sample,
        vllm_args=tuple(context.args),
    )
    try:
        server = GuardedServer.start(settings)
        server.forward_signals()
        server.wait_until_guarded()
        err.print("MoE Guard is live; metrics: " + server.metrics_url, soft_wrap=True, markup=False)
        exit_code = server.wait()
    except GuardError as error:
        fail(error)
    raise typer.Exit(exit_code)


def _label_header(text: str) -> tuple[str, str]:
    label, equals, header = text.partition("=")
    if not (label and equals and header):
        fail(f"--label-header {text}: write LABEL=HEADER, for example tenant=x-tenant")
    return label, header
