"""Checkpoint -> factor checkpoint: the singular value decomposition of every selected layer."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from svftool.checkpoints import (
    Checkpoint,
    Selection,
    matrix_shape,
    open_checkpoint,
    parse_size,
    replace_output,
    select,
    write_errors,
)
from svftool.checkpoints.dtypes import dtype_named
from svftool.choices.dtypes import check_dtype
from svftool.engine import PROCESS_BYTES, parse_rank, peak_memory
from svftool.engine.examine import examination_bytes
from svftool.errors import UsageError, counted, no_such, shortlist
from svftool.factors import FactorConfig, LayerSpool, check_names, check_storable
from svftool.machine import peak_memory_bytes, pick_device
from svftool.numerics import Method
from svftool.processes import Processes, joined_processes
from svftool.progress import SILENT, Progress
from svftool.stages.factorise import Factorisation, FactoriseSettings, LayerPlan, storing_bytes

METHODS = ("auto", "exact", "randomized")


class DecomposeOptions(TypedDict, total=False):
    """Options of `decompose` and `plan`; each may be left out."""

    rank: str
    method: str
    include: Sequence[str]
    exclude: Sequence[str]
    views: Sequence[str]
    dtype: str
    max_shard_size: str
    layers_only: bool
    skip_bad: bool
    device: str


@dataclass(frozen=True)
class DecompositionPlan:
    """What `decompose` would do.

    Attributes
    ----------
    checkpoint : Path
        What would be decomposed.
    layers : tuple of LayerPlan
        In file order.
    left_whole : mapping of str to str
        Every other tensor with the reason.
    output_bytes : int
        Bytes to be written (an upper bound where the spectrum decides the rank).
    peak_memory_bytes : int
        Estimate of the largest anonymous memory.
    """

    checkpoint: Path
    layers: tuple[LayerPlan, ...]
    left_whole: Mapping[str, str]
    output_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class DecomposeResult:
    """What `decompose` did.

    Attributes
    ----------
    output : Path
        The factor checkpoint.
    config : FactorConfig
        As written to ``svf_config.json``.
    layer_seconds : mapping of str to float
        Time that each decomposition took.
    seconds : float
        Wall time in all.
    peak_memory_bytes : int
        Largest resident memory, mapped files included.
    dropped : mapping of str to int
        What the checkpoint holds and the factors do not, with bytes: entries of a pickle beside
        the tensors, and files beside the weights.
    """

    output: Path
    config: FactorConfig
    layer_seconds: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    dropped: Mapping[str, int] = field(default_factory=dict)


def plan(
    checkpoint: str | os.PathLike[str],
    *,
    progress: Progress = SILENT,
    **options: Unpack[DecomposeOptions],
) -> DecompositionPlan:
    """Say what `decompose` would do; reads no tensor.

    Parameters are those of `decompose`.
    """
    settings = _parse(options)
    with open_checkpoint(checkpoint) as source:
        return _plan(source, settings)


def decompose(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Unpack[DecomposeOptions],
) -> DecomposeResult:
    """Decompose the layers of a checkpoint into a factor checkpoint.

    Parameters
    ----------
    checkpoint : path-like or str
        A file, a folder (with or without an index) or a hub id.
    output : path-like
        Folder to write.
    resume : bool
        Continue where an interrupted run of the same options on the same checkpoint stopped.
    force : bool
        Replace an existing output once the new one is complete.
    progress : Progress
        Told how far the work is.
    rank : str
        ``"full"``, a count, a fraction of the short side (``"0.25"``), or ``"energy:0.99"``: the
        smallest rank that keeps this share of the sum of squares.
    method : {"auto", "exact", "randomized"}
        ``auto`` takes the fastest way that passes its checks.
    include, exclude : sequence of str
        Globs of tensor names.
    views : sequence of str
        ``"GLOB=batch"`` for 3-D tensors that are a batch of matrices.
    dtype : {"float32", "bfloat16", "float16"}
        Storage of ``U`` and ``Vh``; ``S`` is always float32.
    max_shard_size : str
        Where a new shard begins, such as ``"5GB"``.
    layers_only : bool
        Leave out the tensors that are not decomposed.
    skip_bad : bool
        Leave layers with NaN or infinity whole instead of stopping.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.

    Returns
    -------
    DecomposeResult

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    NumericalError
        If selected weights hold NaN or infinity; all of them are named.
    UsageError
        If options contradict each other or the output exists.
    """
    started = time.perf_counter()
    settings = _parse(options)
    with open_checkpoint(checkpoint) as source, joined_processes() as processes:
        planned = _plan(source, settings)
        if processes.first:
            source.tell(progress)
            for warning in _emptiness(source, planned):
                progress.warn(warning)
        target = Path(output)
        with _shared_output(processes, source, target, force=force, resume=resume) as partial:
            run = Factorisation(
                source=source,
                layers=planned.layers,
                left_whole=planned.left_whole,
                settings=settings,
                target=target,
                partial=partial,
                processes=processes,
                progress=progress,
            )
            config, layer_seconds = run.run(resume=resume)
            dropped = source.dropped()
    return DecomposeResult(
        output=target,
        config=config,
        layer_seconds=layer_seconds,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        dropped=dropped,
    )


def _emptiness(source: Checkpoint, planned: DecompositionPlan) -> Iterator[str]:
    """Say what is missing from a checkpoint in which little or nothing can be decomposed."""
    empty = [name for name, info in source.infos.items() if info.numel == 0]
    weights = [name for name in empty if name.endswith("weight")]
    if weights:
        yield (
            f"{source.path}: {counted(len(weights), 'tensors', 'are', of=len(source.infos))} "
            f"weights without a value ({shortlist(weights, 3)}), as a model saved under ZeRO-3 or "
            "FSDP has them whose parts were not gathered. Save it again from gathered weights."
        )
    if not planned.layers:
        reasons = Counter(planned.left_whole.values()).most_common(3)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons)
        found = f"all {len(source.infos)} tensors are left whole ({listed})"
        yield (
            f"{source.path}: no layer is decomposed, "
            + (f"{found}. --include chooses others." if source.infos else "it holds no tensor.")
        )


@contextmanager
def _shared_output(
    processes: Processes, source: Checkpoint, target: Path, *, force: bool, resume: bool
) -> Iterator[Path]:
    """Open one partial folder for all processes; it stays for --resume once a layer is in it."""
    with ExitStack() as stack:

        def claim() -> Path:
            partial = stack.enter_context(
                replace_output(
                    target, force=force, inputs=[source.path], keep_partial=True, resume=resume
                )
            )
            with write_errors(partial):
                partial.mkdir(exist_ok=True)
            return partial

        partial = processes.once(claim)
        try:
            yield partial
        except BaseException:
            if processes.first and not LayerSpool(partial, ()).holds_layers:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _parse(options: DecomposeOptions) -> FactoriseSettings:
    method, dtype = options.get("method", "auto"), options.get("dtype", "float32")
    _check_choice("--method", method, METHODS)
    check_dtype(dtype)
    return FactoriseSettings(
        rank=parse_rank(options.get("rank", "full")),
        method=cast(Method, method),
        selection=Selection(
            include=tuple(options.get("include", ())),
            exclude=tuple(options.get("exclude", ())),
            views=tuple(map(_parse_view, options.get("views", ()))),
        ),
        dtype=dtype_named(dtype),
        max_shard_bytes=parse_size(options.get("max_shard_size", "5GB")),
        layers_only=options.get("layers_only", False),
        skip_bad=options.get("skip_bad", False),
        device=pick_device(options.get("device", "auto")),
    )


def _check_choice(option: str, found: str, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise UsageError(no_such(f"{option}:", found, allowed))


def _parse_view(text: str) -> tuple[str, Any]:
    glob, separator, view = text.rpartition("=")
    if not separator or view not in ("batch", "matrix"):
        raise UsageError(f"--view: {text!r}, expected GLOB=batch or GLOB=matrix")
    return glob, view


def _plan(source: Checkpoint, settings: FactoriseSettings) -> DecompositionPlan:
    chosen, left = select(source.infos, settings.selection, config=source.config)
    layers = []
    for choice in chosen:
        info = source.infos[choice.name]
        matrix = matrix_shape(info.shape, choice.view)
        layers.append(LayerPlan(info, choice, matrix, settings.rank.fixed(*matrix[-2:])))
    kept = [] if settings.layers_only else [source.infos[one.name] for one in left]
    check_storable(
        kept, where=str(source.path), way_out="Keep the layers alone with --layers-only."
    )
    check_names(
        (one.info.name for one in layers), (one.name for one in kept), where=str(source.path)
    )
    return DecompositionPlan(
        checkpoint=source.path,
        layers=tuple(layers),
        left_whole={one.name: one.reason for one in left},
        output_bytes=sum(one.nbytes for one in kept) + sum(one.factor_bytes for one in layers),
        peak_memory_bytes=max(
            peak_memory([one.job for one in layers], settings.rank)
            + max((storing_bytes(one, settings.dtype) for one in layers), default=0),
            PROCESS_BYTES + examination_bytes(source),
        ),
    )
