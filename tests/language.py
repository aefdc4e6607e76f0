"""A small causal model with a tokenizer of its own, written as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .?:"]


def write_tokenizer(folder: Path, words: list[str] = WORDS, *, start: bool = True) -> Path:
    """Write a tokenizer that knows single characters and begins every text with <s> on request."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if start:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_model(folder: Path, *, vocabulary: int = len(WORDS), **options: Any) -> Path:
    """Write a Llama of two layers with tied embeddings, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return write_tokenizer(folder)


def write_texts(path: Path, rows: list[Any]) -> Path:
    """Write JSONL."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
