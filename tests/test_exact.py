"""Exact deltas: what comes back is the fine-tune, whatever its words, formats and names are."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import faults
from safetensors.torch import load_file, save_file

from svftool.checkpoints import open_checkpoint
from svftool.checkpoints.exact_file import ExactFile
from svftool.cli import app
from svftool.errors import CheckpointError, ResourceError, UsageError
from svftool.files.names import EXACT_KEY
from svftool.numerics.words import BLOCK, as_words, pack, unpack
from svftool.progress import Silent
from svftool.report import exact as report
from svftool.stages.extract_exact import extract_exact
from svftool.stages.info import info
from svftool.stages.restore import restore

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def _random(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Words of any bits: NaN with payloads, infinities, subnormals among them."""
    g = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=g)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype
        and one[k].shape == other[k].shape
        and one[k]
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(other[k].contiguous().reshape(-1).view(torch.uint8))
        for k in one
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path, stored=True) as found:
        return {name: found.read(name) for name in found.infos}


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(8, 8), "c": torch.ones(3)}


@pytest.fixture
def tuned(base) -> dict[str, torch.Tensor]:
    return base | {"a.weight": base["a.weight"] + 1e-3 * torch.randn(40, 30)}


@pytest.fixture
def pair(base, tuned, tmp_path) -> tuple[Path, Path, Path]:
    """A base, its fine-tune, and the delta."""
    one, two, delta = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "delta"))
    save_file(base, one, {"format": "pt"})
    save_file(tuned, two, {"format": "pt"})
    extract_exact(one, two, output=delta)
    return one, two, delta


def test_every_dtype_comes_back_with_all_its_bits(tmp_path) -> None:
    old = {f"t{n}": _random(dtype, (7, 6), n) for n, dtype in enumerate(DTYPES)}
    new = {f"t{n}": _random(dtype, (7, 6), n + 99) for n, dtype in enumerate(DTYPES)}
    nan = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000], "<u4").view("<f4")
    old |= {"nan": torch.zeros(4), "same": torch.from_numpy(nan.copy()), "empty": torch.ones(0, 3)}
    new |= {"nan": torch.from_numpy(nan), "same": old["same"], "empty": torch.ones(0, 3)}
    old["scalar"], new["scalar"] = torch.tensor(1.0), torch.tensor(2.0)
    torch.save(old, tmp_path / "b.pth")
    save_file(new, tmp_path / "t.safetensors")
    result = extract_exact(
        tmp_path / "b.pth", tmp_path / "t.safetensors", output=tmp_path / "d.safetensors"
    )
    ways = {one.name: one.way for one in result.tensors}
    assert ways["same"] == ways["empty"] == "same"
    assert set(ways.values()) <= {"same", "xor", "difference"}
    for name in ("m.safetensors", "m.pth", "folder"):
        restore(tmp_path / "b.pth", tmp_path / "d.safetensors", output=tmp_path / name, verify=True)
        assert _same(_read(tmp_path / name), new), name


def test_the_comparison_of_these_tests_can_fail() -> None:
    nan = torch.from_numpy(np.array([0x7FC00001], "<u4").view("<f4"))
    assert not _same({"a": nan}, {"a": torch.tensor([float("nan")])})
    assert not _same({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)})


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("way", ["xor", "difference", "whole"])
def test_words_of_every_width_in_more_than_one_block(itemsize: int, way) -> None:
    rng = np.random.default_rng(itemsize)
    before = as_words(rng.integers(0, 256, (BLOCK + 5) * itemsize, np.uint8), itemsize)
    after = before.copy()
    after[BLOCK - 2 :] = as_words(rng.integers(0, 256, 7 * itemsize, np.uint8), itemsize)
    old = None if way == "whole" else before
    packed = pack(after, old, way)
    out = np.empty_like(after)
    unpack(memoryview(packed), old, way, out)
    assert np.array_equal(out, after)
    assert old is None or len(packed) < 1000


def test_small_changes_are_stored_smaller_than_by_xor_and_plain_compression() -> None:
    from svftool.numerics.words import zstd

    torch.manual_seed(0)
    W = 0.02 * torch.randn(1 << 18)
    old, new = (
        one.bfloat16().view(torch.int16).numpy().view("<u2")
        for one in (W, W + 4e-4 * torch.randn(1 << 18))
    )
    xor = old ^ new
    exponents = ((xor >> 7) & 255).astype(np.uint8)
    rest = ((xor >> 8) & 128 | xor & 127).astype(np.uint8)
    published = len(zstd.compress(exponents.tobytes())) + len(zstd.compress(rest.tobytes()))
    assert len(pack(new, old, "difference")) < 0.95 * published < 0.5 * new.nbytes


def test_files_of_the_formats_own_library_come_back_byte_for_byte(pair, tmp_path) -> None:
    one, two, delta = pair
    restore(one, delta, output=tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == two.read_bytes()


def test_tensors_that_come_go_and_change_shape_or_dtype_are_counted(base, tmp_path) -> None:
    new = {
        "module.a.weight": base["a.weight"] * 1.001,
        "b.weight": torch.randn(9, 8),
        "d": torch.ones(5, dtype=torch.bfloat16),
    }
    torch.save(base, tmp_path / "b.pth")
    torch.save({"state_dict": new, "epoch": 7}, tmp_path / "t.pth")
    result = extract_exact(
        tmp_path / "b.pth", tmp_path / "t.pth", output=tmp_path / "d.safetensors"
    )
    assert result.ways == {"difference": 1, "whole": 2} or result.ways == {"xor": 1, "whole": 2}
    assert result.removed == ("c",)
    assert faults(report.extract_document(result)) == []
    back = restore(
        tmp_path / "b.pth", tmp_path / "d.safetensors", output=tmp_path / "m.pth", verify=True
    )
    assert _same(_read(tmp_path / "m.pth"), new)
    assert back.removed == ("a.weight", "c")
    assert set(back.added) == {"module.a.weight", "d"}
    assert faults(report.merge_document(back)) == []


def test_shards_and_their_index_come_back_under_their_names(base, tuned, tmp_path) -> None:
    for name, state in (("base", base), ("tuned", tuned)):
        folder = tmp_path / name
        folder.mkdir()
        names = sorted(state)
        files = {n: f"model-0000{i + 1}-of-00003.safetensors" for i, n in enumerate(names)}
        for n in names:
            save_file({n: state[n]}, folder / files[n], {"format": "pt"})
        size = sum(one.numel() * 4 for one in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"for": "both"}))
    (tmp_path / "tuned" / "chat.json").write_text("{}")
    result = extract_exact(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "d.safetensors")
    assert [one.name for one in result.dropped] == ["chat.json"]
    back = restore(
        tmp_path / "base", tmp_path / "d.safetensors", output=tmp_path / "m", verify=True
    )
    assert back.dropped == {"chat.json": 2}
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()
    assert {one.name for one in (tmp_path / "m").iterdir()} == {
        one.name for one in (tmp_path / "base").iterdir()
    }
    resharded = restore(
        tmp_path / "base", tmp_path / "d.safetensors", output=tmp_path / "r", max_shard_size="5GB"
    )
    assert _same(_read(resharded.output), tuned)


def test_quantised_codes_are_words(tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-9, 9, (16, 16), dtype=torch.int8, generator=g)
    old = {"l.weight": codes, "l.weight_scale": torch.ones(16, 1)}
    new = old | {"l.weight": codes + 1}
    save_file(old, tmp_path / "b.safetensors")
    save_file(new, tmp_path / "t.safetensors")
    extract_exact(
        tmp_path / "b.safetensors", tmp_path / "t.safetensors", output=tmp_path / "d.safetensors"
    )
    restore(
        tmp_path / "b.safetensors", tmp_path / "d.safetensors", output=tmp_path / "m.safetensors"
    )
    assert _same(load_file(tmp_path / "m.safetensors"), new)


def test_the_same_inputs_give_the_same_bytes(pair, tmp_path) -> None:
    one, two, delta = pair
    extract_exact(one, two, output=tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == delta.read_bytes()


def test_a_plan_says_the_size_and_writes_nothing(pair, tmp_path) -> None:
    one, two, delta = pair
    before = sorted(tmp_path.iterdir())
    plan = extract_exact(one, two, output=tmp_path / "x.safetensors", dry_run=True)
    stored = load_file(delta)
    assert plan.bytes == sum(value.numel() for value in stored.values())
    checked = restore(one, delta, output=tmp_path / "m.safetensors", dry_run=True)
    assert checked.dry_run
    assert checked.verified is None
    assert sorted(tmp_path.iterdir()) == before


# What is refused.


def _refused(one: Path, delta: Path, tmp_path: Path, text: str, *, name="m.safetensors") -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises((CheckpointError, ResourceError), match=text) as caught:
        restore(one, delta, output=tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c"])
def test_one_other_bit_of_the_base_is_another_base(name, base, pair, tmp_path) -> None:
    one, _, delta = pair
    other = {k: v.clone() for k, v in base.items()}
    other[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(other, one, {"format": "pt"})
    _refused(one, delta, tmp_path, f"{name}.*expected the base with the fingerprint")


def test_a_base_of_other_tensors_is_refused_before_any_is_read(base, pair, tmp_path) -> None:
    one, _, delta = pair
    others = {
        "no tensor": {"a.weight": base["a.weight"]},
        "also has 'z'": base | {"z": torch.ones(1)},
        r"is float16 \[3\], not float32": base | {"c": base["c"].half()},
        "not float32": base | {"b.weight": torch.ones(4, 16)},
    }
    for text, state in others.items():
        save_file(state, one, {"format": "pt"})
        _refused(one, delta, tmp_path, text)


def test_a_removed_tensor_counts_as_the_bases(base, tmp_path) -> None:
    one, two, delta = (tmp_path / f"{name}.safetensors" for name in ("b", "t", "d"))
    save_file(base, one)
    save_file({"a.weight": base["a.weight"] + 1}, two)
    extract_exact(one, two, output=delta)
    save_file(base | {"c": torch.zeros(3)}, one)
    _refused(one, delta, tmp_path, "has the fingerprint")


def test_flipped_bytes_are_found_wherever_they_are(pair, tmp_path) -> None:
    one, _, delta = pair
    whole = delta.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in (start, start + 2, start + 16, (start + len(whole)) // 2, len(whole) - 1):
        broken = bytearray(whole)
        broken[at] ^= 0x10
        delta.write_bytes(broken)
        _refused(one, delta, tmp_path, "delta.safetensors: a.weight: .*expected a tensor of 4800")


def test_a_delta_that_is_cut_off_is_refused(pair, tmp_path) -> None:
    one, _, delta = pair
    whole = delta.read_bytes()
    for size in (4, 100, len(whole) - 1):
        delta.write_bytes(whole[:size])
        _refused(one, delta, tmp_path, "delta.safetensors")


def _edited(delta: Path, edit) -> None:
    """Write a delta whose metadata say something else."""
    tensors, facts = load_file(delta), _facts(delta)
    edit(facts)
    save_file(tensors, delta, {"format": "pt", EXACT_KEY: json.dumps(facts)})


def _facts(delta: Path) -> dict:
    with delta.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return json.loads(header["__metadata__"][EXACT_KEY])


def _set(**values):
    return lambda facts: facts.update(values)


def _entry(**values):
    return lambda facts: facts["entries"][0].update(values)


EDITS = {
    "version": (_set(version=2), "version 2"),
    "codec": (_set(codec="rot13"), "rot13"),
    "bytes": (_set(bytes=1), "bytes"),
    "no entries": (_set(entries=[]), "does not hold together"),
    "entries are a text": (_set(entries="a"), "does not hold together"),
    "an unknown way": (_entry(way="eval"), "does not hold together"),
    "a negative side": (_entry(shape=[-1, 4]), "does not hold together"),
    "no dtype": (_entry(dtype="load"), "does not hold together"),
    "a path as file": (_set(shards=[["../x.safetensors", 3]]), "plain names"),
    "a path as index": (_set(index_file="../x.json"), "plain name"),
    "fingerprint": (_set(tuned_fingerprint="0" * 64), "fingerprint"),
    "a digest": (_entry(sha256="0" * 64), "fingerprint|SHA-256|does not hold"),
}


@pytest.mark.parametrize("case", EDITS)
def test_metadata_that_do_not_hold_together(case, pair, tmp_path) -> None:
    one, _, delta = pair
    edit, text = EDITS[case]
    _edited(delta, edit)
    _refused(one, delta, tmp_path, text)


def test_sizes_are_believed_only_as_far_as_they_hold(tmp_path) -> None:
    """A few bytes that claim a huge tensor: refused by the disk's room, none of it in memory."""
    save_file({"a": torch.zeros(4)}, tmp_path / "b.safetensors")
    save_file({"z": torch.ones(4)}, tmp_path / "t.safetensors")
    delta = tmp_path / "d.safetensors"
    extract_exact(tmp_path / "b.safetensors", tmp_path / "t.safetensors", output=delta)

    def huge(facts: dict) -> None:
        facts["entries"][0]["shape"] = [1 << 50]
        facts["bytes"] = 4 << 50

    _edited(delta, huge)
    for name in ("m.safetensors", "m.pth", "m"):
        _refused(tmp_path / "b.safetensors", delta, tmp_path, "bytes", name=name)
    with ExactFile(delta) as file, pytest.raises(CheckpointError, match="table"):
        file.restore(file.facts.entries[0], None)


def test_a_plane_that_claims_another_size_is_not_decompressed() -> None:
    from svftool.numerics.words import zstd

    bomb = zstd.compress(bytes(1 << 26))
    table = np.array([len(bomb)], "<u4").tobytes()
    with pytest.raises(ValueError, match=f"a plane of {1 << 26} bytes"):
        unpack(memoryview(table + bomb), None, "whole", np.empty(BLOCK, "<u1"))
    twice = zstd.compress(b"ab" * 500) * 2
    table = np.array([len(twice)], "<u4").tobytes()
    with pytest.raises(ValueError, match="does not end after"):
        unpack(memoryview(table + twice), None, "whole", np.empty(1000, "<u1"))


def test_other_commands_say_what_a_delta_is(pair) -> None:
    _, _, delta = pair
    with pytest.raises(CheckpointError, match=r"an exact delta.*svftool merge"):
        open_checkpoint(delta)
    found = info(delta)
    assert found.kind == "exact delta"
    assert found.facts["ways"]["same"] == 2
    assert found.facts["base_fingerprint"] != found.facts["tuned_fingerprint"]


def test_gguf_and_sparse_tensors_are_refused(base, pair, tmp_path) -> None:
    one, _, _ = pair
    torch.save({**base, "c": torch.eye(3).to_sparse()}, tmp_path / "s.pth")
    with pytest.raises(CheckpointError, match="c: a sparse tensor"):
        extract_exact(one, tmp_path / "s.pth", output=tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="safetensors file"):
        extract_exact(one, one, output=tmp_path / "x.bin")


def test_the_commands(pair, tmp_path, capsys) -> None:
    from typer.testing import CliRunner

    one, two, delta = map(str, pair)
    call = CliRunner().invoke

    def run(*args: object):
        return call(app, list(map(str, args)))

    made = run("extract", one, two, "-o", tmp_path / "x.safetensors", "--as", "exact", "--json")
    assert made.exit_code == 0, made.stderr
    document = json.loads(made.stdout)
    assert faults(document) == []
    assert document["ratio"] == document["bytes"] / document["tuned_bytes"]
    shown = run("extract", one, two, "-o", tmp_path / "y", "--as", "exact")
    assert shown.exit_code == 2
    shown = run("extract", one, two, "-o", tmp_path / "y.safetensors", "--as", "exact", "--dry-run")
    assert "nothing written" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    merged = run("merge", one, delta, "-o", tmp_path / "m.safetensors", "--verify", "--json")
    assert merged.exit_code == 0, merged.stderr
    document = json.loads(merged.stdout)
    assert faults(document) == []
    assert document["verified"] is True
    assert document["restored"]["ways"]["same"] == 2
    for wrong in (["--dtype", "float32"], ["--without-base"], [delta]):
        refused = run("merge", one, delta, *wrong, "-o", tmp_path / "n.safetensors")
        assert refused.exit_code == 2, wrong
        assert not (tmp_path / "n.safetensors").exists()
    described = run("info", delta)
    assert "exact delta" in described.stdout


def test_progress_counts_the_bytes_of_the_fine_tune(pair, tuned, tmp_path) -> None:
    one, two, delta = pair
    told: list[tuple[str, float | None]] = []

    class Told(Silent):
        def task(self, description, total=None, *, unit=""):
            told.append((description, total))
            return super().task(description, total, unit=unit)

    size = sum(value.numel() * 4 for value in tuned.values())
    extract_exact(one, two, output=tmp_path / "x.safetensors", progress=Told())
    restore(one, delta, output=tmp_path / "m.safetensors", verify=True, progress=Told())
    assert told == [("packing", size), ("restoring", size), ("verifying", size)]
