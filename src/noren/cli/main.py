"""The console's entry: registers the commands, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 wrong input (ConfigError), 3 a model that cannot be read or cut (ModelError), 4 a peer that cannot
be reached (LinkError), 5 a peer that refused (PeerError), 130 interrupted. torch and transformers are imported inside
the commands that need them, so that `noren --help` is instant.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from noren import __version__
from noren.errors import ConfigError, LinkError, ModelError, NorenError, PeerError, Unreachable

COMMANDS = ("plan", "check", "slice", "serve", "status", "train", "generate", "chat", "demo")
"""Each is the function of that name in the module of that name, in this package."""

EXIT_CODES: tuple[tuple[type[NorenError], int], ...] = (
    (ConfigError, 2),
    (ModelError, 3),
    (LinkError, 4),
    (Unreachable, 4),
    (PeerError, 5),
)


def share_the_processor() -> None:
    """Let compute threads that wait for work sleep soon, instead of spinning for milliseconds (torch's OpenMP).

    While one party waits for another's answer on the same machine, spinning threads would take the processor from it:
    decoding over loopback on two cores was a third slower. Must be called before torch is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class Commands(TyperGroup):
    """The commands, with errors that were raised on purpose made sentences."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which one meets them: keys first, then as in `COMMANDS`."""
        order = {name: place for place, name in enumerate(("keys", *COMMANDS))}
        return sorted(self.commands, key=lambda name: order.get(name, len(order)))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except NorenError as error:
            tell(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def exit_code(error: NorenError) -> int:
    """Return the exit code of an error, by its class."""
    return next((code for cls, code in EXIT_CODES if isinstance(error, cls)), 1)


def tell(error: NorenError) -> None:
    """Print an error to stderr: as a sentence, or as a JSON object if the command was asked for JSON."""
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}), err=True)
    else:
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)


def quiet(verbose: bool) -> None:
    """Settle how much the libraries below say: their warnings and progress bars only if `verbose`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("noren").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")


app = typer.Typer(
    name="noren",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"noren {__version__}")
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show logs and the libraries' warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One large language model, cut across parties that do not share their data."""
    quiet(verbose)


def register() -> None:
    """Add every command to `app`."""
    app.add_typer(import_module("noren.cli.keys").app, name="keys")
    for name in COMMANDS:
        if find_spec(place := f"noren.cli.{name}") is not None:
            app.command(name)(getattr(import_module(place), name))


def run() -> None:
    """The console's entry."""
    share_the_processor()
    register()
    app()


if __name__ == "__main__":
    run()
