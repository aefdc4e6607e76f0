"""Names propose a counterpart, values decide; wrappers stand anywhere; the cost is linear."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from svftool.auditing import match_names
from svftool.checkpoints import TensorInfo, open_checkpoint
from svftool.cli import app
from svftool.models.load import load_weights


def tower(seed: int, *, layers: int = 3) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        f"encoder.layer.{i}.{name}.weight": torch.randn(12, 12, generator=chance)
        for i in range(layers)
        for name in ("query", "key", "output")
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def tuned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * 1.01 for name, value in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def compared(folder: Path, base: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    files = write(folder / "base.safetensors", base), write(folder / "tuned.safetensors", other)
    found = run("inspect", *files, "--json", "-q")
    assert found.exit_code == 0, found.output
    one: dict[str, Any] = json.loads(found.stdout)["comparisons"][0]
    return one


def named(one: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["tuned_name"] for row in one["layers"]}


def drifts(one: dict[str, Any]) -> list[float]:
    return [row["weight_drift"] for row in one["layers"]]


ONE, TWO = tower(1), tower(2)
WAYS = {
    "first of two towers": ({**under("q.", ONE), **under("c.", TWO)}, ONE, "q.", ""),
    "second of two towers": ({**under("q.", TWO), **under("c.", ONE)}, ONE, "c.", ""),
    "a tower of another name": (
        {**under("q.", TWO), **under("c.", ONE)}, under("student.", ONE), "c.", "student.",
    ),
    "equal names of another tower": ({**TWO, **under("question.", ONE)}, ONE, "question.", ""),
    "towers that changed places": (
        {**under("a.", ONE), **under("b.", TWO)},
        {**under("a.", TWO), **under("b.", ONE)}, "b.", "a.",
    ),
    "both towers renamed": (
        {**under("a.", ONE), **under("b.", TWO)},
        {**under("x.", TWO), **under("y.", ONE)}, "b.", "x.",
    ),
    "a numbered prefix": (ONE, under("0.auto_model.", ONE), "", "0.auto_model."),
}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_values_decide_between_names_that_fit(kind: str, tmp_path: Path) -> None:
    base, other, mine, theirs = WAYS[kind]
    one = compared(tmp_path, base, tuned(other))
    assert drifts(one) == pytest.approx([0.01] * len(drifts(one)), rel=1e-3)
    for name, found in named(one).items():
        if name.startswith(mine) and found.startswith(theirs) and mine:
            assert found.removeprefix(theirs) == name.removeprefix(mine)
    assert any(name.startswith(mine) for name in named(one))
    assert len(drifts(one)) == len(other)


def test_a_slowly_following_tower_is_told_from_the_one_it_follows(tmp_path: Path) -> None:
    follower = {name: 0.97 * value + 0.03 * TWO[name] for name, value in ONE.items()}
    base = {**under("encoder_k.", follower), **under("encoder_q.", ONE)}
    assert {name[:10] for name in named(compared(tmp_path, base, tuned(ONE)))} == {"encoder_q."}


RENAMED = {
    "in the middle": (".query.", ".attention.q_proj."),
    "the series": ("encoder.layer.", "transformer.h."),
    "a wrapper of one layer": (".key.", ".key.base_layer."),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_differ_inside_are_matched_where_values_agree(kind: str, tmp_path: Path) -> None:
    other = {name.replace(*RENAMED[kind]): value for name, value in tuned(ONE).items()}
    one = compared(tmp_path, ONE, other)
    assert drifts(one) == pytest.approx([0.01] * 9, rel=1e-3)


def test_queries_keys_and_values_of_other_names_find_their_own(tmp_path: Path) -> None:
    words = {"query": "q", "key": "k", "output": "o"}
    other = {}
    for name, value in tuned(ONE).items():
        _, _, number, word, _ = name.split(".")
        other[f"blocks.{number}.attn.{words[word]}.weight"] = value
    one = compared(tmp_path, ONE, other)
    assert drifts(one) == pytest.approx([0.01] * 9, rel=1e-3)


@pytest.mark.parametrize("command", ["inspect", "extract"])
def test_a_tie_is_refused_and_both_are_named(command: str, tmp_path: Path) -> None:
    base = write(tmp_path / "b.safetensors", {**under("q.", ONE), **under("c.", ONE)})
    other = write(tmp_path / "t.safetensors", tuned(ONE))
    more = ("-o", tmp_path / "x.svf.safetensors") if command == "extract" else ()
    found = run(command, base, other, "-q", *more)
    assert found.exit_code == 3
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "'q.'" in lines[0]
    assert "'c.'" in lines[0]
    assert not (tmp_path / "x.svf.safetensors").exists()


def test_other_networks_of_the_same_names_stay_unrelated(tmp_path: Path) -> None:
    one = compared(tmp_path, ONE, TWO)
    assert one["verdict"] == "unrelated"
    assert named(one) == {name: name for name in ONE}


def test_names_alone_decide_where_there_are_no_values() -> None:
    def infos(names: Mapping[str, object]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, torch.float32, (), "") for name in names}

    found = match_names(infos(under("model.", ONE)), infos(ONE))
    assert len(found.pairs) == 9
    both = infos({**under("a.", ONE), **under("b.", ONE)})
    tie = match_names(both, infos(ONE))
    assert not tie.pairs
    assert {one.base for one in tie.ties[0]} == {"a.", "b."}


# Wrappers.


WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "module", "_fsdp_wrapped_module")


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "_fsdp_wrapped_module._checkpoint_wrapped_module"])
@pytest.mark.parametrize("place", ["front", "block", "layer", "all"])
@pytest.mark.parametrize("swapped", [False, True])
def test_wrappers_stand_anywhere(wrapper: str, place: str, swapped: bool, tmp_path: Path) -> None:
    def wrapped(name: str) -> str:
        series, number, rest = name.split(".", 2)
        layer, weight = rest.rsplit(".", 1)
        front = f"{wrapper}." if place in ("front", "all") else ""
        block = f".{wrapper}" if place in ("block", "all") else ""
        inner = f".{wrapper}" if place in ("layer", "all") else ""
        return f"{front}{series}.{number}{block}.{layer}{inner}.{weight}"

    base = {f"layers.{i}.{n}.weight": ONE[f"encoder.layer.{i}.{n}.weight"] for i in range(2)
            for n in ("query", "key")}  # fmt: skip
    other = {wrapped(name): value for name, value in tuned(base).items()}
    one = compared(tmp_path, *((other, base) if swapped else (base, other)))
    assert one["coverage"] == {"compared": 4, "total": 4, "not_compared": []}
    assert drifts(one) == pytest.approx([0.01] * 4, rel=0.02)
    if not swapped:
        out = tmp_path / "x.svf.safetensors"
        files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
        assert run("extract", *files, "-o", out, "-q").exit_code == 0
        assert {name.rsplit(".", 1)[0] for name in load_file(out)} == set(base)


def test_a_module_of_a_wrappers_name_on_both_sides_keeps_it(tmp_path: Path) -> None:
    base = {"module.a.weight": torch.randn(6, 6), "a.weight": torch.randn(6, 6)}
    one = compared(tmp_path, base, tuned(base))
    assert named(one) == {name: name for name in base}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_is_loaded_from_wrapped_blocks(wrapper: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Linear(5, 3))
    state = {name.replace("0.0.", f"0.{wrapper}.0."): v for name, v in model.state_dict().items()}
    fresh = nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Linear(5, 3))
    with open_checkpoint(write(tmp_path / "w.safetensors", state)) as checkpoint:
        load_weights(fresh, checkpoint)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


# Cost.


def test_many_experts_under_another_prefix_take_linear_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted, not timed: names are cut at each dot a fixed number of times."""
    from svftool.auditing.renaming import NameParts

    counts: list[int] = []

    def count(layers: int) -> int:
        base = {
            name: TensorInfo(name, torch.float32, (4, 4), "")
            for name in (
                f"model.layers.{i}.mlp.experts.{e}.w{k}.weight"
                for i in range(layers) for e in range(16) for k in (1, 2, 3)
            )
        }  # fmt: skip
        other = {f"policy.{name}": one for name, one in base.items()}
        counts.append(0)
        found = match_names(base, other)
        assert len(found.pairs) == len(base)
        return counts[-1]

    plain = NameParts.prefix

    def counted(self: Any, end: int, *, literal: bool) -> str:
        counts[-1] += 1
        return plain(self, end, literal=literal)

    monkeypatch.setattr(NameParts, "prefix", counted)
    few, many = count(4), count(16)
    assert many <= 4.5 * few
    assert many <= 10 * 16 * 16 * 3


# Nothing to decompose.


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"a.weight": torch.empty(0), "n.bias": torch.ones(4)},
            "weights without a value (a.weight)",
        ),
        ({"n.weight": torch.ones(4)}, "no layer is decomposed"),
        ({"a.qweight": torch.ones(4, 4, dtype=torch.int32)}, "no layer is decomposed"),
    ],
)
def test_decompose_warns_where_there_is_no_layer(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "c.safetensors", tensors)
    found = run("decompose", file, "-o", tmp_path / "f", "-q")
    assert found.exit_code == 0
    assert "warning:" in found.stderr
    assert words in " ".join(found.stderr.split())


def block(seed: int = 1, layers: int = 3) -> dict[str, Tensor]:
    """Return tensors of a network with norms, biases, heads and matrices of equal shapes."""
    chance = torch.Generator().manual_seed(seed)
    found = {"embeddings.word.weight": torch.randn(20, 12, generator=chance)}
    for i in range(layers):
        for name in ("attn.query", "attn.key", "attn.value", "out"):
            found[f"encoder.layer.{i}.{name}.weight"] = torch.randn(12, 12, generator=chance)
            found[f"encoder.layer.{i}.{name}.bias"] = 0.1 * torch.randn(12, generator=chance)
        found[f"encoder.layer.{i}.LayerNorm.weight"] = 1 + 0.1 * torch.randn(12, generator=chance)
        found[f"encoder.layer.{i}.LayerNorm.bias"] = 0.1 * torch.randn(12, generator=chance)
    return found | {"head.weight": torch.randn(5, 12, generator=chance)}


def renamed(tensors: Mapping[str, Tensor], *changes: tuple[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        for pattern, text in changes:
            name = re.sub(pattern, text, name)
        found[name] = value
    return found


def numbered(change: Any) -> tuple[str, Any]:
    return r"layer\.(\d)", lambda match: f"layer.{change(int(match[1]))}"


NORMS = (r"Norm\.weight$", "Norm.gamma"), (r"Norm\.bias$", "Norm.beta")
ENDS = {
    "gamma and beta": NORMS,
    "gamma under a prefix": (*NORMS, ("^", "bert.")),
    "one letter": ((r"weight$", "w"), (r"bias$", "b")),
    "one letter, under a prefix": ((r"weight$", "w"), (r"bias$", "b"), ("^", "model.")),
    "words that nobody uses": ((r"weight$", "matrix"), (r"bias$", "offset")),
    "norms that nobody names so": ((r"Norm\.weight$", "Norm.q"), (r"Norm\.bias$", "Norm.r")),
    "the wrong way round": ((r"Norm\.weight$", "Norm.beta"), (r"Norm\.bias$", "Norm.gamma")),
    "other numbers": (numbered(lambda i: i + 1),),
    "numbers far off": (numbered(lambda i: i + 10),),
    "layers turned round": (numbered(lambda i: 2 - i),),
    "other numbers, another list": (
        numbered(lambda i: i + 1), (r"encoder\.layer", "blocks"),
    ),
    "a list without its name": ((r"encoder\.layer\.", "encoder."),),
    "queries and keys changed places": (
        ("query", "x"), ("key", "query"), (r"attn\.x", "attn.key"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("kind", ENDS)
def test_other_ends_and_numbers_find_their_own_by_values(
    kind: str, side: str, tmp_path: Path
) -> None:
    plain, other = block(), renamed(block(), *ENDS[kind])
    base, fine = (plain, other) if side == "tuned" else (other, plain)
    one = compared(tmp_path, base, tuned(fine))
    assert drifts(one) == pytest.approx([0.01] * len(plain), rel=1e-3)


MOVED = ["layers turned round", "queries and keys changed places", "other numbers"]


@pytest.mark.parametrize("kind", MOVED)
def test_equal_values_in_other_places_are_not_called_untouched(kind: str, tmp_path: Path) -> None:
    one = compared(tmp_path, block(), renamed(block(), *ENDS[kind]))
    assert one["verdict"] == "undecided"
    assert one["coverage"]["not_compared"]
    turned = renamed(block(), numbered(lambda i: 2 - i), (r"encoder\.layer", "blocks"))
    assert compared(tmp_path, block(), turned)["verdict"] == "undecided"


def test_layers_that_were_cut_out_are_missing_and_the_rest_is_found(tmp_path: Path) -> None:
    kept = {"0": "0", "2": "1", "3": "2"}
    short = {
        re.sub(r"layer\.(\d)", lambda m: f"layer.{kept[m[1]]}", name): value
        for name, value in block(layers=4).items()
        if "layer.1" not in name
    }
    one = compared(tmp_path, block(layers=4), tuned(short))
    assert drifts(one) == pytest.approx([0.01] * len(short), rel=1e-3)
    missing = {row["name"] for row in one["coverage"]["not_compared"]}
    assert {name for name in block(layers=4) if "layer.1." in name} <= missing


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: value for name, value in tensors.items() if "attn" not in name}
    for name in tensors:
        if "query" in name:
            parts = [tensors[name.replace("query", one)] for one in ("query", "key", "value")]
            found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


@pytest.mark.parametrize(
    ("base", "other", "left"),
    [
        (block(), fused(block()), "attn.query"),
        (fused(block()), block(), "attn.qkv"),
        ({**block(), "lm_head.weight": block()["embeddings.word.weight"]}, block(), "lm_head"),
        (block(), {**block(), "lm_head.weight": block()["embeddings.word.weight"]}, "lm_head"),
        (block(), {n: v for n, v in block().items() if "Norm" not in n}, "LayerNorm.weight"),
    ],
)
def test_what_has_no_counterpart_keeps_the_verdict_open(
    base: dict[str, Tensor], other: dict[str, Tensor], left: str, tmp_path: Path
) -> None:
    one = compared(tmp_path, base, other)
    assert one["verdict"] == "undecided"
    assert any(left in row["name"] for row in one["coverage"]["not_compared"])


def test_a_norm_under_another_name_that_changed_is_seen(tmp_path: Path) -> None:
    other = renamed(block(), *NORMS)
    other["encoder.layer.1.LayerNorm.gamma"] = other["encoder.layer.1.LayerNorm.gamma"] * 100
    one = compared(tmp_path, block(), other)
    assert one["verdict"] == "changed"
    assert max(drifts(one)) == pytest.approx(99.0, rel=1e-3)


def test_old_and_new_names_of_weight_norm_are_one(tmp_path: Path) -> None:
    old = renamed(block(), (r"out\.weight$", "out.weight_v"), (r"out\.bias$", "out.weight_g"))
    new = renamed(
        old,
        (r"weight_v$", "parametrizations.weight.original1"),
        (r"weight_g$", "parametrizations.weight.original0"),
    )
    assert drifts(compared(tmp_path, old, tuned(new))) == pytest.approx([0.01] * 32, rel=1e-3)


@pytest.mark.parametrize("prefix", ["", "x.b.", "z."])
def test_an_adapter_that_fits_two_towers_is_refused_with_both(prefix: str, tmp_path: Path) -> None:
    base = write(tmp_path / "b.safetensors", {**under("a.", ONE), **under("b.", TWO)})
    parts = {}
    for name in ONE:
        path = f"base_model.model.{prefix}{name.removesuffix('.weight')}"
        parts[f"{path}.lora_A.weight"] = torch.ones(2, 12)
        parts[f"{path}.lora_B.weight"] = ONE[name][:, :2]
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter" / "adapter_model.safetensors", parts)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = run("inspect", base, tmp_path / "adapter", "-q")
    assert found.exit_code == 3
    assert len(found.stderr.strip().splitlines()) == 1
    assert "two ways" in found.stderr
    assert "'a." in found.stderr
