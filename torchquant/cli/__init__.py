"""The command line: one file a command. Commands hold no logic of their own. Needs the extra `cli`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

from torchquant.errors import MissingDependencyError, TorchQuantError, require

__all__ = ["build_app", "main"]


def main() -> None:
    """Entry of `torchquant` and `python -m torchquant`; exits with 1 and a message if `typer` or `rich` is missing."""
    try:
        require("rich", "cli")
        app = build_app()
    except MissingDependencyError as error:
        sys.stderr.write(f"torchquant: {error}\n")
        raise SystemExit(1) from None
    app(prog_name="torchquant")


def build_app() -> Any:
    """The typer application with all commands. Raises MissingDependencyError without typer."""
    from torchquant.cli import certify, compare, demo, export, operators, quantize, schemes, search, size
    from torchquant.cli._options import typed

    typer = require("typer", "cli")
    app = typer.Typer(help="Quantization of PyTorch models.", no_args_is_help=True, add_completion=False)

    @contextmanager
    def explained() -> Iterator[None]:
        """One line and exit status 1 in place of an error that torchquant raised on purpose, or the system."""
        try:
            yield
        except (TorchQuantError, OSError) as error:
            typer.echo(f"torchquant: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"torchquant {metadata.version('torchquant')}")
            raise typer.Exit

    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        """Quantization of PyTorch models."""

    app.callback()(root)
    for module in (demo, schemes, operators, compare, quantize, export, certify, size):
        app.command(module.__name__.rpartition(".")[2])(typed(module.command, typer, explained))
    searches = typer.Typer(help=search.ABOUT, no_args_is_help=True)
    for function in (search.qss, search.qpl, search.allocate, search.study):
        searches.command(function.__name__)(typed(function, typer, explained))
    app.add_typer(searches, name="search")
    return app
