"""What a fine-tune changed: sources, matching of names, drift of layers, verdicts, gates."""

from svftool.auditing.drift import LayerDrift, drift_of_factors, drift_of_tuned, single_spectrum
from svftool.auditing.gates import Gate, parse_gate, tripped
from svftool.auditing.matching import Matching, Pair, match_names
from svftool.auditing.sources import Source, open_source
from svftool.auditing.verdicts import VERDICTS, layer_verdict, overall_verdict

__all__ = [
    "VERDICTS",
    "Gate",
    "LayerDrift",
    "Matching",
    "Pair",
    "Source",
    "drift_of_factors",
    "drift_of_tuned",
    "layer_verdict",
    "match_names",
    "open_source",
    "overall_verdict",
    "parse_gate",
    "single_spectrum",
    "tripped",
]
