"""Networks with an image side and a text side that meet in one space, such as CLIP and SigLIP."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from svftool.errors import ModelError
from svftool.tasks.base import forward_errors
from svftool.tasks.heads import CosineHead, WithHead, set_head
from svftool.tasks.tokens import length_limit

_SIDES = ("get_image_features", "get_text_features")
"""Methods by which transformers' models of images and texts give both."""

_SCALE = 15.0
"""Of the logits, where the model has none of its own."""

_AT_ONCE = 64
_LONGEST = 1 << 10


def has_text_side(model: nn.Module) -> bool:
    """Whether a model of images has a side for texts, too."""
    return all(callable(getattr(model, name, None)) for name in _SIDES)


class ImageTextClassifier(WithHead):
    """The image side of a model, and a classifier on unit vectors of the space of both sides.

    Parameters
    ----------
    backbone : nn.Module
        A model with a text side; see `has_text_side`.
    head : nn.Module
        Takes features, (N, F).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        features = image_embeddings(self.backbone, images)
        logits: Tensor = self.head(features.to(next(self.head.parameters()).dtype))
        return logits


def image_embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """Return the directions of images in the space of both sides, (N, F) of length 1."""
    return normalize(_vectors(getattr(model, _SIDES[0])(pixel_values=images)), dim=-1)


def text_embeddings(model: nn.Module, texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Return the directions of texts in the space of both sides, (N, F) of length 1.

    Texts are padded to the model's length: some text sides (SigLIP's) read the last place. The
    model's own configuration says it, as ``config.json`` leaves out what is usual.

    Parameters
    ----------
    model : nn.Module
        On any device.
    texts : sequence of str
    tokenizer : object
        One of transformers.

    Raises
    ------
    ModelError
        If a token has no embedding, or the model does not take the texts.
    """
    run = getattr(model, _SIDES[1])
    takes = inspect.signature(run).parameters
    place = next(model.parameters()).device
    config: Any = getattr(model, "config", None)
    limit = length_limit({} if config is None else config.to_dict(), tokenizer)
    padded = tokenizer.pad_token is not None
    step = _AT_ONCE if padded else 1
    found = []
    for start in range(0, len(texts), step):
        some = list(texts[start : start + step])
        given = _encoded(tokenizer, some, limit, padded=padded)
        _refuse_unknown(model, tokenizer, given["input_ids"])
        inputs = {name: value.to(place) for name, value in given.items() if name in takes}
        hint = ". Name the model's own tokenizer with --tokenizer"
        with forward_errors("the names of the classes", hint), torch.inference_mode():
            found.append(normalize(_vectors(run(**inputs)).float(), dim=-1))
    return torch.cat(found)


def _encoded(
    tokenizer: Any, texts: list[str], limit: int | None, *, padded: bool
) -> Mapping[str, Tensor]:
    bounds: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
    if padded:
        bounds["padding"] = "max_length" if limit and limit <= _LONGEST else True
    found: Mapping[str, Tensor] = tokenizer(texts, return_tensors="pt", verbose=False, **bounds)
    return found


def _refuse_unknown(model: nn.Module, tokenizer: Any, ids: Tensor) -> None:
    inner = getattr(getattr(model, "config", None), "text_config", None)
    known = getattr(inner, "vocab_size", None)
    largest = int(ids.max()) if ids.numel() else 0
    if isinstance(known, int) and largest >= known:
        raise ModelError(
            f"the names of the classes have token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), the model has embeddings for "
            f"{known}. Name its own tokenizer with --tokenizer"
        )


def _vectors(output: Any) -> Tensor:
    """Find the projected vectors in what a side returns: a tensor, or an object that has them."""
    for candidate in (output, getattr(output, "pooler_output", None)):
        if isinstance(candidate, Tensor) and candidate.ndim == 2:
            return candidate
    raise ModelError(
        f"a side of the model returns {type(output).__name__}, expected one vector for each image "
        "and text. Name a model such as CLIP or SigLIP with --model"
    )


def start_from_texts(head: nn.Module, model: nn.Module, texts: Tensor) -> None:
    """Start a head on `image_embeddings` from directions of texts, (classes, F).

    The logits are the cosine of image and text times the model's own scale, as it is trained with.
    """
    stored = getattr(model, "logit_scale", None)
    scale = _SCALE
    if isinstance(stored, Tensor) and stored.numel() == 1:
        scale = math.exp(float(stored.detach()))
    if isinstance(head, CosineHead):
        with torch.no_grad():
            head.weight.copy_(texts)
            head.scale.fill_(scale)
    else:
        set_head(head, scale * texts)
