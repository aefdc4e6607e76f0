"""A policy file: which verdicts and how much drift a fine-tune's tensors may have.

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
    optional = true                     # and need not be there

    [tensors]
    unmatched = "allow"                 # nor those that only one side has, or in another shape

Every rule that matches a tensor must hold for it. A rule that matches none fails, unless it is
optional. A tensor that was not compared breaks the policy unless a rule for it allows "undecided",
or it is unmatched and those are allowed; with ``unmatched = "deny"`` no rule lets it pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from svftool.auditing.gates import Gate, tripped
from svftool.auditing.results import Comparison, Row, Unread
from svftool.auditing.verdicts import MAY_BE, SCREENED, UNDECIDED, VERDICTS
from svftool.choices.metrics import check_metric, metric_key
from svftool.errors import UsageError, brief, did_you_mean, no_such
from svftool.files.toml import POLICY, read_toml

SCHEMA_VERSION = 1
NOT_COMPARED = "not compared"
DENIED = "unmatched tensors are denied"
_KEYS = frozenset({"layers", "allow", "deny", "limits", "reason", "optional"})
_UNMATCHED = ("allow", "deny")


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
    optional : bool
        Whether there may be no tensor that it matches.
    """

    layers: tuple[str, ...]
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    optional: bool = False

    def __str__(self) -> str:
        asked = [
            f"{key} {', '.join(of)}" for key in ("allow", "deny") if (of := getattr(self, key))
        ]
        asked += map(str, self.gates)
        return f"{', '.join(self.layers)}: {'; '.join(asked) or 'compared'}"

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The limits, as gates."""
        return tuple(Gate(metric, limit) for metric, limit in self.limits.items())

    def matches(self, name: str) -> bool:
        """Whether the rule is for a tensor of this name."""
        return any(fnmatchcase(name, glob) for glob in self.layers)

    def complaint(self, row: Row) -> str:
        """Say what is wrong with a row; nothing where it is fine or another's business."""
        if not self.matches(row.name):
            return ""
        verdict = row.verdict
        if verdict is not None and self._refuses(verdict.name):
            return verdict.text
        for gate in self.gates:
            if tripped([row], gate):
                value = row.value(gate.metric)
                return gate.found(row) + ("" if value is None else f" > {gate.value:g}")
        return ""

    def _refuses(self, verdict: str) -> bool:
        """Whether a verdict is denied; what a screen cannot tell is all that it may be."""
        meant = MAY_BE if verdict == SCREENED else (verdict,)
        if any(one in self.deny for one in (verdict, *meant)):
            return True
        if not self.allow or verdict in self.allow:
            return False
        return not all(one in self.allow for one in meant)

    def holds(self, row: Row) -> bool:
        """Whether the rule has anything to say of a row."""
        if not self.matches(row.name):
            return False
        judged = row.verdict is not None and bool(self.allow or self.deny or not self.limits)
        return judged or any(gate.holds(row) for gate in self.gates)


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
        Whether tensors that only one side has are allowed or denied. Where the file does not say,
        they are denied but for those of which a rule allows "undecided".
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

    def uncompared(self, comparison: Comparison) -> list[Violation]:
        """List what had to be compared and was not."""
        lonely = {*comparison.unmatched_base, *comparison.unmatched_tuned}
        found = (
            Violation(one.name, one.reason, self._complaint(one, unmatched=one in lonely))
            for one in comparison.coverage.not_compared
        )
        return [one for one in found if one.reason]

    def _complaint(self, one: Unread, *, unmatched: bool) -> str:
        """Say why a tensor had to be compared; nothing where it had not."""
        if unmatched and self.unmatched == "deny":
            return DENIED
        if not one.wanted or (unmatched and self.unmatched == "allow"):
            return ""
        named = any(UNDECIDED in rule.allow and rule.matches(one.name) for rule in self.rules)
        if named:
            return ""
        return DENIED if unmatched else NOT_COMPARED


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
    document = read_toml(path, POLICY)
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
    if unmatched is not None and unmatched not in _UNMATCHED:
        raise UsageError(
            f"{path}: unmatched = {brief(unmatched)}, expected 'allow' or 'deny'."
            f"{did_you_mean(brief(unmatched), _UNMATCHED)}"
        )
    return Policy(path, tuple(_rule(path, rule) for rule in rules), unmatched)


def _is_limit(value: object) -> bool:
    """Tell whether a value is a number that another can exceed."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _only(path: Path, table: Any, keys: set[str] | frozenset[str], where: str) -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {where} is {brief(table)}, expected a table.")
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise UsageError(
            f"{path}: {where} has the key {brief(unknown[0])}, expected {', '.join(sorted(keys))}."
            f"{did_you_mean(unknown[0], keys)}"
        )


def _rule(path: Path, table: Any) -> Rule:
    _only(path, table, _KEYS, "a [[rule]]")
    allow, deny = (_texts(path, table, key) for key in ("allow", "deny"))
    for name in (*allow, *deny):
        if name not in VERDICTS:
            raise UsageError(f"{path}: {no_such('verdict', name, VERDICTS)}")
    limits = table.get("limits", {})
    if not isinstance(limits, dict) or not all(_is_limit(value) for value in limits.values()):
        raise UsageError(f"{path}: limits = {brief(limits)}, expected metrics with numbers.")
    for metric in limits:
        try:
            check_metric(metric)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    optional = table.get("optional", False)
    if not isinstance(optional, bool):
        raise UsageError(f"{path}: optional = {brief(optional)}, expected true or false.")
    return Rule(
        _texts(path, table, "layers") or ("*",),
        allow,
        deny,
        {metric_key(metric): float(limit) for metric, limit in limits.items()},
        str(table.get("reason", "")),
        optional,
    )


def _texts(path: Path, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise UsageError(f"{path}: {key} = {brief(value)}, expected a text or a list of texts.")
    return tuple(listed)
