"""Train singular values with transformers' Trainer.

Without arguments a tiny model with random weights and a few sentences are made on the spot, to show
that the Trainer needs nothing special: the attached model saves, reloads and resumes as the plain
one does. With a checkpoint folder and a JSONL file of ``{"text": ...}`` it tunes a real model:

    python examples/transformers_trainer.py
    python examples/transformers_trainer.py ../shared/data/checkpoints/stories260K \
        --text ../shared/data/text/shakespeare_train.jsonl --steps 60
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import svftool

LENGTH = 64
SENTENCE = "The quality of mercy is not strained; it droppeth as the gentle rain from heaven. "

Example = dict[str, list[int]]


def make_model(folder: Path) -> Path:
    """Write a small Llama that reads bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return folder / "base"


def examples(model: Path, text: Path | None) -> list[Example]:
    """Cut text into pieces of `LENGTH` tokens: bytes where the model has no tokenizer."""
    if text is None:
        tokens = list((SENTENCE * 40).encode())
    else:
        lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
        tokens = AutoTokenizer.from_pretrained(model)("\n".join(lines))["input_ids"]
    pieces = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH, LENGTH)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(folder: Path, base: Path | None, text: Path | None, steps: int) -> tuple[float, float]:
    """Return the training text's loss before and after."""
    set_seed(0)
    base = base or make_model(folder)
    svftool.decompose(base, folder / "factors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attached = svftool.attach(model, folder / "factors")

    data = examples(base, text)
    options = TrainingArguments(
        output_dir=str(folder / "runs"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model=model, args=options, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    svftool.save_tuned(model, folder / "tuned.svf.safetensors", task="language")
    trainer.save_model(folder / "merged")  # a plain checkpoint, merged, in transformers' layout
    trained = sum(p.numel() for p in attached.parameters())
    print(f"loss {before:.3f} -> {after:.3f}, {trained} singular values trained")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint folder of a causal model")
    parser.add_argument("--text", type=Path, help="JSONL file with a 'text' a line")
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    if (chosen.model is None) != (chosen.text is None):
        parser.error("give both a model and --text, or neither")
    with TemporaryDirectory() as temporary:
        main(Path(temporary), chosen.model, chosen.text, chosen.steps)
