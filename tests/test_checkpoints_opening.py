"""Opening files, folders, shard indexes and hub ids."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svftool.checkpoints import open_checkpoint, side_files, wrapper_prefix
from svftool.errors import CheckpointError, MissingDependencyError, ResourceError
from svftool.files.hub import wanted_files
from svftool.files.hub_ids import looks_like_hub_id
from svftool.files.names import is_plain_name

Tiny = Callable[..., Path]
ONE = {"a": torch.ones(2, 3)}
TWO = {"b": torch.zeros(4)}


def save(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata or None)
    return path


def save_sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save(folder / first, ONE, format="pt")
    save(folder / second, TWO, format="pt")
    index = {"metadata": {"total_size": 40}, "weight_map": weight_map or {"b": second, "a": first}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# Files.


def test_a_file_is_read_as_its_own_library_reads_it(tiny_checkpoint: Tiny) -> None:
    path = tiny_checkpoint()
    expected = load_file(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert not checkpoint.is_folder
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.infos.keys() == expected.keys()
        for name, tensor in expected.items():
            info, read = checkpoint.infos[name], checkpoint.read(name)
            assert (info.dtype, info.shape, info.file) == (tensor.dtype, tensor.shape, path.name)
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert read.dtype is tensor.dtype
            assert torch.equal(read, tensor)


def test_what_is_read_is_the_callers_own(tiny_checkpoint: Tiny) -> None:
    path = tiny_checkpoint()
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.read("linear.weight").zero_()
        assert checkpoint.read("linear.weight").abs().sum() > 0
    assert path.read_bytes() == before


def test_threads_may_read_together(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {f"t{i}": torch.full((999,), i) for i in range(40)})
    with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(8) as pool:
        read = dict(zip(checkpoint.infos, pool.map(checkpoint.read, checkpoint.infos), strict=True))
    assert all((read[f"t{i}"] == i).all() for i in range(40))


def test_bytes_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "wide": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        }
    ).encode()
    wide = torch.tensor([0.1, -3.0], dtype=torch.float64)
    content = len(header).to_bytes(8, "little") + header + b"\7" + wide.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert torch.equal(checkpoint.read("wide"), wide)


def test_a_file_cut_off_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"t": torch.ones(100_000)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match=r"x.safetensors: t: reading failed \(the file"):
            checkpoint.read("t")


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    size = 50 << 30
    header = json.dumps(
        {
            "huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "small": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size + 8)
        except OSError as error:
            pytest.skip(f"the file system has no files with holes ({error})")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.infos["huge"].nbytes == size
        assert checkpoint.read("small").tolist() == [0, 0]


def test_an_unknown_name_is_a_key_error(tiny_checkpoint: Tiny) -> None:
    with open_checkpoint(tiny_checkpoint()) as checkpoint, pytest.raises(KeyError):
        checkpoint.read("nothing")


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "x.safetensors", {})) as checkpoint:
        assert not checkpoint.infos
        assert checkpoint.prefix == ""


def test_safetensors_are_known_under_any_suffix(tmp_path: Path) -> None:
    for suffix in (".sft", ".bin", ""):
        path = save(tmp_path / f"weights{suffix}", ONE)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.format == "safetensors"


def test_a_prefix_is_said_and_names_are_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"module.a": torch.ones(1), "module.b": torch.ones(1)})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.prefix == "module."
        assert list(checkpoint.infos) == ["module.a", "module.b"]
        assert any("every tensor name starts with 'module.'" in note for note in checkpoint.notes)


def test_prefixes_of_wrappers_within_wrappers_are_found() -> None:
    assert wrapper_prefix(["module._orig_mod.a", "module._orig_mod.b"]) == "module._orig_mod."
    assert wrapper_prefix(["modules.a"]) == wrapper_prefix([]) == ""


def test_one_shard_opened_alone_is_said(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m")
    with open_checkpoint(folder / "model-00002-of-00002.safetensors") as checkpoint:
        assert list(checkpoint.infos) == ["b"]
        assert any("shard 2 of 2; only its tensors are read" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", b"", r"the file is empty, expected a pickle of torch"),
        ("x.gguf", b"GGUF\3\0\0\0", r"the GGUF header is not readable"),
        ("x.txt", b"hello there", r"the file starts with b'hello th', expected a checkpoint"),
        (
            "x.pth",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"the file is a Git LFS pointer",
        ),
        ("x.ckpt", b"  <html>not found</html>", r"the file is a web page, expected a pickle"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", r"the file is in HDF5 format"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}") as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["nothing", "./x/y", "a/b/c.bin", "/no/where", "org/model.safetensors", "../up", "~x"]
)
def test_a_missing_path_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{path}: no such file or folder, expected a check"):
        open_checkpoint(path)


def test_a_broken_link_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match="a link that leads nowhere, expected a checkpoint"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_missing_permission_is_a_matter_of_resources(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint()

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match=r"tiny.safetensors: no permission to read, expected"):
        open_checkpoint(path)


# Folders.


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "open_clip_model.safetensors",
        "unusual.safetensors",
    ],
)
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, ONE)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.is_folder
        assert [shard.file for shard in checkpoint.shards] == [name]
        assert torch.equal(checkpoint.read("a"), ONE["a"])
        assert checkpoint.config is None
        assert not checkpoint.notes


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    with open_checkpoint(save_sharded(tmp_path / "m")) as checkpoint:
        assert list(checkpoint.infos) == ["a", "b"]
        assert [shard.names for shard in checkpoint.shards] == [("a",), ("b",)]
        assert checkpoint.index_file == "model.safetensors.index.json"
        assert checkpoint.index_metadata == {"total_size": 40}
        assert torch.equal(checkpoint.read("b"), TWO["b"])


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "odd.bin.index.json"])
def test_sharded_pickles(tmp_path: Path, index: str) -> None:
    torch.save(ONE, tmp_path / "one.bin")
    torch.save(TWO, tmp_path / "two.bin")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "pickle"
        assert torch.equal(checkpoint.read("b"), TWO["b"])


def test_of_several_weights_the_best_is_read_and_said(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", ONE)
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.infos) == ["a"]
        expected = "the folder also holds pytorch_model.bin; model.safetensors was read"
        assert any(expected in note for note in checkpoint.notes)


def test_training_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "checkpoint.pth")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save({"x": 1}, tmp_path / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.infos) == ["a"]


def test_config_is_read_beside_weights_of_the_usual_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_experts": 4}')
    save(tmp_path / "model.safetensors", ONE)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    for path, expected in (
        (tmp_path, {"num_experts": 4}),
        (tmp_path / "model.safetensors", {"num_experts": 4}),
        (tmp_path / "other.safetensors", None),
    ):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config == expected


def test_a_stem_chooses_among_the_files_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", ONE)
    save(tmp_path / "svf.safetensors", TWO)
    (tmp_path / "svf_config.json").write_text("{}")
    with open_checkpoint(tmp_path, stem="svf") as checkpoint:
        assert list(checkpoint.infos) == ["b"]
    with pytest.raises(CheckpointError, match="these are factors, expected a checkpoint"):
        open_checkpoint(tmp_path)


def test_tensors_that_the_index_forgot_are_kept_and_said(tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    folder = save_sharded(tmp_path / "m")
    save(folder / second, {**TWO, "a": torch.zeros(1), "c": torch.ones(1)})
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.infos) == ["a", "b", "c"]
        assert torch.equal(checkpoint.read("a"), ONE["a"]), "the index says where a is"
        assert checkpoint.passed_over == {f"a in {second}": 4}
        (warning,) = checkpoint.warnings
        assert warning in checkpoint.notes
        assert warning.startswith(f"{second}: 1 tensor was not read here, as another shard")
        assert any("1 tensor of the shards not in the index" in n for n in checkpoint.notes)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, r"a: the shard is '../x.safetensors', expected the plain name"),
        ({"a": "/etc/x.safetensors"}, r"a: the shard is '/etc/x.safetensors', expected the plain"),
        ({"a": "sub/x.safetensors"}, r"a: the shard is 'sub/x.safetensors', expected the plain"),
        ({"a": "..\\x.safetensors"}, r"a: the shard is '.*', expected the plain name"),
        ({"a": ".hidden.safetensors"}, r"a: the shard is '.hidden.safetensors', expected"),
        ({"a": "x.py"}, r"a: the shard is 'x.py', expected the plain name of a weight file"),
        ({"a": 3}, r"a: the shard is 3, expected the plain name"),
        ({"a": "gone.safetensors"}, r"gone.safetensors: no such file, expected 1 shard"),
    ],
)
def test_what_an_index_may_not_name(
    tmp_path: Path, weight_map: dict[str, Any], message: str
) -> None:
    save(tmp_path / "x.safetensors", ONE)
    folder = save_sharded(tmp_path / "m", weight_map)
    with pytest.raises(CheckpointError, match=rf"model.safetensors.index.json: {message}"):
        open_checkpoint(folder)


def test_names_not_places_decide_what_is_plain(tmp_path: Path) -> None:
    """Caches hold their files as links to elsewhere; these are fine."""
    elsewhere = save_sharded(tmp_path / "blobs")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in elsewhere.iterdir():
        (folder / path.name).symlink_to(path)
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.infos) == ["a", "b"]
    assert is_plain_name("model.safetensors")
    for name in ("", ".", "..", "a/b.bin", "C:x.bin", "x\0.bin", "x.bin/"):
        assert not is_plain_name(name)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    folder = save_sharded(tmp_path / "m", {"a": second, "b": second, "c": second})
    with pytest.raises(CheckpointError, match=rf"{second}: a, c: not in the file, expected it"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not readable \(.*\), expected a shard index"),
        ("[]", r"a JSON list, expected a shard index"),
        ("{}", r"no weight_map, expected a shard index"),
        ('{"weight_map": {}}', r"no weight_map, expected a shard index"),
        ('{"weight_map": ["a"]}', r"no weight_map, expected a shard index"),
        ("[" * 100_000, r"not readable \(.*\), expected a shard index"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model.safetensors.index.json: {message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_broken_config_is_named(tmp_path: Path, content: str) -> None:
    save(tmp_path / "model.safetensors", ONE)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json: .*, expected a JSON object"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights among 1 file, expected model"):
        open_checkpoint(tmp_path)


def test_a_folder_of_models_names_them(tmp_path: Path) -> None:
    save(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", ONE)
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", ONE)
    with pytest.raises(CheckpointError, match="Name one of the folders in it: unet, vae"):
        open_checkpoint(tmp_path)


def test_a_folder_with_files_that_cannot_be_told_apart_names_them(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", ONE)
    save(tmp_path / "two.safetensors", TWO)
    with pytest.raises(
        CheckpointError,
        match=r"2 weight files and no index \(one.safetensors, two.safetensors\), expected one",
    ):
        open_checkpoint(tmp_path)


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", ONE)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="this is an adapter, expected a whole checkpoint"):
        open_checkpoint(tmp_path)


def test_all_files_are_closed_when_one_is_broken(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x")
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("this system does not list a process's open files")
    before = len(list(open_files.iterdir()))
    for _ in range(5):
        with pytest.raises(
            CheckpointError, match=r"model-00002-of-00002.safetensors: the file has"
        ):
            open_checkpoint(folder)
    assert len(list(open_files.iterdir())) == before


# Side files.


def test_side_files_are_all_but_weights_indexes_and_caches(tmp_path: Path) -> None:
    kept = [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "spiece.model",
        "tokenizer.json",
        "1_Pooling/config.json",
    ]
    left = [
        "model.safetensors",
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
        "training_args.bin",
        "optimizer.pt",
        "weights.GGUF",
        ".gitattributes",
        ".cache/huggingface/x.json",
        "__pycache__/modeling_x.pyc",
        "original/params.json",
        "original/consolidated.00.pth",
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
        "out.partial/config.json.partial",
        "svf_config.json",
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [str(path.relative_to(tmp_path)) for path in side_files(tmp_path).kept]
    assert sorted(found) == sorted(kept)


def test_side_files_of_a_cache_are_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/0a1b")
    assert [path.name for path in side_files(tmp_path / "snapshot").kept] == ["config.json"]


# The hub.


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("timm/resnet18.a1_in1k", True),
        ("gpt2", False),
        ("a/b/c", True),
        ("a/b@v1.0", True),
        ("a/b/unet@refs/pr/1", True),
        ("a/b@", False),
        ("a/b@-x", False),
        ("a/b/c.bin", False),
        ("/a/b", False),
        ("./a", False),
        ("a/.b", False),
        ("a/b.safetensors", False),
        ("a/b.pth", False),
        ("a b/c", False),
        ("a/b\n", False),
    ],
)
def test_what_looks_like_a_hub_id(text: str, is_id: bool) -> None:
    assert looks_like_hub_id(text) is is_id


def cache_of(root: Path, hub_id: str) -> Path:
    """Lay out a repository as huggingface_hub caches it: a revision full of links to blobs."""
    repository = root / f"models--{hub_id.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    save(repository / "blobs" / "w", ONE)
    (repository / "blobs" / "c").write_text('{"num_experts": 2}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    (snapshot / "config.json").symlink_to("../../blobs/c")
    return snapshot


def test_a_hub_id_is_read_from_the_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = cache_of(tmp_path / "cache", "owner/name")
    with open_checkpoint("owner/name") as checkpoint:
        assert checkpoint.hub_id == "owner/name"
        assert checkpoint.path == snapshot
        assert checkpoint.config == {"num_experts": 2}
        assert torch.equal(checkpoint.read("a"), ONE["a"])


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        CheckpointError, match=r"^owner/none: no such file or folder here, and th"
    ) as caught:
        open_checkpoint("owner/none")
    assert "\n" not in str(caught.value)


def test_a_path_in_a_folder_that_exists_is_never_sought_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="runs/model: no such file or folder, expected"):
        open_checkpoint("runs/model")


def test_without_the_hubs_package_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = r"'owner/name' here; .*pip install .*\[language\]"
    with pytest.raises(MissingDependencyError, match=told):
        open_checkpoint("owner/name")


def test_one_set_of_weights_is_wanted_of_a_repository() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = [
        "config.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        *shards,
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "original/params.json",
        "tf_model.h5",
    ]
    assert [
        name for name in wanted_files(files) if name.endswith((".safetensors", ".bin"))
    ] == shards
    assert wanted_files(["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]


# Real checkpoints.


def test_every_real_checkpoint_opens(data: Path) -> None:
    weights = [path for path in (data / "checkpoints").iterdir() if path.name[:7] != "LICENSE"]
    assert len(weights) >= 5
    for path in weights:
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.infos
            for info in checkpoint.infos.values():
                tensor = checkpoint.read(info.name)
                assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
