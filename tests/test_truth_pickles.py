"""What a pickle holds beside torch's tensors is read, named or refused, and never runs."""

from __future__ import annotations

import argparse
import os
import pathlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svftool import decompose, merge, open_factors
from svftool.checkpoints import open_checkpoint, save_pickled
from svftool.errors import CheckpointError
from svftool.factors import write_tuned


def save(path: Path, tree: object) -> Path:
    torch.save(tree, path)
    return path


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|b1"])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_arrays_of_numbers_are_tensors(tmp_path: Path, dtype: str, all_of_them: bool) -> None:
    array = np.asfortranarray(np.arange(12).reshape(3, 4)).astype(dtype)
    tree: dict[str, Any] = {"a.weight": array}
    if not all_of_them:
        tree["b.weight"] = torch.ones(2, 2)
    with open_checkpoint(save(tmp_path / "x.pth", {"model": tree, "best": np.ones(3)})) as found:
        assert set(found.infos) == set(tree)
        assert np.array_equal(found.read("a.weight").numpy(), array)
        save_pickled(tmp_path / "y.pth", found, {"a.weight": found.read("a.weight")})
    with open_checkpoint(tmp_path / "y.pth") as again:
        assert np.array_equal(again.read("a.weight").numpy(), array)


def test_statistics_beside_the_weights_do_not_compete_with_them(tmp_path: Path) -> None:
    tree = {"w": {"a": torch.ones(2)}, "history": {"loss": np.ones(3)}}
    with open_checkpoint(save(tmp_path / "x.pth", tree)) as found:
        assert found.nesting == ("w",)
        assert found.passed_over == {"history": 24}


@pytest.mark.parametrize(
    "beside",
    [
        {"shadow": [torch.ones(4)]},
        {"shadow": (torch.ones(4),)},
        {"shadow": {"deep": [{"er": torch.ones(4)}]}},
        {"shadow": {"x": torch.ones(4)}},
        {"state_dict": {"a": torch.ones(2), "shadow": [torch.ones(4)]}},
        {"state_dict": {"a": torch.ones(2), "shadow": {"x": torch.ones(4)}}},
    ],
)
def test_other_tensors_are_named_with_their_size(tmp_path: Path, beside: dict[str, Any]) -> None:
    tree = {"state_dict": {"a": torch.ones(2)}, **beside}
    with open_checkpoint(save(tmp_path / "x.pth", tree)) as found:
        assert list(found.infos) == ["a"]
        assert found.passed_over == {"shadow": 16}
        assert any("'shadow'" in one and "16 bytes" in one for one in found.warnings)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averages_that_timm_prefers_are_warned_of(tmp_path: Path, key: str) -> None:
    tree = {"state_dict": {"a": torch.ones(2)}, key: {"a": torch.ones(2)}}
    with open_checkpoint(save(tmp_path / "x.pth", tree)) as found:
        assert any(f"timm loads {key!r}" in one for one in found.warnings)


@pytest.mark.parametrize("kind", [pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path])
def test_paths_among_hyper_parameters_are_no_code(tmp_path: Path, kind: type) -> None:
    tree = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {"root": kind("a/b")}}
    with open_checkpoint(save(tmp_path / "x.ckpt", tree)) as found:
        assert list(found.infos) == ["a"]


def test_a_pickle_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"a": torch.ones(1 << 16), "b": torch.ones(1 << 16)})
    with open_checkpoint(path) as found:
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match="reading failed"):
            found.read("b")


def test_views_are_read_by_position(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    z = torch.randn(3, 3, dtype=torch.complex64)
    tree = {
        "t": whole.t(), "part": whole[1:4, ::2], "wide": whole[0].expand(5, 8), "conj": z.conj(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(3), "half": whole.bfloat16(),
        "parameter": torch.nn.Parameter(whole),
    }  # fmt: skip
    with open_checkpoint(save(tmp_path / "x.pth", tree)) as found:
        for name, expected in tree.items():
            assert torch.equal(found.read(name), expected.detach()), name


@pytest.mark.parametrize("shape", [(22_000, 22_000), (1 << 20, 1 << 20)])
def test_tensors_that_repeat_one_value_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = save(tmp_path / "x.pth", {"a": torch.zeros(1).expand(shape)})
    with pytest.raises(CheckpointError, match="repeat a few values"):
        open_checkpoint(path)


def test_a_compressed_zip_is_refused_before_it_inflates(tmp_path: Path) -> None:
    plain = save(tmp_path / "x.pth", {"a": torch.zeros(1 << 16)})
    with (
        zipfile.ZipFile(plain) as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(tmp_path / "y.pth")


def test_a_storage_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"a": torch.arange(100, dtype=torch.float32)})
    raw = path.read_bytes()
    count = b"K\x64"  # 100, as the pickle says how many values the storage has
    assert raw.count(count) >= 1
    path.write_bytes(raw.replace(count, b"K\xff"))
    with pytest.raises(CheckpointError, match="not in the file"):
        open_checkpoint(path)


# Nothing is mapped, however a pickle is stored.


def awkward(kind: str) -> dict[str, torch.Tensor]:
    weight = torch.arange(12.0).reshape(3, 4)
    if kind == "sparse":
        return {"w": weight, "s": torch.eye(3).to_sparse()}
    if kind == "quantised":
        return {"w": weight, "q": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)}
    return {"w": weight}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "quantised", "big-endian", "writing"])
def test_no_pickle_is_mapped(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    torch.save(awkward(kind), path)
    if kind == "big-endian":
        path = swapped(path)
    given: list[bool] = []
    load = torch.load

    def spy(*args: Any, **options: Any) -> Any:
        given.append(bool(options.get("mmap")))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", spy)
    with open_checkpoint(path) as found:
        assert torch.equal(found.read("w"), torch.arange(12.0).reshape(3, 4))
        if kind == "writing":
            save_pickled(tmp_path / "y.pth", found, {"w": torch.zeros(3, 4)})
        else:
            assert any("loaded into memory as a whole" in note for note in found.notes)
    assert given
    assert not any(given)


def swapped(path: Path) -> Path:
    """Rewrite a pickle as a machine of the other byte order would have saved it."""
    target = path.with_name("swapped.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if "/data/" in entry.filename:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(entry.filename, b"big" if "byteorder" in entry.filename else data)
    return target


def test_what_lies_beside_the_tensors_is_read_by_position(tmp_path: Path) -> None:
    moment = torch.arange(6.0)
    tree = {
        "state_dict": {"w": torch.ones(2, 3)},
        "optimizer": {"state": {0: {"exp_avg": moment, "view": moment[2:4]}}, "lr": [0.1]},
        "extra": [(torch.eye(2), "text"), torch.nn.Parameter(torch.ones(2))],
        "args": argparse.Namespace(mean=torch.full((2,), 3.0)),
        "stats": np.arange(3),
    }
    path = save(tmp_path / "x.pth", tree)
    with open_checkpoint(path) as found:
        save_pickled(tmp_path / "y.pth", found, {"w": torch.zeros(2, 3)})
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="expected a whole file"):
            save_pickled(tmp_path / "z.pth", found, {"w": torch.zeros(2, 3)})
    new = torch.load(tmp_path / "y.pth", weights_only=False)
    state = new["optimizer"]["state"][0]
    assert torch.equal(state["exp_avg"], moment)
    assert torch.equal(state["view"], moment[2:4])
    places = {state[key].untyped_storage().data_ptr() for key in ("view", "exp_avg")}
    assert len(places) == 1
    assert torch.equal(new["extra"][0][0], torch.eye(2))
    assert type(new["extra"][1]) is torch.nn.Parameter
    assert new["args"].mean.tolist() == [3.0, 3.0]
    assert new["stats"].tolist() == [0, 1, 2]
    assert not new["state_dict"]["w"].any()


# Other weights of the model do not outlive a merge.


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        (lambda s: {"state_dict": s, "state_dict_ema": s}, "state_dict_ema"),
        (lambda s: {"model": s, "model_ema": {"module": s, "decay": 0.9}}, "model_ema"),
        (lambda s: {"a": {"model": s, "best": {"module.w": s["w"]}}}, "a > best"),
        (lambda s: {**s, "swa": {"module": s}}, "swa"),
        (lambda s: {"state_dict": s, "swa": s}, "swa"),
    ],
)
def test_a_merged_pickle_loads_as_merged(tree: Any, left: str, tmp_path: Path) -> None:
    weights = {"w": torch.randn(4, 3), "b": torch.ones(4)}
    state = {"epoch": 3, "optimizer": {"m": torch.ones(2)}}
    base = save(tmp_path / "x.pth", {**tree(weights), **state})
    factors = decompose(base, tmp_path / "f", exclude=["b"]).output
    with open_factors(factors) as store:
        S = {name: store.read_S(name) * 2 for name in store.layers}
        write_tuned(tmp_path / "t.safetensors", store=store, S=S)
    result = merge(factors, [tmp_path / "t.safetensors"], output=tmp_path / "m.pth", verify=True)
    assert list(result.dropped) == [left]
    assert result.dropped[left] >= weights["w"].nbytes
    new = torch.load(tmp_path / "m.pth")
    assert new["epoch"] == 3
    assert new["optimizer"]["m"].tolist() == [1.0, 1.0]
    timm = pytest.importorskip("timm.models")
    if "a" not in new:
        loaded = timm.load_state_dict(str(tmp_path / "m.pth"), weights_only=True)
        assert torch.allclose(loaded["w"], weights["w"] * 2, atol=1e-5)
