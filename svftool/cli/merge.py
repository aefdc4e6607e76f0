"""``svftool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.cli.common import (
    Display,
    ForceOption,
    MovedBaseOption,
    OutputOption,
    leave_to_first_process,
)
from svftool.cli.push import PushFlags, library_of
from svftool.files.folder import check_dense_name, check_factors, check_tuned_exist, is_tuned_name
from svftool.files.output import check_output
from svftool.files.pipeline import is_pipeline

EXAMPLE = "Example: svftool merge factors birds.svf.safetensors@0.7 -o merged.safetensors --verify"


def command(
    factors: Annotated[Path, typer.Argument(help="Factor checkpoint from 'svftool decompose'.")],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(help="Tuned files, each with an optional weight: FILE@0.5."),
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
    hub: PushFlags,
    display: Display,
) -> None:
    """Fold tuned singular values back into dense weights, or mix tuned files to one."""
    leave_to_first_process("merge")
    hub.check()
    whole = is_pipeline(factors)
    if not whole:
        check_factors(factors)
    check_tuned_exist(tuned or ())
    check_dense_name(output, tuned=bool(tuned) and is_tuned_name(output))
    check_output(output, force=force, inputs=[factors])
    from svftool.report import merge as report
    from svftool.stages.merge import merge

    options: dict[str, Any] = {
        "base": base,
        "without_base": without_base,
        "max_shard_size": max_shard_size,
        "verify": verify,
        "allow_overflow": allow_overflow,
        "dtype": dtype,
        "force": force,
        "progress": display.progress(),
    }
    if whole:
        from svftool.report import pipeline
        from svftool.stages.pipeline import merge_pipeline

        merged = merge_pipeline(factors, tuned or [], output=output, **options)
        document, view = (
            pipeline.document("merge", merged, report.document),
            pipeline.view(merged, report.view),
        )
    else:
        result = merge(factors, tuned or [], output=output, **options)
        document, view = report.document(result), report.view(result)
    display.emit(document, view)
    mixed = is_tuned_name(output)
    hub.push(
        output,
        view,
        base=factors,
        relation="adapter" if mixed else "merge" if len(tuned or ()) > 1 else "finetune",
        library="svftool" if mixed else library_of(output),
    )
