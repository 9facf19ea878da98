"""Hadamard matrices of every size in use, their transform, rotations of weights: published numbers and identities."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.errors import ConfigError
from torchquant.ptq.functional.orthogonal import (
    cayley_step,
    hadamard,
    hadamard_block,
    hadamard_factors,
    hadamard_transform,
    orthogonalized,
    random_orthogonal,
    random_signs,
)
from torchquant.ptq.functional.rotations import (
    centred,
    reading_norm,
    rotated_reader,
    rotated_values,
    rotated_writer,
)

EPSILON = 1e-6
GOLDEN, ROTATION = GOLDENS["hadamard"], GOLDENS["rotation"]


def test_published_matrices() -> None:
    close(hadamard(4).double() @ real(GOLDEN["x"]) / 2, GOLDEN["H4x"])
    assert hadamard(12)[:3].tolist() == GOLDEN["paley12_rows"]
    assert hadamard(20)[1].tolist() == GOLDEN["paley20_row1"]
    assert hadamard(28)[0].tolist() == GOLDEN["paley2_28_row0"]
    double = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    wanted = hadamard(12)
    for _ in range(5):
        wanted = torch.kron(double, wanted)
    assert torch.equal(hadamard(384), wanted)


@pytest.mark.parametrize("n", [1, *GOLDEN["orders_checked"]])
def test_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard(n).to(torch.float32)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_powers_of_two_are_those_of_scipy(n: int) -> None:
    assert hadamard(n).tolist() == scipy_hadamard(n).tolist()


@pytest.mark.parametrize("n", GOLDEN["factors"])
def test_factors_of_the_sizes_in_use(n: str) -> None:
    found, golden = hadamard_factors(int(n)), GOLDEN["factors"][n]
    assert found == (None if golden is None else tuple(golden))


@pytest.mark.parametrize(("n", "block"), [(29568, 29568), (13696, 128), (3584, 3584), (11008, 256), (11, 1), (344, 8)])
def test_sizes_that_others_have_no_matrix_for(n: int, block: int) -> None:
    assert hadamard_block(n) == block
    assert n % block == 0


def test_a_size_without_a_matrix_names_one_that_divides_it() -> None:
    for n in (11, 13696):
        with pytest.raises(ConfigError, match=rf"of {n} rows is known here; take one of {hadamard_block(n)} rows"):
            hadamard(n)
    with pytest.raises(ConfigError, match="of 3 rows is known here"):
        hadamard_transform(torch.zeros(3))
    with pytest.raises(ConfigError, match="blocks of 4 do not divide 6 elements"):
        hadamard_transform(torch.zeros(6), 4)
    with pytest.raises(ConfigError, match="at least 1 row, got 0"):
        hadamard(0)


@pytest.mark.parametrize("n", [1, 2, 8, 12, 40, 56, 384])
def test_transform_is_the_product(n: int) -> None:
    x = torch.randn(3, 2, n, dtype=torch.float64)
    close(hadamard_transform(x), (x @ hadamard(n).double().T / n**0.5).tolist())
    weight = torch.randn(5, n, dtype=torch.float64)
    signs = random_signs(n, torch.Generator().manual_seed(0))
    moved = hadamard_transform(x * signs) @ hadamard_transform(weight * signs).T
    torch.testing.assert_close(moved, x @ weight.T, rtol=1e-12, atol=1e-12)
    assert hadamard_transform(x.bfloat16()).dtype == torch.bfloat16


def test_transform_has_a_gradient() -> None:
    assert torch.autograd.gradcheck(hadamard_transform, torch.randn(2, 12, dtype=torch.float64, requires_grad=True))


def test_blocks_keep_an_outlier_among_its_own() -> None:
    x = torch.zeros(64)
    x[5] = 8.0
    spread, kept = hadamard_transform(x), hadamard_transform(x, 32)
    assert torch.equal(spread.abs(), torch.full((64,), 1.0))
    assert torch.equal(kept[32:], torch.zeros(32))
    torch.testing.assert_close(kept[:32].abs(), torch.full((32,), 8 / 32**0.5))


def test_published_outlier() -> None:
    golden = ROTATION["outlier"]
    x = real(golden["x"])
    rotated = hadamard_transform(x)
    close(rotated, golden["rotated"])
    close(real([x.abs().max(), rotated.abs().max()]), golden["absmax"])
    for values, key in ((x, "int4_mse"), (rotated, "int4_mse_rotated")):
        step = values.abs().max() / 7
        close(((values / step).round() * step - values).square().mean(), golden[key])


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def test_published_rotation_of_a_reader() -> None:
    rotation, gamma, weight, h = (real(ROTATION[key]) for key in ("R", "gamma", "W", "h"))
    reader, bias = reading_norm(weight, None, gamma)
    rotated = rotated_reader(reader, rotation)
    assert bias is None
    close(rotated, ROTATION["rotated_W"])
    close(rms(h) @ reader.T, ROTATION["y"])
    close(rms(h @ rotation) @ rotated.T, ROTATION["y"])


def test_published_layer_norm_as_an_rms_norm_behind_a_centred_writer() -> None:
    golden = ROTATION["layernorm"]
    rotation, gamma, weight = (real(ROTATION[key]) for key in ("R", "gamma", "W"))
    u, writer, shift, beta = (real(golden[key]) for key in ("u", "Wp", "bp", "beta"))
    plain = torch.nn.functional.layer_norm(u @ writer.T + shift, (4,), gamma, beta, eps=EPSILON) @ weight.T
    close(plain, golden["y"])
    reader, bias = reading_norm(weight, None, gamma, beta)
    moved = [rotated_writer(centred(part), rotation) for part in (writer, shift)]
    found = rms(u @ moved[0].T + moved[1]) @ rotated_reader(reader, rotation).T
    assert bias is not None
    close(found + bias, golden["y"])
    _, both = reading_norm(weight, real([1.0, 2.0]), gamma, beta)
    assert both is not None
    close(both, (bias + real([1.0, 2.0])).tolist())


@pytest.mark.parametrize("each", [False, True])
def test_values_rotated_head_by_head_cancel(each: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, repeats, size = 2, 3, 4
    value = torch.randn(heads * size, 5, dtype=torch.float64, generator=generator)
    bias = torch.randn(heads * size, dtype=torch.float64, generator=generator)
    output = torch.randn(6, heads * repeats * size, dtype=torch.float64, generator=generator)
    turns = torch.stack([random_orthogonal(size, generator) for _ in range(heads)])
    mixing = torch.rand(heads * repeats, 7, 7, dtype=torch.float64, generator=generator).softmax(-1)
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator)

    def run(value: Tensor, output: Tensor, bias: Tensor) -> Tensor:
        of_heads = (x @ value.T + bias).unflatten(1, (heads, size)).transpose(0, 1).repeat_interleave(repeats, 0)
        return (mixing @ of_heads).transpose(0, 1).flatten(1) @ output.T

    moved_value, moved_output, moved_bias = rotated_values(value, output, turns if each else turns[0], bias)
    torch.testing.assert_close(run(moved_value, moved_output, moved_bias), run(value, output, bias))
    assert len(rotated_values(value, output, turns[0])) == 2


def test_published_cayley_step_stays_orthogonal() -> None:
    golden = GOLDENS["cayley"]
    moved = cayley_step(real(golden["R"]), real(golden["A"]))
    close(moved, golden["result"])
    close(moved @ moved.T, torch.eye(4).tolist(), 1e-14)


def test_orthogonalizing_keeps_what_is_orthogonal() -> None:
    rotation = real(ROTATION["R"])
    close(orthogonalized(rotation), rotation.tolist())
    close(orthogonalized(rotation @ real([[2.0, 1.0], [0.0, 3.0]]).kron(torch.eye(2).double())), rotation.tolist())


def test_random_rotations_are_orthogonal_and_seeded() -> None:
    first, again = (random_orthogonal(13, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    close(first @ first.T, torch.eye(13).tolist(), 1e-13)
    signs = random_signs(1000, torch.Generator().manual_seed(4))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.1
