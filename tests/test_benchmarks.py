"""The engine's benchmark in its short mode: every result within its bounds of float64 LAPACK."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svftool.choices.merging import METHODS, parse_method
from svftool.training import Run
from svftool.training.loop import Outcome
from svftool.training.plan import run_to_plain

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decompose.py"
KINDS = {"values", "reconstruction", "orthogonality"}


def square(number: int) -> list[dict[str, int]]:
    if number == 2:
        raise ValueError(number)
    return [{"of": number, "is": number * number}]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_the_engine_holds_its_bounds(tmp_path: Path) -> None:
    measured = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "--quick", "--threads", "1", "--json", measured]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"]: row for row in json.loads(measured.read_text(encoding="utf-8"))}
    assert rows["quick"]["our_errors"].keys() == KINDS
    assert rows["quick rank 64"]["methods"] == {"krylov": 1}
    for row in rows.values():
        assert all(error <= 1e-6 for kind, error in row["our_errors"].items() if kind == "values")


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_what_a_gpu_is_measured_with_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    measured = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--json", str(measured)])
    assert gpu.main() == 0, capsys.readouterr()
    document = json.loads(measured.read_text(encoding="utf-8"))
    assert document.keys() == {"machine", "seconds", *gpu.PARTS}
    assert not any(row["broken"] for row in document["bounds"])
    methods = " ".join(row.get("methods", "") for row in document["bounds"])
    assert all(method in methods for method in ("gram", "krylov", "lapack64", "zero"))
    ratios = {(row["kind"], row["peer"]) for row in document["networks"] if "ratio" in row}
    assert ratios == {("full", "default"), ("values", "default"), ("rank", "default"),
                      ("rank", "svd_lowrank")}  # fmt: skip
    assert [row["regime"] for row in document["training"]] == ["svf", "full"]
    assert [row["command"] for row in document["commands"]] == ["decompose", "merge", "inspect"]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
@pytest.mark.parametrize("part", ["bounds", "commands"])
def test_it_fails_where_something_is_broken(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    if part == "bounds":
        bounds = importlib.import_module("gpu_bounds")
        monkeypatch.setitem(bounds.BOUNDS, "orthogonality", 1e-18)
    else:
        monkeypatch.setitem(gpu.PARTS, part, lambda device, quick: iter([{"broken": True}]))
    monkeypatch.setattr(sys, "argv", ["gpu", part, "--device", "cpu", "--quick"])
    assert gpu.main() == 1


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_cases_go_by_the_names_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    chosen = importlib.import_module("names").chosen
    known = ["resnet50", "resnet50 values", "vit_b_16", "gpt2"]
    assert chosen([], known) == known
    assert chosen(["ViT-B/16", "GPT-2"], known) == ["vit_b_16", "gpt2"]
    assert chosen(["ResNet-50"], known) == known[:2]
    with pytest.raises(SystemExit, match="2"):
        chosen(["resnet50", "resnet51"], known)
    assert "no such case: 'resnet51', expected one of resnet50; " in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_loads(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    importlib.import_module(script.stem)


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
@pytest.mark.parametrize("jobs", [1, 2])
def test_pieces_are_done_once_and_a_failure_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    units = importlib.import_module("units")

    journal = units.Journal(tmp_path / "new" / "lines.jsonl")
    assert units.work_off([1, 2, 3], square, journal, jobs=jobs) == 1
    assert {line["of"]: line["is"] for line in journal.lines} == {1: 1, 3: 9}
    with journal.path.open("a", encoding="utf-8") as stream:
        stream.write('{"of": 4, "i')  # a process that was killed
    again = units.Journal(journal.path)
    assert again.lines == journal.lines
    again.add([{"of": 5}])
    assert units.Journal(journal.path).lines == [*journal.lines, {"of": 5}]
    assert units.work_off([7], square, again, minutes=0) == 0
    assert {"of": 7, "is": 49} not in again.lines


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_a_regime_has_the_rates_that_its_first_run_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    curves = importlib.import_module("curves")
    reached = {"svf": (10, 0.78), "salt:1": (30, 0.5), "lora:8": (90, 0.8)}
    one = replace(
        next(each for each in curves.SETS if each.name == "dtd10"),
        seeds=2,
        left_out=tuple({*curves.HEAD, *curves.SPECTRAL, *curves.OTHERS} - set(reached)),
    )
    asked: list[Any] = []

    def run(_: Any, group: Any) -> list[dict[str, Any]]:
        asked.append(group)
        return [line(unit, group.factor or 3.0) for unit in group.units]

    def line(unit: Any, factor: float) -> dict[str, Any]:
        numbers, accuracy = reached[unit.regime]
        after = {"accuracy": accuracy + 0.02 * unit.seed}
        outcome = Outcome("finished", 1, 1, 1.0, 0.5, 0.1, None)
        done = Run(
            unit.regime, unit.seed, unit.shots, {}, {"accuracy": 0.7}, after, numbers, outcome,
            0.1, None, worse=False,
        )  # fmt: skip
        plain = run_to_plain(done)
        return {"key": list(unit.key), "factor": factor, "metric": "accuracy", "run": plain}

    monkeypatch.setattr(curves, "run", run)
    journal = curves.Journal(tmp_path / "curves.jsonl")
    options = SimpleNamespace(jobs=1, minutes=None)
    curves.go(options, [one], journal)
    assert [(len(group.units), group.factor) for group in asked] == [(1, None)] * 3 + [(3, 3.0)]
    assert {unit.seed for unit in asked[-1].units} == {1}
    curves.go(options, [one], curves.Journal(journal.path))
    assert len(asked) == 4
    table = curves.tables(one, journal.lines, tmp_path / "curve.svg")
    # In the reference's interval with a ninth of its numbers, and far below it.
    assert "| **svf** | 10 | 79.0 ± 12.7 | \N{MINUS SIGN}2.0 ± 0.0 | 0 of 2 | 3 | 2 |" in table
    assert "| salt:1 | 30 | 51.0 ± 12.7 | \N{MINUS SIGN}30.0 ± 0.0 | 0 of 2 | 3 | 2 |" in table
    assert ">lora:8</text>" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    page, logged = tmp_path / "results.md", tmp_path / "experiments" / "curves.md"
    logged.parent.mkdir()
    around = "{0}Before\n\ntext\n\n{0}{1}\n\n10 examples:\n\n| old |\n\n{2}{0}After\n\ntext\n"
    page.write_text(around.format("### ", one.title, "kept\n\n"))
    logged.write_text(around.format("## ", one.title, ""))
    curves.write([one], journal.lines, tmp_path)
    written = around.replace("10 examples:\n\n| old |", table.split("\n\n", 1)[1])
    assert page.read_text() == written.format("### ", one.title, "kept\n\n")
    assert curves.log(one, journal.lines) in logged.read_text()
    assert "old" not in logged.read_text()
    assert logged.read_text().endswith("\n\n## After\n\ntext\n")


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_merges_of_tasks_are_held_against_the_fine_tunes_of_their_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    report = importlib.import_module("merging_tasks_report")

    def line(seed: int, row: str, a: float, b: float, task: str = "") -> dict[str, object]:
        return {"cell": f"full/{seed}/{row}/{task}", "kind": "full", "seed": seed, "row": row,
                "pairs": False, "accuracy": {"a": a, "b": b}}  # fmt: skip

    base = {"cell": "base/a", "row": "base", "accuracy": {"a": 0.4, "b": 0.5}}
    tuned = [
        *(line(0, "fine-tune", 0.8, 0.1, "a"), line(0, "fine-tune", 0.1, 0.5, "b")),
        *(line(1, "fine-tune", 0.4, 0.1, "a"), line(1, "fine-tune", 0.1, 1.0, "b")),
        line(2, "fine-tune", 0.4, 0.1, "a"),
    ]
    merged = [line(0, "ties", 0.4, 0.5), line(1, "ties", 0.4, 0.5), line(2, "ties", 0.0, 0.0)]
    (group,) = report.grouped([base, *tuned, *merged], ["a", "b"])
    (ties,) = group.merged
    # Seed 2 has no fine-tune of b, so that it says nothing.
    assert ties.normalised == pytest.approx([0.75, 0.75])
    assert group.base.normalised == pytest.approx([0.75, 0.75])
    assert group.own.accuracy == pytest.approx({"a": 0.6, "b": 0.75})
    assert "| ties | 40.0 | 50.0 | 75.0 | 0.0 |" in report.table(
        [base, *tuned, *merged], ["a", "b"]
    )
    report.draw([base, *tuned, *merged], ["a", "b"], tmp_path / "x.svg")
    assert ">ties</text>" in (tmp_path / "x.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_every_method_merges_the_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("merging_tasks")
    known = list(script.cells(2))
    rows = {(one.method, one.pairs) for one in known}
    assert {name.partition(":")[0] for name, _ in rows} == set(METHODS)
    for one in known:
        for tasks in one.groups:
            parse_method(one.method).check_count(len(tasks))
    names = [one.name for one in script.matched(known, ["full/1/ties", "lora:8/0/iso-c"])]
    assert names == ["lora:8/0/iso-c", "lora:8/0/iso-cts", "full/1/ties"]
    with pytest.raises(SystemExit, match="2"):
        script.matched(known, ["full/1/tie", "full/2"])
    assert "no such case: 'full/2', expected a part of full/0/linear; " in capsys.readouterr().err


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_pictures_of_tasks_are_kept_evenly_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    images = importlib.import_module("merging_tasks_images")
    labels = torch.arange(3).repeat_interleave(torch.tensor([5, 1, 4]))
    part = images.Part(torch.arange(10).view(10, 1, 1, 1).to(torch.uint8), labels).at_most(2)
    assert part.images.flatten().tolist() == [0, 2, 5, 6, 8]
    assert part.labels.tolist() == [0, 0, 1, 2, 2]
    assert part.size == 3
