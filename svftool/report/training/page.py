"""A comparison of regimes as one self-contained page: no network, light and dark."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from svftool.report import few_shot
from svftool.report.drawing import require_jinja
from svftool.report.finetune import FRACTIONS, against_note, against_rows, value
from svftool.report.text import safe
from svftool.report.text import seconds as duration
from svftool.report.training import curve, figure
from svftool.report.training.headline import headlines
from svftool.report.training.rows import task_title
from svftool.training import Run, Summary
from svftool.training.results import FinetuneResult

_VARIABLES = {
    figure.INK: "--ink",
    figure.QUIET: "--quiet",
    figure.LINE: "--line",
    curve.PAPER: "--paper",
    figure.COLOURS[0]: "--heat",
    figure.COLOURS[1]: "--warm",
    figure.COLOURS[2]: "--v-spectrum",
    figure.COLOURS[3]: "--v-rearranged",
    figure.COLOURS[4]: "--v-full",
}
"""Colours of the figure that the page's style sheet changes in the dark."""


def page(result: FinetuneResult) -> str:
    """Return the page.

    Raises
    ------
    MissingDependencyError
        If jinja2 or matplotlib is not installed.
    """
    from svftool.version import __version__

    markup = require_jinja().Environment(autoescape=True)
    style = resources.files("svftool.report.inspect").joinpath("assets/page.css")
    template = resources.files("svftool.report.training").joinpath("assets/page.html")
    several = len({(one.shots, *one.facts.items()) for one in result.summary}) > 1
    rendered: str = markup.from_string(template.read_text("utf-8")).render(
        style=style.read_text("utf-8"),
        version=__version__,
        title=safe(result.output.name),
        lead=_lead(result),
        rules=safe(few_shot.rules(result)) if result.has_folds else "",
        interrupted=result.interrupted is not None,
        headlines=headlines(result),
        figures=[(label, _adapted(drawing)) for label, drawing in _figures(result).items()],
        against=safe(result.against or ""),
        rows=against_rows(result),
        note=against_note(result) if result.compared else "",
        unit=" %" if result.metric in FRACTIONS else "",
        metric=safe(result.metric),
        several=several,
        summary=[_summary(one) for one in result.summary],
        runs=[_run(run, result.metric) for run in result.runs],
        setting=[(safe(name), safe(str(what))) for name, what in result.setting.items()],
    )
    return rendered


def _figures(result: FinetuneResult) -> dict[str, str]:
    """Return every figure as an ``<svg>`` element, by what it shows."""
    drawn = figure.svgs(result)
    if curve.has_curve(result):
        drawn[f"{result.metric} against trained numbers"] = curve.curve_svg(result)
    return drawn


def _adapted(drawing: str) -> str:
    """Let the page's style sheet choose the colours of the figure."""
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    return drawing


def _lead(result: FinetuneResult) -> str:
    """Say in a line what was compared on what."""
    regimes = len({run.regime for run in result.runs})
    seeds = len({run.seed for run in result.runs})
    parts = [
        result.task,
        f"{regimes} regime{'s' * (regimes > 1)}",
        f"{seeds} seed{'s' * (seeds > 1)}",
    ]
    shots = list(dict.fromkeys(run.shots for run in result.runs if run.shots is not None))
    if shots:
        parts.append(f"{' and '.join(map(str, shots))} shot{'s' * (shots != [1])}")
    return " · ".join(parts)


def _summary(one: Summary) -> dict[str, Any]:
    half = None if one.ci95 is None else (one.ci95[1] - one.ci95[0]) / 2
    return {
        "regime": safe(one.regime),
        "task": task_title(one),
        "seeds": one.seeds,
        "before": value(one.metric, one.before),
        "mean": value(one.metric, one.mean),
        "gain": value(one.metric, one.gain, sign=True),
        "half": "–" if half is None else value(one.metric, half),
        "trained": f"{one.trainable_parameters:,}",
        "step": "–" if one.step_seconds is None else duration(one.step_seconds),
        "worse": one.worse,
    }


def _run(run: Run, metric: str) -> dict[str, Any]:
    return {
        "name": safe(run.stem),
        "before": value(metric, run.before.get(metric, math.nan)),
        "after": value(metric, run.after.get(metric, math.nan)),
        "rate": f"{figure.peak_rate(run):.1e}" if run.learning_rates else "–",
        "steps": run.outcome.steps,
        "kept": run.outcome.kept,
        "ending": run.outcome.ending,
        "seconds": duration(run.seconds),
    }
