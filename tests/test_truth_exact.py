"""Equality is said of the values themselves, not of what float64 makes of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svftool import audit, decompose, open_factors
from svftool.auditing.compare import BaseMatrix, Found, Tuned, compare_vectors
from svftool.auditing.metrics import choose_metrics
from svftool.auditing.verdicts import judge, judge_tensor
from svftool.checkpoints import fingerprint, tensor_digest
from svftool.factors import write_tuned
from svftool.numerics import ThreadPool

LARGE = {
    torch.int64: (2**53, 2**62, -(2**53) - 2),
    torch.uint64: (2**53, 2**63 - 2),
    torch.int32: (2**30, -(2**31) + 1),
    torch.uint32: (2**32 - 2, 2**31 - 1),
    torch.int16: (2**14, -3),
    torch.uint16: (2**16 - 2, 2**15 - 1),
}
INTEGERS = [(dtype, value) for dtype, values in LARGE.items() for value in values]


def vector(base: Tensor, tuned: Tensor) -> str:
    found = compare_vectors(base, tuned).evidence
    assert found is not None
    return judge_tensor(found).name


def matrix(base: Tensor, tuned: Tensor) -> tuple[str, Found]:
    with ThreadPool(0) as pool:
        held = BaseMatrix(base, choose_metrics(("all",), fast=False), vectors=True, pool=pool)
        found = held.against(Tuned(tuned))
    assert found.evidence is not None
    return judge(found.evidence).name, found


@pytest.mark.parametrize(("dtype", "value"), INTEGERS)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_one_more_is_a_change_of_whole_numbers(
    dtype: torch.dtype, value: int, shape: tuple[int, ...]
) -> None:
    before = torch.full(shape, value, dtype=torch.int64).to(dtype)
    after = torch.full(shape, value + 1, dtype=torch.int64).to(dtype)
    assert vector(before, before.clone()) == "untouched"
    assert vector(before, after) == "changed"


@pytest.mark.parametrize("other", [torch.float64, torch.float32])
def test_a_whole_number_that_a_float_cannot_hold_is_not_equal_to_it(other: torch.dtype) -> None:
    number = torch.tensor(2**53 + 1)
    assert vector(number, number.to(other)) != "untouched"
    assert vector(torch.tensor(7), torch.tensor(7).to(other)) == "untouched"


SMALL = (1e-170, 1e-200, 1e-310, 5e-324)


@pytest.mark.parametrize(("small", "large"), list(itertools.product(SMALL, (1.0, 1e150, 1e250))))
def test_an_entry_that_vanishes_beside_the_largest_still_differs(
    small: float, large: float
) -> None:
    base = torch.full((6, 5), large, dtype=torch.float64)
    base += torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64) * large)[[0, 1, 2, 3, 4, 0]]
    base[0, 0] = small
    tuned = base.clone()
    tuned[0, 0] = 2 * small
    assert matrix(base, base.clone())[0] == "untouched"
    assert matrix(base, tuned)[0] == "rounding noise"
    assert matrix(torch.stack([base, base]), torch.stack([base, tuned]))[0] == "rounding noise"
    assert vector(base[0], tuned[0]) == "rounding noise"


@pytest.mark.parametrize("value", [100.0, 1e-7, 1e-300])
def test_zeros_that_became_something_have_no_singular_vectors_to_share(value: float) -> None:
    base = torch.zeros(6, 5, dtype=torch.float64)
    for tuned in (torch.full_like(base, value), torch.eye(6, 5, dtype=torch.float64) * value):
        name, found = matrix(base, tuned)
        assert name == "unrelated"
        assert found.measured.change["weight_drift"] == float("inf")


# Tuned files of two decompositions of one base.


def two_files(folder: Path, turn: bool, scale: float) -> tuple[Path, Path]:
    """Tune the same singular values in two decompositions, of which one may be turned."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    # Two equal singular values: any rotation of their vectors is a decomposition too.
    weight = (q[:, :4] @ torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]).double()) @ q[:4, :]).float()
    save_file({"a.weight": weight}, folder / "base.safetensors")
    paths = []
    for name, dtype in (("one", "float32"), ("two", "float32" if turn else "bfloat16")):
        factors = decompose(folder / "base.safetensors", folder / name, dtype=dtype).output
        if turn and name == "two":
            rotate(factors)
        with open_factors(factors) as store:
            S = store.read_S("a.weight") * torch.tensor([1.0, scale, 1.0, 1.0, 1.0, 1.0])
            write_tuned(folder / f"{name}.safetensors", store=store, S={"a.weight": S})
        paths.append(folder / f"{name}.safetensors")
    return paths[0], paths[1]


def rotate(factors: Path) -> None:
    (file,) = factors.glob("*.safetensors")
    tensors = load_file(file)
    half = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    tensors["a.weight.U"][:, 1:3] = tensors["a.weight.U"][:, 1:3] @ half
    tensors["a.weight.Vh"][1:3] = half.mT @ tensors["a.weight.Vh"][1:3]
    save_file(tensors, file)
    config = json.loads((factors / "svf_config.json").read_text())
    config["digests"] |= {name: tensor_digest(value) for name, value in tensors.items()}
    config["fingerprint"] = fingerprint(tensors.items())
    (factors / "svf_config.json").write_text(json.dumps(config))


def test_the_same_values_on_other_vectors_are_not_compared(tmp_path: Path) -> None:
    one, two = two_files(tmp_path, turn=True, scale=1.5)
    (found,) = audit(one, [two]).comparisons
    assert found.verdict is not None
    assert found.verdict.name == "undecided"
    assert "other singular vectors" in found.unmatched_base[0].reason


def test_the_same_values_on_vectors_rounded_otherwise_are_not_equal(tmp_path: Path) -> None:
    one, two = two_files(tmp_path, turn=False, scale=1.5)
    (found,) = audit(one, [two]).comparisons
    assert found.verdict is not None
    assert found.verdict.name == "rounding noise"


@pytest.mark.parametrize("turn", [False, True])
def test_files_that_both_change_nothing_are_equal_whatever_the_vectors(
    turn: bool, tmp_path: Path
) -> None:
    one, two = two_files(tmp_path, turn=turn, scale=1.0)
    (found,) = audit(one, [two]).comparisons
    assert found.verdict is not None
    assert found.verdict.name == "untouched"
