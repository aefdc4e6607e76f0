"""What gates and a policy held: for people, for scripts, and for services that test changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from rich.console import RenderableType
from rich.text import Text

from svftool.auditing import Held, Violation
from svftool.report.names import distinct_paths
from svftool.report.text import safe

MOST_OFFENDERS = 20
"""Offenders of one rule that are listed; the JSON document has all."""


def gates(held: Sequence[Held], *, several: bool = False) -> Iterator[RenderableType]:
    """Draw each rule with what it matched, and each offender once.

    Parameters
    ----------
    held : sequence of Held
    several : bool
        Whether there are several fine-tunes, so that each rule names its own.
    """
    failed = sum(not one.passed for one in held)
    said = f"{failed} of {len(held)} failed" if failed else f"all {len(held)} passed"
    yield Text(f"gates: {said}", "bold red" if failed else "bold green")
    places = dict(zip((one.place for one in held), _places(held), strict=True))
    seen: set[tuple[str, str]] = set()
    for one in held:
        where = f"{places[one.place]}: " if several else ""
        colour = "green" if one.passed else "red"
        text = Text("passed" if one.passed else "failed", colour)
        text.append(f"  {where}{safe(one.rule)}", "default")
        text.append(f"  ({_matched(one)})", "default dim")
        yield text
        if one.missed:
            yield Text(f"    {safe(one.missed)}", "red")
        fresh = [item for item in one.offenders if (one.place, item.name) not in seen]
        seen |= {(one.place, item.name) for item in one.offenders}
        yield from _offenders(fresh, len(one.offenders) - len(fresh))


def _places(held: Sequence[Held]) -> list[str]:
    return distinct_paths([one.place or "." for one in held])


def _matched(one: Held) -> str:
    count = f"{one.matched} tensor{'' if one.matched == 1 else 's'}"
    return f"{len(one.offenders)} of {count}" if one.offenders else count


def _offenders(fresh: Sequence[Violation], above: int) -> Iterator[Text]:
    for item in fresh[:MOST_OFFENDERS]:
        yield Text(f"    {safe(str(item))}", "red")
    if len(fresh) > MOST_OFFENDERS:
        yield Text(f"    and {len(fresh) - MOST_OFFENDERS} more (--json lists all)", "red")
    if above:
        yield Text(f"    {above} listed above", "dim")


def gates_document(held: Sequence[Held]) -> list[dict[str, Any]]:
    """Return what each rule held, for scripts."""
    return [
        {
            "rule": one.rule,
            "tuned": one.place or None,
            "matched": one.matched,
            "passed": one.passed,
            "missed": one.missed or None,
            "reason": one.reason or None,
            "offenders": [
                {"name": item.name, "found": item.found, "reason": item.reason}
                for item in one.offenders
            ],
        }
        for one in held
    ]


def github(held: Sequence[Held]) -> str:
    """Return workflow commands of GitHub: an error for each rule that failed, a notice for all.

    A workflow shows them on the page of the run; it reads them from stdout and stderr.
    """
    lines = [
        f"::error title={_property(f'svftool inspect: {one.rule}')}::{_data(_told(one))}"
        for one in held
        if not one.passed
    ]
    passed = [f"{one.rule} ({_matched(one)})" for one in held if one.passed]
    if passed:
        said = _data("\n".join(passed))
        lines.append(f"::notice title={_property('svftool inspect: gates that passed')}::{said}")
    return "\n".join(lines)


def _told(one: Held) -> str:
    listed = [safe(str(item)) for item in one.offenders[:MOST_OFFENDERS]]
    if len(one.offenders) > MOST_OFFENDERS:
        listed.append(f"and {len(one.offenders) - MOST_OFFENDERS} more")
    return "\n".join([f"{one.place}: {one.missed or _matched(one)}", *listed])


def _data(text: str) -> str:
    """Escape as GitHub's own toolkit does."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(safe(text)).replace(":", "%3A").replace(",", "%2C")


def junit(held: Sequence[Held], *, seconds: float = 0.0) -> str:
    """Return the rules as test cases in JUnit's XML, as most services read it."""
    failures = str(sum(not one.passed for one in held))
    counts = {"name": "svftool inspect", "tests": str(len(held)), "failures": failures}
    counts |= {"errors": "0", "skipped": "0", "time": f"{seconds:.3f}"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", counts)
    for one in held:
        named = {"classname": safe(one.place or "inspect"), "name": safe(one.rule), "time": "0"}
        case = ET.SubElement(suite, "testcase", named)
        if not one.passed:
            message = one.missed or _matched(one)
            failure = ET.SubElement(case, "failure", message=safe(message), type="gate")
            failure.text = "\n".join(safe(str(item)) for item in one.offenders)
        ET.SubElement(case, "system-out").text = _matched(one)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
