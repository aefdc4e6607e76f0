"""Merging: bit-exact where nothing changed, the weighted delta where something did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svftool import (
    CheckpointError,
    FactorsError,
    NumericalError,
    UsageError,
    decompose,
    merge,
    open_factors,
)
from svftool.factors import write_tuned
from svftool.factors.dense import follow_classes

torch.manual_seed(0)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bytes(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(raw(found[name]), raw(tensor)), name


def test_the_comparison_can_fail() -> None:
    zero = {"a": torch.zeros(2)}
    with pytest.raises(AssertionError):
        assert_same_bytes({"a": -torch.zeros(2)}, zero)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    tensors = {
        "a.weight": torch.randn(8, 6),
        "a.bias": torch.randn(8),
        "b.weight": torch.randn(5, 4, 3, 3).bfloat16(),
        "steps": torch.tensor(7),
    }
    save_file(tensors, path, {"format": "pt", "author": "me"})
    return path


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


def tune(folder: Path, path: Path, scale: float, *, only: str = "", **extra: object) -> Path:
    with open_factors(folder) as store:
        names = [name for name in store.layers if name.startswith(only)]
        S = {name: scale * store.read_S(name) for name in names}
        write_tuned(path, store=store, S=S, **extra)
    return path


@pytest.mark.parametrize("rank", ["full", "2", "0.5", "energy:0.6"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_untuned_factors_give_the_base_back(
    base: Path, tmp_path: Path, rank: str, dtype: str
) -> None:
    folder = decompose(base, tmp_path / "f", rank=rank, dtype=dtype).output
    result = merge(folder, output=tmp_path / "m.safetensors", verify=True)
    assert result.verified
    assert result.unchanged == 4
    assert not any(one.changed for one in result.layers)
    assert_same_bytes(load_file(tmp_path / "m.safetensors"), load_file(base))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "me"}


def test_scaled_singular_values_scale_the_weight(factors: Path, base: Path, tmp_path: Path) -> None:
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 1.5, only="a")
    result = merge(factors, [tuned], output=tmp_path / "m.safetensors", verify=True)
    before, after = load_file(base), load_file(tmp_path / "m.safetensors")
    assert torch.allclose(after["a.weight"], 1.5 * before["a.weight"], rtol=1e-5, atol=1e-6)
    assert torch.equal(raw(after["b.weight"]), raw(before["b.weight"]))
    changes = {one.name: one for one in result.layers}
    assert changes["a.weight"].relative_change == pytest.approx(0.5, rel=1e-5)
    assert not changes["b.weight"].changed
    assert result.unchanged == 3


def test_rounding_loss_is_reported_for_a_change_below_the_dtype(
    factors: Path, base: Path, tmp_path: Path
) -> None:
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 1.0001, only="b")
    result = merge(factors, [tuned], output=tmp_path / "m.safetensors")
    loss = {one.name: one.rounding_loss for one in result.layers}["b.weight"]
    assert loss > 0.9
    same = load_file(tmp_path / "m.safetensors")["b.weight"] == load_file(base)["b.weight"]
    assert same.float().mean() > 0.9


def test_tuned_files_mix_as_a_weighted_sum(factors: Path, base: Path, tmp_path: Path) -> None:
    one = tune(factors, tmp_path / "1.svf.safetensors", 1.5)
    two = tune(factors, tmp_path / "2.svf.safetensors", 0.8)
    merge(factors, [f"{one}@0.5", (two, 2.0)], output=tmp_path / "m.safetensors", verify=True)
    before, after = load_file(base), load_file(tmp_path / "m.safetensors")
    expected = (1 + 0.5 * 0.5 - 2.0 * 0.2) * before["a.weight"]
    assert torch.allclose(after["a.weight"], expected, rtol=1e-5, atol=1e-6)


def test_opposite_weights_cancel_bit_for_bit(factors: Path, base: Path, tmp_path: Path) -> None:
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 1.5)
    merge(factors, [f"{tuned}@1", f"{tuned}@-1"], output=tmp_path / "m.safetensors")
    assert_same_bytes(load_file(tmp_path / "m.safetensors"), load_file(base))


def test_whole_tensors_are_replaced_and_added(factors: Path, base: Path, tmp_path: Path) -> None:
    whole = {"a.bias": torch.ones(8), "head.weight": torch.randn(3, 5).half()}
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 1.0, whole=whole)
    result = merge(factors, [tuned], output=tmp_path / "m.safetensors", verify=True)
    after = load_file(tmp_path / "m.safetensors")
    assert (result.added, result.replaced) == (("head.weight",), ("a.bias",))
    assert_same_bytes({k: after[k] for k in whole}, whole)
    assert result.unchanged == 3


def test_whole_tensors_mix_as_deltas(factors: Path, base: Path, tmp_path: Path) -> None:
    bias = load_file(base)["a.bias"]
    one = tune(factors, tmp_path / "1.svf.safetensors", 1.0, whole={"a.bias": bias + 1})
    two = tune(factors, tmp_path / "2.svf.safetensors", 1.0, whole={"a.bias": bias - 3})
    merge(factors, [f"{one}@0.5", f"{two}@0.25"], output=tmp_path / "m.safetensors")
    after = load_file(tmp_path / "m.safetensors")["a.bias"]
    assert torch.allclose(after, bias - 0.25, atol=1e-6)


def test_heads_of_different_shapes_do_not_mix(factors: Path, tmp_path: Path) -> None:
    one = tune(factors, tmp_path / "1.svf.safetensors", 1.0, whole={"h": torch.ones(2)})
    two = tune(factors, tmp_path / "2.svf.safetensors", 1.0, whole={"h": torch.ones(3)})
    with pytest.raises(FactorsError, match=r"'h': trained with shape \(2,\) and \(3,\)"):
        merge(factors, [one, two], output=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_without_base_rebuilds_and_says_its_error(
    factors: Path, base: Path, tmp_path: Path
) -> None:
    tensors = load_file(base)
    base.unlink()
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 2.0)
    with pytest.raises(FactorsError, match="its base is not at the recorded place"):
        merge(factors, [tuned], output=tmp_path / "m")
    result = merge(factors, [tuned], output=tmp_path / "m", without_base=True, verify=True)
    assert result.rebuilt_error is not None
    assert result.rebuilt_error < 1e-6
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.allclose(after["a.weight"], 2 * tensors["a.weight"], rtol=1e-5, atol=1e-6)
    assert torch.equal(after["steps"], tensors["steps"])


def test_without_base_needs_the_other_tensors(base: Path, tmp_path: Path) -> None:
    folder = decompose(base, tmp_path / "f", layers_only=True).output
    with pytest.raises(FactorsError, match="the decomposed layers only"):
        merge(folder, output=tmp_path / "m", without_base=True)
    merge(folder, output=tmp_path / "m.safetensors")
    assert_same_bytes(load_file(tmp_path / "m.safetensors"), load_file(base))


def test_a_moved_base_is_given_by_hand_and_checked(
    factors: Path, base: Path, tmp_path: Path
) -> None:
    moved = base.rename(tmp_path / "moved.safetensors")
    merge(factors, output=tmp_path / "m.safetensors", base=moved)
    save_file({"a.weight": torch.randn(8, 6)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="fingerprint"):
        merge(factors, output=tmp_path / "n", base=tmp_path / "foreign.safetensors")
    assert not (tmp_path / "n").exists()


def test_sharded_bases_keep_their_shards_and_reshard_on_request(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = {f"l{i}.weight": torch.randn(16, 12) for i in range(6)}
    folder = tmp_path / "base"
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size=2000)
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    factors = decompose(folder, tmp_path / "f").output
    merge(factors, output=tmp_path / "m")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((tmp_path / "m" / name).read_text()) == json.loads(
                (folder / name).read_text()
            )
        else:
            assert_same_bytes(load_file(tmp_path / "m" / name), load_file(folder / name))
    merge(factors, output=tmp_path / "one", max_shard_size="1GB")
    assert_same_bytes(load_file(tmp_path / "one" / "model.safetensors"), tensors)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_pickled_base_keeps_its_nesting_in_a_pickle(tmp_path: Path) -> None:
    tensors = {"module.w": torch.randn(6, 5), "module.b": torch.randn(6)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "base.pth")
    factors = decompose(tmp_path / "base.pth", tmp_path / "f").output
    tuned = tune(factors, tmp_path / "t.svf.safetensors", 2.0)
    merge(factors, [tuned], output=tmp_path / "m.pth", verify=True)
    merge(factors, [tuned], output=tmp_path / "m.safetensors", verify=True)
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)
    assert loaded["epoch"] == 3
    assert_same_bytes(dict(loaded["state_dict"]), load_file(tmp_path / "m.safetensors"))
    assert torch.allclose(loaded["state_dict"]["module.w"], 2 * tensors["module.w"], atol=1e-5)


def test_verify_finds_a_changed_byte(
    factors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svftool.stages import merge as stage

    def write_and_damage(mixture, partial, **options):
        changes = write_dense(mixture, partial, **options)
        data = bytearray(partial.read_bytes())
        data[-1] ^= 1
        partial.write_bytes(data)
        return changes

    write_dense = stage.write_dense
    monkeypatch.setattr(stage, "write_dense", write_and_damage)
    with pytest.raises(NumericalError, match="1 tensor differs from what was computed"):
        merge(factors, output=tmp_path / "m.safetensors", verify=True)
    assert not (tmp_path / "m.safetensors").exists()


def test_existing_outputs_and_inputs_are_safe(factors: Path, base: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        merge(factors, output=kept)
    assert kept.read_bytes() == b"precious"
    with pytest.raises(UsageError, match="the same as the input"):
        merge(factors, output=base, force=True)
    merge(factors, output=kept, force=True)
    assert_same_bytes(load_file(kept), load_file(base))


def test_a_new_heads_classes_reach_config_json(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    base.rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "vit", "id2label": {"0": "LABEL_0"}}')
    factors = decompose(folder, tmp_path / "f").output
    whole = {"head.weight": torch.randn(2, 5)}
    tuned = tune(factors, tmp_path / "t.safetensors", 1.0, whole=whole, classes=["cat", "dog"])
    merge(factors, [tuned], output=tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    assert config["label2id"] == {"cat": 0, "dog": 1}


def test_timm_configurations_follow_too() -> None:
    found = follow_classes({"architecture": "resnet18", "num_classes": 1000}, ["a", "b"])
    assert found["num_classes"] == 2
    assert found["label_names"] == ["a", "b"]
