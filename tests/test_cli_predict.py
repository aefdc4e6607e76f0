"""``svftool predict``, and that a model gives one number whichever way it is given."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import write_model, write_texts
from pictures import write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli_evaluate import MODEL, TRAINING, run, succeed

import svftool
from svftool.factors import write_tuned

PIXELS = """
import torch
from torch import nn

class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images):
        return self.head(self.conv(images).relu())

def pixels():
    return Pixels()
"""


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for five classes, tuned for three colours, with factors, merged, and new data."""
    work = tmp_path_factory.mktemp("birds")
    (work / "net.py").write_text(MODEL)
    write_pictures(work / "data", count=5)
    write_pictures(work / "new", count=3, seed=7, size=(20, 28))
    scope: dict[str, Any] = {}
    exec(compile(MODEL, "net.py", "exec"), scope)
    save_file(scope["five"]().state_dict(), work / "base.safetensors", {"format": "pt"})
    succeed("decompose", work / "base.safetensors", "-o", work / "factors", "-q")
    succeed(
        *("finetune", work / "factors", "-o", work / "t.svf.safetensors", "--data", work / "data"),
        *("--model", f"{work}/net.py:five", *TRAINING),
    )
    succeed(
        *("merge", work / "factors", work / "t.svf.safetensors", "-o", work / "m.safetensors"),
    )
    return work


def ways(work: Path) -> list[list[Any]]:
    model = ["--model", f"{work}/net.py:five"]
    return [
        [work / "factors", "--tuned", work / "t.svf.safetensors", *model],
        [work / "m.safetensors", *model],
    ]


def rows(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout)["predictions"])


def test_pictures_get_the_names_of_their_classes_either_way(birds: Path) -> None:
    first, second = (rows(run("predict", *way, birds / "new", "--json")) for way in ways(birds))
    assert [row["file"] for row in first] == [str(p) for p in sorted(birds.glob("new/*/*.png"))]
    assert [row["prediction"] for row in first] == [Path(r["file"]).parent.name for r in first]
    for one, other in zip(first, second, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)
        assert sum(c["probability"] for c in one["classes"]) == pytest.approx(1.0)


def test_predictions_are_those_of_evaluate(birds: Path, tmp_path: Path) -> None:
    for way in ways(birds):
        file = tmp_path / "p.jsonl"
        succeed("evaluate", *way, "--data", birds / "new", "--predictions", file, "--force")
        expected = [json.loads(line) for line in file.read_text().splitlines()]
        found = rows(run("predict", *way, birds / "new", "--json"))
        assert [r["prediction"] for r in found] == [r["prediction"] for r in expected]
        assert [r["probability"] for r in found] == pytest.approx(
            [r["probability"] for r in expected], rel=1e-6
        )


def test_settings_say_where_they_are_from(birds: Path) -> None:
    sources = {}
    for way, kind in zip(ways(birds), ("tuned file", "merged checkpoint"), strict=True):
        for command, data in (
            ("predict", [birds / "new"]),
            ("evaluate", ["--data", birds / "new"]),
        ):
            found = json.loads(succeed(command, *way, *data, "--json").stdout)["settings"]
            assert found["examples"] == {"value": 9, "source": "data"}
            assert found["image_size"] == {"value": [16, 16], "source": kind}
            assert found["classes"] == {"value": 3, "source": kind}
            assert {found[name]["source"] for name in ("mean", "std", "head_type")} == {kind}
            sources[command, kind] = found
    assert sources["predict", "tuned file"] == sources["evaluate", "tuned file"]
    given = json.loads(
        succeed("evaluate", *way, "--data", birds / "new", "--image-size", 24, "--json").stdout
    )["settings"]
    assert given["image_size"] == {"value": [24, 24], "source": "option"}
    assert given["mean"]["source"] == "merged checkpoint"


def test_rows_go_to_a_file(birds: Path, tmp_path: Path) -> None:
    way = ways(birds)[1]
    succeed("predict", *way, birds / "new", "--top", 2, "-o", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    names = ["file", "prediction", "probability", "name_1", "probability_1", "name_2"]
    assert list(table[0])[:6] == names
    succeed("predict", *way, birds / "new", "--top", 2, "-o", tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in lines] == [row["prediction"] for row in table]
    assert all(len(row["classes"]) == 2 for row in lines)


def test_the_library_does_the_same(birds: Path) -> None:
    file = sorted(birds.glob("new/red/*.png"))[0]
    result = svftool.predict(birds / "m.safetensors", file, model=f"{birds}/net.py:five")
    assert (result.task, result.classes) == ("classification", ("blue", "green", "red"))
    assert result.rows[0]["prediction"] == "red"


def test_trained_pictures_are_noticed(birds: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(birds / "new", mixed)
    for way in ways(birds):
        clean = succeed("evaluate", *way, "--data", mixed, "--json")
        assert json.loads(clean.stdout)["seen_in_training"] == 0
        assert "byte for byte" not in clean.stderr
    for one in sorted(birds.glob("data/*/*.png")):
        shutil.copy(one, mixed / one.parent.name / f"copy-{one.name}")
    for way in ways(birds):
        found = succeed("evaluate", *way, "--data", mixed, "--json")
        assert json.loads(found.stdout)["seen_in_training"] == 9
        assert "9 of 24 examples" in found.stderr


def test_finetune_notices_them_too(birds: Path, tmp_path: Path) -> None:
    fixed = ["--data", birds / "data", "--model", f"{birds}/net.py:five", "--steps", 1]
    mixed = tmp_path / "mixed"
    shutil.copytree(birds / "new", mixed)
    out = tmp_path / "t.svf.safetensors"
    clean = succeed("finetune", birds / "factors", "-o", out, *fixed, "--eval", mixed)
    assert "byte for byte" not in clean.stderr
    shutil.copy(birds / "data" / "red" / "00.png", mixed / "red" / "same.png")
    found = succeed("finetune", birds / "factors", "-o", out, *fixed, "--eval", mixed, "--force")
    assert "1 of 10 examples" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["m.safetensors", "nowhere"], 6, "no such file"),
        (["m.safetensors", "new", "-o", "p.txt"], 2, ".jsonl or .csv"),
        (["m.safetensors", "new", "-o", "maps"], 2, ".jsonl or .csv"),
        (["m.safetensors", "net.py"], 6, "expected an image"),
        (["base.safetensors", "new", "--tuned", "t.svf.safetensors"], 2, "expected factors"),
        (["m.safetensors", "new", "--task", "few-shot-segmentation"], 2, "nothing to predict"),
        (["m.safetensors", "new", "--classes", "turned.txt"], 6, "the same order"),
        (["m.safetensors", "new", "-o", "new/p.csv"], 2, "inside the input"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    birds: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(birds)
    (birds / "turned.txt").write_text("red\ngreen\nblue\n")
    before = sorted(birds.rglob("*"))
    result = run("predict", *arguments, "--model", "net.py:five")
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(birds.rglob("*")) == before


def test_unnamed_outputs_are_numbered(birds: Path) -> None:
    result = run(
        "predict", birds / "base.safetensors", birds / "new", "--model", f"{birds}/net.py:five",
        "--json", "--top", 5,
    )  # fmt: skip
    assert {one["name"] for one in rows(result)[0]["classes"]} == set("01234")


def test_scenes_become_maps(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(PIXELS)
    scope: dict[str, Any] = {}
    exec(compile(PIXELS, "net.py", "exec"), scope)
    save_file(scope["pixels"]().state_dict(), tmp_path / "m.safetensors", {"format": "pt"})
    random = np.random.default_rng(0)
    for name, size in (("a", (12, 20)), ("b", (16, 10))):
        (tmp_path / "new" / name).mkdir(parents=True)
        pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / name / "1.png")
    (tmp_path / "names.txt").write_text("sky\nland\n")
    command = ["predict", tmp_path / "m.safetensors", tmp_path / "new", "--task", "segmentation"]
    command += ["--model", f"{tmp_path}/net.py:pixels", "--classes", tmp_path / "names.txt"]
    found = rows(run(*command, "-o", tmp_path / "maps", "--json"))
    assert [row["map"] for row in found] == ["a/1.png", "b/1.png"]
    for row in found:
        labels = np.asarray(Image.open(tmp_path / "maps" / row["map"]))
        with Image.open(row["file"]) as picture:
            width, height = picture.size
        assert labels.shape == (height, width)
        for one in row["classes"]:
            share = float((labels == ["sky", "land"].index(one["name"])).mean())
            assert one["share"] == pytest.approx(share, abs=1e-6)
    twice = run(*command[:2], *sorted((tmp_path / "new").rglob("*.png")), *command[3:])
    assert twice.exit_code == 6
    assert "the name of" in twice.stderr


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a tuned file that was trained with another length than the default."""
    work = tmp_path_factory.mktemp("writer")
    write_model(work / "base")
    factors = svftool.decompose(work / "base", work / "factors").output
    data = {"sequence_length": 8, "shots": 2}
    with svftool.open_factors(factors) as store:
        S = {name: 1.3 * store.read_S(name) for name in store.layers}
        write_tuned(
            work / "t.svf.safetensors",
            store=store,
            S=S,
            task="language",
            training={"seed": 0, "data": data},
        )
    tuned = work / "t.svf.safetensors"
    svftool.merge(factors, [tuned], output=work / "folder")
    svftool.merge(factors, [tuned], output=work / "folder" / "again.safetensors")
    (work / "folder" / "again.safetensors").rename(work / "one.safetensors")
    texts = ["the owl sees the gull at night", "a wren", "one two three four five six seven"]
    write_texts(work / "texts.jsonl", [{"text": text} for text in texts])
    return work


def test_a_perplexity_is_one_number_whichever_way_the_model_is_given(writer: Path) -> None:
    found = []
    for checkpoint, tuned in ((writer / "factors", "t.svf.safetensors"), (writer / "folder", None)):
        result = svftool.evaluate(
            checkpoint,
            tuned=None if tuned is None else writer / tuned,
            data=writer / "texts.jsonl",
            task="language",
        )
        found.append(result.runs[0].metrics["perplexity"])
        assert result.settings["sequence_length"].value == 8
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    other = svftool.evaluate(
        writer / "folder", data=writer / "texts.jsonl", task="language", sequence_length=64
    )
    assert other.settings["sequence_length"].source == "option"
    assert other.runs[0].metrics["perplexity"] != pytest.approx(found[0], rel=1e-4)
    base = svftool.evaluate(writer / "base", data=writer / "texts.jsonl", task="language")
    assert base.settings["sequence_length"].source == "model"


def test_texts_are_measured_and_gone_on_with(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the owl\n\na\n")
    (tmp_path / "rows.csv").write_text("prompt,completion\nthe owl,\nthe owl, sees\n")
    write_texts(tmp_path / "rows.jsonl", [{"prompt": "the owl"}, {"text": "the owl"}])
    result = svftool.predict(writer / "folder", tmp_path, top=2)
    assert result.task == "language"
    places = [(Path(row["file"]).name, row["line"]) for row in result.rows]
    assert places == [
        ("lines.txt", 1),
        ("lines.txt", 3),
        ("rows.csv", 2),
        ("rows.csv", 3),
        ("rows.jsonl", 1),
        ("rows.jsonl", 2),
    ]
    same = [result.rows[i] for i in (0, 2, 4, 5)]
    for row in same:
        assert row["loss"] == pytest.approx(same[0]["loss"], rel=1e-5)
        assert [one["token"] for one in row["next"]] == [one["token"] for one in same[0]["next"]]
    assert len(same[0]["next"]) == 2
    assert result.rows[3]["next"] == []
    expected = svftool.evaluate(writer / "folder", data=writer / "texts.jsonl", task="language")
    found = svftool.predict(writer / "folder", writer / "texts.jsonl")
    tokens = sum(row["tokens"] for row in found.rows)
    mean = sum(row["loss"] * row["tokens"] for row in found.rows) / tokens
    assert float(np.exp(mean)) == pytest.approx(expected.runs[0].metrics["perplexity"], rel=1e-5)


def test_next_tokens_are_the_models(writer: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(writer / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(writer / "base")
    (writer / "one.txt").write_text("owl\n")
    row = svftool.predict(writer / "base", writer / "one.txt", top=1, task="language").rows[0]
    with torch.inference_mode():
        logits = model(input_ids=tokenizer("owl", return_tensors="pt")["input_ids"]).logits
    sure, token = logits[0, -1].softmax(0).max(0)
    assert row["next"][0]["token"] == tokenizer.decode([int(token)])
    assert row["next"][0]["probability"] == pytest.approx(float(sure), rel=1e-4)


def test_a_merge_without_config_carries_class_names(birds: Path) -> None:
    assert load_file(birds / "m.safetensors")["fc.weight"].shape == (3, 8)
    with svftool.open_checkpoint(birds / "m.safetensors") as merged:
        assert merged.config is None
        facts = json.loads(merged.metadata["svftool_merged"])
    assert facts["classes"] == ["blue", "green", "red"]
