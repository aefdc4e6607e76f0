"""Trainable singular values on live modules: attach, train, save, swap, detach."""

from svftool.attaching.attachment import Attachment, find_attachment, load_tuned, save_tuned
from svftool.attaching.layer import AttachedLayer
from svftool.attaching.lifecycle import attach, detach
from svftool.attaching.names import NameMap, map_names
from svftool.attaching.regimes import Trainable, apply_regime, weight_gradients
from svftool.attaching.weight import AttachedWeight, Mode
from svftool.choices.regimes import Regime, parse_regime
from svftool.choices.singular_values import Band, Parametrisation, parse_band

__all__ = [
    "AttachedLayer",
    "AttachedWeight",
    "Attachment",
    "Band",
    "Mode",
    "NameMap",
    "Parametrisation",
    "Regime",
    "Trainable",
    "apply_regime",
    "attach",
    "detach",
    "find_attachment",
    "load_tuned",
    "map_names",
    "parse_band",
    "parse_regime",
    "save_tuned",
    "weight_gradients",
]
