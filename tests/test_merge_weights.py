"""Weights of a merge by data: the search, the guard, the command on small networks."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import write_model, write_texts
from pictures import write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli_predict import PIXELS
from typer.testing import CliRunner

from svftool import (
    CombineOptions,
    DataError,
    NumericalError,
    ResourceError,
    UsageError,
    WeightsFrom,
    combine,
    decompose,
    evaluate,
    open_checkpoint,
    open_factors,
)
from svftool.choices.merging import METHODS
from svftool.cli import app
from svftool.factors import write_tuned
from svftool.factors.stated import Support, read_stated
from svftool.merging.weights import (
    Parts,
    WeightTrial,
    choose_trial,
    lowest_of,
    search_weights,
)
from svftool.progress import SILENT
from svftool.report.weights import weights_sentences
from svftool.stages import merge_trials
from svftool.tasks.options import TASKS

# The search and the choice, in numbers.


def bowl(*lowest: float, parts: int = 4) -> tuple[Any, list[tuple[float, ...]]]:
    """Return a loss that is lowest at given factors, and a list of what was asked."""
    asked: list[tuple[float, ...]] = []

    def score(factors: tuple[float, ...]) -> list[float]:
        asked.append(factors)
        return [sum((a - b) ** 2 for a, b in zip(factors, lowest, strict=True)) + 1.0] * parts

    return score, asked


@pytest.mark.parametrize("lowest", [(1.0, 0.0), (0.25, 0.25), (1.5, 0.5, 0.0), (0.5,), (1.0, 1.0)])
def test_the_search_comes_near_the_lowest_loss(lowest: tuple[float, ...]) -> None:
    score, asked = bowl(*lowest)
    parts = Parts((1.0,) * 4)
    tried = search_weights(score, [1.0] * len(lowest), parts, 60)
    found = lowest_of(tried, parts).factors
    assert found == pytest.approx(lowest, abs=0.13)
    assert asked[0] == (1.0,) * len(lowest)
    assert len(set(asked)) == len(asked) == len(tried) <= 60


@pytest.mark.parametrize("trials", [2, 3, 7])
def test_the_budget_is_kept(trials: int) -> None:
    score, asked = bowl(0.1, 0.2, 0.3)
    search_weights(score, [1.0] * 3, Parts((1.0,) * 4), trials)
    assert len(asked) == trials


def test_an_input_of_weight_zero_is_not_tried() -> None:
    score, asked = bowl(0.0, 0.0)
    search_weights(score, [1.0, 0.0], Parts((1.0,) * 4), 30)
    assert all(one[1] == 1.0 for one in asked)
    assert min(asked)[0] == 0.0


@pytest.mark.parametrize(("start", "largest"), [(1.0, 1.5), (0.2, 1.5), (-0.2, -1.5), (3.0, 3.0)])
def test_no_weight_grows_without_end(start: float, largest: float) -> None:
    """A loss that falls for as long as the weights grow."""
    found = search_weights(lambda f: [1.0 / sum(f)], [start, start], Parts((1.0,)), 200)
    weights = [start * one for one in min(found, key=lambda one: one.losses[0]).factors]
    assert weights == pytest.approx([largest] * 2)


def test_equal_losses_leave_the_weights_nearest_to_the_start() -> None:
    parts = Parts((1.0, 1.0))
    tried = [
        WeightTrial(one, losses)
        for one, losses in (
            ((1.0, 1.0), (1.0, 1.0)),
            ((0.0, 1.0), (0.4, 0.6)),
            ((0.5, 1.0), (0.5, 0.5 + 1e-4)),
        )
    ]
    assert lowest_of(tried, parts).factors == (0.5, 1.0)
    assert lowest_of(tried[:1] * 2, parts) is tried[0]


def test_a_gain_on_what_had_no_say_takes_the_place_of_the_start() -> None:
    random.seed(0)
    start = tuple(random.gauss(1.0, 0.3) for _ in range(20))
    better = tuple(one - 0.3 + random.gauss(0.0, 0.1) for one in start)
    tried = [WeightTrial((1.0,), start), WeightTrial((0.5,), better)]
    found = choose_trial(tried, Parts((1.0,) * 20))
    assert found.chosen is tried[1]
    assert found.gain.mean == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(("worse", "at_most"), [(0.0, 0.35), (0.1, 0.12)])
def test_noise_does_not_take_the_place_of_the_start(worse: float, at_most: float) -> None:
    """Eleven weights of which none is better, on 16 examples: one of them always looks so."""
    moved, looks_better, draws = 0, 0, 200
    for seed in range(draws):
        draw = random.Random(seed)
        start = tuple(draw.gauss(1.0, 0.5) for _ in range(16))
        tried = [WeightTrial((1.0,), start)]
        for number in range(11):
            losses = tuple(one + worse + draw.gauss(0.0, 0.3) for one in start)
            tried.append(WeightTrial((1.25 + number / 4,), losses))
        found = choose_trial(tried, Parts((1.0,) * 16))
        moved += found.chosen is not tried[0]
        looks_better += found.best is not tried[0]
    assert looks_better > 0.35 * draws
    assert moved < at_most * draws


def test_one_example_that_decides_alone_does_not_move_the_weights() -> None:
    losses = (0.0, *(1.05,) * 9)  # far lower for one example, and higher for all others
    tried = [WeightTrial((1.0,), (1.0,) * 10), WeightTrial((2.0,), losses)]
    found = choose_trial(tried, Parts((1.0,) * 10))
    assert found.best is tried[1]
    assert found.chosen is tried[0]


def test_the_error_is_that_of_paired_differences_by_size() -> None:
    gain = Parts((1.0, 1.0, 1.0, 1.0)).gain([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 2.0, 2.0])
    changes = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert gain.mean == pytest.approx(float(changes.mean()))
    assert gain.error == pytest.approx(float(changes.std() / 2))
    heavy = Parts((3.0, 1.0)).gain([2.0, 2.0], [1.0, 1.0 + 1.0])
    assert heavy.mean == pytest.approx(0.75)
    impossible = Parts((1.0, 1.0)).gain([1.0, 1.0], [math.inf, math.inf])
    assert impossible.mean == -math.inf
    assert math.isnan(impossible.error)


# On a network that sees mean colours.

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=False)
        self.spare = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, 3)

    def forward(self, images):
        return self.fc(self.norm(self.mix(images.mean((2, 3)))))

def net():
    return Net()
"""
ORDER = torch.eye(3).flip(0)  # classes are blue, green, red; channels red, green, blue


class Bench:
    """A base that knows the colours a little, and inputs that help, harm, or do nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(NET)
        self.data = write_pictures(folder / "data", count=4)
        g = torch.Generator().manual_seed(0)
        self.base = {
            "mix.weight": 0.3 * torch.eye(3) + 0.05 * torch.randn(3, 3, generator=g),
            "spare.weight": torch.eye(3),
            "norm.weight": torch.ones(3),
            "norm.bias": torch.zeros(3),
            "norm.running_mean": torch.zeros(3),
            "norm.running_var": torch.ones(3),
            "norm.num_batches_tracked": torch.tensor(1),
            "fc.weight": ORDER.clone(),
            "fc.bias": torch.zeros(3),
        }
        self.save("base", {})
        self.save("help", {"mix.weight": 1.5 * torch.eye(3)})
        self.save("harm", {"mix.weight": 1.5 * torch.eye(3).roll(1, 0)})
        self.save("idle", {"spare.weight": torch.ones(3, 3)})

    def save(self, name: str, changes: dict[str, torch.Tensor]) -> Path:
        state = {n: v + changes[n] if n in changes else v for n, v in self.base.items()}
        save_file(state, self.folder / f"{name}.safetensors", {"format": "pt"})
        return self.folder / f"{name}.safetensors"

    def weights(self, **more: Any) -> WeightsFrom:
        given = {"data": self.data, "task": "classification", "device": "cpu", **more}
        return WeightsFrom(model=f"{self.folder}/net.py:net", **given)

    def merge(self, inputs: Sequence[Any], name: str = "out", **options: Any) -> Any:
        options.setdefault("weights", self.weights())
        resume = options.pop("resume", False)
        return combine(
            self.folder / "base.safetensors",
            [self.path(one) for one in inputs],
            output=self.folder / f"{name}.safetensors",
            options=CombineOptions(other_base=True, **options),
            resume=resume,
        )

    def path(self, one: Any) -> Any:
        name, _, weight = one.partition("@")
        return self.folder / f"{name}.safetensors", float(weight or 1.0)

    def measured(self, name: str) -> dict[str, float]:
        found = evaluate(
            self.folder / f"{name}.safetensors", data=self.data, device="cpu",
            model=f"{self.folder}/net.py:net",
        )  # fmt: skip
        return dict(found.runs[0].metrics)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("method", ["linear", "tsv", "ties:density=1"])
def test_what_helps_gets_more_weight_than_what_harms(bench: Bench, method: str) -> None:
    result = bench.merge(["harm", "help"], method=method)
    found = result.weights
    harm, good = found.chosen.weights
    assert good > harm
    assert not found.kept
    assert found.chosen.loss < found.start.loss
    assert found.gain.mean > found.gain.error
    assert [one.weight for one in result.inputs] == [harm, good]
    # What is said of a trial is what the file gives.
    measured = bench.measured("out")
    assert measured["loss"] == pytest.approx(found.chosen.loss, rel=1e-5)
    assert measured["accuracy"] == pytest.approx(found.chosen.metric)
    plain = bench.merge([f"harm@{harm}", f"help@{good}"], "plain", method=method, weights=None)
    again, one = load_file(plain.output), load_file(result.output)
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_without_an_input_the_loss_rises_or_falls(bench: Bench) -> None:
    # Two trials alone cannot leave out what harms.
    found = bench.merge(["harm", "help", "idle"], weights=bench.weights(trials=2)).weights
    harm, good, idle = found.without
    assert good.mean > 3 * good.error > 0
    assert harm.mean < -3 * harm.error
    assert idle.mean == pytest.approx(0.0, abs=1e-7)
    left = found.chosen.weights
    bench.merge([f"harm@{left[0]}", f"idle@{left[2]}"], "left", weights=None)
    rise = bench.measured("left")["loss"] - found.chosen.loss
    assert good.mean == pytest.approx(rise, rel=1e-4)


def test_the_start_stays_where_nothing_is_gained(bench: Bench) -> None:
    result = bench.merge(["idle@0.7", "help@0"])
    found = result.weights
    assert found.kept
    assert found.chosen.weights == found.start.weights == (0.7, 0.0)
    assert found.without[1] is None
    assert found.gain.mean == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(
        load_file(result.output)["spare.weight"], torch.eye(3) + 0.7, rtol=1e-6, atol=1e-6
    )


def test_a_lower_loss_with_a_worse_metric_is_not_taken(bench: Bench, monkeypatch) -> None:
    """Measured the other way round, whatever is better by its loss is worse by its metric."""
    real = merge_trials.TrialModel.metric
    monkeypatch.setattr(merge_trials.TrialModel, "metric", lambda self: -self.losses()[0][0])
    assert not bench.merge(["harm", "help"], "taken").weights.kept
    monkeypatch.setattr(merge_trials.TrialModel, "metric", lambda self: self.losses()[0][0])
    result = bench.merge(["harm", "help"])
    found = result.weights
    assert found.kept
    assert found.worse
    assert found.best.metric < found.start.metric == found.chosen.metric
    assert [one.weight for one in result.inputs] == [1.0, 1.0]
    assert "but their accuracy" in weights_sentences(found)[-1]
    monkeypatch.setattr(merge_trials.TrialModel, "metric", real)


def test_the_order_of_the_inputs_does_not_matter(bench: Bench) -> None:
    names = ["harm", "help@0.5", "idle"]
    more = {"method": "tsv", "weights": bench.weights(trials=6)}
    one = bench.merge(names, "one", **more).weights
    two = bench.merge([names[2], names[0], names[1]], "two", **more).weights
    again = [two.chosen.weights[place] for place in (1, 2, 0)]
    assert tuple(again) == one.chosen.weights
    assert [one.loss for one in two.tried] == [one.loss for one in one.tried]
    assert [two.without[place] for place in (1, 2, 0)] == list(one.without)


def test_the_start_is_the_weights_given_and_among_the_tried(bench: Bench) -> None:
    found = bench.merge(["harm@0.25", "help@-0.5"], weights=bench.weights(trials=5)).weights
    assert found.start.weights == (0.25, -0.5)
    assert found.tried[0].weights == found.start.weights
    assert len(found.tried) == 5
    assert all(one.weights[1] <= 0.0 for one in found.tried)
    bench.merge(["harm@0.25", "help@-0.5"], "start", weights=None)
    measured = bench.measured("start")
    assert measured["loss"] == pytest.approx(found.start.loss, rel=1e-5)
    assert measured["accuracy"] == pytest.approx(found.start.metric)


_watched: list[Path] | None = None


def _watch(event: str, about: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(about[0], (str, bytes, Path)):
        _watched.append(Path(about[0].decode() if isinstance(about[0], bytes) else about[0]))


sys.addaudithook(_watch)


def test_nothing_is_read_but_the_examples(bench: Bench, monkeypatch) -> None:
    test = write_pictures(bench.folder / "test", count=2)
    seen: list[Path] = []
    monkeypatch.setattr(sys.modules[__name__], "_watched", seen)
    bench.merge(["harm", "help"], weights=bench.weights(trials=3))
    monkeypatch.setattr(sys.modules[__name__], "_watched", None)
    pictures = {path for path in seen if path.suffix == ".png"}
    assert pictures == set(bench.data.rglob("*.png"))
    assert not any(path.is_relative_to(test) for path in seen)


def test_the_file_says_where_its_weights_are_from(bench: Bench, recwarn) -> None:
    result = bench.merge(["harm", "help"])
    with open_checkpoint(result.output) as file:
        stated = read_stated(file.metadata)
    assert stated is not None
    merged = stated.training["merged"]
    assert [one["weight"] for one in merged["inputs"]] == list(result.weights.chosen.weights)
    facts = merged["weights_from"]
    assert (facts["task"], facts["examples"]) == ("classification", 12)
    assert facts["sha256"] == result.weights.support.sha256
    # Who measures on the examples is told.
    found = evaluate(
        result.output, data=bench.data, device="cpu", model=f"{bench.folder}/net.py:net"
    )
    assert found.seen == 12
    other = write_pictures(bench.folder / "test", count=2, seed=9)
    found = evaluate(result.output, data=other, device="cpu", model=f"{bench.folder}/net.py:net")
    assert found.seen == 0


def test_heads_are_weighted_too(bench: Bench) -> None:
    """The base has no such head: the mean of the inputs' is taken, by their weights."""
    names = ("fc.weight", "fc.bias")
    heads = {"good": ORDER, "bad": ORDER + 1.5 * ORDER.roll(1, 0)}
    for name, head in heads.items():
        own = {**bench.base, "fc.weight": head.clone()}
        save_file(own, bench.folder / f"{name}.safetensors", {"format": "pt"})
    bare = {name: value for name, value in bench.base.items() if name not in names}
    save_file(bare, bench.folder / "base.safetensors", {"format": "pt"})
    result = bench.merge(["bad", "good"])
    bad, good = result.weights.chosen.weights
    assert good > bad
    assert set(result.heads.values()) == {"mean"}
    expected = (good * heads["good"] + bad * heads["bad"]) / (good + bad)
    torch.testing.assert_close(load_file(result.output)["fc.weight"], expected)
    assert bench.measured("out")["loss"] == pytest.approx(result.weights.chosen.loss, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_weights_mean_something_to_every_method(bench: Bench, method: str) -> None:
    """No method need be refused: another weight of an input is another result."""
    g = torch.Generator().manual_seed(3)
    for name in ("a", "b"):
        shared = torch.randn(3, 3, generator=g) + torch.eye(3)
        bench.save(name, {"mix.weight": shared, "spare.weight": shared.T})
    found = []
    for weight in (1.0, 0.5):
        given = f"{method}:density=0.9" if method.startswith("dare") else method
        result = bench.merge([f"a@{weight}", "b"], f"w{weight}", method=given, weights=None)
        found.append(load_file(result.output))
    assert not torch.allclose(found[0]["mix.weight"], found[1]["mix.weight"])


def test_an_input_of_weight_zero_is_no_part_of_a_mean(bench: Bench) -> None:
    bench.save("one", {"norm.weight": torch.ones(3)})
    bench.save("two", {"norm.weight": 3 * torch.ones(3), "spare.weight": torch.ones(3, 3)})
    result = bench.merge(["one", "two@0"], method="tsv", weights=None)
    found = load_file(result.output)
    assert found["norm.weight"].tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(found["spare.weight"], torch.eye(3))


def test_an_interrupted_search_goes_on_where_it_was(bench: Bench, monkeypatch) -> None:
    whole = bench.merge(["harm", "help"], "whole").weights
    real, measured = merge_trials.TrialModel.load, []

    def counting(self, weights):
        measured.append(tuple(weights))
        if len(measured) == stop:
            raise ResourceError("cut off")
        real(self, weights)

    monkeypatch.setattr(merge_trials.TrialModel, "load", counting)
    stop = 5
    with pytest.raises(ResourceError):
        bench.merge(["harm", "help"])
    first = measured[:-1]
    measured.clear()
    stop = 0
    with pytest.raises(UsageError, match="another trials 12, now 9"):
        bench.merge(["harm", "help"], resume=True, weights=bench.weights(trials=9))
    again = bench.merge(["harm", "help"], resume=True).weights
    assert again == whole
    assert not set(first) & set(measured[:-1])  # the last one measures the metric
    assert not [one for one in bench.folder.iterdir() if "partial" in one.name]


class Told:
    """Keeps what the user is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(SILENT, name)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_tuned_files_are_weighed_and_examples_of_their_training_named(bench: Bench) -> None:
    base = bench.folder / "base.safetensors"
    factors = decompose(base, bench.folder / "factors").output
    seen = sorted(bench.data.rglob("*.png"))[:5]
    training = {"support": Support.of(one.read_bytes() for one in seen).to_plain()}
    inputs = []
    with open_factors(factors) as store:
        for name, factor in (("more", 3.0), ("less", -1.0)):
            inputs.append(bench.folder / f"{name}.svf.safetensors")
            S = {"mix.weight": factor * store.read_S("mix.weight")}
            write_tuned(
                inputs[-1], store=store, S=S, whole={}, task="classification",
                classes=("blue", "green", "red"), training=training if name == "more" else {},
            )  # fmt: skip
    told = Told()
    result = combine(
        factors, inputs, output=bench.folder / "out.safetensors", progress=told,
        options=CombineOptions(weights=bench.weights(trials=8)),
    )  # fmt: skip
    more, less = result.weights.chosen.weights
    assert more > less
    assert [one for one in told.warnings if "5 of 12 examples were trained on" in one]
    with open_checkpoint(result.output) as file:
        stated = read_stated(file.metadata)
    assert stated is not None
    assert stated.classes == ("blue", "green", "red")
    assert stated.support is not None
    assert stated.support.examples == 5 + 12
    assert bench.measured("out")["loss"] == pytest.approx(result.weights.chosen.loss, rel=1e-5)


def test_weights_that_overflow_are_passed_over(bench: Bench) -> None:
    """Half as much again leaves float16; the search goes on without these weights."""
    half = {n: v.half() if v.is_floating_point() else v for n, v in bench.base.items()}
    for name, by in (("base", 0.0), ("big", 50000.0)):
        state = {**half, "spare.weight": half["spare.weight"] + by}
        save_file(state, bench.folder / f"{name}.safetensors", {"format": "pt"})
    found = bench.merge(["big"], weights=bench.weights(trials=4)).weights
    lost = [one for one in found.tried if math.isinf(one.loss)]
    assert lost
    assert all(one.weights[0] > 1.3 for one in lost)
    assert found.kept
    with pytest.raises(NumericalError, match="overflow float16"):
        bench.merge(["big@3"], "o2")


def test_a_language_model_is_weighed_by_its_loss(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for seed in (1, 2):
        other = tmp_path / f"t{seed}"
        other.mkdir()
        g = torch.Generator().manual_seed(seed)
        noise = 2.0 * torch.randn(state[name].shape, generator=g)
        save_file({**state, name: state[name] + noise}, other / "model.safetensors")
    texts = [{"text": one} for one in ("abc abc", "ab. ab.")]

    def weighed(rows: list[Any]) -> Any:
        data = write_texts(tmp_path / "t.jsonl", rows)
        how = WeightsFrom(data=data, task="language", device="cpu", trials=6)
        options = CombineOptions(other_base=True, weights=how)
        inputs = [tmp_path / "t1", tmp_path / "t2"]
        return combine(base, inputs, output=tmp_path / "out", options=options).weights

    with pytest.raises(DataError, match="1 example, expected 2 or more"):
        weighed(texts[:1])
    found = weighed(texts)
    assert found.metric == "perplexity"
    assert found.chosen.metric == pytest.approx(math.exp(found.chosen.loss), rel=1e-4)
    assert found.best.loss <= found.start.loss
    assert len({round(one.loss, 6) for one in found.tried}) > 2


def test_segmentation_is_weighed_by_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(PIXELS)
    scope: dict[str, Any] = {}
    exec(compile(PIXELS, "net.py", "exec"), scope)
    base = scope["pixels"]().state_dict()
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    for seed, path in enumerate(paths):
        g = torch.Generator().manual_seed(seed)
        by = 0.1 * min(seed, 1)
        save_file({n: v + by * torch.randn(v.shape, generator=g) for n, v in base.items()}, path)
    chance = np.random.default_rng(0)
    for kind, top, shape in (("images", 255, (16, 16, 3)), ("masks", 2, (16, 16))):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for index in range(4):
            values = chance.integers(0, top, shape, dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "data" / kind / f"{index}.png")
    network = {"task": "segmentation", "model": f"{tmp_path}/net.py:pixels", "device": "cpu"}
    how = WeightsFrom(data=tmp_path / "data", trials=3, **network)
    result = combine(
        paths[0], paths[1:], output=tmp_path / "out.safetensors",
        options=CombineOptions(weights=how),
    )  # fmt: skip
    found = result.weights
    measured = evaluate(result.output, data=tmp_path / "data", **network).runs[0].metrics
    assert found.chosen.metric == pytest.approx(measured["miou"])
    assert found.chosen.loss == pytest.approx(measured["loss"], rel=1e-5)
    assert found.parts == 4


# The command.


def run(*words: object) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


def words(bench: Bench, *more: object) -> list[object]:
    inputs = [bench.folder / f"{name}.safetensors" for name in ("base", "harm", "help")]
    named = ["--method", "linear", "--allow-other-base", "--model", f"{bench.folder}/net.py:net"]
    return ["merge", *inputs, "-o", bench.folder / "o.safetensors", *named, *more]


def test_document_table_and_page(bench: Bench) -> None:
    page = bench.folder / "p.html"
    given = ["--weights-from", bench.data, "--task", "classification", "--weight-trials", 6]
    found = run(*words(bench, *given, "--json", "--html", page, "-q", "--image-size", 16))
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    weights = document["weights"]
    assert weights["examples"] == 12
    assert len(weights["tried"]) == 6
    assert weights["kept"] is False
    assert weights["chosen"]["weights"] == [one["weight"] for one in document["inputs"]]
    assert len(weights["without"]) == 2
    assert "brings" in page.read_text()
    shown = run(*words(bench, *given, "--force", "-q")).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "start" in shown
    assert "weights chosen by 12 examples" in shown
    assert "6 weights tried; on examples left out the loss is lower" in " ".join(shown.split())
    none = bench.merge(["harm"], "none", method="linear")
    assert "the base alone is best" in weights_sentences(none.weights)[1]
    kept = weights_sentences(bench.merge(["idle"], "kept").weights)
    assert kept[0].startswith("weights kept by 12 examples")
    assert kept[1].endswith("weights tried, none better")


def refused(found: Any, code: int, said: str, bench: Bench) -> None:
    assert found.exit_code == code, found.stderr
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""
    assert not [one for one in bench.folder.iterdir() if one.name.startswith((".o", "o."))]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--weights-from", "data"], 2, "no --task, expected one of classification"),
        (["--weights-from", "data", "--task", "few-shot-segmentation"], 2, "more than what is"),
        (["--weights-from", "nowhere", "--task", "classification"], 6, "no such file or folder"),
        (
            ["--weights-from", "data", "--task", "classification", "--weight-trials", "1"],
            2, "expected 2 or more",
        ),
        (["--weights-from", "data", "--task", "classification", "--max-length", "5"], 2,
         "--max-length has no meaning for --task classification"),
        (["--task", "classification"], 2, "--task: an option of --weights-from"),
        (["--image-size", "16"], 2, "--image-size: an option of --weights-from"),
        (["--weights-from", "data", "--task", "classification", "--device", "tpu"], 2, "--device"),
    ],
)  # fmt: skip
def test_options_are_refused_in_one_line(
    bench: Bench, more: list[str], code: int, said: str, monkeypatch
) -> None:
    monkeypatch.chdir(bench.folder)
    given = [one for one in words(bench) if one != "--model" and "net.py" not in str(one)]
    refused(run(*given, *more, "-q"), code, said, bench)


def test_it_is_an_option_of_a_method(bench: Bench) -> None:
    found = run("merge", bench.folder / "base.safetensors", bench.folder / "help.safetensors",
                "-o", bench.folder / "o.safetensors", "--weights-from", bench.data)  # fmt: skip
    refused(found, 2, "--weights-from: an option of a merge with --method", bench)


def test_data_are_refused_before_anything_is_merged(bench: Bench, monkeypatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("merged")

    monkeypatch.setattr(merge_trials, "write_dense", never)
    given = ["--task", "classification", "-q", "--weights-from"]
    empty = bench.folder / "empty"
    empty.mkdir()
    refused(run(*words(bench, *given, empty)), 6, f"{empty}", bench)
    one = write_pictures(bench.folder / "one", classes=("red",), count=1)
    refused(run(*words(bench, *given, one)), 6, "1 class, expected two or more", bench)
    names = bench.folder / "classes.txt"
    names.write_text("cat\ndog\nred\n")
    found = run(*words(bench, *given, bench.data, "--classes", names))
    refused(found, 6, "blue", bench)


def test_classes_that_the_head_does_not_have_are_refused(bench: Bench) -> None:
    (bench.data / "grey").mkdir()
    (bench.data / "red" / "00.png").rename(bench.data / "grey" / "00.png")
    given = ["--task", "classification", "-q", "--weights-from", bench.data]
    refused(run(*words(bench, *given)), 7, "no head for the data's 4 classes", bench)


def test_a_network_that_the_weights_do_not_fit_is_refused(bench: Bench) -> None:
    (bench.folder / "net.py").write_text(NET.replace("self.spare", "self.other"))
    given = ["--task", "classification", "-q", "--weights-from", bench.data]
    found = run(*words(bench, *given))
    refused(found, 7, "o.safetensors: does not fit Net; tensors 1 missing: other.weight", bench)
    assert ".scratch" not in found.stderr


def test_the_output_may_not_lie_in_the_examples(bench: Bench) -> None:
    found = run(
        *words(bench, "--task", "classification", "--weights-from", bench.data)[:5],
        bench.data / "o.safetensors",
        *words(bench, "--task", "classification", "--weights-from", bench.data)[6:],
    )
    assert found.exit_code == 2
    assert "inside the input" in found.stderr


def test_the_help_shows_options_of_tasks_on_request() -> None:
    def flags(*more: str) -> set[str]:
        rows = [row.strip() for row in run("merge", *more).stdout.splitlines()]
        return {word.rstrip(",") for row in rows for word in row.split()[:2] if word[:2] == "--"}

    few, every = flags("--help"), flags("--help-all")
    assert {"--weights-from", "--task", "--weight-trials", "--method", "--dry-run"} <= few
    assert {"--image-size", "--max-length", "--masks"} <= every - few
    own = {f"--{one.name.replace('_', '-')}" for kind in TASKS.values() for one in fields(kind)}
    assert every - few <= own | {"--mean", "--std", "--classes", "--head"}
    assert not {"--shots", "--eval", "--fold"} & every
