"""Factor checkpoints and tuned files: schema, reading, writing, and the merge of one weight."""

from svftool.factors.assembly import ShardAssembly
from svftool.factors.delta import Merged, add_change, add_delta, rebuild
from svftool.factors.places import LayerJournal, ShardPlaces
from svftool.factors.schema import (
    CONFIG_FILE,
    BaseRecord,
    FactorConfig,
    LayerRecord,
    config_to_json,
    read_config,
)
from svftool.factors.spectral import PARTS, SpectralChange, Terms
from svftool.factors.spool import FinishedLayer, LayerSpool, digests_of
from svftool.factors.store import STEM, FactorStore, LayerFactors, is_factors, open_factors
from svftool.factors.tuned import TunedFile, check_tuned, is_tuned, read_tuned, write_tuned
from svftool.factors.writer import (
    FactorShard,
    check_names,
    check_storable,
    factor_infos,
    finish_factors,
    plan_factor_shards,
)

__all__ = [
    "CONFIG_FILE",
    "PARTS",
    "STEM",
    "BaseRecord",
    "FactorConfig",
    "FactorShard",
    "FactorStore",
    "FinishedLayer",
    "LayerFactors",
    "LayerJournal",
    "LayerRecord",
    "LayerSpool",
    "Merged",
    "ShardAssembly",
    "ShardPlaces",
    "SpectralChange",
    "Terms",
    "TunedFile",
    "add_change",
    "add_delta",
    "check_names",
    "check_storable",
    "check_tuned",
    "config_to_json",
    "digests_of",
    "factor_infos",
    "finish_factors",
    "is_factors",
    "is_tuned",
    "open_factors",
    "plan_factor_shards",
    "read_config",
    "read_tuned",
    "rebuild",
    "write_tuned",
]
