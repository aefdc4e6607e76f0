"""Tables for people: names that stay apart at any width, blocks, counts, headlines, series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from model_names import NAMES, named
from rich.console import Console
from safetensors.torch import save_file

from svftool import audit
from svftool.auditing import AuditResult, Comparison, Evidence, Measured, Row, Unread, Verdict
from svftool.report.inspect import Shown, view
from svftool.report.inspect.headline import headline
from svftool.report.names import display_names

PLAIN = Shown()


def drawn(result: AuditResult, shown: Shown = PLAIN, *, width: int = 80) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as caught:
        console.print(view(result, shown))
    lines = caught.get().splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(line.rstrip() for line in lines)


def row(name: str, verdict: str = "full fine-tune", drift: float = 0.1) -> Row:
    rank = 8 if verdict == "low rank" else None
    found = Evidence(
        64, 64, change_energy=1.0, base_energy=1.0, rank=rank, tail=0.01, svf_share=0.97
    )
    return Row(
        name,
        view="matrix",
        matrix=(64, 64),
        measured=Measured(change={"weight_drift": drift, "svf_share": 0.97, "alpha": drift}),
        verdict=Verdict(verdict, "high", "for a test", rank),
        evidence=found,
    )


def result(rows: Sequence[Row], *, lost: Sequence[Unread] = ()) -> AuditResult:
    verdict = Verdict("full fine-tune", "high", "for a test")
    one = Comparison(
        Path("base"), Path("tuned"), ("checkpoint",) * 2, tuple(rows), tuple(lost), verdict=verdict
    )
    return AuditResult((one,), ("weight_drift", "svf_share"))


# Names.


MIXTRAL = [
    f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"
    for i in (0, 1, 10, 11, 101) for e in (0, 1, 11) for w in ("w1", "w2", "w11")
]  # fmt: skip
HARD = {
    "experts": MIXTRAL,
    "prefixes": ["down", "down_proj", "down_projection", "up", "updown", "u"],
    "ends": [f"a.{'x' * 60}{end}.weight" for end in ("a", "b", "ab")],
    "digits": [f"layer{i}{j}.conv_{j}x{i}.weight" for i in range(1, 12) for j in range(1, 12)],
    "no dots": ["x" * 40 + str(i) for i in range(12)],
    "wide": [f"層{i}.重み.weight" for i in range(12)],
    **{family: list(named(family)) for family in NAMES},
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("width", [4, 12, 20, 26, 60])
def test_names_keep_their_numbers_and_stay_apart(kind: str, width: int) -> None:
    names = HARD[kind]
    short = display_names(names, width)
    assert len(set(short.values())) == len(names)
    for name, cut in short.items():
        left = name.removesuffix(".weight")
        assert re.findall(r"\d+", cut) == re.findall(r"\d+", left)
        assert cut in name or "…" in cut


def test_names_of_usual_models_fit_eighty_columns() -> None:
    for names in (MIXTRAL, *(list(named(family)) for family in NAMES)):
        assert max(map(len, display_names(names, 26).values())) <= 2 * 26  # folded once at most


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_row_can_be_told_from_every_other(kind: str, width: int) -> None:
    names = HARD[kind]
    shown = drawn(result([row(name) for name in names]), Shown(every=True), width=width)
    for number in {found for name in names for found in re.findall(r"\d+", name)}:
        assert number in re.findall(r"\d+", shown)
    if width >= 120:
        lines = [line.split()[0] for line in shown.splitlines() if "full fine-tune" in line]
        assert len(set(lines[1:])) >= len(names) - 1


def test_a_wide_terminal_shows_whole_names() -> None:
    wide = drawn(result([row(name) for name in MIXTRAL[:5]]), width=160)
    assert "0.block_sparse_moe.experts.0.w1" in wide
    assert "names without model.layers. and .weight" in wide
    assert "…" not in wide


# Rows, blocks and counts.


@pytest.mark.parametrize(("count", "rolled"), [(40, False), (41, True)])
def test_blocks_are_gathered_beyond_forty_rows(count: int, rolled: bool) -> None:
    rows = [row(f"h.{i % 5}.fc{i}.weight", drift=0.01 * i) for i in range(count)]
    shown = drawn(result(rows))
    assert ("matrices in 5 blocks (--all lists each)" in shown) == rolled
    assert len(re.findall(r"full fine-tune$", shown, re.M)) == (5 if rolled else count)
    every = drawn(result(rows), Shown(every=True))
    assert len(re.findall(r"full fine-tune$", every, re.M)) == count
    assert "blocks" in drawn(result(rows[:9]), Shown(group=True))


def test_a_block_shows_its_largest_and_what_its_matrices_are() -> None:
    rows = [row("h.0.a.weight", drift=0.5), row("h.0.b.weight", "low rank", 0.1)]
    rows += [row("h.0.c.weight", drift=0.2), row("h.1.a.weight", drift=0.3)]
    lines = drawn(result(rows), Shown(group=True)).splitlines()
    assert any(re.fullmatch(r"h\.0 +3 +0\.5 █+ +97% 2 full fine-tune, 1 other", x) for x in lines)


def test_untouched_rows_are_a_count() -> None:
    rows = [row("a.weight"), *(row(f"b.{i}.weight", "untouched", 0.0) for i in range(7))]
    shown = drawn(result(rows))
    assert "7 matrices untouched (--all lists each)" in shown
    assert "b.3" not in shown
    assert "b.3" in drawn(result(rows), Shown(every=True))


def test_a_legend_explains_the_columns() -> None:
    shown = " ".join(drawn(result([row("a.weight")])).split())
    for said in ("weight drift: ‖∆W‖ / ‖W‖", "svf share: part of the change", "bars:", "∆S:"):
        assert said in shown


# The headline.


def test_the_headline_says_coverage_then_reasons() -> None:
    rows = [row(f"{i}.weight", "low rank") for i in range(24)]
    rows += [row(f"x{i}.weight", "untouched", 0.0) for i in range(16)]
    lost = Unread("gone.weight", "not in the fine-tune", shapes=((3, 4), None))
    one = result(rows, lost=[lost]).comparisons[0]
    assert headline(one) == (
        "40 of 41 tensors compared (1 only in the base); 24 changed, all by updates of rank 8 that "
        "hold 99 % of the change"
    )
    mixed = result([*rows[:3], row("z"), row("n", "rounding noise")]).comparisons[0]
    assert headline(mixed) == (
        "all 5 tensors compared; 5 changed: 3 by updates of rank 8 that hold 99 % of the change, "
        "1 in many directions at once, 1 by rounding alone"
    )


# What only one side has.


def test_a_mismatch_is_a_table_with_whole_names_and_both_shapes(tmp_path: Path) -> None:
    long = "model.a_very_long_part_of_a_name.another_very_long_part.layers.11.projection.weight"
    base = {"a.weight": torch.eye(4), long: torch.ones(3, 4), "gone.bias": torch.ones(5)}
    tuned = {"a.weight": torch.eye(4), long: torch.ones(4, 3), "new": torch.ones(2, 2)}
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, tensors in zip(files, (base, tuned), strict=True):
        save_file(tensors, path)
    found = audit(files[0], [files[1]])
    shown = drawn(found, width=140)
    assert "1 of 4 tensors compared (1 of another shape, 1 only in the base, 1 only in" in shown
    assert re.search(rf"^~ +{re.escape(long)} +3×4 +4×3 +stored transposed$", shown, re.M)
    assert re.search(r"^- +gone\.bias +5$", shown, re.M)
    assert re.search(r"^\+ +new +2×2$", shown, re.M)
    narrow = re.sub(r"\s", "", drawn(found, width=60))
    for number in ("11", "3×4", "4×3"):
        assert number in narrow


def test_many_missing_tensors_are_gathered_by_their_names() -> None:
    lost = [
        Unread(f"model.layers.{i}.{x}.weight", "not in the fine-tune", shapes=((2, 2), None))
        for i in range(6) for x in "abcdefgh"
    ]  # fmt: skip
    found = result([row("a.weight")], lost=lost)
    assert len(re.findall(r"^- +model\.layers\.\d\.\* +8 tensors$", drawn(found), re.M)) == 6
    every = drawn(found, Shown(every=True))
    assert len(re.findall(r"^- +model\.layers\.\d\.\w\.weight +2×2$", every, re.M)) == 48


# A series.


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_series_puts_like_beside_like(tmp_path: Path) -> None:
    """The same change as a file of the changed layers alone and merged has the same medians."""
    import json

    base = {f"l{i}.weight": normal(12, 10, seed=i) for i in range(5)}
    A, B = normal(2, 10, seed=8), normal(12, 2, seed=9)
    changed = {"l1.weight", "l3.weight"}
    merged = {k: v + B @ A if k in changed else v for k, v in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    layers = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": value.clone()
        for name in changed for x, value in (("A", A), ("B", B))
    }  # fmt: skip
    save_file(layers, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["l1", "l3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = audit(tmp_path / "base.safetensors", [folder, tmp_path / "merged.safetensors"])
    assert found.trajectory is not None
    assert set(found.trajectory.matrices) == changed
    for name, (first, second) in found.trajectory.metrics.items():
        assert first == pytest.approx(second, abs=1e-5), name
        assert first is not None
    assert found.trajectory.metrics["weight_drift"][0] > 0.1
    adapter, dense = found.comparisons
    for name in ("weight_drift", "relative_drift", "svf_share", "intruders"):
        assert adapter.median(name) == pytest.approx(dense.median(name), abs=1e-5)
    for one, other in zip(adapter.rows, dense.rows, strict=True):
        assert one.measured.change.keys() == other.measured.change.keys()
    shown = drawn(found)
    assert "medians over the 2 matrices that any of them changed" in shown


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "model.safetensors")
        save_file({"a.weight": torch.eye(4)}, paths[-1])
    shown = drawn(audit(paths[0], paths[1:]))
    assert "base/model.safetensors → one/model.safetensors" in shown
    assert re.search(r"^two/model\.safetensors +0 ", shown, re.M)
