"""The wheel is complete, works from an empty folder, and the core needs nothing but torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import NEED_MORE, ROOT

SHIPPED = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
OPTIONAL = (
    "torchvision",
    "efficientnet_pytorch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "rich",
    "typer",
    "sklearn",
    "scipy",
    "matplotlib",
    "plotly",
)


def run_python(code: str, folder: Path, *python_path: Path) -> str:
    """Standard output of `code` run by a fresh interpreter in `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_sources(source: Path) -> None:
    for name in SHIPPED:
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "torchquant", source / "torchquant", ignore=shutil.ignore_patterns("__pycache__"))


def built_wheel(source: Path, out: Path) -> Path:
    """A wheel built from a copy of the sources, so that nothing left in `build/` can slip in."""
    copy_sources(source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without compiled kernels, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHQUANT_KERNELS", "0")
        return built_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the wheel installed, byte code and all, as pip leaves it for a user."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--compile", "--target", folder, wheel)
    return folder


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = ("py", "css", "js", "typed", "cpp", "h")
    wanted = [path for kind in kinds for path in (ROOT / "torchquant").rglob(f"*.{kind}")]
    assert packed == {path.relative_to(ROOT).as_posix() for path in wanted}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_wheel_holds_the_kernels_of_this_processor(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHQUANT_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    wheel = built_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))
    pip("install", "--no-deps", "--target", tmp_path, wheel)
    (library,) = (tmp_path / "torchquant" / "kernels").glob("*.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert f"active, {library}" in run_python("from torchquant.info import report; print(report())", tmp_path, tmp_path)


def test_wheel_imports_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, pathlib, torchquant
root = pathlib.Path(torchquant.__file__).parent.parent
files = [path.relative_to(root).with_suffix("") for path in root.rglob("torchquant/**/*.py")]
names = [".".join(path.parts).removesuffix(".__init__") for path in files if path.name != "__main__"]
for name in names:
    if not name.startswith({NEED_MORE}):
        importlib.import_module(name)
print(torchquant.__file__, len(names))
"""
    origin, count = run_python(code, tmp_path, site).split()
    assert Path(origin).is_relative_to(site)
    assert int(count) == sum(p.name != "__main__.py" for p in (ROOT / "torchquant").rglob("*.py"))


def test_an_editable_install_is_found_beside_the_clone(tmp_path: Path) -> None:
    # The folder of a clone is a namespace package to Python, and hides packages that a hook of setuptools would find.
    clone, site = tmp_path / "torchquant", tmp_path / "site"
    clone.mkdir()
    copy_sources(clone)
    run_python(f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})", clone)
    (editable,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
    code = (
        "import site, sys, importlib.util as u; site.addsitedir(sys.argv[1]); print(u.find_spec('torchquant').origin)"
    )
    command = [sys.executable, "-S", "-c", code, str(site)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(clone / "torchquant" / "__init__.py"), done.stderr


def test_core_needs_torch_only(tmp_path: Path) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError("not installed: " + name, name=name)
sys.meta_path.insert(0, Missing())
import torch, torchquant as tq
layer = tq.QWrapper(
    [torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU()],
    weight_quantizer=tq.AffineQuantizer(4, tq.BatchMinMax(axis=0)),
    acts_quantizer=tq.AffineQuantizer(4, tq.ExpAvgMinMax()),
)
tq.set_qmodule_state(layer, tq.QModuleState.QUANT_AWARE_TRAIN)
layer(torch.randn(2, 2, 8, 8)).sum().backward()
print(tq.state_report(layer))
"""
    assert "AffineQuantizer" in run_python(code, tmp_path, ROOT)


def test_import_loads_the_core_only(tmp_path: Path) -> None:
    # What is loaded decides how long an import takes, and unlike seconds it is the same on every machine.
    code = """
import sys, torch
from pathlib import Path
before = set(sys.modules)
import torchquant
loaded = {name: sys.modules[name] for name in set(sys.modules) - before}
print(*sorted({name.partition(".")[0] for name in loaded} - sys.stdlib_module_names))
files = {name: Path(m.__file__) for name, m in loaded.items() if name.startswith("torchquant")}
print(*sorted(name for name, file in files.items() if file.name == "__init__.py"))
print(sum(file.stat().st_size for file in files.values()))
"""
    packages, parts, size = run_python(code, tmp_path, ROOT).splitlines()
    assert set(packages.split()) <= {"torch", "torchquant"}
    core = ("kernels", "qmodule", "quantizers", "quantizers_functional", "range_observers")
    assert parts.split() == ["torchquant", *(f"torchquant.{part}" for part in core)]
    assert int(size) <= 800_000
