"""Merging writes nothing that is not finite, loses no change, and rounds once."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svftool import FactorsError, NumericalError, UsageError, decompose, merge, open_factors
from svftool.factors import write_tuned
from svftool.numerics.rounding import round_once
from svftool.report.merge import document


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("_", "."): value for name, value in tensors.items()}, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    return saved(
        tmp_path / "base.safetensors",
        a_weight=torch.randn(8, 6, generator=g),
        h_weight=torch.randn(5, 4, generator=g).half(),
        a_bias=torch.zeros(8),
        mask=torch.tensor([0.0, -math.inf]),
    )


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


def tune(folder: Path, name: str, scale: float = 1.1, only: str = "", **extra: Any) -> Path:
    path = folder.parent / f"{name}.svf.safetensors"
    with open_factors(folder) as store:
        S = {one: scale * store.read_S(one) for one in store.layers if one.startswith(only)}
        write_tuned(path, store=store, S=S, **extra)
    return path


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e400", "NaN"])
def test_weights_that_are_no_numbers_are_refused(factors: Path, weight: str) -> None:
    tuned, out = tune(factors, "t"), factors.parent / "m.safetensors"
    with pytest.raises(UsageError, match="expected a finite number"):
        merge(factors, [f"{tuned}@{weight}"], output=out)
    with pytest.raises(UsageError, match="expected a finite number"):
        merge(factors, [(tuned, float(weight))], output=out)
    assert not out.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["S", "whole", "added"])
def test_tuned_values_that_are_not_finite_are_refused(
    factors: Path, place: str, value: float
) -> None:
    whole = {"a.bias": torch.zeros(8), "new.bias": torch.zeros(8)}
    if place != "S":
        whole["a.bias" if place == "whole" else "new.bias"][3] = value
    scale = value if place == "S" else 1.1
    tuned, out = tune(factors, "t", scale, whole=whole), factors.parent / "m.safetensors"
    named = {"S": r"a\.weight\.S", "whole": r"a\.bias", "added": r"new\.bias"}[place]
    with pytest.raises((FactorsError, NumericalError), match=named):
        merge(factors, [tuned], output=out)
    assert not out.exists()


def test_a_mask_keeps_its_infinity(factors: Path) -> None:
    mask = torch.tensor([1.0, -math.inf])
    one, two = (tune(factors, name, whole={"mask": mask}) for name in "ab")
    for weight in (1.0, 0.5):
        out = factors.parent / f"m{weight}.safetensors"
        merge(factors, [(one, weight), (two, 0.5)], output=out)
        assert load_file(out)["mask"].tolist() == [weight + 0.5, -math.inf]


@pytest.mark.parametrize("place", ["S", "whole"])
def test_overflow_is_refused_or_clipped_and_counted(factors: Path, base: Path, place: str) -> None:
    if place == "S":
        tuned = tune(factors, "t", 1e5, only="h")
    else:
        tuned = tune(factors, "t", whole={"h.weight": torch.full((5, 4), 1e6)}, only="a")
    out = factors.parent / "m.safetensors"
    with pytest.raises(NumericalError, match=r"'h\.weight': \d+ values overflow float16"):
        merge(factors, [tuned], output=out)
    result = merge(factors, [tuned], output=out, allow_overflow=True, verify=True)
    (clipped,) = document(result)["clipped"]
    found = load_file(out)["h.weight"]
    assert clipped["name"] == "h.weight"
    assert clipped["values"] == int((found.abs() == 65504).sum()) > 0
    assert bool(found.isfinite().all())


def test_changed_is_what_the_delta_says(factors: Path) -> None:
    tuned = tune(factors, "t", only="a")
    for weight in (1e-200, -1e-160, 1.0):
        out = factors.parent / f"{weight}.safetensors"
        changes = {one.name: one for one in merge(factors, [(tuned, weight)], output=out).layers}
        assert changes["a.weight"].changed
        assert not changes["h.weight"].changed


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("without_base", [False, True])
def test_one_tunes_S_and_another_the_whole_tensor(
    factors: Path, base: Path, weights: tuple[float, float], without_base: bool
) -> None:
    before = load_file(base)["a.weight"].double()
    spectral = tune(factors, "s", 1.5, only="a")
    dense = tune(factors, "w", only="h", whole={"a.weight": (before + 1.0).float()})
    out = factors.parent / "m.safetensors"
    both = [(spectral, weights[0]), (dense, weights[1])]
    merge(factors, both, output=out, without_base=without_base)
    expected = before + 0.5 * weights[0] * before + weights[1]
    assert torch.allclose(load_file(out)["a.weight"].double(), expected, atol=1e-5)


def test_heads_of_different_classes_are_never_summed(factors: Path) -> None:
    head = {"head.weight": torch.randn(2, 4), "a.bias": torch.ones(8)}
    pets = tune(factors, "pets", whole=head, classes=["cat", "dog"])
    birds = tune(factors, "birds", whole=head, classes=["owl", "gull"])
    turned = tune(factors, "turned", whole=head, classes=["dog", "cat"])
    same = tune(factors, "same", whole=head, classes=["cat", "dog"])
    out = factors.parent / "m.safetensors"
    for other in (birds, turned):
        with pytest.raises(FactorsError, match=r"'head\.weight': heads of different classes"):
            merge(factors, [(pets, 0.5), (other, 0.5)], output=out)
    merge(factors, [(pets, 0.5), (same, 0.5)], output=out)
    assert torch.allclose(load_file(out)["head.weight"], head["head.weight"])


def test_a_head_is_not_blended_with_the_bases_head_of_other_classes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    saved(folder / "model.safetensors", a_weight=torch.randn(6, 5), head_weight=torch.randn(2, 6))
    named = {"id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(named))
    factors = decompose(folder, tmp_path / "factors").output
    head = {"head.weight": torch.zeros(2, 6)}
    tuned = tune(factors, "t", whole=head, classes=["owl", "gull"])
    with pytest.raises(FactorsError, match="heads of different classes"):
        merge(factors, [(tuned, 0.5)], output=tmp_path / "m")
    assert merge(factors, [(tuned, 1.0)], output=tmp_path / "m").replaced == ("head.weight",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    digits = 8 if dtype == torch.bfloat16 else 11
    # Just above the middle of two numbers, by less than float32 holds.
    middle = 1 + 2.0**-digits
    values = torch.tensor([middle + 2.0**-40, middle - 2.0**-40, middle, -middle - 2.0**-40],
                          dtype=torch.float64)  # fmt: skip
    step = 2.0 ** (1 - digits)
    assert round_once(values, dtype).tolist() == [1 + step, 1.0, 1.0, -1 - step]
    start = saved(tmp_path / "b.safetensors", a_weight=torch.eye(4).to(dtype))
    factors = decompose(start, tmp_path / "f").output
    with open_factors(factors) as store:
        S = store.read_S("a.weight")
    tuned = tmp_path / "t.svf.safetensors"
    with open_factors(factors) as store:
        write_tuned(tuned, store=store, S={"a.weight": S + 2.0**-digits * (1 + 2.0**-20)})
    weight = 1 + 2.0**-30
    merge(factors, [(tuned, weight)], output=tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["a.weight"].diagonal().tolist() == [1 + step] * 4


def test_rounding_agrees_with_exact_arithmetic() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=g).half().double()
    values += 2.0**-12 * torch.randint(-2, 3, (500,), generator=g)
    values += 2.0**-40 * torch.randint(-1, 2, (500,), generator=g)
    found = round_once(values, torch.float16)
    for value, one in zip(values.tolist(), found, strict=True):
        bits = one.reshape(1).view(torch.int16)
        near = [(bits + step).to(torch.int16).view(torch.float16) for step in (-1, 0, 1)]
        best = min(abs(Fraction(float(other)) - Fraction(value)) for other in near)
        assert abs(Fraction(float(one)) - Fraction(value)) == best


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_shards_of_one_file_are_refused(factors: Path, suffix: str) -> None:
    with pytest.raises(UsageError, match="--max-shard-size"):
        merge(factors, output=factors.parent / f"m{suffix}", max_shard_size="5GB")
