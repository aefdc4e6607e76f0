"""A sharded bfloat16 checkpoint with Llama's tensor names and shapes and random weights.

For measuring memory and time on a model that need not exist.

    python benchmarks/synthetic_checkpoint.py /tmp/llama-3b               3.2 billion parameters
    python benchmarks/synthetic_checkpoint.py /tmp/llama-2l --layers 2    a part of it
    python benchmarks/synthetic_checkpoint.py /tmp/llama-8b --size 8b --layers 1
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from svftool.checkpoints import CheckpointWriter, TensorInfo, plan_shards


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


def write(folder: Path, size: Size, max_shard_bytes: int) -> int:
    """Write the checkpoint; return its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        name: TensorInfo(name=name, dtype=torch.bfloat16, shape=shape, file="")
        for name, shape in size.shapes()
    }
    shards = plan_shards(infos.values(), max_shard_bytes)
    grouped = [[infos[name] for name in names] for names in shards]
    with CheckpointWriter(folder, shards=grouped) as writer:
        for seed, (name, info) in enumerate(infos.items()):
            writer.write(name, weights(name, info.shape, seed))
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
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return sum(math.prod(info.shape) for info in infos.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.layers:
        size = Size(**{**vars(size), "layers": options.layers})
    count = write(options.folder, size, options.shard_bytes)
    print(f"{options.folder}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
