"""How data chose the weights of a merge: document, cells of a table and sentences."""

from __future__ import annotations

import math
from typing import Any

from svftool.errors import counted
from svftool.merging.weights import Gain
from svftool.report.text import number, safe
from svftool.stages.combine_result import WeightChoice, WeightScore

BRINGS = "by how much the loss on the examples rises without the input, and its standard error"


def weights_document(choice: WeightChoice) -> dict[str, Any]:
    """Return the choice for scripts."""
    return {
        "data": str(choice.data),
        "task": choice.task,
        "examples": choice.support.examples,
        "sha256": choice.support.sha256,
        "parts": choice.parts,
        "metric": choice.metric,
        "kept": choice.kept,
        "start": _score(choice.start),
        "chosen": _score(choice.chosen),
        "best": _score(choice.best),
        "gain": choice.gain.mean,
        "gain_error": choice.gain.error,
        "without": [
            None if one is None else {"loss": one.mean, "error": one.error}
            for one in choice.without
        ],
        "tried": [{"weights": list(one.weights), "loss": one.loss} for one in choice.tried],
    }


def _score(one: WeightScore) -> dict[str, Any]:
    return {"weights": list(one.weights), "loss": one.loss, "metric": one.metric}


def weights_columns() -> tuple[str, str]:
    """Return the titles of what the table of inputs has besides."""
    return "start", "brings"


def weights_cells(choice: WeightChoice) -> list[tuple[str, str]]:
    """Return what the table of inputs has besides: the start weight, and what each brings."""
    pairs = zip(choice.start.weights, choice.without, strict=True)
    return [(number(weight), "–" if one is None else plus_minus(one)) for weight, one in pairs]


def plus_minus(gain: Gain) -> str:
    """Write a difference with its standard error.

    Examples
    --------
    >>> plus_minus(Gain(0.1234, 0.0456)), plus_minus(Gain(2e-9, 0.0))
    ('0.123 ± 0.046', '0.000 ± 0.000')
    """
    error = "?" if math.isnan(gain.error) else f"{gain.error:.3f}"
    return f"{gain.mean + 0.0:.3f} ± {error}"


def weights_sentences(choice: WeightChoice) -> list[str]:
    """Say what was chosen, on what, and how sure that is."""
    of = f"{choice.support.examples} examples of {safe(str(choice.data))} ({choice.task})"
    lines = [
        f"weights {'kept' if choice.kept else 'chosen'} by {of}: "
        f"{_arrow('loss', choice.start.loss, choice.chosen.loss, choice)}, "
        f"{_arrow(choice.metric, choice.start.metric, choice.chosen.metric, choice)}"
    ]
    count = f"{counted(len(choice.tried), 'weights')} tried"
    on = f"on examples left out the loss is lower by {plus_minus(choice.gain)}"
    if not any(choice.chosen.weights):
        lines.append("every weight is 0: on these examples the base alone is best")
    if not choice.kept:
        return [*lines, f"{count}; {on}"]
    if choice.best.weights == choice.start.weights:
        return [*lines, f"{count}, none better"]
    best = ", ".join(map(number, choice.best.weights))
    if choice.worse:
        metric = f"{choice.metric.replace('_', ' ')} {number(choice.best.metric)} is worse"
        return [*lines, f"{count}, the best {best}; {on}, but their {metric}"]
    return [*lines, f"{count}, the best {best}; {on}, which is not beyond its error"]


def _arrow(name: str, before: float | None, after: float | None, choice: WeightChoice) -> str:
    word = name.replace("_", " ")
    return f"{word} {number(before)}" + ("" if choice.kept else f" → {number(after)}")
