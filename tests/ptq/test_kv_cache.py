"""Keys and values of attention as codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.ptq import quantized_cache
from torchquant.ptq.functional.kv_cache import quantize_keys, quantize_values
from torchquant.ptq.kv_cache import QuantizedTokens
from torchquant.quantizers import make_quantizer

# newer releases call the argument `cache`
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
X = torch.randn(2, 3, 21, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0] * 7 + [9.0])
TOKEN = "affine:4,symmetric=narrow/token"


def added(cache: QuantizedTokens, *sizes: int) -> Tensor:
    """The tokens of a cache that got X in parts of these sizes."""
    return [cache.add(part) for part in X.split(sizes, 2)][-1]


@pytest.mark.parametrize("sizes", [(21,), (1,) * 21, (7, 1, 1, 12)])
@pytest.mark.parametrize("residual", [0, 5, 30])
def test_tokens_in_parts_are_the_formula_on_all(sizes: tuple[int, ...], residual: int) -> None:
    keys, values = (QuantizedTokens(2, axis, 4, residual) for axis in (-2, -1))
    assert torch.equal(added(keys, *sizes), quantize_keys(X, 2, 4, residual))
    assert torch.equal(added(values, *sizes), quantize_values(X, 2, 4, residual))
    assert (keys.n_tokens, values.n_tokens) == (21, 21)
    assert (keys.n_coded, values.n_coded) == (max(0, 21 - residual) // 4 * 4, max(0, 21 - residual))


@pytest.mark.parametrize("spec", [TOKEN, "mxfp4"])
def test_tokens_by_a_quantizer_of_the_package(spec: str) -> None:
    cache, at_once = QuantizedTokens(spec, -1, 4, 2), QuantizedTokens(spec, -2, 4, 2)
    found = added(cache, 9, *[1] * 12)
    assert torch.equal(found, added(at_once, 21))
    assert torch.equal(found[:, :, :19], make_quantizer(spec, "output")(X[:, :, :19]))
    assert torch.equal(found[:, :, 19:], X[:, :, 19:])


def test_keys_are_rotated_while_they_are_codes() -> None:
    plain, turned, parts = (QuantizedTokens(TOKEN, -2, 4, 2, rotate) for rotate in (False, True, True))
    found = added(turned, 21)
    assert torch.equal(found, added(parts, 9, *[1] * 12))
    assert torch.equal(found[:, :, 19:], X[:, :, 19:])
    turn = torch.tensor(scipy_hadamard(8)).float() / 8**0.5
    wanted = make_quantizer(TOKEN, "output")(X[:, :, :19] @ turn) @ turn
    torch.testing.assert_close(found[:, :, :19], wanted)
    assert (found - X).square().mean() < 0.5 * (added(plain, 21) - X).square().mean()


def test_bytes_and_chosen_sequences() -> None:
    cache = QuantizedTokens(4, -2, 4, 0)
    found = added(cache, 21)
    assert cache.n_bytes == 2 * 3 * (20 * 8 + 5 * 8 * 2 * 4 + 8 * 4)  # codes, two numbers a channel and group, a token
    cache.select(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.add(X[[1, 1, 0], :, :1])[:, :, :21], found[[1, 1, 0]])


def test_types_stay() -> None:
    for axis in (-1, -2):
        assert QuantizedTokens(4, axis, 4, 0).add(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": 9}, "a cache takes 1 to 8 bits, or the spec of a quantizer, got 9"),
        ({"group": 0}, "a cache needs group >= 1 and residual >= 0, got 0 and 128"),
        ({"values": "affine:8"}, "each token of each head by itself.*got 'affine:8': ExpAvgMinMax has seen no data"),
    ],
)
def test_what_a_cache_cannot_be_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quantized_cache(**options)


def llama() -> Any:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes)).eval()


def test_a_model_of_transformers_reads_the_cache_it_fills() -> None:
    model, ids = llama(), torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        floats = quantized_cache(residual=20)
        found = [model(ids[:, i : i + 1], past_key_values=floats).logits for i in range(12)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
        errors = []
        for bits in (8, 2):
            cache = quantized_cache(bits, bits, group=4, residual=0)
            found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
            assert (cache.get_seq_length(), cache.layers[1].parts[0].n_coded) == (12, 12)
            errors.append(float((torch.cat(found, 1) - expected).square().mean()))
    assert 0 < errors[0] < errors[1] / 100
    with pytest.raises(ConfigError, match="a quantized cache cannot be cropped"):
        cache.crop(3)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int) -> None:
    model, ids = llama(), torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    found = model.generate(ids, past_key_values=quantized_cache(8, 8, group=4, residual=2), **options)
    assert torch.equal(found, expected)
