"""What happened to a checkpoint in one sentence: what was compared, and what changed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from svftool.auditing import Comparison, Row, Unread
from svftool.auditing.verdicts import (
    BROKEN,
    CHANGED,
    FULL,
    LOW_RANK,
    QUANTISED,
    REARRANGED,
    ROUNDING,
    SCREENED,
    SPECTRUM_ONLY,
    UNDECIDED,
    UNRELATED,
    UNTOUCHED,
)
from svftool.report.inspect.directions import finding

_WAYS = {
    FULL: "in many directions at once",
    SCREENED: "in many directions or in ways that a screen cannot tell",
    REARRANGED: "by rearranging (permuted, sign-flipped or rotated)",
    UNRELATED: "beyond recognition (retrained, or another model)",
    ROUNDING: "by rounding alone",
    QUANTISED: "by quantisation alone",
    BROKEN: "to values that are not finite, or to zeros",
}


_LAST = (CHANGED, ROUNDING, QUANTISED)


def headline(one: Comparison) -> str:
    """Say what was compared, then what changed and by what.

    Parameters
    ----------
    one : Comparison
        Of a base and a fine-tune.

    Returns
    -------
    str
        Such as "40 of 41 tensors compared (1 only in the base); 24 changed, all by updates of
        rank 8 that hold 99 % of the change".
    """
    said = f"{_coverage(one)}; {_changes([*one.rows, *one.codes])}"
    for edit in () if one.directions is None else one.directions.edits:
        said = f"{said}; directional edit: {finding(edit)}"
    if one.screened:
        said = f"{said}; {_NOT_LOOKED_AT}"
    if one.verdict is None or one.verdict.name != UNDECIDED:
        return said
    left = len(one.coverage.not_compared)
    return f"{left} {'tensor' if left == 1 else 'tensors'} not compared; {said}"


_NOT_LOOKED_AT = "screened: singular values and vectors of the base were not looked at"


def _coverage(one: Comparison) -> str:
    done, total = one.coverage.compared, one.coverage.total
    tensors = "tensor" if total == 1 else "tensors"
    if done == total:
        return f"all {total} {tensors} compared" if total > 1 else "1 tensor compared"
    left = ", ".join(f"{count} {why}" for why, count in _reasons(one.coverage.not_compared, one))
    return f"{done} of {total} {tensors} compared ({left})"


def _reasons(left: Sequence[Unread], one: Comparison) -> Iterator[tuple[str, int]]:
    base, tuned = set(one.unmatched_base), set(one.unmatched_tuned)
    counts = {
        "of another shape": sum(item.in_two_shapes for item in left),
        "only in the base": sum(item in base and not item.in_two_shapes for item in left),
        "only in the fine-tune": sum(item in tuned and not item.in_two_shapes for item in left),
    }
    rest = [item for item in left if item not in base and item not in tuned]
    counts["left out as asked"] = sum(not item.wanted for item in rest)
    counts["not comparable"] = sum(item.wanted for item in rest)
    return ((why, count) for why, count in counts.items() if count)


def _changes(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.verdict is not None and row.verdict.name != UNTOUCHED:
            groups.setdefault(row.verdict.name, []).append(row)
    changed = sum(map(len, groups.values()))
    if not changed:
        return "none changed"
    # Matrices before what is small, then the many before the few.
    ways = sorted(groups.items(), key=lambda item: (item[0] in _LAST, -len(item[1])))
    if len(ways) == 1:
        whole = "all " if changed > 1 else ""
        return f"{changed} changed, {whole}{_way(*ways[0])}"
    return f"{changed} changed: " + ", ".join(f"{len(of)} {_way(name, of)}" for name, of in ways)


def _way(verdict: str, rows: Sequence[Row]) -> str:
    if verdict == LOW_RANK:
        ranks = sorted({row.verdict.rank or 0 for row in rows if row.verdict is not None})
        said = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"by updates of rank {said} that hold {_kept(rows)} of the change"
    if verdict == SPECTRUM_ONLY:
        if all(row.value("svf_share") is None for row in rows):
            return "by their singular values alone"
        return f"by their singular values alone, which hold {_spectral(rows)} of the change"
    if verdict == CHANGED:
        return _small(rows)
    return _WAYS.get(verdict, verdict)


def _small(rows: Sequence[Row]) -> str:
    codes = sum(row.by_bytes for row in rows)
    kinds = ["norms, biases or buffers"] if codes < len(rows) else []
    return " and ".join([*kinds, *(["codes, by their bytes"] if codes else [])])


def _kept(rows: Sequence[Row]) -> str:
    found = [row.evidence for row in rows if row.evidence is not None]
    return _share([(1.0 - one.tail / one.change_energy) for one in found if one.change_energy])


def _spectral(rows: Sequence[Row]) -> str:
    return _share([share for row in rows if (share := row.value("svf_share")) is not None])


def _share(shares: Sequence[float]) -> str:
    """Write the least of some shares: so much holds of every tensor."""
    least = min(shares, default=1.0)
    return "all" if least >= 0.9995 else f"{int(100 * least + 1e-9)} %"
