"""What ``adapter_config.json`` says, checked before anything uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from svftool.adapters.patterns import ends_with
from svftool.errors import CheckpointError, shortlist

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 16 << 20
_WAY_OUT = "Merge the adapter with PEFT and inspect the merged checkpoint."

_UNMERGED = {
    "layer_replication": "layers of the base used several times",
    "alora_invocation_tokens": "an adapter that only some tokens switch on",
    "use_qalora": "groups of inputs",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router between adapters",
    "kasa_config": "singular values of its own, and a truncated base",
    "monteclora_config": "sampled matrices",
}
"""Settings whose adapters change a weight otherwise than by ``B A``, or change no weight at all."""

_KNOWN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout",
    "loftq_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "velora_config",
    *_UNMERGED,
})  # fmt: skip


def _is_flag(value: Any) -> bool:
    return value is None or value in (True, False)


def _is_count(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer() and value > 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _are_tokens(value: Any) -> bool:
    if value is None or _are_indices(value):
        return True
    return isinstance(value, dict) and all(map(_are_indices, value.values()))


def _are_indices(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    return whole and all(0 <= one < 1 << 40 for one in value) and len(set(value)) == len(value)


def _are_patterns(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(allowed, value.values())))

    return check


_EXPECTED: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), _is_flag, "true or false"),
    (("r",), _is_count, "a whole number above 0"),
    (("lora_alpha",), _is_number, "a finite number"),
    (("rank_pattern",), _are_patterns(_is_count), "an object of whole numbers above 0"),
    (("alpha_pattern",), _are_patterns(_is_number), "an object of finite numbers"),
    (("target_parameters", "modules_to_save"), _are_texts, "a list of strings"),
    (("base_model_name_or_path", "bias"), _is_text, "a string"),
    (
        ("trainable_token_indices",),
        _are_tokens,
        "a list of different token numbers, or an object of such lists",
    ),
    (("init_lora_weights",), lambda one: _is_flag(one) or isinstance(one, str), "true or a string"),
)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read PEFT's configuration of a LoRA adapter.

    Parameters
    ----------
    path : Path
        ``adapter_config.json``.

    Raises
    ------
    CheckpointError
        If it is no configuration, of another kind of adapter, or asks for what is not read here.
    """
    config = _read(path)
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise CheckpointError(
            f"{path.parent}: the adapter's peft_type is {_shown(kind)}, expected 'LORA'. {_WAY_OUT}"
        )
    for keys, fits, expected in _EXPECTED:
        for key in keys:
            if key in config and not fits(config[key]):
                raise CheckpointError(
                    f"{path}: {key} is {_shown(config[key])}, expected {expected}. "
                    "Copy or save the adapter again."
                )
    asked = [f"{key} ({why})" for key, why in _UNMERGED.items() if config.get(key)]
    if asked:
        raise CheckpointError(
            f"{path}: {shortlist(asked, 2)}, expected an adapter that adds B A to weights. "
            f"{_WAY_OUT}"
        )
    return config


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that are set and that nothing here knows."""
    return sorted(key for key, value in config.items() if value and key not in _KNOWN)


def pattern_value(path: Path, patterns: Mapping[str, Any] | None, module: str) -> Any:
    """Return the value of the first pattern that matches a module, as PEFT finds it; else None.

    Raises
    ------
    CheckpointError
        If a pattern cannot be matched in bounded time.
    """
    for pattern, value in (patterns or {}).items():
        try:
            if ends_with(pattern, module):
                return value
        except ValueError as error:
            raise CheckpointError(
                f"{path}: pattern {_shown(pattern)}: {error}, expected a plain regular expression. "
                f"{_WAY_OUT}"
            ) from error
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES)
        config = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise CheckpointError(f"{path}: {reason}, expected PEFT's configuration.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON {type(config).__name__}, expected an object.")
    return config


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a JSON {type(value).__name__}" if len(str(value)) > 60 else repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a number of too many digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
