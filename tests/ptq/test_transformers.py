"""Language, speech and picture models of transformers, made from their configurations, run through the algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.utils import weight_slots

pytestmark = pytest.mark.filterwarnings(
    "ignore:quantize leaves part of", "ignore:.*make a singular Gram matrix", "ignore:.*does not require grad"
)
IDS = torch.randint(3, 99, (4, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(10).lt(torch.tensor([10, 8, 10, 5])[:, None]).long()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
Built = tuple[nn.Module, dict[str, Any]]


def decoder(name: str, **more: Any) -> Callable[[Any], Built]:
    def build(hf: Any) -> Built:
        config = getattr(hf, f"{name}Config")(vocab_size=99, **{**SMALL, **more})
        inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
        return getattr(hf, f"{name}ForCausalLM")(config), inputs

    return build


def bert(hf: Any) -> Built:
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=99, **SMALL)), {
        "input_ids": IDS,
        "attention_mask": MASK,
    }


def t5(hf: Any) -> Built:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=99, decoder_start_token_id=0, **sizes)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :6], "use_cache": False}
    return hf.T5ForConditionalGeneration(config), inputs


def whisper(hf: Any) -> Built:
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=32,
        max_source_positions=20,
        max_target_positions=16,
        **layers,
        **heads,
        **special,
    )
    sound = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": sound, "decoder_input_ids": IDS[:, :6], "use_cache": False}
    return hf.WhisperForConditionalGeneration(config), inputs


def vit(hf: Any) -> Built:
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **SMALL)), {"pixel_values": pixels}


MODELS = {
    "mixtral": decoder(
        "Mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, num_hidden_layers=1
    ),
    "bert": bert,
    "llama": decoder("Llama", num_key_value_heads=2),
    "tied": decoder("Llama", num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": decoder("Qwen2", num_key_value_heads=2),
    "gemma": decoder("Gemma", num_key_value_heads=1, head_dim=8),
    "opt": decoder("OPT", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "qwen2_moe": decoder(
        *("Qwen2Moe",),
        **{"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "t5": t5,
    "whisper": whisper,
    "vit": vit,
    "gpt_oss": decoder(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, num_hidden_layers=1
    ),
}
FAST = ("mixtral",)


def rules(weight: str) -> list[dict[str, Any]]:
    kinds = ["Linear", "Conv1d", "Conv2d", "Embedding", "Experts"]
    return [{"types": kinds, "weight": weight}]


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits at the tokens that are no padding."""
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    is_token = "attention_mask" in inputs and found.shape[:2] == MASK.shape
    return found[MASK.bool()] if is_token else found


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_models_from_configurations(name: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    net.eval()
    expected, errors = logits(net, inputs), {}
    for stages in (["nearest"], ["gptq", "bias_correction"]):
        model = tq.quantize(net, rules("affine:4/channel"), inputs)
        report = ptq.run(model, stages, [inputs] if len(stages) > 1 else [])
        errors[stages[0]] = float((logits(model, inputs) - expected).square().mean())
    assert errors["gptq"] < errors["nearest"]
    said = {step.path: step for step in report.steps if step.stage != "bias_correction"}
    slots = {slot.label: slot for slot in weight_slots(model) if slot.quantizer is not None}
    assert said.keys() == slots.keys()
    for label, slot in slots.items():
        tied = "its weight is that of" in said[label].note
        assert slot.quantizer.is_pinned != tied, label  # type: ignore[union-attr]
        if not tied:
            assert said[label].error <= said[label].nearest_error, label  # type: ignore[operator]
    if "attention_mask" in inputs:
        tokens = next(step for path, step in said.items() if path.endswith(("q_proj", "self.query", "SelfAttention.q")))
        assert tokens.rows == int(MASK.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "t5"])
@pytest.mark.parametrize("stage", ["nearest", "hqq"])
def test_weights_alone_need_no_data(name: str, stage: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    weight = "lsqplus:4,offset/group=16" if stage == "hqq" else "affine:4/group=16"
    model = tq.quantize(net.eval(), rules(weight), inputs)
    ptq.run(model, [stage] if stage == "nearest" else [stage, "nearest"], [])
    expected = logits(net, inputs)
    assert (logits(model, inputs) - expected).square().mean() < 0.05 * expected.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_the_recipe_for_language_models(name: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    recipe = ptq.RECIPES["llm-w4-gptq"]
    model = tq.quantize(net.eval(), recipe.rules, inputs)
    paths = {step.path for step in ptq.run(model, recipe.stages, [inputs]).steps}
    assert "lm_head" in paths
    assert ("model.layers.0.mlp.experts.gate_up_proj" in paths) == (name != "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "tied", "whisper", "vit", "opt", "gpt_oss"])
def test_weights_of_every_family_need_no_data_and_load_as_saved(name: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    model, fresh = (tq.quantize(net.eval(), rules("affine:8/group=16"), inputs) for _ in range(2))
    ptq.run(model, ["nearest"], [])
    expected = logits(net, inputs)
    assert (logits(model, inputs) - expected).square().mean() < 1e-3 * expected.square().mean()
    fresh.load_state_dict(model.state_dict(), strict=True)
    tq.set_qmodule_state(fresh, tq.QModuleState.QUANT_EVAL)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    if name == "tied":
        assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
