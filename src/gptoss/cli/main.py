"""``gptoss COMMAND``: dispatch, and nothing else.

Exit status: 0 fine, 1 the world is wrong (files, memory, network), 2 the command line is wrong,
130 interrupted, 141 nobody reads our output any more (1, where that output is --help's).
"""

from typing import Annotated

import typer

from gptoss import __version__
from gptoss.cli import chat, convert, generate, inspect, models, synthesize
from gptoss.cli.endings import guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(guarded(generate.run))
app.command("chat")(guarded(chat.run))
app.command("inspect")(guarded(inspect.run))
app.command("convert")(guarded(convert.run))
app.command("synthesize")(guarded(synthesize.run))
app.command("models")(guarded(models.run))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gptoss {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """gpt-oss: run it, look into it, convert it."""


def main() -> None:
    """Run the command that ``sys.argv`` names; ends in SystemExit."""
    app(prog_name="gptoss")
