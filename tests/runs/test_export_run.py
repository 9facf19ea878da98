"""`torchquant export` and `torchquant certify`: from the folder of a run to files, and the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from torchquant import cli
from torchquant.deploy import load_packed
from torchquant.deploy.certificate.checking import metadata_of
from torchquant.errors import ConfigError
from torchquant.runs.export import certify_run, export_run, load_run
from torchquant.runs.loop import accuracy
from torchquant.runs.ptq import PTQConfig, run_ptq
from torchquant.runs.quantize import JobConfig, run_job

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo's network."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_job(JobConfig("demo", rules="int8-ort", float_epochs=1), folder)
    return folder


def command(*words: Any) -> Any:
    return CliRunner().invoke(cli.build_app(), [str(word) for word in words])


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run as an ONNX file with its certificate, and what the command said."""
    out = tmp_path_factory.mktemp("onnx") / "new" / "net.onnx"
    return out, command("export", run, "--to", "onnx", "--certify", "--samples", 40, "--out", out)


def test_the_run_comes_back_as_it_was(run: Path) -> None:
    model, data, config = load_run(run)
    with torch.no_grad():
        found = accuracy(model(data.test_images), data.test_labels)
    assert found == json.loads((run / "result.json").read_text())["ptq_accuracy"]
    assert config.model == "demo"


@pytest.mark.parametrize("recipe", ["cnn-w8a8", "smoothquant,calibrate,gptq,bias_correction"])
def test_a_model_that_was_rounded_after_training_is_exported(recipe: str, tmp_path: Path) -> None:
    result = run_ptq(PTQConfig("demo", recipe, rules="int8-ort", float_epochs=1, batches=2), tmp_path)
    model, data, _ = load_run(tmp_path)
    with torch.no_grad():
        assert accuracy(model(data.test_images), data.test_labels) == result.accuracy
    exported = export_run(tmp_path, with_certificate=True, samples=8)
    assert exported.certificate is not None
    assert exported.certificate.passed


def test_onnx_with_certificate(written: tuple[Path, Any]) -> None:
    out, result = written
    assert result.exit_code == 0, result.output
    assert "parity certificate: passed" in result.output
    saved = json.loads((out.parent / "certificate.json").read_text())
    assert saved["passed"]
    assert saved["samples"] == 40
    assert metadata_of(out)["torchquant_certificate"] == saved["sha256"]
    assert saved["comparisons"][0]["sites"][1]["elements"] > 0
    assert {row["engine"] for row in saved["outputs"]} >= {"simulation", "integer reference", "ORT, as deployed"}


def test_a_file_that_was_changed_fails_and_says_so(run: Path, written: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    proto = onnx.load(written[0])
    entry = next(e for e in proto.graph.initializer if e.name.endswith("stored_bias.0.codes"))
    values = onnx.numpy_helper.to_array(entry).copy() + 3000
    entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))
    out.write_bytes(proto.SerializeToString())
    result = command("certify", run, "--onnx", out, "--samples", 16)
    assert result.exit_code == 1
    assert "codes differ" in result.output
    assert "FAILED" in result.output
    assert not certify_run(run, out, 16).passed


def test_packed_needs_nothing_but_the_file(run: Path, tmp_path: Path) -> None:
    made = export_run(run, "packed", out=tmp_path / "net.safetensors")
    model, data, _ = load_run(run)
    with torch.no_grad():
        assert torch.equal(load_packed(made.path)(data.test_images[:50]), model(data.test_images[:50]))
    assert made.bytes == made.path.stat().st_size


def test_integer_is_a_report(run: Path) -> None:
    result = command("export", run, "--to", "integer", "--samples", 60)
    assert result.exit_code == 0, result.output
    report = json.loads((run / "integer.json").read_text())
    assert report["samples"] == 60
    assert report["float_operators"] == []
    assert 0 < max(report["largest_accumulators"].values()) < 2**31
    assert f"{report['accuracy']:.2%}" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "NOWHERE"], "is not the folder of a finished run of `torchquant quantize`, `ptq` or `search`"),
        (["export", "RUN", "--to", "tflite"], "the form must be one of onnx, packed, integer, got 'tflite'"),
        (["export", "RUN", "--to", "packed", "--certify"], "only an ONNX file can have a certificate"),
        (["certify", "RUN", "--onnx", "missing.onnx"], "there is no file missing.onnx"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_words(words: list[str], message: str, run: Path, tmp_path: Path) -> None:
    places = {"RUN": str(run), "NOWHERE": str(tmp_path)}
    result = command(*(places.get(word, word) for word in words))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_loading_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not hold config.json, plan.yaml, quantized.pt"):
        load_run(tmp_path)
