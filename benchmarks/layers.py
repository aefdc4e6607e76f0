"""The matrices of well-known networks, with random and with decaying spectra."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[tuple[int, int], int]

RESNET50: Shapes = {
    (64, 64): 1, (64, 147): 1, (64, 256): 2, (64, 576): 3, (128, 256): 1, (128, 512): 3,
    (128, 1152): 4, (256, 64): 4, (256, 512): 1, (256, 1024): 5, (256, 2304): 6, (512, 128): 4,
    (512, 256): 1, (512, 1024): 1, (512, 2048): 2, (512, 4608): 3, (1000, 2048): 1,
    (1024, 256): 6, (1024, 512): 1, (2048, 512): 3, (2048, 1024): 1,
}  # fmt: skip
VGG16: Shapes = {
    (64, 27): 1, (64, 576): 1, (128, 576): 1, (128, 1152): 1, (256, 1152): 1, (256, 2304): 2,
    (512, 2304): 1, (512, 4608): 5, (1000, 4096): 1, (4096, 4096): 1, (4096, 25088): 1,
}  # fmt: skip
VIT_B_16: Shapes = {
    (768, 768): 13, (768, 3072): 12, (1000, 768): 1, (2304, 768): 12, (3072, 768): 12,
}  # fmt: skip
LLAMA_BLOCK: Shapes = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
QUICK: Shapes = {(64, 147): 1, (128, 1152): 2, (256, 2304): 1, (512, 512): 2, (768, 300): 1}

NETWORKS = {
    "resnet50": RESNET50,
    "vgg16": VGG16,
    "vit_b_16": VIT_B_16,
    "llama block": LLAMA_BLOCK,
    "quick": QUICK,
}


def random_layers(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Return weights as they are before training: independent normal numbers."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"{m}x{n}.{number}": torch.randn(m, n, generator=g) / math.sqrt(n)
        for (m, n), count in shapes.items()
        for number in range(count)
    }


def trained_layers(shapes: Shapes, profile: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return weights with the spectrum of a trained layer and random singular vectors.

    Parameters
    ----------
    shapes : mapping of (m, n) to int
    profile : (p,) Tensor
        Singular values of a trained layer, non-increasing; stretched to each layer's number.
    """
    return {
        name: with_spectrum(W, stretched(profile, min(W.shape)))
        for name, W in random_layers(shapes, seed).items()
    }


def stretched(profile: Tensor, count: int) -> Tensor:
    """Interpolate a spectrum, on a logarithmic scale, at another number of singular values."""
    logs = profile.clamp_min(float(profile[0]) * 1e-8).log()[None, None]
    return torch.nn.functional.interpolate(logs, count, mode="linear", align_corners=True)[
        0, 0
    ].exp()


def with_spectrum(W: Tensor, values: Tensor) -> Tensor:
    """Return a matrix of W's shape with the given singular values, to some percent.

    Long random matrices are orthogonal enough; an exact rotation would take longer than the
    decomposition that is to be measured.
    """
    if W.shape[0] < W.shape[1]:
        return with_spectrum(W.mT, values).mT.contiguous()
    g = torch.Generator().manual_seed(len(W))
    turn = torch.randn(len(values), len(values), generator=g) / math.sqrt(len(values))
    if len(values) <= 1024:
        turn = torch.linalg.qr(turn).Q
    return (W * math.sqrt(W.shape[1] / W.shape[0]) * values) @ turn


def profile_of(data: Path | None) -> tuple[Tensor, str]:
    """Return the spectrum of a trained 256 x 2304 layer, or a power law where there is no data."""
    file = data / "checkpoints" / "resnet18_to_layer3.safetensors" if data else None
    if file is None or not file.is_file():
        return (1.0 + torch.arange(256.0)) ** -0.7, "power law"
    from svftool.checkpoints import open_checkpoint

    with open_checkpoint(file) as checkpoint:
        name = max(checkpoint.infos, key=lambda name: checkpoint.infos[name].numel)
        W = checkpoint.read(name)
    return torch.linalg.svdvals(W.reshape(len(W), -1).double()).float(), f"that of {name}"


def real_layers(data: Path) -> dict[str, Tensor]:
    """Return every matrix of the real checkpoints in a folder."""
    from svftool.checkpoints import open_checkpoint

    layers = {}
    for file in sorted((data / "checkpoints").iterdir()):
        if file.suffix not in (".safetensors", ".th") and not file.is_dir():
            continue
        with open_checkpoint(file) as checkpoint:
            for name, info in checkpoint.infos.items():
                if info.dtype.is_floating_point and len(info.shape) > 1:
                    W = checkpoint.read(name)
                    layers[f"{file.stem}.{name}"] = W.reshape(len(W), -1).clone()
    return {name: W for name, W in layers.items() if min(W.shape) > 1}
