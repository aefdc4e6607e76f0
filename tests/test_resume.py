"""A decomposition that is stopped anywhere goes on there, and ends with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svftool import ResourceError, UsageError, decompose
from svftool.checkpoints import TensorInfo
from svftool.factors import LayerSpool, factor_infos, plan_factor_shards, read_config
from svftool.processes import Processes
from svftool.stages import factorise

ROOT = Path(__file__).resolve().parents[1]
SHARDS = "2KB"
IN_THE_THIRD = 5
"""Renames: one tries the disk, one says what the run is, and each layer has one."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"l{i}.weight": torch.randn(9 + i, 7, generator=generator) for i in range(5)}
    save_file(tensors | {"norm": torch.ones(6)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_after(
    base: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: object,
    name: str,
    calls: int,
    **options: Any,
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
            decompose(base, output, **{"max_shard_size": SHARDS, **options})
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
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", IN_THE_THIRD)
    computed = []
    original = factorise.run_svds

    def watch(jobs, *args, **kwargs):
        computed.extend(job.name for job in jobs)
        return original(jobs, *args, **kwargs)

    monkeypatch.setattr(factorise, "run_svds", watch)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)
    assert len(computed) == 3


def journal(output: Path) -> dict[str, dict[str, str]]:
    """Return the layers that an interrupted run noted, each with the digests of its factors."""
    found = (json.loads(file.read_text()) for file in output.glob("layers/0*.json"))
    return {one["record"]["name"]: one["digests"] for one in found}


def digests_in(shards: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of every tensor."""
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for shard in shards
        for name, tensor in load_file(shard).items()
    }


@pytest.mark.parametrize("part", ["U", "S", "Vh"])
@pytest.mark.parametrize("damage", ["one bit", "zeros", "header", "shorter", "absent"])
def test_a_layer_whose_place_holds_something_else_is_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, damage: str
) -> None:
    expected = contents(decompose(base, tmp_path / "expected", max_shard_size=SHARDS).output)
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", IN_THE_THIRD)
    name, digests = next(iter(journal(tmp_path / "f.partial").items()))
    for shard in (tmp_path / "f.partial" / "layers").glob("svf*.safetensors"):
        data = bytearray(shard.read_bytes())
        length = int.from_bytes(data[:8], "little")
        place = json.loads(data[8 : 8 + length]).get(f"{name}.{part}")
        if place is None:
            continue
        begin, end = (8 + length + offset for offset in place["data_offsets"])
        assert hashlib.sha256(data[begin:end]).hexdigest() == digests[part]
        if damage == "one bit":
            data[begin] ^= 1
        elif damage == "zeros":
            data[begin:end] = bytes(end - begin)
        elif damage == "header":
            data[9] ^= 1
        elif damage == "shorter":
            del data[-1:]
        shard.unlink() if damage == "absent" else shard.write_bytes(data)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)
    assert contents(tmp_path / "f") == expected


class DeadDisk:
    """A disk that does `count` more things, half of the next write, and nothing from then on.

    What lies there then is what SIGKILL would have left.
    """

    def __init__(self, patch: pytest.MonkeyPatch, count: int) -> None:
        self.left, self.dead = count, False
        self._lock = threading.Lock()
        names = ("replace", "rename", "unlink", "mkdir", "write_text")
        calls = [(os, name) for name in ("pwrite", "fsync", "ftruncate")]
        for target, name in [*calls, *((Path, name) for name in names)]:
            patch.setattr(target, name, self._limited(name, getattr(target, name)))

    def _limited(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                alive = self.left > 0 and not self.dead
                if alive:
                    self.left -= 1
                    return original(*args, **options)
                if name == "pwrite" and not self.dead:
                    handle, data, offset = args
                    original(handle, data[: len(data) // 2], offset)
                self.dead = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        return call


@pytest.mark.parametrize("rank", ["full", "energy:0.9"])
def test_death_at_any_write_can_be_resumed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    options: Any = {"max_shard_size": SHARDS, "rank": rank, "exclude": ["l3*", "l4*"]}
    expected = contents(decompose(base, tmp_path / "expected", **options).output)
    output, resumed = tmp_path / "f", 0
    for count in range(0, 200, 1 if rank == "full" else 3):
        with monkeypatch.context() as patch:
            disk = DeadDisk(patch, count)
            with contextlib.suppress(ResourceError):
                decompose(base, output, **options)
        if not output.exists():
            resumed += bool(journal(tmp_path / "f.partial"))
            decompose(base, output, resume=True, **options)
            assert not list(tmp_path.glob("*.partial*"))
        assert contents(output) == expected, count
        shutil.rmtree(output)
        if not disk.dead:
            break
    assert not disk.dead
    assert resumed > 5


@pytest.mark.parametrize("rank", ["full", "energy:0.9"])
def test_the_journal_says_only_what_a_loss_of_power_leaves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    kept: dict[str, bytes] = {}  # what is on the disk, by inode
    noted = []
    fsync, replace = os.fsync, Path.replace

    def remember(handle: int) -> None:
        fsync(handle)
        if not Path(f"/proc/self/fd/{handle}").is_dir():
            kept[str(os.fstat(handle).st_ino)] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def survives(file: Path) -> bytes:
        return kept.get(str(file.stat().st_ino), b"")

    def check(self: Path, target: Path) -> Path:
        if target.parent.name == "layers" and target.name[0] == "0" and target.suffix == ".json":
            one = json.loads(survives(self))
            lost = tmp_path / "lost"
            lost.mkdir(exist_ok=True)
            for number, file in enumerate(self.parent.glob("*.safetensors")):
                (lost / str(number)).write_bytes(survives(file) or file.read_bytes()[:0])
            name = one["record"]["name"]
            spooled = name if rank == "full" else ""
            found = [
                {part: digests_in([file]).get(f"{spooled}.{part}".lstrip(".")) for part in "US"}
                for file in lost.iterdir()
                if file.stat().st_size
            ]
            assert {part: one["digests"][part] for part in "US"} in found
            shutil.rmtree(lost)
            noted.append(name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Path, "replace", check)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS, rank=rank)
    assert len(noted) == 5


def test_each_factor_is_written_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    original = os.pwrite

    def count(handle: int, data: Any, offset: int) -> int:
        nonlocal written
        done = original(handle, data, offset)
        written += done
        return done

    monkeypatch.setattr(os, "pwrite", count)
    decompose(base, tmp_path / "f", max_shard_size=SHARDS)
    shards = list((tmp_path / "f").glob("*.safetensors"))
    assert len(shards) > 1
    assert written == sum(shard.stat().st_size for shard in shards)


@pytest.mark.parametrize("options", [{}, {"rank": "0.5", "dtype": "bfloat16"}, {"rank": "3"},
                                     {"layers_only": True}, {"max_shard_size": "5GB"},
                                     {"max_shard_size": "1B"}, {"exclude": ("*",)}])  # fmt: skip
def test_spooled_and_placed_layers_give_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    options = {"max_shard_size": SHARDS, **options}
    decompose(base, tmp_path / "placed", **options)
    monkeypatch.setattr(Processes, "one_machine", False)
    decompose(base, tmp_path / "spooled", **options)
    assert contents(tmp_path / "placed") == contents(tmp_path / "spooled")


def shapes_of(sides: Sequence[tuple[int, int]], whole: int, path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {f"l{i:02}.weight": torch.randn(s, generator=generator) for i, s in enumerate(sides)}
    save_file(tensors | {"norm": torch.ones(whole), "other": torch.ones(5)}, path)
    return path


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("sides", [[(9, 7)] * 14, [(40, 30), *[(9, 7)] * 6] * 2, [(40, 30)] * 5,
                                   [*[(9, 7)] * 6, (40, 30)]])  # fmt: skip
@pytest.mark.parametrize("whole", [3, 700])
def test_shards_are_put_together_as_they_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: Any, whole: int, in_one_step: bool
) -> None:
    base = shapes_of(sides, whole, tmp_path / "base.safetensors")
    spooled: list[int] = []
    add = LayerSpool.add

    def watch(self: LayerSpool, *args: Any) -> None:
        if not in_one_step and len(spooled) == len(sides) // 2 == len(journal(self.folder.parent)):
            spooled.append(0)
            raise ResourceError("cut off")
        add(self, *args)
        files = [*self.folder.glob("0*.safetensors")]
        # One shard, and the layer that fits no more.
        spooled.append(sum(one.stat().st_size - 8 - 300 for one in files))

    monkeypatch.setattr(LayerSpool, "add", watch)
    options: Any = {"max_shard_size": SHARDS, "rank": "energy:0.9"}
    if not in_one_step:
        with pytest.raises(ResourceError):
            decompose(base, tmp_path / "f", **options)
    decompose(base, tmp_path / "f", resume=not in_one_step, **options)
    shards = sorted(tmp_path.glob("f/*.safetensors"))
    assert max(spooled) < 2 * max(2048, *(one.stat().st_size for one in shards))
    stated = read_config(tmp_path / "f")
    infos = {
        name: factor_infos(name, one.matrix, one.rank, torch.float32)
        for name, one in stated.layers.items()
    }
    kept = [TensorInfo("norm", torch.float32, (whole,), ""),
            TensorInfo("other", torch.float32, (5,), "")]  # fmt: skip
    planned = plan_factor_shards(infos, kept, max_bytes=2000)
    assert [one.file for one in planned] == [one.name for one in shards]
    for shard, file in zip(planned, shards, strict=True):
        assert {info.name for info in shard.infos} == set(load_file(file))
    assert digests_in(shards) == dict(stated.digests)


@pytest.mark.parametrize("damage", ["one bit", "shorter", "record"])
def test_a_damaged_shard_of_spooled_layers_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    base = shapes_of([(9, 7)] * 14, 3, tmp_path / "base.safetensors")
    options: Any = {"max_shard_size": SHARDS, "rank": "energy:0.9"}
    expected = contents(decompose(base, tmp_path / "expected", **options).output)
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", 22, **options)
    (shard,) = (tmp_path / "f.partial" / "layers").glob("shard-*")
    data = bytearray(shard.read_bytes())
    if damage == "one bit":
        data[-1] ^= 1
    elif damage == "shorter":
        del data[-1]
    else:
        (shard.parent / "000000.json").unlink()
    shard.write_bytes(data)
    decompose(base, tmp_path / "f", resume=True, **options)
    assert contents(tmp_path / "f") == expected


@pytest.mark.parametrize("spooled_first", [True, False])
def test_a_run_may_go_on_the_other_way(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spooled_first: bool
) -> None:
    expected = contents(decompose(base, tmp_path / "expected", max_shard_size=SHARDS).output)
    for number in range(IN_THE_THIRD, 40):
        output = tmp_path / "f"
        with monkeypatch.context() as patch:
            patch.setattr(Processes, "one_machine", not spooled_first)
            failed = run_after(base, output, patch, Path, "replace", number)
        if not failed or output.exists():
            break
        monkeypatch.setattr(Processes, "one_machine", spooled_first)
        decompose(base, output, max_shard_size=SHARDS, resume=True)
        assert contents(output) == expected
        shutil.rmtree(output)
    assert number > IN_THE_THIRD + 3


@pytest.mark.parametrize(
    ("options", "what"),
    [({"rank": "2"}, "rank"), ({"method": "exact"}, "method"), ({"exclude": ["l0*"]}, "layers")],
)
def test_changed_options_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, what: str
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", IN_THE_THIRD)
    with pytest.raises(UsageError, match=f"the interrupted run had another {what}"):
        decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True, **options)
    assert (tmp_path / "f.partial").is_dir()


def test_a_changed_base_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", IN_THE_THIRD)
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    with pytest.raises(UsageError, match="another checkpoint"):
        decompose(base, tmp_path / "f", max_shard_size=SHARDS, resume=True)


def test_without_resume_the_work_starts_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_after(base, tmp_path / "f", monkeypatch, Path, "replace", IN_THE_THIRD)
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


@pytest.mark.parametrize(("processes", "rank"), [(2, "full"), (3, "energy:0.9")])
def test_any_number_of_processes_gives_the_same_bytes(
    base: Path, tmp_path: Path, processes: int, rank: str
) -> None:
    args = ["decompose", base, "--max-shard-size", SHARDS, "--rank", rank, "-q"]
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
