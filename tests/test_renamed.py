"""Names of 0.1 that are called otherwise now: they go on working, and say so."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.qmodule import FloatCheckpoints, QWrapper
from torchquant.quantizers.dorefa import DoReFaQuantizer
from torchquant.search import Sensitivity

RENAMED = {
    "torchquant.qmodule": {
        "ActivationRow": "ActivationPattern",
        "InputFirstRow": "InputFirstPattern",
        "LayerRow": "LayerPattern",
        "speak_float": "link_float_state",
    },
    "torchquant.qmodules": {"LayerRow": "LayerPattern"},
    "torchquant.qmodule.patterns": {"LayerRow": "LayerPattern", "ActivationRow": "ActivationPattern"},
    "torchquant.qmodule.float_checkpoints": {"speak_float": "link_float_state"},
    "torchquant.graph": {"LeftFloat": "Unquantized", "Read": "SiteInput"},
    "torchquant.graph.sites": {"LeftFloat": "Unquantized", "Read": "SiteInput"},
}


@pytest.mark.parametrize(
    ("address", "old", "new"), [(a, *pair) for a, names in RENAMED.items() for pair in names.items()]
)
def test_an_old_name_is_the_new_one(address: str, old: str, new: str) -> None:
    module = importlib.import_module(address)
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.warns(DeprecationWarning, match=new):
        assert pickle.loads(f"c{address}\n{old}\n.".encode()) is getattr(module, new)


def test_a_name_that_never_was() -> None:
    with pytest.raises(AttributeError, match="module 'torchquant.graph' has no attribute 'Sight'"):
        importlib.import_module("torchquant.graph").Sight  # noqa: B018


def test_old_attributes() -> None:
    found = Sensitivity("mse", {("0", "weight"): (0.5, 0.1)}, {("0", "weight"): ("affine:2", "affine:4")})
    with pytest.warns(DeprecationWarning, match="Sensitivity.harms is called degradations now"):
        assert found.harms is found.degradations


def test_a_model_that_shares_keys_as_before() -> None:
    net = nn.Sequential(nn.Linear(3, 2))

    class Quantizable(FloatCheckpoints):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QWrapper([net[0]], None, None)
            self.share_keys(net)

    with pytest.warns(DeprecationWarning, match="share_keys is called link_float_state now"):
        model = Quantizable()
    assert list(model.float_state_dict()) == ["0.weight", "0.bias"]


def test_a_scheme_that_says_keeps_units() -> None:
    with pytest.warns(DeprecationWarning, match="Doubled.keeps_units is called is_idempotent now"):

        class Doubled(tq.Quantizer):
            n_bits = 8
            keeps_units = False

            def quantize(self, x: Tensor) -> Tensor:
                return 2 * x

    assert Doubled().is_idempotent is False
    with pytest.warns(DeprecationWarning, match="is_idempotent"):
        assert Doubled().keeps_units is False


def test_a_pickled_quantizer_that_says_keeps_units() -> None:
    x = torch.linspace(-1, 1, 9)
    quantizer = DoReFaQuantizer(4)
    quantizer.pre_observe(x)
    written = {("keeps_units" if k == "is_idempotent" else k): v for k, v in quantizer.__dict__.items()}
    read = DoReFaQuantizer.__new__(DoReFaQuantizer)
    read.__setstate__(written)
    assert read.is_idempotent is quantizer.is_idempotent is False
    assert torch.equal(read(x), quantizer(x))
