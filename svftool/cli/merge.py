"""``svftool merge``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.choices.dtypes import Dtype
from svftool.choices.merging import (
    AUTO,
    METHODS,
    UNWEIGHED,
    Heads,
    check_weighing,
    check_weight,
    described_methods,
    parse_method,
    parse_weighted,
)
from svftool.choices.models import read_model
from svftool.choices.sizes import parse_size
from svftool.cli.common import (
    Display,
    ForceOption,
    MovedBaseOption,
    OutputOption,
    check_device,
    is_first_process,
    leave_to_first_process,
)
from svftool.cli.completion import one_of
from svftool.cli.push import PushFlags, library_of
from svftool.cli.signature import TaskFlags, options_of
from svftool.errors import UsageError
from svftool.files.contents import is_exact_delta
from svftool.files.given import check_base, check_data, check_exists, check_tuned_exist
from svftool.files.names import check_dense_name, is_tuned_name
from svftool.files.output import check_output, replace_output
from svftool.files.pipeline import is_pipeline
from svftool.tasks.option import TaskName
from svftool.tasks.options import TASKS

EXAMPLE = "Example: svftool merge factors birds.svf.safetensors@0.7 -o merged.safetensors --verify"
FIRST = (
    "output", "base", "without_base", "max_shard_size", "method", "heads", "allow_other_base",
    "html", "resume", "verify", "allow_overflow", "dtype", "dry_run", "force", "push_to_hub",
    "private", "create_pr", "json", "quiet", "verbose", "weights_from", "task", "weight_trials",
    "model", "device", "trust_remote_code",
)  # fmt: skip
"""All but the options of tasks, which the help shows on request."""


@dataclass(frozen=True, kw_only=True)
class HowToCombine:
    """What a merge of many fine-tunes takes."""

    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PARAMETER=VALUE,...]",
            autocompletion=one_of(*METHODS, AUTO),
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

    def given(self) -> list[str]:
        """List the options that only a merge with --method has."""
        given = {
            "--heads": self.heads,
            "--allow-other-base": self.allow_other_base,
            "--html": self.html,
            "--resume": self.resume,
        }
        return [flag for flag, value in given.items() if value]


WEIGHTS = "Weights by data"
_TASKS = ", ".join(one for one in TASKS if one not in UNWEIGHED)


@dataclass(frozen=True, kw_only=True)
class HowToWeigh:
    """The examples that choose the weights of a merge, and the model that they go through."""

    weights_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Of --method: choose the inputs' weights on these labelled examples, two or "
            "more, other ones than you test on. Those given (FILE@0.5) are the start, and stay "
            "where nothing better holds on examples left out.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    task: Annotated[
        TaskName | None,
        typer.Option(
            metavar="TASK",
            help=f"Kind of data and loss: {_TASKS}.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    weight_trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Weights that are tried, each a whole merge and a pass over the examples; one "
            "more an input says what it brings.",
            show_default="4 times the inputs, and 4",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    model: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            autocompletion=one_of("auto", "timm:", "torchvision:"),
            help="The network, as for 'svftool evaluate': auto, timm:NAME, FILE.py:FACTORY ...",
            rich_help_panel=WEIGHTS,
        ),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda[:i]",
            autocompletion=one_of("auto", "cpu", "cuda"),
            help="Where the network runs.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run code that lies beside the checkpoint.",
            rich_help_panel=WEIGHTS,
        ),
    ] = False

    def given(self) -> list[str]:
        """List the options that are given."""
        given = {
            "--weights-from": self.weights_from,
            "--task": self.task,
            "--weight-trials": self.weight_trials,
            "--model": self.model != "auto",
            "--device": self.device != "auto",
            "--trust-remote-code": self.trust_remote_code,
        }
        return [flag for flag, value in given.items() if value not in (None, False)]

    def check(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """Return what `svftool.WeightsFrom` takes; None where data choose no weights.

        Parameters
        ----------
        options : dict
            The options of all tasks, None where one was not given.

        Raises
        ------
        UsageError
            If something is missing, or has no meaning.
        DataError
            If there are no such data.
        """
        own = sorted(
            f"--{name.replace('_', '-')}" for name, one in options.items() if one is not None
        )
        if self.weights_from is None:
            useless = [*self.given(), *(f"--{one.replace('_', '-')}" for one in own)]
            if useless:
                raise UsageError(
                    f"{useless[0]}: an option of --weights-from, expected that with it. Name the "
                    "examples, or leave the option out."
                )
            return None
        check_weighing(self.task, self.weight_trials, TASKS)
        assert self.task is not None
        check_device(self.device)
        read_model(self.model)
        check_data(self.weights_from, self.task)
        return {
            "data": self.weights_from,
            "task": self.task,
            "trials": self.weight_trials,
            "model": self.model,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "options": options_of(self.task, options),
        }


@dataclass(frozen=True, kw_only=True)
class HowToWrite:
    """How a merge is written."""

    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result again and derive it anew.")
    ] = False
    allow_overflow: Annotated[
        bool,
        typer.Option("--allow-overflow", help="Clip what its dtype cannot hold; it is counted."),
    ] = False
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Write numbers in float32, bfloat16 or float16; as the base by default."),
    ] = None


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
    weigh: HowToWeigh,
    task_options: Annotated[
        dict[str, Any],
        TaskFlags(evaluate=True, without=("shots", "evaluation"), without_tasks=UNWEIGHED),
    ],
    write: HowToWrite,
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
            weights=weigh.check(task_options),
            options={"base": base, "max_shard_size": max_shard_size, **asdict(write)},
            force=force,
            hub=hub,
            display=display,
        )
        return
    useless = [*how.given(), *weigh.given()]
    if useless:
        raise UsageError(
            f"{useless[0]}: an option of a merge with --method, expected one of "
            f"{', '.join([*METHODS, AUTO])}. Name a method, or leave the option out."
        )
    weigh.check(task_options)
    leave_to_first_process("merge")
    deltas = [one for one in tuned or () if is_exact_delta(Path(one))]
    if deltas:
        unfit: dict[str, object] = {
            "--base": base,
            "--without-base": without_base,
            "--allow-overflow": write.allow_overflow,
            "--dtype": write.dtype,
        }
        _check_delta_alone(tuned or [], [flag for flag, value in unfit.items() if value])
        _restore(
            factors,
            Path(deltas[0]),
            output=output,
            max_shard_size=max_shard_size,
            verify=write.verify,
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
        **asdict(write),
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
    weights: dict[str, Any] | None,
    options: dict[str, Any],
    force: bool,
    hub: PushFlags,
    display: Display,
) -> None:
    """Make one checkpoint of many fine-tunes."""
    assert how.method is not None
    _check_combined(base, inputs, how, unfit, output, options["max_shard_size"])
    if is_first_process():
        read = [] if weights is None else [weights["data"]]
        _check_outputs([*_paths(base, inputs), *read], how, output, force=force)
    from svftool.report import combine as report
    from svftool.stages.combine import combine
    from svftool.stages.combine_options import CombineOptions, WeightsFrom

    result = combine(
        base,
        inputs,
        output=output,
        options=CombineOptions(
            method=how.method,
            heads=how.heads,
            other_base=how.allow_other_base,
            weights=None if weights is None else WeightsFrom(**weights),
            **options,
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


def _check_outputs(paths: list[Path], how: HowToCombine, output: Path, *, force: bool) -> None:
    check_output(output, force=force or how.resume, inputs=paths)
    if how.html is not None:
        from svftool.report.drawing import require_jinja

        check_output(how.html, force=force, inputs=[*paths, output])
        require_jinja()


def _paths(base: Path, inputs: list[str]) -> list[Path]:
    return [base, *(parse_weighted(one)[0] for one in inputs)]
