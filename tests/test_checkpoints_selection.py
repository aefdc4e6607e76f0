"""Which tensors are decomposed, and why the others are left whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svftool.checkpoints import (
    Selection,
    TensorInfo,
    View,
    check_patterns,
    is_expert_stack,
    matches,
    open_checkpoint,
    output_heads,
    select,
    table_role,
)
from svftool.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]


def infos_of(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, "x") for name, shape in shapes.items()}


def chosen(shapes: Shapes, **options: object) -> dict[str, View]:
    layers, _ = select(infos_of(shapes), Selection(**options))  # type: ignore[arg-type]
    return {layer.name: layer.view for layer in layers}


def reason(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str | None:
    _, whole = select(infos_of({name: shape}, dtype), Selection())
    return whole[0].reason if whole else None


def heads(names: Iterable[str]) -> set[str]:
    return set(output_heads(infos_of(dict.fromkeys(names, (10, 8))).values()))


# What cannot be decomposed.


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 3), torch.float32, None),
        ((4, 3), torch.bfloat16, None),
        ((4, 3, 3, 3), torch.float16, None),
        ((4, 3, 5), torch.float64, None),
        ((4, 1, 3, 3), torch.float32, None),
        ((4,), torch.float32, "fewer than two dimensions"),
        ((), torch.float32, "fewer than two dimensions"),
        ((0, 4), torch.float32, "empty"),
        ((4, 0), torch.float32, "empty"),
        ((1, 8), torch.float32, "one side of the matrix is 1"),
        ((8, 1, 1), torch.float32, "one side of the matrix is 1"),
        ((1, 4, 4), torch.float32, "one side of the matrix is 1"),
        ((4, 3), torch.int64, "not floating point"),
        ((4, 3), torch.bool, "not floating point"),
        ((4, 3), torch.complex64, "not floating point"),
        ((4, 3), torch.float8_e4m3fn, "float8 values of a quantised layer"),
        ((4, 3), torch.float8_e8m0fnu, "quantisation scale or packed integers"),
        ((4, 3), torch.float4_e2m1fn_x2, "quantisation scale or packed integers"),
    ],
    ids=str,
)
def test_reasons_of_shape_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, expected: str | None
) -> None:
    assert reason("layer.weight", shape, dtype) == expected


def test_sparse_and_quantised_tensors_are_left_whole() -> None:
    infos = {"w": TensorInfo("w", torch.float32, (4, 4), "x", "sparse")}
    _, whole = select(infos, Selection(include=("w",)))
    assert whole[0].reason == "sparse storage"


def test_nothing_brings_in_what_cannot_be_decomposed() -> None:
    shapes = {"bias": (4,), "column": (4, 1), "empty": (0, 3)}
    assert not chosen(shapes, include=("*",))


def test_float8_is_brought_in_by_a_pattern() -> None:
    infos = infos_of({"w": (4, 3)}, torch.float8_e4m3fn)
    assert select(infos, Selection(include=("w",)))[0]


# What is told by its name.


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", (169, 3), "relative position"),
        ("blocks.3.attn.rel_pos_h", (27, 64), "relative position"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), "relat"),
        ("deberta.encoder.rel_embeddings.weight", (512, 64), "relative position"),
        ("stages.2.1.self_attn.pos_embed.height_rel", (31, 64), "relative position"),
        ("stages.0.blocks.0.attn.attention_biases", (4, 196), "attention bias"),
        ("transformer.layer.0.rel_attn.r_w_bias", (16, 64), "attention bias"),
        ("layers.0.blocks.1.attn_mask", (64, 49, 49), "attention mask"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 128), "bias of several"),
        ("transformer.wpe.weight", (1024, 768), "position embedding"),
        ("bert.embeddings.position_embeddings.weight", (512, 768), "position embedding"),
        ("model.decoder.embed_positions.weight", (448, 384), "position embedding"),
        ("positional_embedding", (77, 512), "position embedding"),
        ("module.pos_embed", (50, 1, 64), "position embedding"),
        ("transformer.wte.weight", (50257, 768), "token embedding"),
        ("model.embed_tokens.weight", (300, 64), "token embedding"),
        ("bert.embeddings.word_embeddings.weight", (300, 64), "token embedding"),
        ("bert.embeddings.token_type_embeddings.weight", (2, 64), "token embedding"),
        ("shared.weight", (300, 64), "token embedding"),
        ("tok_embeddings.weight", (300, 64), "token embedding"),
        ("gpt_neox.embed_in.weight", (300, 64), "token embedding"),
        ("model.layers.0.mlp.down_proj.scales", (16, 64), "quantisation scale"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", (16, 64), "quantisation scale"),
    ],
)
def test_tables_are_left_whole(name: str, shape: tuple[int, ...], expected: str) -> None:
    found = reason(name, shape)
    assert found is not None
    assert found.startswith(expected)
    assert chosen({name: shape}, include=("*",)) == {name: "matrix"}


def test_packed_integers_are_told_from_other_integers() -> None:
    assert reason("q_proj.qweight", (8, 8), torch.int32) == "quantisation scale or packed integers"
    assert reason("relative_position_index", (8, 8), torch.int64) == "not floating point"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.proj.weight", (192, 3, 16, 16)),
        ("embeddings.patch_embeddings.projection.weight", (64, 3, 16, 16)),
        ("embeddings_project.weight", (64, 32)),
        ("blocks.0.attn.cpb_mlp.0.weight", (512, 2)),
        ("blocks.0.attn.rel_pos.mlp.fc1.weight", (512, 2)),
        ("time_embedding.linear_1.weight", (64, 32)),
        ("patch_embed.weight", (64, 48)),
        ("embed.weight", (64, 3, 4, 4)),
        ("mask_predictor.conv5_mask.weight", (256, 256, 2, 2)),
        ("encoder.layers.0.mlp.shared.weight", (64, 32)),
        ("model.layers.0.self_attn.pos_proj.weight", (64, 64)),
        ("model.layers.0.mlp.gate.weight", (8, 64)),
        ("block.0.layer_scale_mlp.weight", (64, 64)),
        ("encoder.layers.0.fc1.weight", (64, 32)),
        ("encoder.layer.0.output.dense.weight", (64, 32)),
        ("encoder.layers.0.linear1.weight", (64, 32)),
        ("encoder.layers.0.self_attn.out_proj.weight", (64, 64)),
        ("blocks.0.attn.fc.weight", (64, 64)),
        ("bert.pooler.dense.weight", (64, 64)),
        ("pre_classifier.weight", (64, 64)),
        ("conv.lora_A.weight", (8, 64)),
    ],
)
def test_layers_with_names_like_tables_or_heads_are_decomposed(
    name: str, shape: tuple[int, ...]
) -> None:
    assert reason(name, shape) is None


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (["conv1.weight", "layer4.0.conv1.weight"], ["fc.weight"]),
        (["module.conv1.weight", "module.layer1.0.conv1.weight"], ["module.linear.weight"]),
        (["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"], ["head.weight"]),
        (["blocks.0.mlp.fc2.weight"], ["head.weight", "head_dist.weight"]),
        (["stages.0.conv.weight", "head.pre_logits.fc.weight"], ["head.fc.weight"]),
        (["stages.0.linear.weight"], ["head.linear.weight", "head_dist.linear.weight"]),
        (["features.0.weight"], ["classifier.1.weight"]),
        (
            ["features.0.weight", "classifier.0.weight", "classifier.3.weight"],
            ["classifier.6.weight"],
        ),
        (["features.0.weight", "classifier.2.weight"], ["classifier.10.weight"]),
        (["encoder.layers.0.mlp.0.weight", "heads.pre_logits.weight"], ["heads.head.weight"]),
        (["backbone.conv1.weight", "classifier.0.convs.4.0.weight"], ["classifier.4.weight"]),
        (["backbone.conv1.weight"], ["classifier.4.weight", "aux_classifier.4.weight"]),
        (["classifier.cbr.0.weight"], ["classifier.low_classifier.weight"]),
        (["bert.pooler.dense.weight"], ["classifier.weight"]),
        (["cls.predictions.transform.dense.weight"], ["cls.predictions.decoder.weight"]),
        (["lm_head.dense.weight"], ["lm_head.decoder.weight"]),
        (["roberta.encoder.layer.0.output.dense.weight", "lm_head.dense.weight"], []),
        (["classifier.dense.weight"], ["classifier.out_proj.weight"]),
        (["classification_head.dense.weight"], ["classification_head.out_proj.weight"]),
        (["model.layers.0.mlp.up_proj.weight"], ["lm_head.weight"]),
        (["model.layers.0.mlp.up_proj.weight"], ["score.weight"]),
        (["layers.0.feed_forward.w1.weight", "layers.0.attention.wo.weight"], ["output.weight"]),
        (["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"], ["embed_out.weight"]),
        (["model.decoder.layers.0.fc1.weight"], ["proj_out.weight"]),
        (["linear.weight", "output.weight"], ["lm_head.weight"]),
        (["decode_head.linear_fuse.weight"], ["decode_head.classifier.weight"]),
        (["roi_heads.box_head.fc6.weight"], ["roi_heads.box_predictor.cls_score.weight"]),
        (["model._orig_mod.conv.weight"], ["model._orig_mod.fc.weight"]),
        (["layer1.0.conv1.weight", "layer3.1.conv2.weight"], []),
    ],
)
def test_output_heads(inner: list[str], expected: list[str]) -> None:
    assert heads([*inner, *expected]) == set(expected)
    assert heads([*reversed(expected), *reversed(inner)]) == set(expected)


def test_a_head_may_be_a_convolution() -> None:
    shapes = {"features.0.weight": (64, 3, 3, 3), "classifier.1.weight": (1000, 512, 1, 1)}
    assert chosen(shapes) == {"features.0.weight": "matrix"}


def test_biases_and_norms_are_no_heads() -> None:
    shapes = {"fc.bias": (10,), "head.norm.weight": (8,), "conv.weight": (8, 3)}
    assert not output_heads(infos_of(shapes).values())


# Experts.


@pytest.mark.parametrize(
    ("name", "shape", "config", "expected"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128), None, True),
        ("layers.0.feed_forward.experts.down_proj", (4, 64, 128), None, True),
        ("moe_experts.w1", (4, 64, 128), None, True),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 64, 8), None, False),
        ("layers.0.block_sparse_moe.in.weight", (4, 64, 8), {"num_local_experts": 4}, True),
        ("layers.0.block_sparse_moe.in.weight", (4, 64, 8), {"num_local_experts": 8}, False),
        ("layers.0.moe.w", (4, 64, 8), {"text_config": {"num_experts": 4}}, True),
        ("layers.0.conv1d.weight", (4, 64, 8), {"num_experts": 4}, False),
        ("model.layers.0.mlp.experts.0.w1.weight", (64, 128), None, False),
        ("experts.0.conv.weight", (64, 128, 3), None, False),
        ("position_embedding", (4, 64, 8), None, False),
    ],
)
def test_stacks_of_experts(
    name: str, shape: tuple[int, ...], config: dict[str, object] | None, expected: bool
) -> None:
    info = TensorInfo(name, torch.float32, shape, "x")
    assert is_expert_stack(info, config) is expected


def test_views_may_be_asked_for() -> None:
    shapes = {"a.experts.w": (4, 6, 8), "b.conv.weight": (4, 6, 8), "b.linear.weight": (4, 6)}
    assert chosen(shapes) == dict(zip(shapes, ("batch", "matrix", "matrix"), strict=True))
    assert chosen(shapes, views=(("b.*", "batch"), ("a*", "matrix"))) == dict(
        zip(shapes, ("matrix", "batch", "matrix"), strict=True)
    )
    assert chosen(shapes, views=(("*", "batch"), ("*conv*", "matrix")))["b.conv.weight"] == "matrix"


def test_a_stack_of_rows_is_no_stack_of_matrices() -> None:
    infos = infos_of({"mlp.experts.w": (4, 1, 8)})
    assert select(infos, Selection())[1][0].reason == "one side of the matrix is 1"


def test_a_view_that_fits_nothing_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"view b=batch matches no tensor of three dimensions, exp"
    ):
        select(infos_of({"a": (2, 3, 4), "b": (2, 3)}), Selection(views=(("b", "batch"),)))


# Patterns.

SHAPES: Shapes = {"embed_tokens.weight": (9, 4), "l.0.q.weight": (4, 4), "l.1.q.weight": (4, 4)}


def test_include_restricts_and_brings_in() -> None:
    assert set(chosen(SHAPES, include=("l.0.*", "embed*"))) == {
        "embed_tokens.weight",
        "l.0.q.weight",
    }
    _, whole = select(infos_of(SHAPES), Selection(include=("l.0.*",)))
    assert {left.name: left.reason for left in whole} == {
        "embed_tokens.weight": "not matched by --include",
        "l.1.q.weight": "not matched by --include",
    }


def test_exclude_goes_before_include() -> None:
    _, whole = select(infos_of(SHAPES), Selection(include=("l.*",), exclude=("*.1.*",)))
    assert whole[1].reason == "excluded by --exclude *.1.*"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_close_ones(option: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"pattern 'q' matches none of 3 tensors, expected names such as l.0.q.weight",
    ):
        chosen(SHAPES, **{option: ("q",)})


def test_close_names_are_found_by_likeness() -> None:
    with pytest.raises(UsageError, match=r"expected names such as embed_tokens\.weight"):
        check_patterns(["embd_tokens.wieght"], SHAPES)
    with pytest.raises(UsageError, match=r"expected names such as embed_tokens\.weight, l\.0"):
        check_patterns(["0000"], SHAPES)


def test_patterns_are_for_whole_names_and_case_counts() -> None:
    assert matches("a.b.weight", ["b.*", "A.*", "*.weight"]) == "*.weight"
    assert matches("a.b.weight", ["weight"]) is None


NAME = st.text(st.sampled_from("abc.0weightfcheadexperts_"), min_size=1, max_size=20)


@given(
    st.dictionaries(NAME, st.lists(st.integers(0, 4), max_size=4).map(tuple), max_size=8),
    st.sampled_from([torch.float32, torch.float8_e4m3fn, torch.int8, torch.complex64]),
)
def test_every_tensor_is_chosen_or_has_a_reason(shapes: Shapes, dtype: torch.dtype) -> None:
    layers, whole = select(infos_of(shapes, dtype), Selection())
    assert sorted([layer.name for layer in layers] + [left.name for left in whole]) == sorted(
        shapes
    )
    assert all(left.reason for left in whole)
    order = list(shapes)
    assert [one.name for one in layers] == sorted((one.name for one in layers), key=order.index)
    assert all(min(shapes[layer.name]) > 0 and len(shapes[layer.name]) > 1 for layer in layers)


def test_the_tiny_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_checkpoint()) as checkpoint:
        layers, whole = select(checkpoint.infos, Selection())
    assert {layer.name for layer in layers} == {
        "conv.weight",
        "conv1d.weight",
        "linear.weight",
        "half.weight",
        "brain.weight",
    }
    reasons = {left.name: left.reason for left in whole}
    assert reasons["lm_head.weight"] == "output head"
    assert reasons["embed_tokens.weight"] == "token embedding"
    assert reasons["empty"] == "empty"
    assert reasons["norm.num_batches_tracked"] == "not floating point"


REAL = {
    "resnet56-4bfd9763.th": (55, {"module.linear.weight": "output head"}),
    "squeezenet1_1_fp16.safetensors": (25, {"classifier.1.weight": "output head"}),
    "mobilenet_v2_035_features.safetensors": (52, {}),
    "resnet18_to_layer3.safetensors": (15, {}),
    "stories260K": (35, {"model.embed_tokens.weight": "token embedding"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(data: Path, name: str) -> None:
    with open_checkpoint(data / "checkpoints" / name) as checkpoint:
        infos = checkpoint.infos
        layers, whole = select(infos, Selection(), config=checkpoint.config)
    count, left = REAL[name]
    assert len(layers) == count
    assert {one.name: one.reason for one in whole if len(infos[one.name].shape) > 1} == left


def test_a_role_is_told_for_a_single_tensor() -> None:
    assert table_role(TensorInfo("wte.weight", torch.float32, (9, 4), "x")) == "token embedding"
    assert table_role(TensorInfo("conv.weight", torch.float32, (9, 4), "x")) is None
