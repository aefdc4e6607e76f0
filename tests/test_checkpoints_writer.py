"""Writing safetensors files and sharded checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from svftool.checkpoints import (
    CheckpointWriter,
    SafetensorsWriter,
    TensorInfo,
    dtype_name,
    open_checkpoint,
    parse_size,
    plan_shards,
    shard_names,
)
from svftool.checkpoints.dtypes import CODE_OF_DTYPE
from svftool.errors import ResourceError, UsageError

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, t.dtype, tuple(t.shape), "x") for name, t in tensors.items()]


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(left, right)


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor with random bits; of any dtype, NaN included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> None:
    with SafetensorsWriter(path, layout_of(tensors), **options) as writer:  # type: ignore[arg-type]
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def test_the_byte_comparison_can_fail() -> None:
    assert same_bytes(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.zeros(2), torch.zeros(1, 2))
    assert not same_bytes(torch.zeros(2, dtype=torch.int32), torch.zeros(2))


@pytest.mark.parametrize("dtype", list(CODE_OF_DTYPE), ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (5, 2, 3)], ids=str)
def test_every_dtype_and_shape_survives(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if dtype is torch.float4_e2m1fn_x2 and not shape:
        pytest.skip("values packed two to a byte have a last dimension")
    tensor = sample(dtype, *shape)
    write(tmp_path / "x.safetensors", {"t": tensor})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.infos["t"].dtype is dtype
        assert same_bytes(checkpoint.read("t"), tensor)


def test_the_formats_own_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(3, 4),
        "b": torch.tensor(True),
        "e": torch.zeros(0, 2),
        "h": torch.randn(5).half(),
    }
    write(tmp_path / "x.safetensors", tensors, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_bytes_are_those_of_the_formats_own_library(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = tiny_checkpoint()
    with open_checkpoint(base) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.infos}
        write(tmp_path / "x", tensors, metadata=checkpoint.metadata, keep_order=True)
    assert (tmp_path / "x").read_bytes() == base.read_bytes()


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
        st.tuples(
            st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=5,
    ).filter(lambda layout: "__metadata__" not in layout),
    st.randoms(),
)
def test_order_of_writing_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, random: object
) -> None:
    folder = tmp_path_factory.mktemp("order")
    tensors = {name: sample(dtype, *shape) for name, (dtype, shape) in layout.items()}
    names = list(tensors)
    random.shuffle(names)  # type: ignore[attr-defined]
    write(folder / "one", tensors)
    with SafetensorsWriter(folder / "two", layout) as writer:
        for name in names:
            writer.write(name, tensors[name])
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    with open_checkpoint(folder / "one") as checkpoint:
        assert all(same_bytes(checkpoint.read(name), tensors[name]) for name in tensors)


def test_wide_dtypes_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "byte": torch.ones(3, dtype=torch.uint8),
        "half": torch.ones(3).half(),
        "wide": torch.ones(3).double(),
        "also": torch.ones(1).half(),
    }
    write(tmp_path / "x", tensors)
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert list(checkpoint.infos) == ["wide", "half", "also", "byte"]
    write(tmp_path / "y", tensors, keep_order=True)
    with open_checkpoint(tmp_path / "y") as checkpoint:
        assert list(checkpoint.infos) == list(tensors)
        assert same_bytes(checkpoint.read("wide"), tensors["wide"])


def test_tensors_with_strides_and_from_slices_are_written_by_value(tmp_path: Path) -> None:
    big = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": big.T, "slice": big[1:3, ::2], "conj": torch.tensor([1 + 2j]).conj()}
    write(tmp_path / "x", tensors)
    with open_checkpoint(tmp_path / "x") as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_many_threads_may_write(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((101,), float(i)) for i in range(64)}
    with SafetensorsWriter(tmp_path / "x", layout_of(tensors)) as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: writer.write(name, tensors[name]), tensors))
        assert writer.complete
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_a_missing_tensor_is_an_error_at_the_end(tmp_path: Path) -> None:
    layout: Layout = {"a": (torch.float32, (1,)), "b": (torch.float32, (1,))}
    writer = SafetensorsWriter(tmp_path / "x", layout)
    writer.write("b", torch.ones(1))
    with pytest.raises(ValueError, match=r"x: a: never written, expected all of the layout"):
        writer.close()


def test_an_error_inside_the_block_is_not_replaced_by_the_missing_tensor(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the user's own"),
        SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (1,))}),
    ):
        raise RuntimeError("the user's own")


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "message"),
    [
        ("a", torch.ones(2), ValueError, r"a: torch.float32 \(2,\), expected torch.float32 \(1,\)"),
        ("a", torch.ones(1).half(), ValueError, r"a: torch.float16 .*, expected torch.float32"),
        ("c", torch.ones(1), KeyError, "c"),
    ],
)
def test_what_is_not_in_the_layout_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, kind: type[Exception], message: str
) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (1,))})
    with pytest.raises(kind, match=message):
        writer.write(name, tensor)
    writer.abort()


def test_writing_twice_is_refused(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (1,))}) as writer:
        writer.write("a", torch.ones(1))
        with pytest.raises(ValueError, match="a: written twice, expected once"):
            writer.write("a", torch.ones(1))


def test_an_existing_file_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(ResourceError, match="File exists"):
        SafetensorsWriter(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "precious"


def test_a_disk_without_room_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"x: 1000 bytes free on the disk, expected 40\d\d\."):
        SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (1000,))})
    assert not (tmp_path / "x").exists()


def test_a_disk_that_fills_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (1000,))})

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match=r"x: no space left, expected enough free space"):
            writer.write("a", torch.ones(1000))
    writer.abort()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    tensor = torch.randn(5, 5)
    write(tmp_path / "x", {"a": tensor})
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


# Shards.

# Not empty: there, empty tensors count as one shared storage and follow the first of them.
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 60))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], budget: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    split = hub.split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=budget
    )
    plan = plan_shards(infos_of(tensors), budget)
    theirs = {name: set(names) for name, names in split.filename_to_tensors.items()}
    ours = dict(zip(shard_names("model", len(plan)), map(set, plan), strict=True))
    assert ours == theirs


@given(SIZES, st.integers(1, 60))
def test_no_shard_is_over_budget_unless_one_tensor_is(sizes: list[int], budget: int) -> None:
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    plan = plan_shards(infos_of(tensors), budget)
    assert sorted(name for shard in plan for name in shard) == sorted(tensors)
    for shard in plan:
        assert shard
        assert len(shard) == 1 or sum(tensors[name].numel() for name in shard) <= budget


def test_without_a_budget_there_is_one_shard() -> None:
    assert plan_shards(infos_of({"a": torch.ones(9), "b": torch.ones(9)}), None) == [["a", "b"]]
    assert plan_shards([], 5) == [[]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("100KB", 100_000), ("1.5 MiB", 3 * 2**19), ("7", 7), ("2tb", 2 * 10**12)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 bananas", "0", "0.1B", "1e9", "5G B"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"size '.*', expected a positive number with KB"):
        parse_size(text)


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], budget: int | None, **options: object
) -> None:
    folder.mkdir()
    by_name = {info.name: info for info in infos_of(tensors)}
    plan = plan_shards(by_name.values(), budget)
    shards = [[by_name[name] for name in shard] for shard in plan]
    with CheckpointWriter(folder, shards=shards, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", {"a": torch.ones(4)}, None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.index_file is None


def test_metadata_is_what_is_given(tmp_path: Path) -> None:
    for number, metadata in enumerate([{}, {"note": "mine"}]):
        write_shards(tmp_path / str(number), {"a": torch.ones(4)}, None, metadata=metadata)
        with open_checkpoint(tmp_path / str(number)) as checkpoint:
            assert checkpoint.metadata == metadata


def test_several_shards_have_an_index_as_transformers_writes_it(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(4), "a": torch.zeros(4), "c": torch.ones(2)}
    write_shards(tmp_path / "out", tensors, 24, index_metadata={"total_parameters": 10})
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*shard_names("model", 2), "model.safetensors.index.json"]
    expected = {
        "metadata": {"total_parameters": 10, "total_size": 40},
        "weight_map": {"a": names[1], "b": names[0], "c": names[1]},
    }
    text = (tmp_path / "out" / "model.safetensors.index.json").read_text()
    assert text == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_the_files_are_those_that_transformers_writes(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"layer.{i}.weight": torch.randn(8, 8) for i in range(10)}
    (tmp_path / "theirs").mkdir()
    hub.save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size=700)
    write_shards(tmp_path / "ours", tensors, 700, keep_order=True)
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".json"):
            assert json.loads(ours[name]) == json.loads(theirs[name])
        else:
            assert ours[name] == theirs[name]


def test_names_and_metadata_of_shards_can_be_those_of_a_base(tmp_path: Path) -> None:
    write_shards(
        tmp_path / "out",
        {"a": torch.ones(4), "b": torch.ones(4)},
        16,
        files=["weights-one.safetensors", "weights-two.safetensors"],
        index_file="weights.safetensors.index.json",
        metadata=[{"format": "pt"}, {"note": "two"}],
    )
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.index_file == "weights.safetensors.index.json"
        assert [(shard.file, shard.names, shard.metadata) for shard in checkpoint.shards] == [
            ("weights-one.safetensors", ("a",), {"format": "pt"}),
            ("weights-two.safetensors", ("b",), {"note": "two"}),
        ]


def test_no_index_is_written_when_a_tensor_is_missing(tmp_path: Path) -> None:
    infos = infos_of({"a": torch.ones(1), "b": torch.ones(1)})
    with (
        pytest.raises(ValueError, match="b: never written"),
        CheckpointWriter(tmp_path, shards=[[infos[0]], [infos[1]]]) as writer,
    ):
        writer.write("a", torch.ones(1))
    assert not list(tmp_path.glob("*.json"))


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    info = TensorInfo("a", torch.float32, (1,), "x")
    with pytest.raises(ValueError, match="in two places"):
        CheckpointWriter(tmp_path, shards=[[info], [info]])
    assert not list(tmp_path.iterdir())


def test_real_weights_are_written_as_they_were(tmp_path: Path, data: Path) -> None:
    base = data / "checkpoints" / "stories260K" / "model.safetensors"
    with open_checkpoint(base) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.infos}
        metadata = checkpoint.metadata
    save_file(tensors, tmp_path / "theirs", metadata=dict(metadata))
    write(tmp_path / "ours", tensors, metadata=metadata, keep_order=True)
    assert (
        (tmp_path / "ours").read_bytes() == base.read_bytes() == (tmp_path / "theirs").read_bytes()
    )
