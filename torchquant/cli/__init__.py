"""The command line. Commands hold no logic of their own. Needs the extra `cli`."""

import sys
from importlib import metadata
from pathlib import Path
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
    typer = require("typer", "cli")
    app = typer.Typer(help="Quantization of PyTorch models.", no_args_is_help=True, add_completion=False)

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

    def demo(
        out: Annotated[Path, typer.Option(help="Folder for the report, checkpoints, the ONNX file.")] = Path(
            "demo_out"
        ),
        seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
        quick: Annotated[bool, typer.Option("--quick", help="Train less: sooner done, lower accuracy.")] = False,
    ) -> None:
        """Train, quantize in six ways, export and compare, on handwritten digits."""
        try:
            _demo(out, seed, quick)
        except TorchQuantError as error:
            typer.echo(f"torchquant: {error}", err=True)
            raise typer.Exit(1) from None

    def schemes(
        name: Annotated[str | None, typer.Argument(help="One scheme, or one of its further names.")] = None,
        markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/schemes.md.")] = False,
    ) -> None:
        """Show the quantization schemes a spec string can name."""
        from torchquant.cli import _schemes

        try:
            typer.echo(_schemes.markdown(), nl=False) if markdown else _schemes.show(name)
        except TorchQuantError as error:
            typer.echo(f"torchquant: {error}", err=True)
            raise typer.Exit(1) from None

    app.callback()(root)
    app.command()(demo)
    app.command()(schemes)
    return app


def _demo(out: Path, seed: int, quick: bool) -> None:
    from torchquant.demo import DemoConfig, Terminal, run_demo

    terminal = Terminal()
    result = run_demo(DemoConfig.preset(seed, quick), out, terminal)
    terminal.table("torchquant demo", *result.table())
    terminal.message(f"report: {out / 'report.html'}")
