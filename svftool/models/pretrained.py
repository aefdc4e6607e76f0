"""Load a transformers model from a checkpoint folder, strictly and without code from the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.errors import MissingDependencyError, ModelError, brief, system_fault
from svftool.models.load import no_larger_than, refuse_differences


def load_transformers(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> nn.Module:
    """Load the model that ``config.json`` names under ``architectures``.

    Parameters
    ----------
    checkpoint : Checkpoint
        A folder in transformers' layout.
    dtype : torch.dtype or None
        Of the weights; None takes the checkpoint's.
    trust_remote_code : bool
        Whether code that lies in the folder (``auto_map``) may run.

    Raises
    ------
    ModelError
        If the class is unknown, needs code that is not trusted, or takes other tensors.
    MissingDependencyError
        If transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        purpose = f"the model of {checkpoint.path}"
        raise MissingDependencyError("transformers", extra="language", purpose=purpose) from None
    numbers = _stands_for_numbers(checkpoint)
    if not checkpoint.is_folder and not numbers:
        raise ModelError(
            f"{checkpoint.path}: a single file, expected its folder for a transformers model. "
            "Give the folder that also holds config.json."
        )
    _refuse_counts(checkpoint, checkpoint.config or {})
    factory = _factory(transformers, checkpoint, trust_remote_code)
    try:
        given = _numbers(transformers, checkpoint, dtype) if numbers else {}
        with _quiet(transformers), no_larger_than(checkpoint):
            model, report = factory.from_pretrained(
                None if numbers else checkpoint.path,
                local_files_only=True,
                output_loading_info=True,
                dtype="auto" if dtype is None else dtype,
                # Always said: without an answer, transformers asks on the terminal.
                trust_remote_code=trust_remote_code,
                **given,
            )
    except ModelError:
        raise
    except Exception as error:
        system_fault(error, checkpoint.path)
        text = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{checkpoint.path}: transformers cannot load it ({type(error).__name__}: {text}). "
            "Check config.json and the installed version of transformers."
        ) from error
    _check(checkpoint, report)
    loaded: nn.Module = model
    return loaded


def _stands_for_numbers(checkpoint: Checkpoint) -> bool:
    """Whether weights are stored as codes that are read here as numbers."""
    coded = any(info.storage for info in checkpoint.infos.values())
    return checkpoint.format == "gguf" or coded


def _numbers(
    transformers: ModuleType, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return the weights as numbers, and a configuration that knows of no codes.

    Each is rounded as it is read, so that no second copy in single precision is held.

    transformers' own ways to read codes keep them in the model, need a GPU or a package for each
    format, and train none of them.
    """
    config = dict(checkpoint.config or {})
    config.pop("quantization_config", None)
    kind = str(config.pop("model_type", ""))
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    return {
        "config": transformers.AutoConfig.for_model(kind, **config),
        "state_dict": {name: _rounded(checkpoint.read(name), dtype) for name in checkpoint.infos},
    }


def _rounded(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


_COUNTED = re.compile(r"(num|n)_.*|.*(layers?|depths?|blocks?|labels|heads|size|dim)")
_MOST = 1 << 22


def _refuse_counts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse counts that no model has, before a configuration makes lists of that length.

    Raises
    ------
    ModelError
        If there is one.
    """
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for key, value in (pair for one in (config, *nested) for pair in one.items()):
        numbers = value if isinstance(value, list) else [value]
        large = any(type(one) is int and one > _MOST for one in numbers)
        if large and _COUNTED.fullmatch(str(key)):
            raise ModelError(
                f"{checkpoint.path}: config.json: {key} is {brief(value)}, expected at most "
                f"{_MOST}. Repair config.json, or name the model with --model."
            )


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Keep transformers' bars and load reports off the terminal: the report is checked here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _factory(transformers: ModuleType, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    config = checkpoint.config or {}
    name = _architecture(checkpoint, config)
    kernel = _foreign_kernel(config, _NESTED)
    if kernel is not None and not trust_remote_code:
        raise ModelError(
            f"{checkpoint.path}: config.json takes the kernel {kernel[:60]!r} from the hub, which "
            "is code. Remove it from config.json, or allow it with --trust-remote-code."
        )
    own = transformers.AutoModel if name is None else _own_class(transformers, name)
    if own is not None:
        return own
    remote = _remote_class(transformers, config, str(name))
    if remote is None:
        raise ModelError(
            f"{checkpoint.path}: config.json names {brief(name)}, unknown to this transformers. "
            "Install a newer transformers, or name the model with --model FILE.py:FACTORY."
        )
    if not trust_remote_code:
        raise ModelError(
            f"{checkpoint.path}: {brief(name)} needs Python code that lies beside the checkpoint. "
            "Read that code, then allow it with --trust-remote-code."
        )
    return remote


_NESTED = 4


def _foreign_kernel(config: Mapping[str, Any], depth: int) -> str | None:
    """Return the repository that an ``..._implementation`` of a configuration names, if any."""
    for key, value in config.items():
        inner = value if isinstance(value, Mapping) else {}
        if "implementation" in key:
            named = [one for one in (value, *inner.values()) if isinstance(one, str) and "/" in one]
            if named:
                return named[0]
        found = _foreign_kernel(inner, depth - 1) if depth else None
        if found is not None:
            return found
    return None


def _architecture(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{checkpoint.path}: config.json: architectures is {brief(names)}, expected a "
            "list of class names. Repair config.json, or name the model with --model."
        )
    return names[0] if names else None


def _own_class(transformers: ModuleType, name: str) -> Any:
    """Return transformers' class of a model; None for other names that it has."""
    found = getattr(transformers, name, None)
    return found if callable(getattr(found, "from_pretrained", None)) else None


def _remote_class(transformers: ModuleType, config: Mapping[str, Any], name: str) -> Any:
    known = config.get("auto_map")
    for auto, reference in known.items() if isinstance(known, Mapping) else ():
        target = reference[0] if isinstance(reference, list) and reference else reference
        if auto.startswith("AutoModel") and str(target).endswith(f".{name}"):
            return getattr(transformers, auto, None)
    return None


def _check(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    misshapen = [
        f"{name} {tuple(found)} (the model has {tuple(expected)})"
        for name, found, expected in sorted(report.get("mismatched_keys", ()))
    ]
    refuse_differences(
        checkpoint,
        "the model of config.json",
        missing=sorted(report.get("missing_keys", ())),
        unexpected=sorted(report.get("unexpected_keys", ())),
        misshapen=misshapen,
    )
