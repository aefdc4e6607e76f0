"""Tuned files of the spectral family: written, merged, mixed, inspected, converted, extracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svftool
from svftool.attaching import weight_gradients
from svftool.errors import FactorsError, UsageError
from svftool.factors import LayerFactors, check_tuned, open_factors, write_tuned
from svftool.stages.audit import audit
from svftool.stages.convert import convert
from svftool.stages.extract import extract
from tests.attaching import randomise
from tests.test_attach_gradients import Experts

REGIMES = ("svf+scale", "entries:2x:random", "core:3", "salt:1", "rows", "entries:9:band")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 12)
    ).eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spectral")
    save_file(network().state_dict(), folder / "base.safetensors", {"format": "pt"})
    svftool.decompose(folder / "base.safetensors", folder / "factors")
    for seed, regime in enumerate(REGIMES):
        model = network()
        attached = svftool.attach(model, folder / "factors", regime=regime)
        randomise(attached, seed=seed)
        svftool.save_tuned(model, named(folder, regime))
    return folder


def named(work: Path, regime: str) -> Path:
    return work / f"{regime.replace(':', '-')}.svf.safetensors"


def merged(work: Path, *tuned: str, output: Path) -> dict[str, Tensor]:
    svftool.merge(work / "factors", tuned, output=output)
    return load_file(output)


def change_of(work: Path, file: Path, name: str) -> Tensor:
    """Form ``diag(row) U M Vh diag(col) - U diag(S_base) Vh + BA`` from the raw file."""
    held = load_file(file)
    with open_factors(work / "factors") as store:
        factors, shape = store.read(name), store.layers[name].shape
    U, Vh = factors.U.double(), factors.Vh.double()
    S, S_base = held[f"{name}.S"].double(), held[f"{name}.S_base"].double()
    M = torch.diag(S)
    if f"{name}.index" in held:
        for place, value in zip(held[f"{name}.index"], held[f"{name}.value"], strict=True):
            M[int(place) // len(S), int(place) % len(S)] += float(value)
    row = held.get(f"{name}.row", torch.ones(len(U))).double()
    col = held.get(f"{name}.col", torch.ones(Vh.shape[1])).double()
    found = torch.diag(row) @ U @ M @ Vh @ torch.diag(col) - (U * S_base) @ Vh
    if f"{name}.B" in held:
        found = found + held[f"{name}.B"].double() @ held[f"{name}.A"].double()
    return found.reshape(shape)


@pytest.mark.parametrize("regime", REGIMES)
def test_file_merge_and_live_model_agree_bit_for_bit(
    work: Path, tmp_path: Path, regime: str
) -> None:
    file = named(work, regime)
    dense = merged(work, str(file), output=tmp_path / "m.safetensors")
    base = network().state_dict()
    live = network()
    svftool.attach(live, work / "factors")  # for singular values alone
    svftool.load_tuned(live, file)
    trained = network()
    svftool.attach(trained, work / "factors", regime=regime)
    svftool.load_tuned(trained, file)
    for model in (live, trained):
        assert all(torch.equal(model.state_dict()[name], dense[name]) for name in dense)
        again = tmp_path / "again.svf.safetensors"
        svftool.save_tuned(model, again, force=True)
        found, wanted = load_file(again), load_file(file)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    plain = network()
    plain.load_state_dict(dense)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    x = x[..., :6, :6]
    with torch.no_grad():
        torch.testing.assert_close(live(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained(x), plain(x), rtol=1e-4, atol=1e-5)
    for name in svftool.read_tuned(file).S:
        expected = (base[name].double() + change_of(work, file, name)).float()
        torch.testing.assert_close(dense[name], expected, rtol=3e-7, atol=1e-9)
        assert not torch.equal(dense[name], base[name])


def test_what_changes_nothing_more_is_written_as_before(work: Path, tmp_path: Path) -> None:
    files = {}
    for regime in ("svf", "svf+scale", "entries:4:band", "salt:1"):
        model = network()
        svftool.attach(model, work / "factors", regime=regime)
        files[regime] = tmp_path / f"{regime[:4]}.svf.safetensors"
        svftool.save_tuned(model, files[regime], force=True)
    assert len({file.read_bytes() for file in files.values()}) == 1
    with safe_open(files["svf"], "pt") as file:
        facts = json.loads(file.metadata()["svftool"])
        assert set(file.keys()) == {f"{n}.{s}" for n in facts["layers"] for s in ("S", "S_base")}
    assert facts["schema_version"] == 1
    assert "parts" not in facts
    with safe_open(named(work, "rows"), "pt") as file:
        facts = json.loads(file.metadata()["svftool"])
    assert facts["schema_version"] == 2
    assert set(facts["parts"]["0.weight"]) == {"row"}


class Flipped:
    """Another decomposition of the same base: some pairs of vectors have the other sign."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.fingerprint = "another"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, name: str) -> LayerFactors:
        found = self._store.read(name)
        signs = 1.0 - 2.0 * (torch.arange(len(found.S)) % 2)
        return LayerFactors(found.U * signs, found.S, signs[:, None] * found.Vh)


@pytest.mark.parametrize("regime", REGIMES)
def test_entries_follow_the_signs_of_another_decomposition(work: Path, regime: str) -> None:
    tuned = svftool.read_tuned(named(work, regime))
    with open_factors(work / "factors") as store:
        other = Flipped(store)
        turned = check_tuned(tuned, other)  # type: ignore[arg-type]
        assert check_tuned(tuned, store) is tuned
        for name in tuned.S:
            found = []
            for file, owner in ((tuned, store), (turned, other)):
                factors = owner.read(name)
                U, S, Vh = (x.double() for x in (factors.U, factors.S, factors.Vh))
                left, right = file.change(name).product(U, S, Vh)
                found.append(left @ right)
            torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    if regime.startswith("entries"):
        assert any(
            not torch.equal(turned.parts[n]["value"], tuned.parts[n]["value"]) for n in tuned.S
        )


def test_entries_on_other_vectors_are_refused(work: Path) -> None:
    tuned = svftool.read_tuned(named(work, "core:3"))

    class Turned(Flipped):
        def read(self, name: str) -> LayerFactors:
            found = self._store.read(name)
            order = torch.arange(len(found.S)).roll(1)
            return LayerFactors(found.U[:, order], found.S, found.Vh[order])

    with (
        open_factors(work / "factors") as store,
        pytest.raises(FactorsError, match="other singular"),
    ):
        check_tuned(tuned, Turned(store))  # type: ignore[arg-type]


def test_mixtures_sum_what_adds_up(work: Path, tmp_path: Path) -> None:
    files = [named(work, one) for one in ("entries:2x:random", "core:3", "salt:1")]
    weights = (0.5, -0.25, 2.0)
    given = [f"{file}@{weight}" for file, weight in zip(files, weights, strict=True)]
    dense = merged(work, *given, output=tmp_path / "m.safetensors")
    base = network().state_dict()
    names = list(svftool.read_tuned(files[0]).S)
    for name in names:
        total = base[name].double()
        for file, weight in zip(files, weights, strict=True):
            total = total + weight * change_of(work, file, name)
        torch.testing.assert_close(dense[name], total.float(), rtol=3e-7, atol=1e-9)
    svftool.merge(work / "factors", given, output=tmp_path / "m.svf.safetensors", verify=True)
    again = merged(work, str(tmp_path / "m.svf.safetensors"), output=tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], dense[name]) for name in dense)
    live = network()
    svftool.attach(live, work / "factors")
    svftool.load_tuned(live, dict(zip(map(str, files), weights, strict=True)))
    assert all(torch.equal(live.state_dict()[name], dense[name]) for name in names)


def test_scales_are_summed_as_changes_and_only_in_dense_outputs(work: Path, tmp_path: Path) -> None:
    files = [named(work, one) for one in ("svf+scale", "rows", "core:3")]
    given = [f"{file}@0.5" for file in files]
    dense = merged(work, *given, output=tmp_path / "m.safetensors")
    base = network().state_dict()
    for name in svftool.read_tuned(files[0]).S:
        total = base[name].double() + 0.5 * sum(change_of(work, file, name) for file in files)
        torch.testing.assert_close(dense[name], total.float(), rtol=3e-7, atol=1e-9)
    with pytest.raises(FactorsError, match="do not add up in a tuned file, expected one file"):
        svftool.merge(work / "factors", given, output=tmp_path / "m.svf.safetensors")
    assert not (tmp_path / "m.svf.safetensors").exists()
    alone = merged(work, str(files[0]), output=tmp_path / "one.safetensors")
    svftool.merge(work / "factors", [files[0]], output=tmp_path / "one.svf.safetensors")
    again = merged(work, str(tmp_path / "one.svf.safetensors"), output=tmp_path / "two.safetensors")
    assert all(torch.equal(again[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("index", torch.tensor([0], dtype=torch.int32), "places beside the diagonal"),
        ("index", torch.tensor([10**6]), "places beside the diagonal"),
        ("value", torch.tensor([torch.nan]), "finite floating numbers"),
        ("value", torch.ones(2), "ones that belong together"),
        ("row", torch.ones(8, 2), "finite floating numbers"),
        ("row", torch.ones(3), "row of 3, expected 8"),
    ],
)
def test_broken_parts_are_refused(
    work: Path, tmp_path: Path, part: str, value: Tensor, said: str
) -> None:
    sound = {"index": torch.tensor([1]), "value": torch.ones(1), "row": torch.ones(8) * 2}
    file = tmp_path / "x.svf.safetensors"
    with open_factors(work / "factors") as store:
        S = {"0.weight": store.read_S("0.weight")}
        write_tuned(file, store=store, S=S, parts={"0.weight": sound | {part: value}}, dtype=None)
        with pytest.raises(FactorsError, match=said) as refused:
            check_tuned(svftool.read_tuned(file), store)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("start", ["base.safetensors", "factors"])
@pytest.mark.parametrize("regime", REGIMES)
def test_inspect_reads_a_file_as_the_weights_that_it_makes(
    work: Path, tmp_path: Path, regime: str, start: str
) -> None:
    merged(work, str(named(work, regime)), output=tmp_path / "m.safetensors")
    by_file, by_weights = (
        audit(work / start, [one]).comparisons[0]
        for one in (named(work, regime), tmp_path / "m.safetensors")
    )
    assert [row.name for row in by_file.rows] == [row.name for row in by_weights.rows]
    drifts = [
        [row.measured.change["weight_drift"] for row in one.rows if row.is_matrix]
        for one in (by_file, by_weights)
    ]
    assert len(drifts[0]) == 3
    torch.testing.assert_close(drifts[0], drifts[1], rtol=1e-4, atol=1e-7)


def test_two_files_are_compared_without_their_base_where_that_can_be(work: Path) -> None:
    def M(file: str, name: str) -> Tensor:
        tuned = svftool.read_tuned(named(work, file))
        change = tuned.change(name)
        found = torch.diag(tuned.S[name].double())
        return found if change.index is None else found + change.beside(len(found))

    pair = audit(named(work, "core:3"), [named(work, "entries:9:band")]).comparisons[0]
    alone = audit(named(work, "core:3"), []).comparisons[0]
    assert len(pair.rows) == len(alone.rows) == 3
    for row in pair.rows:
        one, other = M("core:3", row.name), M("entries:9:band", row.name)
        drift = float((other - one).norm() / one.norm())
        assert row.measured.change["weight_drift"] == pytest.approx(drift, rel=1e-4)
    for row in alone.rows:
        start = torch.diag(svftool.read_tuned(named(work, "core:3")).S_base[row.name].double())
        drift = float((M("core:3", row.name) - start).norm() / start.norm())
        assert row.measured.change["weight_drift"] == pytest.approx(drift, rel=1e-4)
    scaled = audit(named(work, "svf+scale"), [named(work, "core:3")]).comparisons[0]
    assert not scaled.rows
    assert "need the base" in scaled.unmatched_base[0].reason
    same = audit(named(work, "svf+scale"), [named(work, "svf+scale")]).comparisons[0]
    assert same.rows


@pytest.mark.parametrize("regime", ["svf+scale", "core:3", "salt:1", "entries:9:band"])
def test_convert_makes_the_same_change_as_an_adapter(
    work: Path, tmp_path: Path, regime: str
) -> None:
    result = convert(
        named(work, regime),
        output=tmp_path / "a.safetensors",
        base=work / "factors",
        layout="kohya",
    )
    assert result.error < 1e-6
    made = {one.name: one for one in result.layers}
    assert "4.weight" in made
    if regime == "core:3":
        assert made["4.weight"].rank == 3
    cut = convert(
        named(work, regime),
        output=tmp_path / "b.safetensors",
        base=work / "factors",
        layout="kohya",
        rank="1",
    )
    for row in cut.layers:
        change = change_of(work, named(work, regime), row.name).flatten(1)
        S = torch.linalg.svdvals(change)
        assert row.error == pytest.approx(float(S[1:].norm() / S.norm()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("regime", "form", "least"),
    [
        ("entries:2x:random", "entries:2x", 1e-6), ("core:3", "core:3", 1e-6),
        ("rows", "rows", 1e-6), ("salt:1", "salt:1", 0.35), ("svf+scale", "svf+scale", 1e-2),
        ("entries:9:band", "entries:9:band", 1e-6),
    ],
)  # fmt: skip
def test_extract_brings_a_change_back_into_its_regime(
    work: Path, tmp_path: Path, regime: str, form: str, least: float
) -> None:
    merged(work, str(named(work, regime)), output=tmp_path / "m.safetensors")
    output = tmp_path / "x.svf.safetensors"
    found = extract(work / "factors", tmp_path / "m.safetensors", output=output, form=form)
    assert found.form == form
    assert found.error < least
    plain = extract(
        work / "factors", tmp_path / "m.safetensors", output=tmp_path / "s.svf.safetensors"
    )
    assert found.error < plain.error
    dense = merged(work, str(output), output=tmp_path / "again.safetensors")
    wanted, base = load_file(tmp_path / "m.safetensors"), network().state_dict()
    rest = sum(float((dense[n] - wanted[n]).square().sum()) for n in svftool.read_tuned(output).S)
    size = sum(float((base[n] - wanted[n]).square().sum()) for n in svftool.read_tuned(output).S)
    assert (rest / size) ** 0.5 == pytest.approx(found.error, rel=1e-3, abs=2e-6)


def test_the_best_form_is_the_nearest_of_those_that_are_small_enough(
    work: Path, tmp_path: Path
) -> None:
    merged(work, str(named(work, "rows")), output=tmp_path / "m.safetensors")
    found = extract(
        work / "factors",
        tmp_path / "m.safetensors",
        output=tmp_path / "x.svf.safetensors",
        form="best:4x",
    )
    errors = {one.form: one.error for one in found.candidates}
    assert {"svf", "rows", "entries:4x", "core:4x"} <= errors.keys()
    assert found.form == "rows"
    assert found.error == min(errors.values()) < 1e-6
    assert [one.form for one in found.candidates if one.chosen] == ["rows"]
    assert all(one.numbers <= 4.4 * (8 + 8 + 12) for one in found.candidates)
    with pytest.raises(UsageError, match="expected one of svf, svf"):
        extract(work / "factors", work / "base.safetensors", output=tmp_path / "y.svf.safetensors",
                form="entries:2x:random")  # fmt: skip


def test_stacks_have_parts_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Experts().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    svftool.decompose(tmp_path / "base.safetensors", tmp_path / "factors", views=["stack=batch"])
    torch.manual_seed(0)
    model = Experts()
    x = torch.randn(4, 4)
    with open_factors(tmp_path / "factors") as store:
        slopes = weight_gradients(model, store, [lambda: model(x).square().sum()])
    attached = svftool.attach(model, tmp_path / "factors", regime="entries:5", gradients=slopes)
    randomise(attached)
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    svftool.merge(
        tmp_path / "factors", [tmp_path / "x.svf.safetensors"], output=tmp_path / "m.safetensors"
    )
    assert torch.equal(load_file(tmp_path / "m.safetensors")["stack"], model.state_dict()["stack"])
    found = extract(
        tmp_path / "factors",
        tmp_path / "m.safetensors",
        output=tmp_path / "y.svf.safetensors",
        form="entries:5",
    )
    assert found.error < 1e-5
    other = Experts()
    other.load_state_dict(load_file(tmp_path / "base.safetensors"))
    svftool.attach(other, tmp_path / "factors")
    svftool.load_tuned(other, tmp_path / "y.svf.safetensors")
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    index = svftool.read_tuned(tmp_path / "y.svf.safetensors").parts["stack"]["index"]
    assert len(index) == 3
