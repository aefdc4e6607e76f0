"""What a fine-tune changed: sources, matching of names, metrics, verdicts, gates."""

from svftool.auditing.compare import (
    BaseMatrix,
    Found,
    ScreenedBase,
    Tuned,
    compare_spectra,
    compare_vectors,
)
from svftool.auditing.counterparts import Counterparts, counterparts
from svftool.auditing.directional import ChangedMatrix, Directions, Edit, SharedSpace, Tokens
from svftool.auditing.evidence import Evidence
from svftool.auditing.gatekeeper import Gatekeeper, Held, close, violations
from svftool.auditing.gates import Gate, parse_gate, tripped
from svftool.auditing.judging import as_in_base, judged, judged_codes, judged_row
from svftool.auditing.matching import Matching, NamePair, match_names
from svftool.auditing.memory import (
    audit_budget,
    audit_bytes,
    compared_seconds,
    screen_budget,
    screen_bytes,
    screened_seconds,
)
from svftool.auditing.metrics import METRICS, Measured, Metric, choose_metrics
from svftool.auditing.policy import Policy, Violation, read_policy
from svftool.auditing.results import (
    AuditResult,
    Comparison,
    Coverage,
    Curves,
    Row,
    Trajectory,
    Unread,
    trajectory_of,
)
from svftool.auditing.sources import AuditSource, open_source
from svftool.auditing.tuned_files import compare_tuned
from svftool.auditing.verdicts import VERDICTS, Verdict, judge, judge_all, judge_tensor
from svftool.choices.metrics import check_metric, metric_key, metric_name

__all__ = [
    "METRICS",
    "VERDICTS",
    "AuditResult",
    "AuditSource",
    "BaseMatrix",
    "ChangedMatrix",
    "Comparison",
    "Counterparts",
    "Coverage",
    "Curves",
    "Directions",
    "Edit",
    "Evidence",
    "Found",
    "Gate",
    "Gatekeeper",
    "Held",
    "Matching",
    "Measured",
    "Metric",
    "NamePair",
    "Policy",
    "Row",
    "ScreenedBase",
    "SharedSpace",
    "Tokens",
    "Trajectory",
    "Tuned",
    "Unread",
    "Verdict",
    "Violation",
    "as_in_base",
    "audit_budget",
    "audit_bytes",
    "check_metric",
    "choose_metrics",
    "close",
    "compare_spectra",
    "compare_tuned",
    "compare_vectors",
    "compared_seconds",
    "counterparts",
    "judge",
    "judge_all",
    "judge_tensor",
    "judged",
    "judged_codes",
    "judged_row",
    "match_names",
    "metric_key",
    "metric_name",
    "open_source",
    "parse_gate",
    "read_policy",
    "screen_budget",
    "screen_bytes",
    "screened_seconds",
    "trajectory_of",
    "tripped",
    "violations",
]
