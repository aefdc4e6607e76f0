"""``svftool extract``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from svftool.choices.adapters import Layout, parse_adapter_rank
from svftool.choices.dtypes import Dtype
from svftool.choices.regimes import parse_form
from svftool.cli.common import (
    Display,
    ExcludeOption,
    ForceOption,
    IncludeOption,
    OutputOption,
    check_device,
    is_first_process,
    leave_to_first_process,
)
from svftool.cli.completion import one_of
from svftool.cli.push import PushFlags
from svftool.errors import UsageError
from svftool.files.given import check_exists
from svftool.files.names import TUNED_SUFFIX
from svftool.files.output import check_output
from svftool.files.pipeline import is_pipeline, located
from svftool.progress import Progress

if TYPE_CHECKING:
    from svftool.stages.extract_lora import LoraOptions

EXAMPLE = "Example: svftool extract base.safetensors tuned.safetensors -o small.svf.safetensors"
PROPOSED = ("svf", "svf+scale", "entries:4x", "core:4x", "salt:4x", "rows", "best", "lora", "exact")


@dataclass(frozen=True, kw_only=True)
class HowToAdapt:
    """What ``--as lora`` alone takes."""

    rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|energy:X|error:X",
            autocompletion=one_of("64", "energy:0.95", "error:0.1"),
            help="Of --as lora: a rank, the share of squares to keep, or of the norm to lose "
            "(default: 64).",
        ),
    ] = None
    layout: Annotated[
        Layout | None,
        typer.Option(
            metavar="peft|kohya|comfy|diffusers",
            help="Of --as lora: whose names the adapter has (default: peft).",
        ),
    ] = None
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Of --as lora: the highest rank of any layer.")
    ] = None
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Of --as lora: one rank for all layers.")
    ] = False
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Of --as lora: storage of the matrices (default: that of the fine-tune).",
        ),
    ] = None
    include: IncludeOption = None
    exclude: ExcludeOption = None
    device: Annotated[
        str | None,
        typer.Option(
            metavar="auto|cpu|cuda[:i]",
            autocompletion=one_of("auto", "cpu", "cuda"),
            help="Of --as lora: where to compute (default: auto).",
        ),
    ] = None

    def options(self) -> LoraOptions:
        """Return them under the names of the library."""
        from svftool.stages.extract_lora import LoraOptions

        return LoraOptions(
            rank=self.rank or "64",
            layout=self.layout or "peft",
            max_rank=self.max_rank,
            uniform_rank=self.uniform_rank,
            dtype=self.dtype,
            include=self.include or (),
            exclude=self.exclude or (),
            device=self.device or "auto",
        )

    def given(self) -> list[str]:
        """List the flags that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]


def command(
    base: Annotated[Path, typer.Argument(help="The base, or its factor checkpoint.")],
    tuned: Annotated[Path, typer.Argument(help="Its dense fine-tune.")],
    *,
    output: OutputOption,
    form: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="svf|svf+scale|entries:SIZE|core:SIZE|salt:SIZE|rows|best[:4x]|lora|exact",
            autocompletion=one_of(*PROPOSED),
            help="A tuned file (singular values alone, or more of the singular basis; best: the "
            "nearest of all of at most 4 times as many numbers), a low-rank adapter, or the change "
            "bit for bit.",
        ),
    ] = "svf",
    how: HowToAdapt,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Of --as lora, exact: show ranks and sizes; write nothing."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Of --as lora: continue an interrupted run of the same."),
    ] = False,
    force: ForceOption = False,
    hub: PushFlags,
    display: Display,
) -> None:
    """Turn a dense fine-tune into a small tuned file, a LoRA, or an exact delta."""
    _check(form, how, dry_run=dry_run, resume=resume)
    for one in (base, tuned):
        check_exists(one)
    check_device(how.device or "auto")
    hub.check()
    if not dry_run and is_first_process():
        check_output(output, force=force, inputs=[base, tuned])
    way = _Way(form, how, dry_run, resume, display.progress())
    show = way.shown()
    place = located(base)
    if not is_pipeline(place):
        result = way.run(base, tuned, output, force=force)
        display.emit(show.document(result), show.view(result))
        if not dry_run:
            hub.push(output, show.view(result), base=base, relation="adapter", library=way.library)
        return
    if dry_run or resume:
        raise UsageError(
            f"{base}: a pipeline, which takes no {'--dry-run' if dry_run else '--resume'}, "
            f"expected a component of it. Name one, such as {base}/unet."
        )
    document, view = _pipeline(way, place, located(tuned), output, force=force)
    display.emit(document, view)
    hub.push(output, view, base=base, relation="adapter", library=way.library)


def _check(form: str, how: HowToAdapt, *, dry_run: bool, resume: bool) -> None:
    """Refuse options that the form does not take."""
    tuned = form not in ("lora", "exact")
    if tuned:
        parse_form(form)
    if form != "lora":
        leave_to_first_process("extract")
    given = [*how.given(), *(["--resume"] * resume)]
    if tuned and dry_run:
        given.append("--dry-run")
    if form != "lora" and given:
        raise UsageError(f"{given[0]} is an option of --as lora, expected --as lora with it")
    if how.rank is not None:
        parse_adapter_rank(how.rank, how.max_rank)


def _pipeline(
    way: _Way, base: Path, tuned: Path, output: Path, *, force: bool
) -> tuple[dict[str, Any], RenderableType]:
    from svftool.report import pipeline
    from svftool.stages.pipeline import extract_pipeline

    show = way.shown()
    found = extract_pipeline(
        base,
        tuned,
        way.run,
        output=output,
        suffix=way.suffix,
        force=force,
        shared=way.form == "lora",
        progress=way.progress,
    )
    document = pipeline.document("extract", found, show.document)
    return document, pipeline.view(found, show.view)


@dataclass(frozen=True)
class _Shown:
    """How a form's result is shown."""

    document: Callable[[Any], dict[str, Any]]
    view: Callable[[Any], RenderableType]


@dataclass(frozen=True)
class _Way:
    """One of the forms, with its options."""

    form: str
    how: HowToAdapt
    dry_run: bool
    resume: bool
    progress: Progress

    @property
    def suffix(self) -> str:
        """How the names of outputs end, in a folder of several."""
        if self.form == "exact":
            return ".safetensors"
        if self.form != "lora":
            return TUNED_SUFFIX
        return "" if self.how.options().layout == "peft" else ".safetensors"

    @property
    def library(self) -> str:
        """What loads the output."""
        if self.form != "lora":
            return "svftool"
        return "peft" if self.how.options().layout == "peft" else "diffusers"

    def shown(self) -> _Shown:
        from svftool.report import extract as report

        if self.form == "lora":
            return _Shown(report.lora_document, report.lora_view)
        if self.form == "exact":
            from svftool.report import exact

            return _Shown(exact.extract_document, exact.extract_view)
        return _Shown(report.document, report.view)

    def run(self, base: Path, tuned: Path, output: Path, *, force: bool = False) -> Any:
        """Extract from one checkpoint."""
        if self.form == "lora":
            from svftool.stages.extract_lora import extract_lora

            return extract_lora(
                base,
                tuned,
                output=output,
                options=self.how.options(),
                dry_run=self.dry_run,
                resume=self.resume,
                force=force,
                progress=self.progress,
            )
        if self.form == "exact":
            from svftool.stages.extract_exact import extract_exact

            return extract_exact(
                base,
                tuned,
                output=output,
                dry_run=self.dry_run,
                force=force,
                progress=self.progress,
            )
        from svftool.stages.extract import extract

        return extract(
            base, tuned, output=output, form=self.form, force=force, progress=self.progress
        )
