"""`finetune` where something is left out: no evaluation set, no word on the kind of data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from svftool import DataError, UsageError
from svftool.files.given import check_data
from svftool.report.finetune import document, view
from svftool.report.json import to_json
from svftool.stages.decompose import decompose
from svftool.stages.evaluate import evaluate
from svftool.stages.finetune import finetune
from svftool.tasks.texts import list_texts
from svftool.training import Settings


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_file(net().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    write_pictures(tmp_path / "data", count=3)
    return tmp_path


def tune(work: Path, output: str, **options: Any) -> Any:
    return finetune(
        work / "factors",
        data=work / "data",
        output=work / output,
        model=f"{__name__}:net",
        settings=Settings(steps=2),
        **options,
    )


@pytest.mark.parametrize("shots", [None, 2, 3])
def test_eval_none_trains_without_measuring(work: Path, shots: int | None) -> None:
    result = tune(work, "runs", regimes=["head", "svf"], shots=shots, evaluation="none", seeds=2)
    assert all(run.before == run.after == {} and not run.worse for run in result.runs)
    assert all(run.outcome.steps == 2 for run in result.runs)
    assert all(math.isnan(one.mean) and not one.worse for one in result.summary)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(view(result))
    assert shown.get().count("not measured") == 2
    assert "nan" not in shown.get()
    written = json.loads((work / "runs" / "results.json").read_text())
    assert [one["mean"] for one in written["summary"]] == [None, None]
    assert "NaN" not in to_json(document(result))


def test_what_is_trained_does_not_depend_on_the_measuring(work: Path) -> None:
    tune(work, "a.svf.safetensors", shots=2)
    tune(work, "b.svf.safetensors", shots=2, evaluation="none")
    from svftool.factors import read_tuned

    one, other = (read_tuned(work / f"{name}.svf.safetensors") for name in "ab")
    assert one.S
    assert all(torch.equal(one.S[name], other.S[name]) for name in one.S)


def test_without_shots_or_data_to_measure_with_eval_none_is_offered(work: Path) -> None:
    with pytest.raises(UsageError, match="--eval none"):
        tune(work, "runs")


def test_evaluate_has_nothing_to_do_with_eval_none(work: Path) -> None:
    with pytest.raises(UsageError, match="measures nothing"):
        evaluate(work / "factors", data=work / "data", model=f"{__name__}:net", evaluation="none")


TEXTS = {
    "texts.jsonl": '{"text": "one"}\n',
    "pairs.jsonl": '\n{"prompt": "a", "completion": "b"}\n',
    "texts.csv": "id,text\n1,one two\n",
    "pairs.csv": '"prompt","completion"\nq,a\n',
}


@pytest.mark.parametrize("task", ["classification", "segmentation", "few-shot-segmentation"])
@pytest.mark.parametrize("name", [*TEXTS, "folder"])
def test_texts_without_their_task_say_which_to_add(tmp_path: Path, name: str, task: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(TEXTS["texts.jsonl"])
    else:
        (tmp_path / name).write_text(TEXTS[name])
    with pytest.raises(DataError, match=r"texts.*Add --task language\.$") as caught:
        check_data(tmp_path / name, task)
    assert "\n" not in str(caught.value)
    check_data(tmp_path / name, "language")


@pytest.mark.parametrize("header", ["path,label", "path,label,text", "a.png,cat", ""])
def test_tables_of_images_are_not_taken_for_texts(tmp_path: Path, header: str) -> None:
    (tmp_path / "images.csv").write_text(f"{header}\nb.png,dog\n")
    check_data(tmp_path / "images.csv", "classification")


def test_the_library_says_it_too(work: Path) -> None:
    (work / "texts.csv").write_text(TEXTS["texts.csv"])
    with pytest.raises(DataError, match="Add --task language"):
        finetune(
            work / "factors", data=work / "texts.csv", output=work / "o", model=f"{__name__}:net"
        )


def test_a_csv_of_texts_is_read_as_language(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('\ufeffText,id\n"one, two",1\n\n"three\nlines",2\n', "utf-8")
    (tmp_path / "p.csv").write_text("prompt,completion\nq,a\n")
    assert [one.body for one in list_texts(tmp_path / "t.csv")] == ["one, two", "three\nlines"]
    assert [(one.prompt, one.body) for one in list_texts(tmp_path / "p.csv")] == [("q", "a")]
    (tmp_path / "n.csv").write_text("id,body\n1,one\n")
    with pytest.raises(DataError, match=r"line 2: no 'text' \(it has id, body\)"):
        list_texts(tmp_path / "n.csv")
