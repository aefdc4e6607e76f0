"""Factor checkpoints and tuned files: read back as written, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from svftool import FactorsError, decompose, open_factors, read_tuned
from svftool.checkpoints import fingerprint, tensor_digest
from svftool.factors import LayerFactors, add_delta, check_tuned, is_tuned, rebuild, write_tuned
from svftool.factors.tuned import probe
from svftool.numerics import ThreadPool


@pytest.fixture
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint()


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


def tune(folder: Path, path: Path, scale: float = 1.1, **extra: object) -> Path:
    """Write a tuned file whose singular values are the base's times a factor."""
    with open_factors(folder) as store:
        S = {name: scale * store.read_S(name) for name in store.layers}
        write_tuned(path, store=store, S=S, **extra)
    return path


def test_reads_back_factors_that_rebuild_each_weight(factors: Path, base: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(base)
    with open_factors(factors) as store:
        assert store.layers
        assert set(store.layers) | set(store.whole) == set(weights)
        for name, layer in store.layers.items():
            parts = store.read(name)
            weight = weights[name].double().reshape(layer.matrix)
            found = parts.U.double() * parts.S.double().unsqueeze(-2) @ parts.Vh.double()
            assert torch.linalg.norm(found - weight) <= 1e-6 * torch.linalg.norm(weight)
        for name in store.whole:
            assert torch.equal(
                store.read_whole(name).reshape(-1).view(torch.uint8),
                weights[name].reshape(-1).view(torch.uint8),
            )


def test_configuration_holds_no_absolute_path_and_no_time(factors: Path) -> None:
    text = (factors / "svf_config.json").read_text()
    assert str(factors.parent) not in text
    assert "seconds" not in text
    assert json.loads(text)["base"]["place"].startswith("..")


def test_the_same_decomposition_gives_the_same_bytes(
    factors: Path, base: Path, tmp_path: Path
) -> None:
    again = decompose(base, tmp_path / "again").output
    assert {p.name for p in factors.iterdir()} == {p.name for p in again.iterdir()}
    for path in factors.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda f: (f / "svf_config.json").unlink(), "no svf_config.json"),
        (lambda f: (f / "svf_config.json").write_text("{"), "not a valid configuration"),
        (lambda f: (f / "svf_config.json").write_text("[]"), "not a valid configuration"),
        (lambda f: (f / "svf.safetensors").unlink(), "no weights"),
        (lambda f: (f / "svf.safetensors").write_bytes(b"short"), "svf.safetensors"),
    ],
)
def test_broken_folders_are_refused_in_one_line(factors: Path, breakage, message: str) -> None:
    breakage(factors)
    with pytest.raises(FactorsError, match=message) as caught:
        open_factors(factors)
    assert "\n" not in str(caught.value)


def test_factors_that_differ_from_their_configuration_are_refused(factors: Path) -> None:
    path = factors / "svf_config.json"
    document = json.loads(path.read_text())
    document["layers"][0]["rank"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(FactorsError, match=r"U has shape .* expected"):
        open_factors(factors)


def test_a_newer_schema_is_refused(factors: Path) -> None:
    path = factors / "svf_config.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(FactorsError, match="schema version 99, expected 1"):
        open_factors(factors)


def test_tuned_file_reads_back(factors: Path, tmp_path: Path) -> None:
    head = torch.randn(3, 5, dtype=torch.float16)
    path = tune(
        factors,
        tmp_path / "t.svf.safetensors",
        whole={"head.weight": head},
        task="classification",
        classes=["a", "b", "c"],
        training={"steps": 3},
    )
    tuned = read_tuned(path)
    assert is_tuned(path)
    assert torch.equal(tuned.whole["head.weight"], head)
    assert (tuned.task, tuned.classes, tuned.training) == (
        "classification",
        ("a", "b", "c"),
        {"steps": 3},
    )
    with open_factors(factors) as store:
        for name in store.layers:
            expected = 1.1 * store.read_S(name)
            assert torch.allclose(tuned.S[name], expected)
            assert torch.equal(tuned.S_base[name], store.read_S(name))
        check_tuned(tuned, store)


def test_tuned_files_have_deterministic_bytes(factors: Path, tmp_path: Path) -> None:
    one, two = tune(factors, tmp_path / "1.safetensors"), tune(factors, tmp_path / "2.safetensors")
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_is_no_tuned_file(base: Path) -> None:
    assert not is_tuned(base)
    with pytest.raises(FactorsError, match="expected a tuned file"):
        read_tuned(base)


def alter(folder: Path, name: str, change) -> None:
    """Rewrite one layer's factors as another decomposition would have given them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "svf.safetensors")
    change(tensors, name)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "svf.safetensors", {"format": "pt"})
    path = folder / "svf_config.json"
    document = json.loads(path.read_text())
    document["digests"] |= {key: tensor_digest(value) for key, value in tensors.items()}
    document["fingerprint"] = fingerprint(
        (key, value) for key, value in tensors.items() if key.endswith((".U", ".S", ".Vh"))
    )
    path.write_text(json.dumps(document))


def flip_signs(tensors, name: str) -> None:
    tensors[f"{name}.U"][:, 0] *= -1
    tensors[f"{name}.Vh"][0] *= -1


def perturb(tensors, name: str) -> None:
    tensors[f"{name}.U"] += 1e-6 * torch.randn_like(tensors[f"{name}.U"])


def rotate(tensors, name: str) -> None:
    U, Vh = tensors[f"{name}.U"], tensors[f"{name}.Vh"]
    c = 0.5**0.5
    U[:, 0], U[:, 1] = c * (U[:, 0] + U[:, 1]), c * (U[:, 0] - U[:, 1])
    Vh[0], Vh[1] = c * (Vh[0] + Vh[1]), c * (Vh[0] - Vh[1])


def flip_one_side(tensors, name: str) -> None:
    tensors[f"{name}.U"][:, 0] *= -1


def other_values(tensors, name: str) -> None:
    tensors[f"{name}.S"] *= 1.01


@pytest.mark.parametrize("change", [flip_signs, perturb])
def test_a_colleagues_own_decomposition_is_accepted(factors: Path, tmp_path: Path, change) -> None:
    tuned = read_tuned(tune(factors, tmp_path / "t.safetensors"))
    other = Path(shutil.copytree(factors, tmp_path / "other"))
    name = next(iter(tuned.S))
    alter(other, name, change)
    with open_factors(other) as store:
        check_tuned(tuned, store)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rotate, "other singular vectors"),
        (flip_one_side, "other singular vectors"),
        (other_values, "other singular values"),
    ],
)
def test_factors_with_other_vectors_are_refused_by_layer(
    factors: Path, tmp_path: Path, change, reason: str
) -> None:
    tuned = read_tuned(tune(factors, tmp_path / "t.safetensors"))
    other = Path(shutil.copytree(factors, tmp_path / "other"))
    name = next(iter(tuned.S))
    alter(other, name, change)
    with open_factors(other) as store, pytest.raises(FactorsError) as caught:
        check_tuned(tuned, store)
    assert f"1 layer does not fit the factors in {other}: {name} ({reason})" in str(caught.value)


def test_rotated_vectors_that_were_not_trained_are_accepted(factors: Path, tmp_path: Path) -> None:
    tuned = read_tuned(tune(factors, tmp_path / "t.safetensors", scale=1.0))
    other = Path(shutil.copytree(factors, tmp_path / "other"))
    alter(other, next(iter(tuned.S)), rotate)
    with open_factors(other) as store:
        check_tuned(tuned, store)


def test_another_base_is_refused(factors: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned = read_tuned(tune(factors, tmp_path / "t.safetensors"))
    save_file({"w": torch.randn(4, 4)}, tmp_path / "foreign.safetensors")
    foreign = decompose(tmp_path / "foreign.safetensors", tmp_path / "g").output
    assert load_file(tmp_path / "foreign.safetensors")
    with (
        open_factors(foreign) as store,
        pytest.raises(FactorsError, match="was trained on the base"),
    ):
        check_tuned(tuned, store)


def test_probe_depends_on_the_layers_name() -> None:
    U, Vh = torch.linalg.qr(torch.randn(9, 4)).Q, torch.linalg.qr(torch.randn(7, 4)).Q.T
    assert not (probe("a", U, Vh).left == probe("b", U, Vh).left).all()
    assert (probe("a", U, Vh).left == probe("a", U, Vh).left).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 5), (5, 3, 2, 2)])
def test_delta_is_the_rounded_float64_sum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    matrix = weight.double().reshape(shape[0], -1)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    delta = 0.1 * S
    merged = add_delta(weight, LayerFactors(U, S, Vh), delta, view="matrix")
    expected = (matrix + U * delta @ Vh).to(dtype).reshape(shape)
    assert merged.weight.dtype == dtype
    difference = (merged.weight.double() - expected.double()).abs().max()
    # A sum next to a rounding boundary may fall either way.
    assert difference <= torch.finfo(dtype).eps * expected.double().abs().max()
    assert merged.relative_change == pytest.approx(0.1, rel=1e-9)
    exact = matrix + U * delta @ Vh
    loss = torch.linalg.norm(expected.double().reshape(matrix.shape) - exact)
    loss = float(loss / torch.linalg.norm(delta))
    assert merged.rounding_loss == pytest.approx(loss, rel=1e-3, abs=1e-12)


def test_no_delta_returns_the_very_weight() -> None:
    weight = torch.full((3, 3), float("nan"))
    factors = LayerFactors(torch.eye(3), torch.ones(3), torch.eye(3))
    assert add_delta(weight, factors, torch.zeros(3), view="matrix").weight is weight


def test_row_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 8)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    whole = add_delta(weight, LayerFactors(U, S, Vh), 0.1 * S, view="matrix")
    for name, count in (("PRODUCT_ELEMENTS", 40), ("PRODUCT_ROWS", 2), ("PIECE_ELEMENTS", 24)):
        monkeypatch.setattr(f"svftool.factors.delta._{name}", count)
    blocks = add_delta(weight, LayerFactors(U, S, Vh), 0.1 * S, view="matrix")
    assert torch.allclose(whole.weight, blocks.weight, rtol=1e-6, atol=1e-7)
    assert blocks.relative_change == pytest.approx(whole.relative_change)
    with ThreadPool(3) as pool:
        spread = add_delta(weight, LayerFactors(U, S, Vh), 0.1 * S, view="matrix", pool=pool)
    assert torch.equal(spread.weight, blocks.weight)
    assert (spread.relative_change, spread.rounding_loss) == (
        blocks.relative_change,
        blocks.rounding_loss,
    )


def test_batch_view_treats_each_expert_alone() -> None:
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    delta = torch.zeros_like(S)
    delta[1] = 0.5
    merged = add_delta(weight, LayerFactors(U, S, Vh), delta, view="batch").weight
    assert torch.equal(merged[0], weight[0])
    assert torch.allclose(merged[1], weight[1] + 0.5 * U[1] @ Vh[1])
    rebuilt = rebuild(LayerFactors(U, S, Vh), S, shape=(3, 5, 4), dtype=torch.float64, view="batch")
    assert torch.allclose(rebuilt, weight)
