"""Each method against a few lines of numpy, and what holds of it whatever the changes are."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from svftool.choices.merging import METHODS, parse_method
from svftool.errors import UsageError
from svftool.merging import Inputs, clash_of, combine_deltas
from svftool.merging.interference import _krylov
from svftool.merging.spectra import directions, nearest_orthogonal
from svftool.merging.spectral import svc
from svftool.numerics import ThreadPool

POOL = ThreadPool()
TSV = parse_method("tsv")


def changes(count: int = 3, m: int = 12, n: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, m, n, generator=torch.Generator().manual_seed(seed))


def merged(spec: str, deltas: torch.Tensor) -> torch.Tensor:
    return combine_deltas(deltas, parse_method(spec), POOL).delta.double()


def arrays(deltas: torch.Tensor) -> list[np.ndarray]:
    return [one.double().numpy() for one in deltas]


def thin(d: np.ndarray, k: int | None = None):
    u, s, v = np.linalg.svd(d, full_matrices=False)
    return u[:, :k], s[:k], v[:k]


def polar(a: np.ndarray) -> np.ndarray:
    p, _, q = thin(a)
    return p @ q


# The same in a few lines of numpy, from the papers' formulas.


def np_slerp(ds, t=0.3):
    angle = np.arccos((ds[0] * ds[1]).sum() / np.linalg.norm(ds[0]) / np.linalg.norm(ds[1]))
    return (np.sin((1 - t) * angle) * ds[0] + np.sin(t * angle) * ds[1]) / np.sin(angle)


def np_ties(ds, density=0.3):
    kept = []
    for d in ds:
        cut = np.sort(np.abs(d).ravel())[-int(density * d.size)]
        kept.append(np.where(np.abs(d) >= cut, d, 0))
    sign = np.sign(sum(kept))
    agree = [np.where(np.sign(k) == sign, k, 0) for k in kept]
    return sum(agree) / np.maximum(sum((a != 0).astype(float) for a in agree), 1)


def np_breadcrumbs(ds, bottom=0.5, top=0.1):
    total = 0
    for d in ds:
        order = np.argsort(np.abs(d).ravel())
        mask = np.zeros(d.size)
        mask[order[int(bottom * d.size) : d.size - int(top * d.size)]] = 1
        total = total + d * mask.reshape(d.shape)
    return total


def np_stock(ds):
    cosines = [
        (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(ds)
        for b in ds[i + 1 :]
    ]
    c, count = max(0.0, np.mean(cosines)), len(ds)
    return count * c / (1 + (count - 1) * c) * np.mean(ds, axis=0)


def np_consensus(ds, lam=0.4, agree=2):
    total = sum(ds)
    return total * (sum(np.abs(d) > lam * np.abs(total - d) for d in ds) >= agree)


def np_tsv(ds):
    parts = [thin(d, min(d.shape) // len(ds)) for d in ds]
    left = polar(np.concatenate([u for u, _, _ in parts], 1))
    right = polar(np.concatenate([v for _, _, v in parts], 0))
    return left @ np.diag(np.concatenate([s for _, s, _ in parts])) @ right


def np_iso_c(ds):
    u, s, v = thin(sum(ds))
    return s.mean() * u @ v


def np_iso_cts(ds, common=0.6):
    side, count = min(ds[0].shape), len(ds)
    own = round((side - int(side * common)) / count)
    u, s, v = thin(sum(ds), side - own * count)
    parts = [(u, s, v)] + [thin(d - u @ u.T @ d, own) for d in ds]
    left = polar(np.concatenate([a for a, _, _ in parts], 1))
    right = polar(np.concatenate([c for _, _, c in parts], 0))
    return np.concatenate([b for _, b, _ in parts]).mean() * left @ right


def np_knots(ds, density=0.3):
    u, s, v = thin(np.concatenate(ds, 1))
    return u @ np_ties([s[:, None] * part for part in np.split(v, len(ds), 1)], density)


def np_svc(ds, alpha=None):
    u, s, v = thin(sum(ds))
    gain = []
    for r in range(len(s)):
        own = [u[:, r] @ d for d in ds]
        held = [(s[r] * v[r]) @ a / (a @ a) for a in own]
        gain.append(len(ds) / sum(max(alpha or 1 / len(ds), h) for h in held))
    return u @ np.diag(np.array(gain) * s) @ v


REFERENCES = {
    "linear": sum,
    "slerp:t=0.3": np_slerp,
    "ties:density=0.3": np_ties,
    "breadcrumbs:bottom=0.5,top=0.1": np_breadcrumbs,
    "model-stock": np_stock,
    "consensus-ta": np_consensus,
    "consensus-ta:lambda=0.2,agree=3": lambda ds: np_consensus(ds, 0.2, 3),
    "tsv": np_tsv,
    "iso-c": np_iso_c,
    "iso-cts:common=0.6": np_iso_cts,
    "knots-ties:density=0.3": np_knots,
    "svc": np_svc,
    "svc:alpha=1": lambda ds: np_svc(ds, 1.0),
}


@pytest.mark.parametrize("spec", REFERENCES)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_method_is_its_formula(spec: str, shape: tuple[int, int]) -> None:
    shared = changes(1, *shape, seed=9)  # so that the inputs have something in common
    deltas = changes(2 if spec.startswith("slerp") else 3, *shape) + shared
    expected = REFERENCES[spec](arrays(deltas))
    found = merged(spec, deltas).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # The others differ: the comparison can fail.
    assert np.abs(found - 0.5 * sum(arrays(deltas))).max() > 1e-3 * np.abs(expected).max()


def test_every_method_has_a_reference() -> None:
    assert {spec.partition(":")[0] for spec in REFERENCES} | {"dare-linear", "dare-ties"} == set(
        METHODS
    )


@pytest.mark.parametrize("spec", ["tsv", "iso-c", "iso-cts", "knots-ties", "svc"])
def test_large_matrices_go_another_way_to_the_same_result(spec: str) -> None:
    deltas = changes(2, 170, 200)
    expected = {
        "tsv": np_tsv, "iso-c": np_iso_c, "svc": np_svc,
        "iso-cts": lambda ds: np_iso_cts(ds, 0.8), "knots-ties": lambda ds: np_knots(ds, 0.2),
    }[spec](arrays(deltas))  # fmt: skip
    found = merged(spec, deltas).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def several(spec: str) -> int:
    return 2 if spec == "slerp" else 3


@pytest.mark.parametrize("spec", METHODS)
def test_contributions_sum_to_the_merged_change(spec: str) -> None:
    deltas = changes(several(spec)) + changes(1, seed=9)
    found = combine_deltas(deltas, parse_method(f"{spec}:scale=0.7"), POOL)
    parts = sum(found.part(index).double() for index in range(len(deltas)))
    torch.testing.assert_close(parts, found.delta.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", METHODS)
def test_the_order_of_the_inputs_does_not_matter(spec: str) -> None:
    deltas = changes(several(spec)) + changes(1, seed=9)
    torch.testing.assert_close(
        merged(spec, deltas.flip(0)), merged(spec, deltas), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "spec",
    ["linear", "ties:density=1", "breadcrumbs:bottom=0,top=0", "dare-linear:density=1", "tsv",
     "dare-ties:density=1", "knots-ties:density=1", "svc", "consensus-ta:agree=1", "model-stock"],
)  # fmt: skip
def test_one_change_stays_as_it_is(spec: str) -> None:
    one = changes(1)
    torch.testing.assert_close(merged(spec, one), one[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "times"),
    [("linear", 3), ("ties:density=1", 1), ("model-stock", 1), ("consensus-ta", 3), ("svc", 1),
     ("knots-ties:density=1", 1)],
)  # fmt: skip
def test_equal_changes(spec: str, times: int) -> None:
    one = changes(1)
    found = merged(spec, one.expand(3, -1, -1).clone())
    torch.testing.assert_close(found, times * one[0].double(), rtol=1e-5, atol=1e-5)


def orthogonal() -> torch.Tensor:
    """Three changes of rank 2 whose left and right spaces are orthogonal."""
    U, V = (torch.linalg.qr(changes(1, 12, 12, seed=s)[0].double()).Q for s in (1, 2))
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    return torch.stack([(U[:, i : i + 2] * values) @ V[:, i : i + 2].mT for i in (0, 2, 4)])


@pytest.mark.parametrize("spec", ["linear", "tsv", "svc", "svc:alpha=1"])
def test_orthogonal_changes_are_added_up(spec: str) -> None:
    deltas = orthogonal()
    torch.testing.assert_close(merged(spec, deltas), deltas.sum(0), rtol=1e-6, atol=1e-6)


def test_isotropy_adds_no_directions_that_no_input_has() -> None:
    deltas = orthogonal()
    for spec in ("iso-c", "iso-cts"):
        values = torch.linalg.svdvals(merged(spec, deltas))
        torch.testing.assert_close(values[:6], torch.full((6,), 2.0, dtype=torch.float64))
        assert float(values[6:].max()) < 1e-9
    assert float(merged("model-stock", deltas).abs().max()) < 1e-6  # nothing agrees


def test_random_choices_follow_from_the_seed_and_keep_the_mean() -> None:
    deltas = changes(2, 100, 100)
    one, same = (merged("dare-linear:density=0.25,seed=3", deltas) for _ in range(2))
    other = merged("dare-linear:density=0.25,seed=4", deltas)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    kept = merged("dare-linear:density=0.25", deltas[:1])
    there = kept != 0
    assert float(there.double().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(kept[there], 4 * deltas[0].double()[there])
    # Equal changes have choices of their own.
    twice = merged("dare-linear:density=0.25", deltas[:1].expand(2, -1, -1).clone())
    assert float((twice != 0).double().mean()) == pytest.approx(1 - 0.75**2, abs=0.03)


def test_a_vector_is_calibrated_as_a_matrix_of_one_row() -> None:
    a, b = changes(2, 1, 20)[:, 0]
    total = (a + b).double()
    held = [float(total @ d.double() / (d.double() @ d.double())) for d in (a, b)]
    expected = 2 / sum(max(0.5, one) for one in held) * total
    found = svc(torch.stack([a, b])[:, None]).delta[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_directions_leave_rounding_out_and_undo_scaling() -> None:
    U = torch.linalg.qr(changes(1, 300, 4, seed=1)[0].double()).Q
    V = torch.linalg.qr(changes(1, 200, 4, seed=2)[0].double()).Q
    matrix = (U * torch.tensor([4.0, 2.0, 1.0, 1e-9], dtype=torch.float64)) @ V.mT
    for scale in (1.0, 1e-20):
        found = directions(matrix * scale, POOL)
        assert len(found.S) == 3
        torch.testing.assert_close(
            (found.U * found.S) @ found.Vh / scale, matrix, atol=1e-8, rtol=0
        )
    assert directions(torch.zeros(5, 7), POOL).S.shape == (0,)


def test_dependent_columns_get_a_fixed_orthogonal_matrix() -> None:
    one = torch.linalg.qr(changes(1, 10, 3, seed=1)[0].double()).Q
    twice = torch.cat([one, one], dim=1)
    # The halves share the space: together they are one projection onto it.
    found = nearest_orthogonal(twice, POOL)
    torch.testing.assert_close(found @ found.mT, one @ one.mT)
    torch.testing.assert_close(found[:, :3], one / 2**0.5)


# Interference.


def clash(deltas: torch.Tensor):
    inputs = Inputs.of(deltas, POOL)
    return clash_of(inputs, deltas.sum(0), POOL, inputs.largest)


def test_interference_of_known_changes() -> None:
    apart, equal = clash(orthogonal()), clash(changes(1).expand(2, -1, -1).clone())
    assert (apart.cosine, apart.overlap) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert apart.inflation == pytest.approx(1.0)
    assert (equal.cosine, equal.overlap) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (equal.sign_conflicts, equal.inflation) == (0.0, pytest.approx(2.0))
    against = clash(torch.stack([changes(1)[0], -changes(1)[0]]))
    assert (against.cosine, against.sign_conflicts) == (pytest.approx(-1.0), 1.0)
    assert against.inflation == pytest.approx(0.0, abs=1e-9)


def test_interference_in_numpy() -> None:
    deltas = changes(3, 12, 20) + changes(1, seed=9)
    ds = arrays(deltas)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = [
        (ds[a] * ds[b]).sum() / np.linalg.norm(ds[a]) / np.linalg.norm(ds[b]) for a, b in pairs
    ]
    sides = [thin(d, 8) for d in ds]
    overlap = [
        (np.sum((sides[a][0].T @ sides[b][0]) ** 2) + np.sum((sides[a][2] @ sides[b][2].T) ** 2))
        / 16
        for a, b in pairs
    ]
    signs = [np.mean(np.sign(ds[a]) != np.sign(ds[b])) for a, b in pairs]
    tops = [s[0] for _, s, _ in sides]
    found = clash(deltas)
    assert found.cosine == pytest.approx(np.mean(cosine), rel=1e-5)
    assert found.overlap == pytest.approx(np.mean(overlap), rel=1e-5)
    assert found.sign_conflicts == pytest.approx(np.mean(signs), rel=1e-5)
    assert found.inflation == pytest.approx(thin(sum(ds))[1][0] / np.mean(tops), rel=1e-5)
    assert found.inflation_of_largest == pytest.approx(thin(sum(ds))[1][0] / max(tops), rel=1e-5)


def test_the_iteration_knows_the_largest_value_of_a_flat_spectrum() -> None:
    matrix = changes(1, 300, 200)[0]
    _, S, _ = _krylov(matrix)
    assert float(S[0]) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-2)


def test_ties_leaves_no_sign_conflicts() -> None:
    deltas = changes(3)
    found = combine_deltas(deltas, parse_method("ties"), POOL)
    parts = torch.stack([found.part(index) for index in range(3)])
    assert Inputs.of(parts, POOL).sign_conflicts.max() == 0.0
    assert Inputs.of(deltas, POOL).sign_conflicts.max() > 0.4


def test_tsv_makes_what_inputs_contribute_orthogonal() -> None:
    deltas = changes(3) + 3 * changes(1, seed=9)
    found = combine_deltas(deltas, parse_method("tsv"), POOL)
    before = clash(deltas)
    after = clash(torch.stack([found.part(index) for index in range(3)]))
    assert before.overlap > 0.3
    assert (after.overlap, after.cosine) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("spec", ["tsv", "tsv:scale=-0.5", "tsv:scale=0"])
def test_what_a_method_knows_of_its_singular_vectors_is_so(spec: str) -> None:
    deltas = changes(3, 40, 60) + changes(1, 40, 60, seed=9)
    found = combine_deltas(deltas, parse_method(spec), POOL)
    if spec.endswith("=0"):
        assert found.known is None
        return
    assert found.known is not None
    for index, one in enumerate(found.known.parts):
        torch.testing.assert_close(
            (one.U * one.S) @ one.Vh, found.part(index).double(), rtol=1e-5, atol=1e-5
        )
    looked = [Inputs.of(deltas, POOL, known) for known in (None, found.known.inputs)]
    parts = torch.stack([found.part(index) for index in range(3)]).double()
    largest = looked[0].largest
    afters = [
        clash_of(Inputs.of(parts, POOL), found.delta, POOL, largest),
        clash_of(
            Inputs.of(parts, POOL, found.known.parts), found.delta, POOL, largest, found.known.whole
        ),
    ]
    torch.testing.assert_close(looked[0].overlap, looked[1].overlap, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(looked[0].largest, looked[1].largest)
    assert afters[1].inflation == pytest.approx(afters[0].inflation)
    assert afters[1].overlap == pytest.approx(afters[0].overlap, abs=1e-6)


def test_vectors_that_inputs_share_leave_nothing_known() -> None:
    one = changes(1, 40, 60)[0]
    found = combine_deltas(torch.stack([one, one, changes(1, 40, 60, 1)[0]]), TSV, POOL)
    assert found.known is None  # the sides are no singular vectors
    few = combine_deltas(changes(3, 12, 20), TSV, POOL)
    assert few.known is None  # four of each are fewer than the report looks at


@pytest.mark.parametrize("spec", METHODS)
def test_contributions_that_are_shares_of_the_changes(spec: str) -> None:
    deltas = changes(several(spec)) + changes(1, seed=9)
    found = combine_deltas(deltas, parse_method(f"{spec}:scale=-0.7"), POOL)
    assert (found.share is not None) == (spec in ("linear", "model-stock"))
    if found.share is not None:
        inputs, parts = (
            Inputs.of(stack, POOL)
            for stack in (deltas, torch.stack([found.part(i) for i in range(len(deltas))]))
        )
        before = clash_of(inputs, deltas.sum(0), POOL, inputs.largest)
        after = clash_of(parts, found.delta, POOL, inputs.largest)
        assert asdict(before.times(found.share)) == pytest.approx(asdict(after), rel=1e-5)
        assert set(asdict(before.times(0.0)).values()) == {0.0}


def test_the_nearest_orthogonal_matrix_is_exact_on_either_side() -> None:
    columns = changes(1, 300, 200)[0].double()
    for one in (columns, columns.mT):
        found = nearest_orthogonal(one, POOL).numpy()
        assert np.abs(found - polar(one.numpy())).max() < 1e-11


# What is given on the command line.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tvs", "Did you mean 'tsv'?"),
        ("nothing-like-it", "expected one of linear"),
        ("ties:densty=0.2", "Did you mean 'density'?"),
        ("ties:density", "density=NUMBER"),
        ("ties:density=1.5", "from 1e-06 to 1"),
        ("ties:density=nan", "from 1e-06 to 1"),
        ("dare-ties:seed=0.5", "a whole number"),
        ("breadcrumbs:bottom=0.6,top=0.5", "leave nothing"),
        ("tsv:scale=1e9", "from -100 to 100"),
        ("", "expected one of"),
    ],
)
def test_a_wrong_method_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_method(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "inputs"), [("slerp", 3), ("slerp", 1), ("model-stock", 1)])
def test_a_number_of_inputs_that_a_method_does_not_take(name: str, inputs: int) -> None:
    with pytest.raises(UsageError, match=f"--method {name}: {inputs} input"):
        parse_method(name).check_count(inputs)
    parse_method("tsv").check_count(1)
