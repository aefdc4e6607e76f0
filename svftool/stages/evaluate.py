"""Checkpoint, or factors with a tuned file, + data -> metrics, and a prediction an example."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from torch import nn

from svftool.attaching import attach, detach, load_tuned, map_names
from svftool.checkpoints import Checkpoint, open_checkpoint, replace_output
from svftool.errors import DataError, ModelError, UsageError, shortlist
from svftool.factors import (
    FactorStore,
    TunedFile,
    check_tuned,
    is_factors,
    open_factors,
    read_tuned,
)
from svftool.machine import explain_out_of_memory, pick_device
from svftool.models import build_model
from svftool.progress import SILENT, Progress
from svftool.stages.catalogue import ModelFacts, make_tasks
from svftool.stages.evaluate_result import EvaluateResult, Evaluation
from svftool.tasks.base import Draw, Predicts, Prepared, Task
from svftool.tasks.images import order_warning
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS, UNMEASURED, recorded
from svftool.training.threads import suited_threads

SIZES = ("image_size", "crop", "short_side")
"""What a task says of the size of its images."""


@dataclass(frozen=True)
class _Source:
    """The weights: a dense checkpoint, and what is put on it."""

    checkpoint: Checkpoint
    store: FactorStore | None = None
    tuned: TunedFile | None = None

    @property
    def path(self) -> Path:
        return self.checkpoint.path if self.store is None else self.store.path

    @property
    def paths(self) -> list[Path]:
        """Every file and folder that is read."""
        found = [self.checkpoint.path]
        found += [] if self.store is None else [self.store.path]
        return found + ([] if self.tuned is None else [self.tuned.path])


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
        The tuned file to put on the factors' base; the base itself is measured without one. What
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
        source = _open(stack, Path(checkpoint), tuned, base, progress)
        options = _options(task, Path(data), source, options)
        seed = _seed(source) if seed is None else seed
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
        facts = ModelFacts.of(source.checkpoint, fresh[0], trust_remote_code=trust_remote_code)
        tasks = make_tasks(task, Path(data), facts, options, progress=progress)
        _check(tasks[0], source, progress, given=options.get("classes") is not None)
        runs = []
        for one in tasks:
            _warn_of_seen(one, source, progress)
            begun = time.perf_counter()
            with explain_out_of_memory(None):
                draw = one.draw(seed)
                live = _fit(source, one, draw, (fresh.pop() if fresh else build()).to(place))
                with suited_threads(live, draw):
                    metrics = draw.evaluate(live, progress=progress)
                    seconds = time.perf_counter() - begun
                    runs.append(Evaluation(seed, one.shots, dict(one.facts), metrics, seconds))
                    output.write(one, draw, live)
        return EvaluateResult(
            checkpoint=source.path,
            tuned=None if source.tuned is None else source.tuned.path,
            task=task,
            metric=tasks[0].primary.name,
            runs=tuple(runs),
            setting=tasks[0].describe(),
            predictions=output.target,
            pictures=output.pictures,
        )


def _open(
    stack: ExitStack,
    path: Path,
    tuned: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    progress: Progress,
) -> _Source:
    if not is_factors(path):
        for option, given in (("--tuned", tuned), ("--base", base)):
            if given is not None:
                raise UsageError(
                    f"{path}: a dense checkpoint, expected factors from 'svftool decompose' "
                    f"for {option}"
                )
        return _Source(stack.enter_context(open_checkpoint(path)))
    store = stack.enter_context(open_factors(path))
    expert = None if tuned is None else read_tuned(tuned)
    if expert is not None:
        check_tuned(expert, store)
    return _Source(stack.enter_context(store.open_base(base, progress=progress)), store, expert)


def _options(task: str, data: Path, source: _Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the weights say of themselves, and that all of the data is measured."""
    tuned, options = source.tuned, dict(given)
    if tuned is not None:
        if tuned.task in TASKS and tuned.task != task:
            raise UsageError(
                f"{tuned.path}: was trained for --task {tuned.task}, expected --task {task}"
            )
        options = {**recorded(task, tuned.training.get("data") or {}), **options}
    own = dict(options_in(TASKS[task])) if task in TASKS else {}
    for name, about in own.items():
        if about.evaluate_as is not None:
            options.setdefault(name, about.evaluate_as)
    if options.get("evaluation") is not None and os.fspath(options["evaluation"]) == UNMEASURED:
        raise UsageError(f"--eval {UNMEASURED} measures nothing, expected data to measure on")
    if "evaluation" in own and options.get("shots") is None:
        options["shots"] = None
        options["evaluation"] = options.get("evaluation") or data
    names = _class_names(source)
    if names and "classes" in own:
        options.setdefault("classes", names)
    return options


def _seed(source: _Source) -> int:
    """Find the seed of the fine-tune, which chose what it was measured on."""
    return 0 if source.tuned is None else int(source.tuned.training.get("seed", 0))


def _class_names(source: _Source) -> tuple[str, ...] | None:
    """Find the names of the head's outputs."""
    if source.tuned is not None:
        return source.tuned.classes
    config = source.checkpoint.config or {}
    if isinstance(config.get("label_names"), list):
        return tuple(map(str, config["label_names"]))
    known = config.get("id2label")
    if not isinstance(known, Mapping):
        return None
    names = tuple(str(known[key]) for key in sorted(known, key=int))
    # transformers' stand-ins for names that nobody gave.
    return None if names[0] == "LABEL_0" else names


def _check(task: Task, source: _Source, progress: Progress, *, given: bool) -> None:
    """Hold what the data gives against what a tuned file was trained on."""
    tuned = source.tuned
    if tuned is None:
        if task.classes is not None and task.name == "classification" and not given:
            warning = order_warning(task.classes)
            if warning is not None:
                progress.warn(warning)
        return
    if tuned.classes is not None and task.classes != tuned.classes:
        raise DataError(
            f"{tuned.path}: was trained on the classes {shortlist(tuned.classes)}, the data has "
            f"{shortlist(task.classes or ())}, expected the same in the same order. Measure on "
            "data of these classes"
        )
    then, now = tuned.training.get("data") or {}, task.describe()
    for name in SIZES:
        if then.get(name) is not None and name in now and now[name] != then[name]:
            progress.warn(
                f"{name.replace('_', ' ')} is {now[name]}, {then[name]} in training: give the same "
                "--image-size for the same numbers"
            )


def _warn_of_seen(task: Task, source: _Source, progress: Progress) -> None:
    """Say where classes that are measured as novel ones were trained on."""
    then = {} if source.tuned is None else source.tuned.training.get("data") or {}
    known = then.get("base_classes") or ()
    seen = [name for name in task.describe().get("novel_classes") or () if name in known]
    if seen:
        progress.warn(
            f"{len(seen)} of the novel classes were base classes in training: {shortlist(seen)}. "
            f"What is measured on them is no few-shot result; it was trained with --fold "
            f"{then.get('fold')}"
        )


def _fit(source: _Source, task: Task, draw: Draw, model: nn.Module) -> nn.Module:
    """Return a freshly built model its head, and what was tuned."""
    known = set(model.state_dict())
    prepared = draw.prepare(model, start=False)
    if source.store is None:
        names = _load_rest(prepared, task, source.checkpoint, known)
    else:
        names = [] if source.tuned is None else _tune(prepared, source.tuned, source.store)
    inside = prepared.head is not None and any(n.startswith(f"{prepared.head}.") for n in names)
    # A host for few-shot segmentation has no classes, and a stand-in until it is trained.
    if prepared.new_head and task.classes is not None and not inside:
        raise ModelError(
            f"{source.paths[-1]}: no head for the data's {len(task.classes)} classes "
            f"({shortlist(task.classes, 4)}), expected one trained for them. Give the classes of "
            "the checkpoint's head with --classes, or the file from 'svftool finetune' with --tuned"
        )
    return prepared.model.eval()


def _load_rest(
    prepared: Prepared, task: Task, checkpoint: Checkpoint, known: Collection[str]
) -> list[str]:
    """Load what a checkpoint holds beside the tensors `known` to its bare model: a head, a host.

    Returns the live names of what was loaded.
    """
    state = prepared.model.state_dict()
    head = f"{prepared.head}." if prepared.new_head else None
    elsewhere = _renamed(prepared.model, checkpoint, known)
    loaded, homeless, of_head = [], [], {}
    for name, info in checkpoint.infos.items():
        live = checkpoint.live_name(name, state)
        inside = head is not None and live.startswith(head)
        if (live in known and not inside) or name in elsewhere:
            continue
        if inside:
            of_head[live] = tuple(info.shape)
        if live in state and state[live].shape == info.shape:
            state[live].copy_(checkpoint.read(name))
            loaded.append(live)
        elif not inside:
            homeless.append(name)
    if homeless:
        raise ModelError(
            f"{checkpoint.path}: {len(homeless)} tensors have no place in the model: "
            f"{shortlist(homeless)}. Name the model that the checkpoint was made for with --model"
        )
    # Of a head for other classes nothing fits, and the classes are what is wrong.
    if of_head and (task.classes is None or any(name.startswith(str(head)) for name in loaded)):
        _require_whole_head(checkpoint.path, prepared, of_head)
    return loaded


def _renamed(model: nn.Module, checkpoint: Checkpoint, known: Collection[str]) -> set[str]:
    """Find tensors that the model has loaded under another name, or leaves out on purpose.

    transformers adds a prefix, stacks tensors, and ignores what older files hold besides, such as
    the causal masks of GPT-2.
    """
    own = [name for name in checkpoint.infos if name.removeprefix(checkpoint.prefix) not in known]
    if not own:
        return set()
    placements = map_names(model, checkpoint.infos).placements
    found = {name for name in own if name in placements and placements[name].live in known}
    patterns = [
        pattern
        for module in model.modules()
        for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    return found | {name for name in own if any(re.search(p, name) for p in patterns)}


def _require_whole_head(
    path: Path, prepared: Prepared, found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a head of another kind: a part of its weights would fit and give nonsense."""
    module = prepared.model.get_submodule(str(prepared.head))
    expected = {f"{prepared.head}.{n}": tuple(p.shape) for n, p in module.named_parameters()}
    buffers = {f"{prepared.head}.{name}" for name, _ in module.named_buffers()}
    wrong = [
        name
        for name in {**expected, **found}
        if name not in buffers and found.get(name) != expected.get(name)
    ]
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{path}: {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'no such tensor')}, and so on for {len(wrong)} tensors of the "
            "head. Give the options that it was trained with (few-shot segmentation: --host, "
            "--start, --width, --shots)"
        )


def _tune(prepared: Prepared, tuned: TunedFile, store: FactorStore) -> list[str]:
    """Put a tuned file on a model; return the live names of what it holds beside singular values.

    Layers that were not trained run as they did in training, without factors.
    """
    model = prepared.model
    names = map_names(model, [*store.layers, *store.config.left_whole])
    if prepared.new_head and prepared.head is not None:
        whole = {live: value for n, value in tuned.whole.items() for live in names.live_names(n)}
        inside = {n: tuple(v.shape) for n, v in whole.items() if n.startswith(f"{prepared.head}.")}
        if inside:
            _require_whole_head(tuned.path, prepared, inside)
    if tuned.S:
        attach(model, store, include=[escape(name) for name in tuned.S])
        load_tuned(model, tuned.path)
    else:
        attach(model, store, skip=[] if prepared.head is None else names.inside(prepared.head))
        load_tuned(model, tuned.path)
        detach(model, merge=False)
    return [live for name in tuned.whole for live in names.live_names(name)]


# Predictions as a file of JSON lines, with a folder of the pictures that belong to them.


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
                file.write(json.dumps({**task.facts, **row}, ensure_ascii=False) + "\n")


def _rows(draw: Predicts, model: nn.Module, folder: Path, root: Path) -> Iterator[dict[str, Any]]:
    """Yield the predictions, with the paths of pictures as they are seen from their folder."""
    for row in draw.predictions(model, "query", folder):
        yield {
            name: str(Path(value).relative_to(root))
            if isinstance(value, str) and value.startswith(f"{root}{os.sep}")
            else value
            for name, value in row.items()
        }
