"""How a fine-tune, in whatever form, answers for each tensor of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from svftool.adapters.adapter import Adapter
from svftool.auditing.adapters import Change, adapter_changes
from svftool.auditing.compare import Tuned
from svftool.auditing.matching import Matching, NamePair, match_names, say_shapes
from svftool.auditing.results import Shape, Unread
from svftool.auditing.sources import AuditSource
from svftool.auditing.spectral_changes import spectral_changes
from svftool.auditing.tying import say_untied
from svftool.auditing.ways import is_number
from svftool.checkpoints import TensorInfo
from svftool.errors import CheckpointError, FactorsError, shortlist
from svftool.factors import TunedFile
from svftool.numerics.products import products
from svftool.progress import Progress

_READABLE = 1 << 26
_SOME = 1 << 14
"""Entries up to which a tensor is read to tell whose counterpart it is."""


@dataclass(frozen=True)
class Counterparts:
    """A fine-tune seen from its base.

    Attributes
    ----------
    source : AuditSource
        The fine-tune.
    names : tuple of str
        Tensors of the base that have a counterpart, in the base's order. Tuned files and LoRA
        folders answer for every tensor: what they do not hold, they do not change.
    others : mapping of str to str
        Name in the fine-tune, by name in the base.
    base_only, tuned_only : tuple of Unread
        What cannot be compared, with the reason.
    misshapen : mapping of str to str
        Name in the fine-tune of what has another shape there, by name in the base.
    total : int
        Tensors of the fine-tune.
    notes : tuple of str
        How names were matched.
    warnings : tuple of str
        What the fine-tune does and its tensors do not say.
    changes : mapping of str to callable
        What forms the change of a tensor from the base's, by name in the base; other tensors are
        read.
    """

    source: AuditSource
    names: tuple[str, ...]
    others: Mapping[str, str]
    base_only: tuple[Unread, ...] = ()
    tuned_only: tuple[Unread, ...] = ()
    misshapen: Mapping[str, str] = field(default_factory=dict)
    total: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)

    def holds(self, name: str) -> bool:
        """Whether the fine-tune says anything of a tensor of the base."""
        return name in self.others

    def info(self, name: str) -> TensorInfo | None:
        """Return what is known of the counterpart without reading it."""
        return self.source.infos.get(self.others.get(name, ""))

    def spectra(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Singular values before and after, where that is how the fine-tune holds a layer."""
        tuned = self.source.tuned
        other = self.others.get(name)
        if tuned is None or other is None or other not in tuned.S or name in self.changes:
            return None
        return tuned.S_base[other], tuned.S[other]

    def read(self, name: str, base: Tensor) -> Tuned | None:
        """Read the counterpart of a tensor, or form its change; None where it is not changed."""
        other = self.others.get(name)
        if other is None:
            return None
        if name in self.changes:
            return self.changes[name](base)
        return Tuned(weight=self.source.read(other), quantised=self.source.quantised(other))


def counterparts(base: AuditSource, other: AuditSource, progress: Progress) -> Counterparts:
    """Find out how a fine-tune answers for each tensor of the base.

    Parameters
    ----------
    base, other : AuditSource
        Both open.
    progress : Progress
        Told of prefixes that were dropped, and of the fingerprint that tuned files need.

    Raises
    ------
    CheckpointError
        If the two have no tensor in common.
    FactorsError
        If a tuned file belongs to another base.
    """
    if other.tuned is not None:
        return _of_tuned(base, other, other.tuned, progress)
    found = _of_dense(base, other) if other.lora is None else _of_lora(base, other, other.lora)
    for note in found.notes:
        progress.note(note)
    for warning in found.warnings:
        progress.warn(warning)
    return found


def _of_dense(base: AuditSource, other: AuditSource) -> Counterparts:
    matching = match_names(
        base.infos, other.infos, partial(_likeness, base, other), partial(_numbers, base, other)
    )
    if matching.ties:
        raise CheckpointError(
            f"{other.path}: of its names and those of {base.path}, {matching.say_tie()}. "
            "Name the tensors of the fine-tune as the base does."
        )
    _refuse_strangers(base, other, matching)
    misshapen = {pair: _shapes(base, other, pair) for pair in matching.misshapen}
    return Counterparts(
        source=other,
        names=tuple(pair.base for pair in matching.pairs),
        others={pair.base: pair.tuned for pair in matching.pairs},
        base_only=(
            *(Unread(pair.base, say_shapes(*two), shapes=two) for pair, two in misshapen.items()),
            *(
                Unread(name, "not in the fine-tune", shapes=(base.infos[name].shape, None))
                for name in matching.base_only
            ),
        ),
        tuned_only=(
            *(Unread(pair.tuned, say_shapes(*two), shapes=two) for pair, two in misshapen.items()),
            *(
                Unread(name, "not in the base", shapes=(None, other.infos[name].shape))
                for name in matching.tuned_only
            ),
            *(
                Unread(
                    pair.tuned, f"holds the values of {pair.base}, in another place of the network"
                )
                for pair in matching.crossed
            ),
        ),
        misshapen={pair.base: pair.tuned for pair in matching.misshapen},
        total=len(other.infos),
        notes=matching.notes,
    )


def _likeness(
    base: AuditSource, other: AuditSource, name: str, theirs: str
) -> tuple[float, float] | None:
    """Return cosine and relative distance of two tensors; None where they are no numbers."""
    infos = base.infos[name], other.infos[theirs]
    if not all(is_number(one) and one.numel <= _READABLE for one in infos):
        return None
    found = products(base.read(name), other.read(theirs))
    norms = math.sqrt(found.first), math.sqrt(found.second)
    if not all(0.0 < norm < math.inf for norm in norms):
        return None
    return found.inner / norms[0] / norms[1], math.sqrt(found.apart) / norms[0]


def _numbers(base: AuditSource, other: AuditSource, name: str, theirs: bool) -> Tensor | None:
    """Return some numbers of a tensor, scaled to length 1; None where it has none."""
    side = other if theirs else base
    info = side.infos[name]
    if not is_number(info) or info.numel > _READABLE:
        return None
    flat = side.read(name).flatten()
    some = flat[:: max(1, len(flat) // _SOME)].double()
    norm = float(some.norm())
    return (some / norm).float() if 0.0 < norm < math.inf else None


def _refuse_strangers(base: AuditSource, other: AuditSource, matching: Matching) -> None:
    if matching.pairs:
        return
    if matching.misshapen:
        first = matching.misshapen[0]
        raise CheckpointError(
            f"{other.path}: every tensor that {base.path} has too is of another shape, such as "
            f"{first.tuned!r} with {say_shapes(*_shapes(base, other, first))}. "
            "Name a fine-tune of this base."
        )
    raise CheckpointError(
        f"{other.path}: no tensor in common with {base.path}, expected a fine-tune of it "
        f"(base has {shortlist(matching.base_only, 2) or 'none'}; this has "
        f"{shortlist(matching.tuned_only, 2) or 'none'}). Name a fine-tune of this base."
    )


def _shapes(base: AuditSource, other: AuditSource, pair: NamePair) -> tuple[Shape, Shape]:
    return base.infos[pair.base].shape, other.infos[pair.tuned].shape


def _of_tuned(
    base: AuditSource, other: AuditSource, tuned: TunedFile, progress: Progress
) -> Counterparts:
    missing = [name for name in tuned.S if name not in base.infos]
    if not missing and base.fingerprint(progress) != tuned.base_fingerprint:
        missing = ["its fingerprint is another"]
    if missing:
        raise FactorsError(
            f"{tuned.path}: belongs to another base than {base.path} ({shortlist(missing, 2)}), "
            f"expected {tuned.base_fingerprint[:12]}. Inspect it with its own base, or alone."
        )
    others = {name: name for name in tuned.S}
    strangers = []
    for name, value in tuned.whole.items():
        info, theirs = base.infos.get(name), tuple(value.shape)
        if info is None:
            strangers.append(Unread(name, "not in the base", shapes=(None, theirs)))
        elif info.shape != theirs:
            two = info.shape, theirs
            strangers.append(Unread(name, say_shapes(*two), shapes=two))
        else:
            others[name] = name
    gone = {one.name for one in strangers if one.name in base.infos}
    return Counterparts(
        source=other,
        names=tuple(name for name in base.infos if name not in gone),
        others=others,
        base_only=tuple(one for one in strangers if one.name in gone),
        tuned_only=tuple(strangers),
        total=len(tuned.S) + len(tuned.whole),
        changes=spectral_changes(base, tuned),
    )


def _of_lora(base: AuditSource, other: AuditSource, lora: Adapter) -> Counterparts:
    found = adapter_changes(base, lora)
    gone = {one.name for one in found.base_only}
    return Counterparts(
        source=other,
        names=tuple(name for name in base.infos if name not in gone),
        others=found.others,
        base_only=found.base_only,
        tuned_only=found.tuned_only,
        misshapen=found.misshapen,
        total=found.total,
        notes=found.notes,
        warnings=(*found.tying.warnings, *say_untied(lora, found.tying)),
        changes=found.changes,
    )
