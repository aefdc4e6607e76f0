"""Checkpoint, or factors with a tuned file, + data -> metrics, and a prediction an example."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

from torch import nn

from svftool.adapters.layout_file import is_adapter
from svftool.attaching import attach, detach, load_tuned, map_names
from svftool.checkpoints import Checkpoint, open_checkpoint, replace_output
from svftool.choices.training import UNMEASURED
from svftool.errors import DataError, ModelError, UsageError, shortlist
from svftool.factors import (
    FactorStore,
    TunedFile,
    check_tuned,
    is_factors,
    open_factors,
    read_tuned,
)
from svftool.factors.stated import Stated, read_stated
from svftool.files.header import json_text
from svftool.machine import explain_out_of_memory, pick_device
from svftool.models import build_model, is_read_whole
from svftool.progress import SILENT, Progress
from svftool.stages.adapt import load_adapters
from svftool.stages.catalogue import ModelFacts, head_classes, make_tasks
from svftool.stages.evaluate_result import EvaluateResult, Evaluation
from svftool.stages.settings import SIZES, Origins, SourcedSetting, settings_of
from svftool.tasks.base import Draw, HasContents, Predicts, Prepared, Sized, Task
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS, recorded
from svftool.training.threads import suited_threads


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
        seeded = SourcedSetting(_seed(source) if seed is None else seed, _seed_source(source, seed))
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
            _warn_of_seen(one, source, progress)
            begun = time.perf_counter()
            with explain_out_of_memory(None):
                draw = one.draw(seed)
                seen = _count_seen(source, task, draw, progress, before=seen)
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


def _seed(source: Source) -> int:
    """Find the seed of the fine-tune, which chose what it was measured on."""
    return int(source.stated.training.get("seed", 0))


def _seed_source(source: Source, given: int | None) -> str:
    if given is not None:
        return "option"
    return source.kind if "seed" in source.stated.training else "default"


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


def _warn_of_seen(task: Task, source: Source, progress: Progress) -> None:
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


def _count_seen(
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


def fit(
    source: Source,
    classes: Sequence[str] | None,
    draw: Draw,
    model: nn.Module,
    progress: Progress,
) -> nn.Module:
    """Give a freshly built model its head, and what was tuned.

    Raises
    ------
    ModelError
        If there is no head for the classes, or something has no place in the model.
    """
    known = set(model.state_dict())
    prepared = draw.prepare(model, start=False)
    for message in prepared.said:
        progress.warn(message)
    if source.store is None:
        whole = is_read_whole(source.model, source.checkpoint)
        names = _load_rest(prepared, classes, source.checkpoint, known, whole=whole)
    else:
        names = [] if source.tuned is None else _tune(prepared, source.tuned, source.store)
    if source.adapter is not None:
        names = [*names, *_adapt(prepared, source.adapter, source.checkpoint, progress)]
    inside = prepared.head is not None and any(n.startswith(f"{prepared.head}.") for n in names)
    # A host for few-shot segmentation has no classes, and a stand-in until it is trained.
    if prepared.new_head and classes is not None and not inside:
        if prepared.begin is not None:
            prepared.begin()
            return prepared.model.eval()
        raise ModelError(
            f"{source.paths[-1]}: no head for the data's {len(classes)} classes "
            f"({shortlist(classes, 4)}), expected one trained for them. Give the classes of "
            "the checkpoint's head with --classes, or the file from 'svftool finetune' with --tuned"
        )
    return prepared.model.eval()


def _load_rest(
    prepared: Prepared,
    classes: Sequence[str] | None,
    checkpoint: Checkpoint,
    known: Collection[str],
    *,
    whole: bool = False,
) -> list[str]:
    """Load what a checkpoint holds beside the tensors `known` to its bare model: a head, a host.

    A `whole` one was read by a library that has placed every tensor; only a new head is left.
    Returns the live names of what was loaded.
    """
    state = prepared.model.state_dict()
    head = f"{prepared.head}." if prepared.new_head else None
    elsewhere = set[str]() if whole else _renamed(prepared.model, checkpoint, known)
    loaded, homeless, of_head = [], [], {}
    for name, info in checkpoint.infos.items():
        live = checkpoint.live_name(name, state)
        inside = head is not None and live.startswith(head)
        if ((whole or live in known) and not inside) or name in elsewhere:
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
    if of_head and (classes is None or any(name.startswith(str(head)) for name in loaded)):
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


def _adapt(
    prepared: Prepared, adapter: Path, checkpoint: Checkpoint, progress: Progress
) -> list[str]:
    """Put an adapter on a model; return the live names of what it changed."""
    loaded = load_adapters(prepared.model, [(adapter, 1.0)], checkpoint.config, progress)
    return list(loaded.training["changed"])


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
