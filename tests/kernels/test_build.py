"""The library is built by any compiler, once, and never required."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from torchquant import kernels
from torchquant.errors import ConfigError
from torchquant.info import report
from torchquant.kernels import _build, _compiler

COMPILER = """#!{python}
import sys
from pathlib import Path
with open("{calls}", "a") as calls:
    calls.write("called\\n")
if "{message}":
    sys.stderr.write("{message}")
    sys.exit(1)
Path(sys.argv[-1]).write_text("a library")
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_build, "_built", None)
    monkeypatch.setattr(kernels, "_BY_DEVICE", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHQUANT_KERNELS", raising=False)


def compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, message: str = "") -> Path:
    """A compiler in CXX that writes a library, or fails with a message; the file that it returns has a line a call."""
    script, calls = folder / "cxx", folder / "calls"
    script.write_text(COMPILER.format(python=sys.executable, calls=calls, message=message))
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return calls


def shown() -> str:
    return " ".join(report().split())


def n_calls(calls: Path) -> int:
    return len(calls.read_text().splitlines())


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHQUANT_KERNELS", "0")
    assert kernels.find("uniform", torch.ones(3)) is None
    assert "kernels on cpu not active: TORCHQUANT_KERNELS=0 switches them off" in shown()


def test_schemes_are_listed_by_the_operations_they_look_for() -> None:
    listed = dict(line.strip().removeprefix("by operation").split(maxsplit=1) for line in report().splitlines())
    devices = " ".join(device for device in ("cpu", "cuda") if kernels.load(device)) or "PyTorch"
    assert listed["learned_step_backward"] == f"{devices:<8}  ewgs, lsq, lsqplus"
    assert listed["floats"] == f"{devices:<8}  esb, minifloat"
    assert "nf4" in listed["none"]
    with kernels.asked() as asked:
        torch.ones(3).abs()
    assert asked == set()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    assert kernels.find("uniform", torch.ones(3)) is None
    assert "CXX names a C++ compiler that is not installed: no-such-compiler -x" in shown()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(_build, "_built", None)
    assert "not active: there is no C++ compiler: install g++ or clang++, or name one in CXX" in shown()


def test_failure_is_reported_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = compiler(monkeypatch, tmp_path, "error: out of registers")
    assert kernels.find("uniform", torch.ones(3)) is None
    assert "did not compile the kernels:" in shown()
    assert "error: out of registers" in shown()
    tried = n_calls(calls)
    monkeypatch.setattr(_build, "_built", None)
    assert "error: out of registers" in shown()
    assert "delete it to try again" in shown()
    assert n_calls(calls) == tried == len(_compiler.NATIVE)


def test_one_process_compiles_and_the_others_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = compiler(monkeypatch, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: _build.compiled(_compiler.find_compiler(), _build.cache_folder()), range(4)))
    (path,) = paths
    assert path.read_text() == "a library"
    assert n_calls(calls) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not _build.built().library  # it is no library: the reason is that of the loader
    assert str(path) in _build.built().reason


def test_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert _build.cache_folder() == tmp_path / "cache" / "torchquant" / "kernels"
    _build.cache_folder().chmod(0o777)
    assert _build.cache_folder().parent == temporary
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _build.cache_folder().parent == temporary
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="no folder to keep the compiled kernels"):
        _build.cache_folder()


def test_library_of_the_package_is_taken_if_it_fits(
    cpu_kernels: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    made = _build.compiled(_compiler.find_compiler(), _build.cache_folder())
    monkeypatch.setattr(_build, "_built", None)
    monkeypatch.setattr(_build, "SOURCE", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    shutil.copy(made, tmp_path / "of-another-processor.so")
    assert not _build.built().library
    shutil.copy(made, tmp_path / f"{_compiler.key()}.so")
    monkeypatch.setattr(_build, "_built", None)
    assert _build.built().path == tmp_path / f"{_compiler.key()}.so"
    assert f"kernels on cpu active, {_build.built().path}" in shown()


def test_key_tells_flags_and_compilers_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler(monkeypatch, tmp_path)
    keys = {_compiler.key(), _compiler.key(_compiler.find_compiler()), _compiler.key(flags=("-DTQ_GENERIC",))}
    assert len(keys) == 3
    monkeypatch.setattr(_compiler, "processor", lambda: "another")
    assert _compiler.key() not in keys
