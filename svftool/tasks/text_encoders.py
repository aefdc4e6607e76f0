"""Encoders of transformers as text classifiers: pooled features, and a head on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from svftool.errors import ModelError
from svftool.files.header import parse_json
from svftool.models import find_head
from svftool.tasks.heads import WithHead, logits_of
from svftool.tasks.options import TextClassificationOptions

Pooling = Literal["mean", "cls"]


class TextClassifier(WithHead):
    """An encoder, and a classifier on the features of a text.

    Parameters
    ----------
    backbone : nn.Module
        Gives hidden states, (N, T, F).
    head : nn.Module
        Takes features, (N, F).
    pooling : {"mean", "cls"}
        The mean over a text's tokens, or its first one.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, pooling: Pooling) -> None:
        super().__init__(backbone, head)
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Logits, (N, classes)."""
        features = text_features(self.backbone, input_ids, attention_mask, self.pooling)
        logits: Tensor = self.head(features.to(next(self.head.parameters()).dtype))
        return logits


def text_features(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling
) -> Tensor:
    """Run an encoder and pool its last hidden states to (N, F).

    Of a model with another head, and of one with a decoder, the encoder alone is run.

    Raises
    ------
    ModelError
        If it gives no hidden states.
    """
    output = _encoder(model)(input_ids=input_ids, attention_mask=attention_mask)
    hidden = getattr(output, "last_hidden_state", output)
    if not isinstance(hidden, Tensor):
        hidden = logits_of(output)
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim != 3 or hidden.shape[:2] != input_ids.shape:
        raise ModelError(
            f"the model returns {tuple(hidden.shape)} for {input_ids.shape[0]} texts of "
            f"{input_ids.shape[1]} tokens, expected a vector for each token. Name an encoder or a "
            "text classifier with --model"
        )
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _encoder(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "base_model", model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(inner, "get_encoder"):
        inner = inner.get_encoder()
    return inner if isinstance(inner, nn.Module) else model


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is a text classifier by the name that transformers gives these.

    A network of one's own is one if it has a head.
    """
    if hasattr(model, "config") and hasattr(model, "base_model"):
        return "ForSequenceClassification" in type(model).__name__
    return find_head(model) is not None


def stored_pooling(folder: Path | None) -> Pooling | None:
    """Return how sentence-transformers pools an encoder, by ``1_Pooling`` beside its weights."""
    file = None if folder is None else folder / "1_Pooling" / "config.json"
    if file is None or not file.is_file():
        return None
    try:
        said = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(said, Mapping):
        return None
    return "cls" if said.get("pooling_mode_cls_token") is True else "mean"


def pooling_of(chosen: TextClassificationOptions, folder: Path | None) -> Pooling:
    """Return what the features of an encoder are: as asked, as stored, or the mean."""
    return chosen.pooling or stored_pooling(folder) or "mean"


def without_pooling(model: nn.Module) -> list[str]:
    """Say that a classifier pools in its own way, whatever was asked for."""
    if isinstance(model, TextClassifier):
        return []
    return ["--pooling does nothing here: the model is a classifier, and pools in a way of its own"]


def tell_padding(model: nn.Module, padding: int) -> None:
    """Tell a classifier of transformers what it is padded with, if its configuration does not.

    Decoders look for the last token of a text by it.
    """
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", padding) is None:
        config.pad_token_id = padding
