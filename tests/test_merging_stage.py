"""``combine`` and ``merge --method``: inputs of every kind, heads, resuming, refusals."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool import CombineOptions, combine, decompose, merge, open_factors
from svftool.adapters.low_rank import LowRank
from svftool.choices.merging import METHODS, parse_method
from svftool.cli import app
from svftool.errors import (
    CheckpointError,
    FactorsError,
    NumericalError,
    ResourceError,
    UsageError,
)
from svftool.factors import write_tuned
from svftool.merging import combine_deltas
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import round_once
from svftool.processes import Processes
from svftool.stages import combine as combining
from svftool.stages import merge_layers

LAYERS = ("model.layers.0.q_proj.weight", "model.layers.0.o_proj.weight")


def base_state(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        LAYERS[0]: torch.randn(16, 24, generator=g),
        LAYERS[1]: torch.randn(24, 16, generator=g),
        "conv.weight": torch.randn(12, 3, 3, 3, generator=g),
        "model.norm.weight": torch.ones(24),
        "bn.running_var": torch.full((12,), 0.1),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def changed(state: dict[str, torch.Tensor], seed: int, by: float = 0.1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=g)
        if value.is_floating_point() and "running" not in name
        else value
        for name, value in state.items()
    }


class Files:
    """Checkpoints of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = base_state()
        self.tunes = [changed(self.base, seed) for seed in (1, 2, 3)]

    def save(self, name: str, state: dict[str, torch.Tensor], config: Any = None) -> Path:
        path = self.folder / name
        if config is not None:
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config))
            path = path / "model.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path, {"format": "pt"})
        return path if config is None else path.parent

    def all(self) -> tuple[Path, list[Path]]:
        base = self.save("base.safetensors", self.base)
        return base, [self.save(f"t{i}.safetensors", one) for i, one in enumerate(self.tunes)]

    def merge(self, base: Path, inputs: list[Any], name: str = "out.safetensors", **options: Any):
        result = combine(base, inputs, output=self.folder / name, options=CombineOptions(**options))
        file = result.output
        return result, load_file(file / "model.safetensors" if file.is_dir() else file)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_matrices_as_the_arrays_say(files: Files, method: str) -> None:
    base, paths = files.all()
    paths = paths[:2] if method == "slerp" else paths
    result, found = files.merge(base, paths, method=method, verify=True)
    for name in (*LAYERS, "conv.weight"):
        start = files.base[name]
        deltas = torch.stack([one[name] - start for one in files.tunes[: len(paths)]])
        expected = combine_deltas(deltas.flatten(2), parse_method(method), ThreadPool()).delta
        torch.testing.assert_close(
            found[name], start + expected.float().reshape(start.shape), rtol=1e-5, atol=1e-5
        )
    assert {one.name for one in result.layers} == {*LAYERS, "conv.weight"}
    assert result.verified
    assert result.interference.before is not None
    assert {one.name for one in result.interference.layers} == {*LAYERS, "conv.weight"}


def test_what_is_no_matrix_is_averaged_by_methods_of_matrices(files: Files) -> None:
    base, paths = files.all()
    norm = "model.norm.weight"
    mean = sum(one[norm] - 1 for one in files.tunes) / 3
    result, found = files.merge(base, paths, method="tsv")
    torch.testing.assert_close(found[norm], 1 + mean)
    assert sum(result.ways["averaged"].values()) == 1
    _, found = files.merge(base, paths, "o2.safetensors", method="linear")
    torch.testing.assert_close(found[norm], 1 + 3 * mean)
    _, found = files.merge(base, paths, "o3.safetensors", method="iso-c:scale=0.5")
    torch.testing.assert_close(found[norm], 1 + 0.5 * mean)


def test_statistics_are_averaged_by_every_method_and_counters_stay(files: Files) -> None:
    for one in files.tunes[:2]:
        one["bn.running_var"] = torch.full((12,), 0.02)
        one["bn.num_batches_tracked"] = torch.tensor(99)
    base, paths = files.all()
    # The sum of the changes would be negative: 0.1 - 2 * 0.08.
    result, found = files.merge(base, paths, method="linear")
    torch.testing.assert_close(found["bn.running_var"], torch.full((12,), 0.1 - 0.16 / 3))
    assert int(found["bn.num_batches_tracked"]) == 7
    assert sum(result.ways["as in the base"].values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_formed_and_added_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(300, 257, generator=g).to(dtype)  # more than one part
    tune = (base.double() * (1 + 0.01 * torch.randn(300, 257, generator=g))).to(dtype)
    paths = [tmp_path / name for name in ("base.safetensors", "tuned.safetensors")]
    for path, value in zip(paths, (base, tune), strict=True):
        save_file({"q_proj.weight": value}, path)
    for weight in (1.0, 0.5):
        out = tmp_path / f"{weight}.safetensors"
        combine(paths[0], [(paths[1], weight)], output=out)
        change = (weight * (tune.double() - base.double())).float()
        expected = round_once(base.double() + change.double(), dtype)
        assert torch.equal(load_file(out)["q_proj.weight"], expected)


def test_weights_multiply_the_changes(files: Files) -> None:
    base, paths = files.all()
    _, found = files.merge(base, [f"{paths[0]}@0.5", (paths[1], -2.0)], method="linear")
    start = files.base[LAYERS[0]]
    D = [one[LAYERS[0]] - start for one in files.tunes]
    torch.testing.assert_close(found[LAYERS[0]], start + 0.5 * D[0] - 2 * D[1])


# Adapters and tuned files beside dense fine-tunes.


def peft(folder: Path, name: str, B: torch.Tensor, A: torch.Tensor) -> Path:
    path = folder / name
    path.mkdir()
    module = LAYERS[0].removesuffix(".weight")
    save_file(
        {
            f"base_model.model.{module}.lora_A.weight": A,
            f"base_model.model.{module}.lora_B.weight": B,
        },
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": A.shape[0], "lora_alpha": A.shape[0],
                    "target_modules": ["q_proj"]})
    )  # fmt: skip
    return path


def test_dense_fine_tunes_adapters_and_tuned_files_are_mixed(files: Files) -> None:
    base, paths = files.all()
    g = torch.Generator().manual_seed(5)
    B, A = torch.randn(16, 2, generator=g), torch.randn(2, 24, generator=g)
    lora = peft(files.folder, "lora", B, A)
    factors = decompose(base, files.folder / "factors").output
    tuned = files.folder / "t.svf.safetensors"
    with open_factors(factors) as store:
        write_tuned(tuned, store=store, S={LAYERS[1]: 1.5 * store.read_S(LAYERS[1])}, whole={})
    result, found = files.merge(
        factors, [paths[0], f"{lora}@0.5", tuned], method="linear", verify=True
    )
    W0, W1 = files.base[LAYERS[0]], files.base[LAYERS[1]]
    expected = files.tunes[0][LAYERS[0]] + 0.5 * LowRank("", B, A).change().float()
    torch.testing.assert_close(found[LAYERS[0]], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[LAYERS[1]], files.tunes[0][LAYERS[1]] + 0.5 * W1, rtol=1e-4, atol=1e-4
    )
    assert [one.kind for one in result.inputs] == ["checkpoint", "lora", "tuned"]
    assert [one.changed for one in result.inputs] == [4, 1, 1]
    assert W0.shape == found[LAYERS[0]].shape
    with pytest.raises(FactorsError, match="svftool decompose"):
        files.merge(base, [tuned], "o2.safetensors")


def test_auto_is_tsv_of_weights_and_a_scaled_sum_where_an_input_holds_changes(files: Files) -> None:
    base, paths = files.all()
    A, B = torch.randn(2, 24), torch.randn(16, 2)
    lora = peft(files.folder, "lora", B, A)
    for inputs, method in ((paths, "tsv"), ([*paths[1:], lora], "linear:scale=0.4")):
        named, expected = files.merge(
            base, inputs, f"named-{method[:3]}.safetensors", method=method
        )
        auto, found = files.merge(base, inputs, f"auto-{method[:3]}.safetensors", method="auto")
        assert auto.method == named.method == method
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapters_and_tuned_files_merge_as_without_a_method(files: Files) -> None:
    base, _ = files.all()
    g = torch.Generator().manual_seed(5)
    loras = [
        peft(
            files.folder, f"l{i}", torch.randn(16, 2, generator=g), torch.randn(2, 24, generator=g)
        )
        for i in range(2)
    ]
    inputs = [f"{loras[0]}@0.7", str(loras[1])]
    merge(base, inputs, output=files.folder / "plain.safetensors")
    _, found = files.merge(base, inputs, method="linear")
    plain = load_file(files.folder / "plain.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)


# What is not in every input.


def test_missing_tensors_and_strangers_are_counted(files: Files) -> None:
    del files.tunes[0][LAYERS[0]]
    files.tunes[1]["extra.weight"] = torch.ones(4, 4)
    base, paths = files.all()
    result, found = files.merge(base, paths[:2], method="tsv")
    assert result.inputs[0].missing == (LAYERS[0],)
    assert dict(result.inputs[1].extra) == {"extra.weight": 64}
    # One input alone stays as it is.
    torch.testing.assert_close(found[LAYERS[0]], files.tunes[1][LAYERS[0]], rtol=1e-5, atol=1e-5)
    assert "extra.weight" not in found


def test_common_rows_of_a_resized_vocabulary_are_merged(files: Files) -> None:
    table = "model.embed_tokens.weight"
    files.base[table] = torch.randn(10, 24, generator=torch.Generator().manual_seed(8))
    files.tunes[0][table] = torch.cat([files.base[table] + 1, torch.full((3, 24), 9.0)])
    files.tunes[1][table] = files.base[table] + 2
    files.tunes[2][table] = files.base[table]
    base, paths = files.all()
    _, found = files.merge(base, paths, method="iso-c")
    torch.testing.assert_close(found[table], files.base[table] + 1.0)  # (1 + 2 + 0) / 3


def heads(files: Files, *classes: list[str] | None) -> tuple[Path, list[Path]]:
    """Give every fine-tune a head of its own beside a base without one."""
    base = files.save("base", files.base, {"model_type": "vit"})
    paths = []
    for i, names in enumerate(classes):
        count = len(names or "xyz")
        g = torch.Generator().manual_seed(20 + i)
        state = files.tunes[i] | {
            "classifier.weight": torch.randn(count, 24, generator=g),
            "classifier.bias": torch.full((count,), float(i)),
        }
        config = {"model_type": "vit"}
        if names is not None:
            config["id2label"] = {str(k): one for k, one in enumerate(names)}
        paths.append(files.save(f"h{i}", state, config))
    return base, paths


def test_heads_of_different_classes_are_refused_or_put_one_below_the_other(files: Files) -> None:
    base, paths = heads(files, ["a", "b", "c"], ["d", "e"])
    with pytest.raises(FactorsError, match=r"h0 \(a, b, c\), h1 \(d, e\).*--heads concat"):
        files.merge(base, paths, "out")
    result, found = files.merge(base, paths, "out", heads="concat")
    both = torch.cat([load_file(p / "model.safetensors")["classifier.weight"] for p in paths])
    assert torch.equal(found["classifier.weight"], both)
    assert found["classifier.bias"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    config = json.loads((result.output / "config.json").read_text())
    assert list(config["id2label"].values()) == ["a", "b", "c", "d", "e"]
    assert set(result.heads.values()) == {"concat"}
    assert set(result.added) == {"classifier.weight", "classifier.bias"}


def test_a_head_with_a_row_for_every_kind_of_segment_is_no_table_of_words(files: Files) -> None:
    files.base["token_type_embeddings.weight"] = torch.randn(2, 24)
    base, paths = heads(files, ["a", "b"], ["d", "e"])
    with pytest.raises(FactorsError, match=r"h0 \(a, b\), h1 \(d, e\).*--heads concat"):
        files.merge(base, paths, "out")


@pytest.mark.parametrize("how", ["first", "drop"])
def test_heads_of_the_first_or_of_none(files: Files, how: str) -> None:
    base, paths = heads(files, None, None)  # as many rows, and no names: values tell
    with pytest.raises(FactorsError, match="3 unnamed"):
        files.merge(base, paths, "out")
    _, found = files.merge(base, paths, "out", heads=how)
    if how == "drop":
        assert "classifier.weight" not in found
    else:
        first = load_file(paths[0] / "model.safetensors")
        assert torch.equal(found["classifier.weight"], first["classifier.weight"])


def test_heads_of_the_same_classes_are_averaged(files: Files) -> None:
    base, paths = heads(files, ["a", "b"], ["a", "b"])
    result, found = files.merge(base, [(paths[0], 1.0), (paths[1], 3.0)], "out", method="tsv")
    assert found["classifier.bias"].tolist() == [0.75, 0.75]
    assert set(result.heads.values()) == {"mean"}


def test_heads_of_tuned_files_take_the_place_of_the_base(files: Files) -> None:
    files.base["classifier.weight"] = torch.ones(5, 24)
    base, _ = files.all()
    factors = decompose(base, files.folder / "factors").output
    paths = []
    with open_factors(factors) as store:
        for i, value in enumerate((1.0, 2.0)):
            paths.append(files.folder / f"{i}.svf.safetensors")
            S = {LAYERS[0]: (1.1 + i) * store.read_S(LAYERS[0])}
            whole = {"classifier.weight": torch.full((2, 24), value)}
            write_tuned(paths[-1], store=store, S=S, whole=whole, classes=("a", "b"))
    result, found = files.merge(factors, paths, method="linear")
    assert torch.equal(found["classifier.weight"], torch.full((2, 24), 1.5))
    assert result.replaced == ("classifier.weight",)
    assert not any(one.extra or one.missing for one in result.inputs)


def test_a_head_that_all_share_with_the_base_is_merged_as_a_change(files: Files) -> None:
    for state in (files.base, *files.tunes):
        state["classifier.weight"] = torch.ones(5, 24)
    files.tunes[0]["classifier.weight"] = torch.full((5, 24), 1.3)
    files.tunes[1]["classifier.weight"] = torch.full((5, 24), 1.2)
    base, paths = files.all()
    result, found = files.merge(base, paths, method="linear")
    torch.testing.assert_close(found["classifier.weight"], torch.full((5, 24), 1.5))
    assert not result.heads


# What is refused, in one line and before anything is written.


def test_another_base_is_refused_unless_allowed(files: Files) -> None:
    base, paths = files.all()
    stranger = files.save("stranger.safetensors", base_state(99))
    with pytest.raises(CheckpointError, match=r"cosine of -?0\.\d\d.*--allow-other-base"):
        files.merge(base, [paths[0], stranger])
    assert not (files.folder / "out.safetensors").exists()
    result, _ = files.merge(base, [paths[0], stranger], other_base=True)
    assert result.inputs[1].cosine < 0.5 < result.inputs[0].cosine


def test_inputs_that_are_not_finite_are_refused(files: Files) -> None:
    files.tunes[1][LAYERS[0]][0, 0] = torch.inf
    base, paths = files.all()
    with pytest.raises(NumericalError, match=r"t1.safetensors: .*q_proj.*NaN or infinity"):
        files.merge(base, paths)
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "base.safetensors", "t0.safetensors", "t1.safetensors", "t2.safetensors",
    ]  # fmt: skip


def test_a_sum_that_its_dtype_cannot_hold_is_refused_or_clipped(files: Files) -> None:
    files.base = {name: value.half() for name, value in files.base.items() if value.ndim == 2}
    files.tunes = [{n: v + 1 for n, v in files.base.items()} for _ in range(2)]
    base, paths = files.all()
    with pytest.raises(NumericalError, match="overflow float16"):
        files.merge(base, [f"{one}@40000" for one in paths])
    result, found = files.merge(base, [f"{one}@40000" for one in paths], allow_overflow=True)
    assert set(result.clipped) == set(LAYERS)
    assert bool(found[LAYERS[0]].isfinite().all())


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "tvs"], "Did you mean 'tsv'?"),
        (["--method", "ties:density=2"], "density is '2'"),
        (["--method", "slerp"], "3 inputs, expected exactly 2"),
        (["--heads", "first"], "an option of a merge with --method"),
        (["--method", "tsv", "--without-base"], "no meaning with --method"),
        (["--method", "tsv", "--max-shard-size", "1GB"], "is one file"),
    ],
)
def test_the_command_refuses_in_one_line(files: Files, words: list[str], said: str) -> None:
    base, paths = files.all()
    found = run("merge", base, *paths, "-o", files.folder / "o.safetensors", *words)
    assert found.exit_code == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("weight", ["x", "nan", "inf"])
def test_a_weight_that_is_no_number_is_refused(files: Files, weight: str) -> None:
    base, paths = files.all()
    found = run("merge", base, f"{paths[0]}@{weight}", "-o", files.folder / "o", "--method", "tsv")
    assert (found.exit_code, found.stdout) == (2, "")
    assert "expected a" in found.stderr


# The command's document and page.


def test_document_table_and_page(files: Files) -> None:
    base, paths = files.all()
    page = files.folder / "p.html"
    words = ["merge", base, *paths, "-o", files.folder / "o.safetensors", "--method", "tsv"]
    found = run(*words, "--json", "--html", page, "-q")
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    clash = document["interference"]
    assert document["method"] == "tsv"
    assert clash["before"]["inflation"] > clash["after"]["inflation"] > 0
    assert abs(clash["after"]["cosine"]) < 1e-6
    assert len(clash["pairs"]) == 3
    assert {one["name"] for one in clash["layers"]} == {*LAYERS, "conv.weight"}
    text = page.read_text()
    assert "q_proj" in text
    assert text.count("<svg") == 2
    shown = run(*words, "--force", "-q").stdout
    assert "all layers" in shown
    assert max(map(len, shown.splitlines())) <= 80


# Interrupted and shared work.


def test_an_interrupted_merge_goes_on_where_it_was(files: Files, monkeypatch) -> None:
    base, paths = files.all()
    _, expected = files.merge(base, paths, "whole.safetensors", method="tsv")
    real, calls = merge_layers.MergeSpool.add, []

    def stopping(self, layer, weight):
        if len(calls) == 2:
            raise ResourceError("cut off")
        calls.append(layer.name)
        real(self, layer, weight)

    options = CombineOptions(method="tsv")
    monkeypatch.setattr(merge_layers.MergeSpool, "add", stopping)
    with pytest.raises(ResourceError):
        combine(base, paths, output=files.folder / "o.safetensors", options=options)
    again: list[str] = []

    def counting(self, layer, weight):
        again.append(layer.name)
        real(self, layer, weight)

    monkeypatch.setattr(merge_layers.MergeSpool, "add", counting)
    with pytest.raises(UsageError, match="another method"):
        combine(base, paths, output=files.folder / "o.safetensors", resume=True,
                options=CombineOptions(method="ties"))  # fmt: skip
    result = combine(
        base, paths, output=files.folder / "o.safetensors", options=options, resume=True
    )
    assert sorted((*calls, *again)) == sorted((*LAYERS, "conv.weight"))
    found = load_file(result.output)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not [one for one in files.folder.iterdir() if "partial" in one.name]


class Beside(Processes):
    """A process that is a thread of this one: what it gathers goes through a list."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        super().__init__(rank, len(slots))
        object.__setattr__(self, "exchange", (barrier, slots))

    def gather(self, value: Any) -> list[Any]:
        barrier, slots = self.exchange  # type: ignore[attr-defined]
        slots[self.rank] = value
        barrier.wait(20)
        found = list(slots)
        barrier.wait(20)
        return found

    def once(self, work: Any) -> Any:
        return self.gather(work() if self.first else None)[0]


def test_processes_share_the_matrices(files: Files, monkeypatch) -> None:
    base, paths = files.all()
    alone, expected = files.merge(base, paths, "alone.safetensors", method="tsv")
    barrier, slots = threading.Barrier(2), [None, None]
    mine: dict[int, list[str]] = {0: [], 1: []}
    real = merge_layers.LayerMerge._merged

    def noting(self, jobs, progress):
        mine[int(threading.current_thread().name)] += [job.name for job in jobs]
        return real(self, jobs, progress)

    @contextmanager
    def joined():
        yield Beside(int(threading.current_thread().name), barrier, slots)

    monkeypatch.setattr(merge_layers.LayerMerge, "_merged", noting)
    monkeypatch.setattr(combining, "joined_processes", joined)
    results: list[Any] = []

    def one() -> None:
        results.append(
            combine(base, paths, output=files.folder / "shared.safetensors",
                    options=CombineOptions(method="tsv"))
        )  # fmt: skip

    threads = [threading.Thread(target=one, name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    assert all(mine.values())
    assert sorted(mine[0] + mine[1]) == sorted(one.name for one in alone.layers)
    found = load_file(files.folder / "shared.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
