"""What a model makes of examples without labels, one row of plain values each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svftool.errors import ModelError
from svftool.models import find_head
from svftool.tasks.base import Draw, device_of
from svftool.tasks.classification import ClassificationDraw, Examples, TextSide
from svftool.tasks.encoded_texts import Encoded, Encoding, TextExamples
from svftool.tasks.heads import logits_of, pool
from svftool.tasks.images import image_size
from svftool.tasks.inputs import Picture
from svftool.tasks.labelled import OfHead
from svftool.tasks.language import Language, LanguageDraw, Score, score_block
from svftool.tasks.options import (
    ClassificationOptions,
    SegmentationOptions,
    TextClassificationOptions,
)
from svftool.tasks.segmentation.draw import SegmentationDraw, Setting, write_map
from svftool.tasks.segmentation.heads import dense_logits
from svftool.tasks.segmentation.pairs import Chosen, ImagePair, Pairs
from svftool.tasks.segmentation.views import DenseView
from svftool.tasks.text_classification import TextDraw
from svftool.tasks.text_encoders import Pooling
from svftool.tasks.texts import Text
from svftool.tasks.tokens import Block
from svftool.tasks.views import Decoded, ImageSet, ImageView

_WINDOW = 512
"""Texts that are sorted by length at once, and whose rows are kept until they come in order."""

_SHOWN_TEXT = 80


class Unlabelled(Protocol):
    """Examples of one task without labels."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the head's outputs."""

    @property
    def draw(self) -> Draw:
        """What fits a model to the examples."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def rows(self, model: nn.Module, *, top: int, folder: Path | None) -> Iterator[dict[str, Any]]:
        """Yield one row an example, in order; pictures are written to `folder`."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that the rows depend on."""


@dataclass(frozen=True)
class _Chosen:
    options: ClassificationOptions
    classes: tuple[str, ...]
    view: ImageView
    text_side: TextSide

    @property
    def of_head(self) -> OfHead:
        return OfHead(self.classes, "given")


class NewPictures:
    """Pictures to classify.

    Parameters
    ----------
    pictures : sequence of Picture
    options : ClassificationOptions
    view : ImageView
    classes : sequence of str or None
        None numbers the outputs of `model`.
    model : nn.Module
        The bare model.
    text_side : TextSide
        Where its tokenizer lies, if it has one.

    Raises
    ------
    ModelError
        If there is nothing that tells classes apart.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        options: ClassificationOptions,
        view: ImageView,
        classes: Sequence[str] | None,
        model: nn.Module,
        text_side: TextSide,
    ) -> None:
        self._pictures = pictures
        images = ImageSet([one.path for one in pictures], view, cache_bytes=0)
        if classes is None:
            classes = _numbered(model, view.centre(images.load([0])))
        self.classes = tuple(classes)
        labels = torch.zeros(len(pictures), dtype=torch.int64)
        every = Examples(images, tuple(range(len(pictures))), labels)
        none = Examples(images, (), labels[:0])
        self._chosen = _Chosen(options, self.classes, view, text_side)
        self.draw = ClassificationDraw(self._chosen, every, none, every)

    def __len__(self) -> int:
        return len(self._pictures)

    def rows(self, model: nn.Module, *, top: int, folder: Path | None) -> Iterator[dict[str, Any]]:
        """Yield each picture's most likely classes and their probabilities."""
        position = 0
        for logits, _ in self.draw.logits(model, "query"):
            for row in _most_likely(self.classes, logits, top):
                yield {"file": str(self._pictures[position].path), **row}
                position += 1

    def describe(self) -> dict[str, Any]:
        """Return size, normalisation and head."""
        view, options = self._chosen.view, self._chosen.options
        return {
            **view.to_plain(),
            "mean": list(view.mean),
            "std": list(view.std),
            "head_type": options.head_type,
            "head_name": options.head_name,
            "head_init": options.head_init,
        }


def _most_likely(classes: Sequence[str], logits: Tensor, top: int) -> Iterator[dict[str, Any]]:
    """Yield the most likely classes of each row of logits, (N, classes)."""
    found = logits.float().softmax(1).topk(min(top, len(classes)))
    for sure, which in zip(found.values.tolist(), found.indices.tolist(), strict=True):
        named = [
            {"name": classes[index], "probability": probability}
            for index, probability in zip(which, sure, strict=True)
        ]
        yield {
            "prediction": named[0]["name"],
            "probability": named[0]["probability"],
            "classes": named,
        }


_NO_CLASSES = (
    "no classes are known and the model has no head, expected a classifier. Give the file "
    "from 'svftool finetune' with --tuned, or the head's class names with --classes"
)


def _numbered(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    if find_head(model) is None:
        raise ModelError(_NO_CLASSES)
    with torch.inference_mode():
        outputs = pool(logits_of(model.eval()(images.to(device_of(model)))))
    return tuple(map(str, range(outputs.shape[1])))


class NewScenes:
    """Pictures to segment; parameters as of `NewPictures`."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        options: SegmentationOptions,
        view: DenseView,
        classes: Sequence[str] | None,
        model: nn.Module,
    ) -> None:
        self._pictures = pictures
        self._options = options
        self._view = view
        paths = [one.path for one in pictures]
        images = Decoded(paths, view.load, cache_bytes=0)
        if classes is None:
            batch = view.normalised(images.load([0])).to(device_of(model))
            with torch.inference_mode():
                outputs = dense_logits(model.eval()(batch)).shape[1]
            classes = [str(number) for number in range(outputs)]
        self.classes = tuple(classes)
        # Maps say how large a picture is; there is nothing in them.
        maps = Decoded(
            paths, lambda path: torch.zeros(image_size(path), dtype=torch.uint8), cache_bytes=0
        )
        pairs = [ImagePair(one.name, one.path, one.path) for one in pictures]
        every = Chosen(Pairs(pairs, images, maps), tuple(range(len(pictures))))
        setting = Setting(options, self.classes, view)
        self.draw = SegmentationDraw(setting, every, every.at([]), every, seed=0)

    def __len__(self) -> int:
        return len(self._pictures)

    def rows(self, model: nn.Module, *, top: int, folder: Path | None) -> Iterator[dict[str, Any]]:
        """Yield the classes that cover most of each picture, and write its map."""
        with torch.inference_mode():
            for positions, logits, _ in self.draw.logits(model, "query"):
                for position, labels in zip(positions, logits.argmax(1), strict=True):
                    one = self._pictures[position]
                    counts = torch.bincount(labels.flatten(), minlength=len(self.classes)).cpu()
                    found = (counts / labels.numel()).topk(min(top, len(self.classes)))
                    yield {
                        "file": str(one.path),
                        "map": None if folder is None else write_map(folder, one.name, labels),
                        "classes": [
                            {"name": self.classes[index], "share": share}
                            for index, share in zip(
                                found.indices.tolist(), found.values.tolist(), strict=True
                            )
                            if share > 0.0
                        ],
                    }

    def describe(self) -> dict[str, Any]:
        """Return size, normalisation and head."""
        view, options = self._view, self._options
        return {
            "short_side": view.short_side,
            "interpolation": view.interpolation,
            "mean": list(view.mean),
            "std": list(view.std),
            "head_type": options.head_type,
            "head_name": options.head_name,
            "features": options.features,
        }


@dataclass(frozen=True)
class _ChosenTexts:
    options: TextClassificationOptions
    classes: tuple[str, ...]
    encoding: Encoding
    pooling: Pooling

    @property
    def of_head(self) -> OfHead:
        return OfHead(self.classes, "given")


class NewMessages:
    """Texts to classify.

    Parameters
    ----------
    texts : sequence of Text
    options : TextClassificationOptions
    encoding : Encoding
    pooling : {"mean", "cls"}
        What the features of an encoder are.
    classes : sequence of str or None
        None numbers the outputs of `model`.
    model : nn.Module
        The bare model.

    Raises
    ------
    ModelError
        If there is nothing that tells classes apart.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        options: TextClassificationOptions,
        encoding: Encoding,
        pooling: Pooling,
        classes: Sequence[str] | None,
        model: nn.Module,
    ) -> None:
        self._texts = texts
        encoded = Encoded.of(texts, [one.prompt + one.body for one in texts], encoding)
        labels = torch.zeros(len(texts), dtype=torch.int64)
        every = TextExamples(encoded, tuple(range(len(texts))), labels)
        none = every.at([])
        if classes is None:
            setting = _ChosenTexts(options, (), encoding, pooling)
            outputs = TextDraw(setting, every, none, every).outputs(model)
            if outputs is None:
                raise ModelError(_NO_CLASSES)
            classes = [str(number) for number in range(outputs)]
        self.classes = tuple(classes)
        self._chosen = _ChosenTexts(options, self.classes, encoding, pooling)
        self.draw = TextDraw(self._chosen, every, none, every)

    def __len__(self) -> int:
        return len(self._texts)

    def rows(self, model: nn.Module, *, top: int, folder: Path | None) -> Iterator[dict[str, Any]]:
        """Yield each text's most likely classes and their probabilities."""
        position = 0
        for logits, _ in self.draw.in_order(model, "query"):
            for row in _most_likely(self.classes, logits, top):
                text = self._texts[position]
                yield {
                    "file": str(text.file),
                    "line": text.line,
                    "text": (text.prompt + text.body)[:_SHOWN_TEXT],
                    **row,
                }
                position += 1

    def describe(self) -> dict[str, Any]:
        """Return length, features and head."""
        chosen = self._chosen
        return {
            "max_length": chosen.encoding.length,
            "pooling": chosen.pooling,
            "text_column": chosen.options.text_column,
            "head_type": chosen.options.head_type,
            "head_name": chosen.options.head_name,
        }


class NewTexts:
    """Texts to measure and to go on with.

    Parameters
    ----------
    task : Language
        Made of the texts.
    """

    classes = None

    def __init__(self, task: Language) -> None:
        self._task = task
        self._corpus = task.support
        self.draw = LanguageDraw(task, self._corpus, type(self._corpus)([], []), self._corpus)

    def __len__(self) -> int:
        return len(self._corpus.texts)

    def rows(self, model: nn.Module, *, top: int, folder: Path | None) -> Iterator[dict[str, Any]]:
        """Yield how well each text was predicted, and the tokens that most likely come next."""
        by_text: dict[int, list[Block]] = {}
        for block in self._corpus.blocks:
            by_text.setdefault(block.text, []).append(block)
        for start in range(0, len(self), _WINDOW):
            window = range(start, min(start + _WINDOW, len(self)))
            last = {position: by_text[position][-1] for position in window}
            blocks = [block for position in window for block in by_text[position]]
            scores: dict[int, Score] = {position: Score(position) for position in window}
            following: dict[int, list[dict[str, Any]]] = {}
            for block, logits, targets, ids in self.draw.outputs(model, blocks):
                scores[block.text] += score_block(block, logits, targets, ids)
                if block is last[block.text]:
                    following[block.text] = self._next(logits[len(block.ids) - 1], top)
            for position in window:
                yield self._row(position, scores[position], following[position])

    def _next(self, logits: Tensor, top: int) -> list[dict[str, Any]]:
        known = min(top, len(logits))
        found = logits.float().softmax(0).topk(known)
        return [
            {"token": self._task.tokenizer.decode([index]), "probability": probability}
            for index, probability in zip(
                found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def _row(self, position: int, score: Score, following: list[dict[str, Any]]) -> dict[str, Any]:
        text: Text = self._corpus.texts[position]
        loss = score.loss / score.tokens if score.tokens else None
        return {
            "file": str(text.file),
            "line": text.line,
            "text": (text.prompt + text.body)[:_SHOWN_TEXT],
            "tokens": score.tokens,
            "loss": loss,
            "perplexity": None if loss is None or loss > _LARGEST_LOSS else math.exp(loss),
            # After a completion comes its end, which is among what was predicted.
            "next": [] if text.complete else following,
        }

    def describe(self) -> dict[str, Any]:
        """Return the length of a sequence."""
        return {"sequence_length": self._task.length}


_LARGEST_LOSS = 700.0
