"""Padding tokens of encoders and decoders, which statistics leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.ptq.padding import Padding, paddings

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
DECODER_MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
IDS = torch.tensor([[5, 6, 7, 8, 0], [9, 4, 0, 0, 0]])


class Pair(nn.Module):
    """An encoder and a decoder that reads it, with one table and one width, so that no shape tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        x = torch.relu(self.first(self.table(input_ids)))
        y = torch.relu(self.second(self.table(decoder_input_ids)))
        return self.query(y) @ self.key(x).mT


def batch(**more: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS.flip(0), **more}


def test_each_module_has_the_padding_of_its_tokens() -> None:
    model = tq.quantize(Pair(), "w8a8", batch())
    (found,) = paddings(model, [batch(decoder_attention_mask=DECODER_MASK)])
    for name in ("table", "first", "key"):
        assert torch.equal(found.at(name), MASK.bool()), name  # type: ignore[arg-type]
    for name in ("second", "query"):
        assert torch.equal(found.at(name), DECODER_MASK.bool()), name  # type: ignore[arg-type]
    (found,) = paddings(model, [batch()])
    assert found.at("query") is None
    constant = batch(decoder_attention_mask=DECODER_MASK) | {"decoder_input_ids": torch.ones_like(IDS)}
    assert paddings(model, [constant])[0].of_decoder & {"table", "first", "key", "second", "query"} == {
        "second",
        "query",
    }


def test_batches_without_a_decoder_run_nothing() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            raise AssertionError

    model = Encoder()
    assert paddings(model, [torch.ones(2, 5)]) == [Padding()]
    for given in ((IDS, MASK), {"input_ids": IDS, "attention_mask": MASK}):
        (found,) = paddings(model, [given])
        assert torch.equal(found.at("any"), MASK.bool())  # type: ignore[arg-type]
    assert paddings(model, [{"input_ids": IDS, "attention_mask": MASK[:, None]}])[0].tokens is None


@pytest.mark.parametrize("stage", ["gptq", "smoothquant", pytest.param("brecq:steps=2", marks=pytest.mark.slow)])
def test_what_padding_holds_changes_nothing(stage: str) -> None:
    weights = []
    for filler in (0, 3):
        torch.manual_seed(0)
        model = tq.quantize(Pair(), [{"types": ["Linear"], "weight": "affine:3/channel", "input": "affine:8"}], batch())
        with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
            model(**batch())
        given = batch(decoder_attention_mask=DECODER_MASK)
        given["input_ids"] = torch.where(MASK.bool(), IDS, filler)
        given["decoder_input_ids"] = torch.where(DECODER_MASK.bool(), IDS.flip(0), filler)
        report = ptq.run(model, [stage], [given])
        weights.append([p.detach().clone() for p in model.parameters()])
        if stage == "gptq":
            assert {s.path: s.rows for s in report.steps} == {"first": 6, "key": 6, "second": 5, "query": 5}
    assert all(map(torch.equal, *weights))


@pytest.mark.slow
def test_t5_leaves_out_the_padding_of_both() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    net = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).eval()
    given = batch(decoder_attention_mask=DECODER_MASK, use_cache=False)
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:4/channel"}], given)
    rows = {step.path: step.rows for step in ptq.run(model, ["gptq"], [given]).steps}
    assert rows["encoder.block.0.layer.0.SelfAttention.q"] == rows["decoder.block.0.layer.1.EncDecAttention.k"] == 6
    assert rows["decoder.block.0.layer.0.SelfAttention.k"] == rows["decoder.block.0.layer.1.EncDecAttention.q"] == 5
