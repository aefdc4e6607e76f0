"""An audit as a table for people, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.auditing import VERDICTS, AuditResult, Comparison, Row, Trajectory, Unread, Verdict
from svftool.auditing.policy import Violation
from svftool.auditing.verdicts import CHANGED, UNDECIDED
from svftool.report.inspect.marks import (
    COLOURS,
    bar,
    block_of,
    largest_of,
    number,
    part_of,
    sparkline,
)
from svftool.report.inspect.unread import unread
from svftool.report.text import display_names, plain_table, safe, shape, short

MOST_ROWS = 20
NAME_WIDTH = 24
BAR_WIDTH = 10
SPARK_WIDTH = 8
_MARKS = {"high": "", "medium": " ?", "low": " ??"}


def view(
    result: AuditResult,
    *,
    sort: str = "weight_drift",
    top: int | None = None,
    group: bool = False,
    failed: Sequence[Violation] = (),
) -> RenderableType:
    """Return the result for people.

    Parameters
    ----------
    result : AuditResult
    sort : str
        Metric by which rows fall.
    top : int, optional
        Rows to show; `MOST_ROWS` by default.
    group : bool
        Gather the rows of each block of the network.
    failed : sequence of Violation
        What gates and a policy found.
    """
    parts: list[RenderableType] = []
    for one in result.comparisons:
        shown = _alone if one.tuned is None else _compared
        parts += ["", *shown(one, sort, top or MOST_ROWS, group)]
    if result.trajectory is not None:
        parts += ["", *_trajectory(result.trajectory)]
    if failed:
        parts += ["", *_failed(failed)]
    return Group(*parts[1:])


def _compared(one: Comparison, sort: str, top: int, group: bool) -> Iterator[RenderableType]:
    assert one.tuned is not None
    yield _title(one)
    if one.verdict is not None:
        yield _headline(one.verdict)
    rows = _sorted(one.matrices, sort)
    if rows:
        yield ""
        yield _table(rows, sort, top, group)
    yield from _hidden(len(rows), top)
    yield ""
    yield from _others(one)


def _title(one: Comparison) -> Text:
    text = Text().append(safe(one.base.name), "bold")
    if one.tuned is not None:
        text.append(" → ").append(safe(one.tuned.name), "bold")
    return text


def _headline(verdict: Verdict) -> Text:
    colour = COLOURS[verdict.name]
    text = Text().append(verdict.text, f"bold {colour}".replace("bold bold", "bold"))
    if verdict.name == UNDECIDED:
        return text.append(f": {verdict.evidence}")
    text.append(f": {VERDICTS[verdict.name]}\n")
    evidence = f"{verdict.evidence[:1].upper()}{verdict.evidence[1:]}"
    return text.append(f"{evidence}; {verdict.confidence} confidence.", "dim")


def _sorted(rows: Sequence[Row], sort: str) -> list[Row]:
    """Sort by falling metric; broken rows, which have none, come first."""

    def key(row: Row) -> tuple[bool, float]:
        broken = row.verdict is not None and row.verdict.name == "broken"
        value = row.value(sort)
        return not broken, float("inf") if value is None else -value

    return sorted(rows, key=key)


def _table(rows: Sequence[Row], sort: str, top: int, group: bool) -> Table:
    table = plain_table()
    table.padding = (0, 1, 0, 0)
    table.add_column("layer", no_wrap=True)
    table.add_column(sort.replace("_", " "), justify="right", no_wrap=True, min_width=6)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("svf", justify="right", no_wrap=True)
    table.add_column("∆S", no_wrap=True, width=SPARK_WIDTH)
    table.add_column("verdict", no_wrap=True)
    # Short names are those among all matrices: what the few shown share may be what tells them.
    names = display_names((row.name for row in rows), NAME_WIDTH)
    rows = rows[:top]
    largest = largest_of(row.value(sort) for row in rows)
    if not group:
        for row in rows:
            table.add_row(*_cells(row, names[row.name], sort, largest))
        return table
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(block_of(row.name), []).append(row)
    for block, inside in blocks.items():
        table.add_row(Text(short(safe(block), NAME_WIDTH), "bold"))
        for row in inside:
            tail = row.name.removeprefix(f"{block}.").removesuffix(".weight")
            name = short(safe(tail), NAME_WIDTH - 2)
            table.add_row(*_cells(row, f"  {name}", sort, largest))
    return table


def _cells(row: Row, name: str, sort: str, largest: float) -> Iterator[RenderableType]:
    value, verdict = row.value(sort), row.verdict
    colour = "" if verdict is None else COLOURS[verdict.name]
    share = row.value("svf_share")
    yield Text(name)
    yield number(value)
    yield Text(bar(part_of(value, largest), BAR_WIDTH), colour)
    yield "–" if share is None else f"{share:.0%}"
    yield Text(_spectral_change(row), colour)
    yield Text("" if verdict is None else verdict.text + _MARKS[verdict.confidence], colour)


def _spectral_change(row: Row) -> str:
    """Draw how much each stretch of singular values changed, the largest values on the left."""
    if row.curves is None or row.curves.tuned is None:
        return ""
    change = row.curves.along
    moved = row.curves.tuned - row.curves.base if change is None else change
    return sparkline(np.abs(moved), SPARK_WIDTH)


def _hidden(count: int, top: int) -> Iterator[Text]:
    if count > top:
        yield Text(f"and {count - top} more matrices (--top {count} shows all)", "dim")


def _others(one: Comparison) -> Iterator[RenderableType]:
    """Account for every tensor that has no line of its own."""
    vectors = [row for row in one.rows if not row.is_matrix]
    if vectors:
        moved = [row for row in vectors if row.value("weight_drift")]
        most = max(moved, key=lambda row: row.value("weight_drift") or 0.0, default=None)
        text = Text(f"{len(moved)} of {len(vectors)} norms, biases and buffers changed")
        if most is not None:
            drift = number(most.value("weight_drift"))
            text.append(f", most {short(safe(most.name), 30)} ({drift})", "dim")
        yield text
    differ = [row for row in one.codes if row.verdict is not None and row.verdict.name == CHANGED]
    if differ:
        text = Text(
            f"codes that differ in their bytes: {len(differ)} of {len(one.codes)} ", "yellow"
        )
        yield text.append(f"({short(safe(differ[0].name), 30)})", "dim")
    for what, items in unread(one):
        yield from _listed(what, items)
    done, counts = one.coverage.compared, one.totals
    yield Text(
        f"{done} tensors compared, of {counts[0]} in the base and {counts[1]} in the fine-tune",
        "dim",
    )


def _listed(what: str, items: Sequence[Unread]) -> Iterator[Text]:
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(safe(item.name))
    for reason, names in reasons.items():
        shaped = reason.startswith("shape ")
        text = Text(f"{what}: {len(names)} ", "yellow" if shaped else "")
        listed = ", ".join(short(name, 26) for name in names[:2])
        text.append(listed + (" ..." if len(names) > 2 else ""), "dim")
        if not reason.startswith(("not in", "only in")):
            text.append(f" ({short(safe(_briefly(reason)), 50)})")
        yield text


def _briefly(reason: str) -> str:
    """Write "shape A in the base, B in the fine-tune" as "A → B"."""
    plain = reason.removeprefix("shape ").replace(" in the base, ", " → ")
    return plain.replace(" in the fine-tune", "")


def _alone(one: Comparison, sort: str, top: int, group: bool) -> Iterator[RenderableType]:
    del group
    yield _title(one)
    if one.verdict is not None:
        yield _headline(one.verdict)
    by = sort if one.matrices and one.matrices[0].value(sort) is not None else "spectral_norm"
    rows = _sorted(one.matrices, by)
    table = plain_table()
    table.padding = (0, 1, 0, 0)
    table.add_column("layer", no_wrap=True)
    table.add_column("matrix", justify="right", no_wrap=True)
    for title in ("norm", "stable", "effective rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=BAR_WIDTH)
    table.add_column("S", no_wrap=True, width=SPARK_WIDTH)
    names = display_names((row.name for row in rows), NAME_WIDTH)
    for row in rows[:top]:
        table.add_row(*_spectrum_cells(row, names[row.name]))
    yield table
    yield from _hidden(len(rows), top)
    yield ""
    yield from _listed("left out", one.left_out)
    yield Text(f"{len(rows)} matrices of {one.totals[0]} tensors", "dim")


def _spectrum_cells(row: Row, name: str) -> Iterator[RenderableType]:
    yield Text(name)
    yield shape(row.matrix or ())
    if row.curves is None:
        yield from (Text("broken", "bold red"), "", "", "", "")
        return
    effective = row.measured.base.get("effective_rank")
    yield number(row.measured.base.get("spectral_norm"))
    yield number(row.measured.base.get("stable_rank"))
    yield number(effective)
    yield Text(bar((effective or 0.0) / max(1, len(row.curves.base)), BAR_WIDTH), "cyan")
    yield Text(sparkline(row.curves.base, SPARK_WIDTH), "cyan")


def _trajectory(one: Trajectory) -> Iterator[RenderableType]:
    yield Text("trajectory", "bold").append(
        " (medians over the matrices; the drift "
        + ("never falls)" if one.monotone else "falls somewhere)"),
        "not bold",
    )
    table = plain_table()
    table.padding = (0, 1, 0, 0)
    table.add_column("checkpoint", no_wrap=True)
    for title in ("weight drift", "spectral", "svf share", "intruders"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    drift = one.metrics["weight_drift"]
    largest = largest_of(drift)
    for index, path in enumerate(one.checkpoints):
        cells = (number(values[index]) for values in one.metrics.values())
        length = part_of(drift[index], largest)
        name = path.name.removesuffix(path.suffix)
        table.add_row(Text(short(safe(name), NAME_WIDTH)), *cells, Text(bar(length, BAR_WIDTH)))
    yield table


def _failed(failed: Sequence[Violation]) -> Iterator[RenderableType]:
    yield Text(f"failed: {len(failed)} {'tensor' if len(failed) == 1 else 'tensors'}", "bold red")
    for one in failed[:MOST_ROWS]:
        yield Text(f"  {safe(str(one))}", "red")
    if len(failed) > MOST_ROWS:
        yield Text(f"  and {len(failed) - MOST_ROWS} more", "red")
