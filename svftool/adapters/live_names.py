"""What the installed transformers calls the tensors of a file on its live model.

It renames the modules of some kinds of models as it loads them. PEFT looks for modules on the live
model, so that an adapter goes by the new names and the checkpoint by the old ones.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from svftool.checkpoints.base import TensorInfo

_COUNTED = re.compile(r".*(layers?|depths?|blocks?)")


@dataclass(frozen=True)
class LiveNames:
    """Names on the live model, by those of the file.

    Attributes
    ----------
    names : mapping of str to str
        Of tensors that are called otherwise there.
    inside : mapping of str to str
        Tensors that are a part of a larger one there.
    version : str
        Of the transformers that was asked.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)
    version: str = ""


def live_names(infos: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> LiveNames:
    """Ask the installed transformers what it calls the tensors of a file.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        Tensors of the file.
    config : mapping or None
        Its ``config.json``.

    Returns
    -------
    LiveNames
        Empty where transformers is not installed, is older than 5, or does not know the model.
    """
    config = config or {}
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    known = isinstance(name, str) and "model_type" in config and _most_layers(config) <= len(infos)
    if not known or importlib.util.find_spec("transformers") is None:
        return LiveNames()
    try:
        return _asked(infos, config, str(name))
    except Exception:  # noqa: BLE001  (foreign code: then the file's names are all that is known)
        return LiveNames()


def _asked(infos: Mapping[str, TensorInfo], config: Mapping[str, Any], name: str) -> LiveNames:
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    kind = getattr(transformers, name)
    if not issubclass(kind, transformers.PreTrainedModel):
        return LiveNames()
    with _quiet(transformers), torch.device("meta"):
        model: Any = kind(kind.config_class.from_dict(_plain(config)))
        steps = get_model_conversion_mapping(model)
    state = model.state_dict()
    renamings = [one for one in steps if isinstance(one, WeightRenaming)]
    converters = [one for one in steps if isinstance(one, WeightConverter)]
    names, inside = {}, {}
    for own, info in infos.items():
        prefix = model.base_model_prefix
        live, converted = rename_source_key(own, renamings, converters, prefix, state)
        if live == own or live not in state:
            continue
        if converted is None and tuple(state[live].shape) == info.shape:
            names[own] = live
        elif converted is not None:
            inside[own] = live
    counts = Counter(names.values())
    once = {own: live for own, live in names.items() if counts[live] == 1 and live not in infos}
    return LiveNames(once, inside, transformers.__version__)


def _most_layers(config: Mapping[str, Any]) -> int:
    """Return the largest count of layers, in the configuration or a part of it."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    counts = [0]
    for key, value in (pair for one in (config, *nested) for pair in one.items()):
        if _COUNTED.fullmatch(str(key)):
            numbers = value if isinstance(value, list) else [value]
            counts += [one for one in numbers if type(one) is int]
    return max(counts)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what would fetch code or change how weights are held."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if "implementation" not in key and key not in ("quantization_config", "auto_map")
    }


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
