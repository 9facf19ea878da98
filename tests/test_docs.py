"""What the documentation shows, runs: README, CONTRIBUTING, and the published README's snippets."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchquant
from tests import ROOT
from torchquant import (
    QUANTIZERS,
    AffineQuantizer,
    BatchMinMax,
    ExpAvgMinMax,
    QModuleState,
    QOp,
    QWrapper,
    check_quantizer,
    make_quantizer,
    qmodule_state,
    set_qmodule_state,
)
from torchquant.cli import build_app
from torchquant.deploy import export_onnx, load_packed, run_onnx, save_packed
from torchquant.quantizers import LAWS, catalogue
from torchquant.range_observers import OBSERVERS

DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "docs/analyze.md", "docs/coming-from.md", "docs/coming-from-others.md"),
    *("docs/deploy.md", "docs/index.md", "docs/models.md", "docs/monitor.md", "docs/ptq.md", "docs/quantizers.md"),
    *("docs/integrations.md", "docs/searching.md", "docs/training.md"),
)
BLOCK = re.compile(
    r"^(?P<skip><!-- no-run: .+? -->\s*\n)?```(?:python|py)\n(?P<code>.*?)^```\n(?:\n```\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


def runnable_blocks(text: str) -> list[tuple[int, str, str | None]]:
    """(line, code, output that stands right behind it) of each block without `<!-- no-run: reason -->` before it."""
    blocks = [m for m in BLOCK.finditer(text) if not m["skip"]]
    return [(text.count("\n", 0, m.start("code")), m["code"], m["output"]) for m in blocks]


@pytest.fixture
def keeps_registry() -> Iterator[None]:
    known = [(registry, set(registry)) for registry in (QUANTIZERS, OBSERVERS)]
    yield
    for registry, names in known:
        for name in set(registry) - names:
            registry.unregister(name)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.usefixtures("keeps_registry")
def test_document_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = runnable_blocks((ROOT / document).read_text(encoding="utf-8"))
    assert blocks, f"{document} has no runnable Python block"
    monkeypatch.chdir(tmp_path)
    module = ModuleType("document_under_test")  # a real module, so that classes it defines can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code, output in blocks:
        capsys.readouterr()
        exec(compile("\n" * line + code, document, "exec"), module.__dict__)
        assert output in (None, capsys.readouterr().out)


@pytest.mark.usefixtures("keeps_registry")
def test_the_scheme_of_the_page_is_everywhere_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, code, _), (_, learned, _) = runnable_blocks((ROOT / "docs" / "add-a-scheme.md").read_text(encoding="utf-8"))
    assert len(code.splitlines()) <= 30
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    plugin = tmp_path / "cubic.py"
    plugin.write_text(f"{code}\n\n{learned}")
    assert len([line for line in learned.splitlines() if line.strip()]) <= 25
    words = ["compare", "--plugin", str(plugin), "--schemes", "cubic,halfmax,affine", "--bits", "4", "--seeds", "1"]
    words += ["--epochs", "0", "--float-epochs", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text())["rows"]
    assert {row["weight"] for row in rows} == {
        "cubic:4/channel",
        "halfmax:4/channel",
        "affine:4,symmetric=narrow/channel",
    }

    assert "cubic" in {entry.name for entry in catalogue()}
    quantizer = make_quantizer("cubic:4/channel@ewgs")
    fast = tuple(law for law in LAWS if law != "survives")  # a class of a plug-in file cannot be pickled by name
    assert set(check_quantizer(quantizer, laws=fast).passed) == set(fast)
    assert set(check_quantizer(make_quantizer("halfmax:4/channel"), laws=fast).passed) == set(fast)
    layer = QWrapper(nn.Linear(6, 3), quantizer, None)
    x = torch.randn(4, 6)
    with qmodule_state(layer, QModuleState.CALIBRATION):
        layer(x)
    set_qmodule_state(layer, QModuleState.QUANT_EVAL)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(export_onnx(layer, tmp_path / "cubic.onnx", x), x), layer(x))
        assert torch.equal(load_packed(save_packed(layer, tmp_path / "cubic.safetensors"), layer)(x), layer(x))


def test_blocks_are_found_and_skipped() -> None:
    skipped = "<!-- no-run: needs a camera -->\n```python\nfail()\n```\n"
    text = f"a\n```py\nx = 1\n```\n{skipped}```sh\nls\n```\n```python\ny\n```\n\n```\n1\n```\n"
    assert runnable_blocks(text) == [(2, "x = 1\n", None), (12, "y\n", "1\n")]


# The snippets of the published README, word for word but for one comma that it lacks.

WRAPPERS = """
wrapper = QWrapper(
    layers,
    weight_quantizer=AffineQuantizer(n_bits, BatchMinMax()),
    acts_quantizer=AffineQuantizer(n_bits, ExpAvgMinMax())
)

op = QOp(operators.add, acts_quantizer=AffineQuantizer(n_bits, ExpAvgMinMax()))
"""

FUSED = """
fused_model = FusedResNet(
    full_precision_model,
    weight_quantizer=lambda module: QuantizerForMyModuleWeights(module),
    acts_quantizer=lambda module: QuantizerForMyModuleActivations(module)
)
"""

STATES = """
with qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN):
    ...

# Alternatively:

set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
"""

PUBLISHED = {
    "QWrapper": QWrapper,
    "QOp": QOp,
    "AffineQuantizer": AffineQuantizer,
    "BatchMinMax": BatchMinMax,
    "ExpAvgMinMax": ExpAvgMinMax,
    "QModuleState": QModuleState,
    "qmodule_state": qmodule_state,
    "set_qmodule_state": set_qmodule_state,
}


def run_snippet(code: str, **placeholders: Any) -> dict[str, Any]:
    namespace = {**PUBLISHED, **placeholders}
    exec(code, namespace)
    return namespace


def test_published_wrapper_snippet() -> None:
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU6()]
    found = run_snippet(WRAPPERS, layers=layers, n_bits=4, operators=operator)
    wrapper, op = found["wrapper"], found["op"]
    run_snippet(STATES, module=wrapper)
    run_snippet(STATES, module=op)
    y = wrapper(torch.randn(2, 1, 6, 6))
    assert y.unique().numel() <= 2**4
    assert op(y, y).unique().numel() <= 2**4


def test_published_model_snippet() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchquant.models.resnet import FusedResNet

    found = run_snippet(
        FUSED,
        FusedResNet=FusedResNet,
        full_precision_model=torchvision.models.resnet18(num_classes=5),
        QuantizerForMyModuleWeights=lambda module: AffineQuantizer(8, BatchMinMax()),
        QuantizerForMyModuleActivations=lambda module: AffineQuantizer(8, ExpAvgMinMax()),
    )
    model = found["fused_model"]
    run_snippet(STATES, module=model)
    assert {row.state for row in torchquant.state_report(model)} == {"QUANT_AWARE_TRAIN"}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
