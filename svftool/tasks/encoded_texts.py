"""Labelled texts as tokens: encoded once, cut where they are too long, and batched by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svftool.errors import DataError, UsageError
from svftool.tasks.at_once import tokens_at_once
from svftool.tasks.base import to_device
from svftool.tasks.options import TextClassificationOptions
from svftool.tasks.tokens import Block, Placed, by_length, collate, length_limit, load_tokenizer

LONGEST_DEFAULT = 512
WINDOW = 4096
"""Texts that are sorted by length at once."""


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
