"""Output heads that are the embedding, and what an adapter of one of the two does to the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from svftool.adapters.adapter import Adapter
from svftool.auditing.results import Shape
from svftool.auditing.sources import AuditSource
from svftool.checkpoints import is_vocabulary, output_heads
from svftool.errors import CheckpointError
from svftool.factors.config_shapes import is_output_head

_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
"""How the classes of transformers end that have an output head of the whole vocabulary."""
_HEAD = "lm_head.weight"
_TABLES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "transformer.word_embeddings.weight",
)
"""Embeddings to which `_HEAD` is tied in models without an encoder."""
_OTHER_HEADS = frozenset(
    {"biogpt", "gpt_neox_japanese", "kosmos-2", "trocr", "blt", "csm", "idefics"}
)
"""Kinds of models whose head has another name, or more to it than a table."""


@dataclass(frozen=True)
class Tying:
    """What an adapter does to an embedding and to the head that is tied to it.

    Attributes
    ----------
    untied : mapping of str to str
        The embedding whose old values a head keeps, by the head's name; the base need not have
        stored the head.
    warnings : tuple of str
        What a merge cannot do as PEFT does it.
    """

    untied: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def tied_heads(base: AuditSource) -> dict[str, list[str]]:
    """Return the output heads that are in the file and that the model ties, with their embeddings.

    The configuration of a classifier says that the head is tied, too: that of the pre-training.
    """
    if base.config is None or base.config.get("tie_word_embeddings") is not True:
        return {}
    tables: dict[Shape, list[str]] = {}
    for name, info in base.infos.items():
        if is_vocabulary(info):
            tables.setdefault(info.shape, []).append(name)
    return {
        head: tables[base.infos[head].shape]
        for head in sorted(output_heads(base.infos.values()))
        if base.infos[head].shape in tables
    }


def refuse_tied_heads(
    base: AuditSource, lora: Adapter, found: Mapping[str, str], tied: Collection[str]
) -> None:
    """Refuse an adapter of a head that is the embedding: PEFT's merge changes both, or one twice.

    A tied head is often in no file: then it has the embedding's shape and no counterpart.

    Raises
    ------
    CheckpointError
        If the adapter has a layer of such a head.
    """
    embeddings = {info.shape for info in base.infos.values() if is_vocabulary(info)}
    wrong = [
        name
        for name in lora.layers
        if (found[name] in tied if name in found else lora.sides(name) in embeddings)
    ]
    if wrong:
        raise CheckpointError(
            f"{lora.path}: {wrong[0]!r}: an adapter of an output head that is tied to the "
            "embedding, which its merge changes too, expected a head of its own. Merge the "
            "adapter with PEFT and inspect the merged checkpoint."
        )


def tying_of(base: AuditSource, lora: Adapter, found: Mapping[str, str]) -> Tying:
    """Find the heads that an adapter of the embedding leaves behind, or takes along.

    Parameters
    ----------
    base : AuditSource
    lora : Adapter
    found : mapping of str to str
        Name in the base, by name in the adapter.
    """
    untied, warnings = {}, []
    saved = [name for name in lora.whole if is_output_head(name)]
    for mine, table in found.items():
        head = _head_of(base, table) if table in base.infos else None
        if head is None:
            continue
        if mine in lora.layers:
            warnings.append(
                f"{lora.path}: {table} is the output head too: its merge changes both, as PEFT's "
                "does; the adapter that PEFT runs unmerged changes the embedding alone"
            )
        elif mine in lora.listed and not saved:
            same = lora.info(lora.whole[mine]).shape == base.infos[table].shape
            if same and (head in base.infos or _is_known(base, table)):
                untied[head] = table
            else:
                warnings.append(
                    f"{lora.path}: {table} is replaced, and so is the output head, which is tied "
                    "to it; PEFT leaves the head as it was. Merge the adapter with PEFT"
                )
    return Tying(untied, tuple(warnings))


def say_untied(lora: Adapter, tying: Tying) -> Iterator[str]:
    """Yield a sentence for each head that only a merge to dense weights can leave as it was."""
    for head, table in tying.untied.items():
        yield (
            f"{lora.path}: {table} is replaced, and {head}, which is tied to it, is not: it keeps "
            "the old values in PEFT, but here follows the new ones wherever both stay tied. Merge "
            "the adapter with 'svftool merge BASE ADAPTER', which unties them"
        )


def is_tied_copy(lora: Adapter, name: str, found: Mapping[str, str]) -> bool:
    """Whether the adapter stores a head that is, bit for bit, the embedding that it stores too."""
    if name not in lora.whole or not is_output_head(name):
        return False
    own = lora.info(lora.whole[name])
    twins = (
        info.name
        for mine in found
        if mine in lora.whole
        and (info := lora.info(lora.whole[mine])).shape == own.shape
        and info.dtype == own.dtype
    )
    return any(torch.equal(lora.read(twin), lora.read(own.name)) for twin in twins)


def _head_of(base: AuditSource, table: str) -> str | None:
    """Return the head that is tied to a table, in the file or not; None where there is none."""
    if base.config is None or not is_vocabulary(base.infos[table]):
        return None
    stored = [head for head, tables in tied_heads(base).items() if table in tables]
    if stored:
        return stored[0]
    inner = base.config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    said = [one.get("tie_word_embeddings") for one in (base.config, inner)]
    classes = base.config.get("architectures") or ()
    named = any(str(one).endswith(_MODELS) for one in classes) if classes else True in said
    own = any(base.infos[one].shape == base.infos[table].shape for one in _heads(base))
    # Without a head in the file, a model that has one can only have tied it.
    return None if own or not named or said[0] is False or said == [None, False] else _HEAD


def _heads(base: AuditSource) -> list[str]:
    return [
        name for name in output_heads(base.infos.values()) if not is_vocabulary(base.infos[name])
    ]


def _is_known(base: AuditSource, table: str) -> bool:
    """Whether the head that no file has is called `_HEAD`, and no other table is tied."""
    config = base.config or {}
    several = bool(config.get("is_encoder_decoder")) or config.get("model_type") in _OTHER_HEADS
    masked = any(str(one).endswith("ForMaskedLM") for one in config.get("architectures") or ())
    return not several and not masked and f".{table}".endswith(tuple(f".{one}" for one in _TABLES))
