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
from svftool.errors import GateError

NAME = "inspect"
EXAMPLE = "Example: svftool inspect base.safetensors merged.safetensors --top 10"


def command(
    base: Annotated[
        Path, typer.Argument(help="Dense or factor checkpoint; a tuned file may stand alone.")
    ],
    tuned: Annotated[
        list[Path] | None, typer.Argument(help="Fine-tunes: checkpoints, factors or tuned files.")
    ] = None,
    *,
    sort: Annotated[
        str, typer.Option(metavar="METRIC", help="Metric that orders the table.")
    ] = "weight_drift",
    top: Annotated[int | None, typer.Option(min=1, help="Rows to show.", show_default="20")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line a layer to this file.")] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE", help="Exit with 10 if any layer exceeds it (repeatable)."
        ),
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
    from svftool.auditing import parse_gate, tripped
    from svftool.auditing.gates import check_metric
    from svftool.report import inspect as report
    from svftool.report.files import write_text
    from svftool.stages.audit import audit

    gates = [parse_gate(text) for text in fail_above or []]
    check_metric(sort)
    result = audit(
        base,
        tuned or [],
        include=include or (),
        exclude=exclude or (),
        device=device,
        progress=progress_for(quiet=quiet, verbose=verbose),
    )
    if csv is not None:
        write_text(csv, report.csv_text(result), force=force, inputs=[base, *(tuned or [])])
    emit(report.document(result), report.view(result, sort=sort, top=top), as_json=json)
    rows = [row for one in result.comparisons for row in one.layers]
    for gate in gates:
        found = tripped(rows, gate)
        if found:
            raise GateError(
                f"{len(found)} layers with {gate}: {report.gate_lines(found, gate.metric)}"
            )
