"""The verbs, in the order of `--help`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankine.cli import care, look, make, take
from rankine.cli.launched import check_verb
from rankine.cli.logs import OPTION

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (make.plan, make.compress, make.compare, make.heal):
    app.command()(verb)
app.command("eval")(look.evaluate)
for verb in (look.inspect, look.generate, look.report, look.methods, take.export, take.demo):
    app.command()(verb)
app.command()(care.doctor)
app.command("new-method")(care.new_method)


def _version(asked: bool) -> None:
    if asked:
        from rankine import __version__

        typer.echo(f"rankine {__version__}")
        raise typer.Exit


@app.callback()
def rankine(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option(OPTION, help="on stderr one JSON object per line; may stand behind a verb"),
    ] = False,
) -> None:
    """Smaller neural networks by low-rank and structured factorizations.

    MODEL is a hub id, a local directory, or `embedded`, the small code model that comes along.
    Start with `rankine demo`, then `rankine compress MODEL --keep 0.7 -o OUT`.
    """
    check_verb(context.invoked_subcommand)
