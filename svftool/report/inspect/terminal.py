"""An audit for people, in the width of their terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from svftool.auditing import (
    VERDICTS,
    AuditResult,
    Comparison,
    Held,
    Row,
    Trajectory,
    Unread,
    Verdict,
    metric_key,
    metric_name,
)
from svftool.auditing.verdicts import CHANGED, UNTOUCHED
from svftool.errors import counted
from svftool.report.inspect.directions import directions
from svftool.report.inspect.gates import gates
from svftool.report.inspect.headline import headline
from svftool.report.inspect.marks import (
    COLOURS,
    bar,
    block_of,
    largest_of,
    number,
    part_of,
    sparkline,
)
from svftool.report.inspect.unread import unmatched
from svftool.report.names import Names, distinct_paths
from svftool.report.table import NameTable
from svftool.report.text import plain_table, safe, shape

MOST_ROWS = 40
"""Rows beyond which matrices are gathered by blocks, and blocks are counted."""

BAR_WIDTH = 6
SPARK_WIDTH = 8
_MARKS = {"high": "", "medium": " ?", "low": " ??"}
_EXPLAINED = {
    "weight_drift": "weight drift: ‖∆W‖ / ‖W‖",
    "relative_drift": "spectral drift: ‖∆S‖ / ‖S‖",
}


@dataclass(frozen=True)
class Shown:
    """What of a result is shown.

    Attributes
    ----------
    sort : str
        Metric by which rows fall.
    top : int or None
        Rows to show; those that fit a screen, or their blocks, where it is not given.
    group : bool
        One line a block of the network, however few there are.
    every : bool
        One line a matrix, however many there are, those that are untouched too.
    """

    sort: str = "weight_drift"
    top: int | None = None
    group: bool = False
    every: bool = False


USUAL = Shown()


def view(result: AuditResult, shown: Shown = USUAL, *, held: Sequence[Held] = ()) -> RenderableType:
    """Return the result for people.

    Parameters
    ----------
    result : AuditResult
    shown : Shown
        What of it.
    held : sequence of Held
        What gates and a policy held.
    """
    shown = replace(shown, sort=metric_key(shown.sort))
    parts: list[RenderableType] = []
    for one in result.comparisons:
        drawn = _alone if one.tuned is None else _compared
        parts += ["", *drawn(one, shown)]
    if result.trajectory is not None:
        parts += ["", *_trajectory(result.trajectory)]
    if held:
        parts += ["", *gates(held, several=len(result.comparisons) > 1)]
    return Group(*parts[1:])


def _compared(one: Comparison, shown: Shown) -> Iterator[RenderableType]:
    yield _title(one)
    if one.verdict is not None:
        yield from _verdict(one, one.verdict)
    rows = _sorted(one.matrices, shown.sort)
    listed = rows if shown.every else [row for row in rows if not _still(row)]
    if listed:
        yield ""
        yield from _listed_rows(one, listed, shown, untouched=len(rows) - len(listed))
    yield from unmatched(one, every=shown.every)
    if one.directions is not None:
        yield ""
        yield from directions(one.directions)
    yield ""
    yield from _others(one)


def _still(row: Row) -> bool:
    return row.verdict is not None and row.verdict.name == UNTOUCHED


def _title(one: Comparison) -> Text:
    paths = [path for path in (one.base, one.tuned) if path is not None]
    first, *rest = distinct_paths(paths)
    text = Text().append(first, "bold")
    if one.tuned is not None:
        text.append(" → ").append((rest or [first])[0], "bold")
    return text


def _verdict(one: Comparison, verdict: Verdict) -> Iterator[Text]:
    said = verdict.evidence if one.tuned is None else headline(one)
    colour = COLOURS[verdict.name]
    yield Text(verdict.text, f"bold {colour}".replace("bold bold", "bold")).append(
        f": {said}", "default not bold not dim"
    )
    yield Text(f"({VERDICTS[verdict.name]}; {verdict.confidence} confidence)", "dim")


def _sorted(rows: Sequence[Row], sort: str) -> list[Row]:
    """Sort by falling metric; broken rows, which have none, come first."""

    def key(row: Row) -> tuple[bool, float]:
        broken = row.verdict is not None and row.verdict.name == "broken"
        value = row.value(sort)
        return not broken, float("inf") if value is None else -value

    return sorted(rows, key=key)


def _listed_rows(
    one: Comparison, rows: list[Row], shown: Shown, *, untouched: int
) -> Iterator[RenderableType]:
    """Draw a line a matrix, or a line a block where these would be too many; count the rest."""
    many = len(rows) > MOST_ROWS and shown.top is None and not shown.every
    blocks = shown.group or many
    most = len(rows) if shown.every else shown.top or MOST_ROWS
    table, count = _blocks(one, rows, shown) if blocks else _rows(rows, most, shown.sort)
    yield table
    left = []
    if blocks:
        left.append(f"{counted(len(rows), 'matrices')} in {counted(count, 'blocks')}")
    if count > most:
        left.append(f"and {count - most} more {'blocks' if blocks else 'matrices'}")
    if untouched:
        left.append(f"{untouched} {'matrix' if untouched == 1 else 'matrices'} untouched")
    if left:
        yield Text(f"{', '.join(left)} (--all lists each)", "dim")
    doubts = {row.verdict.confidence for row in rows if row.verdict is not None} - {"high"}
    yield _legend(
        _explained(shown.sort),
        "bars: against the largest",
        "svf share: part of the change that singular values alone can make",
        "" if blocks else "∆S: change along the singular directions, largest first",
        "?, ??: medium, low confidence" if doubts and not blocks else "",
        table.names.dropped,
    )


def _rows(rows: Sequence[Row], most: int, sort: str) -> tuple[NameTable, int]:
    count, rows = len(rows), rows[:most]
    table = NameTable(Names(row.name for row in rows), gap=1)
    table.column(_label(sort), right=True, width=6)
    table.column("", width=BAR_WIDTH)
    table.column("svf share", right=True)
    table.column("∆S", width=SPARK_WIDTH)
    table.column("verdict")
    largest = largest_of(row.value(sort) for row in rows)
    for row in rows:
        table.row(row.name, _cells(row, sort, largest))
    return table, count


def _explained(sort: str) -> str:
    return _EXPLAINED.get(sort, "")


def _label(metric: str) -> str:
    return metric_name(metric).replace("_", " ")


def _legend(*parts: str) -> Text:
    return Text("; ".join(part for part in parts if part), "dim")


def _cells(row: Row, sort: str, largest: float) -> Iterator[Text]:
    value, verdict = row.value(sort), row.verdict
    colour = "" if verdict is None else COLOURS[verdict.name]
    yield Text(number(value))
    yield Text(bar(part_of(value, largest), BAR_WIDTH), colour)
    yield _percent(row.value("svf_share"))
    yield Text(_spectral_change(row), colour)
    yield Text("" if verdict is None else verdict.text + _MARKS[verdict.confidence], colour)


def _percent(share: float | None) -> Text:
    return Text("–" if share is None else f"{share:.0%}")


def _spectral_change(row: Row) -> str:
    """Draw how much each stretch of singular values changed, the largest values on the left."""
    if row.curves is None or row.curves.tuned is None:
        return ""
    change = row.curves.along
    moved = row.curves.tuned - row.curves.base if change is None else change
    return sparkline(np.abs(moved), SPARK_WIDTH)


def _blocks(one: Comparison, rows: Sequence[Row], shown: Shown) -> tuple[NameTable, int]:
    """Make a line a block: its largest value, and how many of its matrices have which verdict."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(block_of(row.name), []).append(row)
    most = shown.top or MOST_ROWS
    blocks = dict(list(found.items())[: None if shown.every else most])
    table = NameTable(Names(blocks), title="block", gap=1)
    table.column("matrices", right=True)
    table.column(f"largest {_label(shown.sort)}", right=True)
    table.column("", width=BAR_WIDTH)
    table.column("svf share", right=True)
    table.column("verdicts")
    largest = largest_of(row.value(shown.sort) for row in rows)
    for block, inside in blocks.items():
        table.row(block, _block_cells(one, inside, shown.sort, largest))
    return table, len(found)


def _block_cells(
    one: Comparison, inside: Sequence[Row], sort: str, largest: float
) -> Iterator[Text]:
    broken = next((row for row in inside if row.value(sort) is None), None)
    value = None if broken is not None else max(row.value(sort) or 0.0 for row in inside)
    counts = Counter(row.verdict.text for row in inside if row.verdict is not None)
    verdicts = [row.verdict.name for row in inside if row.verdict is not None]
    colour = COLOURS[Counter(verdicts).most_common(1)[0][0]] if verdicts else ""
    (said, count), *others = counts.most_common() or [("", 0)]
    rest = sum(more for _, more in others)
    yield Text(str(len(inside)))
    yield Text(number(value))
    yield Text(bar(part_of(value, largest), BAR_WIDTH), colour)
    yield _percent(replace(one, rows=tuple(inside)).total("svf_share"))
    many = said if not rest else f"{count} {said}, {rest} other"
    yield Text(many, colour)


def _others(one: Comparison) -> Iterator[RenderableType]:
    """Account for every tensor that has no line of its own."""
    vectors = [row for row in one.rows if not row.is_matrix]
    if vectors:
        moved = [row for row in vectors if row.value("weight_drift")]
        most = max(moved, key=lambda row: row.value("weight_drift") or 0.0, default=None)
        text = Text(f"{len(moved)} of {len(vectors)} norms, biases and buffers changed")
        if most is not None:
            drift = number(most.value("weight_drift"))
            text.append(f", most {safe(most.name)} (weight drift {drift})", "dim")
        yield text
    differ = [row for row in one.codes if row.verdict is not None and row.verdict.name == CHANGED]
    if differ:
        text = Text(
            f"codes that differ in their bytes: {len(differ)} of {len(one.codes)} ", "yellow"
        )
        yield text.append(f"({safe(differ[0].name)})", "dim")
    yield from _left_out(one.left_out)
    base, tuned = one.totals
    yield Text(f"{base} tensors in the base, {tuned} in the fine-tune", "dim")


def _left_out(items: Sequence[Unread]) -> Iterator[Text]:
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(safe(item.name))
    for reason, names in reasons.items():
        text = Text(f"left out: {len(names)} ")
        text.append(", ".join(names[:2]) + (" ..." if len(names) > 2 else ""), "dim")
        yield text.append(f" ({safe(reason)})")


def _alone(one: Comparison, shown: Shown) -> Iterator[RenderableType]:
    yield _title(one)
    if one.verdict is not None:
        yield from _verdict(one, one.verdict)
    known = one.matrices and one.matrices[0].value(shown.sort) is not None
    rows = _sorted(one.matrices, shown.sort if known else "spectral_norm")
    most = len(rows) if shown.every else shown.top or MOST_ROWS
    table = NameTable(Names(row.name for row in rows[:most]), gap=1)
    for title in ("matrix", "norm", "stable rank", "effective rank"):
        table.column(title, right=True)
    table.column("", width=BAR_WIDTH)
    table.column("S", width=SPARK_WIDTH)
    for row in rows[:most]:
        table.row(row.name, _spectrum_cells(row))
    yield table
    if len(rows) > most:
        yield Text(f"and {len(rows) - most} more matrices (--all lists them)", "dim")
    yield _legend(
        "norm: largest singular value",
        "bars: effective rank against the short side",
        "S: the singular values, largest first",
        table.names.dropped,
    )
    yield ""
    yield from _left_out(one.left_out)
    yield Text(f"{counted(len(rows), 'matrices')} of {one.totals[0]} tensors", "dim")


def _spectrum_cells(row: Row) -> Iterator[Text]:
    yield Text(shape(row.matrix or ()))
    if row.curves is None:
        yield from (Text("broken", "bold red"), Text(), Text(), Text(), Text())
        return
    effective = row.measured.base.get("effective_rank")
    yield Text(number(row.measured.base.get("spectral_norm")))
    yield Text(number(row.measured.base.get("stable_rank")))
    yield Text(number(effective))
    yield Text(bar((effective or 0.0) / max(1, len(row.curves.base)), BAR_WIDTH), "cyan")
    yield Text(sparkline(row.curves.base, SPARK_WIDTH), "cyan")


def _trajectory(one: Trajectory) -> Iterator[RenderableType]:
    count = len(one.matrices)
    among = f"the {count} matrices" if count != 1 else "the one matrix"
    yield Text("trajectory", "bold").append(
        f" (medians over {among} that any of them changed; the weight drift "
        + ("never falls)" if one.monotone else "falls somewhere)"),
        "not bold",
    )
    table = plain_table()
    table.padding = (0, 1, 0, 0)
    table.add_column("checkpoint", overflow="fold")
    for metric in one.metrics:
        table.add_column(_label(metric), justify="right", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    drift = one.metrics["weight_drift"]
    largest = largest_of(drift)
    for index, name in enumerate(distinct_paths(one.checkpoints)):
        cells = (number(values[index]) for values in one.metrics.values())
        table.add_row(Text(name), *cells, Text(bar(part_of(drift[index], largest), BAR_WIDTH)))
    yield table
