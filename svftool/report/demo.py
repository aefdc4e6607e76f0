"""Steps of ``svftool demo`` as documents and as they appear one after another."""

from __future__ import annotations

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
    fields = _pretrained_fields(step.result) if step.command is None else None
    result = REPORTS[step.name].document(step.result) if fields is None else fields
    return {"name": step.name, "command": step.command, "result": result}


def step_view(step: DemoStep) -> RenderableType:
    """Return one step for people: its title, the command line it stands for and its report."""
    parts: list[RenderableType] = ["", Rule(TITLES[step.name], align="left", style="bold")]
    if step.command is None:
        return Group(*parts, _pretrained_view(step.result))
    command = Text("$ ", "dim").append(safe(step.command), "bold cyan")
    return Group(*parts, command, "", REPORTS[step.name].view(step.result))


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
