"""A decomposition that is stopped anywhere goes on there, and ends with the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svftool import ResourceError, UsageError, decompose
from svftool.stages import factorise

ROOT = Path(__file__).resolve().parents[1]
SHARDS = "2KB"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"l{i}.weight": torch.randn(9 + i, 7, generator=generator) for i in range(5)}
    save_file(tensors | {"norm": torch.ones(6)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_after(
    base: Path, output: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, calls: int
) -> bool:
    """Let call number `calls` of a function fail as a full disk does; return whether it came."""
    original = getattr(target, name)
    count = 0

    def fail_once(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail_once)
        try:
            decompose(base, output, max_shard_size=SHARDS)
        except ResourceError:
            return True
        return False


@pytest.mark.parametrize(
    ("target", "name"),
    [(os, "pwrite"), (Path, "replace"), (Path, "write_text"), (os, "fsync")],
    ids=["write", "rename", "text", "fsync"],
)
def test_a_failure_at_every_step_can_be_resumed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str
) -> None:
    expected = contents(decompose(base, tmp_path / "expected", max_shard_size=SHARDS).output)
    failures = 0
    for call in range(1, 200):
        output = tmp_path / f"output-{call}"
        if not run_after(base, output, monkeypatch, target, name, call):
            break
        failures += 1
        if output.exists():  # it came after the rename: the output is complete
            assert contents(output) == expected
            continue
        decompose(base, output, max_shard_size=SHARDS, resume=True)
        assert contents(output) == expected
        assert not list(tmp_path.glob("*.partial*"))
    assert failures >= 1


def test_finished_layers_are_not_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two files a layer are renamed into place: the seventh rename comes in the fourth layer.
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 8)
    computed = []
    original = factorise.run_svds

    def watch(jobs, *args, **kwargs):
        computed.extend(job.name for job in jobs)
        return original(jobs, *args, **kwargs)

    monkeypatch.setattr(factorise, "run_svds", watch)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)
    assert 0 < len(computed) < 5


def test_a_damaged_spooled_layer_is_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(decompose(base, tmp_path / "expected", max_shard_size=SHARDS).output)
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 8)
    spooled = sorted((tmp_path / "f.partial" / "layers").glob("*.safetensors"))
    data = bytearray(spooled[0].read_bytes())
    data[-1] ^= 1
    spooled[0].write_bytes(data)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)
    assert contents(tmp_path / "f") == expected


@pytest.mark.parametrize(
    ("options", "what"),
    [({"rank": "2"}, "rank"), ({"method": "exact"}, "method"), ({"exclude": ["l0*"]}, "layers")],
)
def test_changed_options_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, what: str
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 8)
    with pytest.raises(UsageError, match=f"the interrupted run had another {what}"):
        decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True, **options)
    assert (tmp_path / "f.partial").is_dir()


def test_a_changed_base_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 8)
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    with pytest.raises(UsageError, match="another checkpoint"):
        decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)


def test_without_resume_the_work_starts_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 8)
    decompose(base, tmp_path / "f", rank="2")
    assert not list(tmp_path.glob("*.partial*"))


def test_resuming_nothing_is_a_plain_run(base: Path, tmp_path: Path) -> None:
    decompose(base, tmp_path / "f", resume=True)
    assert (tmp_path / "f" / "svf_config.json").is_file()


def command(*args: object, processes: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes else []), "-m", "svftool", *map(str, args)]


def test_killed_processes_resume(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {f"l{i}.weight": torch.randn(420, 400, generator=generator) for i in range(12)}
    base = tmp_path / "base.safetensors"
    save_file(tensors, base)
    args = ["decompose", base, "--max-shard-size", "3MB"]
    subprocess.run(command(*args, "-o", tmp_path / "expected", "-q"), check=True, cwd=ROOT)
    output = tmp_path / "f"
    kills = 0
    for layers_before_kill in (1, 4, 9):
        process = subprocess.Popen(command(*args, "-o", output, "--resume", "-q"), cwd=ROOT)
        while process.poll() is None:
            finished = list(output.with_name("f.partial").glob("layers/0*.json"))
            if len(finished) >= layers_before_kill:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.002)
        assert process.wait() != 0, "the run ended before it was killed"
        assert not output.exists()
    assert kills == 3
    subprocess.run(command(*args, "-o", output, "--resume", "-q"), check=True, cwd=ROOT)
    assert contents(output) == contents(tmp_path / "expected")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    base: Path, tmp_path: Path, processes: int
) -> None:
    args = ["decompose", base, "--max-shard-size", SHARDS, "-q"]
    subprocess.run(command(*args, "-o", tmp_path / "one"), check=True, cwd=ROOT)
    found = subprocess.run(
        command(*args, "-o", tmp_path / "many", processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("layers decomposed") == 1
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
