"""An audit held against thresholds and a policy: what lets a pipeline fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svftool.auditing.gates import Gate, parse_gate, tripped
from svftool.auditing.metrics import METRICS
from svftool.auditing.policy import Policy, Violation, read_policy
from svftool.auditing.results import AuditResult
from svftool.errors import GateError, shortlist


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
                for row in tripped(one.rows, gate):
                    value = row.value(gate.metric)
                    text = "broken" if value is None else f"{gate.metric} {value:.4g}"
                    found.append(Violation(row.name, text, f"limit {gate.value:g}"))
            if self.policy is not None:
                found += self.policy.violations(one)
        return found

    def close(self, failed: Sequence[Violation]) -> None:
        """Fail where anything was found.

        Raises
        ------
        GateError
            Naming the worst.
        """
        if failed:
            raise GateError(f"{len(failed)} tensors failed: {shortlist(failed, 3)}")
