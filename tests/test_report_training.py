"""The report of a training: figure and page of a small comparison made by hand."""

from __future__ import annotations

import math
import re
import signal
import sys
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from svftool.cli import app
from svftool.errors import MissingDependencyError, UsageError
from svftool.report.finetune import view
from svftool.report.training import ReportFile
from svftool.report.training.curve import save_curve
from svftool.tasks.base import TaskMetric
from svftool.training import Outcome, Run, summarise
from svftool.training.loop import Ending
from svftool.training.results import FinetuneResult, front, result_fields

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

AFTER = {"head": (0.61, 0.63, 0.62), "svf": (0.71, 0.74, 0.72), "<lora$>": (0.41, 0.47, 0.42)}
NAMES = {"accuracy": True, "perplexity": False}


def run(regime: str, seed: int, after: float, *, held_out: bool = True, **changes: Any) -> Run:
    """Return a run of 40 steps whose loss falls."""
    metric = changes.pop("metric", "accuracy")
    curves = {
        "loss": tuple((step, 2.0 * math.exp(-step / 20) + 0.1 * seed) for step in range(40)),
        "rate": tuple((step, 1.0 - step / 40) for step in range(40)),
    }
    if held_out:
        curves[f"held_out/{metric}"] = tuple((step, after - 1 / step) for step in range(4, 41, 4))
    made = Run(
        regime=regime,
        seed=seed,
        shots=5,
        facts={},
        before={metric: 0.52},
        after={metric: after},
        trainable_parameters=len(regime) * 1111,
        outcome=Outcome("finished", 40, 40, 2.0, 0.3, 3.0, 0.0123, curves),
        seconds=12.3,
        peak_memory_bytes=None,
        worse=False,
        setting={"classes": 3},
        learning_rates={"head": 1e-3, "singular_values": 2e-3 if regime == "svf" else 2e-5},
    )
    return replace(made, **changes)


def comparison(runs: list[Run] | None = None, metric: str = "accuracy") -> FinetuneResult:
    if runs is None:
        runs = [
            run(regime, seed, values[seed]) for seed in range(3) for regime, values in AFTER.items()
        ]
    summary = tuple(summarise(runs, TaskMetric(metric, NAMES[metric])))
    return FinetuneResult(Path("runs"), "classification", metric, tuple(runs), summary)


def written(result: FinetuneResult, path: Path) -> Path:
    file = ReportFile(path, force=False, apart=())
    file.check()
    file.write(result)
    assert sorted(path.parent.iterdir()) == [path]
    return path


def texts(markup: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", markup)


@pytest.fixture(scope="module")
def markup(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of three regimes with three seeds."""
    return written(comparison(), tmp_path_factory.mktemp("page") / "r.html").read_text()


def test_the_page_has_every_regime_in_figure_and_table(markup: str) -> None:
    drawn = texts(markup)
    table = markup[markup.index("<table") : markup.index("</table>")]
    for regime in ("head", "svf", "&lt;lora$&gt;"):
        assert regime in drawn
        assert f"<strong>{regime}</strong>" in table
    assert "<lora" not in markup
    assert {"training loss", "accuracy, % of held-out examples", "learning rate"} <= set(drawn)
    assert '<td class="r" data-l="trained">3,333</td>' in table
    # Mean and half the interval of Student's t with two degrees of freedom.
    spread = 4.302653 * float(np.std(AFTER["svf"], ddof=1)) / math.sqrt(3)
    assert f"72.3 ± {100 * spread:.1f}" in drawn
    assert "52.0 → 72.3" in table
    assert table.count("worse than before") == 1


def test_the_page_loads_nothing(markup: str) -> None:
    # Names of XML's vocabularies are no addresses to load from.
    loaded = re.sub(r'xmlns(:\w+)?="[^"]*"', "", markup)
    assert re.search(r"https?:", loaded) is None
    assert re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", loaded) is None
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', loaded))


def test_the_figure_of_the_page_follows_the_scheme(markup: str) -> None:
    drawing = markup[markup.index("<svg") : markup.index("</svg>")]
    assert "var(--ink)" in drawing
    assert re.search(r"#f{6}|#1d2127", drawing) is None


def test_a_figure_is_an_image_with_the_colours_of_the_regimes(tmp_path: Path) -> None:
    from svftool.report.training.figure import COLOURS

    with Image.open(written(comparison(), tmp_path / "r.png")) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert 1200 <= width <= 2400
    assert 500 <= height <= width
    for colour, expected in zip(COLOURS, (True, True, True, False), strict=False):
        rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert bool((pixels == rgb).all(1).sum() > 100) == expected


@pytest.mark.parametrize(("kind", "head"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_of_lines_are_the_same_bytes_again(tmp_path: Path, kind: str, head: bytes) -> None:
    result = comparison([run("svf", 0, 0.7, held_out=False)])
    first = written(result, tmp_path / "a" / f"r.{kind}").read_bytes()
    assert first.startswith(head)
    assert written(result, tmp_path / "b" / f"r.{kind}").read_bytes() == first


def test_every_seed_and_no_interrupted_run_is_a_dot() -> None:
    interrupted = run("svf", 3, 0.9)
    interrupted = replace(interrupted, outcome=replace(interrupted.outcome, ending="interrupted"))
    result = comparison([*comparison().runs, interrupted])
    assert [one.values for one in result.summary] == list(AFTER.values())


def test_one_run_without_held_out_examples_needs_no_interval(tmp_path: Path) -> None:
    drawn = texts(
        written(comparison([run("svf", 0, 0.7, held_out=False)]), tmp_path / "r.svg").read_text()
    )
    assert "accuracy, %" in drawn
    assert "70.0" in drawn
    assert not any("held-out" in text or "±" in text for text in drawn)


@pytest.mark.parametrize("ending", ["finished", "diverged", "interrupted"])
def test_runs_cut_short_are_drawn(tmp_path: Path, ending: Ending) -> None:
    short = run("svf", 1, 0.5)
    curves = {name: curve[:1] for name, curve in short.outcome.curves.items()}
    short = replace(short, outcome=replace(short.outcome, ending=ending, curves=curves))
    bare = replace(short, seed=2, outcome=replace(short.outcome, curves={}))
    result = replace(comparison([run("svf", 0, 0.7), short, bare]), interrupted=signal.SIGINT)
    markup = written(result, tmp_path / "r.html").read_text()
    assert "Interrupted" in markup
    assert ("diverged" in texts(markup)) == (ending == "diverged")
    assert written(comparison([bare]), tmp_path / "bare" / "r.png").stat().st_size > 5000


def test_values_that_are_not_finite_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    before = {"perplexity": math.inf}
    runs = [
        run("svf", seed, after, metric="perplexity", held_out=False, before=before)
        for seed, after in enumerate((12.5, math.inf))
    ]
    result = comparison(runs, "perplexity")
    assert result.summary[0].ci95 is None
    drawn = texts(written(result, tmp_path / "r.svg").read_text())
    assert "inf" in drawn
    assert "perplexity: mean and 95 % interval, dots are seeds" in drawn


def test_a_mean_over_folds_stands_for_the_folds(tmp_path: Path) -> None:
    runs = [
        run("svf", seed, 0.6 + 0.1 * fold + 0.01 * seed, shots=shots, facts={"fold": fold})
        for shots in (1, 5)
        for seed in range(2)
        for fold in range(2)
    ]
    result = replace(comparison(runs), task="few-shot-segmentation", setting={"select_on": "novel"})
    page = written(result, tmp_path / "r.html").read_text()
    assert "weights chosen on NOVEL classes" in page
    drawn = texts(page)
    assert {"1-shot, mean over folds", "5-shot, mean over folds"} <= set(drawn)
    assert not any("fold 0" in text for text in drawn)
    assert sum(text.startswith("65.5 ±") for text in drawn) == 2
    assert '<td data-l="task">1-shot, fold 0</td>' in page


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*\[report\]"):
        ReportFile(tmp_path / "r.png", force=False, apart=()).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r.gif", r"suffix '\.gif', expected \.html, \.png, \.svg, \.pdf"),
        ("r", "suffix '', expected"),
        ("old.html", "exists already.*--force"),
        ("folder.html", "exists already"),
        ("runs/r.html", "the report is inside .*runs, expected a place apart"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "old.html").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=message) as caught:
        ReportFile(tmp_path / name, force=False, apart=[tmp_path / "runs"]).check()
    assert "\n" not in str(caught.value)


def test_force_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "old.html"
    path.write_text("mine")
    file = ReportFile(path, force=True, apart=())
    file.check()
    file.write(comparison([run("svf", 0, 0.7, held_out=False)]))
    assert path.read_text().startswith("<!doctype html>")


def test_the_command_refuses_before_it_reads_anything(tmp_path: Path) -> None:
    factors = tmp_path / "factors"
    factors.mkdir()
    (factors / "svf_config.json").write_text("not read")
    output = str(tmp_path / "runs")
    command = ["finetune", str(factors), "-o", output, "--data", str(factors), "--report"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "r.jpeg")])
    assert result.exit_code == 2
    assert "suffix '.jpeg'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_perplexity_that_fell_is_a_gain() -> None:
    from svftool.report.finetune import document, view

    runs = [
        run("svf", seed, after, metric="perplexity", before={"perplexity": 41.35}, held_out=False)
        for seed, after in enumerate((40.0, 41.0))
    ]
    found = comparison(runs, "perplexity")
    (summary,) = document(found)["summary"]
    assert summary["gain"] == pytest.approx(0.85)
    assert not summary["higher_is_better"]
    assert [one["after"] for one in summary["by_seed"]] == [40.0, 41.0]
    shown = Console(width=80, file=StringIO())
    shown.print(view(found))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "+0.850" in text
    assert "svf: 40.000, 41.000 (seeds 0, 1)" in text
    (worse,) = document(comparison([replace(runs[0], after={"perplexity": 50.0})], "perplexity"))[
        "summary"
    ]
    assert worse["gain"] < 0


# The verdict over paired seeds


def _headline(ends: dict[str, tuple[float, ...]], metric: str = "accuracy") -> Any:
    from svftool.report.training.headline import headlines

    runs = [
        run(regime, seed, value, metric=metric)
        for regime, values in ends.items()
        for seed, value in enumerate(values)
    ]
    (found,) = headlines(comparison(runs, metric))
    return found


def test_a_headline_pairs_the_seeds() -> None:
    # Seeds differ by far more than regimes do: only paired is the difference told.
    found = _headline({"head": (0.50, 0.70, 0.90), "svf": (0.51, 0.71, 0.911)})
    spread = 4.302653 * float(np.std([0.01, 0.01, 0.011], ddof=1)) / math.sqrt(3)
    assert found.text == f"3 seeds: svf above head by 1.0 ± {100 * spread:.1f}"
    assert found.clear
    assert "ahead on 3 of 3 seeds" in found.facts
    assert found.warning == ""


@pytest.mark.parametrize(
    ("ends", "metric", "text", "clear"),
    [
        ({"a": (0.5, 0.6), "b": (0.9, 0.3)}, "accuracy", "2 seeds: b above a by .*chance", False),
        ({"a": (3.0, 3.1), "b": (9.0, 9.1)}, "perplexity", "2 seeds: a below b by 6.000", True),
        ({"a": (0.5, 0.6), "b": (0.5, 0.6)}, "accuracy", "2 seeds: . and . are level", False),
        ({"a": (0.5, 0.6)}, "accuracy", "2 seeds: a above its start by", False),
        ({"a": (math.nan, 3.0), "b": (4.0, 4.0)}, "perplexity", "cannot be compared", False),
        ({"a": (0.5, 0.6), "b": (0.7,)}, "accuracy", "1 seed: b above a by 20.0$", False),
    ],
)
def test_a_headline_says_no_more_than_it_knows(
    ends: dict[str, tuple[float, ...]], metric: str, text: str, clear: bool
) -> None:
    found = _headline(ends, metric)
    assert re.search(text, found.text) or re.match(text, found.text), found.text
    assert found.clear == clear
    assert ("One seed" in found.warning) == found.text.startswith("1 seed")


def test_each_number_of_shots_has_its_headline() -> None:
    from svftool.report.training.headline import headlines

    runs = [
        run(regime, seed, 0.5 + 0.1 * (regime == "svf") + 0.01 * fold, shots=shots,
            facts={"fold": fold})
        for regime in ("head", "svf") for shots in (1, 5) for seed in range(2) for fold in range(2)
    ]  # fmt: skip
    found = [one.text for one in headlines(comparison(runs))]
    assert found == [f"{n}-shot, 2 seeds: svf above head by 10.0 ± 0.0" for n in (1, 5)]


SIZES = {"head": 650, "svf": 1_920, "norm": 1_400, "lora:8": 46_240, "full": 270_000}
QUALITY = {"head": 0.61, "svf": 0.72, "norm": 0.58, "lora:8": 0.75, "full": 0.74}


def sized(seeds: int, *, metric: str = "accuracy", against: str | None = "lora:8") -> Any:
    sign = 1.0 if metric == "accuracy" else -1.0
    runs = [
        run(
            regime, seed, 0.5 + sign * (QUALITY[regime] - 0.5) + 0.01 * seed * (regime != "svf"),
            trainable_parameters=size, metric=metric,
        )
        for seed in range(seeds)
        for regime, size in SIZES.items()
    ]  # fmt: skip
    return replace(comparison(runs, metric), against=against)


def test_the_front_is_what_no_smaller_regime_beats() -> None:
    assert [one.regime for one in front(sized(2).summary)] == ["head", "svf", "lora:8"]
    lower = front(sized(2, metric="perplexity").summary)
    assert [one.regime for one in lower] == ["head", "svf", "lora:8"]
    level = [run("a", 0, 0.6, trainable_parameters=9), run("b", 0, 0.6, trainable_parameters=8)]
    assert [one.regime for one in front(comparison(level).summary)] == ["b"]


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1.0), ("perplexity", -1.0)])
def test_regimes_are_held_against_a_named_one(metric: str, sign: float) -> None:
    found = result_fields(sized(3, metric=metric))["against"]
    assert found["reference"] == "lora:8"
    (svf,) = [one for one in found["differences"] if one["regime"] == "svf"]
    # Seed after seed -0.03, -0.04, -0.05 where more is better.
    by_hand = [-0.03 - 0.01 * sign * seed for seed in range(3)]
    assert [one["gain"] for one in svf["by_seed"]] == pytest.approx(by_hand)
    assert svf["gain"] == pytest.approx(sum(by_hand) / 3)
    half = 4.302652729911275 * np.std(by_hand, ddof=1) / math.sqrt(3)
    assert svf["ci95"] == pytest.approx([svf["gain"] - half, svf["gain"] + half])
    assert (svf["wins"], svf["seeds"], svf["shots"]) == (0, 3, 5)
    assert {one["regime"] for one in found["differences"]} == set(SIZES) - {"lora:8"}
    assert result_fields(sized(3, against=None))["against"] is None


def shown(result: FinetuneResult) -> str:
    stream = StringIO()
    Console(file=stream, width=100).print(view(result))
    return stream.getvalue()


def test_the_table_says_wins_and_one_seed_has_no_interval() -> None:
    text = shown(sized(3))
    assert re.search(r"against lora:8 +gain +± 95 % +wins", text)
    assert re.search(r"svf +-4.0 +2.5 +0 of 3", text)
    one = shown(sized(1))
    assert re.search(r"svf +-3.0 +– +0 of 1", one)
    assert "one seed: no interval" in one
    assert "against" not in shown(sized(3, against=None))


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_has_every_regime_over_its_size(tmp_path: Path, seeds: int) -> None:
    file = ReportFile(tmp_path / "curve.svg", force=False, apart=(), curve=True)
    file.check()
    file.write(sized(seeds))
    markup = file.path.read_text()
    words = texts(markup)
    assert set(SIZES) <= set(words)
    assert "trained numbers beside the head" in words
    assert markup.count('id="PathCollection') == len(SIZES) - 1  # the head is a line
    note = "bars: 95 % interval" if seeds == 3 else "one seed: no intervals"
    assert any(note in word and "the front" in word for word in words)
    wrong = ReportFile(tmp_path / "curve.html", force=False, apart=(), curve=True)
    with pytest.raises(UsageError, match=r"'\.html', expected \.png, \.svg, \.pdf"):
        wrong.check()


def test_the_page_has_the_curve_and_the_differences(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    markup = written(sized(3), tmp_path / "a" / "page.html").read_text()
    assert 'aria-label="accuracy against trained numbers"' in markup
    assert "<h2>Against lora:8</h2>" in markup
    assert "0 of 3" in markup
    alone = comparison([run("svf", seed, 0.7) for seed in range(2)])
    assert "against trained numbers" not in written(alone, tmp_path / "b" / "one.html").read_text()


@pytest.mark.parametrize(("before", "line"), [(0.5, True), (0.1, False)])
def test_a_start_far_from_all_regimes_is_a_number_and_no_line(before: float, line: bool) -> None:
    runs = [
        replace(run(name, 0, after, trainable_parameters=size), before={"accuracy": before})
        for name, after, size in (("svf", 0.6, 1000), ("lora:8", 0.7, 9000))
    ]
    stream = BytesIO()
    save_curve(comparison(runs), stream, kind="svg")
    words = " ".join(texts(stream.getvalue().decode()))
    assert ("dashed: before training" in words) is line
    assert ("before training: 10" in words) is not line


def test_names_of_close_marks_do_not_meet() -> None:
    close = [
        run(name, 0, 0.6 + 0.001 * place, trainable_parameters=1000 + place)
        for place, name in enumerate(("svf", "entries:4x", "core:8", "rows"))
    ]
    stream = BytesIO()
    save_curve(comparison(close), stream, kind="svg")
    markup = stream.getvalue().decode()
    places = [
        tuple(map(float, found))
        for name in ("svf", "entries:4x", "core:8", "rows")
        for found in re.findall(rf"translate\(([\d.]+) ([\d.]+)\)[^>]*>{name}</text>", markup)
    ]
    if not places:  # written by x and y
        places = [
            tuple(map(float, found))
            for name in ("svf", "entries:4x", "core:8", "rows")
            for found in re.findall(rf'x="([\d.]+)" y="([\d.]+)"[^>]*>{name}</text>', markup)
        ]
    assert len(places) == 4
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[:index]:
            assert abs(x - other_x) > 10 or abs(y - other_y) > 6
