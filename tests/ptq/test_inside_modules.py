"""Algorithms on the weights of modules with several: recurrent layers, attention, tables, and cells of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import torchquant as tq
from torchquant import ptq
from torchquant.ptq.reads import paired_rows, rows_read, uses_of
from torchquant.qmodule import QWeights, WeightsPattern
from torchquant.qmodule.weighted import WEIGHTED
from torchquant.utils import weight_slots

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
W = "affine:3,symmetric=narrow/channel"


def stepped(layer: Any, x: Tensor, hx: Any = None) -> tuple[dict[str, Tensor], Tensor]:
    """What each weight of a recurrent module multiplies, (N, steps, K), in a loop over steps; and the output."""
    reads, ways = {}, 2 if layer.bidirectional else 1
    for level in range(layer.num_layers):
        outs = []
        for way in range(ways):
            end = f"_l{level}" + ("_reverse" if way else "")
            w_ih, w_hh = (getattr(layer, f"weight_{part}{end}") for part in ("ih", "hh"))
            b_ih, b_hh = ((getattr(layer, f"bias_{part}{end}") if layer.bias else None) for part in ("ih", "hh"))
            w_hr = getattr(layer, f"weight_hr{end}", None)
            lstm = isinstance(layer, nn.LSTM)
            size = w_hh.shape[1]
            h, c = x.new_zeros(len(x), size), x.new_zeros(len(x), layer.hidden_size)
            if hx is not None:
                h = (hx[0] if lstm else hx)[level * ways + way]
                c = hx[1][level * ways + way] if lstm else c
            steps = range(x.shape[1]) if not way else reversed(range(x.shape[1]))
            before, inner, out = {}, {}, {}
            for t in steps:
                before[t] = h
                a, b = F.linear(x[:, t], w_ih, b_ih), F.linear(h, w_hh, b_hh)
                if lstm:
                    i, f, g, o = (a + b).chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    inner[t] = h = o.sigmoid() * c.tanh()
                    h = h if w_hr is None else F.linear(h, w_hr)
                elif isinstance(layer, nn.GRU):
                    (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                    z = (az + bz).sigmoid()
                    h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
                else:
                    h = (a + b).relu() if layer.nonlinearity == "relu" else (a + b).tanh()
                out[t] = h
            order = range(x.shape[1])
            reads[f"weight_ih{end}"] = x
            reads[f"weight_hh{end}"] = torch.stack([before[t] for t in order], 1)
            if w_hr is not None:
                reads[f"weight_hr{end}"] = torch.stack([inner[t] for t in order], 1)
            outs.append(torch.stack([out[t] for t in order], 1))
        x = torch.cat(outs, -1)
    return reads, x


def sorted_rows(x: Tensor) -> Tensor:
    return torch.stack(sorted(x, key=lambda row: [round(v, 4) for v in row.tolist()]))


def rows_of(module: nn.Module, name: str, *args: Any, mask: Tensor | None = None) -> Tensor:
    slot = next(slot for slot in module.weight_slots() if slot.name == name)  # type: ignore[operator]
    (rows,) = rows_read(slot, (args, {}), mask)
    return rows[0] if isinstance(rows, Tensor) else torch.stack([one[0] for one in rows])


RECURRENT = {
    "lstm": lambda: nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True),
    "projected": lambda: nn.LSTM(5, 6, 2, batch_first=True, proj_size=3, bias=False),
    "gru": lambda: nn.GRU(5, 6, 2, batch_first=True, bidirectional=True),
    "rnn": lambda: nn.RNN(5, 6, 2, batch_first=True, nonlinearity="relu"),
}


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_what_recurrent_weights_read(kind: str, given: bool) -> None:
    torch.manual_seed(0)
    layer = RECURRENT[kind]()
    x = torch.randn(3, 7, 5)
    ways = 2 if layer.bidirectional else 1
    h = torch.randn(2 * ways, 3, layer.proj_size or 6)
    hx = None if not given else (h, torch.randn(2 * ways, 3, 6)) if kind in ("lstm", "projected") else h
    expected, y = stepped(layer, x, hx)
    torch.testing.assert_close(layer(x, hx)[0], y)
    module = QWeights(layer)
    layer.batch_first = False
    for name, reads in expected.items():
        by_steps = reads.transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(rows_of(module, name, x.transpose(0, 1), hx), by_steps, rtol=1e-4, atol=1e-5)
    layer.batch_first = True
    for name, reads in expected.items():
        by_steps = reads.transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(rows_of(module, name, x, hx), by_steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RECURRENT)
def test_packed_sequences_are_read_to_their_ends(kind: str) -> None:
    torch.manual_seed(0)
    layer = RECURRENT[kind]()
    x, lengths = torch.randn(3, 7, 5), [4, 7, 2]
    hx: Any = torch.randn(2 * (2 if layer.bidirectional else 1), 3, layer.proj_size or 6)
    hx = (hx, torch.randn(len(hx), 3, 6)) if isinstance(layer, nn.LSTM) else hx

    def own(i: int) -> Any:
        return tuple(s[:, i : i + 1] for s in hx) if isinstance(hx, tuple) else hx[:, i : i + 1]

    each = [stepped(layer, x[i : i + 1, :n], own(i))[0] for i, n in enumerate(lengths)]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    for name in each[0]:
        expected = torch.cat([reads[name][0] for reads in each])
        found = rows_of(QWeights(layer), name, packed, hx)
        torch.testing.assert_close(sorted_rows(found), sorted_rows(expected), rtol=1e-4, atol=1e-4)


def test_padding_and_single_sequences_of_recurrent_layers() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(5, 6, 2, batch_first=True), torch.randn(3, 7, 5)
    mask = torch.arange(7).lt(torch.tensor([4, 7, 2])[:, None])
    reads, module = stepped(layer, x)[0], QWeights(layer)
    for name, expected in reads.items():
        found = rows_of(module, name, x, mask=mask)
        torch.testing.assert_close(found, expected.transpose(0, 1)[mask.T], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows_of(module, name, x[1]), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_batch_first", [False, True])
def test_what_attention_reads(is_batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=is_batch_first)
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert layer.in_proj_bias is not None
    parts = zip((query, key, value), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2) for x, w, b in parts)
    seen = F.scaled_dot_product_attention(q, k, v, ~padding[:, None, None]).transpose(1, 2).flatten(-2)
    given = [x if is_batch_first else x.transpose(0, 1) for x in (query, key, value)]
    slots = {slot.name: slot for slot in QWeights(layer).weight_slots()}
    (rows,) = rows_read(slots["out_proj.weight"], ((*given, padding), {}))
    back = rows[0].view(2, 3, 8) if is_batch_first else rows[0].view(3, 2, 8).transpose(0, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(back, seen)
    (blocks,) = rows_read(slots["in_proj_weight"], (tuple(given), {"key_padding_mask": padding}))
    for block, x, keep in zip(blocks, (query, key, value), (None, ~padding, ~padding), strict=True):
        expected = x.flatten(0, 1) if keep is None else x[keep]
        torch.testing.assert_close(sorted_rows(block[0]), sorted_rows(expected))


def test_statistics_of_groups_with_inputs_of_their_own() -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(1, n, 4) for n in (3, 5, 0)]
    needs = frozenset({"gram", "cross_gram", "means", "float_means"})
    data = ptq.LayerData("x", needs, torch.Generator())
    data.add(blocks, [2 * block for block in blocks])
    data.add(blocks, [2 * block for block in blocks])
    assert data.n == 10
    for group, block in enumerate(blocks[:2]):
        x = block[0].double()
        torch.testing.assert_close(data.gram[group], x.T @ x / len(x))
        torch.testing.assert_close(data.cross_gram[group], 2 * x.T @ x / len(x))
        torch.testing.assert_close(data.mean_input[group], x.mean(0))
    assert not data.gram[2].any()


class Sequences(nn.Module):
    """Tables, a recurrent layer in two directions, attention to another sequence, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bags = nn.Embedding(12, 6), nn.EmbeddingBag(12, 6)
        self.reads = nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
        self.cell, self.both = nn.GRUCell(8, 8), nn.Bilinear(8, 6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y = self.reads(x)[0]
        y = self.attend(y, y, y)[0] + self.other(y[:, :3], x, x)[0].mean(1, keepdim=True)
        state = None
        for t in range(y.shape[1]):
            state = self.cell(y[:, t], state)
        return self.both(state, self.bags(tokens))


RULES = [{"types": [kind.__name__ for kind in WEIGHTED if isinstance(kind, type)], "weight": W}]
TOKENS = torch.randint(0, 10, (32, 6), generator=torch.Generator().manual_seed(0))
BATCHES = list(TOKENS.split(16))


def sequences() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Sequences().eval()
    return net, tq.quantize(net, RULES, BATCHES[0])


def test_a_run_over_all_of_them(tmp_path: Path) -> None:
    net, model = sequences()
    stages = ["clip", "gptq", "bias_correction"]
    report = ptq.run(model, stages, BATCHES)
    said = {(step.stage, step.path): step for step in report.steps}
    assert said["gptq", "table"].note == "2 of its 12 rows were never looked up and stay nearest"
    assert said["clip", "table"].error < said["clip", "table"].nearest_error  # type: ignore[operator]
    again = {step.path: step.note for step in report.steps if "first call" in step.note}
    assert list(again) == ["cell"]
    gained = 0
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        assert slot.quantizer.is_pinned, slot.label
        levels = slot.quantizer(slot.seen())
        assert torch.equal(slot.quantizer.decode(slot.quantizer.encode(slot.seen())), levels)
        step = said["gptq", slot.label]
        if slot.label != "cell.weight_hh":  # its state is zero at its first call
            assert step.error <= step.nearest_error, slot.label  # type: ignore[operator]
            gained += step.error < 0.9 * step.nearest_error  # type: ignore[operator]
    assert gained >= 12
    assert "all zeros" in said["gptq", "cell.weight_hh"].note
    nearest = sequences()[1]
    ptq.run(nearest, ["nearest"], BATCHES)
    with torch.no_grad():
        error, before = ((m(TOKENS) - net(TOKENS)).square().mean() for m in (model, nearest))
    assert error < 0.9 * before
    fresh = sequences()[1]
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize(("names", "n_done"), [("attend*", 1), pytest.param("*", 30, marks=pytest.mark.slow)])
def test_killed_inside_a_module_and_resumed(names: str, n_done: int, tmp_path: Path) -> None:
    whole, model, seen = sequences()[1], sequences()[1], []
    expected = ptq.run(whole, ["gptq", "bias_correction"], BATCHES, names=[names])

    def stop(step: ptq.StepReport) -> None:
        seen.append(step)
        if len(seen) == n_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.run(model, ["gptq", "bias_correction"], BATCHES, names=[names], out=tmp_path, on_step=stop)
    model = sequences()[1]
    report = ptq.run(model, ["gptq", "bias_correction"], BATCHES, names=[names], out=tmp_path)
    assert [(s.path, s.error) for s in report.steps] == [(s.path, s.error) for s in expected.steps]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


def test_one_weight_of_a_module_can_be_chosen() -> None:
    _, model = sequences()
    report = ptq.run(model, ["gptq"], BATCHES, names=["reads.weight_hh_*"])
    assert {step.path for step in report.steps} == {
        f"reads.weight_hh_l{level}{way}" for level in (0, 1) for way in ("", "_reverse")
    }


def test_rows_that_are_looked_up() -> None:
    table, bags = QWeights(nn.Embedding(4, 2)), QWeights(nn.EmbeddingBag(4, 2, padding_idx=3))
    tokens, mask = torch.tensor([[0, 1, 3], [1, 1, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()

    def uses(module: QWeights, *args: Any, mask: Tensor | None = None) -> list[int]:
        found = uses_of(module.weight_slots()[0], (args, {}), mask)
        assert found is not None
        return found.tolist()  # type: ignore[no-any-return]

    assert uses(table, tokens) == [1, 3, 1, 1]
    assert uses(table, tokens, mask=mask) == [1, 3, 1, 0]
    assert uses(bags, tokens) == [1, 3, 1, 0]


class Cell(nn.Module):
    def __init__(self, used: str = "") -> None:
        super().__init__()
        self.read, self.kept = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.used = used

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y = F.linear(x, self.read) + state @ self.kept.T
        return y + self.kept.sum() if self.used else torch.tanh(y)


@pytest.fixture
def pattern() -> Any:
    tq.register_pattern(Cell, WeightsPattern(weights=("read", "kept"), values=("x",)))
    yield
    del WEIGHTED[Cell]


def test_products_in_a_class_of_ones_own_are_watched(pattern: None) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(9, 4), torch.randn(9, 4))
    module = QWeights(Cell())
    assert torch.equal(rows_of(module, "read", *batch), batch[0])
    assert torch.equal(rows_of(module, "kept", *batch), batch[1])
    model = tq.quantize(Cell("it"), [{"types": ["Cell"], "weight": W}], batch)
    said = {step.path: step for step in ptq.run(model, ["gptq"], [batch], with_targets=False).steps}
    assert said["read"].error < said["read"].nearest_error  # type: ignore[operator]
    assert said["kept"].note == (
        "its weight goes into sum, where products F.linear(x, weight) or x @ weight.T can be followed; "
        "rounded to nearest"
    )


def test_pairs_of_rows() -> None:
    torch.manual_seed(0)
    a, b = QWeights(nn.RNNCell(3, 4)), QWeights(nn.RNNCell(3, 4))
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    ((rows, others),) = paired_rows(a.weight_slots()[1], ((x, h), {}), b.weight_slots()[1], ((x, 2 * h), {}))
    assert torch.equal(rows[0], h)
    assert torch.equal(others[0], 2 * h)  # type: ignore[index]


def test_a_weight_that_a_float_module_has_too_stays_as_it_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 6))

        def forward(self, tokens: Tensor) -> Tensor:
            return 2 * F.embedding(tokens, self.weight)

    torch.manual_seed(0)
    net = nn.Sequential(Scaled(), nn.Linear(6, 6), nn.Linear(6, 10))
    net[2].weight = net[0].weight
    model = tq.quantize(net, [{"types": ["Linear"], "weight": W}], TOKENS % 10)
    before = model[0].weight.clone()
    said = {step.path: step.note for step in ptq.run(model, ["gptq"], [TOKENS % 10]).steps}
    assert said == {"1": "", "2": "stays rounded to nearest: its weight is that of 0.weight too"}
    assert torch.equal(model[0].weight, before)
