"""What lets a pipeline fail: a policy file of allowed verdicts and drift, and thresholds.

::

    schema_version = 1

    [[rule]]
    layers = ["backbone.*"]             # globs of the base's tensor names
    allow = ["untouched", "rounding noise", "spectrum only"]
    reason = "the backbone is shared by all experts"

    [[rule]]
    layers = "*"
    deny = ["broken", "unrelated"]
    limits = { weight_drift = 0.5, intruders = 2 }

    [[rule]]
    layers = "head.*"
    allow = ["undecided"]               # these need not be comparable

    [tensors]
    unmatched = "allow"                 # nor those that only one side has, or in another shape

Every rule that matches a tensor must hold for it. A tensor that was not compared breaks the policy
unless a rule for it allows "undecided", or it is unmatched and those are allowed.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from svftool.auditing.gates import Gate, check_metric, parse_gate, tripped
from svftool.auditing.metrics import METRICS
from svftool.auditing.results import AuditResult, Comparison, Row, Unread
from svftool.auditing.verdicts import UNDECIDED, VERDICTS
from svftool.errors import GateError, UsageError, brief, shortlist, system_fault

SCHEMA_VERSION = 1
NOT_COMPARED = "not compared"
_KEYS = frozenset({"layers", "allow", "deny", "limits", "reason"})


@dataclass(frozen=True)
class Rule:
    """What the tensors that match some globs may be.

    Attributes
    ----------
    layers : tuple of str
        Globs.
    allow : tuple of str
        The verdicts that are allowed; all where there are none.
    deny : tuple of str
        Verdicts that are not.
    limits : mapping of str to float
        Metrics and the values that they may not exceed.
    reason : str
        Shown with a violation.
    """

    layers: tuple[str, ...]
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def matches(self, name: str) -> bool:
        """Whether the rule is for a tensor of this name."""
        return any(fnmatchcase(name, glob) for glob in self.layers)

    def complaint(self, row: Row) -> str:
        """Say what is wrong with a row; nothing where it is fine or another's business."""
        if not self.matches(row.name) or row.verdict is None:
            return ""
        name = row.verdict.name
        if name in self.deny or (self.allow and name not in self.allow):
            return row.verdict.text
        for metric, limit in self.limits.items():
            if tripped([row], Gate(metric, limit)):
                value = row.value(metric)
                return row.verdict.text if value is None else f"{metric} {value:.4g} > {limit:g}"
        return ""


@dataclass(frozen=True)
class Violation:
    """A tensor that breaks a rule."""

    name: str
    found: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Policy:
    """The rules of a policy file.

    Attributes
    ----------
    path : Path
    rules : tuple of Rule
    unmatched : {"allow", "deny"} or None
        Whether tensors that only one side has are allowed or denied; None where the file does not
        say, so that a rule must.
    """

    path: Path
    rules: tuple[Rule, ...]
    unmatched: Literal["allow", "deny"] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that the limits need."""
        return tuple(
            {metric.partition(".")[0]: None for rule in self.rules for metric in rule.limits}
        )

    def violations(self, comparison: Comparison) -> list[Violation]:
        """List everything in a comparison that breaks a rule."""
        found = [*self._of_rows((*comparison.rows, *comparison.codes))]
        if comparison.tuned is None:
            return found
        lonely = {*comparison.unmatched_base, *comparison.unmatched_tuned}
        for one in comparison.coverage.not_compared:
            reason = self._complaint(one, unmatched=one in lonely)
            if reason:
                found.append(Violation(one.name, one.reason, reason))
        return found

    def _of_rows(self, rows: Sequence[Row]) -> Iterator[Violation]:
        for row in rows:
            for rule in self.rules:
                found = rule.complaint(row)
                if found:
                    yield Violation(row.name, found, rule.reason)
                    break

    def _complaint(self, one: Unread, *, unmatched: bool) -> str:
        """Say why a tensor had to be compared; nothing where it had not."""
        if unmatched and self.unmatched == "deny":
            return "unmatched tensors are denied"
        if not one.wanted or (unmatched and self.unmatched == "allow"):
            return ""
        named = any(UNDECIDED in rule.allow and rule.matches(one.name) for rule in self.rules)
        return "" if named else NOT_COMPARED


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Parameters
    ----------
    path : Path
        TOML, see the module's text.

    Raises
    ------
    UsageError
        If it cannot be read, or holds a key, verdict or metric that does not exist.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        system_fault(error, path)
        raise UsageError(f"{path}: {_reason(error)}, expected a policy in TOML.") from error
    if document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        found = brief(document["schema_version"])
        raise UsageError(f"{path}: schema version {found}, expected {SCHEMA_VERSION}.")
    _only(path, document, {"schema_version", "rule", "tensors"}, "the file")
    rules = document.get("rule")
    if not isinstance(rules, list) or not rules:
        raise UsageError(f"{path}: no [[rule]], expected at least one.")
    tensors = document.get("tensors", {})
    _only(path, tensors, {"unmatched"}, "[tensors]")
    unmatched = tensors.get("unmatched")
    if unmatched not in (None, "allow", "deny"):
        raise UsageError(f"{path}: unmatched = {brief(unmatched)}, expected 'allow' or 'deny'.")
    return Policy(path, tuple(_rule(path, rule) for rule in rules), unmatched)


def _is_limit(value: object) -> bool:
    """Tell whether a value is a number that another can exceed."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _only(path: Path, table: Any, keys: set[str] | frozenset[str], where: str) -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {where} is {brief(table)}, expected a table.")
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise UsageError(
            f"{path}: {where} has the key {brief(unknown[0])}, expected {', '.join(sorted(keys))}."
        )


def _rule(path: Path, table: Any) -> Rule:
    _only(path, table, _KEYS, "a [[rule]]")
    allow, deny = (_texts(path, table, key) for key in ("allow", "deny"))
    for name in (*allow, *deny):
        if name not in VERDICTS:
            raise UsageError(
                f"{path}: verdict {brief(name)}, expected one of {', '.join(VERDICTS)}."
            )
    limits = table.get("limits", {})
    if not isinstance(limits, dict) or not all(_is_limit(value) for value in limits.values()):
        raise UsageError(f"{path}: limits = {brief(limits)}, expected metrics with numbers.")
    for metric in limits:
        check_metric(metric)
    layers = _texts(path, table, "layers") or ("*",)
    return Rule(layers, allow, deny, limits, str(table.get("reason", "")))


def _texts(path: Path, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise UsageError(f"{path}: {key} = {brief(value)}, expected a text or a list of texts.")
    return tuple(listed)


# An audit held against thresholds and a policy: what lets a pipeline fail.


@dataclass(frozen=True)
class Gatekeeper:
    """Thresholds and a policy, read and checked before any work.

    Attributes
    ----------
    gates : tuple of Gate
    policy : Policy or None
    """

    gates: tuple[Gate, ...] = ()
    policy: Policy | None = None

    @classmethod
    def read(cls, gates: Iterable[str], policy: Path | None) -> Gatekeeper:
        """Read ``METRIC=VALUE`` texts and a policy file.

        Raises
        ------
        UsageError
            If one of them is not well formed.
        """
        read = None if policy is None else read_policy(policy)
        return cls(tuple(parse_gate(text) for text in gates), read)

    def with_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        """Add the metrics that the thresholds need to those asked for."""
        needed = [gate.metric for gate in self.gates]
        needed += self.policy.metrics if self.policy is not None else ()
        plain = (name.partition(".")[0] for name in (*names, *needed))
        return tuple(dict.fromkeys(name for name in plain if name in METRICS or name == "all"))

    def violations(self, result: AuditResult) -> list[Violation]:
        """List everything that trips a threshold or breaks a rule, the worst first."""
        found = []
        for one in result.comparisons:
            for gate in self.gates:
                for row in tripped((*one.rows, *one.codes), gate):
                    found.append(Violation(row.name, _found(row, gate), f"limit {gate.value:g}"))
            if self.policy is not None:
                found += self.policy.violations(one)
            elif self.gates and one.tuned is not None:
                found += _not_compared(one)
        return found

    def close(self, failed: Sequence[Violation]) -> None:
        """Fail where anything was found.

        Raises
        ------
        GateError
            Naming the worst.
        """
        if not failed:
            return
        way_out = ""
        if any(one.reason == NOT_COMPARED for one in failed):
            way_out = (
                ". What need not be compared is left out by --exclude, or allowed by a policy's "
                'rule with allow = ["undecided"]'
            )
        raise GateError(f"{len(failed)} tensors failed: {shortlist(failed, 3)}{way_out}")


def _found(row: Row, gate: Gate) -> str:
    value = row.value(gate.metric)
    if value is not None:
        return f"{gate.metric} {value:.4g}"
    return "broken" if row.verdict is None else row.verdict.text


def _not_compared(one: Comparison) -> Iterator[Violation]:
    """Trip on what no number was taken of, but for what the user's patterns left out."""
    for item in one.coverage.not_compared:
        if item.wanted:
            yield Violation(item.name, item.reason, NOT_COMPARED)
