"""Whose adapter a file is, told by its keys alone."""

from __future__ import annotations

import re
from collections.abc import Collection

_KINDS: tuple[tuple[str, str], ...] = (
    ("LoHa", r"\.hada_(w[12]_[ab]|t[12])$"),
    ("LoKr", r"\.lokr_(w[12](_[ab])?|t2)$"),
    ("IA3", r"\.ia3_l(\.weight)?$"),
    ("OFT", r"\.oft_(r|blocks|diag)\b"),
    ("VeRA", r"\bvera_lambda_[bd]\b"),
    (
        "LoRA",
        r"\blora[_.](A|B|up|down|embedding_A|embedding_B)\b|_lora\.(up|down)\.|\blora_linear_layer\.",
    ),
)
_LAYOUTS: tuple[tuple[str, str], ...] = (
    ("peft", r"^base_model\.model\."),
    ("kohya", r"^(lora_(unet|te\d*|transformer|prior_unet)|lycoris)_"),
    ("comfy", r"^diffusion_model\."),
    ("diffusers", r"^(unet|transformer(_\d)?|text_encoder(_\d)?)\."),
)
_PARTS = re.compile(
    "|".join(pattern for _, pattern in _KINDS)
    + r"|\.(dora_scale|lora_mid\.weight|diff|diff_b|w_norm|b_norm|set_weight)$"
)


def adapter_kind(names: Collection[str]) -> str | None:
    """Say what kind of adapter holds tensors of these names; None where it is none.

    Examples
    --------
    >>> adapter_kind(["lora_unet_mid.lora_down.weight", "lora_unet_mid.alpha"])
    'LoRA'
    >>> adapter_kind(["fc.weight"]) is None
    True
    """
    for kind, pattern in _KINDS:
        if any(re.search(pattern, name) for name in names):
            scaled = any("dora_scale" in one or "lora_magnitude_vector" in one for one in names)
            return f"{kind} with DoRA scales" if scaled else kind
    return "differences" if adapter_layout(names) else None


def adapter_layout(names: Collection[str]) -> str | None:
    """Say whose layout the keys of an adapter have; None where none or several would fit.

    Examples
    --------
    >>> adapter_layout(["diffusion_model.blocks.0.q.lora_A.weight"])
    'comfy'
    """
    parts = [name for name in names if _PARTS.search(name)]
    fitting = [
        layout
        for layout, pattern in _LAYOUTS
        if parts and all(re.match(pattern, name) for name in parts)
    ]
    return fitting[0] if len(fitting) == 1 else None
