"""``inspect --screen``: the word of the full audit, or none; never another one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_audit_verdicts import DTYPES, SHAPES, SIZELESS, SIZES, TRUTH, tune, verdict, weight
from typer.testing import CliRunner

from svftool.auditing import BaseMatrix, Evidence, ScreenedBase, Tuned, choose_metrics, judge
from svftool.auditing.compare import Changes
from svftool.auditing.rearranging import proven_rearrangement
from svftool.auditing.screen import screen
from svftool.auditing.verdicts import FULL, LOW_RANK, SCREENED, SPECTRUM_ONLY, UNRELATED
from svftool.cli import app
from svftool.engine import Job
from svftool.errors import UsageError
from svftool.numerics.threads import ThreadPool, one_thread
from svftool.progress import Silent
from svftool.stages.audit import _say_estimates as say_estimates
from svftool.stages.audit import audit

LARGE = [(150, 150), (140, 300), (400, 160)]
CONTROLS = [
    (shape, dtype, kind, size, decaying)
    for shape, dtype, kind, size, decaying in itertools.product(
        SHAPES, DTYPES, TRUTH, SIZES, (True, False)
    )
    if kind not in SIZELESS or size == SIZES[0]
]
METRICS = choose_metrics(None, screen=True)


def fast(W: torch.Tensor, T: torch.Tensor) -> Evidence:
    """Return the evidence of ``--fast``."""
    with ThreadPool(1) as pool:
        base = BaseMatrix(W, choose_metrics(None, fast=True), vectors=False, pool=pool)
        found = base.against(Tuned(T)).evidence
    assert found is not None
    return found


def wrong(
    controls: list[tuple[object, ...]], look: Callable[[torch.Tensor, torch.Tensor], Evidence]
) -> tuple[list[object], int]:
    """Return the controls that a quick look gives another word, and how many it gives a word."""
    bad, told = [], 0
    for shape, dtype, kind, size, decaying in controls:
        with one_thread():
            W = weight(*shape, decaying=decaying).to(dtype)  # type: ignore[misc]
            T = tune(W, kind, size).to(dtype)  # type: ignore[arg-type, call-overload]
            found, full = judge(look(W, T)), verdict(W, T)
        told += found.name != SCREENED
        if found.name != SCREENED and found.text != full.text:
            bad.append((shape, dtype, kind, size, decaying, found, full))
    return bad, told


@pytest.mark.parametrize("exact_side", [0, 128])
def test_a_sample_of_the_controls_has_the_same_word_or_none(exact_side: int) -> None:
    controls = CONTROLS[exact_side // 64 :: 9]
    bad, told = wrong(controls, partial(screen, exact_side=exact_side))
    assert not bad
    assert told > 0.5 * len(controls)


def test_singular_values_alone_give_the_same_word_or_none() -> None:
    controls = CONTROLS[4::9]
    bad, told = wrong(controls, fast)
    assert not bad
    assert told > 0.5 * len(controls)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [SHAPES, LARGE])
@pytest.mark.parametrize("exact_side", [0, 128])
def test_all_controls_have_the_same_word_or_none(
    shapes: list[tuple[int, int]], exact_side: int
) -> None:
    places = dict(zip(SHAPES, shapes, strict=True))
    controls = [(places[shape], *rest) for shape, *rest in CONTROLS]
    bad, told = wrong(controls, partial(screen, exact_side=exact_side))
    assert not bad
    assert told > 0.6 * len(controls)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added(W: torch.Tensor, D: torch.Tensor, size: float) -> torch.Tensor:
    return W + size * W.norm() / D.norm() * D


@pytest.mark.parametrize(("rank", "shape"), [(1, (200, 300)), (12, (300, 200)), (64, (260, 400))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_that_is_proven_is_the_rank(
    rank: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = normal(*shape).to(dtype)
    D = normal(shape[0], rank, seed=1) @ normal(rank, shape[1], seed=2)
    found = screen(W, added(W.float(), D, 0.3).to(dtype))
    assert judge(found).text == f"low rank {rank}"
    # Rows of a change that has no low rank are told from it.
    dense = screen(W, added(W.float(), D + 0.2 * normal(*shape, seed=3), 0.3).to(dtype))
    assert judge(dense).name == SCREENED
    assert dense.rank is None


def spectral(W: torch.Tensor, seed: int = 5) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * (S * normal(len(S), seed=seed))) @ Vh


@pytest.mark.parametrize("part", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("decaying", [True, False])
def test_a_change_that_is_mostly_of_singular_values_is_not_called_so(
    part: float, decaying: bool
) -> None:
    W = weight(120, 160, decaying=decaying)
    D, rest = spectral(W), normal(120, 160, seed=6)
    T = added(W, D / D.norm() + part * rest / rest.norm(), 0.05)
    assert judge(screen(W, T)).name == SCREENED
    assert verdict(W, T).name == FULL


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_a_symmetric_change_of_a_nearly_orthogonal_base_is_not_called_spectral(
    spread: float,
) -> None:
    """Where singular values are alike, symmetry says little."""
    U, _, Vh = torch.linalg.svd(normal(60, 60))
    W = (U * (1.0 + spread * normal(60, seed=1))) @ Vh
    A = normal(60, 60, seed=2)
    T = added(W, U @ (A + A.mT) @ Vh, 0.05)
    assert judge(screen(W, T)).name in (SCREENED, verdict(W, T).name)


def test_a_rotation_is_not_called_unrelated() -> None:
    W = weight(64, 80, decaying=True)
    Q = torch.linalg.qr(normal(64, 64).double()).Q
    T = (Q @ W.double()).float()
    found = screen(W, T)
    assert found.screened is not None
    assert found.screened.may_be_rotated
    assert judge(found).name == SCREENED
    assert judge(screen(W, 1.1 * T)).name == UNRELATED


def test_entries_that_were_moved_are_shown_one_by_one() -> None:
    W = weight(12, 20, decaying=True)
    rows, columns = torch.randperm(12), torch.randperm(20)
    signs = torch.where(normal(12) > 0, 1.0, -1.0)[:, None]
    moved = signs * W[rows][:, columns]
    assert "permuted" in proven_rearrangement(W, moved)
    assert "flipped" in proven_rearrangement(W, -W)
    square = weight(16, 16, decaying=True)
    assert "transposed" in proven_rearrangement(square, square.mT.contiguous())
    # These keep all sizes, or all lengths of rows, and not the singular values.
    assert not proven_rearrangement(W, torch.where(normal(12, 20) > 0, W, -W))
    assert not proven_rearrangement(W, torch.stack([row[torch.randperm(20)] for row in W]))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_entries_changes_no_word(scale: float, dtype: torch.dtype) -> None:
    W = weight(40, 50, decaying=True).double()
    for kind in ("svf", "lora2", "full", "rows"):
        T = tune(W, kind, 0.1)
        one, two = (judge(screen((W * s).to(dtype), (T * s).to(dtype))) for s in (1.0, scale))
        assert one.name == two.name


@pytest.mark.parametrize("factor", [1.1, -1.1])
def test_no_cosine_is_beyond_one(factor: float) -> None:
    sides = [normal(9, 14, seed=seed) for seed in range(20)]
    cosines = [screen(W, W * factor).cosine for W in sides]
    assert all(one is not None and abs(one) <= 1.0 for one in cosines)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_broken_is_found(bad: float) -> None:
    W, T = weight(8, 9, decaying=False), weight(8, 9, decaying=False)
    T[1, 2] = bad
    for before, after, side in ((W, T, "the fine-tune"), (T, W, "the base"), (T, T, "the base")):
        found = ScreenedBase(before, METRICS).against(Tuned(after)).evidence
        assert found is not None
        assert side in found.broken


def both(base: torch.Tensor, tuned: Tuned) -> tuple[Evidence, Evidence]:
    with ThreadPool(0) as pool:
        full = BaseMatrix(base, choose_metrics(None), vectors=True, pool=pool).against(tuned)
    found = ScreenedBase(base, METRICS).against(tuned)
    for name, value in found.measured.change.items():
        assert value == pytest.approx(full.measured.change[name], rel=1e-5)
    assert found.evidence is not None
    assert full.evidence is not None
    return found.evidence, full.evidence


def test_batches_and_changes_are_as_without_a_screen() -> None:
    W = torch.stack([weight(20, 30, decaying=True) + i * 0.001 for i in range(3)])
    D = normal(20, 2, seed=1) @ normal(2, 30, seed=2)
    for tuned in (Tuned(W + 0.01 * D), Tuned(change=Changes(3, lambda i: 0.01 * D.double()))):
        found, full = both(W, tuned)
        assert judge(found).text == judge(full).text == "low rank 2"
    found, full = both(W[0].bfloat16(), Tuned(W[0]))
    assert judge(found).text == judge(full).text == "rounding noise"


# The command.


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    W, D = weight(40, 60, decaying=True), normal(40, 2, seed=1) @ normal(2, 60, seed=2)
    base = {"a.weight": W, "b.weight": W.clone(), "c.weight": W.clone(), "n.bias": torch.ones(4)}
    tuned = base | {"a.weight": added(W, D, 0.1), "b.weight": added(W, normal(40, 60), 0.1)}
    return write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", tuned)


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, words)))
    return result.exit_code, result.output


def test_a_document_says_that_it_was_screened(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(
        app, ["inspect", *map(str, pair), "--screen", "--json", "--html", str(page)]
    )
    one = json.loads(result.stdout)["comparisons"][0]
    assert one["screened"] is True
    assert one["verdict"] == SCREENED
    assert "not looked at" in one["headline"]
    rows = {row["name"]: row for row in one["layers"]}
    assert [rows[f"{k}.weight"]["verdict"] for k in "abc"] == [LOW_RANK, SCREENED, "untouched"]
    assert rows["a.weight"]["change_rank"] == 2
    assert rows["b.weight"]["change_rank"] is None
    assert rows["b.weight"]["weight_drift"] == pytest.approx(0.1, rel=1e-4)
    assert "not looked at" in page.read_text()
    code, shown = run("inspect", *pair, "--screen", "--all")
    assert code == 0
    assert "low rank 2" in shown


@pytest.mark.parametrize(
    ("form", "words"),
    [("t.svf.safetensors", []), ("lora", ["--as", "lora"]), ("t.safetensors", ["--as", "lora",
     "--layout", "comfy"])],
)  # fmt: skip
def test_files_that_leave_out_what_they_do_not_change_are_screened(
    form: str, words: list[str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    assert run("decompose", base, "-o", tmp_path / "factors")[0] == 0
    origin = base if words else tmp_path / "factors"
    code, shown = run("extract", origin, tuned, "-o", tmp_path / form, *words)
    assert code == 0, shown
    found = CliRunner().invoke(
        app, ["inspect", str(base), str(tmp_path / form), "--screen", "--json"]
    )
    assert found.exit_code == 0, found.output
    rows = {row["name"]: row for row in json.loads(found.stdout)["comparisons"][0]["layers"]}
    assert rows["c.weight"]["verdict"] == "untouched"
    assert rows["c.weight"]["weight_drift"] == 0.0
    assert rows["a.weight"]["weight_drift"] > 0.0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--fail-above", "weight_drift=0.05"], 10, ""),
        (["--fail-above", "weight_drift=0.2"], 0, ""),
        (["--fail-above", "change_rank=8"], 10, "cannot tell"),
        (["--fail-above", "svf_share=0.5"], 2, "weight_drift, cosine"),
        (["--sort", "intruders"], 2, "weight_drift, cosine"),
        (["--metrics", "cka"], 2, "weight_drift, cosine"),
        (["--fast"], 2, "one of the two"),
    ],
)
def test_gates_hold_what_was_measured(
    words: list[str], code: int, said: str, pair: tuple[Path, Path]
) -> None:
    found, shown = run("inspect", *pair, "--screen", *words)
    assert found == code, shown
    assert said in " ".join(shown.split())


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (f'deny = ["{FULL}"]', 10),
        (f'deny = ["{SPECTRUM_ONLY}"]', 10),
        ('deny = ["broken"]', 0),
        (f'allow = ["untouched", "low rank", "{FULL}"]', 10),
        (f'allow = ["untouched", "low rank", "{SCREENED}"]', 0),
        ("limits = { intruders = 2 }", 2),
        ("limits = { weight_drift = 0.5 }", 0),
    ],
)
def test_a_policy_takes_what_was_not_told_for_all_that_it_may_be(
    rule: str, code: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[[rule]]\nlayers = "*.weight"\n{rule}\n')
    assert run("inspect", *pair, "--screen", "--policy", policy)[0] == code


def test_a_base_alone_is_not_screened(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="Name a fine-tune"):
        audit(pair[0], screen=True)
    with pytest.raises(UsageError, match="not measured by --screen"):
        audit(pair[0], [pair[1]], metrics=["cka"], screen=True)


def test_a_long_comparison_says_what_would_be_quicker() -> None:
    said: list[str] = []

    class Listening(Silent):
        def note(self, message: str) -> None:
            said.append(message)

    say_estimates([Job("w", (64, 64))], Listening())
    assert not said
    say_estimates([Job(f"w{i}", (14336, 4096)) for i in range(200)], Listening())
    assert "--screen takes about" in said[0]
    assert "--fast about" in said[0]


def test_the_cosine_of_a_side_that_is_far_the_longer_is_kept() -> None:
    base = torch.randn(160, 200, generator=torch.Generator().manual_seed(4))
    for factor in (1e-5, 1e5):
        assert screen(base, base * factor).cosine == pytest.approx(1.0, abs=1e-6)
