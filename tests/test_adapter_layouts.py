"""Adapters of every layout are read by their keys alone, and none in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import (
    SHAPES,
    State,
    base_state,
    changes,
    comfy,
    diffusers,
    kohya,
    pairs,
    product,
    save,
)
from torch import Tensor

from svftool.adapters.layout_file import AdapterFile, is_adapter, open_adapter
from svftool.checkpoints import open_checkpoint
from svftool.errors import CheckpointError, NumericalError
from svftool.stages.audit import audit
from svftool.stages.info import info

WORD = "lora_unet_mid_block_to_q"
NAME = "mid_block.to_q.weight"


def formed(path: Path, base: Path) -> State:
    """Form every change that an adapter makes in a base."""
    with open_adapter(path) as adapter, open_checkpoint(base) as tensors:
        bound = adapter.against(tensors.infos, {}, str(base))
        assert not bound.homeless
        names = (*bound.layers, *bound.biases)
        return {name: bound.change(name, tensors.read(name)) for name in names}


def check(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.reshape(SHAPES[name]), rtol=1e-12, atol=1e-12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", base_state())


@pytest.mark.parametrize(
    ("layout", "state", "scale"),
    [
        ("kohya", kohya(), 0.5),
        ("comfy", comfy(), 1.0),
        ("comfy", comfy(letters=True), 1.0),
        ("diffusers", diffusers(), 1.0),
        ("diffusers", diffusers(old=True), 1.0),
    ],
)
def test_every_layout_gives_the_same_changes(
    tmp_path: Path, base: Path, layout: str, state: State, scale: float
) -> None:
    path = save(tmp_path / "a.safetensors", state)
    assert is_adapter(path)
    with open_adapter(path) as adapter:
        assert adapter.layout == layout
    check(formed(path, base), changes(scale))
    assert info(path).facts["layout"] == layout


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "unet.", "module."])
def test_names_are_found_whatever_the_base_puts_before_them(tmp_path: Path, prefix: str) -> None:
    base = save(tmp_path / "b.safetensors", {prefix + k: v for k, v in base_state().items()})
    for state in (kohya(), comfy(), diffusers()):
        found = formed(save(tmp_path / "a.safetensors", state), base)
        assert found.keys() == {prefix + name for name in changes()}


def test_text_encoders_are_told_apart_by_number(tmp_path: Path) -> None:
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    tensors = {
        f"{part}.text_model.fc.weight": torch.randn(6, 5)
        for part in ("text_encoder", "text_encoder_2")
    }
    base = save(tmp_path / "b.safetensors", tensors)
    state = {
        "lora_te2_text_model_fc.lora_up.weight": up,
        "lora_te2_text_model_fc.lora_down.weight": down,
    }
    assert formed(save(tmp_path / "a.safetensors", state), base).keys() == {
        "text_encoder_2.text_model.fc.weight"
    }


@pytest.mark.parametrize("prefix", ["lora_transformer", "lora_prior_unet", "lycoris"])
def test_other_words_for_the_denoiser(tmp_path: Path, base: Path, prefix: str) -> None:
    state = {key.replace("lora_unet", prefix): value for key, value in kohya().items()}
    check(formed(save(tmp_path / "a.safetensors", state), base), changes(0.5))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_every_storage(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in comfy().items()}
    expected = {name: product(up.to(dtype), down.to(dtype)) for name, (up, down) in pairs().items()}
    check(formed(save(tmp_path / "a.safetensors", state), base), expected)


def test_attention_processors_of_old_files(tmp_path: Path, base: Path) -> None:
    both = pairs()
    state = {}
    for part, name in (
        ("to_q", "down_blocks.0.attn.to_q.weight"),
        ("to_out", "down_blocks.0.attn.to_out.0.weight"),
    ):
        key = f"unet.down_blocks.0.attn.processor.{part}_lora"
        state |= {f"{key}.up.weight": both[name][0], f"{key}.down.weight": both[name][1]}
    found = formed(save(tmp_path / "a.safetensors", state), base)
    check(found, {name: product(*both[name]) for name in found})
    assert len(found) == 2


def test_alpha_that_diffusers_writes_into_the_metadata(tmp_path: Path, base: Path) -> None:
    stated = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"mid_block.to_q": 2}}
    path = save(
        tmp_path / "a.safetensors", diffusers(), {"lora_adapter_metadata": json.dumps(stated)}
    )
    check(formed(path, base), changes(2.0) | {NAME: changes(0.5)[NAME]})


# What is no product of two matrices.


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_loha(tmp_path: Path, base: Path) -> None:
    a, b, c, d = rand(9, 3), rand(3, 9), rand(9, 3), rand(3, 9)
    keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    state = {f"{WORD}.{key}": value for key, value in zip(keys, (a, b, c, d), strict=True)}
    path = save(tmp_path / "a.safetensors", state | {f"{WORD}.alpha": torch.tensor(1.5)})
    check(formed(path, base), {NAME: (a @ b) * (c @ d) * 0.5})


def test_loha_of_a_convolution_with_cores(tmp_path: Path, base: Path) -> None:
    word, name = "lora_unet_down_blocks_0_conv", "down_blocks.0.conv.weight"
    t, a, b = (
        (rand(2, 2, 3, 3), rand(2, 3, 3, 3)[:, :2]),
        (rand(2, 8), rand(2, 8)),
        (rand(2, 6), rand(2, 6)),
    )
    state = {f"{word}.hada_t{i + 1}": t[i] for i in (0, 1)}
    for i in (0, 1):
        state |= {f"{word}.hada_w{i + 1}_a": a[i], f"{word}.hada_w{i + 1}_b": b[i]}
    sides = [torch.einsum("ijkl,ip,jr->prkl", t[i], a[i], b[i]) for i in (0, 1)]
    check(formed(save(tmp_path / "a.safetensors", state), base), {name: sides[0] * sides[1]})


@pytest.mark.parametrize("low", [False, True])
def test_lokr(tmp_path: Path, base: Path, low: bool) -> None:
    one, two = rand(3, 3), rand(3, 3)
    state = {f"{WORD}.lokr_w1": one, f"{WORD}.alpha": torch.tensor(4.0)}
    scale = 1.0
    if low:
        a, b = rand(3, 2), rand(2, 3)
        two, scale = a @ b, 2.0
        state |= {f"{WORD}.lokr_w2_a": a, f"{WORD}.lokr_w2_b": b}
    else:
        state[f"{WORD}.lokr_w2"] = two
    check(
        formed(save(tmp_path / "a.safetensors", state), base), {NAME: torch.kron(one, two) * scale}
    )


def test_lokr_of_a_convolution(tmp_path: Path, base: Path) -> None:
    word, name = "lora_unet_down_blocks_0_conv", "down_blocks.0.conv.weight"
    one, two = rand(2, 3), rand(4, 2, 3, 3)
    state = {f"{word}.lokr_w1": one, f"{word}.lokr_w2": two}
    expected = torch.stack(
        [torch.kron(one, two[:, :, i, j]) for i in range(3) for j in range(3)], -1
    ).reshape(SHAPES[name])
    check(formed(save(tmp_path / "a.safetensors", state), base), {name: expected})


def test_convolution_through_a_core(tmp_path: Path, base: Path) -> None:
    word, name = "lora_unet_down_blocks_0_conv", "down_blocks.0.conv.weight"
    up, mid, down = rand(8, 2, 1, 1), rand(2, 2, 3, 3), rand(2, 6, 1, 1)
    state = {
        f"{word}.lora_up.weight": up,
        f"{word}.lora_mid.weight": mid,
        f"{word}.lora_down.weight": down,
    }
    expected = torch.einsum("oi,ijkl,jc->ockl", up[..., 0, 0], mid, down[..., 0, 0])
    check(formed(save(tmp_path / "a.safetensors", state), base), {name: expected})


@pytest.mark.parametrize("inputs", [False, True])
def test_dora_scales_of_outputs_and_inputs(tmp_path: Path, base: Path, inputs: bool) -> None:
    up, down = rand(9, 2), rand(2, 9)
    scale = rand(1, 9) if inputs else rand(9, 1)
    state = {
        f"{WORD}.lora_up.weight": up,
        f"{WORD}.lora_down.weight": down,
        f"{WORD}.dora_scale": scale,
    }
    W = base_state()[NAME].double()
    moved = W + up @ down
    expected = moved * scale / moved.norm(dim=0 if inputs else 1, keepdim=True) - W
    check(formed(save(tmp_path / "a.safetensors", state), base), {NAME: expected})


def test_differences_of_norms_and_biases(tmp_path: Path, base: Path) -> None:
    norm, bias = rand(9), rand(9)
    state = {
        "diffusion_model.mid_block.norm.diff": norm,
        "diffusion_model.mid_block.to_q.diff_b": bias,
    }
    path = save(tmp_path / "a.safetensors", state)
    check(formed(path, base), {"mid_block.norm.weight": norm, "mid_block.to_q.bias": bias})
    assert info(path).facts["adapter"] == "differences"


# What is half, ambiguous or unsound is refused in one line.


def without(state: State, ending: str) -> State:
    return {key: value for key, value in state.items() if key != f"{WORD}.{ending}"}


def put(state: State, ending: str, value: Tensor) -> State:
    return {**state, f"{WORD}.{ending}": value}


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (without(kohya(), "lora_up.weight"), CheckpointError, "no lora_up"),
        (without(kohya(), "lora_down.weight"), CheckpointError, "no lora_down"),
        ({f"{WORD}.alpha": torch.tensor(1.0), **without(kohya(), "alpha")}, None, ""),
        (
            {
                k: v
                for k, v in kohya().items()
                if k != f"{WORD}.lora_up.weight" and k != f"{WORD}.lora_down.weight"
            },
            CheckpointError,
            "no lora_down, lora_up",
        ),
        (put(kohya(), "alpha", torch.tensor(0.0)), CheckpointError, "alpha 0"),
        (put(kohya(), "alpha", torch.tensor(float("nan"))), NumericalError, "is nan"),
        (put(kohya(), "hada_w1_a", torch.ones(9, 2)), CheckpointError, "two kinds"),
        (put(kohya(), "lora_up.weight", torch.ones(9, 3)), CheckpointError, "make no change"),
        (put(kohya(), "lora_up.weight", torch.ones(8, 4)), CheckpointError, "another base"),
        (
            put(kohya(), "lora_up.weight", torch.full((9, 4), float("inf"))),
            NumericalError,
            "NaN or infinity",
        ),
        (put(kohya(), "dora_scale", torch.ones(5, 1)), CheckpointError, "magnitudes of DoRA"),
        (kohya() | diffusers(), CheckpointError, "of no layout or of several"),
        ({f"x.{k}": v for k, v in diffusers().items()}, CheckpointError, "begin with"),
        (
            {f"base_model.model.{k}": v for k, v in diffusers().items()},
            CheckpointError,
            "adapter_config.json",
        ),
        (
            {k.replace("mid_block", "other"): v for k, v in kohya().items() if "mid_block" in k},
            CheckpointError,
            "none of the adapter's",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, base: Path, state: State, error: type[Exception] | None, words: str
) -> None:
    path = save(tmp_path / "a.safetensors", state)
    if error is None:
        formed(path, base)
        return
    with pytest.raises(error, match=words) as caught:
        formed(path, base)
    assert "\n" not in str(caught.value)


def test_a_word_that_fits_two_modules_is_refused(tmp_path: Path) -> None:
    base = save(
        tmp_path / "b.safetensors",
        {"a.b_c.weight": torch.ones(3, 2), "a_b.c.weight": torch.ones(3, 2)},
    )
    state = {
        "lora_unet_a_b_c.lora_up.weight": torch.ones(3, 1),
        "lora_unet_a_b_c.lora_down.weight": torch.ones(1, 2),
    }
    with pytest.raises(CheckpointError, match=r"'a\.b_c\.weight', 'a_b\.c\.weight'"):
        formed(save(tmp_path / "a.safetensors", state), base)


def test_modules_without_place_and_unknown_keys_are_named(tmp_path: Path, base: Path) -> None:
    state = kohya() | {
        "lora_te_fc.lora_up.weight": torch.ones(3, 1),
        "lora_te_fc.lora_down.weight": torch.ones(1, 2),
        "lora_unet_x.strange": torch.ones(2),
    }
    path = save(tmp_path / "a.safetensors", state)
    with open_adapter(path) as adapter, open_checkpoint(base) as tensors:
        bound = adapter.against(tensors.infos, {}, "b")
        assert bound.homeless == ("lora_te_fc",)
        assert bound.unused == ("lora_unet_x.strange",)
    (comparison,) = audit(base, [path]).comparisons
    named = {one.name for one in comparison.unmatched_tuned}
    assert named == {"lora_te_fc", "lora_unet_x.strange"}


@pytest.mark.parametrize("make", [kohya, comfy, diffusers])
def test_inspect_takes_every_layout(tmp_path: Path, base: Path, make: Callable[[], State]) -> None:
    path = save(tmp_path / "a.safetensors", make())
    (comparison,) = audit(base, [path]).comparisons
    ranks = {one.name: one.change_rank for one in comparison.matrices if one.name in changes()}
    assert set(ranks) == set(changes())
    assert set(ranks.values()) == {4}


def test_a_checkpoint_with_an_adapter_inside_is_no_adapter(tmp_path: Path) -> None:
    state = {f"unet.{name}": value for name, value in base_state().items()}
    state |= {k: v for k, v in diffusers().items() if "to_q" in k}
    assert not is_adapter(save(tmp_path / "b.safetensors", state))
    with open_adapter(save(tmp_path / "a.safetensors", diffusers())) as adapter:
        assert isinstance(adapter, AdapterFile)
