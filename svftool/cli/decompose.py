"""``svftool decompose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.cli.common import (
    DeviceOption,
    ExcludeOption,
    ForceOption,
    IncludeOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    emit,
)
from svftool.cli.console import progress_for

NAME = "decompose"
EXAMPLE = "Example: svftool decompose resnet50.safetensors -o factors"


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="File, folder (with or without an index) or hub id.")
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the factor checkpoint.")
    ],
    rank: Annotated[
        str,
        typer.Option(help="Singular values kept: full, 64, 0.25 (of the short side), energy:0.99."),
    ] = "full",
    method: Annotated[str, typer.Option(metavar="auto|exact|randomized", help="How.")] = "auto",
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=batch", help="3-D tensors that are a batch of matrices."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Storage of U and Vh.")
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Where a new shard begins.")] = "5GB",
    layers_only: Annotated[
        bool, typer.Option("--layers-only", help="Leave out tensors that are not decomposed.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave layers with NaN or infinity whole.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of the same options.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan with sizes; write nothing.")
    ] = False,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Decompose a checkpoint's layers by singular value decomposition."""
    from svftool.report import decompose as report
    from svftool.stages.decompose import DecomposeOptions, decompose, plan

    progress = progress_for(quiet=quiet, verbose=verbose)
    options = DecomposeOptions(
        rank=rank,
        method=method,
        include=include or (),
        exclude=exclude or (),
        views=view or (),
        dtype=dtype,
        max_shard_size=max_shard_size,
        layers_only=layers_only,
        skip_bad=skip_bad,
        device=device,
    )
    if dry_run:
        planned = plan(checkpoint, progress=progress, **options)
        emit(report.plan_document(planned), report.plan_view(planned), as_json=json)
        return
    result = decompose(checkpoint, output, resume=resume, force=force, progress=progress, **options)
    emit(report.document(result), report.view(result), as_json=json)
