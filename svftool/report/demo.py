"""Steps of ``svftool demo`` as documents and as they appear one after another."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from svftool.report import decompose, finetune, inspect, json, merge
from svftool.report.text import safe, seconds
from svftool.stages.demo import DemoStep, Pretrained

REPORTS: dict[str, ModuleType] = {
    "decompose": decompose,
    "finetune": finetune,
    "inspect": inspect,
    "merge": merge,
}

TITLES = {
    "pretrain": "A base: digits 0 to 5",
    "decompose": "1. Decompose its weights",
    "finetune": "2. Tune it for digits 6 to 9, which it has never seen",
    "merge": "3. Fold the tuned singular values back into a plain checkpoint",
    "inspect": "4. What did tuning do to the model?",
}


def document(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all steps for scripts."""
    return json.document("demo", steps=steps)


def step_document(step: DemoStep) -> dict[str, Any]:
    """Return one step for scripts: its name, its command line and that command's document."""
    if not step.command:
        return {"name": step.name, "command": None, "result": _pretrained_fields(step.result)}
    result = REPORTS[step.name].document(step.result)
    return {"name": step.name, "command": shlex.join(step.command), "result": result}


def step_view(step: DemoStep) -> RenderableType:
    """Return one step for people: its title, the command line it stands for and its report."""
    parts: list[RenderableType] = ["", Rule(TITLES[step.name], align="left", style="bold")]
    if not step.command:
        return Group(*parts, _pretrained_view(step.result))
    command = Text(command_lines([safe(word) for word in step.command]), "bold cyan")
    return Group(*parts, command, "", REPORTS[step.name].view(step.result))


def command_lines(words: Sequence[str], *, width: int = 76) -> str:
    r"""Write a command line that can be pasted: quoted, and continued where it is long.

    Examples
    --------
    >>> print(command_lines(["svftool", "merge", "my factors", "-o", "out"], width=26))
    svftool merge 'my factors' \
        -o out
    """
    lines = [shlex.quote(words[0])]
    for word in map(shlex.quote, words[1:]):
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _pretrained_fields(base: Pretrained) -> dict[str, Any]:
    return {
        "checkpoint": str(base.checkpoint),
        "classes": base.classes,
        "images": base.images,
        "accuracy": base.accuracy,
        "parameters": base.parameters,
        "seconds": base.seconds,
    }


def _pretrained_view(base: Pretrained) -> Text:
    return Text(
        f"{base.parameters:,} parameters trained on {base.images} images in "
        f"{seconds(base.seconds)}; {100 * base.accuracy:.1f} % right on other images of these "
        "digits.\n"
    ).append(safe(str(base.checkpoint)), "bold")
