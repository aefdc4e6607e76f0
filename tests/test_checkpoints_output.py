"""Outputs: whatever happens, the target is absent, or what it was, or complete."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from svftool.checkpoints import SafetensorsWriter, open_checkpoint, replace_output
from svftool.errors import ResourceError, UsageError, write_errors
from svftool.files.output import overlap

OLD, NEW = torch.zeros(5), torch.ones(5)
LAYOUT = {"w": (torch.float32, (5,))}


def write_file(path: Path, tensor: torch.Tensor) -> None:
    with SafetensorsWriter(path, LAYOUT) as writer:
        writer.write("w", tensor)


def write_folder(path: Path, tensor: torch.Tensor) -> None:
    path.mkdir()
    write_file(path / "model.safetensors", tensor)
    (path / "sub").mkdir()
    (path / "sub" / "config.json").write_text("{}")


def write_nothing(path: Path, tensor: torch.Tensor) -> None:
    """Leave the work in progress as it is."""


Write = Callable[[Path, torch.Tensor], None]
WRITERS = pytest.mark.parametrize("write", [write_file, write_folder], ids=["file", "folder"])


def stopped(write: Write, cause: BaseException) -> Write:
    """Return a writer that writes everything and then fails."""

    def fail(path: Path, tensor: torch.Tensor) -> None:
        write(path, tensor)
        raise cause

    return fail


def content(path: Path) -> torch.Tensor | None:
    """Return what a complete output holds, or None where there is nothing; else fail."""
    if not os.path.lexists(path):
        return None
    if path.is_dir():
        names = sorted(str(one.relative_to(path)) for one in path.rglob("*"))
        assert names == ["model.safetensors", "sub", "sub/config.json"]
    with open_checkpoint(path) as checkpoint:
        return checkpoint.read("w")


def holds(path: Path, tensor: torch.Tensor) -> bool:
    found = content(path)
    return found is not None and torch.equal(found, tensor)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(target: Path, write: Write, tensor: torch.Tensor = NEW, **options: Any) -> None:
    settings: dict[str, Any] = {"force": False, "inputs": [], **options}
    with replace_output(target, **settings) as partial:
        write(partial, tensor)


# The plain course.


@WRITERS
def test_an_output_appears_when_it_is_complete(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "out"
    with replace_output(target, force=False, inputs=[]) as partial:
        assert partial == tmp_path / "out.partial"
        write(partial, NEW)
        assert not target.exists()
    assert holds(target, NEW)
    assert left_in(tmp_path) == ["out"]


@WRITERS
def test_an_error_leaves_nothing(tmp_path: Path, write: Write) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        make(tmp_path / "deep" / "er" / "out", stopped(write, RuntimeError("mine")))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(), GeneratorExit()], ids=repr)
def test_a_stop_leaves_nothing_new(tmp_path: Path, stop: BaseException) -> None:
    make(tmp_path / "out", write_folder, OLD)
    with pytest.raises(type(stop)):
        make(tmp_path / "out", stopped(write_folder, stop), force=True)
    assert holds(tmp_path / "out", OLD)
    assert left_in(tmp_path) == ["out"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "out", write_file)
    assert holds(tmp_path / "a" / "b" / "out", NEW)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UsageError, match=r"a: not a folder, expected one to write into"):
        make(tmp_path / "a" / "out", write_file)
    with pytest.raises(UsageError, match=r"not a folder, expected one to write into"):
        make(tmp_path / "a" / "b" / "out", write_file)


def test_a_later_change_of_folder_does_not_move_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with replace_output(Path("out"), force=False, inputs=[]) as partial:
        monkeypatch.chdir(tmp_path / "elsewhere")
        write_file(partial, NEW)
    assert left_in(tmp_path) == ["elsewhere", "out"]


# What exists already.


@WRITERS
def test_an_existing_output_is_not_touched_without_force(tmp_path: Path, write: Write) -> None:
    make(tmp_path / "out", write, OLD)
    with pytest.raises(
        UsageError, match=r"out: exists already, expected a new output. Use --force"
    ):
        make(tmp_path / "out", write)
    assert holds(tmp_path / "out", OLD)


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    def write(partial: Path, tensor: torch.Tensor) -> None:
        write_file(partial, tensor)
        (tmp_path / "out").write_text("somebody else's")

    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out", write)
    assert (tmp_path / "out").read_text() == "somebody else's"
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [write_file, write_folder], ids=["file", "folder"])
@WRITERS
def test_force_swaps_the_complete_one_in(tmp_path: Path, old: Write, write: Write) -> None:
    target = tmp_path / "out"
    make(target, old, OLD)
    with replace_output(target, force=True, inputs=[]) as partial:
        write(partial, NEW)
        assert holds(target, OLD)
    assert holds(target, NEW)
    assert left_in(tmp_path) == ["out"]


@WRITERS
def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path, write: Write) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "precious").write_text("x")
    (tmp_path / "out").symlink_to("real")
    make(tmp_path / "out", write, force=True)
    assert not (tmp_path / "out").is_symlink()
    assert holds(tmp_path / "out", NEW)
    assert left_in(tmp_path / "real") == ["precious"]


def test_a_link_that_leads_nowhere_exists_too(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out", write_file)


@pytest.mark.parametrize("place", [".", "..", "", "../.."])
def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "precious").write_text("x")
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="holds the current or the home folder, expected one"):
        make(Path(place), write_folder, force=True)
    assert (tmp_path / "a" / "b" / "precious").exists()


def test_the_home_folder_and_the_root_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="the home folder"):
        make(tmp_path / "home", write_folder, force=True)
    with pytest.raises(UsageError, match="a whole file system, expected a file or folder"):
        make(Path("/"), write_folder, force=True)


# Inputs.


@pytest.mark.parametrize(
    ("target", "source", "relation"),
    [
        ("in", "in", "the same as"),
        ("in/out", "in", "inside"),
        ("in/a/../out", "in", "inside"),
        ("deep", "deep/in/x", "around"),
        ("link", "in", "the same as"),
        ("link/out", "in", "inside"),
        ("in", "link", "the same as"),
        ("x", "x.partial", "the same as"),
        ("x", "x.partial/model", "around"),
    ],
)
def test_an_output_that_touches_an_input_is_refused(
    tmp_path: Path, target: str, source: str, relation: str
) -> None:
    for folder in ("in/a", "deep/in/x", "x.partial"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "in" / "precious").write_text("x")
    (tmp_path / "x.partial" / "model").write_text("x")
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(
        UsageError, match=rf"the output is {relation} the input .*, expected a plac"
    ):
        make(tmp_path / target, write_file, force=True, inputs=[tmp_path / source])
    assert (tmp_path / "in" / "precious").exists()
    assert (tmp_path / "x.partial" / "model").exists()


def test_relative_and_absolute_paths_are_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert overlap(Path("a/../b"), tmp_path / "b") == "the same as"
    assert overlap(Path("b/c"), tmp_path / "b") == "inside"
    assert overlap(Path("b"), tmp_path / "b" / "c") == "around"
    assert overlap(Path("bc"), tmp_path / "b") == ""


def test_an_input_beside_the_output_is_fine(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    make(tmp_path / "base-svf", write_folder, inputs=[tmp_path / "base"])
    assert left_in(tmp_path) == ["base", "base-svf"]


# Work in progress.


def test_an_earlier_partial_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    (tmp_path / "out.partial.lock").touch()  # as a killed process leaves it
    make(tmp_path / "out", write_folder)
    assert holds(tmp_path / "out", NEW)
    assert left_in(tmp_path) == ["out"]


def test_a_partial_can_be_kept_and_resumed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half way"):
        make(target, stopped(write_folder, RuntimeError("half way")), keep_partial=True)
    assert left_in(tmp_path) == ["out.partial"]
    with replace_output(target, force=False, inputs=[], resume=True) as partial:
        assert holds(partial, NEW)
    assert holds(target, NEW)
    assert left_in(tmp_path) == ["out"]


def test_a_resumed_partial_is_kept_when_it_fails_again(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(RuntimeError, match="again"):
        make(tmp_path / "out", stopped(write_nothing, RuntimeError("again")), resume=True)
    assert left_in(tmp_path) == ["out.partial"]


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with replace_output(tmp_path / "out", force=False, inputs=[]) as partial:
        write_file(partial, NEW)
        with pytest.raises(UsageError, match=r"out: another process is writing it, expected to be"):
            make(tmp_path / "out", write_file, OLD)
        assert partial.exists()
    assert holds(tmp_path / "out", NEW)


def test_of_many_writers_one_writes(tmp_path: Path) -> None:
    done: list[int] = []
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        with suppress(UsageError):
            make(tmp_path / "out", write_file, torch.full((5,), float(number)))
            done.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert holds(tmp_path / "out", torch.full((5,), float(done[0])))
    assert left_in(tmp_path) == ["out"]


CHILD = """
import sys, time
from pathlib import Path
from svftool.files.output import replace_output
with replace_output(Path(sys.argv[1]), force=False, inputs=[]) as partial:
    partial.mkdir()
    (partial / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_another_process_is_noticed_and_its_death_too(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(UsageError, match="another process is writing it"):
            make(tmp_path / "out", write_folder)
        child.kill()
        child.wait()
        assert "out.partial" in left_in(tmp_path)
        make(tmp_path / "out", write_folder)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert holds(tmp_path / "out", NEW)
    assert left_in(tmp_path) == ["out"]


def test_a_swap_that_died_half_way_is_undone_before_anything_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "out.svftool-replaced", OLD)
    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out", write_folder)
    assert holds(tmp_path / "out", OLD)
    assert left_in(tmp_path) == ["out"]


def test_a_swap_that_died_at_its_end_is_finished(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", NEW)
    write_folder(tmp_path / "out.svftool-replaced", OLD)
    with pytest.raises(UsageError, match="exists already"):
        make(tmp_path / "out", write_folder, OLD)
    assert holds(tmp_path / "out", NEW)


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make(tmp_path / "out", write_file)
    assert "the file system has no locks" in caplog.text
    assert left_in(tmp_path) == ["out"]


# Failures at every step.

CALLS = (
    "open", "pwrite", "ftruncate", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir",
)  # fmt: skip


@contextmanager
def failing_at(
    number: int, failure: BaseException, after: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Make the call of that number to the system fail, once; before or after it took effect."""
    made: list[str] = []
    counter = itertools.count()

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            made.append(name)
            fails = next(counter) == number
            # Nothing pulls the plug here: waiting for the disk would only take time.
            result = None if name == "fsync" or (fails and not after) else call(*args, **options)
            if not fails:
                return result
            if name == "open" and after:
                os.close(result)
            raise failure

        return wrapped

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


FAILURES = pytest.mark.parametrize(
    ("failure", "after"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (KeyboardInterrupt(), False),
        (KeyboardInterrupt(), True),
    ],
    ids=["no space", "bad disk", "stopped before", "stopped after"],
)


@FAILURES
@pytest.mark.parametrize("old", [None, write_file, write_folder], ids=["new", "file", "folder"])
@WRITERS
def test_a_failure_at_any_step_leaves_old_or_new(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
    old: Write | None,
    failure: BaseException,
    after: bool,
) -> None:
    steps = 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / "out"
        if old is not None:
            old(target, OLD)
        with (
            failing_at(number, failure, after, monkeypatch) as made,
            suppress(type(failure), ResourceError),
        ):
            make(target, write, force=True)
        steps = len(made)
        where = f"step {number} ({made[number : number + 1]})"
        if content(target) is None:
            assert old is None, where
        else:
            assert holds(target, NEW) or (old is not None and holds(target, OLD)), where
        assert "out.partial" not in left_in(folder), where
        # The next run finds its way, and leaves nothing of the failed one behind.
        make(target, write, force=True)
        assert holds(target, NEW)
        assert left_in(folder) == ["out"]
        if number >= steps:
            break
    assert steps > 8


def test_what_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"out.partial: no space left, expected enough free sp"):
        make(tmp_path / "out", write_file)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left, expected enough free space"),
        (errno.EDQUOT, "the disk quota is used up, expected room"),
        (errno.EACCES, "no permission, expected permission to write"),
        (errno.EROFS, "the file system is read-only, expected a writable one"),
        (errno.EMFILE, "too many open files, expected a higher limit"),
        (errno.ENAMETOOLONG, "the name is too long, expected a shorter one"),
    ],
)
def test_errors_of_the_system_name_the_file(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(ResourceError, match=rf"{tmp_path}/x: {message}"), write_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    with pytest.raises(ResourceError, match=rf"{tmp_path}: {message}"), write_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_any_error_of_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"No such file \(ENOENT\)"), write_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="no permission, expected permission to write"):
        make(tmp_path / "closed" / "out", write_file)
