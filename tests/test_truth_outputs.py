"""Outputs on file systems that refuse, in shared folders, and of private inputs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svftool.checkpoints import SafetensorsWriter, replace_output
from svftool.cli import app
from svftool.errors import ResourceError, UsageError
from svftool.files import output
from svftool.training.workspace import Workspace

CODES = [
    errno.EXDEV, errno.ENOSYS, errno.ESTALE, errno.EINTR, errno.EBUSY, errno.EMFILE, errno.EIO,
    errno.EACCES, errno.ELOOP, errno.ENXIO, errno.EAGAIN, errno.ENOTCONN, 9999,
]  # fmt: skip


def write(path: Path) -> None:
    with SafetensorsWriter(path, {"w": (torch.float32, (2,))}) as writer:
        writer.write("w", torch.ones(2))


def make(target: Path, *, force: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with replace_output(target, force=force, inputs=inputs) as partial:
        write(partial)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["replace", "fsync", "open", "unlink", "ftruncate", "pwrite"])
def test_any_errno_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(code, "refused")

    (tmp_path / "out.partial").touch()
    (tmp_path / "out.partial.lock").touch()
    # Path.unlink goes to os.unlink, and so on.
    monkeypatch.setattr(output.os, call, refuse)
    with pytest.raises((ResourceError, UsageError)):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", CODES)
def test_what_cannot_be_removed_does_not_hide_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, "refused")

    def fail() -> None:
        with replace_output(tmp_path / "out", force=False, inputs=[]) as partial:
            write(partial)
            monkeypatch.setattr(output, "remove", refuse)
            raise UsageError("the cause")

    with pytest.raises(UsageError, match="the cause"):
        fail()


def test_what_a_killed_process_set_aside_goes(tmp_path: Path) -> None:
    scratch = output.scratch_folder(tmp_path / "out.partial")
    left = scratch.__enter__()  # and the process is killed
    (left / "factors").touch()
    with output.scratch_folder(tmp_path / "out.partial") as folder:
        assert folder == left
        assert not (folder / "factors").exists()
    assert not folder.exists()


def test_what_was_set_aside_is_known_where_it_could_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "refused")

    with monkeypatch.context() as patch, output.scratch_folder(tmp_path / "out.partial") as folder:
        (folder / "factors").mkdir()
        patch.setattr(output.os, "rmdir", refuse)
    assert folder.exists()
    with output.scratch_folder(tmp_path / "out.partial") as again:
        assert not (again / "factors").exists()
    assert not folder.exists()


def test_what_others_set_aside_stays(tmp_path: Path) -> None:
    folder = tmp_path / ".out.partial.scratch"
    folder.mkdir()
    (folder / "mine").touch()
    with (
        pytest.raises(UsageError, match="somebody else's"),
        output.scratch_folder(tmp_path / "out.partial"),
    ):
        pass
    assert (folder / "mine").exists()


@pytest.mark.parametrize("folder", [True, False])
def test_an_unrelated_partial_is_not_deleted(tmp_path: Path, folder: bool) -> None:
    other = tmp_path / "out.partial"
    if folder:
        other.mkdir()
    else:
        other.write_text("mine")
    with pytest.raises(UsageError, match="somebody else's"):
        make(tmp_path / "out")
    assert other.exists()
    make(tmp_path / "out", force=True)
    assert not other.exists()


def test_kept_work_is_known_again(tmp_path: Path) -> None:
    def stop() -> None:
        with replace_output(tmp_path / "out", force=False, inputs=[], keep_partial=True) as partial:
            partial.mkdir()
            raise UsageError("stop")

    with pytest.raises(UsageError, match="stop"):
        stop()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with replace_output(tmp_path / "out", force=False, inputs=[], resume=True) as partial:
        assert partial.is_dir()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_planted_link_is_not_followed(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "x").touch()
    (tmp_path / "out.partial").symlink_to("victim")
    with (
        pytest.raises(UsageError, match="somebody else's"),
        replace_output(tmp_path / "out", force=False, inputs=[], resume=resume),
    ):
        pass
    assert (tmp_path / "victim" / "x").exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("in_folder", [True, False])
def test_weights_stay_as_private_as_they_were(tmp_path: Path, mode: int, in_folder: bool) -> None:
    base = tmp_path / "base" / "model.safetensors"
    base.parent.mkdir()
    write(base)
    base.chmod(mode)
    before = os.umask(0o022)
    try:
        make(tmp_path / "out", inputs=(base.parent if in_folder else base,))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not output.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no exchanging rename here")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()

    seen = []
    exchange = output.exchange

    def watch(one: Path, other: Path) -> bool:
        seen.append(other.exists())
        return exchange(one, other)

    monkeypatch.setattr(output, "exchange", watch)
    with replace_output(tmp_path / "a", force=True, inputs=[]) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert seen == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


@pytest.mark.parametrize("words", [["merge", "factors"], ["extract", "base", "tuned"]])
def test_other_processes_of_torchrun_leave_the_output_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out.svf.safetensors")])
    assert (result.exit_code, result.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")]).exit_code != 0


def test_what_was_asked_for_is_never_seen_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def half(path: Path, text: str, *args: object, **options: object) -> int:
        with path.open("w") as file:
            file.write(text[:3])
        raise Killed

    work = Workspace(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Killed):
            work.begin({"seed": 1}, resume=True)
    work.begin({"seed": 1}, resume=True)
    with pytest.raises(UsageError, match="seed was 1, now 2"):
        work.begin({"seed": 2}, resume=True)
