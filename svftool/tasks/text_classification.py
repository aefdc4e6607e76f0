"""Text classification: texts with one class each, for encoders and classifiers of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svftool.errors import DataError, ModelError, UsageError, agreeing, counted
from svftool.files.header import parse_json
from svftool.models import find_head
from svftool.tasks.at_once import tokens_at_once
from svftool.tasks.base import Part, Prepared, TaskMetric, device_of, forward_errors, to_device
from svftool.tasks.class_names import check_labels, class_names, readable
from svftool.tasks.heads import (
    ClassifierType,
    CosineHead,
    WithHead,
    logits_of,
    pool,
    start_head,
)
from svftool.tasks.labelled import ClassificationCount, ClassifierDraw, ClassifierSetting, of_head
from svftool.tasks.options import StrPath, TextClassificationOptions
from svftool.tasks.splits import draw_shots, nothing_left, require_held_out, require_query
from svftool.tasks.texts import LabelledText, list_labelled
from svftool.tasks.tokens import (
    Block,
    Placed,
    by_length,
    collate,
    length_limit,
    load_tokenizer,
    padding_within,
    refuse_misfit,
    refuse_unknown,
    vocabulary,
)
from svftool.tasks.two_classes import texts_of_two_classes

Pooling = Literal["mean", "cls"]

LONGEST_DEFAULT = 512
WINDOW = 4096
"""Texts that are sorted by length at once."""
_MUCH_UNKNOWN = 0.2
_SAID = 40


# A text to what a model takes.


class Encoding:
    """A tokenizer, and how long the model's texts may be.

    Parameters
    ----------
    tokenizer : object
        One of transformers.
    length : int
        Tokens of a text at most, those included that the tokenizer adds.

    Attributes
    ----------
    padding : int
        The token that texts are padded with; it is masked.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.padding: int = next((token for token in (pad, end) if token is not None), 0)

    def encode(self, texts: Sequence[str]) -> tuple[list[Block], frozenset[int]]:
        """Return the tokens of each text, and which texts were cut.

        A cut text keeps its beginning, and the special tokens that the tokenizer puts at its end.
        """
        if not texts:
            return [], frozenset()
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        long = [place for place, ids in enumerate(whole) if len(ids) > self.length]
        if long:
            short = self.tokenizer(
                [texts[place] for place in long],
                truncation=True,
                max_length=self.length,
                verbose=False,
            )["input_ids"]
            for place, ids in zip(long, short, strict=True):
                whole[place] = ids
        blocks = [
            Block(torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids), dtype=torch.bool), i)
            for i, ids in enumerate(whole)
        ]
        return blocks, frozenset(long)

    def batch(self, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Pad on the right; see `svftool.tasks.tokens.collate`."""
        padded = collate(blocks, self.padding)
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def unknown(self, blocks: Sequence[Block]) -> float:
        """Return the share of tokens that stand for what the tokenizer does not know."""
        token = self.tokenizer.unk_token_id
        if token is None:
            return 0.0
        total = sum(len(block.ids) for block in blocks)
        return sum(int((block.ids == token).sum()) for block in blocks) / max(1, total)


@dataclass(frozen=True)
class Encoded:
    """Texts, their tokens, and which of them were cut."""

    texts: Sequence[Placed]
    words: Sequence[str]
    blocks: Sequence[Block]
    cut: frozenset[int]
    encoding: Encoding

    @classmethod
    def of(cls, texts: Sequence[Placed], words: Sequence[str], encoding: Encoding) -> Encoded:
        """Encode texts.

        Raises
        ------
        DataError
            If one has no tokens.
        """
        blocks, cut = encoding.encode(words)
        for text, block in zip(texts, blocks, strict=True):
            if not len(block.ids):
                raise DataError(
                    f"{text.file}: line {text.line}: no token, expected one or more. Remove the "
                    "line, or name the model's own tokenizer with --tokenizer"
                )
        return cls(texts, words, blocks, cut, encoding)


@dataclass(frozen=True)
class TextExamples:
    """Labelled texts: where they are kept, which of them, and their classes."""

    texts: Encoded
    indices: tuple[int, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def blocks(self) -> list[Block]:
        """The tokens of each text."""
        return [self.texts.blocks[index] for index in self.indices]

    @property
    def cut(self) -> int:
        """How many texts were longer than the model takes."""
        return sum(index in self.texts.cut for index in self.indices)

    def at(self, positions: Sequence[int]) -> TextExamples:
        """Return the texts at positions of `indices` as examples of their own."""
        indices = tuple(self.indices[position] for position in positions)
        return TextExamples(self.texts, indices, self.labels[list(positions)])

    def take(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Pad the texts at positions of `indices`."""
        blocks = [self.texts.blocks[self.indices[position]] for position in positions]
        return self.texts.encoding.batch(blocks)

    def groups(self, device: torch.device) -> Iterator[tuple[range, list[list[int]]]]:
        """Yield windows of texts, and the positions of each in groups of like length."""
        for start in range(0, len(self), WINDOW):
            window = range(start, min(start + WINDOW, len(self)))
            blocks = [self.texts.blocks[self.indices[position]] for position in window]
            found = by_length(blocks, tokens_at_once(device))
            yield window, [[start + place for place in group] for group in found]

    def batches(self, device: torch.device) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All texts, those of like length together."""
        for _, groups in self.groups(device):
            for group in groups:
                yield to_device((self.take(group), self.labels[group]), device)


# An encoder without a classifier.


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


# The task.


class TextClassification:
    """The task ``text-classification``.

    Parameters
    ----------
    data : path-like
        Texts to draw the support set from; see `svftool.tasks.texts.list_labelled`.
    config : mapping
        The checkpoint's ``config.json``.
    folder : Path, optional
        Where the checkpoint lies; it may say how an encoder's features are pooled.
    trust_remote_code : bool
        Whether code that lies beside the tokenizer may run.
    head_classes : sequence of str, optional
        What the outputs of the checkpoint's head are, where it says.
    whole_head : bool
        As of `svftool.tasks.classification.Classification`.
    options
        Fields of `svftool.tasks.options.TextClassificationOptions`.

    Raises
    ------
    DataError
        If files, classes and shots do not fit together.
    ModelError
        If there is no tokenizer.
    """

    name = "text-classification"
    primary = TaskMetric("accuracy", higher_is_better=True)
    facts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        data: StrPath,
        *,
        config: Mapping[str, Any] = MappingProxyType({}),
        folder: Path | None = None,
        trust_remote_code: bool = False,
        head_classes: Sequence[str] | None = None,
        whole_head: bool = False,
        **options: Any,
    ) -> None:
        self.options = chosen = TextClassificationOptions(**options)
        texts = _listed(Path(data), chosen)
        queries = [] if chosen.query_data is None else _listed(chosen.query_data, chosen)
        self.said = (*texts_of_two_classes(texts), *texts_of_two_classes(queries))
        self.shots = chosen.shots
        names = class_names(texts, chosen.classes, data)
        self.of_head = of_head(names, head_classes, chosen, whole=whole_head)
        self.classes = self.of_head.classes
        check_labels(texts, self.classes, data)
        check_labels(queries, self.classes, chosen.query_data or data)
        require_query(chosen.shots, chosen.evaluation, "texts")
        labels, hold_out = [text.label for text in texts], chosen.hold_out
        split = draw_shots(labels, shots=chosen.shots, hold_out=hold_out, unit="texts")
        require_held_out(split, hold_out, "texts")
        self.encoding = encoding_of(chosen, config, folder, trust_remote_code=trust_remote_code)
        self.pooling = pooling_of(chosen, folder)
        self._names = labels
        self._texts = Encoded.of(texts, [text.text for text in texts], self.encoding)
        encoded = Encoded.of(queries, [text.text for text in queries], self.encoding)
        self._queries = self._examples(
            encoded, range(len(queries)), [text.label for text in queries]
        )

    def describe(self) -> dict[str, Any]:
        """Shots, length, columns and what features are."""
        chosen = self.options
        return {
            "shots": self.shots,
            "max_length": self.encoding.length,
            "pooling": self.pooling,
            "text_column": chosen.text_column,
            "label_column": chosen.label_column,
            "hold_out": chosen.hold_out,
            "sampling": chosen.sampling,
            "head_type": chosen.head_type,
            "head_name": chosen.head_name,
            "head_init": chosen.head_init,
        }

    def draw(self, seed: int) -> TextDraw:
        """Draw the support set of a seed.

        Raises
        ------
        DataError
            If nothing is left to evaluate on.
        """
        split = draw_shots(
            self._names,
            shots=self.shots,
            hold_out=self.options.hold_out,
            seed=seed,
            unit="texts",
        )
        query = self._queries
        if not len(query) and self.options.measured:
            query = self._examples(self._texts, split.rest, self._names)
            if not len(query):
                raise nothing_left(self.shots, "texts")
        support = self._examples(self._texts, split.support, self._names)
        held_out = self._examples(self._texts, split.held_out, self._names)
        return TextDraw(self, support, held_out, query, seed=seed)

    def _examples(
        self, texts: Encoded, indices: Sequence[int], names: Sequence[str]
    ) -> TextExamples:
        order = {name: position for position, name in enumerate(self.classes)}
        labels = torch.tensor([order[names[index]] for index in indices], dtype=torch.int64)
        return TextExamples(texts, tuple(indices), labels)


def _listed(data: Path, chosen: TextClassificationOptions) -> list[LabelledText]:
    return list_labelled(data, text=chosen.text_column, label=chosen.label_column)


def encoding_of(
    chosen: TextClassificationOptions,
    config: Mapping[str, Any],
    folder: Path | None,
    *,
    trust_remote_code: bool,
) -> Encoding:
    """Load the tokenizer, and find how long a text may be.

    Raises
    ------
    ModelError
        If there is no tokenizer, or none that cuts texts to so few tokens.
    UsageError
        If the length asked for is none that the model takes.
    """
    place = folder if chosen.tokenizer is None else chosen.tokenizer
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code, task=chosen.task)
    limit = length_limit(config, tokenizer)
    length = chosen.max_length
    if length is None:
        length = min(LONGEST_DEFAULT, limit or LONGEST_DEFAULT)
    added = len(tokenizer("", verbose=False)["input_ids"])
    if length <= added:
        raise UsageError(
            f"--max-length is {length}, expected at least {added + 1}: the tokenizer adds {added} "
            "tokens to every text"
        )
    if limit is not None and length > limit:
        raise UsageError(f"--max-length is {length}, the model takes {limit} tokens at most")
    return Encoding(tokenizer, length)


def pooling_of(chosen: TextClassificationOptions, folder: Path | None) -> Pooling:
    """Return what the features of an encoder are: as asked, as stored, or the mean."""
    return chosen.pooling or stored_pooling(folder) or "mean"


class TextSetting(ClassifierSetting, Protocol):
    """What all draws of one task share."""

    @property
    def options(self) -> TextClassificationOptions:
        """The task's options."""

    @property
    def encoding(self) -> Encoding:
        """The way from a text to tokens."""

    @property
    def pooling(self) -> Pooling:
        """What the features of an encoder are."""


class TextDraw(ClassifierDraw[TextExamples, TextSetting]):
    """Support, held-out and query texts of one seed; see `ClassifierDraw`."""

    unit = "texts"

    def contents(self, part: Literal["support", "query"]) -> Iterator[bytes]:
        """Yield the texts' words; see `svftool.tasks.base.HasContents`."""
        support = (self._support, self._parts["held_out"])
        for examples in support if part == "support" else (self._parts["query"],):
            for index in examples.indices:
                yield examples.texts.words[index].encode()

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, or make one; see `ClassifierDraw.prepare`.

        Raises
        ------
        ModelError
            If the model does not take the texts, or the tokenizer has tokens that it does not
            know.
        """
        said = self._check_tokens(model, start=start)
        prepared = super().prepare(model, start=start)
        if start and self._task.options.pooling is not None:
            said += _without_pooling(prepared.model)
        return replace(prepared, said=(*said, *prepared.said))

    def _check_tokens(self, model: nn.Module, *, start: bool) -> list[str]:
        encoding, known = self._task.encoding, vocabulary(model)
        encoding.padding, said = padding_within(encoding.padding, known)
        parts = (self._support, *self._parts.values())
        for part in parts:
            refuse_unknown(part.texts.texts, part.blocks, encoding.tokenizer, known)
        refuse_misfit(encoding.tokenizer, known)
        # Where nothing is trained, the support set may be the query set once more, or not be read.
        parts = parts if start else (self._parts["query"],)
        blocks = [block for part in parts for block in part.blocks]
        if (unknown := encoding.unknown(blocks)) > _MUCH_UNKNOWN:
            said.append(
                f"{unknown:.0%} of the tokens are unknown to the tokenizer. Name the model's own "
                "with --tokenizer, if that is another"
            )
        cut = sum(part.cut for part in parts)
        if cut:
            said.append(
                f"{counted(cut, 'texts', 'are', of=sum(map(len, parts)))} longer than "
                f"{counted(encoding.length, 'tokens')} and {agreeing(cut, 'are')} cut to them; see "
                "--max-length"
            )
        _tell_padding(model, encoding.padding)
        return said

    def _outputs(self, model: nn.Module) -> int:
        parts = (self._support, *self._parts.values())
        longest = max((block for part in parts for block in part.blocks), key=lambda b: len(b.ids))
        short = self._support.blocks[0]
        batch = to_device(self._task.encoding.batch([longest, short]), device_of(model))
        what = f"texts of {counted(len(longest.ids), 'tokens')}"
        with forward_errors(what, ". Shorten them with --max-length"), torch.inference_mode():
            if self._head_of(model.eval()) is None:
                outputs = text_features(model, **batch, pooling=self._task.pooling)
            else:
                outputs = self.run(model, batch)
        if outputs.ndim != 2:
            raise ModelError(
                f"the model returns {tuple(outputs.shape)} for 2 texts, expected logits for each. "
                "Name an encoder or a text classifier with --model"
            )
        return outputs.shape[1]

    def outputs(self, model: nn.Module) -> int | None:
        """Return how many outputs the head of a bare model has; None where it has none."""
        return None if self._head_of(model) is None else self._outputs(model)

    def _head_of(self, model: nn.Module) -> str | None:
        if self._task.options.head_name is None and not is_classifier(model):
            return None
        return super()._head_of(model)

    def _new_head(self, model: nn.Module, head: str | None, features: int) -> tuple[nn.Module, str]:
        if head is not None:
            return super()._new_head(model, head, features)
        kind: ClassifierType = self._task.options.head_type
        layer = CosineHead if kind == "cosine" else nn.Linear
        new = layer(features, len(self._task.classes))
        return TextClassifier(model, new, self._task.pooling), "head"

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch of texts, (N, classes)."""
        return logits_of(
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        )

    def _of_head_input(self, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        if features.ndim != 3:
            return pool(features)
        # Decoders score every token, and the last one that is no padding counts.
        last = inputs["attention_mask"].sum(1) - 1
        return features[torch.arange(len(last), device=last.device), last]

    def _start_from_names(self, model: nn.Module, head: str) -> None:
        names = [readable(name) for name in self._task.classes]
        blocks, _ = self._task.encoding.encode(names)
        nowhere = [
            LabelledText(name, name, Path("class names"), line)
            for line, name in enumerate(names, 1)
        ]
        known = vocabulary(model.backbone if isinstance(model, TextClassifier) else model)
        encoded = Encoded(nowhere, names, blocks, frozenset(), self._task.encoding)
        refuse_unknown(nowhere, blocks, self._task.encoding.tokenizer, known)
        labels = torch.arange(len(names))
        examples = TextExamples(encoded, tuple(range(len(names))), labels)
        seen = list[Tensor]()
        features = self._features(model.eval(), head, examples.batches(device_of(model)), seen)
        start_head(model.get_submodule(head), features.clone(), torch.cat(seen), len(names))

    def batch(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Pad the texts at `indices`: tokens and mask, (N, T), and (N,) labels."""
        return self._support.take(indices.tolist()), self._support.labels[indices]

    def _metrics(self, count: ClassificationCount) -> dict[str, float]:
        found = count.result()
        return {"accuracy": found.pop("accuracy"), "macro_f1": count.macro_f1(), **found}

    def in_order(self, model: nn.Module, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and labels in the order of the texts, a window of them at once."""
        examples, every = self._parts[part], self.logits(model, part)
        for window, groups in examples.groups(device_of(model)):
            rows = torch.cat([logits for logits, _ in islice(every, len(groups))])
            places = torch.tensor([place for group in groups for place in group]).argsort()
            yield rows[places.to(rows.device)], examples.labels[window.start : window.stop]

    def predictions(
        self, model: nn.Module, part: Part = "query", folder: Path | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each text's class, the one that the model finds, and how sure it is of it."""
        examples = self._parts[part]
        found = self.found(self.in_order(model, part))
        for index, row in zip(examples.indices, found, strict=True):
            text = examples.texts.texts[index]
            yield {"file": text.file.name, "line": text.line, **row}


def _without_pooling(model: nn.Module) -> list[str]:
    """Say that a classifier pools in its own way, whatever was asked for."""
    if isinstance(model, TextClassifier):
        return []
    return ["--pooling does nothing here: the model is a classifier, and pools in a way of its own"]


def _tell_padding(model: nn.Module, padding: int) -> None:
    """Tell a classifier of transformers what it is padded with, if its configuration does not.

    Decoders look for the last token of a text by it.
    """
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", padding) is None:
        config.pad_token_id = padding
