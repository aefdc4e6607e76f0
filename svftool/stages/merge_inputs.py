"""What goes into a merge of many: the base, and fine-tunes in whatever form, as changes of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from svftool.auditing import AuditSource, Counterparts, Tuned, counterparts, open_source
from svftool.checkpoints import Checkpoint, class_labels, open_checkpoint
from svftool.errors import CheckpointError, FactorsError, ModelError, counted, shortlist
from svftool.factors import FactorStore, TunedFile, check_tuned, is_factors, open_factors, rebuild
from svftool.factors.stated import read_stated
from svftool.files.side_files import named
from svftool.numerics.tall import cuts
from svftool.processes import Processes
from svftool.progress import Progress
from svftool.stages.adapt import base_of
from svftool.stages.changes import BothSides, Survey, survey_of

_PART = 1 << 16

_SINGLE = {torch.float32, torch.float16, torch.bfloat16}

KINSHIP = 0.5
"""Cosine of two checkpoints below which they are taken to have different bases.

With norms alike it means that the change is as large as the weights. Fine-tunes of one base are
above 0.9; networks trained apart are near 0.
"""


@dataclass(frozen=True)
class MergeBase:
    """What the changes are measured from.

    Attributes
    ----------
    checkpoint : Checkpoint
    source : AuditSource
        The same, as fine-tunes are held against it.
    store : FactorStore or None
        Its factors, where they were named: tuned files need them.
    """

    checkpoint: Checkpoint
    source: AuditSource
    store: FactorStore | None


def open_merge_base(
    stack: ExitStack,
    path: str | os.PathLike[str],
    moved: str | os.PathLike[str] | None,
    progress: Progress,
) -> MergeBase:
    """Open a checkpoint, or the one that factors belong to.

    Parameters
    ----------
    stack : ExitStack
        Closes it.
    path : path-like
        A checkpoint or factors.
    moved : path-like, optional
        Where the checkpoint of factors is now.
    progress : Progress
    """
    if not is_factors(path):
        checkpoint = stack.enter_context(open_checkpoint(path))
        return MergeBase(checkpoint, base_of(checkpoint), None)
    store = stack.enter_context(open_factors(path))
    checkpoint = stack.enter_context(store.open_base(moved, progress=progress))
    source = replace(base_of(checkpoint), fingerprint=lambda progress: store.base_fingerprint)
    return MergeBase(checkpoint, source, store)


@dataclass(frozen=True)
class MergeInput:
    """One fine-tune and its weight.

    Attributes
    ----------
    path : Path
        What was named.
    weight : float
    pair : BothSides
        The fine-tune beside the base.
    survey : Survey
        What it changes.
    """

    path: Path
    weight: float
    pair: BothSides
    survey: Survey

    @property
    def source(self) -> AuditSource:
        """The fine-tune."""
        return self.pair.side.source

    @property
    def dense(self) -> bool:
        """Whether it holds weights; adapters and tuned files hold changes."""
        return self.source.tuned is None and self.source.lora is None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the rows of its head, where it says any."""
        source = self.source
        if source.tuned is not None:
            return source.tuned.classes
        stated = read_stated(source.file.metadata) if isinstance(source.file, Checkpoint) else None
        return named_classes(source) if stated is None else stated.classes

    def answers(self, name: str) -> bool:
        """Whether it says what a tensor of the base is: what an adapter leaves out is unchanged."""
        side = self.pair.side
        held = name in side.names and (not self.dense or side.holds(name))
        return held or self.pair.common_rows(name) is not None

    def changes(self, name: str) -> bool:
        """Whether it changes a tensor of the base."""
        return name in self.survey.squares

    def delta(self, name: str, weight: Tensor) -> Tensor:
        """Return the change of a tensor times the input's weight, in float32.

        Parameters
        ----------
        name : str
            One that it changes, or answers for.
        weight : Tensor
            The base's values.
        """
        found = self.pair.read(name, weight)
        if found is None:
            return torch.zeros(weight.shape, dtype=torch.float32)
        formed, other = found.whole_change, found.weight
        result = torch.empty(weight.shape, dtype=torch.float32)
        flat, start = result.view(-1), weight.reshape(-1)
        values = (other if formed is None else formed).reshape(-1)  # type: ignore[union-attr]
        # A difference in float32 is the one in float64, rounded: no need to form that.
        plain = formed is None and self.weight == 1.0 and {values.dtype, start.dtype} <= _SINGLE
        for part in cuts(len(flat), _PART):
            if plain:
                torch.sub(values[part].float(), start[part].float(), out=flat[part])
                if math.isfinite(float(flat[part].sum())):
                    continue
            change = values[part].to(torch.float64, copy=True)  # it may be the file's own
            if formed is None:
                change -= start[part].double()
            # Infinity of a mask minus itself is no change.
            flat[part] = change.mul_(self.weight).nan_to_num_(0.0, 0.0, 0.0)
        return result

    @property
    def relative_change(self) -> float:
        """``|W' - W| / |W|`` over the matrices that it speaks of."""
        inner, one, two = self.survey.sums
        return math.sqrt(max(one - 2 * inner + two, 0.0) / one) if one > 0.0 else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of its matrices with the base's; 1 where there are none."""
        inner, one, two = self.survey.sums
        return inner / math.sqrt(one) / math.sqrt(two) if one > 0.0 and two > 0.0 else 1.0

    @property
    def resized(self) -> list[str]:
        """Matrices with more or fewer rows, such as a vocabulary, whose common rows are merged."""
        return [name for name in self.survey.squares if self.pair.common_rows(name) is not None]


def named_classes(source: AuditSource) -> tuple[str, ...] | None:
    """Return the classes that a configuration names; None where it only numbers them."""
    try:
        classes = class_labels(source.config or {})
    except ModelError:  # names that nothing can read are none
        return None
    unnamed = classes is None or all(re.fullmatch(r"LABEL_\d+", one) for one in classes)
    return None if unnamed else classes


def open_merge_inputs(
    stack: ExitStack,
    base: MergeBase,
    given: Sequence[tuple[Path, float]],
    *,
    other_base: bool,
    processes: Processes,
    progress: Progress,
) -> list[MergeInput]:
    """Open fine-tunes, match their names with the base's, and look at every change once.

    Parameters
    ----------
    stack : ExitStack
        Closes them.
    base : MergeBase
    given : sequence of (Path, float)
        Each with its weight.
    other_base : bool
        Whether one may be all but unrelated to the base.
    processes : Processes
        Share the looking.
    progress : Progress

    Raises
    ------
    CheckpointError
        If one has nothing in common with the base, or has another one.
    FactorsError
        If a tuned file comes without factors.
    NumericalError
        If one holds NaN or infinity where the base does not.
    """
    pairs = []
    for path, weight in given:
        source = stack.enter_context(open_source(path))
        for warning in dict.fromkeys(source.warnings):
            progress.warn(warning)
        pairs.append((path, weight, BothSides(base.source, _beside(base, source, progress))))
    inputs = []
    for path, weight, pair in pairs:
        one = MergeInput(path, weight, pair, survey_of(pair, progress, processes))
        if one.dense and not other_base:
            _refuse_other_base(base, one)
        inputs.append(one)
        for name in one.resized:
            rows = pair.common_rows(name)
            progress.note(f"{path}: {name}: its first {rows} rows, which the base has, are merged")
    return inputs


def _beside(base: MergeBase, source: AuditSource, progress: Progress) -> Counterparts:
    tuned, lora = source.tuned, source.lora
    if lora is not None and lora.unused:
        raise CheckpointError(
            f"{lora.path}: {counted(len(lora.unused), 'tensors', 'are')} understood in no way "
            f"({shortlist(lora.unused, 3)}), expected an adapter of layers. Merge it with the "
            "program that made it."
        )
    if tuned is None:
        return counterparts(base.source, source, progress)
    if base.store is None:
        raise FactorsError(
            f"{tuned.path}: a tuned file, and {base.source.path} is a checkpoint, expected its "
            "factors. Make them with 'svftool decompose' and name them in place of the base."
        )
    check_tuned(tuned, base.store)
    side = counterparts(base.source, source, progress)
    return replace(
        side, changes={name: partial(_spectral, base.store, tuned, name) for name in tuned.S}
    )


def _spectral(store: FactorStore, tuned: TunedFile, name: str, weight: Tensor) -> Tuned:
    """Return ``U diag(S - S_base) Vh``, what a tuned file changes in a layer."""
    layer = store.layers[name]
    change = rebuild(
        store.read(name),
        tuned.delta(name),
        shape=tuple(weight.shape),
        dtype=torch.float64,
        view=layer.view,
    )
    return Tuned(change=change)


def _refuse_other_base(base: MergeBase, one: MergeInput) -> None:
    if one.cosine < KINSHIP:
        raise CheckpointError(
            f"{one.path}: its matrices have a cosine of {one.cosine:.2f} with those of "
            f"{base.source.path} and differ by {one.relative_change:.0%} of them, expected a "
            f"fine-tune of it, {KINSHIP} or more. Name the base that it was tuned from, or merge "
            "all the same with --allow-other-base."
        )


@dataclass(frozen=True)
class Absent:
    """What one input does not have of the base, and what it has beside it.

    Attributes
    ----------
    missing : tuple of str
        Tensors of the base that the input does not have, or has in another shape.
    extra : mapping of str to int
        Its own tensors without a place in the base, with their bytes; they are left out.
    """

    missing: tuple[str, ...]
    extra: dict[str, int]


def absent_from(one: MergeInput, placed: set[str], progress: Progress) -> Absent:
    """Say what of an input is missing and what is left out.

    Parameters
    ----------
    one : MergeInput
    placed : set of str
        Names in the input that are used otherwise, such as those of heads.
    progress : Progress
    """
    side = one.pair.side
    rows = {side.misshapen[name] for name in one.resized}
    missing = (
        tuple(n for n in one.pair.before.infos if not one.answers(n) and n not in placed)
        if one.dense
        else ()
    )
    extra = {}
    for unread in side.tuned_only:
        if unread.name in rows or unread.name in placed:
            continue
        info, lora = one.source.infos.get(unread.name), one.source.lora
        size = info.nbytes if info else lora.bytes_of(unread.name) if lora else 0
        extra[unread.name] = size
    if missing:
        progress.warn(
            f"{one.path}: has no {shortlist(missing, 3)} ({counted(len(missing), 'tensors')}) as "
            "the base has them; the other inputs are merged there"
        )
    if extra:
        progress.warn(f"{one.path}: left out, as the base has no place: {named(extra)}")
    return Absent(missing, extra)
