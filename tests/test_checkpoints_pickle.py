"""Pickles: read without running code, nesting found, written back with everything beside."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svftool.checkpoints import (
    Selection,
    fingerprint_checkpoint,
    open_checkpoint,
    save_pickled,
    select,
)
from svftool.errors import CheckpointError, ResourceError

LEGACY = {"_use_new_zipfile_serialization": False}


def state() -> dict[str, Tensor]:
    return {"conv.weight": torch.randn(4, 3, 2, 2), "conv.bias": torch.arange(4.0)}


def save(path: Path, tree: object, **options: Any) -> Path:
    torch.save(tree, path, **options)
    return path


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


# Reading.


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".th", ".tar", ".ckpt"])
def test_tensors_are_read_from_any_suffix(
    tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    tensors = state()
    with open_checkpoint(save(tmp_path / f"x{suffix}", tensors, **options)) as checkpoint:
        assert checkpoint.format == "pickle"
        assert list(checkpoint.infos) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
        whole = any("loaded into memory as a whole" in note for note in checkpoint.notes)
        assert whole is bool(options)


def test_zip_pickles_are_mapped_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"big": torch.zeros(8_000_000)})
    status = Path("/proc/self/statm")
    if not status.is_file():
        pytest.skip("this system does not tell a process's memory in /proc")

    def resident() -> int:
        return int(status.read_text().split()[1]) * resource.getpagesize()

    before = resident()
    with open_checkpoint(path) as checkpoint:
        assert resident() - before < 16_000_000
        assert checkpoint.read("big").numel() == 8_000_000


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", state())
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.read("conv.bias").fill_(9)
        assert checkpoint.read("conv.bias").tolist() == [0, 1, 2, 3]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("tree", "nesting"),
    [
        (lambda s: s, ()),
        (lambda s: OrderedDict(s), ()),
        (lambda s: {"state_dict": s, "best_prec1": 81.2, "epoch": 3}, ("state_dict",)),
        (lambda s: {"state_dict": s, "best": torch.tensor(0.5)}, ("state_dict",)),
        (lambda s: {"model": s, "optimizer": {"state": {0: s}}}, ("model",)),
        (lambda s: {"epoch": 1, "model_state_dict": s, "optimizer_state_dict": s}, None),
        (lambda s: {"checkpoint": {"model": s}}, ("checkpoint", "model")),
        (lambda s: {"ema": s}, ("ema",)),
        (lambda s: {"generator": s, "opt": [1, 2]}, ("generator",)),
    ],
)
def test_nesting_is_found_and_said(
    tmp_path: Path, tree: Callable[[Any], Any], nesting: tuple[str, ...] | None
) -> None:
    tensors = state()
    expected = ("model_state_dict",) if nesting is None else nesting
    with open_checkpoint(save(tmp_path / "x.pt", tree(tensors))) as checkpoint:
        assert checkpoint.nesting == expected
        assert list(checkpoint.infos) == list(tensors)
        said = f"found under {' > '.join(map(repr, expected))}"
        assert any(said in note for note in checkpoint.notes) is bool(expected)


def test_trained_weights_go_before_their_average_which_is_said(tmp_path: Path) -> None:
    average = {name: tensor * 0 for name, tensor in state().items()}
    path = save(tmp_path / "x.pt", {"state_dict_ema": average, "state_dict": state()})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.nesting == ("state_dict",)
        assert any("under 'state_dict_ema' were not used" in note for note in checkpoint.notes)


def test_entries_that_are_no_tensors_are_left_aside(tmp_path: Path) -> None:
    tree: dict[Any, Any] = {**state(), "_extra_state": None, "version": 3, 7: torch.ones(1)}
    with open_checkpoint(save(tmp_path / "x.pt", tree)) as checkpoint:
        assert list(checkpoint.infos) == ["conv.weight", "conv.bias"]


def test_plain_values_of_training_scripts_are_read(tmp_path: Path) -> None:
    tree = {
        "model": state(),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "history": np.arange(3),
    }
    with open_checkpoint(save(tmp_path / "x.pt", tree)) as checkpoint:
        assert checkpoint.nesting == ("model",)


def test_tied_tensors_are_found(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    tree = {"embed": shared, "half": shared[:3], "head": shared, "alone": shared.clone()}
    with open_checkpoint(save(tmp_path / "x.pt", tree)) as checkpoint:
        assert checkpoint.tied == (("embed", "head"),)


def quantised(kind: str) -> Tensor:
    """Return a tensor of a kind that torch is giving up, but old files hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "tensor":
            return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.qint8)
        scales, points = torch.ones(3), torch.zeros(3)
        return torch.quantize_per_channel(torch.randn(3, 4), scales, points, 0, torch.quint8)


@pytest.mark.parametrize(
    ("name", "make", "layout"),
    [
        ("quantised", lambda: quantised("tensor"), "quantised"),
        ("channels", lambda: quantised("channels"), "quantised"),
        ("sparse", lambda: torch.eye(3).to_sparse(), "sparse"),
        ("rows", lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        ("complex", lambda: torch.randn(3, 3, dtype=torch.complex128), "dense"),
        ("float8", lambda: torch.randn(3, 3).to(torch.float8_e5m2), "dense"),
        ("turned", lambda: torch.randn(3, 5).T, "dense"),
        ("expanded", lambda: torch.randn(1, 5).expand(4, 5), "dense"),
        ("scalar", lambda: torch.tensor(2.0), "dense"),
        ("empty", lambda: torch.zeros(0, 3), "dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_tensors_of_every_kind_are_read_and_fingerprinted(
    tmp_path: Path, name: str, make: Callable[[], Tensor], layout: str
) -> None:
    tensor = make()
    path = save(tmp_path / "x.pt", {name: tensor})
    with open_checkpoint(path) as checkpoint:
        read = checkpoint.read(name)
        assert checkpoint.infos[name].layout == layout
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        if layout == "dense":
            assert read.is_contiguous()
            assert torch.equal(read.to(torch.complex128), tensor.to(torch.complex128))
        assert len(fingerprint_checkpoint(checkpoint)) == 64
        chosen, whole = select(checkpoint.infos, Selection())
        assert len(chosen) + len(whole) == 1
        assert [one.name for one in chosen] == ([name] if name in ("turned", "expanded") else [])


# Refusing.


class Command:
    """What an attacker pickles: a call of their choice on loading."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
@pytest.mark.parametrize(
    "save_as",
    [
        torch.save,
        lambda tree, path: torch.save(tree, path, **LEGACY),
        lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol=2)),
        lambda tree, path: path.write_bytes(pickle.dumps(tree)),
        lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol=0)),
    ],
    ids=["zip", "legacy", "protocol 2", "protocol 4", "protocol 0"],
)
def test_code_in_a_pickle_never_runs(
    tmp_path: Path, save_as: Callable[[Any, Path], Any], nested: bool
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    save_as({"state_dict": Command(marker)} if nested else Command(marker), path)
    with pytest.raises(
        CheckpointError, match=r"evil\.pt: .*, expected .*(tensors|pickle)"
    ) as caught:
        open_checkpoint(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_the_attack_would_work_on_an_open_door(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Command(marker)))
    assert marker.exists()


def test_what_a_pickle_asks_for_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "whole.pt", nn.Linear(2, 2))
    with pytest.raises(
        CheckpointError,
        match=r"whole.pt: the pickle asks for torch.nn.modules.linear.Linear, which could run code",
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([torch.ones(2)], r"the pickle holds a list, expected a dictionary of tensors"),
        (torch.ones(2), r"the pickle holds a Tensor, expected a dictionary of tensors"),
        ({}, r"no tensors \(no keys\), expected a dictionary of tensors"),
        ({"epoch": 3, "lr": 0.1}, r"no tensors \('epoch', 'lr'\), expected a dictionary"),
        ({"optimizer": {"x": torch.ones(1)}}, r"no tensors \('optimizer'\), expected"),
        (
            {"teacher": {"w": torch.ones(1)}, "student": {"w": torch.ones(1)}},
            r"several dictionaries of tensors \('teacher', 'student'\), expected one",
        ),
        ({"w": torch.ones(2, device="meta")}, r"w: a tensor without values of its own, expected"),
    ],
)
def test_pickles_without_a_state_dictionary_are_named(
    tmp_path: Path, tree: object, message: str
) -> None:
    path = save(tmp_path / "x.pt", tree)
    with pytest.raises(CheckpointError, match=rf"x.pt: {message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_pickle_cut_off_is_named(tmp_path: Path, share: float, options: dict[str, Any]) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.randn(9000)}, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        CheckpointError, match=r"x.pt: .*, expected a file that torch.save"
    ) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_foreign_zip_archives_and_programs_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match=r"x.npz: .*, expected a file that torch.save wrote"):
        open_checkpoint(tmp_path / "x.npz")


def test_memory_that_does_not_suffice_is_a_matter_of_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.pt", state(), **LEGACY)

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ResourceError, match=r"x.pt: no memory left to load the pickle, expected"):
        open_checkpoint(path)


def test_random_damage_is_an_error_of_the_checkpoint_or_harmless(tmp_path: Path) -> None:
    content = save(tmp_path / "good.pt", {"w": torch.arange(20.0)}, **LEGACY).read_bytes()
    path = tmp_path / "x.pt"
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(bytes(damaged))
        with suppress(CheckpointError):
            open_checkpoint(path).close()


# Writing.


def save_like(source: Path, target: Path, change: dict[str, Tensor], **options: Any) -> Any:
    with open_checkpoint(source) as checkpoint:
        save_pickled(target, checkpoint, change, **options)
    return load(target)


def test_nesting_and_everything_beside_the_tensors_is_kept(tmp_path: Path) -> None:
    tensors = OrderedDict(state())
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    tree = {
        "checkpoint": {"state_dict": tensors, "best": 0.5},
        "epoch": 7,
        "optimizer": {"state": {0: torch.ones(3)}},
        "args": argparse.Namespace(lr=0.1),
    }
    source = save(tmp_path / "x.pt", tree)
    with (
        open_checkpoint(source) as checkpoint,
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        save_pickled(tmp_path / "y.pt", checkpoint, {"conv.bias": torch.full((4,), 5.0)})
        new = load(tmp_path / "y.pt")
    assert new["epoch"] == 7
    assert new["args"].lr == 0.1
    assert new["checkpoint"]["best"] == 0.5
    assert torch.equal(new["optimizer"]["state"][0], torch.ones(3))
    inner = new["checkpoint"]["state_dict"]
    assert type(inner) is OrderedDict
    assert vars(inner)["_metadata"] == {"": {"version": 1}}
    assert list(inner) == list(tensors)
    assert inner["conv.bias"].tolist() == [5.0] * 4
    assert torch.equal(inner["conv.weight"], tensors["conv.weight"])


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    tree = {"w": nn.Parameter(torch.ones(2)), "f": nn.Parameter(torch.ones(2), requires_grad=False)}
    new = save_like(save(tmp_path / "x.pt", tree), tmp_path / "y.pt", {"w": torch.zeros(2)})
    assert isinstance(new["w"], nn.Parameter)
    assert new["w"].requires_grad
    assert not new["f"].requires_grad
    assert new["w"].tolist() == [0.0, 0.0]


def test_tied_tensors_stay_tied_while_they_agree(tmp_path: Path) -> None:
    shared = torch.randn(300, 40)
    source = save(tmp_path / "x.pt", {"embed": shared, "head": shared})
    nan = torch.full((300, 40), float("nan"))
    agree = save_like(source, tmp_path / "y.pt", {"embed": nan, "head": nan.clone()})
    assert agree["embed"].data_ptr() == agree["head"].data_ptr()
    assert (tmp_path / "y.pt").stat().st_size < 1.2 * nan.nbytes
    apart = save_like(source, tmp_path / "z.pt", {"embed": nan, "head": shared + 1})
    assert apart["embed"].data_ptr() != apart["head"].data_ptr()
    assert torch.equal(apart["head"], shared + 1)
    same = save_like(source, tmp_path / "w.pt", {})
    assert same["embed"].data_ptr() == same["head"].data_ptr()


def test_names_can_be_added_and_removed(tmp_path: Path) -> None:
    source = save(tmp_path / "x.pt", {"state_dict": state(), "epoch": 1})
    new = save_like(
        source, tmp_path / "y.pt", {"head.weight": torch.ones(2, 4)}, removed=["conv.bias"]
    )
    assert list(new["state_dict"]) == ["conv.weight", "head.weight"]


def test_a_slice_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    source = save(tmp_path / "x.pt", {"w": torch.ones(2)})
    save_like(source, tmp_path / "y.pt", {"w": torch.ones(1_000_000)[:2]})
    assert (tmp_path / "y.pt").stat().st_size < 10_000


def test_other_formats_become_a_plain_dictionary(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors")
    new = save_like(tmp_path / "x.safetensors", tmp_path / "y.pth", {"conv.bias": torch.ones(4)})
    assert set(new) == {"conv.weight", "conv.bias"}
    assert new["conv.bias"].tolist() == [1.0] * 4


def test_the_same_pickle_has_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    source = save(tmp_path / "x.pt", {"state_dict": state(), "epoch": 1})
    save_like(source, tmp_path / "one.pt", {"conv.bias": torch.ones(4)})
    save_like(source, tmp_path / "another.pth", {"conv.bias": torch.ones(4)})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pth").read_bytes()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path) -> None:
    source = save(tmp_path / "x.pt", {"w": torch.ones(100_000)})
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(ResourceError, match=r"y.pt: the file system does not take files of this"),
        files_limited_to(50_000),
    ):
        save_pickled(tmp_path / "y.pt", checkpoint, {})


def test_the_real_pickle_is_written_as_it_was(tmp_path: Path, data: Path) -> None:
    source = data / "checkpoints" / "resnet20-12fca82f.th"
    old, new = load(source), save_like(source, tmp_path / "y.th", {})
    assert new.keys() == old.keys()
    assert new["best_prec1"] == old["best_prec1"]
    assert list(new["state_dict"]) == list(old["state_dict"])
    for name, tensor in old["state_dict"].items():
        assert torch.equal(new["state_dict"][name], tensor)
        assert new["state_dict"][name].dtype is tensor.dtype


def test_the_length_of_a_header_can_look_like_a_pickle(tmp_path: Path) -> None:
    """A header of 128 bytes begins like a pickle; the file is safetensors nevertheless."""
    save_file({"w": torch.ones(2)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].ljust(128)
    (tmp_path / "x").write_bytes(struct.pack("<Q", 128) + text + content[8 + length :])
    assert (tmp_path / "x").read_bytes()[0] == 0x80
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert checkpoint.format == "safetensors"
