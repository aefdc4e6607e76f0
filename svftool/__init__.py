"""Convert, fine-tune, merge and audit checkpoints in the singular-value basis.

Each pretrained weight is written as ``W = U diag(S) Vh``; ``U`` and ``Vh`` stay frozen and only the
singular values ``S`` are trained (Sun et al., NeurIPS 2022, arXiv 2206.06122).

Files in, files out::

    svftool.decompose("model.safetensors", "factors")
    svftool.finetune("factors", data="images", output="tuned.svf.safetensors")
    svftool.evaluate("factors", tuned="tuned.svf.safetensors", data="test")
    svftool.predict("factors", "new-pictures", tuned="tuned.svf.safetensors")
    svftool.merge("factors", ["tuned.svf.safetensors"], output="merged.safetensors")
    svftool.combine("base", ["birds", "cars@0.5"], output="both")
    svftool.audit("model.safetensors", ["merged.safetensors"])
    svftool.extract_lora("base", "tuned", output="lora", options=svftool.LoraOptions(rank="16"))

On a live model: `attach`, `detach`, `save_tuned`, `load_tuned`. Importing this package loads no
torch; the names below are resolved at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svftool.errors import (
    CheckpointError,
    DataError,
    FactorsError,
    GateError,
    MissingDependencyError,
    ModelError,
    NumericalError,
    ResourceError,
    SvftoolError,
    UsageError,
)
from svftool.version import __version__

if TYPE_CHECKING:
    from svftool.attaching import Attachment, attach, detach, save_tuned
    from svftool.checkpoints import open_checkpoint
    from svftool.factors import open_factors, read_tuned
    from svftool.stages.adapt import load_tuned
    from svftool.stages.audit import audit
    from svftool.stages.combine import combine
    from svftool.stages.combine_options import CombineOptions, WeightsFrom
    from svftool.stages.convert import convert
    from svftool.stages.decompose import decompose
    from svftool.stages.evaluate import evaluate
    from svftool.stages.extract import extract
    from svftool.stages.extract_lora import LoraOptions, extract_lora
    from svftool.stages.finetune import finetune
    from svftool.stages.lineage import lineage
    from svftool.stages.merge import merge
    from svftool.stages.predict import predict

__all__ = [
    "Attachment",
    "CheckpointError",
    "CombineOptions",
    "DataError",
    "FactorsError",
    "GateError",
    "LoraOptions",
    "MissingDependencyError",
    "ModelError",
    "NumericalError",
    "ResourceError",
    "SvftoolError",
    "UsageError",
    "WeightsFrom",
    "__version__",
    "attach",
    "audit",
    "combine",
    "convert",
    "decompose",
    "detach",
    "evaluate",
    "extract",
    "extract_lora",
    "finetune",
    "lineage",
    "load_tuned",
    "merge",
    "open_checkpoint",
    "open_factors",
    "predict",
    "read_tuned",
    "save_tuned",
]

_HOMES = {
    "Attachment": "svftool.attaching",
    "CombineOptions": "svftool.stages.combine_options",
    "LoraOptions": "svftool.stages.extract_lora",
    "WeightsFrom": "svftool.stages.combine_options",
    "attach": "svftool.attaching",
    "audit": "svftool.stages.audit",
    "combine": "svftool.stages.combine",
    "convert": "svftool.stages.convert",
    "decompose": "svftool.stages.decompose",
    "detach": "svftool.attaching",
    "evaluate": "svftool.stages.evaluate",
    "extract": "svftool.stages.extract",
    "extract_lora": "svftool.stages.extract_lora",
    "finetune": "svftool.stages.finetune",
    "lineage": "svftool.stages.lineage",
    "load_tuned": "svftool.stages.adapt",
    "merge": "svftool.stages.merge",
    "open_checkpoint": "svftool.checkpoints",
    "open_factors": "svftool.factors",
    "predict": "svftool.stages.predict",
    "read_tuned": "svftool.factors",
    "save_tuned": "svftool.attaching",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
