"""What ``adapter_config.json`` says, checked before anything uses it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from svftool.errors import CheckpointError, shortlist, system_fault
from svftool.files.header import parse_json

# Match a regular expression in time that grows with the text, whatever the pattern is.
#
# Patterns of an adapter's configuration come from elsewhere. ``re`` goes back and forth over a
# text, and for ``(a|a)*b`` that takes hours. Here each part of a pattern maps a start to all ends
# that it can reach, once for each start.


LONGEST = 2000
"""Characters of a pattern."""
_REPEATS = 1000
_PLAIN = re.compile(r"[\w.\-]*")
_ZERO_WIDTH = {
    sre.AT_BEGINNING: r"^",
    sre.AT_BEGINNING_STRING: r"\A",
    sre.AT_END: r"$",
    sre.AT_END_STRING: r"\Z",
    sre.AT_BOUNDARY: r"\b",
    sre.AT_NON_BOUNDARY: r"\B",
}


def ends_with(pattern: str, text: str) -> bool:
    r"""Tell whether a pattern matches a module's name from one of its dots to its end.

    It is what PEFT asks: ``re.match(rf"(.*\.)?({pattern})$", text)``.

    Raises
    ------
    ValueError
        If it is no regular expression, or one that cannot be matched in bounded time: references,
        looking around, flags.

    Examples
    --------
    >>> ends_with("q_proj", "layers.0.q_proj"), ends_with("q_proj", "layers.0.eq_proj")
    (True, False)
    >>> ends_with("(a|a)*b", "a" * 40)
    False
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} characters, expected at most {LONGEST}")
    whole = rf"(?:.*\.)?(?:{pattern})"
    if _PLAIN.fullmatch(pattern):
        return re.fullmatch(whole, text) is not None
    try:
        parsed = _parser.parse(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression ({error})") from error
    if parsed.state.flags & ~re.UNICODE.value:
        raise ValueError("flags, expected none")
    return len(text) in _Reach(text).through(parsed, frozenset({0}))


class _Reach:
    """Where parts of a pattern can end in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[tuple[int, int], frozenset[int]] = {}
        self._tests: dict[int, Callable[[str], object]] = {}

    def through(self, parts: Iterable[Any], starts: frozenset[int]) -> frozenset[int]:
        """Return where a sequence can end that begins at one of `starts`."""
        for part in parts:
            if not starts:
                break
            starts = frozenset().union(*(self._from(part, start) for start in starts))
        return starts

    def _from(self, part: Any, start: int) -> frozenset[int]:
        # The parsed pattern outlives this object, so identities are not used twice.
        key = id(part), start
        if key not in self._known:
            self._known[key] = self._ends(part, start)
        return self._known[key]

    def _ends(self, part: Any, start: int) -> frozenset[int]:
        kind, value = part
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            found = start < len(self._text) and _is_one(kind, value, self._text[start])
            return frozenset({start + 1}) if found else frozenset()
        if kind is sre.AT and value in _ZERO_WIDTH:
            found = re.compile(_ZERO_WIDTH[value]).match(self._text, start) is not None
            return frozenset({start}) if found else frozenset()
        if kind is sre.BRANCH:
            return frozenset().union(*(self.through(one, frozenset({start})) for one in value[1]))
        if kind is sre.SUBPATTERN and not value[1] and not value[2]:
            return self.through(value[3], frozenset({start}))
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeated(value[0], value[1], value[2], start)
        raise ValueError(f"{str(kind).lower()} in a pattern, expected none")

    def _repeated(self, least: int, most: Any, body: Any, start: int) -> frozenset[int]:
        endless = most is sre.MAXREPEAT
        if least > _REPEATS or not (endless or most <= _REPEATS):
            raise ValueError(f"more than {_REPEATS} repetitions in a pattern")
        reached = frozenset({start})
        for _ in range(least):
            reached = self.through(body, reached)
        total, new, count = reached, reached, least
        while new and (endless or count < most):
            new = self.through(body, new) - total
            total, count = total | new, count + 1
        return total


def _is_one(kind: Any, value: Any, character: str) -> bool:
    if kind is sre.ANY:
        return character != "\n"
    if kind is not sre.IN:
        return bool((ord(character) == value) == (kind is sre.LITERAL))
    negated = value[0][0] is sre.NEGATE
    return any(_in(item, character) for item in value[negated:]) != negated


_CATEGORIES: dict[Any, tuple[str, bool]] = {
    sre.CATEGORY_DIGIT: (r"\d", True),
    sre.CATEGORY_NOT_DIGIT: (r"\d", False),
    sre.CATEGORY_SPACE: (r"\s", True),
    sre.CATEGORY_NOT_SPACE: (r"\s", False),
    sre.CATEGORY_WORD: (r"\w", True),
    sre.CATEGORY_NOT_WORD: (r"\w", False),
}


def _in(item: Any, character: str) -> bool:
    kind, value = item
    if kind is sre.LITERAL:
        return bool(ord(character) == value)
    if kind is sre.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    pattern, wanted = _CATEGORIES[value]
    return bool((re.match(pattern, character) is not None) == wanted)


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
        config = parse_json(raw)
    except (OSError, ValueError) as error:
        system_fault(error, path)
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
