"""One step of a search over schemes, 4 bits: time, and bytes saved for backward, over plain QAT of the same model.

python -m benchmarks.search_step --out search_step.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from torch import nn

from benchmarks.command import finish, parser, start
from benchmarks.harness import compare
from benchmarks.models import build_float, fuse, image_batch
from benchmarks.qat_step import TrainingStep
from benchmarks.results import Report
from torchquant.qmodule import QModuleState
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.search.learning.mixture import MixtureQuantizer
from torchquant.search.space import default_candidates
from torchquant.utils import set_qmodule_state

WEIGHT = "affine:4,symmetric=narrow/channel"
OUTPUT = "affine:4"
WEIGHTS = default_candidates(4)
OUTPUTS = ("affine:4", "ul2q:4", "vecq:4", "clipq:4", "zoomq:4", "esb:4,k=1", "pot0:4", "pot:4")
MODELS = ("resnet18", "mobilenet_v2")
TIME_TARGET = 2.0
SAVED_TARGET = 1.5


def build(net: nn.Module, weights: Sequence[str], outputs: Sequence[str]) -> nn.Module:
    """A trainable copy of the float model that mixes `weights` at every weight and `outputs` at every output.

    A place with one spec string has that quantizer itself.
    """

    def at(site: str, specs: Sequence[str]) -> Callable[[nn.Module], Quantizer]:
        return lambda _: make_quantizer(specs[0], site) if len(specs) == 1 else MixtureQuantizer(list(specs), site)

    model = fuse(net, at("weight", weights), at("output", outputs))
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    return model


def measure(report: Report, name: str, options: argparse.Namespace) -> None:
    """Add the rows of one model."""
    net = build_float(name, options.size)
    images, labels = image_batch(options.batch, options.size)

    def step(weights: Sequence[str], outputs: Sequence[str]) -> TrainingStep:
        made = TrainingStep(build(net, weights, outputs), images, labels)
        made()  # ranges exist from here on
        return made

    base, control = (step([WEIGHT], [OUTPUT]) for _ in range(2))
    steps = {f"{n} weight{'s' * (n > 1)}": step(WEIGHTS[:n], [OUTPUT]) for n in options.candidates}
    if options.outputs:
        steps[f"{len(WEIGHTS)} weights, {len(options.outputs)} outputs"] = step(WEIGHTS, options.outputs)
    base_bytes = base.saved_bytes()
    saved = {row: made.saved_bytes() / base_bytes for row, made in steps.items()}
    comparison = compare(base, dict(steps), options.rounds, control)
    notes = {row: made.void_because() for row, made in steps.items()}
    report.add(name, comparison, saved, TIME_TARGET, SAVED_TARGET, notes)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(
        "Time and saved bytes of a search step, as ratios to plain QAT.", threads=2, rounds=9, adapters=False
    )
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--batch", type=int, default=32, help="images a step (%(default)s)")
    options.add_argument("--size", type=int, default=128, help="pixels a side (%(default)s)")
    options.add_argument(
        "--candidates", nargs="*", type=int, default=[1, 2, 4, 8], metavar="N", help="weight candidates (%(default)s)"
    )
    options.add_argument(
        "--outputs", nargs="*", default=list(OUTPUTS), metavar="SPEC", help="output candidates (%(default)s)"
    )
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 if a control failed."""
    options = arguments(argv)
    report = start("search_step", "step time over plain QAT, 4 bits, every layer", "saved/plain", options)
    for name in options.models:
        measure(report, name, options)
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
