"""``svftool inspect``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
from svftool.errors import UsageError
from svftool.files.folder import check_exists
from svftool.files.output import check_output
from svftool.files.toml import POLICY, read_toml
from svftool.report.annotations import Annotations
from svftool.report.inspect_files import Files, MapsFile

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
        for written in (self.csv, self.html, self.plot, self.feature_maps):
            if written is not None:
                check_output(written, force=self.force, inputs=apart)


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
        typer.Argument(help="Fine-tunes: checkpoints, factors, tuned files, LoRA folders."),
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
    fast: Annotated[
        bool, typer.Option("--fast", help="Singular values only: no shares, no intruders.")
    ] = False,
    screen: Annotated[
        bool,
        typer.Option(
            "--screen", help="A verdict at reading speed: nothing of the base is decomposed."
        ),
    ] = False,
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
    if screen:
        _check_screen(fast, (*beside, sort, *limits.metrics()))
    others, force = tuned or [], asked.force
    inputs = (base, *others)
    for one in inputs:
        check_exists(one)
    if is_first_process():
        asked.check(inputs)
    annotations = Annotations.read(limits.annotate or (), force=force, inputs=inputs)
    files = Files(asked.csv, asked.html, asked.plot, force=force, inputs=inputs)
    maps = MapsFile(asked.feature_maps, asked.image, force=force, inputs=inputs)
    files.check()
    maps.check()
    from svftool.auditing.gatekeeper import Gatekeeper, close
    from svftool.report import inspect as report
    from svftool.stages.audit import audit

    gate = Gatekeeper.read(limits.fail_above or (), limits.policy)
    result = audit(
        base,
        others,
        metrics=gate.with_metrics((*beside, sort)),
        fast=fast,
        screen=screen,
        include=include or (),
        exclude=exclude or (),
        device=device,
        progress=display.progress(),
    )
    held = gate.hold(result)
    files.write(result, held)
    annotations.write(held, seconds=result.seconds)
    if asked.feature_maps is not None and asked.image is not None:
        from svftool.stages.feature_maps import feature_maps

        maps.write(feature_maps(base, others[0], asked.image, model=asked.model))
    display.wrote(files.csv, files.html, files.plot, maps.path)
    shown = report.Shown(sort=sort, top=top, group=group, every=every)
    display.emit(report.document(result, held=held), report.view(result, shown, held=held))
    if is_first_process():
        annotations.say(held)
    close(held)
