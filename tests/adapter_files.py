"""Adapter files of other tools, made and read with a few lines of their own."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

SHAPES = {
    "down_blocks.0.attn.to_q.weight": (12, 10),
    "down_blocks.0.attn.to_out.0.weight": (10, 12),
    "down_blocks.0.conv.weight": (8, 6, 3, 3),
    "mid_block.proj_in.weight": (9, 7, 1, 1),
    "mid_block.norm.weight": (9,),
    "mid_block.to_q.weight": (9, 9),
    "mid_block.to_q.bias": (9,),
}


def base_state(dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def save(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


def pairs(rank: int = 4, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return up and down of every matrix, in the shapes of convolutions where it is one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        if len(shape) > 1:
            ones = (1,) * (len(shape) - 2)
            up = torch.randn(shape[0], rank, *ones, generator=generator)
            found[name] = up, torch.randn(rank, *shape[1:], generator=generator)
    return found


def kohya(rank: int = 4, alpha: float = 2.0, seed: int = 0) -> State:
    state = {}
    for name, (up, down) in pairs(rank, seed).items():
        word = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        state |= {f"{word}.lora_up.weight": up, f"{word}.lora_down.weight": down}
        state[f"{word}.alpha"] = torch.tensor(alpha)
    return state


def comfy(rank: int = 4, seed: int = 0, letters: bool = False) -> State:
    names = ("lora_B", "lora_A") if letters else ("lora_up", "lora_down")
    state = {}
    for name, both in pairs(rank, seed).items():
        module = f"diffusion_model.{name.removesuffix('.weight')}"
        state |= {f"{module}.{one}.weight": value for one, value in zip(names, both, strict=True)}
    return state


def diffusers(rank: int = 4, seed: int = 0, old: bool = False) -> State:
    names = ("lora.up", "lora.down") if old else ("lora_B", "lora_A")
    state = {}
    for name, both in pairs(rank, seed).items():
        module = f"unet.{name.removesuffix('.weight')}"
        state |= {f"{module}.{one}.weight": value for one, value in zip(names, both, strict=True)}
    return state


def product(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    flat = up.double().flatten(1) @ down.double().flatten(1)
    return flat.reshape(up.shape[0], *down.shape[1:]) * scale


def changes(scale: float = 1.0, rank: int = 4, seed: int = 0) -> State:
    """Return what the adapters above are to change."""
    return {name: product(*both, scale) for name, both in pairs(rank, seed).items()}


def read(path: Path) -> tuple[State, dict[str, str]]:
    """Return tensors and metadata of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def changes_in(path: Path) -> State:
    """Multiply out what a file of pairs holds, by module."""
    if path.is_dir():
        import json

        config = json.loads((path / "adapter_config.json").read_text())
        state, _ = read(path / "adapter_model.safetensors")
    else:
        state, config = read(path)[0], {}
    found = {}
    for key, down in state.items():
        for one, other in (
            ("lora_down", "lora_up"),
            ("lora_A", "lora_B"),
            ("lora.down", "lora.up"),
        ):
            if f".{one}.weight" in key:
                module = key.removesuffix(f".{one}.weight")
                alpha = state.get(f"{module}.alpha", torch.tensor(float(len(down)))).double()
                scale = float(alpha) / len(down)
                if config:
                    plain = module.removeprefix("base_model.model.").replace(".", r"\.")
                    rank = config.get("rank_pattern", {}).get(plain, config["r"])
                    assert rank == len(down), module
                    scale = config.get("alpha_pattern", {}).get(plain, config["lora_alpha"]) / (
                        math.sqrt(rank) if config.get("use_rslora") else rank
                    )
                found[module] = product(state[f"{module}.{other}.weight"], down, scale)
    return found
