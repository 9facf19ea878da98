"""Equalization: published factors, the function kept, ranges equal, what is never scaled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.errors import ConfigError
from torchquant.ptq.functional.equalization import (
    chain_factors,
    equalization_factors,
    input_ranges,
    is_equalized,
    output_ranges,
    split_channels,
)

PAIR, TRIPLE = GOLDENS["cle"]["pair"], GOLDENS["cle"]["triple"]


def test_published_triple() -> None:
    ranges = [real(TRIPLE[key]) for key in ("r1", "r2", "r3")]
    first, second = chain_factors(ranges)
    close(first, TRIPLE["s1"])
    close(second, TRIPLE["s2"])
    for moved in (ranges[0] / first, ranges[1] * first / second, ranges[2] * second):
        close(moved, TRIPLE["common_range"])


@pytest.mark.parametrize("activation", ["y", "y_relu6"])
def test_published_pair(activation: str) -> None:
    w1, b1, w2, b2 = (real(PAIR[key]) for key in ("W1", "b1", "W2", "b2"))
    factors = equalization_factors(output_ranges(w1), input_ranges(w2))
    close(factors, PAIR["s"])
    close(chain_factors([output_ranges(w1), input_ranges(w2)])[0], PAIR["s"])
    moved = w1 / factors[:, None], b1 / factors, w2 * factors
    for found, key in zip(moved, ("W1_new", "b1_new", "W2_new"), strict=True):
        close(found, PAIR[key])
    close(output_ranges(moved[0]), input_ranges(moved[2]).tolist())
    again = equalization_factors(output_ranges(moved[0]), input_ranges(moved[2]))
    assert is_equalized([again])
    assert not is_equalized([factors])
    caps = torch.inf if activation == "y" else 6 / factors
    hidden = (real(PAIR["x"]) @ moved[0].T + moved[1]).clamp_min(0).minimum(torch.as_tensor(caps))
    close(hidden @ moved[2].T + b2, PAIR[activation])


def test_ranges_of_grouped_and_plain_convolutions() -> None:
    weight = torch.randn(6, 2, 3, 3)
    wanted = [weight[g * 3 : g * 3 + 3, i].abs().max() for g in range(2) for i in range(2)]
    assert torch.equal(input_ranges(weight, groups=2), torch.stack(wanted))
    assert torch.equal(input_ranges(weight), weight.abs().amax((0, 2, 3)))
    depthwise = torch.randn(5, 1, 3)
    assert torch.equal(input_ranges(depthwise, groups=5), output_ranges(depthwise))
    assert torch.equal(input_ranges(torch.ones(3, 2)), torch.ones(2))


def test_depthwise_block_keeps_its_function() -> None:
    torch.manual_seed(1)
    first, middle, last = (torch.randn(s, dtype=torch.float64) for s in ((4, 3, 1, 1), (4, 1, 3, 3), (5, 4, 1, 1)))
    biases = [torch.randn(4, dtype=torch.float64) for _ in range(2)]

    def run(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(F.conv2d(x, w1, b1).relu(), w2, b2, padding=1, groups=4).relu(), w3)

    s1, s2 = chain_factors([output_ranges(first), output_ranges(middle), input_ranges(last)])
    view = (-1, 1, 1, 1)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    moved = run(
        first / s1.view(view),
        biases[0] / s1,
        middle * (s1 / s2).view(view),
        biases[1] / s2,
        last * s2.view(1, -1, 1, 1),
        x,
    )
    torch.testing.assert_close(moved, run(first, biases[0], middle, biases[1], last, x), rtol=1e-12, atol=1e-12)


def test_a_large_bias_is_not_blown_up() -> None:
    """A channel of tiny weights and a large bias: without the bias its activations grow a thousandfold."""
    weight, bias, consumer = torch.tensor([[1e-6], [1.0]]), torch.tensor([10.0, 0.1]), torch.tensor([1.0, 1.0])
    blown = bias / equalization_factors(output_ranges(weight), consumer)
    kept = bias / equalization_factors(output_ranges(weight, bias), consumer)
    assert float(blown[0]) > 9e3
    assert float(kept[0]) < 10.0
    assert float(output_ranges(weight, bias, bias_weight=2.0)[0]) == 5.0


def test_dead_channels_and_extreme_ranges() -> None:
    producer, consumer = torch.tensor([0.0, 1.0, 1e12, 1e-12]), torch.tensor([1.0, 0.0, 1e-12, 1e12])
    assert equalization_factors(producer, consumer).tolist() == pytest.approx([1.0, 1.0, 1e4, 1e-4])
    assert chain_factors([producer, torch.ones(4), consumer])[0].tolist() == pytest.approx([1.0, 1.0, 1e4, 1e-4])
    with pytest.raises(ConfigError, match="at least 2 layers, got 1"):
        chain_factors([producer])


def test_activations_take_the_place_of_weights_and_alpha_tips_the_balance() -> None:
    producer, consumer, seen = real([4.0]), real([1.0]), real([16.0])
    close(equalization_factors(producer, consumer, seen, activation_share=1.0), [4.0])
    close(equalization_factors(producer, consumer, seen), [10.0**0.5])
    close(equalization_factors(producer, real([2.0]), alpha=1.0), [4.0])
    close(equalization_factors(producer, real([2.0]), alpha=0.0), [0.5])


def test_split_channels_keep_the_sum_and_round_back_exactly() -> None:
    torch.manual_seed(0)
    weight, columns, scale = torch.randn(4, 6, dtype=torch.float64) * 3, torch.tensor([1, 4]), 0.5
    for step in (0.0, scale):
        split = split_channels(weight, columns, step)
        close(split[:, columns] + split[:, 6:], weight[:, columns].tolist())
    codes, whole = (split / scale).round(), (weight / scale).round()
    assert torch.equal(codes[:, columns] + codes[:, 6:], whole[:, columns])
    x = torch.randn(3, 6, dtype=torch.float64)
    close(torch.cat([x, x[:, columns]], 1) @ split.T, (x @ weight.T).tolist())
