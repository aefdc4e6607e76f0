"""``svftool schema``: every document that ``--json`` prints is what its schema says.

`conftest` holds the documents of all other tests that run a command against the schemas too.
"""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from documents import checked, faults
from jsonschema import Draft202012Validator
from pictures import write_pictures
from safetensors.torch import load_file, save_file
from test_cli_evaluate import MODEL, run, succeed
from test_cli_info import gguf
from test_cli_predict import PIXELS

from svftool.auditing import METRICS, VERDICTS, metric_name
from svftool.auditing.sources import Kind
from svftool.auditing.verdicts import Confidence
from svftool.checkpoints import View
from svftool.cli import app
from svftool.cli.common import Display
from svftool.report import demo, finetune, schemas
from svftool.report.json import SCHEMA_VERSION
from svftool.report.schemas import described, schema
from svftool.stages.demo import DemoStep, Pretrained
from svftool.stages.finetune import finetune as tune
from svftool.tasks.option import TaskName
from svftool.training import Settings
from svftool.training.loop import Ending

SCHEMAS = Path(schemas.__file__).parent
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


# The schemas themselves.


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, dict | list):
            yield from nodes(one)


def test_every_command_with_a_document_has_a_schema() -> None:
    assert set(described()) - {"pipeline"} == {  # which several commands print
        name for name, one in COMMANDS.items() if any("--json" in p.opts for p in one.params)
    }


@pytest.mark.parametrize("name", described())
def test_a_schema_is_valid_and_describes_every_field(name: str) -> None:
    found = schema(name)
    Draft202012Validator.check_schema(found)
    assert found["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert found["$id"] == f"urn:svftool:schema:{name}"
    heads = [one["properties"] for one in nodes(found) if "command" in one.get("properties", {})]
    versions = [one["schema_version"]["const"] for one in heads if "schema_version" in one]
    assert versions
    assert set(versions) == {SCHEMA_VERSION}
    for one in nodes(found):
        if "properties" in one and one.get("type") == "object":
            for key, field in one["properties"].items():
                # What stands in several places is described where it is defined, once.
                assert "description" in field or "$ref" in field, f"{name}: {key}"
            assert one["additionalProperties"] is False
            assert set(one["required"]) <= set(one["properties"])
        elif one.get("type") == "object":
            assert "additionalProperties" in one or one == schema("info")["properties"]["facts"], (
                one
            )


@pytest.mark.parametrize("name", described())
def test_what_a_schema_refers_to_is_there_and_described(name: str) -> None:
    found = json.loads((SCHEMAS / f"{name}.json").read_text())
    for one in nodes(found):
        kind, _, target = one.get("$ref", "").rpartition("/")
        if kind:
            assert found["$defs"][target].get("description"), target
        elif target:
            assert target.removeprefix("urn:svftool:schema:") in described()
    assert all(f'"#/$defs/{one}"' in json.dumps(found) for one in found.get("$defs", {}))


def test_a_wheel_holds_the_schemas() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    builder = wheel.WheelBuilder(str(Path(__file__).parents[1]))
    held = {one.distribution_path for one in builder.recurse_included_files()}
    assert {f"svftool/report/schemas/{name}.json" for name in described()} <= held


def test_closed_sets_are_those_of_the_code() -> None:
    inspect, runs = schema("inspect")["$defs"], schema("finetune")
    layer = inspect["layer"]
    assert inspect["verdict"]["enum"] == list(VERDICTS)
    for meaning in VERDICTS.values():
        assert meaning.lower() in inspect["verdict"]["description"].lower()
    assert layer["properties"]["confidence"]["enum"] == [*get_args(Confidence), None]
    assert layer["properties"]["view"]["enum"] == [*get_args(View), None]
    assert inspect["comparison"]["properties"]["kinds"]["items"]["enum"] == [*get_args(Kind)]
    assert runs["properties"]["task"]["enum"] == [*get_args(TaskName)]
    assert runs["$defs"]["run"]["properties"]["ending"]["enum"] == [*get_args(Ending)]


def test_metrics_of_inspect_are_those_of_the_code() -> None:
    layer = schema("inspect")["$defs"]["layer"]
    found = {
        name: one for name, one in layer["properties"].items() if name not in layer["required"]
    }
    expected = {name: one for key, one in METRICS.items() for name in (key, metric_name(key))}
    assert set(found) == set(expected)
    for name, one in expected.items():
        assert ("$ref" in found[name]) == (one.of_pair is None), name
        assert one.what in found[name]["description"] or name != metric_name(name)


# The command.


def test_the_command_prints_a_schema_or_lists_them() -> None:
    assert json.loads(succeed("schema", "merge").stdout) == schema("merge")
    assert succeed("schema").stdout.split() == described()


@pytest.mark.parametrize(("name", "meant"), [("inspct", "inspect"), ("Merge", "merge")])
def test_an_unknown_name_is_one_line(name: str, meant: str) -> None:
    result = run("schema", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Did you mean '{meant}'?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["schema", "../json", "", "merge.json"])
def test_what_has_no_document_has_no_schema(name: str) -> None:
    result = run("schema", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected one of convert, decompose, demo" in result.stderr


# Documents.


def adapter(folder: Path) -> Path:
    folder.mkdir()
    parts = {"A": torch.ones(2, 8), "B": torch.ones(3, 2)}
    named = {f"base_model.model.fc.lora_{one}.weight": value for one, value in parts.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


POLICY = """
[[rule]]
layers = "conv*"
allow = ["untouched"]
reason = "frozen"
[[rule]]
layers = "nothing.*"
allow = ["untouched"]
[tensors]
unmatched = "deny"
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One document of each kind that the commands print, of real runs on a tiny network."""
    work = tmp_path_factory.mktemp("documents")
    made: dict[str, dict[str, Any]] = {}

    def keep(kind: str, *words: object, code: int = 0) -> None:
        result = run(*words, "--json", "-q")
        assert result.exit_code == code, (words, result.stderr, result.exception)
        made[kind] = json.loads(result.stdout)

    (work / "net.py").write_text(MODEL)
    (work / "policy.toml").write_text(POLICY)
    write_pictures(work / "data", count=4)
    scope: dict[str, Any] = {}
    exec(compile(MODEL, "net.py", "exec"), scope)
    base, factors, tuned = work / "b.safetensors", work / "f", work / "t.svf.safetensors"
    dense, other = work / "dense.safetensors", work / "other.safetensors"
    save_file(scope["three"]().state_dict(), base, {"format": "pt"})
    state = {name: value.clone() for name, value in load_file(base).items()}
    save_file({n: 1.1 * v if n.startswith("conv") else v for n, v in state.items()}, dense)
    more = {"fc.weight": torch.zeros(4, 8), "new": torch.zeros(2), "codes": torch.ones(3).int()}
    save_file({n: v for n, v in state.items() if n != "bn.bias"} | more, other)
    net, data = ["--model", f"{work}/net.py:three"], ["--data", work / "data"]
    brief = [*net, *data, "--steps", 1, "--shots", 2]

    keep("plan", "decompose", base, "-o", factors, "--dry-run", "--rank", "energy:0.9")
    keep("decompose", "decompose", base, "-o", factors)
    keep("finetune", "finetune", factors, "-o", tuned, *brief)
    keep("regimes", *("finetune", factors, "-o", work / "runs", *brief),
         *("--regime", "head,svf,full", "--seeds", 2, "--tune-lr"))  # fmt: skip
    unmeasured = work / "u.svf.safetensors"
    keep("unmeasured", "finetune", factors, "-o", unmeasured, *brief, "--eval", "none")
    cut = replace(
        tune(
            factors, data=work / "data", output=work / "cut", model=f"{work}/net.py:three",
            settings=Settings(steps=1), shots=2, regimes=("svf", "head"),
        ),
        interrupted=signal.SIGINT,
    )  # fmt: skip
    made["interrupted"] = json.loads(json.dumps(finetune.document(cut)))
    predicted = work / "p.jsonl"
    keep("evaluate", "evaluate", factors, "--tuned", tuned, *net, *data, "--predictions", predicted)
    keep("predict", "predict", factors, work / "data", "--tuned", tuned, *net)
    keep("written", "predict", factors, work / "data", "--tuned", tuned, *net, "-o", work / "p.csv")
    (work / "pixels.py").write_text(PIXELS)
    exec(compile(PIXELS, "pixels.py", "exec"), scope)
    save_file(scope["pixels"]().state_dict(), work / "pixels.safetensors", {"format": "pt"})
    dense_net = ["--task", "segmentation", "--model", f"{work}/pixels.py:pixels"]
    keep("shares", "predict", work / "pixels.safetensors", work / "data" / "red", *dense_net)
    keep("merge", "merge", factors, tuned, "-o", work / "m.safetensors", "--verify")
    keep("mixture", "merge", factors, f"{tuned}@0.5", "-o", work / "m.svf.safetensors")
    keep("rebuilt", "merge", factors, "-o", work / "r.safetensors", "--without-base")
    keep("extract", "extract", base, other, "-o", work / "x.svf.safetensors")
    adapted = ["extract", base, dense, "-o", work / "x.lora", "--as", "lora", "--rank", "2"]
    keep("adapted", *adapted)
    keep("adapted plan", *adapted[:4], work / "y.lora", *adapted[5:], "--dry-run")
    keep("convert", "convert", tuned, "-o", work / "c.safetensors", "--base", factors,
         *("--layout", "kohya"))  # fmt: skip
    keep("convert plan", "convert", work / "x.lora", "-o", work / "d", "--dry-run", "--rank", 1)
    lora = adapter(work / "lora")
    keep("alone", "inspect", base)
    keep("pair", "inspect", base, dense, "--metrics", "all")
    keep("fast", "inspect", factors, dense, "--fast")
    keep("series", "inspect", base, dense, other, lora)
    keep("tuned", "inspect", tuned)
    keep("screen", "inspect", base, dense, "--screen")
    keep("lineage", "lineage", base, dense, other, "--html", work / "tree.html")
    gates = ["--policy", work / "policy.toml", "--fail-above", "weight_drift=0.01"]
    keep("gates", "inspect", base, dense, other, *gates, code=10)
    for kind, path in (("checkpoint", base), ("factors", factors), ("small", tuned)):
        keep(f"info {kind}", "info", path, "--check")
    keep("info adapter", "info", lora)
    keep("info adapter file", "info", lora / "adapter_model.safetensors")
    keep("info gguf", "info", gguf(work / "m.gguf"))
    (work / "cut.gguf").write_bytes((work / "m.gguf").read_bytes()[:-4])
    keep("info problems", "info", work / "cut.gguf", code=3)
    torch.save(state, work / "m.pt")
    keep("info pickle", "info", work / "m.pt")

    first = Pretrained(base, ("0", "1"), 20, 0.9, 100, 1.5)
    steps = [demo.step_document(DemoStep("pretrain", (), first))]
    steps += [
        {"name": made[name]["command"], "command": f"svftool {name}", "result": made[name]}
        for name in ("decompose", "regimes", "merge", "series")
    ]
    made["demo"] = demo.document(json.loads(json.dumps(steps, default=str)))
    return made


def test_documents_fit_their_schemas(documents: dict[str, dict[str, Any]]) -> None:
    every = set(described()) - {"pipeline"}  # held against its own by test_pipelines
    assert {one["command"] for one in documents.values()} == every
    for kind, document in documents.items():
        assert faults(document) == [], kind


def test_the_documents_hold_what_they_are_there_for(documents: dict[str, dict[str, Any]]) -> None:
    """The variants are not there in name alone."""
    assert documents["plan"]["dry_run"] is True
    assert documents["regimes"]["runs"][1]["tuning"] is not None
    assert documents["regimes"]["summary"][0]["ci95"] is not None
    assert documents["unmeasured"]["summary"][0]["mean"] is None
    assert documents["interrupted"]["interrupted"] == "SIGINT"
    assert documents["written"]["predictions"] is None
    assert documents["mixture"]["kind"] == "tuned file"
    assert len(documents["series"]["trajectory"]["checkpoints"]) == 3
    assert documents["series"]["comparisons"][1]["unmatched"]["base"]
    assert documents["gates"]["failed"]
    assert any(one["missed"] for one in documents["gates"]["gates"])
    assert documents["info problems"]["problems"]


def parts(value: Any, wanted: Callable[[Any], bool], path: tuple[Any, ...] = ()) -> Iterator[Any]:
    if isinstance(value, dict | list):
        if isinstance(value, dict) and wanted(value):
            yield path
        for key, one in value.items() if isinstance(value, dict) else enumerate(value[:2]):
            yield from parts(one, wanted, (*path, key))


FREE = {"setting", "settings", "metrics", "learning_rates", "metadata", "config", "training",
        "base", "verdicts"}  # fmt: skip
"""Objects whose keys are names out of data, of files or of tasks, or are within such a one."""


def test_a_field_that_is_not_described_does_not_fit(documents: dict[str, dict[str, Any]]) -> None:
    done: set[tuple[Any, ...]] = set()
    for kind, document in documents.items():
        if kind == "demo":
            continue
        for place in parts(document, bool):
            alike = document["command"], *("" if isinstance(key, int) else key for key in place)
            if alike in done or FREE & set(place):
                continue
            done.add(alike)
            changed = copy.deepcopy(document)
            node = changed
            for key in place:
                node = node[key]
            node["undescribed"] = 1
            assert faults(changed), (kind, place)
    assert len(done) > 50


@pytest.mark.parametrize("kind", ["decompose", "regimes", "predict", "merge", "gates", "evaluate"])
def test_a_field_that_is_missing_does_not_fit(
    documents: dict[str, dict[str, Any]], kind: str
) -> None:
    whole = documents[kind]
    for key in whole.keys() - {"command"}:
        assert faults({name: value for name, value in whole.items() if name != key}), key


FINITE = {"seconds", "factor", "learning_rates", "share", "ci95", "value", "accuracy"}
"""Numbers that are counted, measured by a clock, given, or checked before they are shown."""


def without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k in FINITE else without_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_numbers(one) for one in value]
    return math.nan if isinstance(value, float) else value


def test_numbers_that_are_not_finite_fit(documents: dict[str, dict[str, Any]]) -> None:
    for kind, document in documents.items():
        assert faults(without_numbers(document)) == [], kind
    assert faults(without_numbers({**documents["plan"], "output_bytes": 1.5}))


def test_a_verdict_of_another_name_does_not_fit(documents: dict[str, dict[str, Any]]) -> None:
    changed = copy.deepcopy(documents["pair"])
    changed["comparisons"][0]["layers"][0]["verdict"] = "touched"
    assert "touched" in "".join(faults(changed))


def test_what_tests_print_is_held_against_its_schema(documents: dict[str, dict[str, Any]]) -> None:
    emit = checked(lambda *given: None)
    emit(Display(), documents["merge"], "")
    with pytest.raises(AssertionError, match="undescribed"):
        emit(Display(), {**documents["merge"], "undescribed": 1}, "")
    assert Display.emit.__name__ == "emit_checked"
