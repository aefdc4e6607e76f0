"""Verdicts on controls made here, where the truth is known, and on real fine-tunes."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svftool.auditing import (
    BaseMatrix,
    Evidence,
    Tuned,
    Verdict,
    choose_metrics,
    judge,
    judge_all,
)
from svftool.auditing.screen import screen
from svftool.auditing.verdicts import VERDICTS
from svftool.numerics.threads import ThreadPool, one_thread
from svftool.stages.audit import audit

METRICS = choose_metrics(None)
SHAPES = [(16, 16), (64, 27), (96, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1e-3, 1e-2, 1e-1, 0.5]
TRUTH = {
    "svf": "spectrum only",
    "lora2": "low rank 2",
    "lora8": "low rank 8",
    "full": "full fine-tune",
    "decaying": "full fine-tune",
    "unrelated": "unrelated",
    "rows": "rearranged",
    "columns": "rearranged",
    "signs": "rearranged",
    "same": "untouched",
    "zeroed": "broken",
}
SIZELESS = {"unrelated", "rows", "columns", "signs", "same", "zeroed"}


def weight(m: int, n: int, *, decaying: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * 7 + n)
    W = torch.randn(m, n, generator=generator)
    if decaying:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * torch.arange(1, len(S) + 1) ** -0.6) @ Vh
    return W / W.norm() * (m * n) ** 0.5 * 0.03


def tune(W: torch.Tensor, kind: str, size: float) -> torch.Tensor:
    """Return what a fine-tune of a known kind makes of a weight, before it is stored."""
    W = W.double()
    (m, n), k = W.shape, min(W.shape)
    generator = torch.Generator().manual_seed(m + n + 1000)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = {
        "unrelated": lambda: normal(m, n) * W.norm() / (m * n) ** 0.5,
        "rows": lambda: W[torch.randperm(m, generator=generator)],
        "columns": lambda: W[:, torch.randperm(n, generator=generator)],
        "signs": lambda: W * torch.where(normal(m, 1) > 0, 1.0, -1.0),
        "same": lambda: W,
        "zeroed": lambda: torch.zeros_like(W),
    }
    if kind in whole:
        return whole[kind]()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    if kind == "svf":
        D = (U * (S * normal(k))) @ Vh
    elif kind.startswith("lora"):
        rank = int(kind[4:])
        D = normal(m, rank) @ normal(rank, n)
    elif kind == "full":
        D = normal(m, n)
    else:
        left, right = torch.linalg.qr(normal(m, k))[0], torch.linalg.qr(normal(n, k))[0]
        D = (left * torch.arange(1, k + 1) ** -0.5) @ right.mT
    return W + D / D.norm() * W.norm() * size


def verdict(before: torch.Tensor, after: torch.Tensor) -> Verdict:
    return judge(evidence_on(before, after))


def evidence_on(before: torch.Tensor, after: torch.Tensor) -> Evidence:
    with ThreadPool(0) as pool:
        base = BaseMatrix(before, METRICS, vectors=True, pool=pool)
        evidence = base.against(Tuned(after)).evidence
    assert evidence is not None
    return evidence


def test_confidence_is_what_the_controls_justify() -> None:
    """High confidence is always right here; low is a guess, and is said to be one."""
    right: dict[str, Counter[bool]] = defaultdict(Counter)
    wrong = []
    cases = itertools.product(SHAPES, DTYPES, TRUTH, SIZES, (True, False))
    for shape, dtype, kind, size, decaying in cases:
        if kind in SIZELESS and size != SIZES[0]:
            continue
        with one_thread():
            W = weight(*shape, decaying=decaying).to(dtype)
            found = verdict(W, tune(W, kind, size).to(dtype))
        correct = found.text == TRUTH[kind]
        right[found.confidence][correct] += 1
        if not correct and found.confidence != "low":
            wrong.append((shape, dtype, kind, size, found))
    assert right["high"][False] == 0, wrong
    assert right["high"][True] > 350
    assert right["medium"][True] >= 0.9 * right["medium"].total(), wrong
    # The control of the controls: where rounding swallows the change nothing can be right often.
    assert right["low"][False] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_rounding_noise_in_whichever_file_it_is_stored(dtype: torch.dtype) -> None:
    W = weight(40, 60, decaying=True)
    for after in (W.to(dtype), W.to(dtype).float()):
        found = verdict(W, after)
        assert (found.name, found.confidence) == ("rounding noise", "high")
        back = verdict(after, W)
        assert back.name == "rounding noise"


def test_a_rescaling_is_said_to_be_one() -> None:
    W = weight(30, 20, decaying=True)
    found = verdict(W, W * 0.9)
    assert found.name == "spectrum only"
    assert "plain rescaling" in found.evidence


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 3e-5, 1e-5])
@pytest.mark.parametrize("screened", [False, True])
def test_a_small_change_of_singular_values_is_no_rescaling(size: float, screened: bool) -> None:
    W = weight(60, 48, decaying=False)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    factors = 1.0 + size * torch.randn(48, generator=torch.Generator().manual_seed(1)).double()
    tuned = (U * (S * factors) @ Vh).float()
    said = judge(screen(W, tuned)) if screened else verdict(W, tuned)
    assert said.name == "spectrum only"
    assert "rescaling" not in said.evidence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda W: -W, "signs of 100% of the entries"),
        (lambda W: W.mT.contiguous(), "transposed"),
        (lambda W: W.flip(0), "permuted"),
        (
            lambda W: torch.linalg.qr(weight(24, 24, decaying=False).double())[0].float() @ W,
            "rotat",
        ),
    ],
)
def test_ways_to_rearrange_are_told_apart(change: object, said: str) -> None:
    assert callable(change)
    W = weight(24, 24, decaying=True)
    found = verdict(W, change(W))
    assert found.name == "rearranged"
    assert said in found.evidence


def test_a_reordered_spectrum_does_not_fool_the_verdict() -> None:
    """Swapping singular values leaves the spectrum as it was, yet it is a spectral change."""
    U, S, Vh = torch.linalg.svd(weight(32, 48, decaying=True).double(), full_matrices=False)
    after = (U * S.flip(0)) @ Vh
    found = verdict((U * S) @ Vh, after)
    assert found.name == "spectrum only"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_broken_on_either_side(bad: float) -> None:
    W = weight(8, 8, decaying=False)
    T = W.clone()
    T[1, 2] = bad
    for before, after, side in ((W, T, "the fine-tune"), (T, W, "the base")):
        found = verdict(before, after)
        assert found.name == "broken"
        assert side in found.evidence
        assert "1 of 64 entries" in found.evidence


def test_a_base_of_zeros_has_nothing_to_be_related_to() -> None:
    assert verdict(torch.zeros(6, 6), weight(6, 6, decaying=False)).name in (
        "unrelated",
        "spectrum only",
    )


# Whole checkpoints.


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def layers(kind: str, *, size: float = 0.05) -> tuple[dict[str, torch.Tensor], ...]:
    base = {f"blocks.{i}.weight": weight(32, 24 + i, decaying=True) for i in range(6)}
    base |= {"norm.weight": torch.ones(24), "steps": torch.tensor(3)}
    tuned = dict(base)
    for i in range(4):
        name = f"blocks.{i}.weight"
        tuned[name] = tune(base[name], kind, size).float()
    return base, tuned


@pytest.mark.parametrize("kind", ["svf", "lora2", "full", "unrelated", "rows", "zeroed"])
def test_a_checkpoint_is_what_most_of_its_changed_layers_are(kind: str, tmp_path: Path) -> None:
    base, tuned = layers(kind)
    before, after = (
        write(tmp_path / "a.safetensors", base),
        write(tmp_path / "b.safetensors", tuned),
    )
    one = audit(before, [after]).comparisons[0]
    assert one.verdict is not None
    assert one.verdict.text == TRUTH[kind]
    assert one.counts()["untouched"] == 2
    if kind != "zeroed":
        assert "4 of 6 matrices changed" in one.verdict.evidence


def test_norms_alone_are_no_change_of_a_matrix(tmp_path: Path) -> None:
    base, tuned = layers("same")
    tuned["norm.weight"] = base["norm.weight"] * 1.5
    before, after = (
        write(tmp_path / "a.safetensors", base),
        write(tmp_path / "b.safetensors", tuned),
    )
    one = audit(before, [after]).comparisons[0]
    assert one.verdict is not None
    assert one.verdict.name == "changed"
    assert "1 norm, bias or buffer changed" in one.verdict.evidence


def test_layers_too_small_for_the_rank_do_not_hide_a_low_rank_update() -> None:
    """A rank-8 update of a matrix with a short side of 9 looks full: the others tell what it is."""
    found = []
    for shape in [(64, 48)] * 5 + [(32, 9)]:
        W = weight(*shape, decaying=True)
        evidence = evidence_on(W, tune(W, "lora8", 0.1).float())
        found.append((judge(evidence), evidence))
    assert found[-1][0].name == "full fine-tune"
    assert judge_all(found, []).text == "low rank 8"


def test_mixed_changes_are_called_mixed() -> None:
    found = []
    for kind in ("svf", "svf", "lora2", "lora2"):
        W = weight(40, 32, decaying=True)
        evidence = evidence_on(W, tune(W, kind, 0.1).float())
        found.append((judge(evidence), evidence))
    whole = judge_all(found, [])
    assert whole.name == "mixed"
    assert "2 spectrum only" in whole.evidence


def test_every_verdict_has_a_meaning() -> None:
    assert {text.removesuffix(" 2").removesuffix(" 8") for text in TRUTH.values()} <= set(VERDICTS)


# Real fine-tunes.


@pytest.mark.parametrize(
    ("base", "tuned", "name", "least"),
    [
        ("mobilenetV1X0.25_pretrain.tar", "mobilenet0.25_Final.pth", "full fine-tune", 0.2),
        ("base_renamed.safetensors", "mobilenet0.25_Final.pth", "full fine-tune", 0.2),
        ("mobilenet0.25_Final.pth", "mobilenet0.25_size_320.pth", "full fine-tune", 0.05),
        ("mobilenet0.25_Final.pth", "mobilenet0.25_epoch_245.pth", "full fine-tune", 1e-5),
        ("mobilenet0.25_Final.pth", "mobilenet0.25_Final.pth", "untouched", 0.0),
    ],
)
def test_real_pairs(data: Path, base: str, tuned: str, name: str, least: float) -> None:
    folder = data / "pairs" / "retinaface"
    one = audit(folder / base, [folder / tuned]).comparisons[0]
    assert one.verdict is not None
    assert (one.verdict.name, one.verdict.confidence) == (name, "high")
    drift = one.median("weight_drift")
    assert drift is not None
    assert drift >= least
    compared = len(one.rows) + len(one.left_out)
    assert compared + len(one.unmatched_base) == one.totals[0]
    assert compared + len(one.unmatched_tuned) == one.totals[1]


def test_two_networks_of_one_kind_are_unrelated(data: Path, tmp_path: Path) -> None:
    """Another training run: here the layers that two ResNets of other depths share."""
    folder = data / "checkpoints"
    one = audit(folder / "resnet20-12fca82f.th", [folder / "resnet56-4bfd9763.th"]).comparisons[0]
    assert one.verdict is not None
    assert one.verdict.name == "unrelated"
    assert one.unmatched_tuned


def test_the_trajectory_grows_as_its_readme_says(data: Path) -> None:
    folder = data / "pairs" / "trajectory"
    names = ("epoch_10", "epoch_50", "epoch_100", "epoch_200", "Final")
    result = audit(
        folder / "base_mobilenetV1X0.25_pretrain.safetensors",
        [folder / f"{name}.safetensors" for name in names],
    )
    assert result.trajectory is not None
    assert result.trajectory.monotone
    assert result.trajectory.metrics["weight_drift"] == pytest.approx(
        (0.150, 0.281, 0.380, 0.489, 0.490), abs=6e-4
    )
    assert [one.verdict.name for one in result.comparisons if one.verdict] == ["full fine-tune"] * 5
    stopped = audit(folder / "epoch_200.safetensors", [folder / "Final.safetensors"])
    assert (stopped.comparisons[0].median("weight_drift") or 1.0) < 0.03
