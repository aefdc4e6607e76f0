"""Options of tasks: declared once, known to both commands, to the library and to tuned files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from svftool.cli.signature import TaskFlags, expanded, options_of
from svftool.errors import UsageError
from svftool.tasks import options
from svftool.tasks.option import choices_of, option, options_in, read_numbers
from svftool.tasks.options import (
    TASKS,
    ClassificationOptions,
    FewShotOptions,
    SegmentationOptions,
    recorded,
)


@dataclass(frozen=True, kw_only=True)
class Extended(ClassificationOptions):
    """Classification with one more option: what a contributor writes, and nothing else."""

    mixup: Literal["never", "often"] = option(
        "never", help="Blend pairs of images.", recorded="mixup", evaluate=True
    )
    crops: Sequence[int] = option((1, 2), help="Crops.", type=str, read=read_numbers)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.TASKS, "classification", Extended)


def runner(seen: list[Any], *, evaluate: bool) -> typer.Typer:
    """A command line of the task options alone."""

    def command(*, task: str = "classification", given: dict[str, Any]) -> None:
        seen.append(options_of(task, given))

    marked = Annotated[dict[str, Any], TaskFlags(evaluate)]
    command.__annotations__ = {"task": str, "given": marked}
    app = typer.Typer()
    app.command()(expanded(command))
    return app


def run(arguments: list[str], *, evaluate: bool = False) -> Any:
    seen: list[Any] = []
    result = CliRunner().invoke(runner(seen, evaluate=evaluate), arguments)
    if isinstance(result.exception, UsageError):
        raise result.exception
    return seen[0] if seen else result.output


@pytest.mark.usefixtures("extended")
def test_a_new_field_is_an_option_everywhere():
    assert run(["--mixup", "often", "--crops", "3,4"]) == {"mixup": "often", "crops": [3, 4]}
    assert run(["--mixup", "often"], evaluate=True) == {"mixup": "often"}
    assert "No such option" in run(["--crops", "3"], evaluate=True)
    assert recorded("classification", {"mixup": "often"}) == {"mixup": "often"}
    help_text = run(["--help"])
    assert "Blend pairs of images." in help_text
    assert "[default: (never)]" in help_text
    assert Extended(mixup="often").mixup == "often"
    with pytest.raises(UsageError, match=r"^--mixup 'rarely', expected never, often for --task"):
        Extended(mixup="rarely")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^--mixup has no meaning for --task language"):
        run(["--task", "language", "--mixup", "often"])


def test_what_is_not_given_is_left_to_the_task():
    assert run([]) == {}
    assert run(["--head", "new"]) == {"head": "new"}


@pytest.mark.parametrize(
    ("task", "flag", "expected"),
    [
        ("classification", "5", {"shots": 5}),
        ("few-shot-segmentation", "1,5", {"shots": [1, 5]}),
    ],
)
def test_shots_are_one_number_or_several_by_the_task(task: str, flag: str, expected: object):
    assert run(["--task", task, "--shots", flag]) == expected
    assert run(["--task", task, "--shots", flag], evaluate=True) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "1,5"], r"^--shots 1,5: several numbers"),
        (["--shots", "0"], r"^--shots is 0, expected at least 1"),
        (["--shots", "few"], r"^--shots 'few', expected whole numbers"),
        (["--fold", "1"], r"^--fold has no meaning for --task classification"),
        (["--inner-fold", "1"], r"^--inner-fold has no meaning for --task classification"),
        (["--task", "language", "--eval", "x", "--image-size", "9"], r"^--image-size has no"),
        (["--task", "few-shot-segmentation", "--eval", "x"], r"^--eval has no meaning"),
    ],
)
def test_what_a_task_does_not_take_is_refused(arguments: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        run(arguments)


def test_every_field_of_every_task_is_an_option():
    for kind in TASKS.values():
        names = [name for name, _ in options_in(kind)]
        assert names == [one.name for one in fields(kind)]
        assert all(about.help for _, about in options_in(kind))


def test_flags_that_tasks_share_are_the_same_flag():
    for one in TASKS.values():
        for other in TASKS.values():
            shared = dict(options_in(one)).keys() & dict(options_in(other)).keys()
            for name in shared:
                first, second = dict(options_in(one))[name], dict(options_in(other))[name]
                assert (first.help, first.flag, first.panel) == (
                    second.help,
                    second.flag,
                    second.panel,
                )


def test_a_choice_on_the_command_line_is_that_of_any_task():
    parameters = {one.name: one for one in TaskFlags().parameters()}
    choices = choices_of(parameters["head_type"].annotation)
    assert choices == ("linear", "cosine", "fcn", "deeplab")
    with pytest.raises(UsageError, match=r"^--head-type 'fcn', expected linear, cosine for"):
        ClassificationOptions(head_type="fcn")  # type: ignore[arg-type]
    assert SegmentationOptions(head_type="fcn").head_type == "fcn"


def test_what_a_tuned_file_records_comes_back_as_options():
    described = {"fold": 2, "shots": 5, "inner_fold": None, "host": "bam", "mean": [0.1, 0.2, 0.3]}
    found = recorded("few-shot-segmentation", described)
    assert found == {"folds": [2], "shots": [5], "host": "bam", "mean": (0.1, 0.2, 0.3)}
    assert FewShotOptions(**found).folds == [2]
    removed = recorded("few-shot-segmentation", {"removed_images_with_novel_classes": 7})
    assert removed == {"remove_novel": True}


def test_a_command_takes_the_fields_of_its_dataclasses():
    @dataclass(frozen=True, kw_only=True)
    class Colours:
        paint: Annotated[str, typer.Option(help="Which.")] = "red"
        coats: Annotated[int, typer.Option()] = 1

    def command(name: str, *, colours: Colours) -> None:
        """Paint."""
        seen.append((name, colours))

    command.__annotations__ |= {"name": str, "colours": Colours}
    seen: list[Any] = []
    shown = expanded(command)
    assert list(inspect.signature(shown).parameters) == ["name", "paint", "coats"]
    app = typer.Typer()
    app.command()(shown)
    assert CliRunner().invoke(app, ["door", "--coats", "2"]).exit_code == 0
    assert seen == [("door", Colours(paint="red", coats=2))]
