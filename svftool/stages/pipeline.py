"""A pipeline in, a pipeline or a folder of results out: a stage's work, for each component."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, Unpack

from svftool.checkpoints import replace_output, write_errors
from svftool.engine import parse_rank
from svftool.errors import FactorsError, UnchangedError, UsageError, counted, shortlist
from svftool.factors import open_factors, read_tuned
from svftool.files.names import FACTORS_FILE, TUNED_SUFFIX, WEIGHT_SUFFIXES
from svftool.files.pipeline import Pipeline, counterpart_folders, read_pipeline
from svftool.files.side_files import named
from svftool.processes import ALONE, Processes, joined_processes
from svftool.progress import SILENT, Progress
from svftool.stages.decompose import DecomposeOptions, DecomposeResult, decompose, plan
from svftool.stages.merge import MergeResult, Weighted, merge

_T = TypeVar("_T")


@dataclass(frozen=True)
class PipelineResult(Generic[_T]):
    """What a stage did to a pipeline.

    Attributes
    ----------
    output : Path or None
        The folder written.
    components : mapping of str to object
        The stage's own result, by component. Outputs in it are those within `output`.
    carried : tuple of str
        Other files that were copied along, by their place in the folder.
    left : mapping of str to int
        Other files that were not, with their bytes.
    unchanged : tuple of str
        Components that did not change, of which nothing was written.
    missing : tuple of str
        Components that a fine-tune does not have.
    """

    output: Path | None
    components: Mapping[str, _T]
    carried: tuple[str, ...] = ()
    left: Mapping[str, int] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def decompose_pipeline(
    pipeline: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Unpack[DecomposeOptions],
) -> PipelineResult[DecomposeResult]:
    """Decompose every component of a pipeline; parameters are those of `svftool.decompose`.

    Returns
    -------
    PipelineResult
        Its output is a pipeline of factor checkpoints; everything else is carried along.
    """
    source, target = read_pipeline(pipeline), Path(output)
    for name in source.components:  # what is wrong with the last is said before the first is done
        plan(source.path / name, **options)

    def work(name: str, partial: Path) -> DecomposeResult:
        if resume and (partial / FACTORS_FILE).is_file():
            return _finished(partial, options)
        return decompose(source.path / name, partial, resume=resume, progress=progress, **options)

    with joined_processes() as processes:
        room = _Room(target, [source.path], force=force, resume=resume, processes=processes)
        with room.open() as partial:
            found = _each(source.components, partial, work, progress)
            rest = processes.once(lambda: _carry(source, partial, progress))
    return _placed(target, found, rest)


def merge_pipeline(
    factors: str | os.PathLike[str],
    tuned: Sequence[Weighted] = (),
    *,
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> PipelineResult[MergeResult]:
    """Fold tuned files into the components that they belong to; parameters as `svftool.merge`.

    A tuned file belongs to the component with the fingerprint that it records; a folder stands for
    the tuned files in it, as ``svftool extract`` writes them for a pipeline.
    """
    source, target = read_pipeline(factors), Path(output)
    _check_folder(target)
    experts = _experts(source, tuned)
    inputs = [source.path, *(Path(path) for own in experts.values() for path, _ in own)]

    def work(name: str, partial: Path) -> MergeResult:
        moved = None if base is None else Path(base) / name
        return merge(
            source.path / name,
            experts[name],
            output=partial,
            base=moved,
            progress=progress,
            **options,
        )

    with _Room(target, inputs, force=force).open() as partial:
        found = _each(source.components, partial, work, progress)
        rest = _carry(source, partial, progress)
    return _placed(target, found, rest)


def extract_pipeline(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    work: Callable[[Path, Path, Path], _T],
    *,
    output: str | os.PathLike[str],
    suffix: str,
    force: bool = False,
    shared: bool = False,
    progress: Progress = SILENT,
) -> PipelineResult[_T]:
    """Extract what changed in every component of a pipeline.

    Parameters
    ----------
    base, tuned : path-like
        Pipelines.
    work : callable
        Takes a component of the base, that of the fine-tune and the output, and extracts.
    output : path-like
        A folder; each component's result is ``COMPONENT`` with the suffix.
    suffix : str
        Of the outputs; empty where they are folders.
    force : bool
        Replace an existing output.
    shared : bool
        Whether the processes of ``torchrun`` share the work.
    progress : Progress
    """
    source, target = read_pipeline(base), Path(output)
    _check_folder(target)
    pairs = {name: one[0] for name, one in counterpart_folders(source, [tuned]).items()}
    missing = tuple(name for name, one in pairs.items() if one is None)
    unchanged: list[str] = []

    def tried(name: str, partial: Path) -> _T | None:
        other = pairs[name]
        assert other is not None
        try:
            return work(source.path / name, other, partial.with_name(partial.name + suffix))
        except UnchangedError:
            progress.note(f"{name}: nothing differs; nothing is written of it")
            unchanged.append(name)
            return None

    with ExitStack() as stack:
        processes = stack.enter_context(joined_processes()) if shared else ALONE
        room = _Room(target, [source.path, Path(tuned)], force=force, processes=processes)
        with room.open() as partial:
            names = [name for name in source.components if name not in missing]
            found = _each(names, partial, tried, progress)
            if len(unchanged) == len(names):
                raise UnchangedError(
                    f"{tuned}: nothing differs from {source.path} in {shortlist(names, 6)}, "
                    "expected a fine-tune of it. Name another one."
                )
    if missing:
        progress.warn(f"{tuned}: lacks {shortlist(missing, 6)}, of which nothing is said")
    done = {name: one for name, one in found.items() if one is not None}
    return PipelineResult(
        target,
        {name: _moved(one, target / f"{name}{suffix}") for name, one in done.items()},
        unchanged=tuple(unchanged),
        missing=missing,
    )


@dataclass(frozen=True)
class _Room:
    """The folder that all components are written to, claimed once for all processes."""

    target: Path
    inputs: Sequence[Path]
    force: bool
    resume: bool = False
    processes: Processes = ALONE

    @contextmanager
    def open(self) -> Iterator[Path]:
        with ExitStack() as stack:

            def claim() -> Path:
                partial = stack.enter_context(
                    replace_output(
                        self.target,
                        force=self.force,
                        inputs=self.inputs,
                        keep_partial=True,
                        resume=self.resume,
                    )
                )
                with write_errors(partial):
                    partial.mkdir(exist_ok=True)
                return partial

            partial = self.processes.once(claim)
            try:
                yield partial
            except BaseException:
                if self.processes.first and not _holds_work(partial):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            self.processes.meet()


def _holds_work(partial: Path) -> bool:
    """Whether anything is there that a run could go on from: only a decomposition does."""
    return any((one / FACTORS_FILE).is_file() for one in partial.iterdir()) or any(
        partial.glob("*/layers/*.json")
    )


def _each(
    names: Sequence[str], partial: Path, work: Callable[[str, Path], _T], progress: Progress
) -> dict[str, _T]:
    found = {}
    for number, name in enumerate(names, 1):
        progress.note(f"{name} ({counted(number, 'components', of=len(names))})")
        found[name] = work(name, partial / name)
    return found


def _carry(
    source: Pipeline, partial: Path, progress: Progress
) -> tuple[tuple[str, ...], dict[str, int]]:
    rest = source.rest()
    rest.copy(partial)
    if source.absent:
        progress.warn(f"{source.path}: the index lists {shortlist(source.absent, 6)}, not there")
    if rest.left:
        progress.warn(f"{source.path}: not copied: {named(rest.left)}")
    return tuple(str(one.relative_to(source.path)) for one in rest.kept), dict(rest.left)


def _placed(
    target: Path, found: Mapping[str, _T], rest: tuple[tuple[str, ...], dict[str, int]]
) -> PipelineResult[_T]:
    moved = {name: _moved(one, target / name) for name, one in found.items()}
    return PipelineResult(target, moved, carried=rest[0], left=rest[1])


def _moved(result: _T, output: Path) -> _T:
    """Return a result with the place where its output is in the end."""
    return replace(result, output=output)  # type: ignore[type-var]


def _finished(folder: Path, options: DecomposeOptions) -> DecomposeResult:
    """Return what an interrupted run had finished of a component, if it was asked for the same."""
    with open_factors(folder) as store:
        config = store.config
    wanted = {
        "rank": parse_rank(options.get("rank", "full")),
        "method": options.get("method", "auto"),
        "dtype": options.get("dtype", "float32"),
        "layers_only": options.get("layers_only", False),
    }
    unlike = [name for name, value in wanted.items() if str(getattr(config, name)) != str(value)]
    if unlike:
        raise UsageError(
            f"{folder.parent}: the interrupted run had another {shortlist(unlike, 4)}. Give the "
            "same options to --resume, or start anew without it."
        )
    return DecomposeResult(folder, config, {}, 0.0, 0)


def _check_folder(target: Path) -> None:
    if target.suffix in WEIGHT_SUFFIXES:
        raise UsageError(
            f"{target}: names a file, while a pipeline has several components, expected a folder. "
            f"Write to {target.with_suffix('')}."
        )


def _experts(source: Pipeline, tuned: Sequence[Weighted]) -> dict[str, list[tuple[Path, float]]]:
    """Find out which tuned files belong to which component, by the fingerprint of the base."""
    found: dict[str, list[tuple[Path, float]]] = {name: [] for name in source.components}
    prints = {}
    for name in source.components:
        with open_factors(source.path / name) as store:
            prints[store.base_fingerprint] = name
    for given in tuned:
        path, weight = _weighted(given)
        for file in sorted(path.glob(f"*{TUNED_SUFFIX}")) if path.is_dir() else [path]:
            owner = prints.get(read_tuned(file).base_fingerprint)
            if owner is None:
                raise FactorsError(
                    f"{file}: belongs to none of the components {shortlist(source.components, 6)} "
                    f"of {source.path}, expected a tuned file of one. Name one that does."
                )
            found[owner].append((file, weight))
    return found


def _weighted(given: Weighted) -> tuple[Path, float]:
    if isinstance(given, tuple):
        return Path(given[0]), given[1]
    text = os.fspath(given)
    path, mark, weight = text.rpartition("@")
    if Path(text).exists() or not mark:
        return Path(text), 1.0
    with suppress(ValueError):
        return Path(path), float(weight)
    raise UsageError(f"{text}: the weight {weight!r} is no number, expected FILE@0.5")
