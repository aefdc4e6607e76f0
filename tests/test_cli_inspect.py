"""``svftool inspect``: its document, table, page, files and gates, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool import audit, decompose, extract, merge
from svftool.cli import app

KEYS = {
    "name", "view", "matrix", "relative_drift", "delta_norm", "max_log_ratio", "weight_drift",
    "spectrum_share", "svf_share", "off_diagonal_share", "out_of_span_share", "intruders",
    "verdict", "effective_rank", "stable_rank", "spectral_norm",
}  # fmt: skip


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def network(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "embed_tokens.weight": normal(30, 12, seed=seed),
        "blocks.0.conv.weight": normal(8, 4, 3, 3, seed=seed + 1),
        "blocks.0.norm.weight": torch.ones(8),
        "blocks.1.experts.weight": normal(3, 10, 6, seed=seed + 2),
        "blocks.1.fc.weight": normal(16, 12, seed=seed + 3),
        "blocks.1.fc.qweight": torch.arange(24, dtype=torch.int32).reshape(4, 6),
        "blocks.1.num_batches_tracked": torch.tensor(7),
        "head.weight": normal(5, 16, seed=seed + 4),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = network()
    tuned = {name: value.clone() for name, value in base.items()}
    for name in ("blocks.0.conv.weight", "blocks.1.fc.weight", "blocks.1.experts.weight"):
        tuned[name] += 0.1 * normal(*tuned[name].shape, seed=9)
    tuned["blocks.0.norm.weight"] *= 2.0
    tuned["head.weight"] = normal(7, 16)
    tuned["extra.bias"] = torch.zeros(3)
    before = write(tmp_path / "base.safetensors", base)
    return before, write(tmp_path / "tuned.safetensors", tuned)


# The document.


def test_the_document_has_the_keys_that_scripts_rely_on(pair: tuple[Path, Path]) -> None:
    found = document(*pair)
    assert (found["schema_version"], found["command"]) == (1, "inspect")
    one = found["comparisons"][0]
    assert {"base", "tuned", "layers", "summary", "verdict", "unmatched"} <= set(one)
    rows = {row["name"]: row for row in one["layers"]}
    for row in rows.values():
        assert set(row) >= KEYS
    assert rows["blocks.0.conv.weight"]["matrix"] == [8, 36]
    assert rows["blocks.1.experts.weight"]["view"] == "batch"
    assert rows["blocks.1.experts.weight"]["matrix"] == [3, 10, 6]
    assert set(rows["blocks.1.fc.weight"]["effective_rank"]) == {"base", "tuned"}
    assert rows["blocks.0.norm.weight"]["weight_drift"] == pytest.approx(1.0)
    assert rows["blocks.0.norm.weight"]["relative_drift"] is None


def test_every_tensor_of_both_sides_is_counted(pair: tuple[Path, Path]) -> None:
    one = document(*pair)["comparisons"][0]
    base, tuned = network(), {**network(), "extra.bias": None}
    named = {row["name"] for row in one["layers"]} | {item["name"] for item in one["left_out"]}
    lonely = {side: {item["name"] for item in one["unmatched"][side]} for side in ("base", "tuned")}
    assert named | lonely["base"] == set(base)
    assert named | lonely["tuned"] == set(tuned)
    assert [item["name"] for item in one["left_out"]] == ["blocks.1.fc.qweight"]
    reasons = {item["name"]: item["reason"] for item in one["unmatched"]["base"]}
    assert reasons == {"head.weight": "shape (5, 16) in the base, (7, 16) in the fine-tune"}
    tensors = one["summary"]["tensors"]
    assert (tensors["base"], tensors["tuned"]) == (8, 9)
    assert tensors["compared"] + tensors["left_out"] + tensors["unmatched_base"] == 8


def test_one_checkpoint_alone_has_spectra_and_nothing_to_compare(pair: tuple[Path, Path]) -> None:
    one = document(pair[0])["comparisons"][0]
    assert one["tuned"] is None
    assert one["verdict"] is None
    row = next(row for row in one["layers"] if row["name"] == "blocks.1.fc.weight")
    S = np.linalg.svd(network()["blocks.1.fc.weight"].double(), compute_uv=False)
    assert row["spectral_norm"] == {"base": pytest.approx(S[0]), "tuned": None}
    assert all(
        row[key] is None for key in ("weight_drift", "svf_share", "verdict", "relative_drift")
    )


def test_the_identity_is_exactly_zero(data: Path) -> None:
    path = data / "checkpoints" / "squeezenet1_1_fp16.safetensors"
    one = document(path, path)["comparisons"][0]
    assert one["verdict"] == "untouched"
    for row in one["layers"]:
        assert row["weight_drift"] == 0.0
        assert row["svf_share"] is None
        if row["matrix"] is not None:
            assert (row["relative_drift"], row["delta_norm"], row["intruders"]) == (0.0, 0.0, 0.0)


def test_metrics_can_be_asked_for(pair: tuple[Path, Path]) -> None:
    rows = document(*pair, "--metrics", "cka,alpha")["comparisons"][0]["layers"]
    row = next(row for row in rows if row["name"] == "blocks.1.fc.weight")
    assert 0.9 < row["cka"] < 1.0
    assert "alpha" in row
    assert "angle_max" not in row
    everything = document(*pair, "--metrics", "all")["comparisons"][0]["layers"][0]
    assert "angle_max" in everything


def test_fast_leaves_vectors_out(pair: tuple[Path, Path]) -> None:
    fast = document(*pair, "--fast")["comparisons"][0]
    slow = document(*pair)["comparisons"][0]
    for quick, whole in zip(fast["layers"], slow["layers"], strict=True):
        assert "svf_share" not in quick
        for name in ("weight_drift", "relative_drift"):
            assert quick[name] == pytest.approx(whole[name], abs=1e-7)


# Names.


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "module."),
        ("module.", ""),
        ("", "backbone."),
        ("module.", "model.body."),
        ("a.b.", "c."),
    ],
)
def test_prefixes_are_found_and_said(tmp_path: Path, before: str, after: str) -> None:
    tensors = {f"layer{i}.weight": normal(6, 5, seed=i) for i in range(4)}
    base = write(tmp_path / "a.safetensors", {before + k: v for k, v in tensors.items()})
    tuned = write(
        tmp_path / "b.safetensors",
        {after + k: v for k, v in tensors.items()} | {"head.weight": normal(3, 4)},
    )
    result = run(base, tuned, "--json")
    one = json.loads(result.stdout)["comparisons"][0]
    assert one["verdict"] == "undecided"
    assert [row["verdict"] for row in one["layers"]] == ["untouched"] * 4
    assert [row["tuned_name"] for row in one["layers"]] == [after + name for name in tensors]
    assert [item["name"] for item in one["unmatched"]["tuned"]] == ["head.weight"]
    assert "4 tensors matched" in result.stderr


def test_transposed_storage_is_said(tmp_path: Path) -> None:
    base = write(tmp_path / "a.safetensors", {"w": normal(6, 5), "v": normal(4, 4)})
    tuned = write(tmp_path / "b.safetensors", {"w": normal(6, 5).mT, "v": normal(4, 4)})
    one = document(base, tuned)["comparisons"][0]
    assert one["unmatched"]["base"][0]["reason"].endswith("stored transposed")
    shown = run(base, tuned).stdout
    assert len(re.findall(r"^~ +w +6×5 +5×6 +stored transposed *$", shown, re.M)) == 1
    assert "1 of another shape" in shown
    assert "only in" not in shown
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nlayers = "*"\n[tensors]\nunmatched = "deny"\n')
    failed = json.loads(run(base, tuned, "--policy", policy, "--json", "-q").stdout)["failed"]
    assert [item["name"] for item in failed] == ["w"]


def test_short_names_still_tell_the_block(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.{x}.weight": normal(6, 5) for i in (1, 2) for x in "ab"}
    base = write(tmp_path / "a.safetensors", tensors)
    tuned = write(
        tmp_path / "b.safetensors",
        {name: value * (1.1 if ".2." in name else 1.0) for name, value in tensors.items()},
    )
    for arguments in ((base, tuned), (base,)):
        shown = run(*arguments, "--top", "2").stdout
        assert re.search(r"^2\.mlp\.a ", shown, re.M) or re.search(r"^1\.mlp\.a ", shown, re.M)
    assert re.search(r"^2\.mlp\.b ", run(base, tuned, "--top", "2").stdout, re.M)


# What people see.


def test_the_table_fits_eighty_columns(pair: tuple[Path, Path], data: Path) -> None:
    folder = data / "pairs" / "retinaface"
    real = folder / "mobilenet0.25_Final.pth", folder / "mobilenet0.25_size_320.pth"
    for arguments in (pair, (pair[0],), (*pair, "--group"), real, (*real, real[0])):
        result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["inspect", *map(str, arguments)])
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= 80
    shown = run(*pair).stdout
    assert "full fine-tune" in shown
    assert "blocks.1.fc" in shown
    assert "█" in shown
    assert re.search(r"^\+ +extra\.bias +3 *$", shown, re.M)
    assert re.search(r"^~ +head\.weight +5×16 +7×16 *$", shown, re.M)


def test_rows_fall_by_the_metric_asked_for(pair: tuple[Path, Path]) -> None:
    lines = run(*pair, "--sort", "effective_rank", "--top", "2").stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    values = [float(line.split()[1]) for line in lines[first + 1 : first + 3]]
    assert values == sorted(values, reverse=True)
    assert "more matrices" in lines[first + 3]
    assert run(*pair, "--sort", "nothing").exit_code == 2


def test_hostile_names_harm_neither_terminal_nor_spreadsheet_nor_page(tmp_path: Path) -> None:
    evil = "\x1b[31mred\u202e<script>alert(1)</script>.weight"
    formula = "=HYPERLINK(1)"
    tensors = {evil: normal(6, 5), formula: normal(4, 4), "</script><b>": normal(3, 3)}
    base = write(tmp_path / "a.safetensors", tensors)
    tuned = write(tmp_path / "b.safetensors", {k: v + 0.1 for k, v in tensors.items()})
    sheet, page = tmp_path / "r.csv", tmp_path / "r.html"
    result = run(base, tuned, "--csv", sheet, "--html", page)
    assert result.exit_code == 0
    assert "\x1b[31mred" not in result.stdout
    assert "\u202e" not in result.stdout
    names = [row["name"] for row in csv.DictReader(sheet.read_text().splitlines())]
    assert "'=HYPERLINK(1)" in names
    text = page.read_text()
    assert "<script>alert" not in text
    assert "</script><b>" not in text
    assert "&lt;script&gt;alert(1)" in text


# Files.


def test_the_spreadsheet_has_one_line_a_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sheet = tmp_path / "r.csv"
    assert run(*pair, "--csv", sheet).exit_code == 0
    rows = list(csv.DictReader(sheet.read_text().splitlines()))
    one = document(*pair)["comparisons"][0]
    assert len(rows) == len(one["layers"])
    for line, row in zip(rows, one["layers"], strict=True):
        assert line["name"] == row["name"]
        assert float(line["weight_drift"] or 0) == pytest.approx(row["weight_drift"])
    assert run(*pair, "--csv", sheet).exit_code == 2
    assert run(*pair, "--csv", sheet, "--force").exit_code == 0


def test_the_page_needs_no_network(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert run(*pair, pair[1], "--html", page, "--fail-above", "weight_drift=0.01").exit_code == 10
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(|fetch\(""", text)
    assert "Trajectory" in text
    assert "Failed: " in text
    for name in ("blocks.0.conv.weight", "extra.bias", "blocks.1.fc.qweight"):
        assert name in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_figure_is_the_same_for_the_same_audit(
    pair: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        assert run(*pair, pair[1], "--plot", path).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 5000


def test_a_figure_of_another_kind_is_refused_before_any_work(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--plot", "figure.gif")
    assert result.exit_code == 2
    assert "expected .png, .svg, .pdf" in result.stderr


def test_a_missing_package_names_its_extra(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("jinja2", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for option, file in (("--html", "r.html"), ("--plot", "r.png")):
        result = run(*pair, option, tmp_path / file)
        assert result.exit_code == 9
        assert "[report]" in result.stderr


# Gates.


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ("weight_drift=0.01", 10),
        ("weight_drift=1000", 0),
        ("effective_rank.change=1e-9", 10),
        ("intruders=100", 0),
        ("cka=0.1", 10),
        ("nothing=1", 2),
        ("weight_drift", 2),
        ("weight_drift=nan", 2),
    ],
)
def test_thresholds(pair: tuple[Path, Path], tmp_path: Path, gate: str, code: int) -> None:
    # Only tensors that both sides have in one shape: what was not compared trips every gate.
    tensors = {name: value for name, value in load_file(pair[1]).items() if name in network()}
    tensors["head.weight"] = network()["head.weight"]
    result = run(pair[0], write(tmp_path / "t.safetensors", tensors), "--fail-above", gate, "-q")
    assert result.exit_code == code
    if code == 10:
        assert "tensors failed" in result.stderr
        assert "blocks." in result.stderr


def test_a_broken_layer_trips_every_gate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = network()
    tensors["blocks.1.fc.weight"][0, 0] = float("nan")
    broken = write(tmp_path / "nan.safetensors", tensors)
    result = run(pair[0], broken, "--fail-above", "weight_drift=1e9")
    assert result.exit_code == 10
    assert "broken" in result.stdout
    one = document(pair[0], broken)["comparisons"][0]
    assert one["verdict"] == "broken"
    row = next(row for row in one["layers"] if row["name"] == "blocks.1.fc.weight")
    assert "1 of 192 entries are NaN" in row["evidence"]


POLICY = """
schema_version = 1
[[rule]]
layers = ["blocks.0.*"]
allow = ["untouched", "rounding noise"]
reason = "the stem is frozen"
[[rule]]
layers = "*"
deny = ["broken"]
limits = { weight_drift = 5.0 }
"""


def test_a_policy_lists_what_breaks_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    result = run(*pair, "--policy", policy, "--json", "-q")
    assert result.exit_code == 10
    failed = {item["name"]: item for item in json.loads(result.stdout)["failed"]}
    drifted = {"blocks.0.conv.weight", "blocks.0.norm.weight"}
    assert set(failed) == drifted | {"extra.bias", "head.weight"}
    policy.write_text(POLICY + '[tensors]\nunmatched = "allow"\n')
    allowed = json.loads(run(*pair, "--policy", policy, "--json", "-q").stdout)["failed"]
    assert {item["name"] for item in allowed} == drifted
    assert failed["blocks.0.norm.weight"]["reason"] == "the stem is frozen"
    assert run(pair[0], pair[0], "--policy", policy).exit_code == 0
    policy.write_text(POLICY + '[tensors]\nunmatched = "deny"\n')
    names = {
        item["name"]
        for item in json.loads(run(*pair, "--policy", policy, "--json").stdout)["failed"]
    }
    assert {"extra.bias", "head.weight"} <= names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]\n", "expected a policy in TOML"),
        ("schema_version = 1\n", r"no \[\[rule\]\]"),
        ("schema_version = 2\n[[rule]]\n", "schema version 2"),
        ("[[rule]]\nlayer = 'x'\n", "has the key 'layer'"),
        ("[[rule]]\nallow = ['fine']\n", "verdict 'fine'"),
        ("[[rule]]\nlimits = { nothing = 1 }\n", "metric 'nothing'"),
        ("[[rule]]\nlimits = { weight_drift = 'x' }\n", "expected metrics with numbers"),
        ("[[rule]]\n[tensors]\nunmatched = 'maybe'\n", "expected 'allow' or 'deny'"),
    ],
)
def test_a_policy_that_is_not_well_formed(
    pair: tuple[Path, Path], tmp_path: Path, text: str, message: str
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(text)
    result = run(*pair, "--policy", policy)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


# Every form of input.


def test_factors_tuned_file_and_merged_checkpoint_agree(tmp_path: Path) -> None:
    tensors = {f"l{i}.weight": normal(20, 12 + i, seed=i) for i in range(3)}
    base = write(tmp_path / "base.safetensors", tensors)
    decompose(base, tmp_path / "factors")
    tuned = {}
    for name, W in tensors.items():
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        tuned[name] = ((U * (S * 1.05 + 0.01)) @ Vh).float()
    dense = write(tmp_path / "tuned.safetensors", tuned)
    small = tmp_path / "t.svf.safetensors"
    extract(base, dense, output=small)
    merge(tmp_path / "factors", [small], output=tmp_path / "merged.safetensors")
    ways = [dense, tmp_path / "merged.safetensors", small]
    found = document(base, *ways)["comparisons"]
    found += document(tmp_path / "factors", small)["comparisons"]
    found += document(small)["comparisons"]
    for one in found:
        assert one["verdict"] == "spectrum only"
        for row, first in zip(one["layers"], found[0]["layers"], strict=True):
            for name in ("weight_drift", "relative_drift", "svf_share", "intruders"):
                assert row[name] == pytest.approx(first[name], abs=1e-4), (one["tuned"], name)
    assert document(tmp_path / "factors", base)["comparisons"][0]["verdict"] == "rounding noise"
    two = document(small, small)["comparisons"][0]
    assert two["verdict"] == "untouched"


def test_a_tuned_file_of_another_base_is_refused(tmp_path: Path) -> None:
    bases = [
        write(tmp_path / f"{i}.safetensors", {"l.weight": normal(8, 6, seed=i)}) for i in range(2)
    ]
    tuned = tmp_path / "t.svf.safetensors"
    extract(bases[0], bases[1], output=tuned)
    result = run(bases[1], tuned)
    assert result.exit_code == 4
    assert len(result.stderr.strip().splitlines()) == 1
    assert "belongs to another base" in result.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_lora_folder_is_a_low_rank_update(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 48), torch.nn.Linear(48, 64), torch.nn.LayerNorm(64)
    )
    base = write(tmp_path / "base.safetensors", dict(model.state_dict()))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0", "1"]))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = write(tmp_path / "merged.safetensors", dict(adapted.merge_and_unload().state_dict()))
    for path in (tmp_path / "adapter", merged):
        one = document(base, path)["comparisons"][0]
        assert (one["verdict"], one["rank"]) == ("low rank", 3)
        verdicts = {row["name"]: row["verdict"] for row in one["layers"]}
        assert verdicts["2.weight"] == "untouched"
    strange = write(tmp_path / "other.safetensors", {"x.weight": normal(4, 4)})
    result = run(strange, tmp_path / "adapter")
    assert result.exit_code == 3
    assert "none of the adapter's 2 layers" in result.stderr
    assert run(tmp_path / "adapter").exit_code == 3


@pytest.mark.parametrize("kind", ["nothing in common", "other shapes", "cut", "missing"])
def test_inputs_that_cannot_be_compared_are_one_line(
    pair: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "other.safetensors"
    if kind == "nothing in common":
        write(other, {"z": normal(3, 3)})
    elif kind == "other shapes":
        write(other, {"blocks.1.fc.weight": normal(3, 3)})
    elif kind == "cut":
        raw = pair[1].read_bytes()
        other.write_bytes(raw[: len(raw) // 2])
    result = run(pair[0], other)
    assert result.exit_code == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


# The Python interface.


def test_the_audit_is_a_function(pair: tuple[Path, Path]) -> None:
    result = audit(pair[0], [pair[1]], include=["blocks.1.*"], metrics=["alpha"])
    one = result.comparisons[0]
    assert [row.name for row in one.matrices] == ["blocks.1.experts.weight", "blocks.1.fc.weight"]
    assert one.verdict is not None
    row = one.matrices[-1]
    assert row.value("weight_drift") == pytest.approx(0.1, rel=0.3)
    assert row.value("effective_rank.change") is not None
    assert row.curves is not None
    assert row.curves.tuned is not None
    left = {item.name: item.reason for item in one.left_out}
    assert left["blocks.0.conv.weight"] == "not matched by --include"


def test_several_processes_share_the_layers(pair: tuple[Path, Path]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*launch, "-m", "svftool", "inspect", *map(str, pair), "--json", "-q"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    together, alone = json.loads(found.stdout), document(*pair)
    for one in (together, alone):
        one.pop("seconds")
    assert together == alone


# Examples.


def test_the_example_policy_is_well_formed_and_the_workflow_uses_it(
    pair: tuple[Path, Path],
) -> None:
    folder = Path(__file__).parents[1] / "examples"
    workflow = (folder / "audit-workflow.yml").read_text(encoding="utf-8")
    commands = re.findall(r"run: svftool (.*?) --json", workflow)
    assert len(commands) == 1
    arguments = commands[0].replace('"$BASE"', str(pair[0])).replace('"$TUNED"', str(pair[0]))
    assert "--policy audit-policy.toml" in arguments
    policy = folder / "audit-policy.toml"
    assert run(pair[0], pair[0], "--policy", policy).exit_code == 0
    assert run(*pair, "--policy", policy, "--fail-above", "weight_drift=0.01").exit_code == 10


def test_quantised_values_are_named_and_left_out(tmp_path: Path) -> None:
    tensors = {
        "a.weight": normal(6, 5).to(torch.float8_e4m3fn),
        "a.scales": torch.ones(6, 1),
        "b.weight": torch.randint(0, 9, (4, 4), dtype=torch.uint8),
        "c.weight": normal(6, 6),
    }
    base = write(tmp_path / "a.safetensors", tensors)
    one = document(base, base)["comparisons"][0]
    left = {item["name"]: item["reason"] for item in one["left_out"]}
    assert set(left) >= {"a.weight", "b.weight"}
    assert "quantised" in left["a.weight"]
    assert one["summary"]["tensors"]["compared"] + len(left) == 4


# Pages and files beside the table


def test_what_changed_most_is_no_drift_of_two_rows(tmp_path: Path) -> None:
    base = {"big.weight": normal(40, 30), "head.weight": 0.01 * normal(2, 30, seed=1)}
    tuned = {"big.weight": base["big.weight"] * 1.5, "head.weight": base["head.weight"] * 9.0}
    (one,) = audit(
        write(tmp_path / "a.safetensors", base), [write(tmp_path / "b.safetensors", tuned)]
    ).comparisons
    assert max(one.matrices, key=lambda row: row.value("weight_drift") or 0).name == "head.weight"
    assert [row.name for row in one.by_part()] == ["big.weight", "head.weight"]
    changes = {name: float((tuned[name] - base[name]).double().square().sum()) for name in base}
    expected = {name: change / sum(changes.values()) for name, change in changes.items()}
    assert one.parts() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-30, 1e30])
def test_parts_of_the_change_sum_to_one_or_there_are_none(tmp_path: Path, factor: float) -> None:
    base = {"a.weight": factor * normal(6, 4), "b.weight": factor * normal(2, 4, seed=1)}
    for name, scale in (("same", 1.0), ("other", 1.25)):
        tuned = {key: scale * value for key, value in base.items()}
        files = [write(tmp_path / f"{x}.safetensors", y) for x, y in (("a", base), (name, tuned))]
        (one,) = audit(files[0], files[1:]).comparisons
        changed = factor != 0.0 and scale != 1.0
        assert sum(one.parts().values()) == pytest.approx(float(changed))
        assert len(one.by_part()) == 2


def test_each_file_is_named_on_stderr(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r.csv", "r.html")]
    options = ("--csv", files[0], "--html", files[1])
    result = run(*pair, *options)
    assert result.exit_code == 0
    assert [x for x in result.stderr.splitlines() if x.startswith("wrote ")] == [
        f"wrote {file}" for file in files
    ]
    assert "wrote" not in result.stdout
    assert "wrote" not in run(*pair, *options, "--force", "--quiet").stderr
