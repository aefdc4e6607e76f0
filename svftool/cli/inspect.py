"""``svftool inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svftool.choices.metrics import check_metric, check_metrics, check_screened, read_limit
from svftool.cli import completion
from svftool.cli.common import (
    DeviceOption,
    Display,
    ExcludeOption,
    IncludeOption,
    check_device,
    is_first_process,
)
from svftool.errors import GateError, UsageError, shortlist
from svftool.files.given import check_exists
from svftool.files.output import check_output
from svftool.files.pipeline import counterpart_folders, is_pipeline, located, read_pipeline
from svftool.files.toml import POLICY, read_toml
from svftool.report.annotations import Annotations
from svftool.report.inspect_files import Files, MapsFile

if TYPE_CHECKING:
    from svftool.auditing import AuditResult
    from svftool.auditing.gatekeeper import Gatekeeper, Held
    from svftool.report.inspect import Shown

EXAMPLE = "Example: svftool inspect base.safetensors merged.safetensors --html report.html"


@dataclass(frozen=True, kw_only=True)
class FilesToWrite:
    """The files that an inspection leaves."""

    csv: Annotated[Path | None, typer.Option(help="Write one line a tensor to this file.")] = None
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts, for any browser.")
    ] = None
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure; the suffix says png, svg or pdf.")
    ] = None
    save_directions: Annotated[
        Path | None,
        typer.Option(help="Write the directions of --directions to this safetensors file."),
    ] = None
    feature_maps: Annotated[
        Path | None,
        typer.Option(
            help="Write a figure of what the directions of a tuned file that moved most and least "
            "see in --image, before and after."
        ),
    ] = None
    image: Annotated[Path | None, typer.Option(help="Image for --feature-maps.")] = None
    model: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            autocompletion=completion.one_of("auto", "timm:", "torchvision:"),
            help="Model for --feature-maps, as in 'finetune'.",
        ),
    ] = "auto"
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False

    def check(self, inputs: Iterable[str]) -> None:
        """Refuse files that cannot be written."""
        apart = [*map(Path, inputs)]
        outputs = (self.csv, self.html, self.plot, self.save_directions, self.feature_maps)
        for written in outputs:
            if written is not None:
                check_output(written, force=self.force, inputs=apart)

    def files(self, inputs: Iterable[str], component: str = "") -> Files:
        """Return what is written of one comparison; a component's name is before the suffix."""

        def own(path: Path | None) -> Path | None:
            if path is None or not component:
                return path
            return path.with_suffix(f".{component}{path.suffix}")

        return Files(
            own(self.csv),
            own(self.html),
            own(self.plot),
            force=self.force,
            inputs=tuple(inputs),
            directions=own(self.save_directions),
        )


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How deep an inspection looks."""

    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Singular values only: no shares, no intruders; verdicts as of --screen."
        ),
    ] = False
    screen: Annotated[
        bool,
        typer.Option(
            "--screen", help="A verdict at reading speed: nothing of the base is decomposed."
        ),
    ] = False
    directions: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            max=MOST_DIRECTIONS,
            help="Look at the leading K output and input directions of each change: whether layers "
            "share them, which tokens are near, whether one was removed.",
        ),
    ] = None

    def check(self, names: Iterable[str], others: Sequence[str], saved: Path | None) -> None:
        """Refuse what a screen cannot do, and directions that cannot be saved.

        Parameters
        ----------
        names : iterable of str
            Metrics that are asked for.
        others : sequence of str
            The fine-tunes.
        saved : Path or None
            Where directions go.
        """
        if self.screen:
            _check_screen(self.fast, names)
        if saved is None:
            return
        if self.directions is None:
            raise UsageError("--save-directions: how many? Add --directions, as in --directions 8.")
        if len(others) != 1:
            raise UsageError(
                f"--save-directions: {len(others)} fine-tunes, expected one to a file. "
                "Name one at a time."
            )
        if saved.suffix != ".safetensors":
            raise UsageError(
                f"{saved}: suffix {saved.suffix!r}, expected .safetensors. Name such a file."
            )


MOST_DIRECTIONS = 64
"""Directions of a change, whose vectors are held until the end."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What makes the command fail."""

    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            autocompletion=completion.gate,
            help="Exit with 10 if any layer exceeds it (repeatable).",
        ),
    ] = None
    policy: Annotated[
        Path | None, typer.Option(help="TOML file of allowed and denied verdicts; exit 10.")
    ] = None
    annotate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="github|junit[=FILE]",
            autocompletion=completion.one_of("github", "junit", "junit="),
            help="Say what gates held to GitHub (on stderr), or in JUnit's XML (repeatable).",
        ),
    ] = None

    def metrics(self) -> list[str]:
        """List the metrics of the limits on the command line."""
        return [read_limit(limit)[0] for limit in self.fail_above or ()]

    def check(self) -> None:
        """Refuse limits and a policy that cannot be read."""
        for limit in self.fail_above or ():
            read_limit(limit)
        if self.policy is not None:
            read_toml(self.policy, POLICY)


def _check_screen(fast: bool, names: Iterable[str]) -> None:
    """Refuse what a screen cannot do."""
    if fast:
        raise UsageError(
            "--screen and --fast: a screen takes no singular values. Say one of the two."
        )
    check_screened(names)


def command(
    base: Annotated[
        str, typer.Argument(help="Dense or factor checkpoint; a tuned file may stand alone.")
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(help="Fine-tunes: checkpoints, factors, tuned files, adapters."),
    ] = None,
    *,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...|all",
            autocompletion=completion.metrics,
            help="Metrics beside the default ones.",
        ),
    ] = None,
    scope: Scope,
    sort: Annotated[
        str,
        typer.Option(
            metavar="METRIC",
            autocompletion=completion.metric,
            help="Metric that orders the table.",
        ),
    ] = "weight_drift",
    top: Annotated[int | None, typer.Option(min=1, help="Rows to show.", show_default="40")] = None,
    group: Annotated[
        bool, typer.Option("--group", help="One line a block of the network; usual beyond 40 rows.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="One line a matrix, those that are untouched too.")
    ] = False,
    asked: FilesToWrite,
    limits: Limits,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    device: DeviceOption = "auto",
    display: Display,
) -> None:
    """Say what fine-tunes did to a checkpoint, layer by layer."""
    check_device(device)
    check_metric(sort)
    beside = () if metrics is None else check_metrics(metrics)
    limits.check()
    others, force = tuned or [], asked.force
    scope.check((*beside, sort, *limits.metrics()), others, asked.save_directions)
    inputs = (base, *others)
    for one in inputs:
        check_exists(one)
    if is_first_process():
        asked.check(inputs)
    annotations = Annotations.read(limits.annotate or (), force=force, inputs=inputs)
    files = asked.files(inputs)
    maps = MapsFile(asked.feature_maps, asked.image, force=force, inputs=inputs)
    files.check()
    maps.check()
    from svftool.auditing.gatekeeper import Gatekeeper, close
    from svftool.report import inspect as report
    from svftool.stages.audit import audit

    gate = Gatekeeper.read(limits.fail_above or (), limits.policy)
    look = partial(
        audit,
        metrics=gate.with_metrics((*beside, sort)),
        fast=scope.fast,
        screen=scope.screen,
        directions=scope.directions,
        include=include or (),
        exclude=exclude or (),
        device=device,
        progress=display.progress(),
    )
    shown = report.Shown(sort=sort, top=top, group=group, every=every)
    place = located(base)
    if is_pipeline(place):
        _pipeline(
            place, [str(located(one)) for one in others], look, gate, shown, asked, limits, display
        )
        return
    result = look(base, others)
    held = gate.hold(result)
    files.write(result, held)
    annotations.write(held, seconds=result.seconds)
    if asked.feature_maps is not None and asked.image is not None:
        from svftool.stages.feature_maps import feature_maps

        maps.write(feature_maps(base, others[0], asked.image, model=asked.model))
    display.wrote(*files.paths, maps.path)
    display.emit(report.document(result, held=held), report.view(result, shown, held=held))
    if is_first_process():
        annotations.say(held)
    close(held)


def _pipeline(
    base: Path,
    others: list[str],
    look: Callable[..., AuditResult],
    gate: Gatekeeper,
    shown: Shown,
    asked: FilesToWrite,
    limits: Limits,
    display: Display,
) -> None:
    """Look at every component of a pipeline, with the same gates; each gets files of its own."""
    from svftool.auditing.gatekeeper import close
    from svftool.report import inspect as report
    from svftool.report import pipeline
    from svftool.stages.pipeline import PipelineResult

    if asked.feature_maps is not None or limits.annotate:
        flag = "--feature-maps" if asked.feature_maps is not None else "--annotate"
        raise UsageError(f"{flag}: {base} is a pipeline, expected a component of it. Name one.")
    source = read_pipeline(base)
    found: dict[str, tuple[AuditResult, Any]] = {}
    missing: list[str] = []
    held: list[Held] = []
    pairs = counterpart_folders(source, others)
    if is_first_process():
        for name in source.components:
            asked.files((str(base), *others), name).check()
    for name, theirs in pairs.items():
        there = [one for one in theirs if one is not None]
        if len(there) < len(theirs):
            missing.append(name)
        if theirs and not there:
            continue
        result = look(source.path / name, there)
        verdicts = gate.hold(result)
        files = asked.files((str(base), *others), name)
        files.write(result, verdicts)
        display.wrote(*files.paths)
        found[name], held = (result, verdicts), [*held, *verdicts]
    whole = PipelineResult(None, found, missing=tuple(missing))
    display.emit(
        pipeline.document("inspect", whole, lambda one: report.document(one[0], held=one[1])),
        pipeline.view(whole, lambda one: report.view(one[0], shown, held=one[1])),
    )
    close(held)
    if missing and (limits.fail_above or limits.policy):
        raise GateError(
            f"{shortlist(missing, 6)}: not in every fine-tune, so not compared, expected all "
            "components for a gate to hold."
        )
