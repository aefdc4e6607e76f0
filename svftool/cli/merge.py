"""``svftool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.cli.common import (
    Display,
    ForceOption,
    MovedBaseOption,
    OutputOption,
    leave_to_first_process,
)
from svftool.files.folder import (
    check_base,
    check_dense_name,
    check_tuned_exist,
    is_tuned_name,
)
from svftool.files.output import check_output

EXAMPLE = "Example: svftool merge factors birds.svf.safetensors@0.7 -o merged.safetensors --verify"


def command(
    factors: Annotated[
        Path, typer.Argument(help="Factors from 'svftool decompose'; for adapters alone the base.")
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(help="Tuned files and adapters, each with an optional weight: FILE@0.5."),
    ] = None,
    *,
    output: OutputOption,
    base: MovedBaseOption = None,
    without_base: Annotated[
        bool, typer.Option("--without-base", help="Rebuild weights from the factors alone.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Reshard, such as 5GB; shards as the base's by default.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result again and derive it anew.")
    ] = False,
    allow_overflow: Annotated[
        bool,
        typer.Option("--allow-overflow", help="Clip what its dtype cannot hold; it is counted."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Write numbers in float32, bfloat16 or float16; as the base by default."),
    ] = None,
    force: ForceOption = False,
    display: Display,
) -> None:
    """Fold tuned files and adapters into dense weights, or mix tuned files to one."""
    leave_to_first_process("merge")
    check_base(factors, tuned or ())
    check_tuned_exist(tuned or ())
    check_dense_name(output, tuned=bool(tuned) and is_tuned_name(output))
    check_output(output, force=force, inputs=[factors])
    from svftool.report import merge as report
    from svftool.stages.merge import merge

    result = merge(
        factors,
        tuned or [],
        output=output,
        base=base,
        without_base=without_base,
        max_shard_size=max_shard_size,
        verify=verify,
        allow_overflow=allow_overflow,
        dtype=dtype,
        force=force,
        progress=display.progress(),
    )
    display.emit(report.document(result), report.view(result))
