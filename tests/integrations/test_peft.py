"""Adapters of PEFT beside quantized layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchquant as tq
from tests.integrations.hf_nets import hf, inputs_of, made, output
from torchquant.errors import ConfigError
from torchquant.integrations import quantized_lora

peft = pytest.importorskip("peft")
TARGETS = {"untied": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"]}


def quantized(name: str = "untied", trace: bool = False) -> Any:
    net = made(name)
    inputs = inputs_of(net)
    model = tq.quantize(net, tq.QuantPlan.from_rules("w4a8", net, inputs, trace=trace))
    tq.calibrate(model, [inputs])
    return model


def from_codes(folder: Path, name: str = "untied") -> Any:
    model = quantized(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def adapted(model: Any, name: str = "untied", **options: Any) -> Any:
    targets = options.pop("target_modules", TARGETS[name])
    return peft.get_peft_model(model, quantized_lora(model, peft.LoraConfig(r=4, target_modules=targets, **options)))


def train(model: Any, inputs: dict[str, torch.Tensor], steps: int = 8) -> list[float]:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=0.03), []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
def test_adapters_train_and_the_model_stays(name: str, codes: bool, tmp_path: Path) -> None:
    model = from_codes(tmp_path / "q", name) if codes else quantized(name)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with_adapters = adapted(model, name)
    assert torch.equal(output(with_adapters.eval(), inputs), expected)  # adapters begin at zero
    losses = train(with_adapters, inputs)
    assert losses[-1] < losses[0] - 0.03
    assert all("lora_" in key for key, p in with_adapters.named_parameters() if p.requires_grad)
    now = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)
    with with_adapters.disable_adapter():
        assert torch.equal(output(with_adapters, inputs), expected)
    trained = output(with_adapters, inputs)
    with_adapters.save_pretrained(tmp_path / "adapter")
    again = from_codes(tmp_path / "q", name)
    config = quantized_lora(again, peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", config=config)
    assert torch.equal(output(loaded, inputs), trained)


def test_the_trainer_trains_adapters_beside_codes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = from_codes(tmp_path / "q")
    ids = inputs_of(model)["input_ids"]
    with_adapters = adapted(model)
    learned = {name: p.detach().clone() for name, p in with_adapters.named_parameters() if p.requires_grad}
    options = {"max_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    words = [{"input_ids": row, "labels": row} for row in ids]
    hf.Trainer(with_adapters, hf.TrainingArguments(str(tmp_path), **options), train_dataset=words).train()
    assert all(not torch.equal(with_adapters.get_parameter(name), before) for name, before in learned.items())


def test_merging_quantizes_anew_and_says_so() -> None:
    model = quantized()
    inputs = inputs_of(model)
    expected = output(model, inputs)
    with_adapters = adapted(model, target_modules=["q_proj", "v_proj"])
    train(with_adapters, inputs)
    trained, layer = output(with_adapters, inputs), model.model.layers[0].self_attn.q_proj
    delta, weight = layer.get_delta_weight("default"), layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="quantized anew"):
        with_adapters.merge_adapter()
    assert torch.equal(layer.base_layer.weight, weight + delta)
    fresh = tq.make_quantizer(model.plan.sites[1].weight, "weight")
    fresh.pre_observe(weight + delta)
    (slot,) = layer.base_layer.weight_slots()
    assert torch.equal(slot.quantizer(slot.seen()), fresh(weight + delta))
    merged = output(with_adapters, inputs)
    assert 0 < (merged - trained).abs().mean() < (trained - expected).abs().mean()
    with_adapters.unmerge_adapter()
    torch.testing.assert_close(output(with_adapters, inputs), trained)
    with pytest.warns(UserWarning, match="quantized anew"):
        result = with_adapters.merge_and_unload()
    assert torch.equal(output(result, inputs), merged)


def test_codes_take_no_adapters_in(tmp_path: Path) -> None:
    with_adapters = adapted(from_codes(tmp_path))
    with pytest.raises(ConfigError, match="cannot be merged into codes, which are fixed"):
        with_adapters.merge_and_unload()
    with pytest.raises(ConfigError, match="LlamaForCausalLM has adapters"):
        with_adapters.base_model.model.save_pretrained(tmp_path / "again")
    with pytest.raises(ConfigError, match="a packed model is for inference"):
        from_codes(tmp_path / "other").train()(torch.ones(1, 3, dtype=torch.int64))


def test_the_adapter_functions_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(own, "MIN_PEFT_VERSION", "0.17")  # it may be above the newest one that there is
    model = from_codes(tmp_path / "q")
    inputs = inputs_of(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(quantized_lora(model, config))
    expected = output(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = from_codes(tmp_path / "q2")
    again.load_adapter(
        tmp_path / "adapter", peft_config=quantized_lora(again, peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    )
    assert torch.equal(output(again, inputs), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights"),
        ({"use_dora": True}, "DoraLinearVariant reads the weight of the layer"),
        ({"target_modules": ["embed_tokens"]}, "adapters beside a quantized Embedding are not supported"),
    ],
    ids=["pissa", "dora", "embedding"],
)
def test_what_would_pass_the_quantizers_by_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(quantized(), **options)


def test_models_that_are_no_base() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="LlamaForCausalLM is a float model"):
        quantized_lora(made("untied"), config)
    model = quantized()
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    with pytest.raises(ConfigError, match="frozen, in QUANT_EVAL, but model.embed_tokens"):
        quantized_lora(model, config)
    with pytest.raises(ConfigError, match=r"config must be a peft.LoraConfig, got \{\}"):
        quantized_lora(model, {})
    fused = tq.quantize(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), "w8a8", torch.ones(2, 4)
    )
    tq.calibrate(fused, [torch.randn(8, 4)])
    with pytest.raises(ConfigError, match="0: ReLU is fused into the quantized layer"):
        adapted(fused, target_modules=["0"])
