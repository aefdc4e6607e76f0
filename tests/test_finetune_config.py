"""`finetune --config`: options from a file, and the file that repeats a run."""

from __future__ import annotations

import json
import math
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pictures import write_pictures
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from svftool import UsageError
from svftool.cli import app
from svftool.files.toml import to_toml
from svftool.stages.configuration import Configuration, check_beside, file_beside
from svftool.training import Settings

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
"""


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(compile(MODEL, "net.py", "exec"), scope)
    model: nn.Module = scope["net"]()
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    made = run("decompose", tmp_path / "base.safetensors", "-o", tmp_path / "factors", "-q")
    assert made.exit_code == 0, made.stderr
    write_pictures(tmp_path / "data", count=4)
    return tmp_path


def config(work: Path, text: str) -> Path:
    place = work / "given.toml"
    place.write_text(text)
    return place


BASIC = 'factors = "factors"\ndata = "data"\nmodel = "net.py:net"\nshots = 2\nsteps = 2\n'


@pytest.mark.parametrize(
    "value",
    [
        "", "plain", 'a "quoted" one', "back\\slash\\", "tab\tnew\nline\r\x00\x1f\x7f", "″ é 𝄞",
        "#no comment", "'", True, False, 0, -7, 1 << 40, 0.1, -1e-9, 1e300, 3.0, 1e16,
        math.inf, -math.inf, [], [1, 2], ["a", 'b"'], [0.5, 1.0], [True], [[1], ["x"]],
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(value: Any) -> None:
    document = {"flat": value, "a b": value, "table": {"x.y": value, "in": {"n": value}}}
    found = tomllib.loads(to_toml(document))
    assert found == document
    assert type(found["flat"]) is type(value)


def test_what_no_toml_holds_is_refused() -> None:
    assert math.isnan(tomllib.loads(to_toml({"a": math.nan}))["a"])
    with pytest.raises(UnicodeEncodeError):
        to_toml({"a": "\ud800"})
    with pytest.raises(TypeError):
        to_toml({"a": None})


def test_a_run_is_repeated_from_its_file(work: Path) -> None:
    (work / "set one").mkdir()
    flags = ["--data", work / "data", "--model", f"{work / 'net.py'}:net", "--shots", 2]
    flags += ["--steps", 3, "--seed", 1, "--lr", 0.01, "--augment", "none", "--head", "new"]
    first = work / "set one" / "a.svf.safetensors"
    done = run("finetune", work / "factors", "-o", first, *flags, "--mean", 0.5, 0.4, 0.3)
    assert done.exit_code == 0, done.stderr
    beside = work / "set one" / "a.run.toml"
    again = run("finetune", "--config", beside, "-o", work / "b.svf.safetensors")
    assert again.exit_code == 0, again.stderr
    assert (work / "b.svf.safetensors").read_bytes() == first.read_bytes()
    written = tomllib.loads(beside.read_text())
    assert written["data"] == "../data"
    assert written["model"] == "../net.py:net"
    assert written["classification"]["mean"] == [0.5, 0.4, 0.3]
    # Every option is there, whether it was given or not.
    assert written["batch-size"] == 16
    assert written["classification"]["sampling"] == "uniform"
    # A copy of the file beside another output says the same, but for where things are.
    other = tomllib.loads((work / "b.run.toml").read_text())
    assert {**other, "data": "", "factors": "", "model": ""} == {
        **written, "data": "", "factors": "", "model": "",
    }  # fmt: skip


def test_a_folder_of_runs_holds_its_file_and_flags_go_before_it(work: Path) -> None:
    text = BASIC + 'regime = ["head", "svf"]\n[classification]\naugment = "none"\n'
    text += '[language]\ntokenizer = "nowhere"\n'
    place = config(work, text)
    done = run("finetune", "--config", place, "-o", work / "runs", "--epochs", 1, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    written = tomllib.loads((work / "runs" / "run.toml").read_text())
    assert (written["epochs"], written["seed"], written["regime"]) == (1.0, 3, ["head", "svf"])
    assert "steps" not in written
    assert written["factors"] == "../factors"
    again = run("finetune", "--config", work / "runs" / "run.toml", "-o", work / "again")
    assert again.exit_code == 0, again.stderr
    one, other = (work / name / "run.toml" for name in ("runs", "again"))
    assert one.read_bytes() == other.read_bytes()
    name = "svf-seed3.svf.safetensors"
    assert (work / "runs" / name).read_bytes() == (work / "again" / name).read_bytes()


def test_what_trainers_expect_goes_through_the_file_and_back(work: Path) -> None:
    given = {
        "lr": ["svf=1e-2", 1e-3], "accumulate": 2, "batch-size": 2, "warmup": 2, "clip-grad": 0,
        "label-smoothing": 0.1, "hold-out": 0.5, "patience": 3, "dtype": "bfloat16", "workers": 1,
        "regime": ["svf", "bias"], "against": "bias",
    }  # fmt: skip
    place = config(work, BASIC + to_toml(given))
    pictures = ["--plot", work / "curve.svg"]
    done = run("finetune", "--config", place, "-o", work / "runs", *pictures, "--json")
    assert done.exit_code == 0, done.stderr
    assert "memory: svf needs about 0.00 GiB" in done.stderr
    found = json.loads(done.stdout)
    assert [one["learning_rates"].popitem()[1] for one in found["runs"]] == [1e-2, 1e-3]
    assert [one["regime"] for one in found["against"]["differences"]] == ["svf"]
    assert found["against"]["differences"][0]["ci95"] is None
    assert (work / "curve.svg").read_text().startswith("<?xml")
    written = tomllib.loads((work / "runs" / "run.toml").read_text())
    expected = {**given, "lr": "0.001,svf=0.01", "regime": ["svf", "bias"]}
    assert {name: written.get(name) for name in expected if name != "hold-out"} == {
        name: value for name, value in expected.items() if name != "hold-out"
    }
    again = run("finetune", "--config", work / "runs" / "run.toml", "-o", work / "again")
    assert again.exit_code == 0, again.stderr
    for name in ("run.toml", "svf-seed0.svf.safetensors"):
        assert (work / "runs" / name).read_bytes() == (work / "again" / name).read_bytes()


WRONG = {
    "batchsize = 4": "batchsize is no option. Did you mean batch-size?",
    "zzz = 4": "zzz is no option. See --help-all",
    "batch-size = '4'": "batch-size is '4', expected a whole number",
    "batch-size = true": "batch-size is True, expected a whole number",
    "batch-size = 4.5": "batch-size is 4.5, expected a whole number",
    "lr = 'fast'": "lr: --lr 'fast', expected a number",
    "head-lr = 'fast'": "head-lr is 'fast', expected a number",
    "tune-lr = 1": "tune-lr is 1, expected true or false",
    "data = 3": "data is 3, expected a text",
    "optimizer = 'adam'": "optimizer is 'adam', expected one of adamw, sgd. Did you mean",
    "seeds = 0": "seeds is 0, expected at least 1",
    "regime = [true]": "regime is True, expected a text",
    "mean = [0.1, 0.2]": "mean is [0.1, 0.2], expected a list of 3 numbers",
    "exclude = [1]": "exclude is 1, expected a text",
    "head-lr = [0.1]": "head-lr is [0.1], expected a number",
    "lr = ['svf=1', 'svf=2']": "svf twice, expected each regime once",
    "head-lr = 2026-01-01": "head-lr is datetime.date(2026, 1, 1), expected a number",
    "[lr]\na = 1": "lr is a table, expected an option's value; tables are those of tasks",
    "[clasification]\na = 1": "clasification is no option. Did you mean classification?",
    "[language]\nhead-type = 'x'": "language.head-type is no option of --task language",
    "[classification]\nhed = 'new'": "Did you mean classification.head?",
    "head = 'new'\n[classification]\nhead = 'new'": "head and classification.head are the same",
    "batch-size = 1\nbatch_size = 2": "batch-size and batch_size are the same option",
    "exclude = ['a']\nlr = ": "not readable",
    "warm = 0.2": "warm is no option. Did you mean warmup?",
    "clip-grad = -1": "clip-grad is -1.0, expected at least 0",
    "seed = " + "9" * 5000: "a whole number of over 64 bits",
    "shots = 0x" + "f" * 5000: "a whole number of over 64 bits",
    "regime = [{a = 0x" + "f" * 17 + "}]": "a whole number of over 64 bits",
    "lr = " + "[" * 100_000: "nested too deep",
    "config = 'a'": "config is no option",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, text: str) -> None:
    place = config(tmp_path, text)
    failed = run("finetune", "--config", place, "-o", tmp_path / "out")
    assert failed.exit_code == 2
    assert len(failed.stderr.splitlines()) == 1
    assert str(place) in failed.stderr
    assert WRONG[text] in failed.stderr


def test_a_file_that_is_not_there_and_an_option_of_another_task(work: Path) -> None:
    failed = run("finetune", "--config", work / "no.toml", "-o", work / "out")
    assert (failed.exit_code, "no such file" in failed.stderr) == (2, True)
    place = config(work, f"{BASIC}sequence-length = 8\n")
    failed = run("finetune", "--config", place, "-o", work / "out")
    assert failed.exit_code == 2
    assert "--sequence-length has no meaning for --task classification" in failed.stderr


def described(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "places": {"factors": "f"}, "named": {}, "task": "classification", "model": "auto",
        "seeds": [0], "settings": Settings(),
    }  # fmt: skip
    return tomllib.loads(Configuration(**{**given, **changes}).text(folder))


def test_what_only_the_library_takes_is_written_so_that_the_command_refuses_it(
    tmp_path: Path,
) -> None:
    assert "lr-scale" not in described(tmp_path)
    assert described(tmp_path, settings=Settings(lr_scale=0.3))["lr-scale"] == 0.3
    assert described(tmp_path, seeds=[4, 2])["seeds"] == [4, 2]
    own = described(tmp_path, options={"augment": lambda images: images})["classification"]
    assert own["augment"].startswith("function ")


def test_paths_are_relative_where_they_share_a_folder(tmp_path: Path) -> None:
    places = {"factors": tmp_path / "f", "data": "/", "base": None}
    found = described(tmp_path / "o", places=places, options={"evaluation": "none"})
    assert (found["factors"], found["data"]) == ("../f", "/")
    assert "base" not in found
    assert found["classification"]["eval"] == "none"
    broken = os.fsdecode(b"\xff")
    assert described(tmp_path, places={"factors": tmp_path / broken}) == {}


def test_no_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.svf.safetensors"
    assert file_beside(target).name == "a.run.toml"
    assert file_beside(tmp_path / "full.safetensors").name == "full.run.toml"
    check_beside(target)
    file_beside(target).write_text("lr = 1\n")
    with pytest.raises(UsageError, match=r"a\.run\.toml: exists and is no configuration"):
        check_beside(target)
    check_beside(tmp_path / "a")
    file_beside(target).write_text(
        Configuration({}, {}, "classification", "auto", [0], Settings()).text(tmp_path)
    )
    check_beside(target)
