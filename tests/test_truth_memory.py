"""Free memory in control groups, and the memory that a decomposition is said to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svftool.checkpoints import open_checkpoint
from svftool.errors import CheckpointError, DataError
from svftool.few_shot.list_files import read_hsnet_pickle
from svftool.machine import _control_group
from svftool.stages.decompose import plan

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], most: object, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {idle}\n")


def own(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "own"
    path.write_text(f"12:cpu,cpuacct:/x\n{line}\n")
    return path


@pytest.mark.parametrize(
    ("names", "place", "line"), [(V2, "", "0::/a/b"), (V1, "memory", "9:memory:/a/b")]
)
def test_file_pages_are_free_and_the_tightest_group_counts(
    tmp_path: Path, names: tuple[str, str, str], place: str, line: str
) -> None:
    root = tmp_path / "groups" / place
    group(root / "a" / "b", names, 1000, 900, 700)
    mine = own(tmp_path, line)
    assert _control_group(tmp_path / "groups", mine) == 800
    group(root / "a", names, 2000, 1900, 0)
    assert _control_group(tmp_path / "groups", mine) == 100
    group(root, names, "max" if names is V2 else (1 << 63) - 4096, 9999, 0)
    assert _control_group(tmp_path / "groups", mine) == 100


@pytest.mark.parametrize("names", [V1, V2])
def test_inside_a_container_the_root_is_the_group(
    tmp_path: Path, names: tuple[str, str, str]
) -> None:
    root = tmp_path / "groups" / ("memory" if names is V1 else "")
    group(root, names, 500, 450, 400)
    line = "0::/../../outside" if names is V2 else "3:memory:/docker/abc"
    assert _control_group(tmp_path / "groups", own(tmp_path, line)) == 450


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert _control_group(tmp_path / "groups", tmp_path / "own") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_plan_counts_what_rounding_takes(tmp_path: Path, dtype: str) -> None:
    save_file({"a.weight": torch.randn(512, 1024)}, tmp_path / "x.safetensors")
    plain = plan(tmp_path / "x.safetensors").peak_memory_bytes
    rounded = plan(tmp_path / "x.safetensors", dtype=dtype).peak_memory_bytes
    # Three matrices and the factors, in float64.
    assert rounded - plain >= 8 * (3 * 512 * 1024 + 2 * 512 * 512 + 512 * 1024)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2147483647\n", b"r\xff\xff\xff\xff"])
def test_a_pickle_of_a_few_bytes_takes_no_memory(tmp_path: Path, put: bytes) -> None:
    path = tmp_path / "split.pkl"
    path.write_bytes(b"\x80\x02}" + put + b".")
    with pytest.raises(DataError, match="numbers an object"):
        read_hsnet_pickle(path)


@pytest.mark.parametrize(
    "shape", ["[0,9223372036854775807,9]", f"[{'9' * 4000}]", "[0" + ",1" * 99 + "]"]
)
def test_shapes_that_torch_cannot_hold_are_one_short_line(tmp_path: Path, shape: str) -> None:
    entry = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(entry).to_bytes(8, "little") + entry)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert len(str(raised.value).replace(str(path), "")) < 400
