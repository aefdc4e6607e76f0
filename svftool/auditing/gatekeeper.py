"""An audit held against thresholds and a policy: what each rule held, and what lets a run fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from svftool.auditing.gates import Gate, parse_gate, tripped
from svftool.auditing.policy import DENIED, NOT_COMPARED, Policy, Rule, Violation, read_policy
from svftool.auditing.results import AuditResult, Comparison
from svftool.choices.metrics import EXTRA, metric_key, metric_name
from svftool.errors import GateError, shortlist


@dataclass(frozen=True)
class Held:
    """What one rule held in one comparison.

    Attributes
    ----------
    rule : str
        In words.
    matched : int
        Tensors that it could pass or refuse.
    offenders : tuple of Violation
        Those that it refused.
    missed : str
        Why it held nothing, where that is a failure.
    reason : str
        Why the rule is there, by its own words.
    place : str
        The fine-tune that it was held against.
    """

    rule: str
    matched: int
    offenders: tuple[Violation, ...] = ()
    missed: str = ""
    reason: str = ""
    place: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything it is for was there and nothing was refused."""
        return not self.offenders and not self.missed


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
        plain = (metric_key(name).partition(".")[0] for name in (*names, *needed))
        return tuple(dict.fromkeys(name for name in plain if name not in EXTRA))

    def hold(self, result: AuditResult) -> tuple[Held, ...]:
        """Hold every rule against every comparison."""
        return tuple(held for one in result.comparisons for held in self._hold(one))

    def _hold(self, one: Comparison) -> Iterator[Held]:
        place = "" if one.tuned is None else str(one.tuned)
        for gate in self.gates:
            yield _hold_gate(gate, one, place)
        for number, rule in enumerate(() if self.policy is None else self.policy.rules, 1):
            yield _hold_rule(number, rule, one, place)
        if one.tuned is None:
            return
        if self.policy is not None:
            known = self.policy.unmatched or "deny"
            lost = tuple(self.policy.uncompared(one))
            words = f"every tensor compared; unmatched ones: {known}"
            yield Held(words, one.coverage.total, lost, place=place)
        elif self.gates:
            yield Held("every tensor compared", one.coverage.total, _lost(one), place=place)


def violations(held: Iterable[Held]) -> list[Violation]:
    """List what was refused, each tensor of a comparison once, under the first rule it breaks."""
    found: dict[tuple[str, str], Violation] = {}
    for one in held:
        for item in one.offenders:
            found.setdefault((one.place, item.name), item)
    return list(found.values())


def close(held: Sequence[Held]) -> None:
    """Fail where a rule did not hold, or held nothing.

    Raises
    ------
    GateError
        Naming the worst.
    """
    failed = [one for one in held if not one.passed]
    if not failed:
        return
    found = violations(failed)
    parts = [f"{len(failed)} of {len(held)} gates failed"]
    if found:
        tensors = "tensor" if len(found) == 1 else "tensors"
        parts.append(f"{len(found)} {tensors} failed: {shortlist(found, 3)}")
    empty = [one for one in failed if one.missed]
    if empty:
        parts.append(shortlist((f"{one.rule}: {one.missed}" for one in empty), 2))
    raise GateError("; ".join(parts) + "." + _way_out(found, empty))


def _way_out(found: Sequence[Violation], empty: Sequence[Held]) -> str:
    if any(one.reason in (NOT_COMPARED, DENIED) for one in found):
        return (
            " What need not be compared is left out by --exclude, or allowed by a policy's "
            'rule with allow = ["undecided"].'
        )
    if empty:
        return " Mend its globs, or say optional = true in a policy's rule."
    return ""


def _hold_gate(gate: Gate, one: Comparison, place: str) -> Held:
    rows = (*one.rows, *one.codes)
    offenders = (
        Violation(row.name, gate.found(row), f"limit {gate.value:g}") for row in tripped(rows, gate)
    )
    matched = sum(gate.holds(row) for row in rows)
    missed = "" if matched else _no_number(gate)
    return Held(str(gate), matched, tuple(offenders), missed, place=place)


def _no_number(gate: Gate) -> str:
    return f"no tensor has a number for {metric_name(gate.metric)}, expected at least one"


def _hold_rule(number: int, rule: Rule, one: Comparison, place: str) -> Held:
    rows = [row for row in (*one.rows, *one.codes) if rule.matches(row.name)]
    lonely = [item for item in one.coverage.not_compared if rule.matches(item.name)]
    complaints = ((row, rule.complaint(row)) for row in rows)
    offenders = (Violation(row.name, said, rule.reason) for row, said in complaints if said)
    matched = sum(rule.holds(row) for row in rows) + len(lonely)
    missed = ""
    if not rule.optional:
        missed = "" if matched else "matched no tensor, expected at least one"
        idle = [gate for gate in rule.gates if rows and not any(map(gate.holds, rows))]
        missed = missed or "; ".join(map(_no_number, idle))
    return Held(f"rule {number}, {rule}", matched, tuple(offenders), missed, rule.reason, place)


def _lost(one: Comparison) -> tuple[Violation, ...]:
    """List what no number was taken of, but for what the user's patterns left out."""
    return tuple(
        Violation(item.name, item.reason, NOT_COMPARED)
        for item in one.coverage.not_compared
        if item.wanted
    )
