"""Rows that layers read, against the layers of torch; Gram matrices, their factors and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ptq.oracles import GRAM, TABLE, X, close, random_gram, real
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.ptq.functional import factors
from torchquant.ptq.functional.factors import (
    damped_cholesky,
    dead_columns,
    inverse_factor,
    largest_eigenvalue,
)
from torchquant.ptq.functional.gram import (
    check_gram,
    conv_rows,
    damping_of,
    few_rows,
    gram_sum,
    linear_rows,
    output_error,
    transposed_conv_rows,
)

ONE = torch.eye(6, dtype=torch.float64)


def outputs_of(pieces: list[Tensor], weight: Tensor) -> Tensor:
    """(positions, channels) of all pieces; weight (g, out / g, K)."""
    return torch.cat([(piece @ weight.mT).movedim(0, 1).flatten(1) for piece in pieces])


@pytest.mark.parametrize("most_elements", [1, 2**25])
@pytest.mark.parametrize(
    ("n_axes", "arguments"),
    [
        (1, {"kernel_size": 3, "stride": 2, "padding": 2}),
        (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
        (2, {"kernel_size": 4, "padding": "same", "groups": 4}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
        (3, {"kernel_size": 2, "stride": 2, "groups": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rows_of_a_convolution_times_its_weight_are_its_output(
    n_axes: int, arguments: dict[str, Any], most_elements: int
) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_axes - 1](4, 8, **arguments, bias=False).double()
    x = torch.randn(2, 4, *(6, 5, 4)[:n_axes], dtype=torch.float64)
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    pieces = list(conv_rows(x, *(getattr(layer, name) for name in names), most_elements=most_elements))
    wanted = layer(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(outputs_of(pieces, layer.weight.flatten(1).unflatten(0, (layer.groups, -1))), wanted)
    assert most_elements > 1 or len(pieces) == 2 * layer(x).shape[2]


@pytest.mark.parametrize(
    ("n_axes", "arguments"),
    [
        (1, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
        (2, {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (2, 1), "groups": 2}),
        (2, {"kernel_size": 1, "padding": 1, "stride": 3, "output_padding": 2}),
    ],
)
def test_rows_of_a_transposed_convolution(n_axes: int, arguments: dict[str, Any]) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[n_axes - 1](4, 6, **arguments, bias=False).double()
    x = torch.randn(2, 4, *(5, 4)[:n_axes], dtype=torch.float64)
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups")
    pieces = list(transposed_conv_rows(x, *(getattr(layer, name) for name in names)))
    weight = layer.weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(outputs_of(pieces, weight), layer(x).movedim(1, -1).flatten(0, -2))


def test_some_of_many_patches_lie_in_steps_that_begin_elsewhere_in_each_image() -> None:
    places = torch.arange(4 * 12 * 10.0).view(4, 1, 12, 10)
    (rows,) = conv_rows(places, (1, 1), most_rows=120)
    images = [rows[rows // 120 == i].long() % 120 for i in range(4)]
    lattices = [[sorted({*of.tolist()}) for of in (image // 10, image % 10)] for image in images]
    assert all(b - a == 2 for lattice in lattices for axis in lattice for a, b in itertools.pairwise(axis))
    assert len({(lattice[0][0], lattice[1][0]) for lattice in lattices}) > 2
    assert {0, 119} <= {int(i) for image in images for i in image}
    assert 100 <= rows.shape[1] <= 140


@pytest.mark.parametrize(("rows", "arguments"), [(conv_rows, {"padding": 1}), (transposed_conv_rows, {"stride": 2})])
@pytest.mark.parametrize("groups", [1, 2])
def test_some_of_many_patches_are_among_all(rows: Any, arguments: dict[str, int], groups: int) -> None:
    x = torch.randn(1, 2, 8, 6)
    every, some = (torch.cat(list(rows(x, (2, 2), **arguments, groups=groups, most_rows=n)), 1) for n in (None, 40))
    where = [int((every == row[:, None]).all(-1).all(0).nonzero()) for row in some.unbind(1)]
    assert where == sorted(where)
    assert len({place % 2 for place in where}) == 2  # also of one image all phases of a stride
    assert torch.equal(linear_rows(x[0, 0], most_rows=3), x[None, 0, 0, 1::3])


def test_sums_of_batches_are_the_sum_of_all_and_padding_tokens_are_left_out() -> None:
    x, keep = torch.randn(4, 6, 3), torch.tensor([6, 3, 1, 0])[:, None] > torch.arange(6)
    rows = linear_rows(x, keep)
    assert rows.shape == (1, 10, 3)
    whole = gram_sum(rows)
    assert whole.dtype == torch.float64
    close(sum(gram_sum(part) for part in rows.split(3, 1)), whole.tolist(), 1e-5)
    close(gram_sum(real([TABLE["X"]])), [GRAM.tolist()])
    close(gram_sum(real([TABLE["X"]]), real([TABLE["X"]]) * 2), [(GRAM * 2).tolist()])


def test_bfloat16_rows_are_summed_in_float32() -> None:
    rows = torch.full((1, 3000, 2), 0.1, dtype=torch.bfloat16)
    close(gram_sum(rows)[0, 0, 0], 3000 * float(rows[0, 0, 0]) ** 2, 1e-4)


def test_depthwise_groups_in_one_product_are_a_loop_over_groups() -> None:
    (rows,) = conv_rows(torch.randn(2, 5, 6, 6, dtype=torch.float64), (3, 3), groups=5)
    close(gram_sum(rows), torch.stack([gram_sum(one[None])[0] for one in rows]).tolist())


def test_error_of_a_layer_is_that_of_its_outputs() -> None:
    difference = torch.randn(2, 3, 4, dtype=torch.float64)
    close(output_error(difference, GRAM.expand(2, 4, 4)), (difference @ X.T).square().sum(-1).tolist())
    diagonal = GRAM.diagonal().expand(2, 4)
    close(output_error(difference, diagonal), output_error(difference, diagonal.diag_embed()).tolist())


def test_factor_is_the_published_one() -> None:
    close(inverse_factor(GRAM, damp=0.0), TABLE["U"])


def test_factor_of_each_group_is_that_of_a_loop_and_scaling_scales_it() -> None:
    generator = torch.Generator().manual_seed(1)
    grams = random_gram(20, 6, generator, groups=3)
    factors = inverse_factor(grams, 0.1)
    assert torch.equal(factors.triu(), factors)
    for gram, factor in zip(grams, factors, strict=True):
        damped = gram + 0.1 * gram.diagonal().mean() * ONE[:6, :6]
        close(factor.T @ factor, damped.inverse().tolist())
    close(inverse_factor(grams * 1e6, 0.1) * 1e3, factors.tolist())


def test_dead_columns_stand_alone() -> None:
    gram = GRAM.clone()
    gram[2] = gram[:, 2] = 0.0
    factor = inverse_factor(gram, 0.01)
    kept = [0, 1, 3]
    assert dead_columns(gram).tolist() == [False, False, True, False]
    assert float(factor[2, 2]) > 0
    assert torch.equal(factor[2, 3], torch.tensor(0.0, dtype=torch.float64))
    close(damped_cholesky(gram * 1e6, 0.01)[1], (damped_cholesky(gram, 0.01)[1] * 1e6).tolist())
    trace = gram.diagonal().mean()
    close(factor.T @ factor[:, kept], (factor.T @ factor)[:, kept].tolist())
    close((factor.T @ factor)[kept][:, kept], (gram[kept][:, kept] + 0.01 * trace * ONE[:3, :3]).inverse().tolist())


def test_only_the_matrix_that_fails_gets_more_damping() -> None:
    not_positive = real([[1.0, 1.02], [1.02, 1.0]])
    _, added = damped_cholesky(torch.stack([not_positive, real([[2.0, 0.0], [0.0, 2.0]])]), 0.01)
    close(added, [[0.1, 0.1], [0.02, 0.02]])


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_factor_that_cannot_be_says_so(damp: float) -> None:
    with pytest.raises(ConfigError, match=r"of 2 inputs is not positive definite .* or a larger damp than"):
        inverse_factor(real([[1.0, 20.0], [20.0, 1.0]]), damp)
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        inverse_factor(real([[float("nan"), 0.0], [0.0, 1.0]]))
    with pytest.raises(ConfigError, match=r"damp must be a number >= 0, got -1"):
        inverse_factor(GRAM, -1.0)


@pytest.mark.parametrize(
    ("gram", "n", "damp", "words"),
    [
        (torch.zeros(2, 2), 8, 0.01, r"of 8 rows of 2 inputs is all zeros"),
        (torch.eye(2), 0, 0.01, r"of 0 rows of 2 inputs is all zeros"),
        (torch.eye(4), 3, 0.0, r"3 rows of 4 inputs make a singular .* damp > 0"),
        (torch.full((2, 2), torch.nan), 8, 0.01, r"of 8 rows of 2 inputs has NaN"),
    ],
)
def test_gram_that_says_nothing_is_an_error(gram: Tensor, n: int, damp: float, words: str) -> None:
    with pytest.raises((ConfigError, NonFiniteError), match=words):
        check_gram(gram, n, damp)


def test_fewer_rows_than_columns_and_a_group_of_zeros_beside_others_are_damped() -> None:
    check_gram(torch.eye(4), 3, 0.01)
    check_gram(torch.stack([torch.eye(2), torch.zeros(2, 2)]), 8, 0.01)
    assert few_rows(3, 4) == "3 rows of 4 inputs make a singular Gram matrix"
    assert few_rows(4, 4) == ""


def test_many_columns_are_factored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = random_gram(40, 12, torch.Generator().manual_seed(3))
    wide = inverse_factor(gram)
    monkeypatch.setattr(factors, "WIDEST_FLOAT64", 11)
    narrow = inverse_factor(gram)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-5)


def test_largest_eigenvalue() -> None:
    grams = random_gram(30, 7, torch.Generator().manual_seed(2), groups=4)
    close(largest_eigenvalue(grams), torch.linalg.eigvalsh(grams).amax(-1).tolist())
    close(largest_eigenvalue(torch.zeros(2, 3, 3, dtype=torch.float64)), [0.0, 0.0])


def test_damping_grows_without_a_step_where_rows_are_few() -> None:
    assert [damping_of(n, 100) for n in (10**6, 200, 10, 0)] == pytest.approx([0.01, 0.01, 9.5, 99.5])
    sizes = [damping_of(n, 100) for n in range(1, 400)]
    assert sizes == sorted(sizes, reverse=True)
    assert damping_of(196, 100) == pytest.approx(0.0102, abs=1e-4)
