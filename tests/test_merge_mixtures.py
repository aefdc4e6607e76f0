"""Mixtures of tuned files: one tuned file, a dense checkpoint and a live model that agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import svftool
from svftool.cli import app
from svftool.factors import write_tuned
from svftool.factors.stated import Support

CLASSES = ["owl", "gull", "wren"]


class Net(nn.Module):
    def __init__(self, classes: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8, dtype=dtype)
        self.b = nn.Linear(8, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.fc = nn.Linear(7, classes, dtype=dtype)


def made(work: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    save_file(Net(dtype=dtype).state_dict(), work / "base.safetensors")
    factors = svftool.decompose(work / "base.safetensors", work / "factors", **options)
    return factors.output


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    return made(tmp_path)


def tune(
    factors: Path,
    name: str,
    seed: int,
    *,
    head: int | None = 3,
    scale: float = 0.1,
    data: dict[str, Any] | None = None,
    support: list[bytes] | None = None,
    **extra: Any,
) -> Path:
    """Write a tuned file with random changes, a norm, and a head of so many classes."""
    g = torch.Generator().manual_seed(seed)
    path = factors.parent / f"{name}.svf.safetensors"
    whole = {"norm.weight": torch.rand(7, generator=g)}
    if head is not None:
        whole["fc.weight"] = torch.randn(head, 7, generator=g)
        whole["fc.bias"] = torch.randn(head, generator=g)
    with svftool.open_factors(factors) as store:
        S = {
            one: store.read_S(one) * (1 + scale * torch.randn(store.read_S(one).shape, generator=g))
            for one in store.layers
        }
        training = {"regime": "svf", "seed": seed, "data": data or {}}
        if support is not None:
            training["support"] = Support.of(support).to_plain()
        facts = {"task": "classification", "classes": CLASSES, "training": training, **extra}
        write_tuned(path, store=store, S=S, whole=whole, **facts)
    return path


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )


CASES = [
    ((0.7, 0.3), 3, torch.float32),
    ((0.5, 1.0), 5, torch.float32),
    ((1.5, -0.5), None, torch.float32),
    ((0.7, 0.3), 3, torch.bfloat16),
]


@pytest.mark.parametrize(("weights", "head", "dtype"), CASES)
def test_file_dense_and_live_agree_bit_for_bit(
    tmp_path: Path, weights: tuple[float, float], head: int | None, dtype: torch.dtype
) -> None:
    factors = made(tmp_path, dtype)
    one, two = (tune(factors, name, seed, head=head) for seed, name in enumerate("ab"))
    mixed = list(zip((one, two), weights, strict=True))
    svftool.merge(factors, mixed, output=tmp_path / "dense.safetensors", verify=True)
    dense = load_file(tmp_path / "dense.safetensors")
    assert not same(load_file(tmp_path / "base.safetensors"), dense)
    result = svftool.merge(factors, mixed, output=tmp_path / "m.svf.safetensors", verify=True)
    assert (result.mixed, result.verified) == (True, True)
    svftool.merge(factors, [result.output], output=tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), dense)
    for source in ({str(one): weights[0], two: weights[1]}, result.output):
        live = Net(dtype=dtype)
        svftool.attach(live, factors)
        svftool.load_tuned(live, source)
        # In half precision the live model's own singular vectors are rounded.
        rounding = 0.0 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(dict(live.state_dict()), dense, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("options", [{}, {"layers_only": True}, {"rank": "3"}])
def test_a_live_mixture_starts_from_the_base_whatever_was_loaded_before(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    factors = made(tmp_path, **options)
    one, two = (tune(factors, name, seed, head=5) for seed, name in enumerate("ab"))
    svftool.merge(factors, [(one, 0.4), (two, 0.2)], output=tmp_path / "dense.safetensors")
    live = Net()
    svftool.attach(live, factors)
    for before in (one, {one: 2.0, two: -1.0}):
        svftool.load_tuned(live, before)
        svftool.load_tuned(live, {one: 0.4, two: 0.2})
        assert same(dict(live.state_dict()), load_file(tmp_path / "dense.safetensors"))


def test_training_after_loading_is_what_is_saved_and_merged(factors: Path) -> None:
    one, two = (tune(factors, name, seed, head=None) for seed, name in enumerate("ab"))
    live = Net()
    attached = svftool.attach(live, factors)
    svftool.load_tuned(live, {one: 0.4, two: 0.2})
    with torch.no_grad():
        for theta in attached.parameters():
            theta.data.add_(0.01)
    svftool.save_tuned(live, factors.parent / "later.svf.safetensors")
    out = factors.parent / "later.safetensors"
    svftool.merge(factors, [factors.parent / "later.svf.safetensors"], output=out)
    found, state = load_file(out), live.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in ("a.weight", "b.weight"))


def test_a_mixture_says_what_it_was_mixed_from(factors: Path) -> None:
    shared = {"image_size": [16, 16], "mean": [0.5], "shots": 3}
    one = tune(factors, "a", 1, data=shared, support=[b"1", b"2"])
    two = tune(factors, "b", 2, data={**shared, "shots": 5}, support=[b"2", b"3"])
    mixed = [f"{one}@0.7", f"{two}@0.3"]
    for name, key in (("m.svf", "svftool"), ("m", "svftool_merged")):
        output = factors.parent / f"{name}.safetensors"
        svftool.merge(factors, mixed, output=output)
        with safe_open(output, "pt") as file:
            facts = json.loads(file.metadata()[key])
        assert (facts["task"], facts["classes"]) == ("classification", CLASSES)
        training = facts["training"]
        assert training["regime"] == "svf"
        parts = training["mixture"]
        assert [(part["file"], part["weight"]) for part in parts] == [
            ("a.svf.safetensors", 0.7),
            ("b.svf.safetensors", 0.3),
        ]
        assert [part["seed"] for part in parts] == [1, 2]
        assert training["data"] == {
            "image_size": [16, 16],
            "mean": [0.5],
        }
        seen = Support.from_plain(training["support"])
        assert seen is not None
        assert (seen.examples, seen.count([b"1", b"2", b"3", b"4"])) == (4, 3)
        assert str(factors.parent) not in json.dumps(facts)


def test_one_file_alone_hands_on_what_it_says(factors: Path) -> None:
    one = tune(factors, "a", 1, data={"image_size": [16, 16]})
    expected = svftool.read_tuned(one)
    found = svftool.merge(factors, [one], output=factors.parent / "m.svf.safetensors").output
    again = svftool.read_tuned(found)
    assert (again.task, again.classes, again.training) == (
        expected.task,
        expected.classes,
        expected.training,
    )
    assert same(dict(again.S), dict(expected.S))
    assert same(dict(again.whole), dict(expected.whole))


def test_heads_that_the_base_has_no_counterpart_of_are_averaged(factors: Path) -> None:
    one, two = (tune(factors, name, seed) for seed, name in enumerate("ab"))
    heads = [svftool.read_tuned(path).whole["fc.weight"].double() for path in (one, two)]
    out = factors.parent / "m.safetensors"
    svftool.merge(factors, [(one, 0.6), (two, 0.2)], output=out)
    expected = (0.75 * heads[0] + 0.25 * heads[1]).float()
    torch.testing.assert_close(load_file(out)["fc.weight"], expected)
    svftool.merge(factors, [(one, 0.5)], output=out, force=True)
    assert torch.equal(load_file(out)["fc.weight"], heads[0].float())


REFUSED = [
    ({"classes": ["owl", "wren", "gull"]}, "heads of different classes"),
    ({"classes": ["cat", "dog", "eel"]}, "heads of different classes"),
    ({"head": 5, "classes": list("abcde")}, r"trained with shape \(3, 7\) and \(5, 7\)"),
]


def refused_every_way(
    factors: Path, files: list[Path], weights: tuple[float, float], kinds: Any, message: str
) -> None:
    live = Net(dtype=load_file(factors.parent / "base.safetensors")["a.weight"].dtype)
    svftool.attach(live, factors)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    mixed = list(zip(files, weights, strict=True))
    with pytest.raises(kinds, match=message):
        svftool.load_tuned(live, dict(mixed))
    assert same(dict(live.state_dict()), before)
    for name in ("m.svf.safetensors", "m.safetensors"):
        with pytest.raises(kinds, match=message):
            svftool.merge(factors, mixed, output=factors.parent / name)
        assert not (factors.parent / name).exists()


def test_heads_of_different_classes_are_refused_every_way(factors: Path) -> None:
    one = tune(factors, "a", 1)
    for other, message in REFUSED:
        two = tune(factors, f"b{len(message)}-{other['classes'][0]}", 2, **other)
        refused_every_way(factors, [one, two], (0.5, 0.5), svftool.FactorsError, message)


def test_heads_of_different_kinds_are_not_averaged(factors: Path) -> None:
    one = tune(factors, "a", 1)
    cosine = factors.parent / "c.svf.safetensors"
    with svftool.open_factors(factors) as store:
        whole = {"fc.weight": torch.randn(3, 7), "fc.scale": torch.tensor(15.0)}
        write_tuned(cosine, store=store, S={}, whole=whole, classes=CLASSES)
    with pytest.raises(svftool.FactorsError, match="heads of different kinds"):
        svftool.merge(factors, [(one, 0.5), (cosine, 0.5)], output=factors.parent / "m.safetensors")


def test_weights_that_are_no_numbers_are_refused_every_way(factors: Path) -> None:
    files = [tune(factors, name, seed) for seed, name in enumerate("ab")]
    for weights in ((math.nan, 1.0), (1.0, math.inf)):
        refused_every_way(factors, files, weights, svftool.UsageError, "expected a finite number")


def test_what_is_not_finite_is_refused_every_way(tmp_path: Path) -> None:
    factors = made(tmp_path, torch.float16)
    headless = [tune(factors, n, i, head=None, scale=50.0) for i, n in enumerate("ab")]
    for weights, message in (((1e308, 1e308), "not finite"), ((1e6, 1e6), "overflow float16")):
        refused_every_way(factors, headless, weights, svftool.NumericalError, message)
    heads = [tune(factors, name, seed) for seed, name in enumerate("cd")]
    refused_every_way(factors, heads, (0.5, -0.5), svftool.FactorsError, "weights sum to 0")


def test_an_empty_mixture_is_refused(factors: Path) -> None:
    live = Net()
    svftool.attach(live, factors)
    with pytest.raises(svftool.UsageError, match="empty mixture"):
        svftool.load_tuned(live, {})


@pytest.mark.parametrize("name", ["m.svf.safetensors", "m.svf.pth", "m.svf.bin"])
def test_dense_weights_do_not_take_a_tuned_files_name(factors: Path, name: str) -> None:
    tuned = [] if name.endswith("safetensors") else [tune(factors, "a", 1)]
    with pytest.raises(svftool.UsageError, match="the name of a tuned file"):
        svftool.merge(factors, tuned, output=factors.parent / name)
    assert not (factors.parent / name).exists()


def test_different_settings_are_said(factors: Path) -> None:
    one = tune(factors, "a", 1, data={"image_size": [16, 16]})
    two = tune(factors, "b", 2, data={"image_size": [24, 24]})
    output = factors.parent / "m.svf.safetensors"
    command = ["merge", factors, f"{one}@0.7", f"{two}@0.3", "-o", output, "--json"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.stderr
    assert "image size [16, 16] and [24, 24]" in result.stderr
    assert json.loads(result.stdout)["kind"] == "tuned file"
    assert "data" not in svftool.read_tuned(output).training
