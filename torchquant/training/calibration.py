"""Calibrate a model: let its observers see data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant._shown import some
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.range_observers._distributed import reduce_sum, world_size
from torchquant.training.batches import OnBatch, check_batches, count, inputs_of, place, progress_bar, taken
from torchquant.utils import qmodule_state, qmodules, set_qmodule_state


@checked
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    state: QModuleState = QModuleState.QUANT_EVAL,
    on_batch: OnBatch | None = None,
    with_targets: bool | None = None,
    show_progress: bool | None = None,
) -> int:
    """Let every observer in the model see batches, then set `state`. Returns the number of batches.

    A batch is the inputs of the model: a tensor, a tuple of arguments or a dictionary of keyword arguments; or an
    (inputs, targets) pair, whose targets are ignored. `with_targets`: whether batches are such pairs; None: a tuple of
    two is a pair if the forward does not take two arguments. At most `max_batches` are used. The model runs in eval
    mode, without gradients; afterwards each module has its former mode again. `device`: the device for the model and
    the batches; None: that of the model. `on_batch(n)` is called after n batches. `show_progress`: a progress bar;
    None: one if `on_batch` is not given, rich is installed, and the output is a terminal.

    Warns about quantizers that saw no data, by name: they cannot quantize; and about signs of activations that are +1
    for every value of the last batch, as behind a ReLU. Raises ConfigError if there are no batches, or if a batch can
    be both a pair and two arguments.

    >>> import torchquant as tq
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> images = torch.randn(8, 1, 6, 6)
    >>> model = tq.quantize(net, "w8a8", images)
    >>> tq.calibrate(model, images.split(4))
    2
    >>> tq.state_report(model)[0].state
    'QUANT_EVAL'
    """
    check_batches(batches, max_batches)
    where = place(model, device)
    n_batches = 0
    with (
        torch.no_grad(),
        in_mode(False, model),
        qmodule_state(model, QModuleState.CALIBRATION),
        progress_bar("calibrating", count(batches, max_batches), show_progress, on_batch) as advance,
    ):
        for batch in _on_all_ranks(taken(batches, max_batches, where, on_batch)):
            inputs = inputs_of(model, batch, n_batches, with_targets)
            call_with(model, inputs, "a batch")
            n_batches += 1
            advance()
    if n_batches == 0:
        raise ConfigError("there are no batches to calibrate on; give at least one")
    set_qmodule_state(model, state)
    _warn_of_unseen(model)
    _warn_of_constant_signs(model, inputs)
    return n_batches


def _on_all_ranks(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches as long as every rank of a process group has one. Raises ConfigError if others have more."""
    end = object()
    for batch in itertools.chain(batches, [end]):
        ended = int(reduce_sum(torch.tensor(int(batch is end))))
        if 0 < ended < world_size():
            raise ConfigError(
                f"{ended} of {world_size()} ranks have fewer batches than the others, and ranges are those of batches "
                "joined over all ranks; give every rank the same number"
            )
        if batch is not end:
            yield batch


def _warn_of_constant_signs(model: nn.Module, inputs: Any) -> None:
    """Warn of the signs of activations that are the same for all values of a batch, and so say nothing of them."""
    signs = {
        quantizer: f"{path or '(root)'} {site}"
        for path, module in qmodules(model)
        for site, quantizer in module.quantizers().items()
        if site in ACTIVATIONS and "sign" in getattr(quantizer, "traits", ()) and quantizer.is_ready
    }
    if not signs:
        return
    constant: dict[nn.Module, bool] = {}

    def look(quantizer: nn.Module, args: Any, quantized: Tensor) -> None:
        is_one = args[0].numel() > 1 and bool((quantized == quantized.flatten()[0]).all())
        constant[quantizer] = constant.get(quantizer, True) and is_one

    hooks = [quantizer.register_forward_hook(look) for quantizer in signs]
    try:
        with torch.no_grad(), in_mode(False, model), qmodule_state(model, QModuleState.BYPASSED):
            for _, module in qmodules(model):
                own = module.quantizers()
                if any(q in signs for q in own.values()) and all(
                    q.is_ready for s, q in own.items() if s in ACTIVATIONS
                ):
                    module.state = QModuleState.QUANT_EVAL_ACT_ONLY
            call_with(model, inputs, "a batch")
    finally:
        for hook in hooks:
            hook.remove()
    if found := [label for quantizer, label in signs.items() if constant.get(quantizer, False)]:
        warnings.warn(
            f"{len(found)} quantizers of activations give one value for all that they read: {some(found)}. The sign of "
            "what is never below 0, as behind a ReLU, is +1. Give these sites a scheme with a threshold, such as rsign "
            "or adabin_act, or put nn.Hardtanh or torchquant.training.RPReLU in place of the ReLU",
            stacklevel=4,  # above the wrapper that checks the arguments
        )


def _warn_of_unseen(model: nn.Module) -> None:
    unseen = [
        f"{path or '(root)'} {site}"
        for path, module in qmodules(model)
        for site, quantizer in module.quantizers().items()
        if not quantizer.is_ready
    ]
    if unseen:
        warnings.warn(
            f"{len(unseen)} quantizers saw no data in calibration and will raise UnobservedRangeError when they "
            f"quantize: {some(unseen)}. Calibrate on batches that reach them, or leave them out of the rules",
            stacklevel=4,  # above the wrapper that checks the arguments
        )
