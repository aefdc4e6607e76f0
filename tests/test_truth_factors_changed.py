"""Factors that changed after they were decomposed are found out; places behind links are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svftool import (
    CheckpointError,
    FactorsError,
    attach,
    audit,
    decompose,
    extract,
    merge,
    open_factors,
)
from svftool.checkpoints import open_checkpoint
from svftool.factors import is_tuned, read_tuned, write_tuned


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(4, 6)}
    tensors["b.bias"] = torch.ones(4)
    return {name: value.to(dtype) for name, value in tensors.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(model(0), path)
    return path


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


@pytest.fixture
def tuned(factors: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tuned.safetensors"
    with open_factors(factors) as store:
        S = {name: store.read_S(name) * 1.1 for name in store.layers}
        write_tuned(path, store=store, S=S)
    return path


def one_value(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight.U"][0, 0] += 1e-7
    save_file(tensors, file)


def one_bit_of_S(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight.S"].view(torch.int32)[0] ^= 1
    save_file(tensors, file)


def another_run(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    other = file.parent.parent / "other"
    save_file(model(1), other.with_suffix(".safetensors"))
    decompose(other.with_suffix(".safetensors"), other)
    shutil.copy(other / file.name, file)


def two_swapped(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight.U"] = tensors["b.weight.U"].flip(-1).contiguous()
    save_file(tensors, file)


def another_dtype(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: value.double() for name, value in tensors.items()}, file)


def a_tensor_more(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**tensors, "c.bias": torch.ones(3)}, file)


CHANGES = [one_value, one_bit_of_S, another_run, two_swapped, another_dtype, a_tensor_more]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", ["merge", "without base", "inspect", "extract"])
def test_changed_factors_are_found_before_anything_is_written(
    use: str, change: Callable[..., None], base: Path, factors: Path, tuned: Path, tmp_path: Path
) -> None:
    (file,) = factors.glob("*.safetensors")
    change(file, load_file(file))
    output = tmp_path / "out.safetensors"
    fine = tmp_path / "fine.safetensors"
    save_file({name: value * 1.5 for name, value in model(0).items()}, fine)
    uses: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(factors, [tuned], output=output),
        "without base": lambda: merge(factors, [tuned], output=output, without_base=True),
        "inspect": lambda: audit(factors, [tuned]),
        "extract": lambda: extract(factors, fine, output=output),
    }
    with pytest.raises(FactorsError, match=r"svf_config\.json says"):
        uses[use]()
    assert not output.exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_changed_tensor_that_was_kept_whole_is_found(factors: Path, tmp_path: Path) -> None:
    (file,) = factors.glob("*.safetensors")
    save_file({**load_file(file), "b.bias": torch.zeros(4)}, file)
    with pytest.raises(FactorsError, match=r"'b\.bias' has the SHA-256"):
        merge(factors, output=tmp_path / "out.safetensors", without_base=True)


@pytest.mark.parametrize("change", [one_value, another_run])
def test_folders_of_older_versions_are_checked_once_all_was_read(
    change: Callable[..., None], factors: Path, tmp_path: Path
) -> None:
    config = json.loads((factors / "svf_config.json").read_text())
    del config["digests"]
    (factors / "svf_config.json").write_text(json.dumps(config))
    merge(factors, output=tmp_path / "sound.safetensors", without_base=True)
    (file,) = factors.glob("*.safetensors")
    change(file, load_file(file))
    with pytest.raises(FactorsError, match="the factors have the fingerprint"):
        merge(factors, output=tmp_path / "out.safetensors", without_base=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_not_read_is_not_claimed(factors: Path) -> None:
    (file,) = factors.glob("*.safetensors")
    one_value(file, load_file(file))
    with open_factors(factors) as store:
        store.read("a.weight")
        with pytest.raises(FactorsError, match=r"'b\.weight\.U'"):
            store.read("b.weight")


# A folder with more than one file of weights.


def put(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"weight_map": {"w": names[0]}}))
        elif name.endswith(".safetensors"):
            save_file({"w": torch.ones(2)}, folder / name)
        else:
            torch.save({"w": torch.zeros(2)}, folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "taken", "rest"),
    [
        (("b.safetensors", "a.ckpt"), "b.safetensors", "a.ckpt"),
        (("b.safetensors", "a.pth", "c.bin"), "b.safetensors", "a.pth, c.bin"),
        (("model.safetensors", "ema.safetensors"), "model.safetensors", "ema.safetensors"),
        (("model.safetensors", "last.ckpt"), "model.safetensors", "last.ckpt"),
        (("pytorch_model.bin", "b.safetensors"), "pytorch_model.bin", "b.safetensors"),
        (
            ("x.safetensors", "y.safetensors", "x.safetensors.index.json"),
            "x.safetensors.index.json",
            "y.safetensors",
        ),
    ],
)
def test_which_of_several_files_was_read_is_said(
    names: tuple[str, ...], taken: str, rest: str, tmp_path: Path
) -> None:
    folder = put(tmp_path / "m", *names)
    with open_checkpoint(folder) as opened:
        assert any(f"also holds {rest}; {taken} was read" in note for note in opened.notes)


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors", "c.pt"), ("a.pt", "b.ckpt")])
def test_files_that_cannot_be_told_apart_are_refused(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = put(tmp_path / "m", *names)
    with pytest.raises(CheckpointError, match="weight files and no index"):
        open_checkpoint(folder)


def test_training_state_is_no_second_candidate(tmp_path: Path) -> None:
    with open_checkpoint(put(tmp_path / "m", "model.safetensors", "optimizer.bin")) as opened:
        assert not opened.notes


# Links.


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """Make a hub cache's folder of one model, and return its snapshot."""
    root = tmp_path / "hub" / "models--x--y"
    old, new = (root / "snapshots" / name for name in ("0old", "new"))
    for folder in (root / "blobs", root / "refs", old, new):
        folder.mkdir(parents=True)
    save_file(model(0), root / "blobs" / "5a5a")
    for name, text in (("c0", '{"a": 0}'), ("c1", '{"a": 1}')):
        (root / "blobs" / name).write_text(text)
    (root / "refs" / "main").write_text("new")
    for folder, config in ((old, "c0"), (new, "c1")):
        (folder / "model.safetensors").symlink_to("../../blobs/5a5a")
        (folder / "config.json").symlink_to(f"../../blobs/{config}")
    return new


@pytest.mark.parametrize("way", ["snapshot", "link", "blob", "folder behind a link"])
def test_files_of_a_hub_cache_find_config_and_base(way: str, cached: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(cached)
    place = {
        "snapshot": cached,
        "link": cached / "model.safetensors",
        "blob": cached.parent.parent / "blobs" / "5a5a",
        "folder behind a link": alias / "model.safetensors",
    }[way]
    with open_checkpoint(place) as opened:
        assert opened.config == {"a": 1}
    factors = decompose(place, tmp_path / "factors").output
    alias.unlink()
    with open_factors(factors) as store, store.open_base() as found:
        assert found.config == {"a": 1}


def test_a_link_whose_config_lies_beside_it_is_recorded(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(base)
    (folder / "config.json").write_text('{"b": 2}')
    decompose(folder / "model.safetensors", tmp_path / "factors")
    with open_factors(tmp_path / "factors") as store, store.open_base() as found:
        assert found.config == {"b": 2}


@pytest.mark.parametrize("way", ["folder", "files", "link of a link"])
def test_linked_factors_find_their_base(way: str, factors: Path, tmp_path: Path) -> None:
    link = tmp_path / "far" / "away" / "link"
    link.parent.mkdir(parents=True)
    if way == "files":
        link.mkdir()
        for file in factors.iterdir():
            (link / file.name).symlink_to(file)
    elif way == "folder":
        link.symlink_to(factors)
    else:
        (tmp_path / "between").symlink_to(factors)
        link.symlink_to(tmp_path / "between")
    merged = merge(link, output=tmp_path / "out.safetensors", verify=True)
    assert merged.verified


def test_the_blob_of_a_tuned_file_is_one(tuned: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--x--z"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "r").mkdir(parents=True)
    shutil.move(tuned, root / "blobs" / "77")
    (root / "snapshots" / "r" / "tuned.safetensors").symlink_to("../../blobs/77")
    assert is_tuned(root / "blobs" / "77")
    assert read_tuned(root / "blobs" / "77").S.keys() == {"a.weight", "b.weight"}
    with safe_open(root / "blobs" / "77", "pt") as file:
        assert "svftool" in file.metadata()


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 6, bias=False), torch.nn.Linear(6, 4)


@pytest.mark.parametrize("change", [one_value, one_bit_of_S, two_swapped])
def test_changed_factors_are_never_attached(change: Callable[..., None], factors: Path) -> None:
    net = Two()
    net.load_state_dict(model(0))
    attach(net, factors)
    (file,) = factors.glob("*.safetensors")
    change(file, load_file(file))
    net = Two()
    net.load_state_dict(model(0))
    with pytest.raises(FactorsError, match=r"svf_config\.json says"):
        attach(net, factors)
