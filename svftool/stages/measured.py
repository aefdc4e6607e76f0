"""What is measured: factors with a tuned file, or any checkpoint, and what it states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from svftool.adapters.layout_file import is_adapter
from svftool.checkpoints import Checkpoint, open_checkpoint
from svftool.choices.training import UNMEASURED
from svftool.errors import DataError, UsageError, shortlist
from svftool.factors import (
    FactorStore,
    TunedFile,
    check_tuned,
    is_factors,
    open_factors,
    read_tuned,
)
from svftool.factors.stated import Stated, read_stated
from svftool.progress import Progress
from svftool.stages.catalogue import ModelFacts, head_classes
from svftool.stages.settings import SIZES, Origins, SourcedSetting
from svftool.tasks.base import Draw, HasContents, Sized, Task
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS, recorded


@dataclass(frozen=True)
class Source:
    """The weights: a dense checkpoint, and what is put on it."""

    checkpoint: Checkpoint
    store: FactorStore | None = None
    tuned: TunedFile | None = None
    model: str = "auto"
    """The spec of the model that takes them."""
    adapter: Path | None = None
    """An adapter in any layout."""
    said: Stated | None = None
    """What weights will say of themselves that are not written yet."""

    @property
    def path(self) -> Path:
        """The file or folder that was given."""
        return self.checkpoint.path if self.store is None else self.store.path

    @property
    def paths(self) -> list[Path]:
        """Every file and folder that is read."""
        found = [self.checkpoint.path]
        found += [] if self.store is None else [self.store.path]
        return found + ([] if self.tuned_path is None else [self.tuned_path])

    @property
    def tuned_path(self) -> Path | None:
        """The tuned file or the adapter."""
        return self.adapter if self.tuned is None else self.tuned.path

    @property
    def stated(self) -> Stated:
        """What the weights say of their training: a tuned file, or what a merge handed on."""
        if self.tuned is not None:
            return Stated(self.tuned.task, self.tuned.classes, self.tuned.training)
        if self.said is not None:
            return self.said
        return read_stated(self.checkpoint.metadata) or Stated()

    def said_for(self, task: str) -> Stated:
        """Return what they say, if it is about a task."""
        stated = self.stated
        return stated if stated.task in (None, task) else Stated()

    @property
    def kind(self) -> str:
        """How weights are called that say something."""
        return "merged checkpoint" if self.tuned is None else "tuned file"


def open_source(
    stack: ExitStack,
    path: Path,
    tuned: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    progress: Progress,
    *,
    model: str = "auto",
) -> Source:
    """Open what is measured, until a stack ends, and check that it belongs together.

    Raises
    ------
    UsageError
        If there is a tuned file or a base for a dense checkpoint; adapters go on both.
    FactorsError, CheckpointError
        If something is broken or does not belong together.
    """
    adapter = Path(tuned) if tuned is not None and is_adapter(tuned) else None
    if adapter is not None:
        tuned = None
    if not is_factors(path):
        for option, given in (("--tuned", tuned), ("--base", base)):
            if given is not None:
                raise UsageError(
                    f"{path}: a dense checkpoint, expected factors from 'svftool decompose' "
                    f"for {option}"
                )
        checkpoint = stack.enter_context(open_checkpoint(path))
        checkpoint.tell(progress)
        return Source(checkpoint, model=model, adapter=adapter)
    store = stack.enter_context(open_factors(path))
    expert = None if tuned is None else read_tuned(tuned)
    if expert is not None:
        expert = check_tuned(expert, store)
    dense = stack.enter_context(store.open_base(base, progress=progress))
    return Source(dense, store, expert, model, adapter)


def filled_options(
    task: str, data: Path, source: Source, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill in what the weights say of themselves, and that all of the data is measured."""
    tuned = source.tuned
    if tuned is not None and tuned.task in TASKS and tuned.task != task:
        raise UsageError(
            f"{tuned.path}: was trained for --task {tuned.task}, expected --task {task}"
        )
    options = dict(given)
    if task in TASKS:
        options = {**recorded(task, source.said_for(task).data), **options}
    own = dict(options_in(TASKS[task])) if task in TASKS else {}
    for name, about in own.items():
        if about.evaluate_as is not None:
            options.setdefault(name, about.evaluate_as)
    if options.get("evaluation") is not None and os.fspath(options["evaluation"]) == UNMEASURED:
        raise UsageError(f"--eval {UNMEASURED} measures nothing, expected data to measure on")
    if "evaluation" in own and options.get("shots") is None:
        options["shots"] = None
        options["evaluation"] = options.get("evaluation") or data
    # What a configuration says of a classifier's head is held against the data's classes instead.
    held = task in _JUDGED and source.tuned is None and source.stated.classes is None
    names = None if held else known_classes(source)
    if names and "classes" in own:
        options.setdefault("classes", names)
    return options


_JUDGED = ("classification", "text-classification")
"""Tasks that hold the head's own names of the classes against the data's."""


def seed_setting(source: Source, given: int | None) -> SourcedSetting:
    """Return the seed, by default that of the fine-tune, which chose what it was measured on."""
    if given is not None:
        return SourcedSetting(given, "option")
    stated = source.stated.training
    return SourcedSetting(stated.get("seed", 0), source.kind if "seed" in stated else "default")


def known_classes(source: Source) -> tuple[str, ...] | None:
    """Find the names of the head's outputs."""
    if source.tuned is not None or source.stated.classes is not None:
        return source.stated.classes
    return head_classes(source.checkpoint.config or {})


def check_stated(task: Task, source: Source, progress: Progress) -> None:
    """Hold what the data gives against what a tuned file was trained on.

    Raises
    ------
    DataError
        If its classes are others.
    """
    stated = source.said_for(task.name)
    if source.tuned is None and stated.classes is None:
        return
    if stated.classes is not None and task.classes != stated.classes:
        raise DataError(
            f"{source.paths[-1]}: was trained on the classes {shortlist(stated.classes)}, the data "
            f"has {shortlist(task.classes or ())}, expected the same in the same order. Measure on "
            "data of these classes"
        )
    then, now = stated.data, task.describe()
    for name in SIZES[:2]:
        if then.get(name) is not None and name in now and now[name] != then[name]:
            progress.warn(
                f"{name.replace('_', ' ')} is {now[name]}, {then[name]} in training: give the same "
                "--image-size for the same numbers"
            )


def warn_of_seen(task: Task, source: Source, progress: Progress) -> None:
    """Say where classes that are measured as novel ones were trained on."""
    then = source.said_for(task.name).data
    known = then.get("base_classes") or ()
    seen = [name for name in task.describe().get("novel_classes") or () if name in known]
    if seen:
        progress.warn(
            f"{len(seen)} of the novel classes were base classes in training: {shortlist(seen)}. "
            f"What is measured on them is no few-shot result; it was trained with --fold "
            f"{then.get('fold')}"
        )


def count_seen(
    source: Source, task: str, draw: Draw, progress: Progress, *, before: int | None
) -> int | None:
    """Count the examples that the weights were trained on; say where there are some."""
    support = source.said_for(task).support
    if support is None or not isinstance(draw, HasContents):
        return before
    seen = support.count(draw.contents("query"))
    if seen:
        of = f" of {draw.measured}" if isinstance(draw, Sized) else ""
        progress.warn(
            f"{seen}{of} examples that are measured were trained on, byte for byte "
            f"({source.paths[-1].name} records {support.examples} of them); what is measured on "
            "them is no result. Give --shots and --seed of the fine-tune, or other data"
        )
    return seen + (before or 0)


def facts_of(source: Source, task: str, model: nn.Module, *, trust_remote_code: bool) -> ModelFacts:
    """Gather what the weights and their folder say about the input."""
    found = ModelFacts.of(
        source.checkpoint, model, trust_remote_code=trust_remote_code, whole_head=True
    )
    return replace(found, trained=source.said_for(task).data)


def origins_of(source: Source, task: str, facts: ModelFacts, given: Mapping[str, Any]) -> Origins:
    """Gather what decides where settings came from."""
    data = source.said_for(task).data
    return Origins(given, recorded(task, data), data, source.kind, facts.preprocessing)


def classes_setting(
    source: Source,
    classes: Sequence[str] | None,
    given: Mapping[str, Any],
    *,
    otherwise: str = "data",
) -> SourcedSetting | None:
    """Say how many classes there are, and where their names are from."""
    if classes is None:
        return None
    where = "option" if given.get("classes") is not None else otherwise
    if where == otherwise and known_classes(source) is not None:
        where = "config.json" if source.stated.classes is None else source.kind
    return SourcedSetting(len(classes), where)
