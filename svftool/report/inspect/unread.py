"""Tensors that were not compared, under the heading that each belongs to."""

from __future__ import annotations

from svftool.auditing import Comparison, Unread


def unread(one: Comparison) -> list[tuple[str, list[Unread]]]:
    """List them; one that both sides have, in two shapes, is listed once."""
    shaped = [item for item in one.unmatched_base if _in_two_shapes(item)]
    lists = (
        ("of another shape", shaped),
        ("only in the base", [item for item in one.unmatched_base if not _in_two_shapes(item)]),
        ("only in the fine-tune", [x for x in one.unmatched_tuned if not _in_two_shapes(x)]),
        ("left out", list(one.left_out)),
    )
    return [(what, items) for what, items in lists if items]


def _in_two_shapes(item: Unread) -> bool:
    return item.reason.startswith("shape ")
