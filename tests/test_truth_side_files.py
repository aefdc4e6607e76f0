"""Files beside the weights keep their places, and config.json follows the merged tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import svftool
from svftool.checkpoints import side_files
from svftool.factors.config_shapes import follow_shapes
from svftool.files.side_files import _MOST
from svftool.progress import Silent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    (base / "1_Pooling").mkdir(parents=True)
    save_file({"a.weight": torch.randn(6, 8)}, base / "model.safetensors")
    (base / "config.json").write_text('{"hidden_size": 8}')
    (base / "1_Pooling" / "config.json").write_text('{"pooling": true}')
    (base / "pytorch_model.bin").write_bytes(b"x" * 100)
    with (base / "large.txt").open("wb") as file:
        file.truncate(_MOST + 1)
    (tmp_path / "secret.txt").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (base / "inside.json").symlink_to("config.json")
    (base / "elsewhere").symlink_to(tmp_path)
    return base


@pytest.mark.parametrize("without_base", [False, True])
def test_subfolders_stay_and_what_is_left_out_is_named(folder: Path, without_base: bool) -> None:
    factors, merged = folder.with_name("factors"), folder.with_name("merged")
    svftool.decompose(folder, factors)
    result = svftool.merge(factors, output=merged, without_base=without_base)
    files = sorted(str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file())
    weights = "model.safetensors"
    assert files == ["1_Pooling/config.json", "config.json", "inside.json", weights]
    assert json.loads((merged / "config.json").read_text()) == {"hidden_size": 8}
    assert (factors / "1_Pooling" / "config.json").is_file()
    if not without_base:
        left = {"elsewhere", "large.txt", "notes.txt", "pytorch_model.bin"}
        assert set(result.dropped) == left
        assert result.dropped["pytorch_model.bin"] == 100


@pytest.mark.parametrize("suffix", ["onnx", "h5", "gguf", "npz", "pt", "msgpack", "safetensors"])
def test_a_subfolder_with_weights_is_one_entry(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / f"x.{suffix}").write_bytes(b"1234")
    (tmp_path / "part" / "config.json").write_text("{}")
    found = side_files(tmp_path)
    assert (found.kept, found.left) == ([], {"part": 6})


def test_a_tokenizer_may_be_large(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "other.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, _MOST + 1)
    assert [path.name for path in side_files(tmp_path).kept] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "old", "new", "before", "after"),
    [
        ("wte.weight", (5, 2), (7, 2), {"vocab_size": 5, "n_positions": 5}, {"vocab_size": 7}),
        ("wpe.weight", (5, 2), (7, 2), {"vocab_size": 5, "n_positions": 5}, {"n_positions": 7}),
        ("lm_head.weight", (5, 2), (7, 2), {"text_config": {"vocab_size": 5}}, None),
        ("decoder.embed_positions.weight", (6, 2), (10, 2), {"max_position_embeddings": 4}, 8),
        ("h.0.mlp.fc1.weight", (16, 4), (20, 4), {"intermediate_size": 16, "vocab_size": 9}, 20),
        ("h.0.mlp.fc2.weight", (4, 16), (4, 20), {"intermediate_size": 16, "vocab_size": 9}, 20),
        ("fc.weight", (10, 4), (3, 4), {"architecture": "resnet18", "num_classes": 10}, None),
        ("classifier.weight", (2, 4), (3, 4), {"model_type": "bert"}, None),
    ],
)
def test_the_configuration_follows_new_shapes(
    name: str,
    old: tuple[int, ...],
    new: tuple[int, ...],
    before: dict[str, Any],
    after: Any,
) -> None:
    found, unexplained = follow_shapes(before, {name: (old, new)})
    assert not unexplained
    if isinstance(after, dict):
        assert found == before | after
    elif after is not None:
        assert found == before | {next(iter(before)): after}
    elif "text_config" in before:
        assert found == {"text_config": {"vocab_size": 7}}
    else:
        assert found.get("num_classes", len(found.get("id2label", ()))) == 3


def test_a_shape_that_nothing_explains_is_named() -> None:
    config = {"a_size": 4, "b_size": 4}
    assert follow_shapes(config, {"x.weight": ((4, 2), (6, 2))}) == (config, ["x.weight"])


# What every writing command leaves out stands in its JSON, with its bytes.


def test_decompose_names_what_it_leaves_out(folder: Path) -> None:
    from svftool.report.decompose import document

    said = Heard()
    result = svftool.decompose(folder, folder.with_name("factors"), progress=said)
    dropped = {one["name"]: one["bytes"] for one in document(result)["dropped"]}
    assert dropped.keys() == {"elsewhere", "large.txt", "notes.txt", "pytorch_model.bin"}
    assert dropped["large.txt"] == _MOST + 1
    (warning,) = [text for text in said.warnings if "not copied" in text]
    assert all(f"{name} ({size:,} bytes)" in warning for name, size in dropped.items())


def test_decompose_names_the_entries_of_a_pickle(tmp_path: Path) -> None:
    tree = {"state_dict": {"a.weight": torch.ones(4, 3)}, "state_dict_ema": {"x": torch.ones(5)}}
    torch.save(tree, tmp_path / "x.pth")
    result = svftool.decompose(tmp_path / "x.pth", tmp_path / "f")
    assert result.dropped == {"state_dict_ema": 20}


def test_extract_names_the_entries_of_a_pickle(tmp_path: Path) -> None:
    from svftool.report.extract import document

    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    save_file({"a.weight": weight}, tmp_path / "base.safetensors")
    torch.save({"model": {"a.weight": weight * 2}, "ema": {"b": weight}}, tmp_path / "t.pth")
    result = svftool.extract(
        tmp_path / "base.safetensors", tmp_path / "t.pth", output=tmp_path / "s.safetensors"
    )
    (dropped,) = document(result)["dropped"]
    assert dropped == {"name": "ema", "reason": "not among the tensors", "bytes": 48}


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)
