"""Keys of adapter files in the layouts of kohya's tools, ComfyUI and diffusers.

A key is a module and a role (``lora_down``, ``hada_w1_a``, ``alpha``). The module names a tensor of
a part of a pipeline: with dots, or as one word in kohya's layout, which only a base can resolve.
"""

from __future__ import annotations

import re

from svftool.adapters.parts import role_of

_LEAF = r"(?:\.default)?\.weight"
_ROLES: tuple[tuple[str, str], ...] = (
    ("down", rf"\.(?:lora_down|lora\.down|lora_A|lora_linear_layer\.down){_LEAF}"),
    ("up", rf"\.(?:lora_up|lora\.up|lora_B|lora_linear_layer\.up){_LEAF}"),
    ("mid", r"\.lora_mid\.weight"),
    ("up_bias", r"\.(?:lora_up|lora_B)\.bias"),
    ("alpha", r"\.alpha"),
    ("magnitude", r"\.(?:dora_scale|lora_magnitude_vector(?:\.weight)?)"),
    *((one, rf"\.{one}") for one in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((one, rf"\.{one}") for one in ("hada_t1", "hada_t2", "lokr_t2")),
    *((f"lokr_w{n}{x}", rf"\.lokr_w{n}{x}") for n in "12" for x in ("", "_a", "_b")),
    ("diff", r"\.(?:diff|w_norm)"),
    ("diff_b", r"\.(?:diff_b|b_norm)"),
    ("set_weight", r"\.set_weight"),
)
_KEY = re.compile(
    r"(?P<module>.+?)(?:" + "|".join(f"(?P<{role}>{pattern})" for role, pattern in _ROLES) + ")"
)
_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<part>\w+)_lora\.(?P<role>down|up)\.weight")
"""Attention processors, as diffusers named them before it used PEFT."""

_KOHYA = re.compile(
    r"(?P<part>lora_unet|lora_te\d*|lora_transformer|lora_prior_unet|lycoris)_(?P<module>.+)"
)
_DOTTED = re.compile(
    r"(?P<part>diffusion_model|unet|transformer(_\d)?|text_encoder(_\d)?)\.(?P<module>.+)"
)
_TEXT_ENCODERS = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into its module and its role; None where it is of no adapter."""
    old = _PROCESSOR.fullmatch(key)
    if old is not None:
        # The output of attention is the first of two modules.
        part = "to_out.0" if old["part"] == "to_out" else old["part"]
        return f"{old['module']}.{part}", old["role"]
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    return found["module"], next(role for role, _ in _ROLES if found[role] is not None)


def module_of(key: str) -> str:
    """Return the module of an adapter's key."""
    found = split_key(key)
    assert found is not None
    return found[0]


def split_module(module: str, *, words: bool) -> tuple[str, str] | None:
    """Split a module into its part of a pipeline and its name there; None where it has no part.

    Parameters
    ----------
    module : str
    words : bool
        Whether names are one word, as in kohya's layout.

    Examples
    --------
    >>> split_module("lora_te1_text_model_encoder_fc1", words=True)
    ('te1', 'text_model_encoder_fc1')
    >>> split_module("unet.mid_block.proj", words=False)
    ('unet', 'mid_block.proj')
    """
    found = (_KOHYA if words else _DOTTED).fullmatch(module)
    return None if found is None else (found["part"].removeprefix("lora_"), found["module"])


def role_of_part(part: str) -> str:
    """Return which part of a pipeline a file's name for it means; see `parts.role_of`."""
    return role_of(_TEXT_ENCODERS.get(part, part))


def ending(layout: str, role: str) -> str:
    """Return how a layout calls a role."""
    names = {"down": "lora_down", "up": "lora_up"}
    if layout == "diffusers":
        names = {"down": "lora_A", "up": "lora_B"}
    return names.get(role, role)
