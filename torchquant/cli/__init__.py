"""The command line. Commands hold no logic of their own. Needs the extra `cli`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from torchquant.cli import _search_app
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

    @contextmanager
    def explained() -> Iterator[None]:
        """One line and exit status 1 in place of an error that torchquant raised on purpose, or the system."""
        try:
            yield
        except (TorchQuantError, OSError) as error:
            typer.echo(f"torchquant: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    checkpoint_option = Annotated[
        str | None, typer.Option(help="A float state_dict to start from, instead of float training.")
    ]
    data_option = Annotated[str, typer.Option(help="digits, cifar10, or a folder with train/ and test/.")]

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
        with explained():
            _demo(out, seed, quick)

    def schemes(
        name: Annotated[str | None, typer.Argument(help="One scheme, or one of its further names.")] = None,
        markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/schemes.md.")] = False,
    ) -> None:
        """Show the quantization schemes a spec string can name."""
        from torchquant.cli import _schemes

        with explained():
            typer.echo(_schemes.markdown(), nl=False) if markdown else _schemes.show(name)

    def operators(
        name: Annotated[str | None, typer.Argument(help="One operator, or a function or method that it is.")] = None,
    ) -> None:
        """Show the operators that quantization knows: in plans, in integers, in ONNX files."""
        from torchquant.cli import _operators

        with explained():
            _operators.show(name)

    def compare(
        schemes: Annotated[str, typer.Option(help="Schemes by name, with commas, or all.")] = "all",
        bits: Annotated[str, typer.Option(help="Weight bits, with commas.")] = "2,3,4,8",
        acts: Annotated[str, typer.Option(help="Activation bits, with commas.")] = "8",
        seeds: Annotated[int, typer.Option(help="Runs of each case, with seeds 0, 1, ...")] = 3,
        epochs: Annotated[int, typer.Option(help="Epochs of quantization-aware training; 0: calibrate only.")] = 10,
        float_epochs: Annotated[int, typer.Option(help="Epochs of float training.")] = 30,
        model: Annotated[str, typer.Option(help="demo, resnet18, mobilenet_v2, efficientnet_b0, ...")] = "demo",
        data: data_option = "digits",
        checkpoint: checkpoint_option = None,
        jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
        plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with quantizers of yours.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for runs and leaderboard; a stopped run goes on.")] = Path(
            "compare_out"
        ),
    ) -> None:
        """Train every scheme in the same recipe and write a leaderboard."""
        from torchquant.cli import _compare

        chosen = [name for name in schemes.split(",") if name]
        recipe: dict[str, Any] = {"model": model, "data": data, "epochs": epochs, "float_epochs": float_epochs}
        recipe |= {} if checkpoint is None else {"checkpoint": checkpoint}
        with explained():
            _compare.run(chosen, bits, acts, seeds, recipe, jobs, plugin or [], out)

    def quantize(
        model: Annotated[str, typer.Argument(help="A name of torchvision or timm, demo, or path/to/file.py:function.")],
        rules: Annotated[str, typer.Option(help="A ready set (w8a8, w4a4-lsq, ...), or a YAML file.")] = "w8a8",
        data: data_option = "digits",
        mode: Annotated[str, typer.Option(help="ptq: calibrate; qat: train too.")] = "ptq",
        checkpoint: checkpoint_option = None,
        float_epochs: Annotated[int, typer.Option(help="Epochs of float training; 0: none.")] = 30,
        epochs: Annotated[int, typer.Option(help="Epochs of quantization-aware training.")] = 10,
        learning_rate: Annotated[float, typer.Option(help="Of float training; a third of it for qat.")] = 1e-3,
        seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
        out: Annotated[Path, typer.Option(help="Folder for plan, checkpoints, results; a stopped run goes on.")] = Path(
            "quantize_out"
        ),
        strict: Annotated[bool, typer.Option("--strict", help="Fail if more stays float than the rules ask.")] = False,
    ) -> None:
        """Quantize any model: plan, calibrate, train, evaluate."""
        from torchquant.cli import _quantize

        options: dict[str, Any] = {"rules": rules, "data": data, "mode": mode, "checkpoint": checkpoint, "seed": seed}
        options |= {"float_epochs": float_epochs, "epochs": epochs, "learning_rate": learning_rate}
        with explained():
            _quantize.run(model, options, out, strict)

    def size(
        paths: Annotated[list[Path], typer.Argument(help="Checkpoints, packed models, ONNX files; folders of them.")],
        json: Annotated[Path | None, typer.Option("--json", help="Also write the table to this JSON file.")] = None,
        csv: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this CSV file.")] = None,
    ) -> None:
        """Compare the bytes of model files with the float one's."""
        from torchquant.cli import _size

        with explained():
            _size.run(paths, json, csv)

    run_argument = Annotated[Path, typer.Argument(help="Folder of a finished `torchquant quantize` run, or search.")]
    samples_option = Annotated[int, typer.Option(min=1, help="How many test images to compare on.")]

    def export(
        run: run_argument,
        to: Annotated[str, typer.Option(help="onnx; packed: codes of their true width; integer: a report.")] = "onnx",
        certify: Annotated[bool, typer.Option("--certify", help="Compare every code with ONNX Runtime's.")] = False,
        samples: samples_option = 256,
        out: Annotated[Path | None, typer.Option(help="The file; otherwise one in the folder.")] = None,
    ) -> None:
        """Write the model of a run as a file that runs elsewhere."""
        from torchquant.cli import _export

        with explained():
            passed = _export.export(run, to, certify, samples, out)
        if not passed:
            raise typer.Exit(1)

    def certify(
        run: run_argument,
        onnx: Annotated[Path | None, typer.Option(help="The ONNX file; otherwise model.onnx in the folder.")] = None,
        samples: samples_option = 256,
    ) -> None:
        """Prove that an exported file computes what the model does; exit status 1 where it does not."""
        from torchquant.cli import _export

        with explained():
            passed = _export.certify(run, onnx, samples)
        if not passed:
            raise typer.Exit(1)

    app.callback()(root)
    app.command()(demo)
    app.command()(schemes)
    app.command()(operators)
    app.command()(compare)
    app.command()(quantize)
    app.command()(export)
    app.command()(certify)
    app.command()(size)
    app.add_typer(_search_app.build(explained), name="search")
    return app


def _demo(out: Path, seed: int, quick: bool) -> None:
    from torchquant.runs.console import Terminal
    from torchquant.runs.demo import DemoConfig, run_demo

    terminal = Terminal()
    result = run_demo(DemoConfig.preset(seed, quick), out, terminal)
    terminal.table("torchquant demo", *result.table())
    terminal.message(f"report: {out / 'report.html'}")
