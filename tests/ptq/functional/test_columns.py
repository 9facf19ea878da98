"""Second-order rounding: published numbers, exhaustive search, explicit elimination, Babai's nearest plane."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ptq.oracles import (
    GOLDENS,
    GRAM,
    INT3,
    TABLE,
    W,
    close,
    error_of,
    exhaustive,
    on_levels,
    random_gram,
    real,
    row_scales,
)
from torchquant.ptq.functional.columns import activation_order, gptq, obq, round_columns
from torchquant.ptq.functional.factors import upper_factor
from torchquant.quantizers_functional.formats import Levels

GRIDS = TABLE["grids"]
INTEGERS = on_levels(range(-40, 41))


def eliminated(weight: Tensor, gram: Tensor, nearest: object) -> Tensor:
    """GPTQ by its definition: round a column, update the rest by the inverse, drop the column from the inverse."""
    left, inverse = weight.clone(), gram.inverse()
    rounded = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = nearest(left)[:, j]  # type: ignore[operator]
        left = left - ((left[:, j] - rounded[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return rounded


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "gptq_act_order", "obq"])
def test_published_table(name: str, algorithm: str) -> None:
    golden = GRIDS[name]
    scales = row_scales(W, golden["levels"])
    close(scales[:, 0], [row["scale"] for row in golden["rows"]])
    nearest = on_levels(golden["levels"], scales)
    if algorithm == "rtn":
        rounded = nearest(W)
    elif algorithm == "obq":
        rounded, order = obq(W, GRAM, nearest)
        assert order.tolist() == [row["obq_order"] for row in golden["rows"]]
    else:
        order = activation_order(GRAM) if algorithm == "gptq_act_order" else None
        rounded = gptq(W, GRAM, nearest, order, damp=0.0)
    close(rounded / scales, golden["levels_chosen"][algorithm])
    close(error_of(W - rounded, GRAM), golden["error"][algorithm])


@pytest.mark.parametrize("name", GRIDS)
def test_no_algorithm_is_below_the_exhaustive_optimum(name: str) -> None:
    golden = GRIDS[name]
    scales = row_scales(W, golden["levels"])
    found = [exhaustive(w, GRAM, golden["levels"], float(s)) for w, s in zip(W, scales, strict=True)]
    close(sum(error for error, _ in found), golden["error"]["optimum"])
    assert min(golden["error"].values()) >= golden["error"]["optimum"] - 1e-12


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("block", [1, 3, 128])
def test_cholesky_form_is_explicit_elimination_in_any_block(name: str, block: int) -> None:
    nearest = on_levels(GRIDS[name]["levels"], row_scales(W, GRIDS[name]["levels"]))
    assert torch.equal(gptq(W, GRAM, nearest, damp=0.0, block=block), eliminated(W, GRAM, nearest))


def test_two_weights_by_hand() -> None:
    golden = GOLDENS["gptq_2x2"]
    gram, weight = real(golden["H"]), real([golden["w"]])
    seen: list[Tensor] = []

    def nearest(x: Tensor, columns: Tensor) -> Tensor:
        seen.append(x.flatten())
        return x.round()

    rounded = gptq(weight, gram, nearest, damp=0.0)
    close(torch.cat(seen), [0.4, golden["w1_after_first"]])
    close(rounded[0], golden["gptq"])
    close(error_of(weight - rounded, gram), golden["gptq_error"])
    close(error_of(weight - weight.round(), gram), golden["rtn_error"])
    close(exhaustive(weight[0], gram, range(-3, 4), 1.0)[0], golden["bruteforce_error"])


@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_published_damping(damp: float) -> None:
    golden, scales = TABLE[f"int3_percdamp_{damp}"], row_scales(W, INT3)
    rounded = gptq(W, GRAM, on_levels(INT3, scales), damp=damp)
    assert (rounded / scales).round().tolist() == golden["codes"]
    close(error_of(W - rounded, GRAM), golden["error"])


def test_scales_of_a_group_are_static_or_of_the_current_weight() -> None:
    static = torch.cat([row_scales(part, INT3).expand(3, 2) for part in W.split(2, 1)], 1)
    now: dict[int, Tensor] = {}

    def begin(current: Tensor, columns: Tensor) -> None:
        now.update({int(j): row_scales(current, INT3) for j in columns})

    def current(x: Tensor, columns: Tensor) -> Tensor:
        return on_levels(INT3, now[int(columns)])(x)

    def fixed(x: Tensor, columns: Tensor) -> Tensor:
        return on_levels(INT3, static[:, columns])(x)

    for name, nearest, begins in (("static", fixed, None), ("current", current, begin)):
        rounded = gptq(W, GRAM, nearest, damp=0.0, group=2, begin_group=begins)
        close(error_of(W - rounded, GRAM), TABLE[f"int3_group2_{name}"]["error"])
    assert torch.equal(rounded, gptq(W, GRAM, current, damp=0.0, block=1, group=2, begin_group=begin))
    scales = torch.cat([now[j] for j in range(4)], 1)
    assert (rounded / scales).round().tolist() == TABLE["int3_group2_current"]["codes"]


def test_a_group_sees_every_error_before_it_whatever_the_block() -> None:
    """Groups that are larger than a block, do not divide it, or leave a short one at the end."""
    generator = torch.Generator().manual_seed(3)
    gram, weight = random_gram(40, 11, generator), torch.randn(4, 11, generator=generator, dtype=torch.float64)

    def seen(group: int, block: int) -> list[tuple[list[int], Tensor]]:
        log: list[tuple[list[int], Tensor, Tensor]] = []
        gptq(
            weight,
            gram,
            INTEGERS,
            block=block,
            group=group,
            begin_group=lambda w, c: log.append((c.tolist(), w, w + 0)),
        )
        assert all(torch.equal(kept, then) for _, kept, then in log)  # what was handed out is not written to
        return [(columns, then) for columns, _, then in log]

    for group in (2, 3, 8):
        one_by_one = seen(group, 1)
        assert [columns for columns, _ in one_by_one] == [list(c) for c in torch.arange(11).split(group)]
        for block in (4, 128):
            for (_, a), (_, b) in zip(one_by_one, seen(group, block), strict=True):
                torch.testing.assert_close(a, b)


def test_dead_columns_keep_their_weights_unless_told() -> None:
    gram, scales = GRAM.clone(), row_scales(W, INT3)
    gram[2] = gram[:, 2] = 0.0
    nearest = on_levels(INT3, scales)
    zeroed, kept = (gptq(W, gram, nearest, zero_dead=zero) for zero in (True, False))
    assert (zeroed / scales).round().tolist() == TABLE["dead_column_2"]["codes"]
    assert torch.equal(kept[:, 2:3], nearest(W)[:, 2:3])
    others = [0, 1, 3]
    assert torch.equal(kept[:, others], zeroed[:, others])


def babai(weight: Tensor, gram: Tensor) -> Tensor:
    """Nearest plane on `gram = R'R`, from the last coordinate to the first, by nothing but its definition."""
    upper = torch.linalg.cholesky(gram).T
    target, found = upper @ weight, torch.zeros_like(weight)
    for i in reversed(range(len(weight))):
        found[i] = torch.round((target[i] - upper[i, i + 1 :] @ found[i + 1 :]) / upper[i, i])
    return found


def test_gptq_on_integers_is_babai_nearest_plane() -> None:
    golden = GOLDENS["gptq_babai"]
    gram, weight = real(golden["H"]), real([row["w"] for row in golden["rows"]])
    order = torch.arange(4, -1, -1)
    rounded = gptq(weight, gram, INTEGERS, order, damp=0.0)
    for w, q, row in zip(weight, rounded, golden["rows"], strict=True):
        assert q.tolist() == row["q"] == babai(w, gram).tolist()
        close(error_of((w - q)[None], gram), row["error"])
        assert row["error"] <= golden["bound_quarter_trace_R2"]
    close(torch.linalg.cholesky(gram).diagonal().square().sum() / 4, golden["bound_quarter_trace_R2"])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 4),
    levels=st.sampled_from([[-1.0, 0.0, 1.0], [-3.0, -1.0, 0.0, 0.5, 2.0], [-2.0, -1.0, 0.0, 1.0]]),
)
def test_laws_on_random_layers(seed: int, columns: int, levels: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram = random_gram(columns + 3, columns, generator)
    weight = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    nearest = on_levels(levels, row_scales(weight, levels) / 2)
    optimum = sum(
        exhaustive(w, gram, levels, float(s))[0] for w, s in zip(weight, row_scales(weight, levels) / 2, strict=True)
    )
    order = activation_order(gram)
    for rounded in (
        gptq(weight, gram, nearest, damp=0.0),
        gptq(weight, gram, nearest, order, damp=0.0),
        obq(weight, gram, nearest)[0],
    ):
        assert error_of(weight - rounded, gram) >= optimum - 1e-9
    assert torch.equal(gptq(weight, gram.diagonal().diag(), nearest), nearest(weight))
    assert torch.equal(gptq(weight, gram * 1024, nearest), gptq(weight, gram, nearest))
    permuted = torch.randperm(columns, generator=generator)
    moved = gram[permuted][:, permuted]
    again = gptq(weight[:, permuted], moved, nearest, activation_order(moved), damp=0.0)
    assert torch.equal(again, gptq(weight, gram, nearest, order, damp=0.0)[:, permuted])


def test_groups_of_a_convolution_in_one_batch_are_a_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    grams = random_gram(30, 9, generator, groups=4)
    weight = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    orders = activation_order(grams)
    together = gptq(weight, grams, INTEGERS, orders)
    for i in range(4):
        assert torch.equal(together[i], gptq(weight[i], grams[i], INTEGERS, orders[i]))


def test_nearest_is_asked_for_the_columns_of_the_stored_weight() -> None:
    """As float32 at least, whatever the weight is."""
    order, asked = torch.tensor([2, 0, 3, 1]), []

    def nearest(x: Tensor, columns: Tensor) -> Tensor:
        asked.append((x.dtype, x.shape, columns.tolist()))
        return x.round()

    gptq(W.bfloat16(), GRAM, nearest, order)
    assert asked == [(torch.float32, torch.Size([3, 1]), [j]) for j in order.tolist()]


def test_a_format_of_the_kit_is_a_grid_and_bfloat16_weights_are_rounded_in_float32() -> None:
    levels = Levels(torch.tensor([-1.0, -0.25, 0.0, 0.25, 1.0]))
    weight = W.to(torch.bfloat16)
    rounded = gptq(weight, GRAM, lambda x, columns: levels.project(x)[0])
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.unique().tolist()) <= set(levels.levels().tolist())
    assert torch.equal(rounded, gptq(weight.float(), GRAM, lambda x, columns: levels.project(x)[0]).bfloat16())


def test_order_keeps_groups_whole() -> None:
    generator = torch.Generator().manual_seed(6)
    grams = random_gram(30, 10, generator, groups=3)
    for gram, order in zip(grams, activation_order(grams, group=4), strict=True):
        runs = [list(run) for _, run in itertools.groupby(order.tolist(), key=lambda j: j // 4)]
        assert sorted(runs) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        means = [float(gram.diagonal()[run].mean()) for run in runs]
        assert means == sorted(means, reverse=True)
    assert activation_order(GRAM).tolist() == TABLE["act_order"]


def test_input_is_not_changed() -> None:
    weight, gram = W.clone(), GRAM.clone()
    gptq(weight, gram, INTEGERS)
    round_columns(weight, upper_factor(gram), INTEGERS)
    obq(weight, gram, INTEGERS)
    assert torch.equal(weight, W)
    assert torch.equal(gram, GRAM)
