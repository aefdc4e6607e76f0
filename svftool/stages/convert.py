"""Adapters, tuned files and other tools' shifts -> an adapter of any layout, or a tuned file."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svftool.adapters.assembly import LayersOnDisk, Source, write_adapter
from svftool.adapters.layout_file import is_adapter, open_adapter
from svftool.adapters.low_rank import LowRank, Truncated, resized, stored, truncate
from svftool.adapters.writers import Entries
from svftool.checkpoints import dtype_name, open_checkpoint, replace_output
from svftool.choices.adapters import AdapterRank, parse_adapter_rank
from svftool.choices.dtypes import check_dtype
from svftool.engine import Job, job_bytes, run_layers
from svftool.errors import CheckpointError, NumericalError, UsageError, shortlist
from svftool.factors import check_tuned, is_tuned, open_factors, read_tuned, write_tuned
from svftool.factors.shifts import is_shifts, tuned_values
from svftool.files.names import WEIGHT_SUFFIXES, is_tuned_name
from svftool.files.output import scratch_folder
from svftool.numerics import ThreadPool
from svftool.progress import SILENT, Progress
from svftool.stages.conversion import ConvertOptions, Layer, Work
from svftool.stages.conversion_of_adapters import of_adapter, refuse_unused
from svftool.stages.conversion_of_tuned import factors_of, of_tuned
from svftool.stages.extract import extract
from svftool.stages.extract_lora import LeftOut
from svftool.version import __version__


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of what was written.

    Attributes
    ----------
    name : str
        As the base calls it where one was given, else as the input does.
    rank : int
        Of the two matrices; of a tuned file, how many singular values it has.
    error : float
        ``||D - D'||_F / ||D||_F`` of the change D and what is left of it; NaN of a plan.
    """

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did, or would do.

    Attributes
    ----------
    output : Path
    source : str
        What the input is: ``peft``, ``kohya``, ``comfy``, ``diffusers``, ``tuned file``, ``z file``
        or ``spectral shifts``.
    layout : str
        What was written: a layout, or ``tuned file``.
    dtype : str
        Of the matrices or of the singular values.
    dry_run : bool
    layers : tuple of ConvertedLayer
    error : float
        Of all layers together; what was left out counts in full where it can be measured.
    whole : tuple of str
        What is stored whole.
    dropped : tuple of LeftOut
    bytes : int
        Of the tensors written.
    """

    output: Path
    source: str
    layout: str
    dtype: str
    dry_run: bool
    layers: tuple[ConvertedLayer, ...]
    error: float
    whole: tuple[str, ...] = ()
    dropped: tuple[LeftOut, ...] = ()
    bytes: int = 0


def convert(
    source: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    layout: str | None = None,
    rank: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Turn an adapter or a tuned file into another form, layout or rank.

    Parameters
    ----------
    source : path-like
        An adapter in any layout, a tuned file, a z file of Transformer-squared, or the spectral
        shifts of SVDiff.
    output : path-like
        A file ``.svf.safetensors`` makes a tuned file; else a folder for PEFT's layout, a file
        ``.safetensors`` for the others.
    layout : str, optional
        ``peft``, ``kohya``, ``comfy`` or ``diffusers``; that of the input by default, ``peft`` for
        tuned files.
    rank : str, optional
        ``"8"``, ``"energy:0.95"`` or ``"error:0.1"``; each layer keeps its own without it.
    base : path-like, optional
        The model that the adapter belongs to; for tuned files its factors.
    dtype : str, optional
        ``float32``, ``bfloat16`` or ``float16``; that of the input by default.
    dry_run : bool
        Say ranks and sizes; write nothing.
    force : bool
        Replace an existing output.
    progress : Progress

    Returns
    -------
    ConvertResult

    Raises
    ------
    CheckpointError
        If the input is of no known form or broken, or does not fit the base.
    FactorsError
        If a tuned file does not fit the factors.
    NumericalError
        If a value is not finite.
    UsageError
        If an option is none or is missing, or the output exists.
    """
    options, target = ConvertOptions(layout, rank, base, dtype), Path(output)
    rule = None if rank is None else parse_adapter_rank(rank)
    if options.dtype is not None:
        check_dtype(options.dtype)
    if is_tuned_name(target):
        return _to_tuned(source, target, options, dry_run=dry_run, force=force, progress=progress)
    if is_tuned(source):
        with factors_of(source, options) as store:
            tuned = check_tuned(read_tuned(source), store)
            work = of_tuned(tuned, store, options, rule, progress)
            return _finish(
                work, source, target, rule, options, dry_run=dry_run, force=force, progress=progress
            )
    with ExitStack() as stack:
        adapter = stack.enter_context(open_adapter(source))
        for note in adapter.notes:
            progress.note(note)
        refuse_unused(adapter)
        work = of_adapter(adapter, options, rule, stack, progress)
        return _finish(
            work, source, target, rule, options, dry_run=dry_run, force=force, progress=progress
        )


def _to_tuned(
    source: str | os.PathLike[str],
    target: Path,
    options: ConvertOptions,
    *,
    dry_run: bool,
    force: bool,
    progress: Progress,
) -> ConvertResult:
    given = {"--layout": options.layout, "--rank": options.rank, "--dtype": options.dtype}
    wrong = [flag for flag, value in given.items() if value is not None]
    if wrong or dry_run:
        raise UsageError(
            f"{(*wrong, '--dry-run')[0]}: {target} is a tuned file, expected an adapter for it. "
            "Leave the option out."
        )
    if is_tuned(source):
        raise UsageError(
            f"{source}: a tuned file already, expected the name of an adapter for the output, "
            "such as adapter.safetensors"
        )
    if is_adapter(source):
        with open_adapter(source) as adapter:
            refuse_unused(adapter)
            kind = adapter.layout
        with factors_of(source, options):
            pass
        assert options.base is not None
        found = extract(options.base, source, output=target, force=force, progress=progress)
        with open_factors(options.base) as store:
            rows = tuple(
                ConvertedLayer(one.name, store.layers[one.name].rank, one.error)
                for one in found.layers
            )
        return ConvertResult(
            output=target,
            source=kind,
            layout="tuned file",
            dtype="float32",
            dry_run=False,
            layers=rows,
            error=found.error,
            whole=found.whole,
            dropped=tuple(LeftOut(one.name, one.reason, one.bytes) for one in found.dropped),
            bytes=_tensor_bytes(target),
        )
    return _shifts(source, target, options, force=force, progress=progress)


def _shifts(
    source: str | os.PathLike[str],
    target: Path,
    options: ConvertOptions,
    *,
    force: bool,
    progress: Progress,
) -> ConvertResult:
    """Turn a z file or spectral shifts into a tuned file."""
    with open_checkpoint(source) as file:
        if not is_shifts(file.infos):
            raise CheckpointError(
                f"{source}: {shortlist(file.infos, 2)}: no adapter, no z file and no spectral "
                "shifts, expected one of them. Dense fine-tunes are for svftool extract."
            )
        with factors_of(source, options) as store:
            values = tuned_values(file, store)
            inputs = [Path(source), store.path]
            with replace_output(target, force=force, inputs=inputs) as partial:
                about = {"made_by": f"svftool {__version__}: convert of {Path(source).name}"}
                write_tuned(partial, store=store, S=values.S, whole=values.whole, training=about)
            rows = tuple(ConvertedLayer(name, store.layers[name].rank, 0.0) for name in values.S)
        for note in values.notes:
            progress.note(note)
    return ConvertResult(
        output=target,
        source=values.kind,
        layout="tuned file",
        dtype="float32",
        dry_run=False,
        layers=rows,
        error=0.0,
        whole=tuple(values.whole),
        bytes=_tensor_bytes(target),
    )


def _tensor_bytes(path: Path) -> int:
    with open_checkpoint(path) as file:
        return sum(info.nbytes for info in file.infos.values())


def _finish(
    work: Work,
    source: str | os.PathLike[str],
    target: Path,
    rank: AdapterRank | None,
    options: ConvertOptions,
    *,
    dry_run: bool,
    force: bool,
    progress: Progress,
) -> ConvertResult:
    _check_name(work, target)
    if dry_run:
        return _plan(work, target, rank)
    inputs = [Path(source), *([] if options.base is None else [Path(options.base)])]
    with (
        replace_output(target, force=force, inputs=inputs) as partial,
        scratch_folder(partial) as folder,
    ):
        spool = LayersOnDisk(folder)
        found = _converted(work, rank, spool, progress)
        layers = {name: one.layer for name, one in found.items() if one.layer is not None}

        def pairs() -> Iterator[Entries]:
            for name in layers:
                yield work.entries(spool.load(name))

        about = _about(source, work, rank)
        size = write_adapter(
            partial,
            [functools.partial(_sound, each, source) for each in (pairs, work.rest)],
            metadata=work.metadata(layers, about),
            weights_file=work.weights_file,
            config=work.config(layers),
        )
    if work.dropped:
        listed = shortlist((f"{one.name} ({one.reason})" for one in work.dropped), 4)
        progress.warn(f"{Path(source).name}: left out: {listed}")
    rest, total = (
        math.fsum((*(size**2 for size in sizes), work.lost))
        for sizes in ([one.rest for one in found.values()], [one.total for one in found.values()])
    )
    shown = {one.name: one.shown for one in work.layers}
    return ConvertResult(
        output=target,
        source=work.kind,
        layout=work.layout,
        dtype=dtype_name(work.dtype),
        dry_run=False,
        layers=tuple(
            ConvertedLayer(shown[name], layer.rank, found[name].error)
            for name, layer in layers.items()
        ),
        error=math.sqrt(rest / total) if total > 0 else 0.0,
        whole=work.whole,
        dropped=tuple(work.dropped),
        bytes=size,
    )


def _sound(entries: Source, source: str | os.PathLike[str]) -> Iterator[Entries]:
    """Yield entries that are finite; refuse others by name."""
    for each in entries():
        for key, value in each.items():
            wide = value.float() if value.element_size() == 1 else value
            if not bool(wide.isfinite().all()):
                raise NumericalError(
                    f"{source}: {key!r} would hold NaN or infinity in {dtype_name(value.dtype)}, "
                    "expected finite values. Choose a wider --dtype, or save the adapter again."
                )
        yield each


def _converted(
    work: Work, rank: AdapterRank | None, spool: LayersOnDisk, progress: Progress
) -> dict[str, Truncated]:
    """Find the matrices of every layer; they go to the disk, and their shapes are kept."""
    layers = {one.name: one for one in work.layers}
    formed: dict[str, LowRank | Tensor] = {}

    def read(name: str) -> Tensor:
        value = layers[name].form()
        formed[name] = value
        # What is a product already is never multiplied out.
        return value if isinstance(value, Tensor) else torch.zeros(1).expand(layers[name].matrix)

    def do(job: Job, value: Tensor, pool: ThreadPool) -> Truncated:
        return _made(work, layers[job.name], formed.pop(job.name), rank, pool)

    def size(job: Job) -> int:
        own = layers[job.name].rank
        return job_bytes(job) if own is None else 32 * (own + 8) * sum(job.matrix)

    jobs = [Job(one.name, one.matrix) for one in work.layers]
    found = {}
    for name, one in run_layers(jobs, read, do, size=size, title="converting", progress=progress):
        # A change of zero is still one pair of the layout.
        kept = one.layer or _zeros(layers[name], work.dtype)
        found[name] = Truncated(spool.keep(kept), one.total, one.rest)
    return {name: found[name] for name in layers}


def _zeros(layer: Layer, dtype: torch.dtype) -> LowRank:
    m, n = layer.matrix
    return LowRank(layer.name, torch.zeros(m, 1, dtype=dtype), torch.zeros(1, n, dtype=dtype))


def _made(
    work: Work, layer: Layer, formed: LowRank | Tensor, rank: AdapterRank | None, pool: ThreadPool
) -> Truncated:
    if work.cut is not None:
        return work.cut(layer.name)
    if isinstance(formed, Tensor):
        assert rank is not None
        return truncate(layer.name, formed, rank, dtype=work.dtype, pool=pool)
    if rank is None or (rank.kind == "count" and rank.limit(*layer.matrix) >= formed.rank):
        return stored(formed, dtype=work.dtype, scaled=work.scaled(layer.name))
    return resized(formed, rank, dtype=work.dtype)


def _plan(work: Work, target: Path, rank: AdapterRank | None) -> ConvertResult:
    rows, size = [], 0
    for layer in work.layers:
        limits = [] if rank is None else [rank.limit(*layer.matrix)]
        most = min([*limits, *([] if layer.rank is None else [layer.rank])], default=1)
        rows.append(ConvertedLayer(layer.shown, most, math.nan))
        size += sum(layer.matrix) * most * work.dtype.itemsize
    return ConvertResult(
        output=target,
        source=work.kind,
        layout=work.layout,
        dtype=dtype_name(work.dtype),
        dry_run=True,
        layers=tuple(rows),
        error=math.nan,
        whole=work.whole,
        dropped=tuple(work.dropped),
        bytes=size,
    )


def _check_name(work: Work, target: Path) -> None:
    is_file = target.name.endswith(WEIGHT_SUFFIXES)
    if work.is_folder and is_file:
        raise UsageError(
            f"{target}: PEFT's layout is a folder, expected the name of one, such as "
            f"{target.with_suffix('')}"
        )
    if not work.is_folder and target.suffix != ".safetensors":
        raise UsageError(
            f"{target}: the {work.layout} layout is a file, expected a name that ends in "
            ".safetensors"
        )


def _about(source: str | os.PathLike[str], work: Work, rank: AdapterRank | None) -> str:
    asked = "" if rank is None else f" --rank {rank}"
    return f"svftool {__version__}: convert --layout {work.layout}{asked} of {Path(source).name}"
