"""``svftool extract --as lora`` that is interrupted, killed, or shared by processes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start
from safetensors.torch import save_file

from svftool.errors import FactorsError, UsageError
from svftool.factors.spool import Spool
from svftool.stages import truncation
from svftool.stages.extract_lora import LoraOptions, LoraResult, extract_lora

LAYERS = 4


class Cut(BaseException):
    """What ends a run, as Ctrl-C does."""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    before = {f"l{at}.weight": torch.randn(16 + at, 12) for at in range(LAYERS)}
    before["l0.bias"] = torch.zeros(16)
    after = {
        name: value + 0.1 * (torch.randn(len(value), 3) @ torch.randn(3, 12))
        if value.ndim > 1
        else value + 1
        for name, value in before.items()
    }
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for path, state in zip(paths, (before, after), strict=True):
        save_file(state, path)
    return paths


def extract(pair: tuple[Path, Path], output: Path, **options: Any) -> LoraResult:
    resume, force = options.pop("resume", False), options.pop("force", False)
    wanted = LoraOptions(rank=options.pop("rank", "2"), **options)
    return extract_lora(*pair, output=output, options=wanted, resume=resume, force=force)


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    files = sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files if file.name != "adapter_config.json"}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which layers are truncated."""
    seen: list[str] = []
    real = truncation.truncate

    def noted(name: str, *args: Any, **named: Any) -> Any:
        seen.append(name)
        return real(name, *args, **named)

    monkeypatch.setattr(truncation, "truncate", noted)
    return seen


@pytest.mark.parametrize("layout", ["peft", "comfy"])
@pytest.mark.parametrize("end", [Cut, os._exit])
def test_whatever_write_it_ends_at_nothing_finished_is_lost(
    tmp_path: Path,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    end: Any,
) -> None:
    whole = extract(pair, tmp_path / "whole", layout=layout)
    writes = 2 * LAYERS + 3  # of each layer two files; what is asked for, and the output
    for at in range(1, writes):
        out = tmp_path / f"out{at}"
        _ended_at(at, end, lambda out=out: extract(pair, out, layout=layout))
        assert not out.exists()
        with monkeypatch.context() as patch:
            seen = counted(patch)
            resumed = extract(pair, out, layout=layout, resume=True)
        finished = min(max((at - 2) // 2, 0), LAYERS)
        assert len(seen) == LAYERS - finished, at
        assert resumed.layers == whole.layers
        assert contents(out) == contents(whole.output)
        assert not [one for one in tmp_path.iterdir() if f"out{at}." in one.name]


def _ended_at(number: int, end: Any, work: Callable[[], object]) -> None:
    """Run until a file has been renamed so many times; a process of its own for a sudden end."""
    real, done = Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        if ".probe" in self.name:
            return real(self, target)
        done[0] += 1
        if done[0] == number:
            if end is os._exit:
                end(9)
            raise end
        return real(self, target)

    if end is os._exit:
        child = os.fork()
        if not child:
            Path.replace = replace  # type: ignore[method-assign]
            try:
                work()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        return
    Path.replace = replace  # type: ignore[method-assign]
    try:
        with pytest.raises(end):
            work()
    finally:
        Path.replace = real  # type: ignore[method-assign]


@pytest.fixture
def cut(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the output of a run that ended when it had kept two layers."""
    real, kept = Spool.keep, []

    def keep(self: Spool, name: str, *args: Any) -> None:
        if len(kept) == 2:
            raise Cut
        kept.append(name)
        real(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "keep", keep)
        with pytest.raises(Cut):
            extract(pair, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": "3"}, "rank '2', now '3'"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"layout": "comfy"}, "layout"),
        ({"max_rank": 1}, "max_rank"),
        ({"exclude": ("l0*",)}, "layers"),
    ],
)
def test_another_request_is_not_resumed(
    pair: tuple[Path, Path], cut: Path, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=f"another.*{word}"):
        extract(pair, cut, resume=True, **options)
    assert extract(pair, cut, **options).layers  # anew, without --resume


def test_another_fine_tune_is_not_resumed(pair: tuple[Path, Path], cut: Path) -> None:
    os.utime(pair[1], ns=(1, 1))
    with pytest.raises(UsageError, match="another fine-tune"):
        extract(pair, cut, resume=True)


def test_kept_work_that_was_damaged_is_done_again(
    tmp_path: Path, pair: tuple[Path, Path], cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = tmp_path.glob(".*.scratch")
    tensors = sorted(folder.glob("*.safetensors"))
    data = bytearray(tensors[0].read_bytes())
    data[-1] ^= 1
    tensors[0].write_bytes(data)
    tensors[1].write_bytes(b"")
    seen = counted(monkeypatch)
    extract(pair, cut, resume=True)
    assert len(seen) == LAYERS


def test_a_damaged_record_is_said(tmp_path: Path, pair: tuple[Path, Path], cut: Path) -> None:
    (folder,) = tmp_path.glob(".*.scratch")
    next(folder.glob("0*.json")).write_text('{"rank": []}')
    with pytest.raises(FactorsError, match="interrupted run is broken"):
        extract(pair, cut, resume=True)


def test_processes_share_the_layers(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    alone = extract(pair, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["extract", *map(str, pair), "-o", str(tmp_path / "both"), "--as", "lora"]
    words += ["--rank", "2", "--json"]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folders = [tmp_path / "p0", tmp_path / "p1"]
    for folder in folders:
        folder.mkdir()
    runs = [start(words, folder, RANK=at, **shared) for at, folder in enumerate(folders)]
    for one in runs:
        assert one.wait() == 0, one.stderr
    assert contents(tmp_path / "both") == contents(alone.output)
    document = json.loads(runs[0].stdout)
    assert [row["name"] for row in document["layers"]] == [row.name for row in alone.layers]
    assert not runs[1].stdout
    assert not list(tmp_path.glob(".*"))
