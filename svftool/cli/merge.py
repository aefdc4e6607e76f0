"""``svftool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.choices.dtypes import Dtype
from svftool.cli.common import (
    Display,
    ForceOption,
    MovedBaseOption,
    OutputOption,
    leave_to_first_process,
)
from svftool.cli.push import PushFlags, library_of
from svftool.errors import UsageError
from svftool.files.contents import is_exact_delta
from svftool.files.folder import (
    check_base,
    check_dense_name,
    check_exists,
    check_tuned_exist,
    is_tuned_name,
)
from svftool.files.output import check_output
from svftool.files.pipeline import is_pipeline

EXAMPLE = "Example: svftool merge factors birds.svf.safetensors@0.7 -o merged.safetensors --verify"


def command(
    factors: Annotated[
        Path,
        typer.Argument(
            help="Factors of 'svftool decompose'; for adapters alone, or an exact delta, the base."
        ),
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tuned files and adapters, each with an optional weight: FILE@0.5; or one exact "
            "delta."
        ),
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
        Dtype | None,
        typer.Option(help="Write numbers in float32, bfloat16 or float16; as the base by default."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of an exact delta: check all, write nothing.")
    ] = False,
    force: ForceOption = False,
    hub: PushFlags,
    display: Display,
) -> None:
    """Fold tuned files and adapters into dense weights, mix tuned files, or apply a delta."""
    leave_to_first_process("merge")
    hub.check()
    deltas = [one for one in tuned or () if is_exact_delta(Path(one))]
    if deltas:
        unfit = {
            "--base": base,
            "--without-base": without_base,
            "--allow-overflow": allow_overflow,
            "--dtype": dtype,
        }
        _check_delta_alone(tuned or [], [flag for flag, value in unfit.items() if value])
        _restore(
            factors,
            Path(deltas[0]),
            output=output,
            max_shard_size=max_shard_size,
            verify=verify,
            dry_run=dry_run,
            force=force,
            hub=hub,
            display=display,
        )
        return
    if dry_run:
        raise UsageError("--dry-run is an option of an exact delta, expected one, or no --dry-run")
    whole = is_pipeline(factors)
    if not whole:
        check_base(factors, tuned or ())
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


def _check_delta_alone(given: list[str], flags: list[str]) -> None:
    """Refuse what an exact delta cannot be mixed with."""
    if len(given) > 1:
        raise UsageError(
            f"{given[0]}: beside {given[1]}, expected an exact delta alone. Apply one after "
            "another, each to what the last one wrote."
        )
    if flags:
        raise UsageError(
            f"{flags[0]} has no meaning for an exact delta, whose result is fixed to the last bit. "
            "Leave the option out."
        )


def _restore(
    base: Path, delta: Path, *, output: Path, hub: PushFlags, display: Display, **options: Any
) -> None:
    check_exists(base)
    if not options["dry_run"]:
        check_output(output, force=options["force"], inputs=[base, delta])
    from svftool.report import exact as report
    from svftool.stages.restore import restore

    result = restore(base, delta, output=output, progress=display.progress(), **options)
    view = report.merge_view(result)
    display.emit(report.merge_document(result), view)
    if not options["dry_run"]:
        hub.push(output, view, base=base, relation="finetune", library=library_of(output))
