"""What a tensor is for, judged by its name: embedding, output head, bias table, scale, experts.

Names are all that a checkpoint tells. The rules follow the naming of torchvision, timm,
transformers and the papers' own code; what they miss is brought in or left out by a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from svftool.checkpoints.base import TensorInfo

_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "quantisation scale or packed integers",
        re.compile(
            r"(.+_)?scale(_inv|_2)|(weight|input|output|activation|act|k|v|q)_scale|scales?_and_zeros?"
            r"|scales|q?zeros|(.+_)?zero_points?|qweight|weight_packed|weight_shape|g_idx|(nested_)?absmax"
            r"|(nested_)?quant_map|SCB|.*_(blocks|scales)",
        ),
    ),
    (
        "relative position table",
        re.compile(
            r"rel(ative)?_pos(ition)?(_bias)?_(table|bias|index|embeddings?)|rel_pos_[hwdt]|rel_pos_bias"
            r"|relative_attention_bias|relative_position_bias|rel_embeddings|relative_position_[kv]|rel_pos"
        ),
    ),
    ("attention bias table", re.compile(r"attention_bias(es)?|attn_bias(es)?")),
    ("attention mask", re.compile(r"(.+_)?mask")),
    (
        "position embedding",
        re.compile(
            r"wpe|pe|embed_positions?|(.*_)?pos(ition(al)?)?_?(emb|embed|embeds|embedding|embeddings|encoding|enc)(_.*)?"
            r"|(cos|sin)_cached|(spatial|temporal)_pos.*|(temporal|time)_(embed|embedding|embeddings)s?"
        ),
    ),
    (
        "token embedding",
        re.compile(
            r"wte|(.*_)?embed_tokens(_.*)?|(.*_)?(word|tok|token|token_type|lang|language|type|entity|class|query|segment)"
            r"_?(emb|embed|embeds|embedding|embeddings)|embed_in|emb|embed|embeds|embedding|embeddings|shared"
            r"|(cls|dist|mask|reg|query|storage)_tokens?"
        ),
    ),
)
_LEAVES = ("weight", "bias")
_WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network"})

# Names that stand for an output head wherever they are; and, as a module at the top of the
# network, only in second place: a network may have an inner layer of that name.
_HEAD_ANYWHERE = re.compile(
    r"lm_head|embed_out|output_projection|qa_outputs|score|logits|(.+_)?classifier|last_linear|conv_seg"
    r"|seq_relationship|cls_score|cls_logits|bbox_pred|mask_fcn_logits|class_embed"
)
_HEAD_BLOCK = re.compile(
    r"heads?|head_dist|fc|(.+_)?classifier|lm_head|last_linear|classification_head"
)
_HEAD_LAST = ("linear", "output", "proj_out")
_FINAL = re.compile(r"heads?|fc|linear|l|out_proj|out|decoder|last_layer|logits|classifier")
_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)")
_MOE = re.compile(r"moe|expert", re.IGNORECASE)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def owner(name: str) -> str:
    """Return the module that a tensor belongs to, or the tensor's own name where it stands alone.

    Examples
    --------
    >>> owner("transformer.wte.weight"), owner("blocks.0.attn.relative_position_bias_table")
    ('wte', 'relative_position_bias_table')
    """
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] in _LEAVES else parts[-1]


def table_role(info: TensorInfo) -> str | None:
    """Return what a tensor is if it is a table rather than a weight that maps, else None."""
    who = owner(info.name)
    for role, pattern in _RULES:
        if pattern.fullmatch(who) and not (role == "token embedding" and _maps(info, who)):
            return role
    return None


def _maps(info: TensorInfo, who: str) -> bool:
    """Tell a convolution, or a deep layer called ``shared``, from an embedding of that name."""
    if len(info.shape) > 3:
        return True
    return who == "shared" and info.name.count(".") > 2


def output_heads(infos: Iterable[TensorInfo]) -> frozenset[str]:
    """Return the names of the weights that are the network's output heads.

    Parameters
    ----------
    infos : iterable of TensorInfo
        All tensors of the checkpoint: whether a layer is the head depends on what else there is.
    """
    paths = {
        info.name: _module_path(info.name)
        for info in infos
        if len(info.shape) > 1 and owner(info.name) != info.name.rpartition(".")[2]
    }
    heads = {name for name, path in paths.items() if _HEAD_ANYWHERE.fullmatch(path[-1])}
    heads |= {name for name, path in paths.items() if _is_named_output(path)}
    heads |= _last_of_blocks(paths)
    if not heads:
        heads = {name for name, path in paths.items() if len(path) == 1 and path[0] in _HEAD_LAST}
    return frozenset(heads)


def _module_path(name: str) -> tuple[str, ...]:
    """Return the modules that lead to a tensor, wrappers at the front left out."""
    parts = name.split(".")[:-1]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return tuple(parts)


def _is_named_output(path: tuple[str, ...]) -> bool:
    """Recognise output layers that have plain names inside a head of a known name."""
    if len(path) < 2:
        return False
    inner, outer = path[-1], path[-2]
    if inner == "decoder":
        return outer in ("predictions", "lm_head")
    return inner == "out_proj" and (outer == "classifier" or outer.endswith("classification_head"))


def _last_of_blocks(paths: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return the last layer of each block at the top of the network that is a head by its name."""
    blocks: dict[str, list[str]] = {}
    for name, path in paths.items():
        if _HEAD_BLOCK.fullmatch(path[0]):
            blocks.setdefault(path[0], []).append(name)
    found = set()
    for names in blocks.values():
        final = [name for name in names if _FINAL.fullmatch(paths[name][-1])]
        found.add(max(final or names, key=lambda name: _natural(paths[name])))
    return found


def _natural(path: tuple[str, ...]) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path]


def is_expert_stack(info: TensorInfo, config: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a 3-D tensor is one matrix for each expert of a mixture.

    Parameters
    ----------
    info : TensorInfo
    config : mapping, optional
        ``config.json``: the number of experts tells where the name does not say ``experts``.
    """
    if len(info.shape) != 3:
        return False
    if _EXPERTS.search(info.name):
        return True
    return bool(_MOE.search(info.name)) and info.shape[0] in _expert_counts(config or {})


def is_expert_bias(info: TensorInfo) -> bool:
    """Tell whether a 2-D tensor is a stack of biases, one for each expert."""
    last = info.name.rpartition(".")[2]
    return len(info.shape) == 2 and bool(_EXPERTS.search(info.name)) and last.endswith("bias")


def _expert_counts(config: Mapping[str, Any]) -> set[object]:
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return {one[key] for one in (config, *nested) for key in _EXPERT_COUNTS if key in one}
