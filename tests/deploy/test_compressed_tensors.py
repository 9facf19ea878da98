"""Files for compressed-tensors: loaded by transformers with the real library, they compute what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import export_compressed_tensors
from torchquant.errors import ConfigError, ExportError
from torchquant.utils import weight_slots

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 40}
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def quantized(net: nn.Module, *rules: dict[str, Any]) -> nn.Module:
    model = tq.quantize(net, list(rules), {"input_ids": IDS, "use_cache": False})
    tq.observe_weights(model)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return model


@pytest.mark.parametrize(
    ("weight", "tied"),
    [
        ("affine:4,symmetric=narrow/group=32", True),
        ("affine:4,symmetric=full/group=32", False),
        ("affine:8,symmetric=narrow/channel", True),
        ("affine:3,symmetric=narrow/channel", False),
        ("qfmt:8,signed", True),
    ],
)
@pytest.mark.parametrize("head", [False, True])
def test_transformers_loads_the_same_numbers(weight: str, tied: bool, head: bool, tmp_path: Path) -> None:
    rules = [{"types": ["Linear"], "weight": weight}, *([] if head else [{"names": ["lm_head"], "skip": True}])]
    model = quantized(llama(tied), *rules)
    folder = export_compressed_tensors(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, wanted, rtol=0, atol=0)
        text = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert text.shape == (2, 13)


@pytest.mark.parametrize("weight", ["affine:4/group=32", "affine:3/channel", "affine:8/channel"])
def test_the_library_reads_weights_with_zero_points(weight: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 5))
    model = tq.quantize(net, [{"names": ["0"], "weight": weight}], torch.ones(1, 64))
    tq.observe_weights(model)
    folder = export_compressed_tensors(model, tmp_path, config={})
    kept = load_file(folder / "model.safetensors")
    (group,) = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    state = {key.removeprefix("0."): tensor for key, tensor in kept.items() if key.startswith("0.weight_")}
    read = PackedQuantizationCompressor.decompress(state, QuantizationScheme(**group))["weight"]
    slot = next(iter(weight_slots(model)))
    assert torch.equal(read, slot.quantizer.quantize(slot.seen()))


def test_widths_may_differ_and_the_file_is_small(tmp_path: Path) -> None:
    rules = [
        {"types": ["Linear"], "weight": "affine:4,symmetric=narrow/group=32"},
        {"names": ["*.mlp.*"], "weight": "affine:8,symmetric=narrow/channel"},
        {"names": ["lm_head"], "skip": True},
    ]
    model = quantized(llama(True), *rules)
    folder = export_compressed_tensors(model, tmp_path)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model(input_ids=IDS, use_cache=False).logits)


def test_float_tensors_may_share_memory(tmp_path: Path) -> None:
    """Views of one tensor are written as what they are, also one that a transpose makes look like another."""
    from safetensors.torch import load_file

    net, table = nn.Sequential(nn.Linear(64, 8)), torch.arange(16.0).view(4, 4)
    views = {"table": table, "turned": table.T, "rows": table[:2], "wide": torch.ones(3, 1).expand(3, 2)}
    for name, view in views.items():
        net.register_buffer(name, view)
    model = tq.quantize(net, [{"weight": "affine:4/channel"}], torch.ones(1, 64))
    tq.observe_weights(model)
    kept = load_file(export_compressed_tensors(model, tmp_path, config={}) / "model.safetensors")
    for name, view in views.items():
        assert torch.equal(kept[name], view)


def test_what_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="layers.0.mlp.gate_proj: output is quantized"):
        export_compressed_tensors(quantized(llama(True), {"types": ["Linear"], "output": "affine:8"}), tmp_path)
    with pytest.raises(ExportError, match="model.embed_tokens.weight: Embedding with"):
        export_compressed_tensors(quantized(llama(True), {"weight": "affine:4/channel"}), tmp_path)
    with pytest.raises(ExportError, match="Linear with ESBQuantizer"):
        export_compressed_tensors(quantized(llama(True), {"types": ["Linear"], "weight": "esb:4,k=1"}), tmp_path)
    with pytest.raises(ExportError, match="q_proj.weight: Linear with AffineQuantizer"):
        export_compressed_tensors(
            quantized(llama(True), {"types": ["Linear"], "weight": "affine:10/channel"}), tmp_path
        )
    model = tq.quantize(nn.Linear(8, 8), [{"weight": "affine:4/channel"}])
    tq.observe_weights(model)
    with pytest.raises(ExportError, match="the model is one layer"):
        export_compressed_tensors(model, tmp_path, config={})
    model = tq.quantize(nn.Sequential(nn.Linear(8, 8)), [{"weight": "affine:4/channel"}], torch.ones(1, 8))
    tq.observe_weights(model)
    model.add_module("1", tq.quantize(nn.Linear(8, 8), [{"weight": "affine:4/channel"}]))
    with pytest.raises(ExportError, match="1.weight: Linear with AffineQuantizer .*has seen no data"):
        export_compressed_tensors(model, tmp_path, config={})
    with pytest.raises(ExportError, match="the weight is torch.bfloat16, .*Call model.float()"):
        export_compressed_tensors(model.bfloat16(), tmp_path, config={})
    with pytest.raises(ConfigError, match="give `config`"):
        export_compressed_tensors(model, tmp_path)
    assert not list(tmp_path.iterdir())
