"""A sharded bfloat16 checkpoint with Llama's tensor names and shapes and random weights.

For measuring memory and time on a model that need not exist.

    python benchmarks/synthetic_checkpoint.py /tmp/llama-3b               3.2 billion parameters
    python benchmarks/synthetic_checkpoint.py /tmp/llama-2l --layers 2    a part of it
    python benchmarks/synthetic_checkpoint.py /tmp/llama-8b --size 8b --layers 1
    python benchmarks/synthetic_checkpoint.py /tmp/llama-3b-tuned --tuned /tmp/llama-3b
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from svftool.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint, plan_shards

NOISE = 0.02
"""Size of the change that `--tuned` makes, relative to each matrix."""


@dataclass(frozen=True)
class Size:
    """Sides of a model of the Llama 3 family."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 128256

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the names and shapes of all tensors, in file order."""
        narrow = self.hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{layer}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{layer}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{layer}.self_attn.k_proj.weight", (narrow, self.hidden)
            yield f"{layer}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.self_attn.v_proj.weight", (narrow, self.hidden)
        yield "model.norm.weight", (self.hidden,)


SIZES = {
    "1b": Size(2048, 8192, 16, 32, 8),
    "3b": Size(3072, 8192, 28, 24, 8),
    "8b": Size(4096, 14336, 32, 32, 8),
    "70b": Size(8192, 28672, 80, 64, 8),
}


def weights(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return ones for a norm, else normal numbers of the size that trained weights have."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for rows in tensor.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=g) / math.sqrt(shape[-1]))
    return tensor


def moved(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a matrix with noise on it, as a full fine-tune moves it; a norm as it is."""
    if weight.ndim == 1:
        return weight
    g = torch.Generator().manual_seed(seed)
    scale = NOISE / math.sqrt(weight.shape[-1])
    tensor = torch.empty_like(weight)
    for rows, before in zip(tensor.split(4096), weight.split(4096), strict=True):
        rows.copy_(before.float() + torch.randn(rows.shape, generator=g) * scale)
    return tensor


def write(
    folder: Path,
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    tensor: Callable[[str, tuple[int, ...], int], torch.Tensor],
    config: dict[str, object],
    max_shard_bytes: int,
) -> int:
    """Write a checkpoint a tensor at a time; return its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        name: TensorInfo(name=name, dtype=torch.bfloat16, shape=shape, file="")
        for name, shape in shapes
    }
    shards = plan_shards(infos.values(), max_shard_bytes)
    grouped = [[infos[name] for name in names] for names in shards]
    with CheckpointWriter(folder, shards=grouped) as writer:
        for seed, (name, info) in enumerate(infos.items()):
            writer.write(name, tensor(name, info.shape, seed))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return sum(math.prod(info.shape) for info in infos.values())


def write_base(folder: Path, size: Size, max_shard_bytes: int) -> int:
    """Write random weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return write(folder, size.shapes(), weights, config, max_shard_bytes)


def write_tuned(folder: Path, base: Path, max_shard_bytes: int) -> int:
    """Write a fine-tune of another such checkpoint."""
    with open_checkpoint(base) as before:
        shapes = [(name, info.shape) for name, info in before.infos.items()]

        def tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
            return moved(before.read(name), len(shapes) + seed)

        return write(folder, shapes, tensor, dict(before.config or {}), max_shard_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--tuned", type=Path, metavar="FROM", help="a fine-tune of that one")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9)
    options = parser.parse_args()
    if options.tuned:
        count = write_tuned(options.folder, options.tuned, options.shard_bytes)
    else:
        size = SIZES[options.size]
        size = replace(size, layers=options.layers or size.layers)
        count = write_base(options.folder, size, options.shard_bytes)
    print(f"{options.folder}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
