"""How much a model sees at once where nothing is trained.

A GPU wants much. On a CPU, what the layers hand on should stay in its caches: a MobileNetV2 takes
three times as long an image where 125 images of 160 pixels go through it together as where ten do.
"""

from __future__ import annotations

import torch

_PIXELS = 64 * 224 * 224
_PIXELS_ON_CPU = 1 << 18
_TOKENS = 1 << 14
_TOKENS_ON_CPU = 1 << 11


def images_at_once(pixels: int, device: torch.device) -> int:
    """Return how many images of so many pixels, at least one."""
    return max(1, (_PIXELS_ON_CPU if device.type == "cpu" else _PIXELS) // max(1, pixels))


def tokens_at_once(device: torch.device) -> int:
    """Return how many tokens, padding included."""
    return _TOKENS_ON_CPU if device.type == "cpu" else _TOKENS
