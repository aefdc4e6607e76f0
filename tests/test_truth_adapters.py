"""Adapters are read as PEFT merges them, or refused in one line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool import extract
from svftool.adapters.peft import open_lora
from svftool.adapters.peft_config import ends_with
from svftool.auditing import counterparts, open_source
from svftool.cli import app
from svftool.errors import CheckpointError
from svftool.progress import SILENT

PREFIX = "base_model.model."
MODULE = "h.0.c_proj"


def adapter(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> tuple[Path, Path]:
    """Write a base and an adapter of one square layer; return both paths."""
    folder.mkdir(exist_ok=True)
    base = folder / "base.safetensors"
    save_file({f"{MODULE}.weight": torch.randn(6, 6), "wte.weight": torch.randn(9, 6)}, base)
    own = folder / "adapter"
    own.mkdir()
    pair = {
        f"{MODULE}.lora_A.weight": torch.randn(2, 6),
        f"{MODULE}.lora_B.weight": torch.ones(6, 2),
    }
    named = {PREFIX + name: value for name, value in {**pair, **(tensors or {})}.items()}
    save_file(named, own / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (own / "adapter_config.json").write_text(json.dumps(known))
    return base, own


def compare(base: Path, own: Path) -> Any:
    with open_source(base) as one, open_source(own) as two:
        return counterparts(one, two, SILENT)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{MODULE}.lora_A.weight": torch.empty(0)},
        {f"{MODULE}.lora_B.weight": torch.empty(0, 2)},
        {"score.weight": torch.empty(0)},
        {f"{MODULE}.lora_A.weight": torch.randn(2)},
        {f"{MODULE}.lora_A.weight": torch.ones(2, 6, dtype=torch.int64)},
        {f"{MODULE}.lora_A.weight": torch.randn(2, 7)},
        {f"{MODULE}.lora_A.weight": torch.randn(3, 6), f"{MODULE}.lora_B.weight": torch.ones(6, 3)},
        {f"{MODULE}.lora_magnitude_vector": torch.ones(5)},
        {"wte.token_adapter.trainable_tokens_delta": torch.randn(2, 6)},
        {"wte.token_adapter.base_layer.weight": torch.randn(2, 6)},
    ],
)
def test_shapes_are_checked_before_use(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    base, own = adapter(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        compare(base, own)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        extract(base, own, output=tmp_path / "x.svf.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": 5}, {"peft_type": []}, {"r": "4"}, {"r": 0}, {"r": [2]}, {"r": 4},
        {"lora_alpha": None}, {"lora_alpha": "x"}, {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400}, {"alpha_pattern": []}, {"alpha_pattern": {"a": "b"}},
        {"rank_pattern": 3}, {"use_rslora": "yes"}, {"use_dora": []}, {"target_parameters": 7},
        {"target_parameters": [1]}, {"modules_to_save": 2}, {"fan_in_fan_out": {}},
        {"trainable_token_indices": [1.5]}, {"trainable_token_indices": {"wte": [True]}},
        {"trainable_token_indices": [1, 1]}, {"init_lora_weights": []}, {"bias": 3},
        {"base_model_name_or_path": {}}, {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"(?=a)": 1}}, {"layer_replication": [[0, 1], [0, 1]]},
        {"alora_invocation_tokens": [1]}, {"use_qalora": True}, {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 1}}, {"kasa_config": {"beta": 1}},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    ],
)  # fmt: skip
def test_configurations_that_are_not_understood_are_refused(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base, own = adapter(tmp_path, **config)
    with pytest.raises(CheckpointError) as caught:
        compare(base, own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "null", '"a"', "{", "\xff"])
def test_configurations_that_are_no_objects_are_refused(tmp_path: Path, text: str) -> None:
    base, own = adapter(tmp_path)
    (own / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="expected"):
        compare(base, own)


def test_settings_that_nothing_knows_are_named(tmp_path: Path) -> None:
    _, own = adapter(tmp_path, use_telepathy=True, quiet=None)
    with open_lora(own) as lora:
        assert any("use_telepathy" in note and "quiet" not in note for note in lora.notes)


def test_a_pattern_that_goes_back_and_forth_is_no_hang(tmp_path: Path) -> None:
    name = "a" * 60
    _, own = adapter(tmp_path, alpha_pattern={"(a|a)*b": 3, "((x*)*)*y": 5, r"h\.\d+\..*": 8})
    with open_lora(own) as lora:
        assert lora.layers[f"{MODULE}.weight"].scaling == 4.0
    assert not ends_with("(a|a)*b", name)


def test_patterns_match_as_re_does() -> None:
    chosen = random.Random(0)
    atoms = ["a", "b", "ab", "[ab]", "[^a]", ".", r"\.", r"\d", "(a|b)", "(ab|a)", r"\w", "[0-9]"]
    ends = ["", "", "", "*", "+", "?", "{1,2}", "{2}", "*?"]
    for _ in range(2000):
        pattern = "".join(
            chosen.choice(atoms) + chosen.choice(ends) for _ in range(chosen.randint(1, 4))
        )
        text = "".join(chosen.choice("ab.0") for _ in range(chosen.randint(0, 8)))
        expected = re.match(rf"(.*\.)?({pattern})$", text) is not None
        assert ends_with(pattern, text) == expected, (pattern, text)


@pytest.mark.parametrize("given", [[3, 7], {"wte": [3, 7]}])
def test_trained_token_rows_replace_rows(tmp_path: Path, given: Any) -> None:
    rows = torch.randn(2, 6)
    base, own = adapter(
        tmp_path,
        {"wte.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices=given,
    )
    before = torch.randn(9, 6)
    with open_source(base) as one, open_source(own) as two:
        side = counterparts(one, two, SILENT)
        found = side.read("wte.weight", before)
        assert not side.tuned_only
    assert found is not None
    assert found.weight is not None
    expected = before.clone()
    expected[[3, 7]] = rows
    assert torch.equal(found.weight, expected)
    result = extract(base, own, output=tmp_path / "x.svf.safetensors")
    assert result.whole == ("wte.weight",)


def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    rows = {"wte.token_adapter.trainable_tokens_delta": torch.randn(1, 6)}
    base, own = adapter(tmp_path, rows, trainable_token_indices=[9])
    with pytest.raises(CheckpointError, match="token 9"):
        compare(base, own)


@pytest.mark.parametrize("turned", [False, True])
def test_dora_takes_the_norms_of_the_outputs(tmp_path: Path, turned: bool) -> None:
    magnitudes = torch.rand(6) + 0.5
    _, own = adapter(
        tmp_path,
        {f"{MODULE}.lora_magnitude_vector": magnitudes},
        use_dora=True,
        fan_in_fan_out=turned,
    )
    weight = torch.randn(6, 6)
    with open_lora(own) as lora:
        merged = weight.double() + lora.change(f"{MODULE}.weight", weight)
    norms = merged.norm(dim=0 if turned else 1)
    torch.testing.assert_close(norms, magnitudes.double())


@pytest.mark.parametrize("kind", ["Conv1D", "embedding", "Conv2d"])
def test_dora_agrees_with_pefts_merge(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layers = {"Conv1D": Conv1D(6, 6), "embedding": torch.nn.Embedding(9, 6)}
    layers["Conv2d"] = torch.nn.Conv2d(4, 6, 3)
    model = torch.nn.Sequential(layers[kind])
    before = model[0].weight.detach().clone()
    options = {"fan_in_fan_out": kind == "Conv1D", "use_dora": True, "target_modules": ["0"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **options))
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data += 0.3 * torch.rand_like(value)
    wrapped.save_pretrained(tmp_path)
    after = wrapped.merge_and_unload()[0].weight.detach()
    with open_lora(tmp_path) as lora:
        found = before.double() + lora.change("0.weight", before)
    torch.testing.assert_close(found, after.double(), rtol=1e-5, atol=1e-5)


def test_what_is_part_of_nothing_is_not_written_as_a_tensor(tmp_path: Path) -> None:
    base, own = adapter(
        tmp_path,
        {f"{MODULE}.lora_A.default.weight": torch.ones(2, 6), "score.weight": torch.ones(2, 6)},
        modules_to_save=["score"],
    )
    side = compare(base, own)
    reasons = {one.name: one.reason for one in side.tuned_only}
    assert reasons == {
        f"{PREFIX}{MODULE}.lora_A.default.weight": "part of no LoRA layer",
        "score.weight": "not in the base",
    }


# Adapters whose merge changes more than the layer that they are named after.


def head_adapter(folder: Path, head: str, *, in_file: bool, tied: bool | None) -> tuple[Path, Path]:
    """Write a language model of one embedding and one layer, and an adapter of its head."""
    base, own = folder / "base", folder / "adapter"
    base.mkdir()
    own.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(12, 6), "q_proj.weight": torch.randn(6, 6)}
    if in_file:
        tensors[f"{head}.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors")
    config = {} if tied is None else {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    pairs = {}
    for name, rows in ((head, 12), ("q_proj", 6)):
        pairs[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(2, 6)
        pairs[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(pairs, own / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [head, "q_proj"]}
    (own / "adapter_config.json").write_text(json.dumps(facts))
    return base, own


@pytest.mark.parametrize(
    ("in_file", "tied"), [(False, None), (False, True), (False, False), (True, True)]
)
@pytest.mark.parametrize("head", ["lm_head", "embed_out"])
def test_an_adapter_of_a_tied_head_is_refused(
    head: str, in_file: bool, tied: bool | None, tmp_path: Path
) -> None:
    base, own = head_adapter(tmp_path, head, in_file=in_file, tied=tied)
    with pytest.raises(CheckpointError, match="output head that is tied to the embedding"):
        compare(base, own)


def test_an_adapter_of_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    base, own = head_adapter(tmp_path, "lm_head", in_file=True, tied=False)
    assert set(compare(base, own).changes) == {"lm_head.weight", "q_proj.weight"}


@pytest.mark.parametrize("adapted", ["classifier", "token_type_embeddings"])
def test_the_head_of_a_classifier_is_not_tied(adapted: str, tmp_path: Path) -> None:
    """Its configuration is that of the pre-training, and two classes are two kinds of segments."""
    base, own = head_adapter(tmp_path, "lm_head", in_file=False, tied=True)
    tensors = {
        name: torch.randn(rows, 6)
        for name, rows in (("word_embeddings", 12), ("token_type_embeddings", 2), ("classifier", 2))
    }
    save_file({f"{name}.weight": one for name, one in tensors.items()}, base / "model.safetensors")
    pairs = {
        f"{PREFIX}{adapted}.lora_A.weight": torch.randn(2, 6),
        f"{PREFIX}{adapted}.lora_B.weight": torch.randn(2, 2),
    }
    save_file(pairs, own / "adapter_model.safetensors")
    assert set(compare(base, own).changes) == {f"{adapted}.weight"}


def test_an_adapter_of_attention_with_parts_inside_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"nn\.MultiheadAttention"):
        open_lora(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter/adapter_model.safetensors", r"one file of a PEFT adapter.*Name \S*adapter\.$"),
        ("alone.safetensors", r"a PEFT adapter without adapter_config\.json"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "inspect", "convert", "extract"])
def test_a_file_of_a_peft_folder_is_not_taken_for_weights(
    command: str, file: str, said: str, tmp_path: Path
) -> None:
    base, own = head_adapter(tmp_path, "lm_head", in_file=True, tied=False)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((own / "adapter_model.safetensors").read_bytes())
    words = [command] if command == "convert" else [command, str(base)]
    output = [] if command == "inspect" else ["-o", str(tmp_path / "out.svf.safetensors")]
    found = CliRunner().invoke(app, [*words, str(tmp_path / file), *output])
    assert found.exit_code == 3
    assert re.search(said, found.stderr.strip())
