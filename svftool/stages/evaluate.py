"""Checkpoint, or factors with a tuned file, + data -> metrics, and a prediction an example."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svftool.checkpoints import replace_output
from svftool.errors import UsageError
from svftool.files.header import json_text
from svftool.machine import explain_out_of_memory, pick_device
from svftool.models import build_model
from svftool.progress import SILENT, Progress
from svftool.stages.catalogue import ModelFacts, make_tasks
from svftool.stages.evaluate_result import EvaluateResult, Evaluation
from svftool.stages.loading import fit
from svftool.stages.measured import (
    Source,
    check_stated,
    classes_setting,
    count_seen,
    facts_of,
    filled_options,
    open_source,
    origins_of,
    seed_setting,
    warn_of_seen,
)
from svftool.stages.settings import Origins, SourcedSetting, settings_of
from svftool.tasks.base import Draw, Predicts, Sized, Task
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS
from svftool.training.threads import suited_threads


def evaluate(
    checkpoint: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | None = None,
    task: str = "classification",
    model: str = "auto",
    base: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: str = "auto",
    predictions: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> EvaluateResult:
    """Measure a dense checkpoint, or factors with a tuned file, as `svftool.finetune` does.

    All of `data` is measured. With ``shots`` and `seed` it is what a fine-tune with the same ones
    left over, with ``evaluation`` that data.

    Parameters
    ----------
    checkpoint : path-like
        A dense checkpoint, such as a merged one, or a factor checkpoint.
    data : path-like
        What to measure on; see the task.
    tuned : path-like, optional
        The tuned file to put on the factors' base, or an adapter in any layout, which goes on a
        dense checkpoint too; the base itself is measured without one. What
        it says of its classes, its normalisation and its head stands in for options not given.
    task : str
        One of `svftool.tasks.options.TASKS`.
    model : str
        See `svftool.models.build_model`.
    base : path-like, optional
        Where the factors' base is, if not at its recorded place.
    seed : int, optional
        The fine-tune's, for ``shots`` and for the episodes of few-shot segmentation; by default
        the one in the tuned file, or 0.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
    predictions : path-like, optional
        A file of JSON lines, one an example; pictures go to a folder beside it, ``NAME-pictures``.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    force : bool
        Replace existing predictions once the new ones are complete.
    progress : Progress
        Told how far the work is, and of images of another size than the tuned file's.
    options
        The task's own, as for `svftool.finetune`.

    Returns
    -------
    EvaluateResult

    Raises
    ------
    UsageError
        If options contradict each other or the predictions exist.
    DataError
        If the data cannot be read, or its classes are not those of the head.
    ModelError
        If the model cannot be built, or has no head for the data.
    FactorsError, CheckpointError
        If factors, base or tuned file are broken or do not belong together.
    """
    place = pick_device(device)
    with ExitStack() as stack:
        source = open_source(stack, Path(checkpoint), tuned, base, progress, model=model)
        given = dict(options)
        options = filled_options(task, Path(data), source, options)
        seeded = seed_setting(source, seed)
        seed = int(seeded.value)
        output = Output.claim(
            stack, predictions, task, force=force, inputs=[*source.paths, Path(data)]
        )

        def build() -> nn.Module:
            return build_model(
                model,
                checkpoint=source.checkpoint,
                trust_remote_code=trust_remote_code,
                strict=source.store is not None,
            )

        fresh = [build()]
        facts = facts_of(source, task, fresh[0], trust_remote_code=trust_remote_code)
        tasks = make_tasks(task, Path(data), facts, options, progress=progress)
        check_stated(tasks[0], source, progress)
        runs: list[Evaluation] = []
        seen: int | None = None
        settings: dict[str, SourcedSetting] = {}
        for one in tasks:
            warn_of_seen(one, source, progress)
            begun = time.perf_counter()
            with explain_out_of_memory(None):
                draw = one.draw(seed)
                seen = count_seen(source, task, draw, progress, before=seen)
                if not runs:
                    origins = origins_of(source, task, facts, given)
                    settings = _settings(one, draw, source, facts, origins, seeded)
                bare = (fresh.pop() if fresh else build()).to(place)
                live = fit(source, one.classes, draw, bare, progress)
                with suited_threads(live, draw):
                    metrics = draw.evaluate(live, progress=progress)
                    seconds = time.perf_counter() - begun
                    runs.append(Evaluation(seed, one.shots, dict(one.facts), metrics, seconds))
                    output.write(one, draw, live)
        return EvaluateResult(
            checkpoint=source.path,
            tuned=source.tuned_path,
            task=task,
            metric=tasks[0].primary.name,
            runs=tuple(runs),
            setting=tasks[0].describe(),
            settings=settings,
            seen=seen,
            predictions=output.target,
            pictures=output.pictures,
        )


def _settings(
    task: Task,
    draw: Draw,
    source: Source,
    facts: ModelFacts,
    origins: Origins,
    seed: SourcedSetting,
) -> dict[str, SourcedSetting]:
    given, drawn, described = origins.given, task.shots is not None, task.describe()
    place = given.get("tokenizer")
    tokenizer = SourcedSetting(str(place or facts.folder), "option" if place else "checkpoint")
    # Images are classified without one, but for a head that is to be made of names.
    reads = "tokenizer" in dict(options_in(TASKS[task.name])) and (
        task.name != "classification" or given.get("head_init") == "names"
    )
    return settings_of(
        task.name,
        described,
        origins,
        examples=SourcedSetting(draw.measured, "data") if isinstance(draw, Sized) else None,
        classes=classes_setting(source, task.classes, given),
        shots=SourcedSetting(task.shots, origins.of_option("shots")) if drawn else None,
        seed=seed if drawn else None,
        tokenizer=tokenizer if reads else None,
    )


@dataclass(frozen=True)
class Output:
    """Where predictions go; nowhere without a target.

    Attributes
    ----------
    target, partial : Path
        The file, and where it is written until all is measured.
    pictures, partial_pictures : Path or None
        The folder of the pictures that belong to it, likewise; None for tasks without.
    """

    target: Path | None = None
    partial: Path = field(default_factory=Path)
    pictures: Path | None = None
    partial_pictures: Path | None = None

    @classmethod
    def claim(
        cls,
        stack: ExitStack,
        predictions: str | os.PathLike[str] | None,
        task: str,
        *,
        force: bool,
        inputs: Sequence[Path],
    ) -> Output:
        """Take hold of the file and the folder until a stack ends.

        Raises
        ------
        UsageError
            If one of them exists and may not be replaced, or lies in an input.
        """
        if predictions is None:
            return cls()
        target = Path(predictions)
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        if not TASKS[task].pictured:
            return cls(target, partial)
        pictures = target.with_name(f"{target.stem}-pictures")
        folder = stack.enter_context(replace_output(pictures, force=force, inputs=inputs))
        folder.mkdir()
        return cls(target, partial, pictures, folder)

    def write(self, task: Task, draw: Draw, model: nn.Module) -> None:
        """Add the rows of one task.

        Raises
        ------
        UsageError
            If the task has no predictions.
        """
        if self.target is None:
            return
        if not isinstance(draw, Predicts):
            raise UsageError(f"--predictions: --task {task.name} gives none, expected no file")
        root = self.partial_pictures or self.partial.parent
        folder = root / "-".join(f"{name}{value}" for name, value in task.facts.items())
        if self.partial_pictures is not None:
            folder.mkdir(exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            for row in _rows(draw, model, folder, root):
                file.write(json_text({**task.facts, **row}) + "\n")


def _rows(draw: Predicts, model: nn.Module, folder: Path, root: Path) -> Iterator[dict[str, Any]]:
    """Yield the predictions, with the paths of pictures as they are seen from their folder."""
    for row in draw.predictions(model, "query", folder):
        yield {
            name: str(Path(value).relative_to(root))
            if isinstance(value, str) and value.startswith(f"{root}{os.sep}")
            else value
            for name, value in row.items()
        }
