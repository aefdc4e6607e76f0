"""Factor checkpoint + tuned files -> dense checkpoint, or one tuned file: a delta on the base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from svftool.adapters.layout_file import is_adapter, open_adapter
from svftool.checkpoints import (
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    Checkpoint,
    open_checkpoint,
    parse_size,
    replace_output,
)
from svftool.checkpoints.dtypes import dtype_named
from svftool.checkpoints.pickle_writer import rivals
from svftool.choices.dtypes import check_dtype
from svftool.choices.merging import parse_weighted
from svftool.errors import NumericalError, UsageError, counted, shortlist
from svftool.factors import (
    FactorStore,
    TunedFile,
    check_tuned,
    is_factors,
    open_factors,
    read_tuned,
)
from svftool.factors.dense import identical, verify_dense, write_dense, write_mixed
from svftool.factors.mixture import Expert, LayerChange, Mixture
from svftool.factors.stated import Stated, stated_by
from svftool.files.names import check_dense_name, is_tuned_name
from svftool.files.side_files import named
from svftool.progress import SILENT, Progress
from svftool.stages.adapt import base_of, fit_adapter

"""What `merge` can write floating numbers in."""

SETTINGS = ("image_size", "crop", "short_side", "mean", "std", "sequence_length", "ignore_index")
"""Settings of tasks on which a number depends that is measured on the weights."""

Weighted = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass(frozen=True)
class MergeResult:
    """What `merge` did.

    Attributes
    ----------
    output : Path
        The dense checkpoint, or the tuned file.
    layers : tuple of LayerChange
        Every decomposed layer, in file order.
    unchanged : int
        Tensors of the base that kept their bytes.
    added : tuple of str
        Tensors that the base does not have.
    replaced : tuple of str
        Tensors that were trained whole.
    verified : bool or None
        True where the result was read again and equals, bit for bit, what was derived anew (a
        difference is an error); None if not asked for.
    rebuilt_error : float or None
        Largest relative reconstruction error of a layer where the base was not used.
    clipped : mapping of str to int
        Values that overflowed their dtype and were clipped, by tensor.
    dropped : mapping of str to int
        What the base holds and the output does not, with bytes: entries of a pickle beside the
        tensors, and files beside the weights.
    mixed : bool
        The output is a tuned file.
    """

    output: Path
    layers: tuple[LayerChange, ...]
    unchanged: int
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    verified: bool | None
    rebuilt_error: float | None = None
    clipped: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    mixed: bool = False


def merge(
    factors: str | os.PathLike[str],
    tuned: Sequence[Weighted] = (),
    *,
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    without_base: bool = False,
    max_shard_size: str | None = None,
    verify: bool = False,
    allow_overflow: bool = False,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> MergeResult:
    """Fold tuned singular values and adapters into dense weights, or mix tuned files to one.

    Computes ``W + sum_i a_i D_i`` in float64, with ``D_i = U diag(S_i - S_base) Vh`` of a tuned
    file (with entries, scales and a remainder: `SpectralChange`) and ``s B A`` of an adapter, and
    rounds once to the weight's dtype. A layer that does not change keeps its bytes.

    Parameters
    ----------
    factors : path-like
        Factor checkpoint; for adapters alone the base itself in any format.
    tuned : sequence
        Tuned files and adapters in any layout, each a path, ``"PATH@WEIGHT"`` or a pair of path and
        weight.
    output : path-like
        ``.svf.safetensors`` writes a tuned file. ``.safetensors`` writes one dense file, ``.pt``,
        ``.pth``, ``.bin``, ``.th`` a pickle nested as the base, anything else a folder with the
        base's names, shards and side files.
    base : path-like, optional
        Where the base is, if not at its recorded place.
    without_base : bool
        Use ``U diag(S') Vh`` alone; what truncation dropped is lost.
    max_shard_size : str, optional
        Reshard, such as ``"5GB"``.
    verify : bool
        Read the result again and compare every tensor with one derived anew.
    allow_overflow : bool
        Clip values that their dtype cannot hold to its largest number, and count them.
    dtype : str, optional
        ``"float32"``, ``"bfloat16"`` or ``"float16"``: what floating numbers are written in; as in
        the base if left out, in float32 where the base stores them as codes.
    force : bool
        Replace an existing output once the new one is complete.
    progress : Progress
        Told how far the work is.

    Returns
    -------
    MergeResult

    Raises
    ------
    FactorsError
        If factors or tuned files are broken or do not belong together.
    CheckpointError
        If the base cannot be read or is another one.
    UsageError
        If options contradict each other, a weight is not finite, or the output exists.
    NumericalError
        If a value would be NaN, infinite, or overflow its dtype.
    """
    target = Path(output)
    written_in = _dtype(dtype, target)
    _check_options(target, tuned, base, without_base=without_base, shards=max_shard_size)
    parts = [parse_weighted(one) for one in tuned]
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    with ExitStack() as stack:
        store, checkpoint = _open(
            stack, factors, parts, base, without_base=without_base, progress=progress
        )
        mixed = is_tuned_name(target)
        experts, homeless = _experts(stack, parts, store, checkpoint, progress)
        if mixed:
            _refuse_adapters(experts, target)
        dropped = {} if mixed else _tell_dropped(checkpoint, target, progress)
        mixture = Mixture(
            store, checkpoint, experts, allow_overflow=allow_overflow, dtype=written_in
        )
        stated = _tell_unlike([one for one in experts if not is_of_adapter(one)], progress)
        inputs = [Path(factors), *(one.tuned.path for one in experts)]
        inputs += [] if checkpoint is None else [checkpoint.path]
        left: dict[str, int] = {}
        with replace_output(target, force=force, inputs=inputs) as partial:
            if mixed:
                changes, written = write_mixed(mixture, partial, progress)
                if verify:
                    _verify_mixed(written, partial, target)
            else:
                changes, left = write_dense(
                    mixture,
                    partial,
                    target=target,
                    max_bytes=shard_bytes,
                    progress=progress,
                    stated=stated,
                )
                if verify:
                    verify_dense(mixture, partial, target, progress)
    changed = {one.name for one in changes if one.changed}
    return MergeResult(
        output=target,
        layers=tuple(changes),
        unchanged=len(mixture.infos)
        - len(changed | mixture.rounded)
        - len(mixture.added)
        - len(mixture.replaced),
        added=mixture.added,
        replaced=mixture.replaced,
        verified=True if verify else None,
        rebuilt_error=None if mixed else mixture.rebuilt_error,
        clipped={one: mixture.clipped[one] for one in mixture.infos if one in mixture.clipped},
        dropped={**homeless, **dropped, **left},
        mixed=mixed,
    )


def _open(
    stack: ExitStack,
    factors: str | os.PathLike[str],
    parts: Sequence[tuple[Path, float]],
    base: str | os.PathLike[str] | None,
    *,
    without_base: bool,
    progress: Progress,
) -> tuple[FactorStore | None, Checkpoint | None]:
    """Open the factors with their base; adapters alone are merged into a checkpoint as it is."""
    if is_factors(factors) or not parts or not all(is_adapter(path) for path, _ in parts):
        store = stack.enter_context(open_factors(factors))
        if without_base:
            return store, None
        return store, stack.enter_context(store.open_base(base, progress=progress))
    if base is not None or without_base:
        option = "--without-base" if without_base else "--base"
        raise UsageError(
            f"{option}: {factors} is a checkpoint, expected factors for it. Leave the option out."
        )
    return None, stack.enter_context(open_checkpoint(factors))


def _experts(
    stack: ExitStack,
    parts: Sequence[tuple[Path, float]],
    store: FactorStore | None,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> tuple[list[Expert], dict[str, int]]:
    """Read tuned files and adapters; return them, and what of adapters has no place."""
    experts: list[Expert] = []
    homeless: dict[str, int] = {}
    for path, weight in parts:
        if not is_adapter(path):
            assert store is not None
            experts.append(Expert(check_tuned(read_tuned(path), store), weight))
            continue
        adapter = stack.enter_context(open_adapter(path))
        base = checkpoint or store
        assert base is not None
        for note in adapter.notes:
            progress.note(note)
        fitted = fit_adapter(base_of(base), adapter, weight)
        if fitted.dropped:
            progress.warn(f"{path}: left out, as the base has no place: {named(fitted.dropped)}")
        for note in fitted.notes:
            progress.note(note)
        for warning in fitted.warnings:
            progress.warn(warning)
        homeless |= fitted.dropped
        experts.append(fitted.expert)
    return experts, homeless


def _refuse_adapters(experts: Sequence[Expert], target: Path) -> None:
    for one in experts:
        if is_of_adapter(one):
            raise UsageError(
                f"{target}: a tuned file holds singular values, and {one.tuned.path} is an "
                "adapter, expected a dense output. Turn the adapter into a tuned file first: "
                "svftool convert"
            )


def is_of_adapter(one: Expert) -> bool:
    """Tell whether a part of a mixture is an adapter, which belongs to no factors."""
    return not one.tuned.base_fingerprint


def _dtype(name: str | None, target: Path) -> torch.dtype | None:
    """Return the dtype that was asked for.

    Raises
    ------
    UsageError
        If there is none of this name, or a tuned file is written.
    """
    if name is None:
        return None
    check_dtype(name)
    if is_tuned_name(target):
        raise UsageError(
            f"--dtype: {target} is a tuned file, which holds singular values, expected a dense "
            "output. Leave the option out."
        )
    return dtype_named(name)


def _check_options(
    target: Path, tuned: Sequence[Weighted], base: object, *, without_base: bool, shards: str | None
) -> None:
    """Refuse options that contradict each other or the output's name."""
    if without_base and base is not None:
        raise UsageError("--without-base and --base: give one of the two")
    if without_base and target.suffix in PICKLE_SUFFIXES:
        raise UsageError(
            f"{target}: a pickle is nested as its base, which --without-base leaves out, "
            "expected a folder or .safetensors"
        )
    if shards is not None and target.suffix in WEIGHT_SUFFIXES:
        raise UsageError(
            f"--max-shard-size: {target} is one file, which has no shards, expected a folder. "
            f"Write to {target.with_suffix('')}, or leave the option out."
        )
    check_dense_name(target, tuned=bool(tuned) and is_tuned_name(target))


def _tell_unlike(experts: Sequence[Expert], progress: Progress) -> Stated | None:
    """Return what the tuned files agree on; warn of settings in which they differ."""
    if not experts:
        return None
    stated = stated_by([(one.tuned, one.weight) for one in experts])
    unlike = [name for name in stated.unlike if name in SETTINGS]
    if unlike:
        found = "; ".join(
            f"{name.replace('_', ' ')} {' and '.join(map(str, stated.unlike[name]))}"
            for name in unlike
        )
        progress.warn(
            f"the tuned files were trained with different settings ({found}); none is handed on. "
            "Give them to svftool evaluate and predict"
        )
    return stated


def _verify_mixed(expected: TunedFile, partial: Path, target: Path) -> None:
    """Read a tuned file again and compare it, bit for bit, with what was to be written."""
    found = read_tuned(partial)
    pairs = [(found.S, expected.S), (found.S_base, expected.S_base), (found.whole, expected.whole)]
    pairs.append((_flat(found.parts), _flat(expected.parts)))
    wrong = [
        name
        for one, other in pairs
        for name in dict.fromkeys((*one, *other))
        if name not in one or name not in other or not identical(one[name], other[name])
    ]
    if wrong:
        raise NumericalError(
            f"{target}: {counted(len(wrong), 'tensors', 'differ')} from what was computed when "
            f"read back: {shortlist(wrong)}. Expected identical bytes; check the disk and the "
            "memory."
        )


def _flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return parts by the names that they have in a file; indices in one dtype."""
    return {
        f"{name}.{part}": value.long() if part == "index" else value
        for name, held in parts.items()
        for part, value in held.items()
    }


def _tell_dropped(base: Checkpoint | None, target: Path, progress: Progress) -> dict[str, int]:
    """Warn of entries of a pickled base that are not merged; return those left out."""
    if base is None:
        return {}
    for warning in base.warnings:
        progress.warn(warning)
    if target.suffix not in PICKLE_SUFFIXES or len(base.files) > 1:
        return dict(base.passed_over)
    left = rivals(base)
    if left:
        progress.warn(
            f"{target}: left out: {named(left)}; they are other weights of the model, which some "
            "loaders take in place of the merged ones"
        )
    return left
