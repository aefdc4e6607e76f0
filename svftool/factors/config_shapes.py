"""``config.json`` beside tensors that are not shaped as it says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]

# What the rows of a tensor count, by its name, and how configurations call it. The first that
# fits decides: a table of positions is an embedding too.
_ROWS = (
    (re.compile(r"token_type|segment"), ("type_vocab_size",)),
    (
        re.compile(r"position|wpe|pos_emb"),
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_source_positions",
            "max_target_positions",
        ),
    ),
    (
        re.compile(r"embed|wte|word|lm_head|shared|tok|predictions|output_projection|cls\."),
        ("vocab_size", "decoder_vocab_size", "padded_vocab_size"),
    ),
)  # fmt: skip
_HEAD = re.compile(r"(^|\.)(classifier|score|head|fc|logits|out_proj|qa_outputs)\b")
_OFFSET = 2
"""Rows that tables of positions may have beyond what the configuration says."""


def is_output_head(name: str) -> bool:
    """Tell whether a tensor is the output table of a language model.

    Examples
    --------
    >>> is_output_head("lm_head.weight"), is_output_head("model.norm.weight")
    (True, False)
    """
    return bool(re.search(r"(^|\.)(lm_head|embed_out|output_layer)\.weight$", name))


def follow_shapes(
    config: dict[str, Any], reshaped: Mapping[str, tuple[Shape, Shape]]
) -> tuple[dict[str, Any], list[str]]:
    """Make a configuration say the new shapes of tensors.

    Parameters
    ----------
    config : dict
        As in ``config.json``, of transformers or timm.
    reshaped : mapping of str to (old, new)
        Shapes by tensor name.

    Returns
    -------
    config : dict
        A copy; unchanged where nothing in it is about these shapes.
    unexplained : list of str
        Tensors whose new shape it does not follow.

    Examples
    --------
    >>> follow_shapes({"vocab_size": 5}, {"embed.weight": ((5, 2), (7, 2))})
    ({'vocab_size': 7}, [])
    """
    unexplained = []
    for name, (old, new) in reshaped.items():
        changed = [
            (axis, one, other)
            for axis, (one, other) in enumerate(zip(old, new, strict=False))
            if one != other
        ]
        done = len(old) == len(new)
        for axis, before, after in changed:
            config, found = _follow(config, name, axis, before, after)
            done = done and found
        if not done:
            unexplained.append(name)
    return config, unexplained


def _follow(
    config: dict[str, Any], name: str, axis: int, before: int, after: int
) -> tuple[dict[str, Any], bool]:
    if axis == 0:
        if _HEAD.search(name) and not is_output_head(name):
            return _follow_labels(config, before, after)
        for pattern, keys in _ROWS:
            if pattern.search(name):
                offset = _OFFSET if "n_ctx" in keys else 0
                return _set(config, keys, before, after, offset)
    fitting = tuple(key for key, value in _numbers(config) if value in (before, after))
    return _set(config, fitting, before, after) if len(set(fitting)) == 1 else (config, False)


def _numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """List the sizes in a configuration and in its parts."""
    found = [(key, value) for key, value in config.items() if type(value) is int and value > 1]
    found = [(key, value) for key, value in found if not key.endswith(("_id", "_ids"))]
    parts = [value for value in config.values() if isinstance(value, Mapping)]
    return found + [pair for part in parts for pair in _numbers(part)]


def _set(
    config: dict[str, Any], keys: Sequence[str], before: int, after: int, offset: int = 0
) -> tuple[dict[str, Any], bool]:
    """Replace a size wherever it stands under one of the keys; one that is right already is fine.

    Shared rows (a table and its output) are met more than once.
    """
    result, found = dict(config), False
    for key, value in config.items():
        if isinstance(value, dict):
            result[key], inner = _set(value, keys, before, after, offset)
            found = found or inner
        elif key in keys and type(value) is int and 0 <= before - value <= offset:
            result[key], found = value + after - before, True
        elif key in keys and type(value) is int and 0 <= after - value <= offset:
            found = True
    return result, found


def _follow_labels(config: dict[str, Any], before: int, after: int) -> tuple[dict[str, Any], bool]:
    if "architecture" in config or "num_classes" in config:
        names = config.get("label_names")
        stale = names is not None and len(names) != after
        kept = {key: one for key, one in config.items() if not (stale and key == "label_names")}
        return {**kept, "num_classes": after}, True
    labels = config.get("id2label")
    known = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if known == after:
        return config, True
    if known != before:
        return config, False
    return follow_classes(config, [f"LABEL_{number}" for number in range(after)]), True


def untie(config: dict[str, Any]) -> dict[str, Any]:
    """Make ``config.json`` say that the output head is not the embedding.

    Examples
    --------
    >>> untie({"text_config": {"tie_word_embeddings": True}})
    {'text_config': {'tie_word_embeddings': False}, 'tie_word_embeddings': False}
    """
    inner = config.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        config = {**config, "text_config": {**inner, "tie_word_embeddings": False}}
    return {**config, "tie_word_embeddings": False}


def follow_classes(config: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Make ``config.json`` name the classes of a new head, as transformers and timm read it.

    Examples
    --------
    >>> follow_classes({"model_type": "vit"}, ["cat", "dog"])["id2label"]
    {'0': 'cat', '1': 'dog'}
    >>> follow_classes({"architecture": "resnet50", "num_classes": 1000}, ["cat"])["num_classes"]
    1
    """
    if "architecture" in config:
        return {**config, "num_classes": len(classes), "label_names": list(classes)}
    names = list(map(str, classes))
    config = {**config, "id2label": {str(i): name for i, name in enumerate(names)}}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    if "num_labels" in config:
        config["num_labels"] = len(names)
    return config
