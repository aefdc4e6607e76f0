"""Fingerprints: of contents alone, whatever the format, the sharding and the order."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from svftool.checkpoints import (
    Fingerprint,
    fingerprint,
    fingerprint_checkpoint,
    open_checkpoint,
    tensor_digest,
)
from svftool.progress import Silent


def test_it_is_what_the_documentation_says() -> None:
    tensor = torch.tensor([[1, 2]], dtype=torch.int16)
    sha = hashlib.sha256(b"\x01\x00\x02\x00").hexdigest()
    line = json.dumps(["w", "int16", [1, 2], sha]) + "\n"
    assert fingerprint([("w", tensor)]) == hashlib.sha256(line.encode()).hexdigest()


def of(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return fingerprint_checkpoint(checkpoint)


def test_format_sharding_and_order_do_not_matter(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint()
    tensors = load_file(path)
    torch.save({"state_dict": dict(reversed(tensors.items())), "epoch": 1}, tmp_path / "x.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, shards / f"{number}.safetensors")
        weight_map[name] = f"{number}.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert of(path) == of(tmp_path / "x.pt") == of(shards) == fingerprint(tensors.items())


BASE = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "other",
    [
        {**BASE, "a": torch.tensor([1.0, 2.0000002])},
        {**BASE, "b": torch.zeros(3, 2)},
        {**BASE, "b": torch.zeros(2, 3, dtype=torch.int32)},
        {**BASE, "b": -torch.zeros(2, 3)},
        {"a": BASE["a"], "c": BASE["b"]},
        {"a": BASE["b"], "b": BASE["a"]},
        {"a": BASE["a"]},
        {**BASE, "c": torch.zeros(0)},
    ],
)
def test_every_difference_matters(other: dict[str, torch.Tensor]) -> None:
    assert fingerprint(other.items()) != fingerprint(BASE.items())


@given(st.permutations(["a", "b", "c", "ä", "\u2028"]))
def test_the_order_of_adding_does_not_matter(names: list[str]) -> None:
    values = {name: torch.full((2,), float(ord(name))) for name in names}
    assert fingerprint(values.items()) == fingerprint(sorted(values.items()))


def test_nan_counts_by_its_bits() -> None:
    quiet = torch.tensor([float("nan")])
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert fingerprint([("w", quiet)]) == fingerprint([("w", quiet.clone())])
    assert fingerprint([("w", quiet)]) != fingerprint([("w", other)])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.ones(2, 2).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        torch.ones(2, dtype=torch.bfloat16),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_every_dtype_has_a_digest(tensor: torch.Tensor) -> None:
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())


def test_strides_and_slices_do_not_matter() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous())
    assert tensor_digest(tensor[:, 1:3]) == tensor_digest(tensor[:, 1:3].clone())
    conjugate = torch.tensor([1 + 2j]).conj()
    assert tensor_digest(conjugate) == tensor_digest(torch.tensor([1 - 2j]))


def test_sparse_and_quantised_tensors_differ_by_their_values() -> None:
    one, two = torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()
    assert tensor_digest(one) == tensor_digest(one.clone()) != tensor_digest(two)
    values = torch.tensor([[0.1, 0.2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coarse, fine = (torch.quantize_per_tensor(values, s, 0, torch.qint8) for s in (0.1, 0.2))
    assert tensor_digest(coarse) == tensor_digest(coarse.clone()) != tensor_digest(fine)


def test_a_name_is_added_once() -> None:
    total = Fingerprint()
    total.add("w", torch.ones(1))
    with pytest.raises(ValueError, match="'w' is in the fingerprint already"):
        total.add("w", torch.ones(1))


def test_parts_found_elsewhere_give_the_same() -> None:
    total = Fingerprint()
    total.add_digest("w", "float32", (2,), tensor_digest(torch.ones(2)))
    assert total.hexdigest() == fingerprint([("w", torch.ones(2))])


class Bar:
    """A task that adds up what it is told."""

    def __init__(self, total: float | None) -> None:
        self.total, self.done = total, 0.0

    def advance(self, amount: float = 1.0, *, detail: str | None = None) -> None:
        self.done += amount

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Bars(Silent):
    """A progress that keeps its tasks."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []

    def task(self, description: str, total: float | None = None, *, unit: str = "") -> Bar:
        self.bars.append(Bar(total))
        return self.bars[-1]


def test_progress_is_told_in_bytes(tiny_checkpoint: Callable[..., Path]) -> None:
    progress = Bars()
    with open_checkpoint(tiny_checkpoint()) as checkpoint:
        fingerprint_checkpoint(checkpoint, progress=progress)
        size = sum(info.nbytes for info in checkpoint.infos.values())
    assert [(bar.total, bar.done) for bar in progress.bars] == [(size, size)]
