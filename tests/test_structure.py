"""The house: names with one meaning, short parameter lists, tasks that are imported when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_PARAMETERS = 15

IMPORTED = """
import sys
from pathlib import Path
from svftool import errors
from svftool.stages.catalogue import ModelFacts, make_tasks

try:
    make_tasks({task!r}, Path({data!r}), ModelFacts(), {{}})
except errors.SvftoolError:
    pass
print(*(name for name in sys.modules if name.startswith("svftool.")))
"""


def sources() -> dict[Path, ast.Module]:
    files = sorted((ROOT / "svftool").rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def repeated_classes(trees: Mapping[Path, ast.Module]) -> dict[str, list[str]]:
    homes = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.name)
    return {name: found for name, found in homes.items() if len(found) > 1}


def long_parameter_lists(trees: Mapping[Path, ast.Module]) -> Iterator[str]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                one = node.args
                count = len(one.posonlyargs) + len(one.args) + len(one.kwonlyargs)
                if count > MOST_PARAMETERS:
                    yield f"{path.name}: {node.name} has {count}"


def test_no_two_public_classes_have_one_name():
    assert repeated_classes(sources()) == {}


def test_a_repeated_class_is_found():
    twice = ast.parse("class A: ...\nclass B:\n    class A: ...\nclass _C: ...\nclass _C: ...")
    assert repeated_classes({Path("x.py"): twice}) == {"A": ["x.py", "x.py"]}


def test_no_function_has_more_parameters_than_a_reader_can_hold():
    assert not list(long_parameter_lists(sources()))


def test_a_long_parameter_list_is_found():
    names = ", ".join(f"a{i}" for i in range(MOST_PARAMETERS))
    trees = {Path("x.py"): ast.parse(f"def f({names}): ...\ndef g({names}, *, b): ...")}
    assert list(long_parameter_lists(trees)) == ["x.py: g has 16"]


@pytest.mark.parametrize(
    ("task", "own", "others"),
    [
        ("classification", "svftool.tasks.classification", ["few_shot", "tasks.segmentation"]),
        ("few-shot-segmentation", "svftool.few_shot.task", ["tasks.classification", "language"]),
        (
            "text-classification",
            "svftool.tasks.text_classification",
            ["few_shot", "tasks.segmentation", "tasks.language"],
        ),
        ("language", "svftool.tasks.language", ["few_shot", "tasks.classification"]),
        ("segmentation", "svftool.tasks.segmentation", ["few_shot", "tasks.classification"]),
    ],
)
def test_a_task_imports_no_other(tmp_path: Path, task: str, own: str, others: list[str]):
    code = IMPORTED.format(task=task, data=str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    modules = run.stdout.split()
    assert own in modules
    assert [name for name in modules if any(other in name for other in others)] == []
