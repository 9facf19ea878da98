"""Small models of transformers with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

hf = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}


def bert(kind: str = "BertModel", **more: Any) -> Any:
    return getattr(hf, kind)(hf.BertConfig(vocab_size=61, max_position_embeddings=32, **SIZES, **more))


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=61, num_key_value_heads=1, **SIZES, **more))


NETS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "masked": lambda: bert("BertForMaskedLM"),
    "llama": lambda: llama(tie_word_embeddings=True),
    "untied": llama,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, **GPT2)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=61, **T5)),
}


WHISPER = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16} | {
    f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
}
OTHERS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(vocab_size=61, num_key_value_heads=1, num_local_experts=4, **SIZES)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=61, decoder_start_token_id=0, pad_token_id=0, bos_token_id=0, eos_token_id=1, **WHISPER
        )
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=8, **SIZES)),
}
"""Models with experts, with a table that transformers computes, and of pictures."""


def some_slow(names: Iterable[str], slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def made(name: str) -> Any:
    torch.manual_seed(0)
    return (NETS | OTHERS)[name]().eval()


def inputs_of(net: Any) -> dict[str, Tensor]:
    if net.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    if net.main_input_name == "input_features":
        features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"decoder_input_ids": ids} if net.config.is_encoder_decoder else {}
    )


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found
