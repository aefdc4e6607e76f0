"""``svftool merge``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.choices.dtypes import Dtype
from svftool.choices.merging import (
    METHODS,
    Heads,
    check_weight,
    described_methods,
    parse_method,
    parse_weighted,
)
from svftool.choices.sizes import parse_size
from svftool.cli.common import (
    Display,
    ForceOption,
    MovedBaseOption,
    OutputOption,
    is_first_process,
    leave_to_first_process,
)
from svftool.cli.completion import one_of
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
from svftool.files.output import check_output, replace_output
from svftool.files.pipeline import is_pipeline

EXAMPLE = "Example: svftool merge factors birds.svf.safetensors@0.7 -o merged.safetensors --verify"


@dataclass(frozen=True, kw_only=True)
class HowToCombine:
    """What a merge of many fine-tunes takes."""

    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PARAMETER=VALUE,...]",
            autocompletion=one_of(*METHODS),
            help="Make one checkpoint of fine-tunes of any kind. Names, and their parameters with "
            f"defaults: {described_methods()}; scale=1 of all.",
        ),
    ] = None
    heads: Annotated[
        Heads | None,
        typer.Option(
            metavar="concat|first|drop",
            help="Of --method: output heads of different classes: all rows, those of the first "
            "input that has some, or the base's. Refused by default.",
        ),
    ] = None
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base", help="Of --method: take inputs that are far from the base."
        ),
    ] = False
    html: Annotated[
        Path | None,
        typer.Option(help="Of --method: write a page with the interference, for any browser."),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Of --method: continue an interrupted run of the same."),
    ] = False

    def unfit(self) -> list[str]:
        """List the options that only a merge with --method has."""
        given = {
            "--heads": self.heads,
            "--allow-other-base": self.allow_other_base,
            "--html": self.html,
            "--resume": self.resume,
        }
        return [flag for flag, value in given.items() if value]


def command(
    factors: Annotated[
        Path,
        typer.Argument(
            help="Factors of 'svftool decompose'; for an exact delta, with --method, or for "
            "adapters alone the base."
        ),
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tuned files and adapters, with --method fine-tunes too, each with an optional "
            "weight: FILE@0.5; or one exact delta."
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
    how: HowToCombine,
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
    """Merge tuned files, adapters and fine-tunes, mix tuned files, or apply a delta."""
    hub.check()
    if how.method is not None:
        senseless = {"--without-base": without_base, "--dry-run": dry_run}
        _combine(
            factors,
            tuned or [],
            how,
            unfit=[flag for flag, value in senseless.items() if value],
            output=output,
            options={
                "base": base,
                "max_shard_size": max_shard_size,
                "verify": verify,
                "allow_overflow": allow_overflow,
                "dtype": dtype,
            },
            force=force,
            hub=hub,
            display=display,
        )
        return
    if how.unfit():
        raise UsageError(
            f"{how.unfit()[0]}: an option of a merge with --method, expected one of "
            f"{', '.join(METHODS)}. Name a method, or leave the option out."
        )
    leave_to_first_process("merge")
    deltas = [one for one in tuned or () if is_exact_delta(Path(one))]
    if deltas:
        unfit: dict[str, object] = {
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


def _combine(
    base: Path,
    inputs: list[str],
    how: HowToCombine,
    *,
    unfit: list[str],
    output: Path,
    options: dict[str, Any],
    force: bool,
    hub: PushFlags,
    display: Display,
) -> None:
    """Make one checkpoint of many fine-tunes."""
    assert how.method is not None
    _check_combined(base, inputs, how, unfit, output, options["max_shard_size"])
    if is_first_process():
        _check_outputs(base, inputs, how, output, force=force)
    from svftool.report import combine as report
    from svftool.stages.combine import CombineOptions, combine

    result = combine(
        base,
        inputs,
        output=output,
        options=CombineOptions(
            method=how.method, heads=how.heads, other_base=how.allow_other_base, **options
        ),
        resume=how.resume,
        force=force,
        progress=display.progress(),
    )
    view = report.view(result)
    if how.html is not None and is_first_process():
        with replace_output(how.html, force=force, inputs=_paths(base, inputs)) as partial:
            partial.write_text(report.page(result), encoding="utf-8")
        display.wrote(how.html)
    display.emit(report.document(result), view)
    if is_first_process():
        hub.push(output, view, base=base, relation="merge", library=library_of(output))


def _check_combined(
    base: Path,
    inputs: list[str],
    how: HowToCombine,
    unfit: list[str],
    output: Path,
    shards: str | None,
) -> None:
    """Refuse what can be told from the words alone."""
    if unfit:
        raise UsageError(f"{unfit[0]} has no meaning with --method. Leave one of the two out.")
    spec = parse_method(how.method or "")
    for one in inputs:
        check_weight(*parse_weighted(one))
    spec.check_count(len(inputs))
    if shards is not None:
        parse_size(shards)
    if is_pipeline(base):
        raise UsageError(
            f"{base}: a pipeline, expected a component of it with --method. Name one, such as "
            f"{base / 'unet'}"
        )
    for path in _paths(base, inputs):
        check_exists(path)
        if is_exact_delta(path):
            raise UsageError(
                f"{path}: an exact delta, expected fine-tunes with --method. Restore the fine-tune "
                "first: svftool merge BASE DELTA -o FINE-TUNE"
            )
    check_dense_name(output)


def _check_outputs(
    base: Path, inputs: list[str], how: HowToCombine, output: Path, *, force: bool
) -> None:
    paths = _paths(base, inputs)
    check_output(output, force=force or how.resume, inputs=paths)
    if how.html is not None:
        from svftool.report.drawing import require_jinja

        check_output(how.html, force=force, inputs=[*paths, output])
        require_jinja()


def _paths(base: Path, inputs: list[str]) -> list[Path]:
    return [base, *(parse_weighted(one)[0] for one in inputs)]
