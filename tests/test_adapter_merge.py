"""Adapters where tuned files go: merged into a base, and onto live models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    save,
)
from documents import faults
from pictures import write_pictures
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import svftool
from svftool.cli import app
from svftool.errors import (
    CheckpointError,
    FactorsError,
    ModelError,
    NumericalError,
    SvftoolError,
    UsageError,
)
from svftool.factors import open_factors, write_tuned
from svftool.progress import SILENT
from svftool.report import merge as report
from svftool.stages.decompose import decompose
from svftool.stages.merge import merge


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", base_state())


def summed(parts: list[tuple[State, float]], dtype: torch.dtype = torch.float32) -> State:
    """Add weighted changes to the base in float64, rounded once."""
    found = {}
    for name, W in base_state(dtype).items():
        total = W.double()
        for change, weight in parts:
            if name in change:
                total = total + weight * change[name].reshape(W.shape)
        found[name] = total.to(dtype)
    return found


def check(path: Path, expected: State) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("make", "scale"), [(kohya, 0.5), (comfy, 1.0), (diffusers, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_the_sum_rounded_once(
    tmp_path: Path, make: Callable[[], State], scale: float, dtype: torch.dtype
) -> None:
    base = save(tmp_path / "b.safetensors", base_state(dtype))
    adapter = save(tmp_path / "a.safetensors", make())
    found = merge(base, [(adapter, 0.7)], output=tmp_path / "m.safetensors", verify=True)
    assert not faults(report.document(found))
    check(tmp_path / "m.safetensors", summed([(changes(scale), 0.7)], dtype))
    assert {one.name for one in found.layers if one.changed} == set(changes())
    assert found.unchanged == len(SHAPES) - len(changes())


def test_several_adapters_of_any_layout_with_weights(tmp_path: Path, base: Path) -> None:
    one = save(tmp_path / "one.safetensors", kohya())
    two = save(tmp_path / "two.safetensors", diffusers(seed=1))
    merge(base, [f"{one}@0.7", f"{two}@-0.25"], output=tmp_path / "m.safetensors")
    check(
        tmp_path / "m.safetensors",
        summed([(changes(0.5), 0.7), (changes(seed=1), -0.25)]),
    )


def test_weight_zero_keeps_every_byte(tmp_path: Path, base: Path) -> None:
    one = save(tmp_path / "one.safetensors", kohya())
    merge(base, [(one, 0.0)], output=tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", base_state())


def test_adapters_and_tuned_files_mix_over_factors(tmp_path: Path, base: Path) -> None:
    factors, tuned = tmp_path / "factors", tmp_path / "t.svf.safetensors"
    decompose(base, factors)
    with open_factors(factors) as store:
        name = "mid_block.to_q.weight"
        S, f = store.read_S(name) * 1.5, store.read(name)
        write_tuned(tuned, store=store, S={name: S})
        delta = (f.U.double() * (S.double() - f.S.double())) @ f.Vh.double()
    adapter = save(tmp_path / "a.safetensors", kohya())
    merge(factors, [(tuned, 0.5), adapter], output=tmp_path / "m.safetensors", verify=True)
    expected = summed([(changes(0.5), 1.0), ({name: delta}, 0.5)])
    found = load_file(tmp_path / "m.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)


def test_differences_of_norms_and_biases_are_merged(tmp_path: Path, base: Path) -> None:
    norm, bias = torch.randn(9), torch.randn(9)
    state = {"diffusion_model.mid_block.norm.diff": norm}
    state["diffusion_model.mid_block.to_q.diff_b"] = bias
    merge(base, [save(tmp_path / "a.safetensors", state)], output=tmp_path / "m.safetensors")
    both = {"mid_block.norm.weight": norm.double(), "mid_block.to_q.bias": bias.double()}
    check(tmp_path / "m.safetensors", summed([(both, 1.0)]))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.fc(self.emb(ids)))
        return out


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["head"]}]
)
def test_equal_to_what_peft_merges(tmp_path: Path, settings: dict[str, object]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Tiny()
    base = save(tmp_path / "b.safetensors", model.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["emb", "fc", "conv"], **settings)
    live = peft.get_peft_model(model, config)
    for name, parameter in live.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    live.save_pretrained(tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], output=tmp_path / "m.safetensors", verify=True)
    expected, found = live.merge_and_unload().state_dict(), load_file(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# Embeddings that are the output head too.

IDS = torch.arange(12)[None]


class Said:
    """Keeps what a stage tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.note, self.warn = self.notes.append, self.warnings.append
        self.task = SILENT.task


def tied(folder: Path, **settings: Any) -> tuple[Path, Path, Any, Any]:
    """Write a tied model and PEFT's adapter of it; return them with what PEFT's model gives."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(llama(folder / "base"), peft.LoraConfig(r=2, **settings))
        for name, parameter in live.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
        live.save_pretrained(folder / "adapter")
        unmerged = live(IDS).logits.detach()
        merged = live.merge_and_unload()(IDS).logits.detach()
    return folder / "base", folder / "adapter", unmerged, merged


def llama(path: Path) -> Any:
    return pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(path).eval()


def test_a_head_keeps_its_values_where_the_table_that_it_was_tied_to_is_replaced(
    tmp_path: Path,
) -> None:
    base, own, unmerged, merged = tied(
        tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    torch.testing.assert_close(unmerged, merged)
    said = Said()
    result = merge(base, [own], output=tmp_path / "out", verify=True, progress=said)
    assert result.added == ("lm_head.weight",)
    assert "lm_head.weight, which was tied to it, is not" in said.notes[0]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    torch.testing.assert_close(llama(tmp_path / "out")(IDS).logits, merged)
    live = llama(base)
    svftool.load_tuned(live, own)
    torch.testing.assert_close(live(IDS).logits, merged)
    for words in (["inspect", str(base), str(own)], ["extract", str(base), str(own), "-o"]):
        words += [] if words[0] == "inspect" else [str(tmp_path / "x"), "--as", "lora"]
        assert "Merge the adapter with 'svftool merge" in CliRunner().invoke(app, words).stderr


def test_an_adapter_of_a_table_that_is_the_head_too_warns(tmp_path: Path) -> None:
    base, own, unmerged, merged = tied(tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert not torch.allclose(unmerged, merged, atol=1e-3)
    said = Said()
    merge(base, [own], output=tmp_path / "out", progress=said)
    assert [one for one in said.warnings if "is the output head too" in one] == said.warnings
    assert len(said.warnings) == 1
    torch.testing.assert_close(llama(tmp_path / "out")(IDS).logits, merged, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_table_as_the_head_of_a_tied_model_is_not_said_to_be_left_out(
    tmp_path: Path,
) -> None:
    base, own, _, merged = tied(
        tmp_path,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    said = Said()
    result = merge(base, [own], output=tmp_path / "out", progress=said)
    assert (result.added, result.dropped, said.warnings) == ((), {}, [])
    torch.testing.assert_close(llama(tmp_path / "out")(IDS).logits, merged)
    file = own / "adapter_model.safetensors"
    head = "base_model.model.lm_head.weight"
    save(file, {**load_file(file), head: load_file(file)[head] + 1})
    assert head in merge(base, [own], output=tmp_path / "other", progress=said).dropped
    assert len(said.warnings) == 1


@pytest.mark.parametrize(
    "facts",
    [{"architectures": ["LlamaForSequenceClassification"]}, {"tie_word_embeddings": False}],
)
def test_a_table_that_is_no_head_is_replaced_without_a_word(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    base, own, _, _ = tied(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **facts}))
    said = Said()
    assert merge(base, [own], output=tmp_path / "out", progress=said).added == ()
    assert said.notes == said.warnings == []


# What does not go together.


def test_parts_without_place_are_named(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = kohya() | {
        "lora_te_fc.lora_up.weight": torch.ones(3, 1),
        "lora_te_fc.lora_down.weight": torch.ones(1, 2),
    }
    adapter = save(tmp_path / "a.safetensors", state)
    args = ["merge", str(base), str(adapter), "-o", str(tmp_path / "m.safetensors"), "--json"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert not faults(document)
    assert document["dropped"] == [{"name": "lora_te_fc", "bytes": 20}]
    assert "lora_te_fc" in found.stderr


@pytest.mark.parametrize(
    ("state", "output", "options", "error", "words"),
    [
        (kohya(), "m.svf.safetensors", {}, UsageError, "is an adapter"),
        (kohya(), "m.safetensors", {"without_base": True}, UsageError, "expected factors"),
        (kohya() | {"lora_unet_x.odd": torch.ones(1)}, "m.safetensors", {}, CheckpointError, "odd"),
        (
            {"lora_unet_a.lora_up.weight": torch.ones(2, 1)}, "m.safetensors", {},
            CheckpointError, "no lora_down",
        ),
        (
            {k: v * torch.inf for k, v in kohya().items() if "alpha" not in k}, "m.safetensors",
            {}, NumericalError, "NaN or infinity",
        ),
        (
            {k: v[..., :5] if "lora_down" in k else v for k, v in kohya().items() if "to_q" in k},
            "m.safetensors", {}, CheckpointError, "another base",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, base: Path, state: State, output: str,
    options: dict[str, bool], error: type[SvftoolError], words: str,
) -> None:  # fmt: skip
    adapter = save(tmp_path / "a.safetensors", state)
    with pytest.raises(error, match=words) as caught:
        merge(base, [adapter], output=tmp_path / output, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / output).exists()


def test_a_base_without_factors_takes_adapters_alone(tmp_path: Path, base: Path) -> None:
    for inputs in ([], [save(tmp_path / "x.svf.safetensors", kohya())]):
        with pytest.raises(FactorsError, match="decompose"):
            merge(base, inputs[:0], output=tmp_path / "m.safetensors")
        code = CliRunner().invoke(
            app, ["merge", str(base), *map(str, inputs), "-o", str(tmp_path / "m.safetensors")]
        )
        assert code.exit_code == 4


def test_overflow_of_a_narrow_dtype_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", base_state(torch.float16))
    adapter = save(tmp_path / "a.safetensors", kohya())
    with pytest.raises(NumericalError, match="overflow"):
        merge(base, [(adapter, 1e6)], output=tmp_path / "m.safetensors")
    found = merge(base, [(adapter, 1e6)], output=tmp_path / "m.safetensors", allow_overflow=True)
    assert found.clipped


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.mark.parametrize("form", ["checkpoint", "factors"])
def test_evaluate_and_predict_put_an_adapter_on_the_model(tmp_path: Path, form: str) -> None:
    (tmp_path / "net.py").write_text(NET)
    write_pictures(tmp_path / "data", count=3)
    scope: dict[str, Any] = {}
    exec(compile(NET, "net.py", "exec"), scope)
    base = save(tmp_path / "b.safetensors", scope["net"]().state_dict())
    state = {"lora_unet_fc.lora_up.weight": torch.randn(3, 2)}
    state |= {"lora_unet_fc.lora_down.weight": torch.randn(2, 8)}
    state |= {"lora_unet_conv.lora_up.weight": torch.randn(8, 2, 1, 1)}
    state |= {"lora_unet_conv.lora_down.weight": torch.randn(2, 3, 3, 3)}
    adapter = save(tmp_path / "a.safetensors", state)
    merge(base, [adapter], output=tmp_path / "m.safetensors")
    if form == "factors":
        decompose(base, tmp_path / "factors")
    start = base if form == "checkpoint" else tmp_path / "factors"
    given = {"model": f"{tmp_path}/net.py:net", "image_size": 8}
    whole = {**given, "data": tmp_path / "data"}
    one = svftool.evaluate(start, tuned=adapter, **whole)
    two = svftool.evaluate(tmp_path / "m.safetensors", **whole)
    bare = svftool.evaluate(base, **whole)
    assert one.tuned == adapter
    assert one.runs[0].metrics == two.runs[0].metrics != bare.runs[0].metrics
    classes = {"classes": ["a", "b", "c"], "task": "classification"}
    rows = [
        svftool.predict(path, tmp_path / "data", tuned=tuned, **given, **classes).rows
        for path, tuned in ((start, adapter), (tmp_path / "m.safetensors", None))
    ]
    assert rows[0] == rows[1]


# Live models.


def live() -> nn.Module:
    model = nn.ModuleDict(
        {
            "down_blocks": nn.ModuleList([nn.ModuleDict({
                "attn": nn.ModuleDict({
                    "to_q": nn.Linear(10, 12, bias=False),
                    "to_out": nn.ModuleList([nn.Linear(12, 10, bias=False)]),
                }),
                "conv": nn.Conv2d(6, 8, 3, bias=False),
            })]),
            "mid_block": nn.ModuleDict({
                "proj_in": nn.Conv2d(7, 9, 1, bias=False),
                "norm": nn.LayerNorm(9, bias=False),
                "to_q": nn.Linear(9, 9),
            }),
        }
    )  # fmt: skip
    model.load_state_dict(base_state())
    return model


def test_a_live_model_gets_what_a_merge_writes(tmp_path: Path, base: Path) -> None:
    one = save(tmp_path / "one.safetensors", kohya())
    two = save(tmp_path / "two.safetensors", comfy(seed=1))
    merge(base, [(one, 0.7), two], output=tmp_path / "m.safetensors")
    model = live()
    svftool.load_tuned(model, {one: 0.7, two: 1.0})
    for name, value in load_file(tmp_path / "m.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_next_adapter_takes_the_place_of_the_last(tmp_path: Path) -> None:
    one = save(tmp_path / "one.safetensors", kohya())
    part = {k: v for k, v in comfy(seed=1).items() if "mid_block" in k}
    two = save(tmp_path / "two.safetensors", part)
    model = live()
    svftool.load_tuned(model, one)
    svftool.load_tuned(model, two)
    fresh = live()
    svftool.load_tuned(fresh, two)
    for name, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_live_model_is_not_changed_by_what_does_not_fit(tmp_path: Path) -> None:
    state = kohya()
    state["lora_unet_mid_block_to_q.lora_down.weight"] = torch.ones(4, 5)
    model = live()
    with pytest.raises(CheckpointError, match="another base"):
        svftool.load_tuned(model, save(tmp_path / "a.safetensors", state))
    extra = kohya() | {
        "lora_te_fc.lora_up.weight": torch.ones(3, 1),
        "lora_te_fc.lora_down.weight": torch.ones(1, 2),
    }
    with pytest.raises(CheckpointError, match="no place in the model"):
        svftool.load_tuned(model, save(tmp_path / "e.safetensors", extra))
    for name, value in base_state().items():
        assert torch.equal(model.state_dict()[name], value)


def test_adapters_need_a_plain_model(tmp_path: Path, base: Path) -> None:
    decompose(base, tmp_path / "factors")
    model = live()
    svftool.attach(model, tmp_path / "factors")
    with pytest.raises(ModelError, match="Call detach first"):
        svftool.load_tuned(model, save(tmp_path / "a.safetensors", kohya()))
