"""What a shell proposes for options whose texts come from a closed set; nothing heavy is imported.

Options with a type of few values, names of options and of commands complete by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svftool.choices.metrics import CHANGE, SPECTRUM, metric_name, metric_names
from svftool.report.schemas import described

Proposer = Callable[[str], list[str]]
"""From what was typed so far to whole words; those that do not begin like it are left out."""

REGIMES = (
    "head", "svf", "svf+scale", "svf+bias", "svf+norm", "entries:4x", "core:4x", "salt:4x", "rows",
    "bias", "norm", "lora:8", "full",
)  # fmt: skip


def one_of(*values: str) -> Proposer:
    """Propose the values of an option that takes one of them."""

    def propose(incomplete: str) -> list[str]:
        return list(values)

    return propose


def list_of(*values: str) -> Proposer:
    """Propose the values of an option that takes several of them with commas, each once.

    Examples
    --------
    >>> list_of("head", "svf")("head,s")
    ['head,svf']
    """

    def propose(incomplete: str) -> list[str]:
        return _listed(values, incomplete)

    return propose


def metric(incomplete: str) -> list[str]:
    """Propose the name of a number that every layer has."""
    return metric_names()


def metrics(incomplete: str) -> list[str]:
    """Propose names of metrics with commas, or all."""
    return _listed(["all", *map(metric_name, (*CHANGE, *SPECTRUM))], incomplete)


def gate(incomplete: str) -> list[str]:
    """Propose a number that a gate may hold, up to its limit."""
    return [f"{name}=" for name in metric(incomplete)]


def documents(incomplete: str) -> list[str]:
    """Propose a command whose document has a schema."""
    return described()


def _listed(values: Sequence[str], incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{one}" for one in values if one not in taken and one.startswith(last)]
