"""What cannot be decomposed, extracted or read is refused before the work, in one line."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import svftool.stages.extract as stage
from svftool import (
    CheckpointError,
    FactorsError,
    NumericalError,
    UsageError,
    decompose,
    extract,
    merge,
    open_factors,
    read_tuned,
)
from svftool.factors import write_tuned
from svftool.stages import factorise


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a decomposition began")

    monkeypatch.setattr(factorise, "run_svds", fail)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file({"a.weight": torch.randn(6, 5), "a.bias": torch.zeros(6)}, path)
    return path


def changed(base: Path, **extra: torch.Tensor) -> Path:
    path = base.with_name("tuned.safetensors")
    tensors = {name: value * 1.5 for name, value in load_file(base).items()}
    save_file({**tensors, **{name.replace("_", "."): v for name, v in extra.items()}}, path)
    return path


@pytest.mark.usefixtures("no_svd")
@pytest.mark.parametrize("scale", [1e-33, 1e-36, 1e-42, 1e40, 1e160, 1e300, 1e-160, 1e-300])
@pytest.mark.parametrize("stacked", [False, True])
def test_singular_values_that_float32_cannot_hold(
    tmp_path: Path, scale: float, stacked: bool
) -> None:
    weight = torch.randn(8, 6, dtype=torch.float64)
    weight = torch.stack([weight, weight * scale]) if stacked else weight * scale
    save_file({"experts.weight": weight}, tmp_path / "b.safetensors")
    with pytest.raises(NumericalError, match=r"'experts\.weight' \(largest singular value"):
        decompose(tmp_path / "b.safetensors", tmp_path / "f")


@pytest.mark.parametrize("scale", [1e-29, 1e36, 0.0])
def test_scales_that_float32_holds_are_taken(tmp_path: Path, scale: float) -> None:
    save_file({"w.weight": torch.randn(4, 3) * scale}, tmp_path / "b.safetensors")
    assert "w.weight" in decompose(tmp_path / "b.safetensors", tmp_path / "f").config.layers


def test_bad_scales_are_left_whole_when_asked(tmp_path: Path) -> None:
    save_file({"w.weight": torch.randn(4, 3) * 1e-35}, tmp_path / "b.safetensors")
    found = decompose(tmp_path / "b.safetensors", tmp_path / "f", skip_bad=True).config
    assert "beyond float32" in found.left_whole["w.weight"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_svd")
@pytest.mark.parametrize("kind", ["sparse", "csr", "complex", "quantised"])
def test_tensors_that_safetensors_cannot_hold(tmp_path: Path, kind: str) -> None:
    eye = torch.eye(4)
    odd = {
        "sparse": lambda: eye.to_sparse(),
        "csr": lambda: eye.to_sparse_csr(),
        "complex": lambda: eye.to(torch.complex128),
        "quantised": lambda: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8),
    }[kind]()
    torch.save({"w.weight": torch.randn(4, 3), "odd.weight": odd}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"'odd\.weight'"):
        decompose(tmp_path / "b.pth", tmp_path / "f")


@pytest.mark.usefixtures("no_svd")
@pytest.mark.parametrize("suffix", ["U", "S", "Vh", "S_base"])
def test_names_that_are_those_of_factors(tmp_path: Path, suffix: str) -> None:
    save_file({"q": torch.randn(4, 3), f"q.{suffix}": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=rf"'q\.{suffix}'"):
        decompose(tmp_path / "b.safetensors", tmp_path / "f")


@pytest.mark.parametrize("name", ["a.weight", "a.weight.S", "a.weight.S_base"])
def test_a_tuned_file_never_holds_two_tensors_of_one_name(
    base: Path, tmp_path: Path, name: str
) -> None:
    with open_factors(decompose(base, tmp_path / "f").output) as store:
        S = {"a.weight": store.read_S("a.weight")}
        with pytest.raises(FactorsError, match="expected names of their own"):
            write_tuned(tmp_path / "t", store=store, S=S, whole={name: torch.ones(5)})


@pytest.mark.usefixtures("no_svd")
def test_extract_refuses_before_it_decomposes(base: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.svf.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        extract(base, changed(base), output=there)
    with pytest.raises(CheckpointError, match="no such file"):
        extract(base, tmp_path / "misspelt.safetensors", output=tmp_path / "x.svf.safetensors")
    assert there.read_bytes() == b"mine"


@pytest.mark.usefixtures("no_svd")
@pytest.mark.parametrize("name", ["a_weight", "a_bias", "new_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fine_tune_that_diverged_is_refused(base: Path, name: str, value: float) -> None:
    shape = (6,) if name == "a_bias" else (6, 5)
    odd = torch.zeros(shape)
    odd.view(-1)[3] = value
    with pytest.raises(NumericalError, match=name.replace("_", r"\.")):
        extract(base, changed(base, **{name: odd}), output=base.with_name("x.svf.safetensors"))


def test_temporary_factors_lie_beside_the_output(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    real = stage.decompose

    def spy(source: Any, folder: Path, **options: Any) -> Any:
        places.append(folder)
        return real(source, folder, **options)

    monkeypatch.setattr(stage, "decompose", spy)
    (tmp_path / "disk").mkdir()
    extract(base, changed(base), output=tmp_path / "disk" / "x.svf.safetensors")
    assert places[0].parent.parent == tmp_path / "disk"
    assert [one.name for one in (tmp_path / "disk").iterdir()] == ["x.svf.safetensors"]
    assert str(tmp_path) != tempfile.gettempdir()


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    folder = decompose(base, tmp_path / "factors").output
    extract(folder, changed(base), output=tmp_path / "t.svf.safetensors")
    return tmp_path / "t.svf.safetensors"


def rewritten(path: Path, metadata: str, **tensors: torch.Tensor) -> Path:
    held = {**load_file(path), **{f"a.weight.{key}": value for key, value in tensors.items()}}
    save_file(held, path, {"format": "pt", "svftool": metadata})
    return path


def facts(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["svftool"])


@pytest.mark.parametrize("text", ["5", "null", "[]", '"a"', "{", "[" * 100_000, "1e999"])
def test_metadata_that_is_no_object(tuned: Path, text: str) -> None:
    with pytest.raises(FactorsError) as caught:
        read_tuned(rewritten(tuned, text))
    assert "\n" not in str(caught.value)


_TAKEN: dict[str, list[Any]] = {
    "classes": [None],
    "training": [{}],
    "base_fingerprint": ["x"],
    "factors_fingerprint": ["x"],
}


@pytest.mark.parametrize("value", [None, 5, "x", [1], {}, [None], ["a.weight", "a.weight"]])
@pytest.mark.parametrize(
    "key", ["layers", "classes", "probes", "base_fingerprint", "factors_fingerprint", "training"]
)
def test_metadata_of_other_types(tuned: Path, key: str, value: Any) -> None:
    known = facts(tuned) | {key: value}
    path = rewritten(tuned, json.dumps(known))
    if value in _TAKEN.get(key, ()):
        read_tuned(path)
        return
    with pytest.raises(FactorsError) as caught:
        read_tuned(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"S": torch.ones(4)}, {"S_base": torch.ones(7)}, {"S": torch.ones(5, 1, 1)},
        {"S": torch.ones(5, dtype=torch.int64)}, {"S": torch.full((5,), math.nan)},
        {"S": torch.ones(4), "S_base": torch.ones(4)}, {"S": torch.tensor(1.0)},
    ],
)  # fmt: skip
def test_shapes_of_singular_values(tuned: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = rewritten(tuned, json.dumps(facts(tuned)), **tensors)
    with pytest.raises(FactorsError):
        merge(tuned.with_name("factors"), [path], output=tuned.with_name("m.safetensors"))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("base",), 5), (("base", "place"), [None]), (("base", "place"), ""),
        (("base", "fingerprint"), {}), (("base", "hub"), "x"), (("layers",), {}),
        (("layers", 0), None), (("layers", 0, "matrix"), []), (("layers", 0, "matrix"), [[1, 2]]),
        (("layers", 0, "shape"), [10**400, 5]), (("layers", 0, "shape"), "65"),
        (("layers", 0, "rank"), -1), (("layers", 0, "rank"), 10**9), (("layers", 0, "rank"), True),
        (("layers", 0, "view"), "cube"), (("layers", 0, "dtype"), "float99"),
        (("layers", 0, "name"), 3), (("layers", 0, "energy"), "all"), (("left_whole",), [5]),
        (("layers_only",), "no"), (("selection",), None), (("fingerprint",), [1]), ((), []),
        ((), "x"),
    ],
)  # fmt: skip
def test_configurations_of_other_types(
    base: Path, tmp_path: Path, where: tuple[Any, ...], value: Any
) -> None:
    folder = decompose(base, tmp_path / "f").output
    config = folder / "svf_config.json"
    document = json.loads(config.read_text())
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    if where:
        inner[where[-1]] = value
    config.write_text(json.dumps(document if where else value))
    with pytest.raises(FactorsError) as caught:
        open_factors(folder)
    assert "\n" not in str(caught.value)


def test_deep_configurations(base: Path, tmp_path: Path) -> None:
    folder = decompose(base, tmp_path / "f").output
    (folder / "svf_config.json").write_text("[" * 100_000)
    with pytest.raises(FactorsError):
        open_factors(folder)


def test_factors_behind_a_link_find_their_base(base: Path, tmp_path: Path) -> None:
    folder = decompose(base, tmp_path / "deep" / "f").output
    (tmp_path / "other" / "place").mkdir(parents=True)
    link = tmp_path / "other" / "place" / "link"
    link.symlink_to(folder)
    assert merge(link, output=tmp_path / "m.safetensors").unchanged == 2
    assert extract(link, changed(base), output=tmp_path / "x.svf.safetensors").error < 1e-6
