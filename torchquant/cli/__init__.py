"""Build the command line: every file here is a command or a group of commands, without logic. Needs the extra `cli`."""

import importlib
import pkgutil
import sys
from importlib import metadata
from typing import Annotated, Any

from torchquant.errors import MissingDependencyError, require

__all__ = ["build_app", "main"]


def main() -> None:
    """Run `torchquant` or `python -m torchquant`; exits with 1 and a message if `typer` or `rich` is missing."""
    try:
        require("rich", "cli")
        app = build_app()
    except MissingDependencyError as error:
        sys.stderr.write(f"torchquant: {error}\n")
        raise SystemExit(1) from None
    app(prog_name="torchquant")


def build_app() -> Any:
    """Build the typer application with all commands. Raises MissingDependencyError without typer."""
    from torchquant.cli._options import typed

    typer = require("typer", "cli")
    app = typer.Typer(
        help="Quantization of PyTorch models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

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
    for name in sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")):
        module = importlib.import_module(f"{__name__}.{name}")
        if hasattr(module, "command"):
            app.command(name)(typed(module.command, typer))
            continue
        group = typer.Typer(help=module.ABOUT, no_args_is_help=True)
        for function in module.COMMANDS:
            group.command(function.__name__)(typed(function, typer))
        app.add_typer(group, name=name)
    return app
