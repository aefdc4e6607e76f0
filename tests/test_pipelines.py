"""Pipelines: folders with ``model_index.json``, taken component by component by one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool.cli import app
from svftool.errors import FactorsError
from svftool.factors import open_factors
from svftool.stages import pipeline as stage

COMPONENTS = ("text_encoder", "unet", "vae")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
SHAPES = {
    "text_encoder": {"text_model.l.0.q_proj.weight": (12, 12), "text_model.l.0.q_proj.bias": (12,)},
    "unet": {"down_blocks.0.to_q.weight": (16, 8), "conv_in.weight": (8, 4, 3, 3)},
    "vae": {"decoder.conv.weight": (6, 4, 3, 3), "decoder.conv.bias": (6,)},
}


def make(folder: Path, changed: dict[str, float] | None = None, without: str = "") -> Path:
    """Write a pipeline; the changed components by singular values and by a low rank."""
    folder.mkdir()
    index: dict[str, Any] = {
        "_class_name": "TinyPipeline",
        "force_zeros": True,
        "safety": [None, None],
    }
    for name in COMPONENTS:
        index[name] = ["diffusers", "Model"]
    index |= {"scheduler": ["diffusers", "DDIM"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    generator = torch.Generator().manual_seed(0)
    for name in COMPONENTS:
        state = {k: torch.randn(s, generator=generator) for k, s in SHAPES[name].items()}
        if name == without:
            continue
        size = (changed or {}).get(name, 0.0)
        state = {k: v + size * low_rank(v) if v.ndim > 1 else v for k, v in state.items()}
        (folder / name).mkdir()
        save_file(state, folder / name / WEIGHTS[name], {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"_class_name": name}))
    for place in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "README.md"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("{}")
    return folder


def low_rank(value: torch.Tensor) -> torch.Tensor:
    m, n = value.shape[0], value[0].numel()
    up, down = torch.linspace(-1, 1, m)[:, None], torch.linspace(0.5, 1, n)[None]
    return (up @ down).reshape(value.shape)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, args), "-q"])
    assert result.exit_code == code, result.stderr
    return result


def document(*args: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json").stdout)
    return found


def test_the_round_trip_is_byte_identical(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    found = document("decompose", base, "-o", tmp_path / "f")
    assert list(found["components"]) == list(COMPONENTS)
    assert all(one["command"] == "decompose" for one in found["components"].values())
    assert found["components"]["unet"]["output"] == str(tmp_path / "f" / "unet")
    merged = document("merge", tmp_path / "f", "-o", tmp_path / "m")
    assert contents(tmp_path / "m") == contents(base)
    assert "scheduler/scheduler_config.json" in merged["carried"]
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("form", ["svf", "peft", "kohya"])
def test_extract_gives_each_component_its_own_result(tmp_path: Path, form: str) -> None:
    base = make(tmp_path / "base")
    tuned = make(tmp_path / "tuned", {"unet": 0.1, "text_encoder": 0.2})
    how = [] if form == "svf" else ["--as", "lora", "--rank", 1, "--layout", form]
    found = document("extract", base, tuned, "-o", tmp_path / "x", *how)
    if form == "svf":
        assert list(found["components"]) == list(COMPONENTS)
        assert found["components"]["vae"]["error"] == 0
        names = {f"{name}.svf.safetensors" for name in COMPONENTS}
    else:
        assert list(found["components"]) == ["text_encoder", "unet"]
        assert found["unchanged"] == ["vae"]
        assert all(one["error"] < 1e-5 for one in found["components"].values())
        names = {n + ("" if form == "peft" else ".safetensors") for n in found["components"]}
    assert {one.name for one in (tmp_path / "x").iterdir()} == names
    for one in found["components"].values():
        assert Path(one["output"]).exists()
    if form == "svf":
        run("decompose", base, "-o", tmp_path / "f")
        run("merge", tmp_path / "f", tmp_path / "x", "-o", tmp_path / "m")
        assert contents(base).keys() == contents(tmp_path / "m").keys()
        for name, file in WEIGHTS.items():
            before, after = (load_file(one / name / file) for one in (base, tmp_path / "m"))
            same = all(torch.equal(before[key], after[key]) for key in before)
            assert same == (name == "vae")


def test_one_tuned_file_finds_its_component(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    tuned = make(tmp_path / "tuned", {"unet": 0.1, "text_encoder": 0.2})
    run("decompose", base, "-o", tmp_path / "f")
    run("extract", base, tuned, "-o", tmp_path / "x")
    one = tmp_path / "x" / "unet.svf.safetensors"
    run("merge", tmp_path / "f", f"{one}@0", f"{one}@1", "-o", tmp_path / "m")
    before, after = contents(base), contents(tmp_path / "m")
    assert {n for n in before if before[n] != after[n]} == {f"unet/{WEIGHTS['unet']}"}
    other = make(tmp_path / "other", dict.fromkeys(COMPONENTS, 1.0))
    run("decompose", other, "-o", tmp_path / "g")
    refused = run("merge", tmp_path / "g", one, "-o", tmp_path / "n", code=FactorsError.exit_code)
    assert "belongs to none of the components" in refused.stderr
    assert not (tmp_path / "n").exists()


def test_inspect_says_a_verdict_of_each_and_gates_all(tmp_path: Path) -> None:
    base, tuned = make(tmp_path / "base"), make(tmp_path / "tuned", {"unet": 0.1})
    words = ["inspect", base, tuned, "--csv", tmp_path / "t.csv"]
    found = document(*words)["components"]
    verdicts = {name: one["comparisons"][0]["verdict"] for name, one in found.items()}
    assert verdicts["vae"] == verdicts["text_encoder"] == "untouched"
    assert verdicts["unet"] != "untouched"
    assert {p.name for p in tmp_path.glob("*.csv")} == {f"t.{name}.csv" for name in COMPONENTS}
    assert "unet" in run("inspect", base, tuned).stdout
    run("inspect", base, tuned, "--fail-above", "weight_drift=0.0001", code=10)
    run("inspect", base, base, "--fail-above", "weight_drift=0.0001")


def test_a_component_that_is_not_there_is_named_and_passes_no_gate(tmp_path: Path) -> None:
    base, tuned = make(tmp_path / "base"), make(tmp_path / "tuned", without="vae")
    assert document("inspect", base, tuned)["missing"] == ["vae"]
    failed = run("inspect", base, tuned, "--fail-above", "weight_drift=9", code=10)
    assert "vae" in failed.stderr


@pytest.mark.parametrize("command", ["inspect", "extract"])
def test_what_is_no_pipeline_has_no_place_beside_one(tmp_path: Path, command: str) -> None:
    base = make(tmp_path / "base")
    words = [] if command == "inspect" else ["-o", tmp_path / "x"]
    refused = run(command, base, base / "unet", *words, code=3)
    assert "is a pipeline" in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("[]", "a JSON list"), ("{", "not readable"), ('{"a": 1}', "no component has weights"),
     ('{"../base": ["a", "b"]}', "no component has weights")],
)  # fmt: skip
def test_a_broken_index_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    base = make(tmp_path / "base")
    (base / "model_index.json").write_text(text)
    refused = run("decompose", base, "-o", tmp_path / "f", code=3)
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_interrupted_decomposition_keeps_finished_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, real, seen = make(tmp_path / "base"), stage.decompose, []

    def cut(checkpoint: Path, *args: Any, **options: Any) -> Any:
        seen.append(checkpoint.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(checkpoint, *args, **options)

    monkeypatch.setattr(stage, "decompose", cut)
    with pytest.raises(KeyboardInterrupt):
        stage.decompose_pipeline(base, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    refused = run("decompose", base, "-o", tmp_path / "f", "--resume", "--rank", 2, code=2)
    assert "another rank" in refused.stderr
    run("decompose", base, "-o", tmp_path / "f", "--resume")
    assert seen == ["text_encoder", "unet", "unet", "vae"]
    run("merge", tmp_path / "f", "-o", tmp_path / "m")
    assert contents(tmp_path / "m") == contents(base)


def test_a_dry_run_says_all_and_writes_nothing(tmp_path: Path) -> None:
    found = document("decompose", make(tmp_path / "base"), "-o", tmp_path / "f", "--dry-run")
    assert list(found["components"]) == list(COMPONENTS)
    assert not (tmp_path / "f").exists()


def test_weights_beside_the_components_are_named(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    save_file({"a": torch.ones(2)}, base / "whole.safetensors")
    found = document("decompose", base, "-o", tmp_path / "f")
    assert [one["name"] for one in found["left"]] == ["whole.safetensors"]
    assert not (tmp_path / "f" / "whole.safetensors").exists()


def test_the_folder_of_factors_finds_its_base(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    run("decompose", base, "-o", tmp_path / "f")
    with open_factors(tmp_path / "f" / "unet") as store, store.open_base() as opened:
        assert set(opened.infos) == set(load_file(base / "unet" / WEIGHTS["unet"]))


def test_info_shows_every_component(tmp_path: Path) -> None:
    made = make(tmp_path / "pipe")
    found = document("info", made)
    assert found["of"] == "info"
    assert list(found["components"]) == list(COMPONENTS)
    place = made / "vae" / WEIGHTS["vae"]
    place.write_bytes(place.read_bytes()[:-4])
    failed = run("info", made, code=3)
    assert "vae: " in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
