"""A tiny BERT with a tokenizer of whole words, written as transformers writes them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    *("red", "green", "blue", "lost", "card", "where", "is", "my", "the", "fee", "rate"),
]


def write_words(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write a tokenizer of whole words that puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


def bert(kind: str = "BertModel", *, vocabulary: int = len(WORDS), **options: Any) -> Any:
    """Return a random BERT of one layer, in evaluation mode."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        **options,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, kind)(config).eval()


def write_table(path: Path, rows: Sequence[Sequence[str]], names: str = "text,category") -> Path:
    """Write CSV, or TSV by the name, with a row of names unless it is empty."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([*([names.split(",")] if names else []), *rows])
    return path


def colours(count: int = 4) -> list[list[str]]:
    """Rows of three classes, each told by one word."""
    ends = ["card", "fee", "rate", "my card", "the fee", "lost"]
    return [
        [f"where is {colour} {ends[number]}", f"{colour}_thing"]
        for colour in ("red", "green", "blue")
        for number in range(count)
    ]
