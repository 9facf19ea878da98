"""Laws of what a quantizer remembers, and of what keeps, copies and compiles it."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from torchquant.quantizers._base import Quantizer
from torchquant.quantizers._laws.case import Case, Skip, require, same


def memoryless(case: Case) -> None:
    """What says it `is_memoryless` is not changed by the tensor it has just seen."""
    if not case.observed.is_memoryless:
        raise Skip("it averages over what it sees")
    again = copy.deepcopy(case.observed)
    again.pre_observe(case.sample)
    require(same(again(case.sample), case.observed(case.sample)), "the same tensor seen twice changes the output")


def settable(case: Case) -> None:
    """`set_numbers(**numbers())` changes nothing, also of a quantizer that has seen something else."""
    numbers = case.observed.numbers()
    if not numbers:
        return
    other = copy.deepcopy(case.fresh)
    other.pre_observe(case.sample * 3.7)
    other.set_numbers(**numbers)
    require(same(other(case.sample), case.observed(case.sample)), "other output with the same numbers")


def survives(case: Case) -> None:
    """state_dict (strict, weights only), deepcopy, pickle, `.double().float()` and `.half()` keep the output."""
    x, expected = case.sample, case.observed(case.sample)
    file = io.BytesIO()
    torch.save(case.observed.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(case.fresh)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    require(same(loaded(x), expected), "a state_dict loaded into a fresh quantizer changes the output")
    require(same(copy.deepcopy(case.observed)(x), expected), "deepcopy changes the output")
    require(same(pickle.loads(pickle.dumps(case.observed))(x), expected), "pickle changes the output")
    for name, move in {"double().float()": lambda q: q.double().float(), "half()": lambda q: q.half()}.items():
        require(same(move(copy.deepcopy(case.observed))(x), expected), f".{name} changes the output")


class _ObserveAndQuantize(nn.Module):
    def __init__(self, quantizer: Quantizer, observe: bool) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.observe = observe

    def forward(self, x: Tensor) -> Tensor:
        if self.observe:
            self.quantizer.pre_observe(x)
        y = self.quantizer(x)
        self.quantizer.post_observe(y)
        return y


def compiles(case: Case) -> None:
    """`torch.compile(fullgraph=True)` and `torch.export` give what eager gives."""
    for observe in (False, True):
        expected = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)(case.sample)
        module = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(case.sample)
        require(torch.equal(compiled, expected), f"the compiled result differs (observe={observe})")
        module = _ObserveAndQuantize(copy.deepcopy(case.observed), observe)
        exported = torch.export.export(module, (case.sample,)).module()(case.sample)
        require(torch.equal(exported, expected), f"the exported result differs (observe={observe})")
