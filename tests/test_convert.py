"""``svftool convert``: layouts, ranks and forms, each with its exact error."""

from __future__ import annotations

import json
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
    changes_in,
    comfy,
    diffusers,
    kohya,
    pairs,
    read,
    save,
)
from documents import faults
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from svftool.adapters.writers import LAYOUTS
from svftool.cli import app
from svftool.errors import CheckpointError, FactorsError, NumericalError, UsageError
from svftool.factors import open_factors, read_tuned
from svftool.report import convert as report
from svftool.stages.convert import ConvertResult, convert
from svftool.stages.decompose import decompose
from svftool.stages.extract_lora import LoraOptions, extract_lora
from svftool.stages.info import info

STATES: dict[str, Callable[[], State]] = {"kohya": kohya, "comfy": comfy, "diffusers": diffusers}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", base_state())


def run(source: Path, output: Path, **options: Any) -> ConvertResult:
    found = convert(source, output=output, **options)
    assert not faults(report.document(found))
    return found


def place(folder: Path, layout: str) -> Path:
    return folder / ("out" if layout == "peft" else "out.safetensors")


def words(state: State) -> State:
    """Return changes by module, without what layouts put before or between the parts of a name."""
    prefixes = ("base_model.model.", "diffusion_model.", "unet.", "transformer.", "lora_unet_")
    found = {}
    for module, value in state.items():
        for prefix in prefixes:
            module = module.removeprefix(prefix)
        found[module.removesuffix(".weight").replace(".", "_")] = value
    return found


def peft_folder(folder: Path, rank: int = 4, alpha: int = 2, **config: Any) -> Path:
    folder.mkdir()
    state = {}
    for name, (up, down) in pairs(rank).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save(folder / "adapter_model.safetensors", state, {"format": "pt"})
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM"}
    stated |= {"target_modules": [name.removesuffix(".weight") for name in pairs()], **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def made(folder: Path, layout: str) -> Path:
    if layout == "peft":
        return peft_folder(folder / "in")
    return save(folder / "in.safetensors", STATES[layout]())


def scale(layout: str) -> float:
    return 0.5 if layout in ("kohya", "peft") else 1.0


# From every layout to every other: the same change.


@pytest.mark.parametrize("before", ["peft", "kohya", "comfy", "diffusers"])
@pytest.mark.parametrize("after", sorted(LAYOUTS))
def test_every_layout_to_every_other(tmp_path: Path, base: Path, before: str, after: str) -> None:
    source, output = made(tmp_path, before), place(tmp_path, after)
    found = run(source, output, layout=after, base=base)
    assert (found.source, found.layout, found.error) == (before, after, 0.0)
    expected, got = words(changes(scale(before))), words(changes_in(output))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.reshape(got[name].shape), rtol=1e-12, atol=0)
    assert info(output).facts["layout"] == after


@pytest.mark.parametrize("before", ["peft", "comfy", "diffusers"])
@pytest.mark.parametrize("after", sorted(LAYOUTS))
def test_names_with_dots_need_no_base(tmp_path: Path, before: str, after: str) -> None:
    run(made(tmp_path, before), place(tmp_path, after), layout=after)
    got = words(changes_in(place(tmp_path, after)))
    for name, value in words(changes(scale(before))).items():
        torch.testing.assert_close(got[name], value.reshape(got[name].shape), rtol=1e-12, atol=0)


@pytest.mark.parametrize("after", ["peft", "comfy", "diffusers"])
def test_words_are_never_guessed(tmp_path: Path, after: str) -> None:
    with pytest.raises(UsageError, match="expected --base"):
        run(made(tmp_path, "kohya"), place(tmp_path, after), layout=after)
    assert not place(tmp_path, after).exists()


def test_a_change_of_layout_and_dtype_alone_keeps_every_number(tmp_path: Path, base: Path) -> None:
    source = save(tmp_path / "in.safetensors", {k: v.half() for k, v in kohya(alpha=4).items()})
    run(source, tmp_path / "out", layout="peft", base=base)
    state = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    up = pairs()["mid_block.to_q.weight"][0].half()
    assert torch.equal(state["base_model.model.mid_block.to_q.lora_B.weight"], up)
    found = run(source, tmp_path / "b.safetensors", dtype="bfloat16")
    assert 1e-4 < found.error < 1e-2
    assert found.dtype == "bfloat16"


# Ranks.


@pytest.mark.parametrize("layout", ["peft", "kohya", "comfy", "diffusers"])
def test_a_resized_adapter_is_the_full_decomposition_of_its_product(
    tmp_path: Path, layout: str
) -> None:
    source, output = made(tmp_path, layout), place(tmp_path, layout)
    found = run(source, output, rank="2")
    got, rest, total = words(changes_in(output)), 0.0, 0.0
    errors = words({row.name: torch.tensor(row.error) for row in found.layers})
    for name, value in words(changes(scale(layout))).items():
        U, S, Vh = torch.linalg.svd(value.flatten(1), full_matrices=False)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        gap = (got[name].flatten(1) - best).norm() / value.norm()
        assert float(gap) < 1e-6
        rest, total = rest + float(S[2:].square().sum()), total + float(S.square().sum())
        assert float(errors[name]) == pytest.approx(float(S[2:].norm() / S.norm()), abs=1e-6)
    assert found.error == pytest.approx((rest / total) ** 0.5, abs=1e-6)
    assert {row.rank for row in found.layers} == {2}


@pytest.mark.parametrize(("rule", "bound"), [("energy:0.9", 0.1**0.5), ("error:0.5", 0.5)])
def test_rules_are_held_by_every_layer(tmp_path: Path, rule: str, bound: float) -> None:
    found = run(made(tmp_path, "kohya"), tmp_path / "out.safetensors", rank=rule)
    assert all(row.error <= bound for row in found.layers)
    assert any(row.rank < 4 for row in found.layers)


def test_a_rank_above_the_adapters_own_changes_nothing(tmp_path: Path) -> None:
    found = run(made(tmp_path, "kohya"), tmp_path / "out.safetensors", rank="64")
    assert found.error == 0.0
    state, old = load_file(tmp_path / "out.safetensors"), kohya()
    assert state.keys() == old.keys()
    assert all(torch.equal(state[key], old[key]) for key in old)


@pytest.mark.parametrize("value", ["zero", "equal", "deficient"])
def test_degenerate_products(tmp_path: Path, value: str) -> None:
    up = {"zero": torch.zeros(6, 4), "equal": torch.eye(6, 4), "deficient": torch.ones(6, 4)}[value]
    down = torch.eye(4, 5) if value == "equal" else torch.ones(4, 5)
    key = "lora_unet_x"
    state = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    found = run(save(tmp_path / "in.safetensors", state), tmp_path / "out.safetensors", rank="3")
    got = changes_in(tmp_path / "out.safetensors")[key]
    full = up.double() @ down.double()
    expected = {"zero": 0.0, "equal": 0.5, "deficient": 0.0}[value]
    assert found.error == pytest.approx(expected, abs=1e-6)
    size = max(float(full.norm()), 1.0)
    assert float((got - full).norm()) / size == pytest.approx(expected, abs=1e-6)


def test_dense_changes_are_truncated_with_their_error(tmp_path: Path, base: Path) -> None:
    torch.manual_seed(0)
    key = "lora_unet_mid_block_to_q"
    parts = {"hada_w1_a": (9, 2), "hada_w1_b": (2, 9), "hada_w2_a": (9, 2), "hada_w2_b": (2, 9)}
    state = {f"{key}.{name}": torch.randn(shape) for name, shape in parts.items()}
    source = save(tmp_path / "in.safetensors", state)
    with pytest.raises(UsageError, match="expected --rank"):
        run(source, tmp_path / "out", layout="peft", base=base)
    full = (state[f"{key}.hada_w1_a"].double() @ state[f"{key}.hada_w1_b"].double()) * (
        state[f"{key}.hada_w2_a"].double() @ state[f"{key}.hada_w2_b"].double()
    )
    S = torch.linalg.svdvals(full)
    for output, options in (
        (tmp_path / "a.safetensors", {}),
        (tmp_path / "b", {"layout": "peft", "base": base}),
    ):
        found = run(source, output, rank="2", **options)
        assert found.error == pytest.approx(float(S[2:].norm() / S.norm()), abs=1e-6)
        (got,) = changes_in(output).values()
        assert float((got - full).norm() / full.norm()) == pytest.approx(found.error, abs=1e-6)
    # Without a rank and in its own layout it is copied as it is.
    run(source, tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == state.keys()


def test_dora_needs_the_weights(tmp_path: Path, base: Path) -> None:
    key = "lora_unet_mid_block_to_q"
    state = {k: v for k, v in kohya().items() if k.startswith(f"{key}.")}
    state[f"{key}.dora_scale"] = torch.rand(9, 1) + 1
    source = save(tmp_path / "in.safetensors", state)
    with pytest.raises(UsageError, match="expected --base"):
        run(source, tmp_path / "out.safetensors", rank="9")
    found = run(source, tmp_path / "out.safetensors", rank="9", base=base)
    W = base_state()["mid_block.to_q.weight"].double()
    moved = W + changes(0.5)["mid_block.to_q.weight"]
    expected = moved * state[f"{key}.dora_scale"].double() / moved.norm(dim=1, keepdim=True) - W
    (got,) = changes_in(tmp_path / "out.safetensors").values()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert found.error < 1e-5


# What is no layer.


def test_differences_go_where_they_can(tmp_path: Path, base: Path) -> None:
    norm, bias = torch.randn(9), torch.randn(9)
    state = comfy() | {"diffusion_model.mid_block.norm.diff": norm}
    state["diffusion_model.mid_block.to_q.diff_b"] = bias
    source = save(tmp_path / "in.safetensors", state)
    run(source, tmp_path / "a.safetensors", rank="2")
    kept = load_file(tmp_path / "a.safetensors")
    assert torch.equal(kept["diffusion_model.mid_block.norm.diff"], norm)
    with pytest.raises(UsageError, match="expected --base"):
        run(source, tmp_path / "b", layout="peft")
    found = run(source, tmp_path / "b", layout="peft", base=base)
    whole = load_file(tmp_path / "b/adapter_model.safetensors")
    assert torch.allclose(
        whole["base_model.model.mid_block.norm.weight"],
        base_state()["mid_block.norm.weight"] + norm,
    )
    assert set(found.whole) == {"mid_block.norm.weight", "mid_block.to_q.bias"}
    dropped = run(source, tmp_path / "c.safetensors", layout="kohya")
    assert {one.name.rpartition("mid_block")[2] for one in dropped.dropped} == {
        ".norm.weight",
        ".to_q.bias",
    }
    lost = float(norm.square().sum() + bias.square().sum())
    total = lost + sum(float(one.square().sum()) for one in changes().values())
    assert dropped.error == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def test_metadata_survive_and_say_what_was_done(tmp_path: Path) -> None:
    known = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_training_comment": "mine"}
    known |= {"ss_tag_frequency": '{"cat": 3}', "sshs_model_hash": "0" * 64}
    source = save(tmp_path / "in.safetensors", kohya(), known)
    run(source, tmp_path / "out.safetensors", rank="2")
    found = read(tmp_path / "out.safetensors")[1]
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2")
    assert found["ss_tag_frequency"] == known["ss_tag_frequency"]
    assert found["ss_training_comment"].startswith("mine; svftool")
    assert "--rank 2" in found["ss_training_comment"]
    assert "sshs_model_hash" not in found


def test_diffusers_settings_follow_the_ranks(tmp_path: Path) -> None:
    stated = {"unet.r": 4, "unet.lora_alpha": 8, "unet.lora_dropout": 0.1}
    source = save(
        tmp_path / "in.safetensors", diffusers(), {"lora_adapter_metadata": json.dumps(stated)}
    )
    run(source, tmp_path / "out.safetensors", rank="2")
    found = json.loads(read(tmp_path / "out.safetensors")[1]["lora_adapter_metadata"])
    assert (found["unet.r"], found["unet.lora_alpha"], found["unet.lora_dropout"]) == (2, 2, 0.1)
    got = changes_in(tmp_path / "out.safetensors")
    S = torch.linalg.svdvals(changes(2.0)["mid_block.to_q.weight"])
    assert float(got["unet.mid_block.to_q"].norm()) == pytest.approx(float(S[:2].norm()), rel=1e-6)


def test_a_resized_peft_folder_keeps_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = peft_folder(tmp_path / "in", use_rslora=True, rank_pattern={}, alpha_pattern={})
    run(source, tmp_path / "out", rank="energy:0.7")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["rank_pattern"]
    for name, value in words(changes_in(tmp_path / "out")).items():
        full = words(changes(2 / 4**0.5))[name]
        assert float((value.reshape(full.shape) - full).norm() / full.norm()) <= 0.3**0.5 + 1e-9


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("rank", [None, "2"])
def test_peft_loads_what_becomes_of_a_kohya_file(tmp_path: Path, rank: str | None) -> None:
    peft = pytest.importorskip("peft")
    model = Net()
    base = save(tmp_path / "b.safetensors", model.state_dict())
    generator = torch.Generator().manual_seed(1)
    state = {}
    for number, (module, shape) in enumerate(
        [("conv", (3, 2, 3, 3)), ("layers_0", (6, 6)), ("layers_1", (4, 6))]
    ):
        key, own, ones = f"lora_unet_{module}", 2 + number % 2, (1,) * (len(shape) - 2)
        up = torch.randn(shape[0], own, *ones, generator=generator)
        down = torch.randn(own, *shape[1:], generator=generator)
        state |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        state[f"{key}.alpha"] = torch.tensor(1.5)
    source = save(tmp_path / "in.safetensors", state)
    run(source, tmp_path / "out", layout="peft", base=base, rank=rank)
    merged = peft.PeftModel.from_pretrained(Net(), tmp_path / "out").merge_and_unload()
    run(source, tmp_path / "same.safetensors", rank=rank)
    expected = changes_in(tmp_path / "same.safetensors")
    for name, W in model.state_dict().items():
        change = expected.get("lora_unet_" + name.removesuffix(".weight").replace(".", "_"))
        total = W if change is None else W.double() + change
        torch.testing.assert_close(
            merged.state_dict()[name].double(), total.double(), rtol=1e-5, atol=1e-5
        )


# Tuned files.


@pytest.fixture
def factors(tmp_path: Path, base: Path) -> Path:
    decompose(base, tmp_path / "factors")
    return tmp_path / "factors"


def tuned_file(path: Path, factors: Path, seed: int = 3) -> Path:
    from svftool.factors import write_tuned

    torch.manual_seed(seed)
    with open_factors(factors) as store:
        S = {
            name: store.read_S(name) * (1 + 0.1 * torch.randn(layer.rank))
            for name, layer in store.layers.items()
        }
        whole = {"mid_block.norm.weight": torch.randn(9)}
        write_tuned(path, store=store, S=S, whole=whole)
    return path


@pytest.mark.parametrize("layout", ["peft", "comfy"])
def test_tuned_to_adapter_and_back_loses_nothing_at_full_rank(
    tmp_path: Path, factors: Path, layout: str
) -> None:
    source = tuned_file(tmp_path / "t.svf.safetensors", factors)
    there = place(tmp_path, layout)
    found = run(source, there, layout=layout, base=factors)
    assert (found.source, found.layout) == ("tuned file", layout)
    assert found.error < 1e-6
    back = run(there, tmp_path / "back.svf.safetensors", base=factors)
    assert (back.source, back.layout) == (layout, "tuned file")
    assert back.error < 1e-5
    before, after = read_tuned(source), read_tuned(tmp_path / "back.svf.safetensors")
    assert before.S.keys() == after.S.keys()
    for name, S in before.S.items():
        torch.testing.assert_close(after.S[name], S, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        after.whole["mid_block.norm.weight"], before.whole["mid_block.norm.weight"]
    )


def test_the_largest_changes_of_singular_values_are_kept(tmp_path: Path, factors: Path) -> None:
    source = tuned_file(tmp_path / "t.svf.safetensors", factors)
    found = run(source, tmp_path / "out.safetensors", layout="comfy", base=factors, rank="3")
    tuned, got = read_tuned(source), words(changes_in(tmp_path / "out.safetensors"))
    with open_factors(factors) as store:
        for row in found.layers:
            delta, f = tuned.delta(row.name), store.read(row.name)
            full = (f.U.double() * delta) @ f.Vh.double()
            S = torch.linalg.svdvals(full)
            name = row.name.removesuffix(".weight").replace(".", "_")
            gap = float((got[name].flatten(1) - full).norm() / full.norm())
            assert gap == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-6)
            assert row.error == pytest.approx(gap, abs=1e-6)


def test_tuned_files_need_their_factors(tmp_path: Path, factors: Path, base: Path) -> None:
    source = tuned_file(tmp_path / "t.svf.safetensors", factors)
    for wrong in (None, base):
        with pytest.raises(UsageError, match="expected the factors"):
            run(source, tmp_path / "out", base=wrong)
    other = save(tmp_path / "other.safetensors", {k: v + 1 for k, v in base_state().items()})
    decompose(other, tmp_path / "f2")
    with pytest.raises(FactorsError, match="was trained on the base"):
        run(source, tmp_path / "out", base=tmp_path / "f2")
    with pytest.raises(UsageError, match="a tuned file already"):
        run(source, tmp_path / "x.svf.safetensors", base=factors)


# Other tools' singular values.


def test_z_files_scale_and_keep_the_nuclear_norm(tmp_path: Path, factors: Path) -> None:
    name = "mid_block.to_q.weight"
    p = torch.randn(9)
    torch.save({name: torch.nn.Parameter(p)}, tmp_path / "learnable_params.pt")
    found = run(tmp_path / "learnable_params.pt", tmp_path / "t.svf.safetensors", base=factors)
    S = read_tuned(tmp_path / "t.svf.safetensors")
    z = torch.sigmoid(p)
    expected = S.S_base[name] * z * S.S_base[name].sum() / (S.S_base[name] * z).sum()
    torch.testing.assert_close(S.S[name], expected)
    assert (found.source, found.error) == ("z file", 0.0)


def test_spectral_shifts_add_and_stop_at_zero(tmp_path: Path, factors: Path) -> None:
    shift = torch.linspace(-100, 1, 9)
    state = {"mid_block.to_q.delta": shift, "mid_block.norm.delta": torch.tensor([0.5])}
    save_file(state, tmp_path / "spectral_shifts.safetensors")
    found = run(
        tmp_path / "spectral_shifts.safetensors", tmp_path / "t.svf.safetensors", base=factors
    )
    tuned, name = read_tuned(tmp_path / "t.svf.safetensors"), "mid_block.to_q.weight"
    torch.testing.assert_close(tuned.S[name], torch.relu(tuned.S_base[name] + shift))
    norm = base_state()["mid_block.norm.weight"]
    torch.testing.assert_close(tuned.whole["mid_block.norm.weight"], norm * (1 + 0.5 / norm.norm()))
    assert found.source == "spectral shifts"


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"learnable_params_module_list.0": torch.ones(9)}, CheckpointError, "vectors by number"),
        ({"mid_block.to_q.weight": torch.ones(8)}, FactorsError, "8 values, expected 9"),
        ({"nowhere.weight": torch.ones(8)}, FactorsError, "not decomposed"),
        ({"mid_block.to_q.weight": torch.full((9,), float("nan"))}, NumericalError, "NaN"),
        ({"mid_block.to_q.weight": torch.ones(9, 9)}, CheckpointError, "no z file"),
    ],
)
def test_bad_shifts(
    tmp_path: Path, factors: Path, state: State, error: type[Exception], words: str
) -> None:
    source = save(tmp_path / "z.safetensors", state)
    with pytest.raises(error, match=words):
        run(source, tmp_path / "t.svf.safetensors", base=factors)
    assert not (tmp_path / "t.svf.safetensors").exists()


# Options and refusals.


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("out.safetensors", {"layout": "peft", "base": True}, "is a folder"),
        ("out", {}, "is a file"),
        ("out.safetensors", {"layout": "nothing"}, "nothing"),
        ("out.safetensors", {"rank": "0"}, "rank '0'"),
        ("out.safetensors", {"dtype": "int8"}, "dtype 'int8'"),
        ("out.svf.safetensors", {"rank": "2", "base": True}, "--rank"),
        ("out.svf.safetensors", {}, "expected the factors"),
        ("base.safetensors", {}, "exists"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, base: Path, output: str, options: dict[str, Any], words: str
) -> None:
    given = {key: base if value is True else value for key, value in options.items()}
    with pytest.raises(UsageError, match=words):
        run(made(tmp_path, "kohya"), tmp_path / output, **given)


def test_unknown_keys_are_refused_by_name(tmp_path: Path) -> None:
    state = kohya() | {"lora_unet_x.strange": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"lora_unet_x\.strange"):
        run(save(tmp_path / "in.safetensors", state), tmp_path / "out.safetensors")


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    state = kohya()
    state["lora_unet_mid_block_to_q.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"lora_unet_mid_block_to_q\.lora_up"):
        run(save(tmp_path / "in.safetensors", state), tmp_path / "out.safetensors", rank="2")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("ending", "value", "dtype"),
    [
        ("mid_block.norm.diff", float("nan"), None),
        ("mid_block.to_q.diff_b", float("inf"), "bfloat16"),
        ("mid_block.norm.diff", 1e6, "float16"),
        ("mid_block.to_q.lora_up.weight", 1e6, "float16"),
    ],
)
def test_nothing_that_is_not_finite_is_written(
    tmp_path: Path, ending: str, value: float, dtype: str | None
) -> None:
    state = comfy() | {
        f"diffusion_model.{ending}": torch.full((9, 4)[: 1 + ("up" in ending)], value)
    }
    with pytest.raises(NumericalError, match=ending.replace(".", r"\.")):
        run(save(tmp_path / "in.safetensors", state), tmp_path / "out.safetensors", dtype=dtype)
    assert not list(tmp_path.glob("*out*"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"mid_block.to_q.weight": torch.ones(7, 7)})
    with pytest.raises(CheckpointError, match="another base"):
        run(made(tmp_path, "kohya"), tmp_path / "out", layout="peft", base=base)


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    source = made(tmp_path, "kohya")
    plan = convert(source, output=tmp_path / "out.safetensors", rank="2", dry_run=True)
    assert not faults(report.document(plan))
    assert not (tmp_path / "out.safetensors").exists()
    done = run(source, tmp_path / "out.safetensors", rank="2")
    assert [row.rank for row in plan.layers] == [row.rank for row in done.layers]


def test_what_extract_writes_is_an_adapter_and_no_tuned_file(tmp_path: Path, base: Path) -> None:
    state = base_state()
    state["mid_block.to_q.weight"] += changes()["mid_block.to_q.weight"].float()
    tuned = save(tmp_path / "tuned.safetensors", state)
    for layout in ("comfy", "diffusers", "kohya"):
        output = tmp_path / f"{layout}.safetensors"
        extract_lora(base, tuned, output=output, options=LoraOptions(rank="4", layout=layout))
        assert info(output).kind == "adapter"
        assert run(output, tmp_path / f"{layout}-2.safetensors", rank="2").source == layout


def test_command(tmp_path: Path) -> None:
    source = made(tmp_path, "kohya")
    args = ["convert", str(source), "-o", str(tmp_path / "o.safetensors"), "--rank", "2"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    assert "of the change (as a norm) is lost" in found.output
    again = CliRunner().invoke(app, [*args, "--json"])
    assert again.exit_code == 2
    document = json.loads(CliRunner().invoke(app, [*args, "--json", "--force"]).stdout)
    assert not faults(document)


def test_shapes_cover_linear_layers_and_convolutions() -> None:
    assert {len(shape) for shape in SHAPES.values()} == {1, 2, 4}
    assert isinstance(base_state()["mid_block.norm.weight"], Tensor)
