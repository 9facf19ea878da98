"""`torchquant search`: its commands, whose options and defaults are those of `SearchConfig`."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from torchquant.errors import require

ABOUT = "Choose quantizers layer by layer, within a budget of bytes, bits or bit operations."
MODEL = "A name of torchvision or timm, demo, or path/to/file.py:function."
OPTIONS = {
    "budget": "What the plan may cost, in quotes: 'bytes<=40kB', 'bits<=4,bitops<=2G'.",
    "data": "digits, cifar10, or a folder with train/ and test/.",
    "schemes": "Weight schemes by name, with commas, or whole specs. qss: AutoQNN's; otherwise clipq.",
    "bits": "Weight bits: 4 or 2,3,4 or 2-8. qss: 4; otherwise 2-8.",
    "acts": "A spec for activations; several, or one with {n}, to search them too.",
    "act_bits": "Bits that {n} in --acts stands for.",
    "fold_bn": "Quantize weights with their batch norm folded in.",
    "rules": "A YAML file with rules whose fields may be lists, instead of schemes and acts.",
    "latency": "A latency table in JSON, for a budget of latency.",
    "per": "layer: a choice for each; model: one for all.",
    "form": "The gradient of a width: interp, secant, step or stat.",
    "epochs": "Epochs of the search.",
    "arch_rate": "Learning rate of shares and widths; otherwise by the number of steps.",
    "temperature": "Of the Gumbel softmax at first; a tenth of it at the end.",
    "penalty": "Weight of going over a budget while searching.",
    "method": "How harm is measured: mse, kl, loss, hessian or fisher.",
    "solver": "ilp, dp or greedy.",
    "checkpoint": "A float state_dict to start from, instead of float training.",
    "float_epochs": "Epochs of float training; 0: none.",
    "retrain_epochs": "Epochs of training under the plan; 0: calibrate only.",
    "learning_rate": "Of float training; a third of it in the search and after it.",
    "calibration_batches": "Batches that ranges, and sensitivities, are measured on.",
    "seed": "Same seed, same numbers.",
}
LEARNED = tuple(name for name in OPTIONS if name not in ("method", "solver"))
MEASURED = tuple(
    name for name in OPTIONS if name not in ("per", "form", "epochs", "arch_rate", "temperature", "penalty")
)
STUDIED = tuple(name for name in LEARNED if name not in ("arch_rate", "temperature", "penalty"))


def build(explained: Callable[[], AbstractContextManager[None]]) -> Any:
    """The sub-application. `explained`: a context that turns errors raised on purpose into messages."""
    typer = require("typer", "cli")
    app = typer.Typer(help=ABOUT, no_args_is_help=True)

    def extra(name: str, kind: Any, default: Any, words: str) -> inspect.Parameter:
        return _option(typer, name, kind, default, words)

    out = extra("out", Path, Path("search_out"), "Folder for plan, checkpoints, report; a stopped run goes on.")
    device = extra("device", str | None, None, "cpu, cuda, ...")
    ranks = extra("distributed", bool, False, "This is one of several processes; start them with torchrun.")

    def run(kind: str) -> Callable[..., None]:
        def command(model: str, out: Path, device: str | None, distributed: bool = False, **options: Any) -> None:
            from torchquant.cli import _search

            with explained():
                _search.run(kind, model, options, out, device, distributed)

        return command

    def study(kind: str, model: str, out: Path, trials: int, storage: str | None, name: str, **options: Any) -> None:
        from torchquant.cli import _search

        with explained():
            _search.study(kind, model, options, out, trials, storage, name)

    qss, qpl, allocate = run("qss"), run("qpl"), run("allocate")
    qss.__doc__ = "Search a scheme for each layer, by gradient."
    qpl.__doc__ = "Learn a bit width for each layer, by gradient."
    allocate.__doc__ = "Give each layer the bits that harm least, by sensitivity."
    study.__doc__ = "Search again and again with other settings, which Optuna proposes; several machines can join."
    _sign(qss, typer, LEARNED, [out, device, ranks])
    _sign(qpl, typer, LEARNED, [out, device, ranks])
    _sign(allocate, typer, MEASURED, [out, device])
    kind = _parameter("kind", Annotated[str, typer.Argument(help="qss or qpl.")])
    trials = extra("trials", int, 20, "Finished trials that the study shall have, those of all machines together.")
    storage = extra("storage", str | None, None, "A URL, or a journal file; otherwise study.db in the folder.")
    name = extra("name", str, "search", "Of the study in the storage.")
    _sign(study, typer, STUDIED, [trials, storage, name, out], [kind])
    for name_of_command, command in (("qss", qss), ("qpl", qpl), ("allocate", allocate), ("study", study)):
        app.command(name_of_command)(command)
    return app


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(typer: Any, name: str, kind: Any, default: Any, words: str) -> inspect.Parameter:
    flag = (f"--{name.replace('_', '-')}",) if kind is bool else ()
    return _parameter(name, Annotated[kind, typer.Option(*flag, help=words)], default)


def _sign(
    command: Callable[..., None],
    typer: Any,
    names: Sequence[str],
    more: Sequence[inspect.Parameter],
    first: Sequence[inspect.Parameter] = (),
) -> None:
    """Give the command a signature: the model, these settings of a search, and more."""
    from torchquant.runs.search.settings import SearchConfig

    types, fields = get_type_hints(SearchConfig), SearchConfig.__dataclass_fields__
    parameters = [*first, _parameter("model", Annotated[str, typer.Argument(help=MODEL)])]
    parameters += [_option(typer, name, types[name], fields[name].default, OPTIONS[name]) for name in names]
    parameters += more
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
