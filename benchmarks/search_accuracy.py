"""Accuracy of searched plans beside every single scheme and width, on real data, at the same training budget.

    python -m benchmarks.search_accuracy --jobs 2

Every row starts from the same float network of its seed and trains for the same number of epochs: a single scheme all
of them, a search the first part searching and the rest retraining its plan. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import write_json, write_whole
from torchquant.plan import QuantPlan
from torchquant.runs.compare.run import in_processes
from torchquant.runs.data import BATCH_SIZE, Digits, load_digits
from torchquant.runs.folder import keep_settings, output_folder, write_checkpoint
from torchquant.runs.loop import accuracy_on, calibrate, train
from torchquant.runs.networks import NETWORKS
from torchquant.search import PrecisionLearning, SchemeSearch, SearchSettings, default_candidates
from torchquant.search.allocation.assignment import allocate
from torchquant.search.allocation.sensitivities import sensitivity
from torchquant.search.learning.engine import Search

NETS = ("demo", "small_mobilenet")
ACTS = {"input": "affine:8", "output": "affine:8"}
LAST = {"position": "last", "output": None}
WIDTHS = "clipq:{n}/channel"
"""The scheme whose widths are learned and allocated."""


SEARCHES = ("qss", "qss-model", "qpl", "qpl-secant", "qss+qpl")
SCHEMES = ("qfmt", "residual", "vecq", "ul2q", "esb", "clipq", "pot", "zoomq")
"""The default candidates, but the residual one in its refined form."""
MIXED = ("clipq", "vecq", "ul2q", "residual")
"""The schemes that are learned together with their widths."""


@dataclass(frozen=True)
class Run:
    """One row's seed: a network, a way to choose, a mean weight width."""

    net: str
    kind: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.net}-{self.kind}-{self.bits}-seed{self.seed}"

    @property
    def form(self) -> str:
        return "secant" if self.kind.endswith("secant") else "interp"


@dataclass(frozen=True)
class Recipe:
    """The recipe of all rows. `search_epochs` of the `epochs` are used for the search."""

    float_epochs: int = 30
    epochs: int = 10
    search_epochs: int = 4
    float_rate: float = 8e-3
    rate: float = 3e-3
    test_copies: int = 8
    sensitivity_batches: int = 4


def schemes_of(bits: int) -> list[str]:
    return [spec.partition(":")[0] for spec in default_candidates(bits, SCHEMES)]


def runs_of(nets: Sequence[str], bits: Sequence[int], seeds: int, kinds: Sequence[str] | None) -> list[Run]:
    found = []
    for net in nets:
        for n in bits:
            for kind in [*schemes_of(n), *SEARCHES, "allocate"]:
                if kinds is None or kind in kinds:
                    found += [Run(net, kind, n, seed) for seed in range(seeds)]
    return found


def batches_of(data: Digits, seed: int, epoch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return list(data.train_batches(generator, BATCH_SIZE))


def search_of(run: Run, net: nn.Module, data: Digits, recipe: Recipe) -> Search:
    """Run the search of a row and return it."""
    settings: dict[str, Any] = {"epochs": recipe.search_epochs, "weight_rate": recipe.rate, "alternate": False}
    example = data.test_images[:2]
    stream = partial(batches_of, data, run.seed)
    if run.kind in ("qss", "qss-model"):
        rules = [{"weight": default_candidates(run.bits, SCHEMES), **ACTS}, LAST]
        own = SearchSettings(**settings, arch_rate=0.1, temperature=(1.0, 0.2))
        per = "model" if run.kind == "qss-model" else "layer"
        search: Search = SchemeSearch(net, rules, example, settings=own, per=per)
    else:
        specs = [WIDTHS] if run.kind.startswith("qpl") else [f"{name}:{{n}}/channel" for name in MIXED]
        own = SearchSettings(**settings, arch_rate=0.1, target=True, start_bits=run.bits + 2)
        rules = [{"weight": specs, **ACTS}, LAST]
        search = PrecisionLearning(net, rules, example, f"bits<={run.bits}", own, min_bits=1, form=run.form)
    search.run(stream)
    return search


def perform(run: Run, recipe: Recipe, folder: str) -> str:
    """Do one run and write its file."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    data = load_digits(run.seed, recipe.test_copies)
    net = NETWORKS[run.net].build(data)
    net.load_state_dict(torch.load(float_path(Path(folder), run.net, run.seed), weights_only=True))
    float_accuracy = accuracy_on(net.eval(), data)
    example = data.test_images[:2]
    search = search_of(run, net, data, recipe) if run.kind in SEARCHES else None
    if search is not None:
        plan = search.derive()
    elif run.kind == "allocate":
        few = batches_of(data, run.seed, 0)[: recipe.sensitivity_batches]
        rules = [{"weight": WIDTHS, **ACTS}, LAST]
        degradations = sensitivity(net, rules, example, few, method="kl", min_bits=1)
        plan = allocate(net, rules, example, f"bits<={run.bits}", degradations, min_bits=1).plan
    else:
        spec = next(s for s in default_candidates(run.bits, SCHEMES) if s.partition(":")[0] == run.kind)
        plan = QuantPlan.from_rules([{"weight": spec, **ACTS}, LAST], net, example)
    cost = plan.cost(net, example)
    if search is not None:
        model = search.retrain(
            lambda epoch: batches_of(data, run.seed, recipe.search_epochs + epoch), recipe.epochs - recipe.search_epochs
        )
    else:
        torch.manual_seed(run.seed)
        model = plan.apply(net)
        calibrate(model, data, 8, run.seed)
        train(model, data, recipe.epochs, recipe.rate, run.seed, quantized=True)
    elements = {site.path: net.get_parameter(f"{site.path}.weight").numel() for site in cost if site.weight_bits}
    bits = sum(elements[site.path] * site.weight_bits for site in cost if site.weight_bits)
    result = {
        **asdict(run),
        "accuracy": accuracy_on(model, data),
        "float_accuracy": float_accuracy,
        "weight_bytes": cost.weight_bytes,
        "mean_bits": bits / sum(elements.values()),
        "weights": {site.path: site.weight for site in plan.sites if site.weight is not None},
    }
    write_json(Path(folder) / "runs" / f"{run.name}.json", result)
    return f"{run.name}: {result['accuracy']:.2%}"


def float_path(folder: Path, net: str, seed: int) -> Path:
    return folder / f"float-{net}-seed{seed}.pt"


def train_float(net: str, seed: int, recipe: Recipe, folder: str) -> str:
    path = float_path(Path(folder), net, seed)
    if not path.exists():
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        data = load_digits(seed, recipe.test_copies)
        network = NETWORKS[net].build(data)
        train(network, data, recipe.float_epochs, recipe.float_rate, seed)
        write_checkpoint(path, network)
    return path.name


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield Markdown, one table per network: mean accuracy over the seeds, +- standard deviation, by weight width."""
    for net in dict.fromkeys(r["net"] for r in results):
        ours = [r for r in results if r["net"] == net]
        floats = {r["seed"]: r["float_accuracy"] for r in ours}
        widths = sorted({r["bits"] for r in ours})
        yield f"### {net}\n\nFloat: {statistics.mean(floats.values()):.2%}.\n"
        yield "| weights | " + " | ".join(f"{n} bits | bytes" for n in widths) + " |"
        yield "|---|" + "---|" * (2 * len(widths))
        for kind in dict.fromkeys(r["kind"] for r in ours):
            cells = []
            for n in widths:
                found = [r for r in ours if r["kind"] == kind and r["bits"] == n]
                scores = [r["accuracy"] for r in found]
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                cells.append(f"{statistics.mean(scores):.2%} +- {spread:.2%}" if scores else "")
                cells.append(f"{statistics.mean(r['weight_bytes'] for r in found):,.0f}" if scores else "")
            yield f"| {kind} | " + " | ".join(cells) + " |"
        yield ""


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    options.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--kinds", nargs="+", help="only these rows")
    options.add_argument("--float-epochs", type=int, default=Recipe.float_epochs)
    options.add_argument("--epochs", type=int, default=Recipe.epochs)
    options.add_argument("--search-epochs", type=int, default=Recipe.search_epochs)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path("search_out"))
    given = options.parse_args(argv)
    recipe = Recipe(given.float_epochs, given.epochs, given.search_epochs)
    folder = str(output_folder(given.out / "runs").parent)
    keep_settings(given.out / "recipe.json", asdict(recipe), "runs of another recipe", "recipe", (), print)
    wanted = [(net, seed, recipe, folder) for net in given.nets for seed in range(given.seeds)]
    for _ in in_processes(train_float, wanted, given.jobs):
        pass
    runs = runs_of(given.nets, given.bits, given.seeds, given.kinds)
    missing = [(run, recipe, folder) for run in runs if not (Path(folder) / "runs" / f"{run.name}.json").exists()]
    for line in in_processes(perform, missing, given.jobs):
        print(line, flush=True)
    files = [Path(folder) / "runs" / f"{run.name}.json" for run in runs]
    results = [json.loads(path.read_text()) for path in files if path.exists()]
    text = "\n".join(table(results)) + "\n"
    print(text)
    write_json(given.out / "results.json", results)
    write_whole(given.out / "results.md", lambda path: path.write_text(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
