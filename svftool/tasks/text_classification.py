"""Text classification: texts with one class each, for encoders and classifiers of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svftool.errors import ModelError, agreeing, counted
from svftool.tasks.base import Part, Prepared, TaskMetric, device_of, forward_errors, to_device
from svftool.tasks.class_names import check_labels, class_names, readable
from svftool.tasks.encoded_texts import Encoded, Encoding, TextExamples, encoding_of
from svftool.tasks.heads import (
    ClassifierType,
    CosineHead,
    logits_of,
    pool,
    start_head,
)
from svftool.tasks.labelled import ClassificationCount, ClassifierDraw, ClassifierSetting, of_head
from svftool.tasks.options import StrPath, TextClassificationOptions
from svftool.tasks.splits import draw_shots, nothing_left, require_held_out, require_query
from svftool.tasks.text_encoders import (
    Pooling,
    TextClassifier,
    is_classifier,
    pooling_of,
    tell_padding,
    text_features,
    without_pooling,
)
from svftool.tasks.texts import LabelledText, list_labelled
from svftool.tasks.tokens import (
    padding_within,
    refuse_misfit,
    refuse_unknown,
    vocabulary,
)
from svftool.tasks.two_classes import texts_of_two_classes

_MUCH_UNKNOWN = 0.2
_SAID = 40


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
            said += without_pooling(prepared.model)
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
        tell_padding(model, encoding.padding)
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
