"""Two tuned files of one base held against each other, or one against where it started from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from svftool.auditing.compare import Found, compare_spectra, compare_vectors
from svftool.auditing.judging import judged, judged_codes, judged_row
from svftool.auditing.matching import say_shapes
from svftool.auditing.metrics import Metric
from svftool.auditing.results import Comparison, Row, Shape, Unread
from svftool.auditing.ways import way_to_compare
from svftool.checkpoints import TensorInfo, dtype_name, matrix_shape
from svftool.errors import FactorsError
from svftool.factors import TunedFile
from svftool.factors.tuned import (
    PROBE_TOLERANCE,
    S_TOLERANCE,
    Probe,
    in_signs_of,
    movement,
)

WholeMatrix = Callable[[Tensor, Tensor], Found]
"""Compares two matrices that both files hold whole."""

_NO_BASE = "only one file holds it, and its base is not here"
_TWO_WAYS = "singular values in one file, whole in the other; its base is not here"
_NEEDS_FACTORS = (
    "holds scales of rows or columns, a low-rank remainder, or entries of a stack, which need the "
    "base; inspect each with its base"
)
_OTHER_VECTORS = "the files belong to factors with other singular vectors of this layer"
_OTHER_VALUES = "the files start from other singular values: they belong to other factors"


@dataclass(frozen=True)
class _Side:
    """One tuned file, or the state that it started from."""

    S: Mapping[str, Tensor]
    S_base: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    file: TunedFile
    parts: Mapping[str, Mapping[str, Tensor]]

    @property
    def names(self) -> dict[str, None]:
        return dict.fromkeys((*self.S, *self.whole))

    def shape(self, name: str) -> Shape | None:
        """Return the shape of what the file holds under a name; None where it holds nothing."""
        found = self.whole.get(name, self.S.get(name))
        return None if found is None else tuple(found.shape)


def compare_tuned(
    first: TunedFile, second: TunedFile, metrics: Sequence[Metric], matrix: WholeMatrix
) -> Comparison:
    """Compare two tuned files, or one with the singular values that it started from.

    A layer that only one of them tunes is as in the base in the other. Of two ranks the smaller
    one leaves the other's further singular values as they are.

    Parameters
    ----------
    first, second : TunedFile
        The same object twice compares it with its start.
    metrics : sequence of Metric
        What to compute.
    matrix : callable
        Compares two tensors that both files hold whole, as matrices.

    Raises
    ------
    FactorsError
        If the two belong to different bases.
    """
    if first.base_fingerprint != second.base_fingerprint:
        raise FactorsError(
            f"{second.path}: was trained on the base {second.base_fingerprint[:12]}, expected "
            f"{first.base_fingerprint[:12]} as {first.path}. Compare each with its own base."
        )
    alone = first is second
    before = _Side(
        first.S_base if alone else first.S,
        first.S_base,
        {} if alone else first.whole,
        first,
        {} if alone else first.parts,
    )
    after = _Side(second.S, second.S_base, second.whole, second, second.parts)
    rows: list[Row] = []
    lists: dict[str, list[Unread]] = {"base": [], "tuned": []}
    for name in before.names | after.names:
        found = _compared(name, before, after, metrics, matrix)
        if isinstance(found, Row):
            rows.append(found)
            continue
        shapes = before.shape(name), after.shape(name)
        for side, shape in zip(lists, shapes, strict=True):
            if shape is not None:
                lists[side].append(Unread(name, found, shapes=shapes))
    return judged(
        Comparison(
            base=first.path,
            tuned=second.path,
            kinds=("tuned", "tuned"),
            rows=tuple(row for row in rows if not row.by_bytes),
            codes=tuple(row for row in rows if row.by_bytes),
            unmatched_base=tuple(lists["base"]),
            unmatched_tuned=tuple(lists["tuned"]),
            totals=(len(before.names), len(after.names)),
            notes=("compared with the singular values that it started from",) if alone else (),
        )
    )


def _compared(
    name: str, before: _Side, after: _Side, metrics: Sequence[Metric], matrix: WholeMatrix
) -> Row | str:
    """Return the row of one name, or why there is none."""
    if name in before.whole and name in after.whole:
        return _compared_whole(name, before.whole[name], after.whole[name], matrix)
    if name in before.whole or name in after.whole:
        spectral = name in before.S or name in after.S
        return _TWO_WAYS if spectral else _NO_BASE
    spectra = _spectra(name, before, after)
    if isinstance(spectra, str):
        return spectra
    turned = _turned(name, before, after)
    if turned > PROBE_TOLERANCE:
        return _OTHER_VECTORS
    if (name in before.parts or name in after.parts) and not _equal(name, before, after):
        sides = _inner(name, spectra, before, after)
        if sides is None:
            return _NEEDS_FACTORS
        return judged_row(Row(name, "matrix"), matrix(*sides))
    found = compare_spectra(*spectra, sides=None, metrics=metrics)
    if turned and found.evidence is not None:
        # The same values on vectors that were rounded in another way make other weights.
        found = replace(found, evidence=replace(found.evidence, identical=False))
    return judged_row(Row(name, "batch" if spectra[0].ndim == 2 else "matrix"), found)


def _compared_whole(name: str, base: Tensor, tuned: Tensor, matrix: WholeMatrix) -> Row | str:
    if base.shape != tuned.shape:
        return say_shapes(tuple(base.shape), tuple(tuned.shape))
    infos = [TensorInfo(name, one.dtype, tuple(one.shape), "") for one in (base, tuned)]
    dtypes = tuple(dtype_name(one.dtype) for one in infos)
    row = Row(name, shape=infos[0].shape, dtype=dtypes)
    sides = matrix_shape(row.shape, "matrix") if len(row.shape) > 1 else (1, 1)
    way = way_to_compare(*infos, matrix=bool(base.numel()) and 1 not in sides)
    if way == "matrix":
        found = matrix(base.reshape(sides), tuned.reshape(sides))
        return judged_row(replace(row, view="matrix", matrix=sides), found)
    if way == "values":
        return judged_row(row, compare_vectors(base, tuned))
    return judged_codes(row, base, tuned) if way == "bytes" else way


def _spectra(name: str, before: _Side, after: _Side) -> tuple[Tensor, Tensor] | str:
    """Return singular values of both sides of one length, or why there are none."""
    starts = [side.S_base[name].double() for side in (before, after) if name in side.S]
    if starts[0].shape[:-1] != starts[-1].shape[:-1]:
        return say_shapes(tuple(starts[0].shape), tuple(starts[-1].shape))
    longest = max(starts, key=lambda one: one.shape[-1])
    shared = min(one.shape[-1] for one in starts)
    gap = (starts[0][..., :shared] - starts[-1][..., :shared]).abs().amax()
    if float(gap) > S_TOLERANCE * float(longest.abs().amax()):
        return _OTHER_VALUES
    first, second = (
        _extended(side.S[name].double(), longest) if name in side.S else longest
        for side in (before, after)
    )
    return first, second


def _turned(name: str, before: _Side, after: _Side) -> float:
    """Return the share of the changes that lies on other vectors; 0 for one and the same factors.

    Files of one base may belong to two decompositions of it. Where values are close to each other,
    the vectors of the two can be others altogether, and the same values mean other weights.
    """
    files = before.file, after.file
    both = name in before.S and name in after.S
    if not both or files[0].factors_fingerprint == files[1].factors_fingerprint:
        return 0.0
    rank = min(one.S[name].shape[-1] for one in files)
    deltas = [movement(one, name)[..., :rank] for one in files]
    moved = np.sqrt(np.square(deltas[0]) + np.square(deltas[1]))
    if not moved.any():
        return 0.0
    cut = [
        Probe(one.probes[name].left[..., :rank], one.probes[name].right[..., :rank])
        for one in files
    ]
    # Probes are rounded to half precision: that no difference is seen does not say there is none.
    return max(cut[0].mismatch(cut[1], moved), float(np.finfo(np.float64).tiny))


def _equal(name: str, before: _Side, after: _Side) -> bool:
    """Whether both sides hold the same numbers on the same factors."""
    ours, theirs = (side.parts.get(name, {}) for side in (before, after))
    same = before.file.factors_fingerprint == after.file.factors_fingerprint
    if not same or name not in before.S or name not in after.S or ours.keys() != theirs.keys():
        return False
    pairs = [(before.S[name], after.S[name]), *((ours[one], theirs[one]) for one in ours)]
    return all(torch.equal(one, other) for one, other in pairs)


def _inner(
    name: str, spectra: tuple[Tensor, Tensor], before: _Side, after: _Side
) -> tuple[Tensor, Tensor] | None:
    """Return M of both sides; None where the change does not lie in the singular basis alone.

    Orthonormal vectors on both sides change no norm and no singular value: M tells all that the
    weight would.
    """
    found = []
    for S, side in zip(spectra, (before, after), strict=True):
        parts = dict(side.parts.get(name, {}))
        if parts.keys() - {"index", "value"} or S.ndim > 1:
            return None
        M = torch.diag(S)
        if parts:
            if side is after and side.file is not before.file:
                parts = in_signs_of(side.file, name, before.file.probes.get(name))
            k = side.S[name].shape[-1]
            index = parts["index"].long()
            M.index_put_((index // k, index % k), parts["value"].double(), accumulate=True)
        found.append(M.float())
    return found[0], found[1]


def _extended(S: Tensor, start: Tensor) -> Tensor:
    return torch.cat((S, start[..., S.shape[-1] :]), dim=-1)
