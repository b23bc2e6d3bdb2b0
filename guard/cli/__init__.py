"""The command `moe-guard`. Each subcommand has a file of its own; nothing heavy is imported here."""

from __future__ import annotations

import typer

from guard.cli.admin import kill_switch, mask, masks, mode, status, unmask
from guard.cli.bundle import bundle
from guard.cli.calibrate import calibrate
from guard.cli.causal import causal
from guard.cli.check import check
from guard.cli.demo import demo
from guard.cli.diff import diff
from guard.cli.discover import discover
from guard.cli.import_sets import import_sets
from guard.cli.log import log
from guard.cli.policy_tests import run_policy_tests
from guard.cli.record import record
from guard.cli.replay import replay
from guard.cli.report import report
from guard.cli.saliency import saliency
from guard.cli.serve import serve
from guard.cli.verify import verify

app = typer.Typer(
    name="moe-guard",
    help="Watch which experts each request is routed to in vLLM, and act on it by policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(check)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(demo)
app.command()(diff)
app.command("test")(run_policy_tests)
app.command()(replay)
app.command()(record)
app.command()(discover)
app.command()(calibrate)
app.command()(causal)
app.command()(report)
app.command("import")(import_sets)
app.command()(verify)
app.command()(status)
app.command()(mask)
app.command()(unmask)
app.command()(masks)
app.command()(mode)
app.command("kill-switch")(kill_switch)
app.command()(saliency)
app.add_typer(log, name="log")
app.add_typer(bundle, name="bundle")


def main() -> None:
    app()
