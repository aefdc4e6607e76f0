"""``svftool decompose``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from svftool.choices.dtypes import Dtype
from svftool.choices.ranks import parse_rank
from svftool.choices.sizes import parse_size
from svftool.cli.common import (
    DeviceOption,
    Display,
    ExcludeOption,
    ForceOption,
    IncludeOption,
    check_device,
    is_first_process,
)
from svftool.cli.completion import one_of
from svftool.cli.push import PushFlags
from svftool.files.given import check_exists
from svftool.files.output import check_output
from svftool.files.pipeline import is_pipeline, located, read_pipeline

if TYPE_CHECKING:
    from svftool.stages.decompose import DecomposeOptions

EXAMPLE = "Example: svftool decompose resnet50.safetensors -o factors"


@dataclass(frozen=True, kw_only=True)
class HowToDecompose:
    """What is decomposed, how, and how it is stored."""

    rank: Annotated[
        str,
        typer.Option(
            autocompletion=one_of("full", "energy:0.99"),
            help="Singular values kept: full, 64, 0.25 (of the short side), energy:0.99.",
        ),
    ] = "full"
    method: Annotated[
        Literal["auto", "exact", "randomized"],
        typer.Option(metavar="auto|exact|randomized", help="How."),
    ] = "auto"
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=batch", help="3-D tensors that are a batch of matrices."),
    ] = None
    dtype: Annotated[
        Dtype,
        typer.Option(metavar="float32|bfloat16|float16", help="Storage of U and Vh."),
    ] = "float32"
    max_shard_size: Annotated[str, typer.Option(help="Where a new shard begins.")] = "5GB"
    layers_only: Annotated[
        bool, typer.Option("--layers-only", help="Leave out tensors that are not decomposed.")
    ] = False
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave layers with NaN or infinity whole.")
    ] = False
    include: IncludeOption = None
    exclude: ExcludeOption = None
    device: DeviceOption = "auto"

    def options(self) -> DecomposeOptions:
        """Return them under the names of `svftool.decompose`."""
        return {
            "rank": self.rank,
            "method": self.method,
            "include": self.include or (),
            "exclude": self.exclude or (),
            "views": self.view or (),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "layers_only": self.layers_only,
            "skip_bad": self.skip_bad,
            "device": self.device,
        }


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="File, folder (with or without an index) or hub id.")
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the factor checkpoint.")
    ],
    how: HowToDecompose,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of the same options.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan with sizes; write nothing.")
    ] = False,
    force: ForceOption = False,
    hub: PushFlags,
    display: Display,
) -> None:
    """Decompose a checkpoint's layers by singular value decomposition."""
    options = how.options()
    check_device(options["device"])
    parse_rank(options["rank"])
    parse_size(options["max_shard_size"])
    check_exists(checkpoint)
    hub.check()
    if not dry_run and is_first_process():
        check_output(output, force=force or resume, inputs=[Path(checkpoint)])
    from svftool.report import decompose as report
    from svftool.stages.decompose import decompose, plan

    progress = display.progress()
    place = located(checkpoint)
    if is_pipeline(place):
        _pipeline(
            place, output, dry_run, display, hub, checkpoint, resume=resume, force=force, **options
        )
        return
    if dry_run:
        planned = plan(checkpoint, progress=progress, **options)
        display.emit(report.plan_document(planned), report.plan_view(planned))
        return
    result = decompose(checkpoint, output, resume=resume, force=force, progress=progress, **options)
    display.emit(report.document(result), report.view(result))
    hub.push(output, report.view(result), base=checkpoint, relation="quantized")


def _pipeline(
    folder: Path,
    output: Path,
    dry_run: bool,
    display: Display,
    hub: PushFlags,
    checkpoint: str,
    **options: Any,
) -> None:
    """Decompose a pipeline, or show what that would do to each component."""
    from svftool.report import decompose as report
    from svftool.report import pipeline
    from svftool.stages.decompose import plan
    from svftool.stages.pipeline import PipelineResult, decompose_pipeline

    progress = display.progress()
    if dry_run:
        for name in ("resume", "force"):  # nothing is written
            options.pop(name)
        found = read_pipeline(folder)
        plans = {
            name: plan(found.path / name, progress=progress, **options) for name in found.components
        }
        planned = PipelineResult(None, plans)
        display.emit(
            pipeline.document("decompose", planned, report.plan_document),
            pipeline.view(planned, report.plan_view),
        )
        return
    result = decompose_pipeline(folder, output, progress=progress, **options)
    shown = pipeline.view(result, report.view)
    display.emit(pipeline.document("decompose", result, report.document), shown)
    hub.push(output, shown, base=checkpoint, relation="quantized")
