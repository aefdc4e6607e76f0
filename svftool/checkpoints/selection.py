"""Which tensors are decomposed, under which view, and why the others are left whole."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.dtypes import DECOMPOSABLE, FLOAT8
from svftool.checkpoints.views import View, matrix_shape
from svftool.errors import UsageError, brief, counted

# What a tensor is for, judged by its name: embedding, output head, table, scale, experts.


QUANTISATION = "quantisation scale or packed integers"
_TOKENS = "token embedding"
_MASK = "attention mask"

# The first rule that matches the whole of a tensor's owner counts.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        QUANTISATION,
        re.compile(
            r"(.+_)?scale(_inv|_2)|(weight|input|output|activation|act|k|v|q)_scale|SCB"
            r"|(.+_)?scales|scales?_and_zeros?|q?zeros|(.+_)?zero_points?|g_idx"
            r"|qweight|weight_(packed|shape)|.+_blocks|(nested_)?(absmax|quant_map)"
        ),
    ),
    (
        "relative position table",
        re.compile(
            r"rel(ative)?_pos(ition)?s?(_bias|_embedding)?(_table|_index|_embeddings?|_[hwdtkv])?"
            r"|relative_attention_bias|rel_embeddings|(height|width)_rel"
        ),
    ),
    (
        "attention bias table",
        re.compile(r"(attention|attn)_bias(es)?|pos_bias_[uv]|r_[wrs]_bias"),
    ),
    (_MASK, re.compile(r"(.+_)?mask")),
    ("bias of several dimensions", re.compile(r"(.+_)?bias")),
    (
        "position embedding",
        re.compile(
            r"(.+_)?pos(ition(al)?)?_?(emb|embed|embeds|embeddings?|encodings?|enc)(_.+)?"
            r"|wpe|pe|embed_positions?|(cos|sin)_cached|(time|temporal)_(embed|embeddings?)"
        ),
    ),
    (
        _TOKENS,
        re.compile(
            r"(?!patch|input|frame|audio|image|visual|pixel)(.+_)?(emb|embed|embeds|embeddings?)"
            r"|wte|(.+_)?embed_tokens(_.+)?|embed_in|shared"
            r"|(cls|dist|mask|reg|register|query|storage|latent)_tokens?"
        ),
    ),
)

# Tables of a few rows that are no words: kinds of segments, and tokens that a network adds itself.
_FEW = re.compile(
    r"(.+_)?(type|seg(ment)?)_(emb|embed|embeds|embeddings?)|.+_tokens?(?<!embed_tokens)"
)

# Matrices that networks register as buffers: computed once or collected, never trained. A name that
# ends in ``weight`` is a parameter, whatever its module is called.
_BUFFERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "fixed filters or transform, a buffer",
        re.compile(
            r"fb|(mel|bark|erb|linear)_?(filters?|fb|fbank|basis|filterbanks?|scale|matrix)"
            r"|fbank|filter_?banks?|dct(_mat(rix)?)?|(stft|idft|dft)_(basis|kernel|matrix|mat)"
            r"|(forward|inverse)_basis|(window|fourier)_(basis|matrix)|hadamard(_matrix)?"
            r"|resample_filter|(blur|gaussian|sobel|laplacian)_(kernel|filter|weight)s?"
            r"|(positional_encoding_)?gaussian_matrix"
        ),
    ),
    (
        "cached table of positions or rotations, a buffer",
        re.compile(
            r"(inv|rope|rotary)_?freqs?|freqs?_(cis|cos|sin|complex)|(.+_)?(cos|sin)_cache(d)?"
            r"|(cos_sin|rope|rotary|pos|emb)_cache(d)?|position_ids"
            r"|relative_(coords_table|position_index)|(rel|relative)_(coords|index)"
            r"|(?:pos(ition)?_)?(grid|coords)(_.+)?|(base_)?pixel_coordinates"
        ),
    ),
    (_MASK, re.compile(r"tril|triu|causal|masked_bias|(causal|attn|attention)_mask(s|_.+)")),
    (
        "anchors of a detector, a buffer",
        re.compile(r"(cell_)?anchors?(_.+)?|(.+_)?anchors|(prior|default)_?boxes"),
    ),
    (
        "codebook or its running statistics, a buffer",
        re.compile(r"codebooks?|_?ema_(w|weights?|embed.*)|embed_(avg|sum|ema)|cluster_(sum|size)"),
    ),
    (
        "queue of features, a buffer",
        re.compile(r"queue(_.+)?|(.+_)?queue|(.+_)?memory_bank|(feature|memory)_bank(_.+)?"),
    ),
    (
        "running statistics, a buffer",
        re.compile(r"(running|moving)_.+|(inv_|inverse_)?cov(ariance)?(_mat(rix)?)?"),
    ),
    ("fixed noise, a buffer", re.compile(r"noise(_const|_\d+)?")),
)

# Modules around a whole network, which say nothing about the place of a layer in it.
_WRAPPERS = frozenset({"module", "_orig_mod", "model", "net", "network", "backbone"})

_HEAD_ANYWHERE = re.compile(
    r"(.+_)?lm_head|lm_loss|embed_out|output_projection|qa_outputs|seq_relationship|logits"
    r"|(?!pre_)(.+_)?classifier|last_linear|conv_seg|class_embed"
    r"|cls_score|cls_logits|bbox_(pred|reg)|mask_fcn_logits"
)
_HEAD_AT_TOP = re.compile(
    r"heads?|head_dist|fc|score|(aux_)?classifier|last_linear|(classification|segmentation)_head"
)
_HEAD_IF_NO_OTHER = ("linear", "output", "proj_out")
_FINAL = re.compile(r"heads?|fc|linear|l|out_proj|out|decoder|last_layer|logits|score|classifier")

# Not experts.0.w1: an expert with a module of its own has matrices like any layer.
_EXPERTS = re.compile(r"(^|[._])experts?(?!\.\d)([._]|$)")
_MIXTURE = re.compile(r"moe|expert", re.IGNORECASE)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def owner(name: str) -> str:
    """Return the module of a weight, or a tensor's own name where it is no module's weight.

    Examples
    --------
    >>> owner("transformer.wte.weight"), owner("blocks.0.attn.relative_position_bias_table")
    ('wte', 'relative_position_bias_table')
    """
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]


def table_role(info: TensorInfo) -> str | None:
    """Return what a tensor is if it is a table rather than a weight that maps, else None.

    Examples
    --------
    >>> import torch
    >>> info = TensorInfo("transformer.wpe.weight", torch.float32, (1024, 768), "model.safetensors")
    >>> table_role(info)
    'position embedding'
    """
    who = owner(info.name)
    role = next((role for role, pattern in _RULES if pattern.fullmatch(who)), None)
    if role is not None and not _is_layer(info, who, role):
        return role
    return _buffer_role(info.name)


def is_vocabulary(info: TensorInfo) -> bool:
    """Whether a tensor is the table of a vocabulary, with a row for every word or piece of one.

    Examples
    --------
    >>> import torch
    >>> names = "word_embeddings.weight", "token_type_embeddings.weight"
    >>> [is_vocabulary(TensorInfo(name, torch.float32, (2, 8), "x")) for name in names]
    [True, False]
    """
    if len(info.shape) != 2 or table_role(info) != _TOKENS:
        return False
    return _FEW.fullmatch(owner(info.name)) is None


def _buffer_role(name: str) -> str | None:
    """Return what a tensor is if models register it as a buffer, by its own name.

    Examples
    --------
    >>> _buffer_role("mel_scale.fb"), _buffer_role("stem.fb.weight")
    ('fixed filters or transform, a buffer', None)
    """
    *modules, own = name.split(".")
    if own == "weights" and modules and modules[-1].endswith("positions"):
        return "cached table of positions or rotations, a buffer"
    return next((role for role, pattern in _BUFFERS if pattern.fullmatch(own)), None)


def _is_layer(info: TensorInfo, who: str, role: str) -> bool:
    """Tell a layer that maps from a table that has the same name."""
    if role == _MASK:
        return info.name.endswith(".weight")
    if role == _TOKENS:
        return len(info.shape) > 3 or (who == "shared" and info.name.count(".") > 2)
    return False


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
        if len(info.shape) > 1 and re.search(r"\.weight(_\w+)?$", info.name)
    }
    heads = {name for name, path in paths.items() if _is_head(path)}
    heads |= _last_at_top(paths, heads)
    if not heads:
        heads = {
            name for name, path in paths.items() if len(path) == 1 and path[0] in _HEAD_IF_NO_OTHER
        }
    return frozenset(heads)


def _module_path(name: str) -> tuple[str, ...]:
    """Return the modules that lead to a tensor, without wrappers at the front."""
    parts = name.split(".")[:-1]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return tuple(parts)


def _is_head(path: tuple[str, ...]) -> bool:
    """Recognise a head by its own name, or a plain name inside a head."""
    inner, outer = path[-1], path[-2] if len(path) > 1 else ""
    if inner == "decoder":
        return outer in ("predictions", "lm_head")
    if inner == "out_proj":
        return outer == "classifier" or outer.endswith("classification_head")
    return bool(_HEAD_ANYWHERE.fullmatch(inner))


def _last_at_top(paths: Mapping[str, tuple[str, ...]], known: set[str]) -> set[str]:
    """Return the last layer of each block at the top that is a head by the block's name.

    Blocks that hold one of the `known` heads are left out.
    """
    blocks: dict[str, list[str]] = {}
    for name, path in paths.items():
        if _HEAD_AT_TOP.fullmatch(path[0]):
            blocks.setdefault(path[0], []).append(name)
    found = set()
    for names in blocks.values():
        if known.isdisjoint(names):
            final = [name for name in names if _FINAL.fullmatch(paths[name][-1])] or names
            depth = min(len(paths[name]) for name in final)
            shallow = [name for name in final if len(paths[name]) == depth]
            found.add(max(shallow, key=lambda name: _natural(paths[name])))
    return found


def _natural(path: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return a key that sorts numbered modules by their number."""
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
    return bool(_MIXTURE.search(info.name)) and info.shape[0] in _expert_counts(config or {})


def _expert_counts(config: Mapping[str, Any]) -> set[int]:
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    counts = [one.get(key) for one in (config, *nested) for key in _EXPERT_COUNTS]
    return {count for count in counts if isinstance(count, int)}


@dataclass(frozen=True)
class Selection:
    """What the user asked for: patterns on tensor names as they are in the file.

    Attributes
    ----------
    include : tuple of str
        Where given, only what matches is decomposed, embeddings and heads too.
    exclude : tuple of str
        What matches is left whole.
    views : tuple of (str, View)
        Views by pattern; the last that matches counts.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    views: tuple[tuple[str, View], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A tensor to decompose, and how it is seen as a matrix."""

    name: str
    view: View


@dataclass(frozen=True)
class LeftWhole:
    """A tensor that stays as it is, and why."""

    name: str
    reason: str


def select(
    infos: Mapping[str, TensorInfo],
    selection: Selection,
    *,
    config: Mapping[str, Any] | None = None,
) -> tuple[list[Choice], list[LeftWhole]]:
    """Decide for every tensor whether it is decomposed.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        All tensors of the checkpoint.
    selection : Selection
    config : mapping, optional
        ``config.json``, for the number of experts.

    Returns
    -------
    chosen : list of Choice
    whole : list of LeftWhole
        Together every tensor, each list in the order of `infos`.

    Raises
    ------
    UsageError
        If a pattern matches no tensor, or asks for stacks where nothing is 3-D.
    """
    check_patterns(
        (*selection.include, *selection.exclude, *(glob for glob, _ in selection.views)), infos
    )
    _check_views(selection.views, infos)
    heads = output_heads(infos.values())
    chosen: list[Choice] = []
    whole: list[LeftWhole] = []
    for name, info in infos.items():
        view = _view(info, selection.views, config)
        reason = _reason(info, view, selection, heads)
        if reason is None:
            chosen.append(Choice(name, view))
        else:
            whole.append(LeftWhole(name, reason))
    return chosen, whole


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches a name, or None.

    Examples
    --------
    >>> matches("layer1.conv.weight", ["fc*", "layer?.*"])
    'layer?.*'
    """
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse patterns that match nothing.

    Raises
    ------
    UsageError
        Naming the pattern and the closest names there are.
    """
    known = list(names)
    for pattern in patterns:
        # All of nothing is nothing, and nobody's mistake.
        if pattern == "*" or any(fnmatchcase(name, pattern) for name in known):
            continue
        expected = (
            f"names such as {_closest(pattern, known)}" if known else "a checkpoint with some"
        )
        raise UsageError(
            f"pattern {brief(pattern)} matches none of {counted(len(known), 'tensors')}, expected "
            f"{expected}. A pattern is for whole names: * stands for any part."
        )


def _closest(pattern: str, names: Sequence[str]) -> str:
    plain = pattern.strip("*")
    inside = [name for name in names if plain and plain in name]
    close = inside or difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names
    return ", ".join(name[:_SHOWN] for name in close[:3])


_SHOWN = 200
"""Characters of a name in a message."""


def _check_views(views: Sequence[tuple[str, View]], infos: Mapping[str, TensorInfo]) -> None:
    for pattern, view in views:
        if view == "batch" and not any(
            len(info.shape) == 3 and fnmatchcase(name, pattern) for name, info in infos.items()
        ):
            raise UsageError(
                f"view {pattern}=batch matches no tensor of three dimensions, "
                "expected stacks of matrices (E, m, n)"
            )


def _view(
    info: TensorInfo, views: Sequence[tuple[str, View]], config: Mapping[str, Any] | None
) -> View:
    asked = next(
        (view for pattern, view in reversed(views) if fnmatchcase(info.name, pattern)), None
    )
    if asked == "matrix" or (asked is None and not is_expert_stack(info, config)):
        return "matrix"
    return "batch" if len(info.shape) == 3 else "matrix"


def _reason(
    info: TensorInfo, view: View, selection: Selection, heads: frozenset[str]
) -> str | None:
    """Return why a tensor is left whole, or None if it is decomposed."""
    excluded = matches(info.name, selection.exclude)
    if excluded is not None:
        return f"excluded by --exclude {excluded}"
    impossible = _impossible(info, view)
    if impossible is not None:
        return impossible
    if selection.include:
        return None if matches(info.name, selection.include) else "not matched by --include"
    return _by_default(info, heads)


def _impossible(info: TensorInfo, view: View) -> str | None:
    """Return what makes a decomposition impossible or pointless, whatever was asked for."""
    if info.layout != "dense":
        return f"{info.layout} storage"
    if info.dtype not in DECOMPOSABLE:
        packed = table_role(info) == QUANTISATION or info.dtype.is_floating_point
        return QUANTISATION if packed else "not floating point"
    if info.numel == 0:
        return "empty"
    if len(info.shape) < 2:
        return "fewer than two dimensions"
    return "one side of the matrix is 1" if 1 in matrix_shape(info.shape, view)[-2:] else None


def is_code(info: TensorInfo) -> bool:
    """Tell whether a tensor is one that quantisation leaves: codes, scales, packed integers."""
    narrow = info.dtype in (*FLOAT8, torch.int8, torch.uint8)
    return narrow or table_role(info) == QUANTISATION


def _by_default(info: TensorInfo, heads: frozenset[str]) -> str | None:
    if info.dtype in FLOAT8:
        return "float8 values of a quantised layer"
    if info.name in heads:
        return "output head"
    return table_role(info)
