"""Files: written whole, mode and link kept, nothing left behind, a full disk in words; locks end with the process."""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import CONTEXT
from torchquant._files import (
    check_format,
    digest_of,
    read_json,
    read_saved,
    run_python_file,
    write_json,
    write_whole,
)
from torchquant._locks import hold
from torchquant._shown import shown
from torchquant.deploy.packed.references import model_of
from torchquant.errors import ConfigError, one_line
from torchquant.plan import QuantPlan, read_yaml
from torchquant.runs.compare import load_plugin

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes, links and flock are of POSIX")


def started(work: Callable[[Path, Any], None], path: Path) -> tuple[Any, Any]:
    """A process that runs work(path, talk), and this end of `talk`."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(path, theirs))
    process.start()
    theirs.close()
    return process, ours


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", 1)
    os.chmod(path, mode)
    write_json(path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert read_json(path) == 2


@posix
def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    written = write_json(tmp_path / "a.json", 1)
    assert written.stat().st_mode == plain.stat().st_mode


@posix
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "a.json", tmp_path / "link.json", tmp_path / "dangling.json"
    write_json(target, 1)
    link.symlink_to(target)
    dangling.symlink_to(Path("far") / "b.json")
    write_json(link, 2)
    write_json(dangling, 3)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (read_json(target), read_json(tmp_path / "far" / "b.json")) == (2, 3)
    assert {path.name for path in tmp_path.rglob("*")} == {"far", "a.json", "b.json", "link.json", "dangling.json"}


@posix
def test_a_device_is_written_to_and_not_replaced() -> None:
    before = os.stat(os.devnull)
    write_json(Path(os.devnull), 1)
    assert os.path.samestat(before, os.stat(os.devnull))


def write_slowly(path: Path, talk: Any) -> None:
    """Write half, say so, and the whole when told to."""

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        talk.send("writing")
        talk.recv()
        temporary.write_text("whole")

    write_whole(path, write)


@posix
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed, talk = started(write_slowly, path)
    assert talk.recv() == "writing"
    killed.kill()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".tmp-notours-a.txt").write_text("somebody's")
    (tmp_path / ".tmp-01234567-b-a.txt").write_text("of another file")
    living, talk = started(write_slowly, path)
    assert talk.recv() == "writing"
    write_whole(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    talk.send("go on")
    living.join(60)
    assert living.exitcode == 0
    assert path.read_text() == "whole"
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", ".tmp-notours-a.txt", ".tmp-01234567-b-a.txt"}


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert done[:2] == ["fsync", "replace"]
    assert done[2:] == ["fsync"] * (sys.platform != "win32")


def fill(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("write", "message"),
    [(fill, "the disk is full"), (lambda path: path.write_bytes(b"x") and fill(path), "the disk is full")],
)
def test_a_full_disk_is_said_in_words(write: Any, message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", 1)
    with pytest.raises(ConfigError, match=message) as caught:
        write_whole(path, write)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def write_beyond_a_limit(path: Path, talk: Any) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        write_whole(path, lambda temporary: torch.save({"a": torch.zeros(100_000)}, temporary))
    except OSError as error:
        talk.send(f"{type(error).__name__} {error}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE ends in EFBIG on Linux")
def test_a_library_that_hides_what_the_disk_said_is_seen_through(tmp_path: Path) -> None:
    """torch.save says "unexpected pos" when a file cannot grow."""
    process, talk = started(write_beyond_a_limit, tmp_path / "a.pt")
    assert talk.recv() == f"UnwritableError cannot write {tmp_path / 'a.pt'}: File too large"
    process.join(60)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*a.yaml: there is no folder .*nowhere"):
        QuantPlan(()).save(tmp_path / "nowhere" / "a.yaml")


def test_a_folder_is_not_written_by_any_library(tmp_path: Path) -> None:
    """A library that has errors of its own is not asked."""
    with pytest.raises(ConfigError, match=f"cannot write {re.escape(str(tmp_path))}: Is a directory"):
        write_whole(tmp_path, lambda path: pytest.fail("was asked"))


class Bomb:
    def __reduce__(self) -> Any:
        return print, ("was run",)


def bad_checkpoints() -> dict[str, tuple[bytes, str]]:
    import io

    def saved(value: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    good = saved(nn.Linear(2, 2).state_dict())
    old = saved(nn.Linear(2, 2).state_dict(), _use_new_zipfile_serialization=False)
    return {
        "empty": (b"", "it is empty"),
        "text": (b"hello there", "torch.save did not write it"),
        "json": (b'{"a": 1}', "torch.save did not write it"),
        "zeros": (bytes(1000), "torch.save did not write it"),
        "cut": (good[: len(good) // 2], "it is damaged or truncated"),
        "changed": (good[:70] + b"\xff" * 40 + good[110:], "it is damaged or truncated|Python objects"),
        "old, cut": (old[: len(old) // 2], "it is a pickle of something else, or damaged"),
        "pickle": (pickle.dumps({"a": [1.0]}), "it is a pickle of something else, or damaged"),
        "bomb": (pickle.dumps(Bomb()), "it is a pickle of something else, or damaged"),
        "module": (saved(nn.Linear(2, 2)), "it holds Python objects"),
        "saved bomb": (saved(Bomb()), "it holds Python objects"),
    }


@pytest.mark.parametrize("kind", bad_checkpoints())
def test_what_is_no_checkpoint_is_said_in_words_of_ours(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = bad_checkpoints()[kind]
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_saved(path)
    text = str(caught.value)
    assert text.startswith(f"{path} holds no state dict that can be read safely: ")
    assert "weights_only" not in text
    assert "\n" not in text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe\x00", "is not text"), (b"[" * 100_000, "is not JSON")],
)
def test_what_is_no_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.json {message}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="b.json cannot be read: No such file"):
        read_json(tmp_path / "b.json")


def test_a_newer_format_is_named() -> None:
    check_format("x", {"plan": 1}, "plan", 1, "a plan")
    with pytest.raises(ConfigError, match="x is a plan of a newer version .format 2; this version reads 1"):
        check_format("x", {"plan": 2}, "plan", 1, "a plan")
    for wrong in ({}, [], None, {"plan": "1"}, {"plan": True}):
        with pytest.raises(ConfigError, match="x is not a plan"):
            check_format("x", wrong, "plan", 1, "a plan")


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{last}'] * 9)}]\n" for last, this in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "has .* values, but .* with its aliases expanded"),
        ("&a [*a]", "nested too deeply, or holds an alias of itself"),
        ("[" * 1500, "nested too deeply"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:print [x]", "is not YAML"),
        (f"a: {'9' * 5000}", "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
    ],
)
def test_a_yaml_file_that_explodes_or_is_none_takes_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_yaml_file_may_use_aliases(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- &a {weight: 'affine:8'}\n- {<<: *a, input: 'affine:4'}\n- *a\n")
    assert read_yaml(path) == [
        {"weight": "affine:8"},
        {"weight": "affine:8", "input": "affine:4"},
        {"weight": "affine:8"},
    ]
    path.write_text("")
    assert read_yaml(path) is None


def test_a_message_shows_a_value_shortly() -> None:
    deep: Any = "x"
    for _ in range(12):
        deep = [deep] * 9
    for value in (deep, "x" * 10_000, 10**5000, torch.zeros(100, 100), dict.fromkeys(range(100), deep)):
        assert len(shown(value)) <= 300
        assert "\n" not in shown(value)
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    assert one_line(ValueError("a\n\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"


def test_the_contents_of_a_folder(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> Path:
        for file, text in files.items():
            path = tmp_path / name / "in" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    first = digest_of(made("a", x="1", y="2"))
    assert digest_of(made("b", x="1", y="2")) == first
    assert len({first, digest_of(made("c", x="1", y="3")), digest_of(made("d", x="1", z="2"))}) == 3
    (tmp_path / "a" / ".DS_Store").write_text("of a desktop")
    assert digest_of(tmp_path / "a") == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def small(:\n", r"is not Python: line 1: "),
        ("\n\nmissing_name\n", r", line 3, failed: NameError: name 'missing_name' is not defined"),
        ("import sys\nsys.exit('no')\n", r", line 2, failed: SystemExit: no"),
        ("import no_such_package\n", r", line 1, failed: ModuleNotFoundError: No module named 'no_such_package'"),
        ("\0", r"(is not Python|failed)"),
    ],
)
def test_a_python_file_that_fails_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    before = dict(sys.modules)
    for run in (lambda: load_plugin(path), lambda: model_of(f"{path}:small"), lambda: run_python_file(path, "x")):
        with pytest.raises(ConfigError, match=f"mine.py ?{message}"):
            run()
    names = [name for name in {**before, **sys.modules} if name.startswith("torchquant_") and name.endswith("_mine")]
    assert [sys.modules.get(name) for name in names] == [before.get(name) for name in names]


def test_a_function_that_fails_to_build_a_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def small(width):\n    return width\n")
    with pytest.raises(ConfigError, match=r"mine.py:small failed: TypeError: small\(\) missing 1 required positional"):
        model_of(f"{path}:small")
    with pytest.raises(ConfigError, match="torch.nn:Linear failed: TypeError"):
        model_of("torch.nn:Linear")


def test_a_lock_is_of_one_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with hold(path) as mine:
        assert mine is None
        with hold(path) as other:
            assert other is not None
            assert f"process {os.getpid()} on " in other
        assert path.exists()
    assert not path.exists()
    with hold(path) as again:
        assert again is None


def hold_on(path: Path, talk: Any) -> None:
    with hold(path) as other:
        talk.send(other)
        talk.recv()


@posix
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    killed, talk = started(hold_on, path)
    assert talk.recv() is None  # nobody else has it
    killed.kill()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert path.exists()
    with hold(path) as other:
        assert other is None


def test_of_many_threads_one_has_the_lock_at_a_time(tmp_path: Path) -> None:
    path, inside, most, taken = tmp_path / ".lock", [], [], []
    end = time.monotonic() + 1.0

    def work() -> None:
        while time.monotonic() < end:
            with hold(path) as other:
                if other is None:
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.pop()
                    taken.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(taken) > 20
    assert not path.exists()
