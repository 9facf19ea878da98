"""Keys and values in few bits, scales of tokens, statistics of batch norms: published numbers."""

from __future__ import annotations

import pytest
import torch

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.errors import ConfigError
from torchquant.ptq.functional.kv_cache import quantize_keys, quantize_runs, quantize_values, quantized_tokens
from torchquant.ptq.functional.without_data import normal_ranges, statistics_error
from torchquant.quantizers_functional.tokens import token_scales, token_steps

KIVI, TOKEN, NORMS = GOLDENS["kivi"], GOLDENS["per_token"], GOLDENS["bn_statistics"]
KEYS = real(KIVI["K"])


def test_published_keys_per_channel_and_per_token() -> None:
    per_channel = quantize_runs(KEYS, KIVI["bits"], 8, 0)
    close(per_channel, KIVI["per_channel"])
    close((KEYS - per_channel).square().sum(), KIVI["sse_per_channel"])
    per_token = quantize_runs(KEYS, KIVI["bits"], 4, 1)
    close((KEYS - per_token).square().sum(), KIVI["sse_per_token"])
    close(quantize_values(KEYS, KIVI["bits"], group=4, residual=0), per_token.tolist())


def test_published_state_of_the_cache() -> None:
    close(quantize_keys(KEYS, KIVI["bits"], group=4, residual=4), KIVI["state_after_8_with_4_residual"])
    done = quantized_tokens(6, group=4)
    state = KIVI["after_6_tokens_group_4"]
    assert (done, 6 - done) == (state["quantized_tokens"], state["residual_tokens"])


@pytest.mark.parametrize(("group", "residual"), [(4, 0), (4, 3), (3, 5), (1, 2)])
def test_token_by_token_is_the_whole_prefix(group: int, residual: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 19, 6)
    whole = quantize_keys(x, 2, group, residual), quantize_values(x, 2, group, residual)
    for n in range(1, 20):
        keys, values = (quantize(x[:, :n], 2, group, residual) for quantize in (quantize_keys, quantize_values))
        for found, all_at_once, done in (
            (keys, whole[0], quantized_tokens(n, group, residual)),
            (values, whole[1], quantized_tokens(n, 1, residual)),
        ):
            assert torch.equal(found[:, :done], all_at_once[:, :done])
            assert torch.equal(found[:, done:], x[:, done:n])
            assert n - done >= min(n, residual)


def test_runs_of_one_value_and_of_a_rest() -> None:
    x = torch.tensor([[3.0, 3.0, 3.0, 0.7]])
    assert torch.equal(quantize_runs(x, 2, 3, 1), x)
    with pytest.raises(ConfigError, match="n_bits and size must be whole numbers >= 1, got 2 and 0"):
        quantize_runs(x, 2, 0, 1)


def test_published_scales_of_tokens_to_a_bfloat16() -> None:
    """The kit rounds the scale of a token to a bfloat16, so that steps times codes are exact in float32."""
    x = torch.tensor(TOKEN["x"])
    scale = token_scales(x, 8)
    close(scale[:, 0], torch.tensor(TOKEN["scale"]).bfloat16().tolist())
    exact = torch.tensor(TOKEN["scale"])[:, None]
    assert token_steps(x, exact, 8).tolist() == TOKEN["codes"]
    close((token_steps(x, exact, 8) * exact - x).double().square().sum(), TOKEN["sse_token"], 1e-5)


def test_published_loss_of_statistics_and_its_gradient() -> None:
    z = real(NORMS["z"]).requires_grad_()
    error = statistics_error(z, real(NORMS["running_mean"]), real(NORMS["running_std"]))
    close(error.detach(), NORMS["loss"])
    close(torch.autograd.grad(error, z)[0], NORMS["gradient"])


def test_statistics_of_pictures_are_those_of_a_batch_norm() -> None:
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    norm = torch.nn.BatchNorm2d(3, momentum=1.0)
    norm(x)
    n = x.numel() / 3
    close(statistics_error(x, norm.running_mean, (norm.running_var * (n - 1) / n).sqrt()), 0.0, 1e-9)


def test_ranges_of_normal_activations() -> None:
    low, high = normal_ranges(real([1.0, -9.0]), real([-0.5, 0.5]), low=0.0, high=6.0)
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [4.0, 0.0])
    low, high = normal_ranges(real([1.0]), real([0.5]), 2.0)
    assert (low.tolist(), high.tolist()) == ([0.0], [2.0])
