"""``svftool inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.cli.common import (
    DeviceOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    emit,
)
from svftool.cli.console import progress_for

NAME = "inspect"
EXAMPLE = "Example: svftool inspect base.safetensors merged.safetensors --html report.html"


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
        typer.Option(metavar="NAME,...|all", help="Metrics beside the default ones."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Singular values only: no shares, no intruders.")
    ] = False,
    sort: Annotated[
        str, typer.Option(metavar="METRIC", help="Metric that orders the table.")
    ] = "weight_drift",
    top: Annotated[int | None, typer.Option(min=1, help="Rows to show.", show_default="20")] = None,
    group: Annotated[
        bool, typer.Option("--group", help="Gather the rows of each block of the network.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write one line a tensor to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts, for any browser.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure; the suffix says png, svg or pdf.")
    ] = None,
    feature_maps: Annotated[
        Path | None,
        typer.Option(
            help="Write a figure of what the directions of a tuned file that moved most and least "
            "see in --image, before and after."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image for --feature-maps.")] = None,
    model: Annotated[
        str, typer.Option(metavar="SPEC", help="Model for --feature-maps, as in 'finetune'.")
    ] = "auto",
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE", help="Exit with 10 if any layer exceeds it (repeatable)."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file of allowed and denied verdicts; exit 10.")
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Say what fine-tunes did to a checkpoint, layer by layer."""
    from svftool.auditing.policy import Gatekeeper
    from svftool.report import inspect as report
    from svftool.report.inspect.files import Files, MapsFile
    from svftool.stages.audit import audit

    gate = Gatekeeper.read(fail_above or (), policy)
    files = Files(csv=csv, html=html, plot=plot, force=force, inputs=(base, *(tuned or ())))
    maps = MapsFile(feature_maps, image, model, force=force, inputs=(base, *(tuned or ())))
    files.check(sort)
    maps.check()
    asked = () if metrics is None else tuple(name.strip() for name in metrics.split(","))
    result = audit(
        base,
        tuned or [],
        metrics=gate.with_metrics((*asked, sort)),
        fast=fast,
        include=include or (),
        exclude=exclude or (),
        device=device,
        progress=progress_for(quiet=quiet, verbose=verbose),
    )
    failed = gate.violations(result)
    files.write(result, failed)
    maps.write()
    shown = report.view(result, sort=sort, top=top, group=group, failed=failed)
    emit(report.document(result, failed=failed), shown, as_json=json)
    gate.close(failed)
