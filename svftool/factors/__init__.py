"""Factor checkpoints and tuned files: schema, reading, writing, and the merge of one weight."""

from svftool.factors.delta import Merged, add_delta, rebuild
from svftool.factors.schema import (
    CONFIG_FILE,
    BaseRecord,
    FactorConfig,
    LayerRecord,
    config_to_json,
    read_config,
)
from svftool.factors.store import STEM, FactorStore, LayerFactors, is_factors, open_factors
from svftool.factors.tuned import TunedFile, check_tuned, is_tuned, read_tuned, write_tuned
from svftool.factors.writer import FactorWriter, LayerLayout, write_config

__all__ = [
    "CONFIG_FILE",
    "STEM",
    "BaseRecord",
    "FactorConfig",
    "FactorStore",
    "FactorWriter",
    "LayerFactors",
    "LayerLayout",
    "LayerRecord",
    "Merged",
    "TunedFile",
    "add_delta",
    "check_tuned",
    "config_to_json",
    "is_factors",
    "is_tuned",
    "open_factors",
    "read_config",
    "read_tuned",
    "rebuild",
    "write_config",
    "write_tuned",
]
