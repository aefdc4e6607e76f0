"""``svftool extract --as lora``: the best adapter of a fine-tune, in layouts that others read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from svftool.adapters.layouts import adapter_layout
from svftool.adapters.low_rank import LowRank, resized, truncate
from svftool.choices.adapters import parse_adapter_rank
from svftool.cli import app
from svftool.errors import CheckpointError, NumericalError, UsageError
from svftool.stages.extract_lora import LoraOptions, LoraResult, extract_lora

State = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


class Net(nn.Module):
    """One module of every kind, and names that are the ends of others."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn = nn.BatchNorm2d(6)
        self.temporal = nn.Conv1d(6, 4, 5)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 7)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        words = self.token_embedding(ids)
        for block in self.blocks:
            words = block(words)
        x = self.bn(self.depthwise(self.conv(x))).flatten(2)
        return words, self.fc(self.norm(self.temporal(x).mean(-1)))


INPUTS = torch.arange(5)[None], torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def changed(state: State, rank: int = 2, size: float = 0.1) -> State:
    """Change every tensor: matrices by a given rank, everything else by anything."""
    generator = torch.Generator().manual_seed(7)
    after = {}
    for name, value in state.items():
        if not value.is_floating_point():
            after[name] = value + 3
        elif value.ndim < 2:
            after[name] = value + size * torch.rand(value.shape, generator=generator)
        else:
            m, n = value.shape[0], value[0].numel()
            up, down = (torch.randn(*two, generator=generator) for two in ((m, rank), (rank, n)))
            after[name] = value + size * (up @ down).reshape(value.shape)
    return after


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    base, tuned = Net().eval(), Net().eval()
    tuned.load_state_dict(changed(base.state_dict()))
    return base, tuned


def write(folder: Path, before: State, after: State) -> tuple[Path, Path]:
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, state in zip(paths, (before, after), strict=True):
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    return paths


def run(before: State, after: State, folder: Path, **options: object) -> LoraResult:
    folder.mkdir(exist_ok=True)
    base, tuned = write(folder, before, after)
    wanted = LoraOptions(**options)  # type: ignore[arg-type]
    return extract_lora(base, tuned, output=folder / "out", options=wanted)


# PEFT reads what is written for it.


@pytest.mark.parametrize("uniform", [False, True])
def test_peft_merges_the_folder_to_the_fine_tune(tmp_path: Path, uniform: bool) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = nets()
    result = run(
        base.state_dict(), tuned.state_dict(), tmp_path, rank="error:0.001", uniform_rank=uniform
    )
    assert result.error < 1e-5
    assert result.dropped == ()
    assert len({row.rank for row in result.layers}) == 1
    loaded = peft.PeftModel.from_pretrained(base, result.output)
    merged = loaded.merge_and_unload().eval()
    found, expected = merged.state_dict(), tuned.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    for one, two in zip(merged(*INPUTS), tuned(*INPUTS), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_peft_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, _ = nets()
    after = {k: v.clone() for k, v in base.state_dict().items()}
    # The shorter name is the end of the longer ones: PEFT goes by the first that fits.
    for name, rank in (("fc.weight", 1), ("blocks.0.fc.weight", 3), ("blocks.1.fc.weight", 2)):
        after[name] = changed({name: after[name]}, rank)[name]
    result = run(base.state_dict(), after, tmp_path, rank="error:0.001")
    ranks = {row.name: row.rank for row in result.layers}
    assert ranks == {"fc.weight": 1, "blocks.0.fc.weight": 3, "blocks.1.fc.weight": 2}
    merged = peft.PeftModel.from_pretrained(base, result.output).merge_and_unload()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, after[name], atol=1e-5), name


def test_peft_changes_no_module_that_only_ends_in_a_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned = nets()
    after = {k: v.clone() for k, v in base.state_dict().items()}
    for name in ("fc.weight", "norm.weight"):  # blocks.0.fc and blocks.0.norm stay
        after[name] = tuned.state_dict()[name]
    result = run(base.state_dict(), after, tmp_path, rank="2")
    loaded = peft.PeftModel.from_pretrained(base, result.output)
    adapted = {name.partition(".lora_A")[0] for name in loaded.state_dict() if ".lora_A" in name}
    assert adapted == {"base_model.model.fc"}
    for name, value in loaded.merge_and_unload().state_dict().items():
        assert torch.allclose(value, after[name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_gpt2_projections_are_written_the_way_round_that_peft_has_them(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=8)
    base = transformers.GPT2Model(config).eval()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    after = {k: changed({k: v})[k] if "c_" in k else v for k, v in before.items()}
    result = run(before, after, tmp_path, rank="2")
    merged = peft.PeftModel.from_pretrained(base, result.output).merge_and_unload()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, after[name], atol=1e-5), name


# Other layouts, read by what their tools do, written down here again.


def read_kohya(file: State, name: str, shape: tuple[int, ...]) -> Tensor | None:
    key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    up = file.get(f"{key}.lora_up.weight")
    if up is None:
        return None
    down, alpha = file[f"{key}.lora_down.weight"], file[f"{key}.alpha"]
    assert down.shape[1:] == shape[1:]
    scale = float(alpha) / down.shape[0]
    return scale * (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)


def read_comfy(file: State, name: str, shape: tuple[int, ...]) -> Tensor | None:
    key = f"diffusion_model.{name}"
    stem = key.removesuffix(".weight").removesuffix(".bias")
    diff = file.get(f"{stem}.diff_b" if key.endswith(".bias") else f"{stem}.diff")
    if diff is not None:
        return diff.double()
    up = file.get(f"{stem}.lora_up.weight")
    if up is None or not key.endswith(".weight"):
        return None
    down = file[f"{stem}.lora_down.weight"]
    return (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)


def read_diffusers(file: State, name: str, shape: tuple[int, ...]) -> Tensor | None:
    key = f"transformer.{name.removesuffix('.weight')}"
    B = file.get(f"{key}.lora_B.weight") if name.endswith(".weight") else None
    if B is None:
        return None
    A = file[f"{key}.lora_A.weight"]
    return (B.flatten(1).double() @ A.flatten(1).double()).reshape(shape)


Reader = Callable[[State, str, tuple[int, ...]], Tensor | None]
READERS: dict[str, Reader] = {
    "kohya": read_kohya, "comfy": read_comfy, "diffusers": read_diffusers,
}  # fmt: skip


@pytest.mark.parametrize("layout", READERS)
@pytest.mark.parametrize("rank", ["1", "energy:0.8", "error:0.0001"])
def test_an_independent_reader_finds_the_stated_error(
    tmp_path: Path, layout: str, rank: str
) -> None:
    base, tuned = nets()
    before, after = base.state_dict(), tuned.state_dict()
    result = run(before, after, tmp_path, layout=layout, rank=rank)
    file = load_file(result.output)
    assert adapter_layout(list(file)) == layout
    rows = {row.name: row for row in result.layers}
    left, whole, dropped = [], [], {one.name for one in result.dropped}
    for name, value in before.items():
        D = after[name].double() - value.double()
        found = READERS[layout](file, name, tuple(value.shape))
        assert (found is None) == (name in dropped), name
        rest = D if found is None else D - found
        if name in rows:
            assert rows[name].error == pytest.approx(float(rest.norm() / D.norm()), abs=1e-7)
            S = torch.linalg.svdvals(D.flatten(1))
            best = float(S[rows[name].rank :].norm() / S.norm())
            assert rows[name].error == pytest.approx(best, abs=1e-6)
        if value.is_floating_point():
            left.append(float(rest.norm()))
            whole.append(float(D.norm()))
    total = math.hypot(*whole)
    assert result.error == pytest.approx(math.hypot(*left) / total, rel=1e-6, abs=1e-8)
    shares = [row.share for row in result.layers] + [one.share or 0 for one in result.dropped]
    if not result.whole:
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layout", "name", "key"),
    [
        ("kohya", "unet.mid.to_q.weight", "lora_unet_mid_to_q"),
        ("kohya", "model.diffusion_model.a.b.weight", "lora_unet_a_b"),
        ("kohya", "text_encoder.l.q.weight", "lora_te_l_q"),
        ("comfy", "model.diffusion_model.a.b.weight", "diffusion_model.a.b"),
        ("diffusers", "unet.mid.to_q.weight", "unet.mid.to_q"),
        ("diffusers", "text_encoder_2.l.q.weight", "text_encoder_2.l.q"),
        ("diffusers", "down_blocks.0.to_q.weight", "unet.down_blocks.0.to_q"),
        ("peft", "module.l.q.weight", "base_model.model.l.q"),
    ],
)
def test_names_follow_the_part_of_the_pipeline(
    tmp_path: Path, layout: str, name: str, key: str
) -> None:
    before = {name: torch.randn(6, 5)}
    result = run(before, changed(before, 1), tmp_path, layout=layout, rank="1")
    file = result.output / "adapter_model.safetensors" if layout == "peft" else result.output
    assert {one.rsplit(".lora", 1)[0].removesuffix(".alpha") for one in load_file(file)} == {key}


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    before = {"a.b_c.weight": torch.randn(4, 4), "a_b.c.weight": torch.randn(4, 4)}
    with pytest.raises(CheckpointError, match="lora_unet_a_b_c"):
        run(before, changed(before, 1), tmp_path, layout="kohya")
    assert not (tmp_path / "out").exists()


# Rounding.


def test_no_rank_is_spent_on_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = {"a.weight": torch.randn(96, 64).bfloat16()}
    step = torch.randn(96, 2) @ torch.randn(2, 64)
    after = {"a.weight": (before["a.weight"].float() + 0.2 * step).bfloat16()}
    result = run(before, after, tmp_path, rank="64")
    (row,) = result.layers
    assert (row.rank, row.floored, result.dtype) == (2, True, "bfloat16")
    D = after["a.weight"].double() - before["a.weight"].double()
    file = load_file(result.output / "adapter_model.safetensors")
    B, A = (file[f"base_model.model.a.lora_{part}.weight"] for part in "BA")
    assert B.dtype == torch.bfloat16
    error = float((D - B.double() @ A.double()).norm() / D.norm())
    assert row.error == pytest.approx(error, rel=1e-6)


def test_a_change_that_is_rounding_alone_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = {"a.weight": torch.randn(64, 64)}
    after = {"a.weight": before["a.weight"].bfloat16().float()}
    with pytest.raises(CheckpointError, match="no more than the rounding"):
        run(before, after, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bound", [0.5, 0.05, 0.01])
def test_a_bound_of_the_error_holds_with_rounding_included(bound: float) -> None:
    torch.manual_seed(0)
    D = torch.randn(80, 40) * torch.logspace(0, -4, 40)
    found = truncate("x", D, parse_adapter_rank(f"error:{bound}"), dtype=torch.bfloat16)
    assert found.layer is not None
    assert found.error <= bound
    S = torch.linalg.svdvals(D.double())
    assert float(S[found.layer.rank - 2 :].norm() / S.norm()) > bound  # and with little to spare


def test_resizing_is_the_full_decomposition_of_the_product() -> None:
    torch.manual_seed(0)
    layer = LowRank("x", torch.randn(50, 8), torch.randn(8, 30), 0.5)
    found = resized(layer, parse_adapter_rank("3"), dtype=torch.float32)
    small, error = found.layer, found.error
    assert small is not None
    full = 0.5 * layer.B.double() @ layer.A.double()
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    assert float((small.change() - best).norm() / full.norm()) < 1e-6
    assert error == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-6)


# What cannot be done is said in one line.


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s, CheckpointError, "nothing differs"),
        (lambda s: {k: torch.randn_like(v) for k, v in s.items()}, CheckpointError, "cosine"),
        (lambda s: {k: v / 0 for k, v in s.items()}, NumericalError, "NaN or infinity"),
        (lambda s: {"z": torch.ones(2, 2)}, CheckpointError, "no tensor in common"),
    ],
)
def test_bad_fine_tunes(
    tmp_path: Path, change: Callable[[State], State], error: type[Exception], words: str
) -> None:
    torch.manual_seed(0)
    before = {"a.weight": torch.randn(40, 40), "b.weight": torch.randn(20, 30)}
    with pytest.raises(error, match=words):
        run(before, change(before), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [{"rank": "0"}, {"rank": "energy:2"}, {"rank": "x"}, {"layout": "pfet"}, {"dtype": "int8"},
     {"max_rank": 0}, {"include": ("nothing*",)}],
)  # fmt: skip
def test_bad_options(tmp_path: Path, option: dict[str, object]) -> None:
    before = {"a.weight": torch.eye(4)}
    with pytest.raises(UsageError):
        run(before, changed(before, 1), tmp_path, **option)


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = {"a.weight": torch.randn(8, 8), "head.weight": torch.randn(5, 400)}
    after = changed({"a.weight": before["a.weight"]}, 1)
    after |= {"head.weight": torch.randn(3, 400), "new": torch.ones(2)}  # other classes
    result = run(before, after, tmp_path, rank="1")
    assert {one.name: one.share for one in result.dropped} == {"head.weight": None, "new": None}
    assert [row.name for row in result.layers] == ["a.weight"]


@pytest.mark.parametrize("rows", [20, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_resized_vocabulary_the_common_rows_are_expressed(
    tmp_path: Path, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    before = {"embed_tokens.weight": torch.randn(30, 16), "a.weight": torch.randn(8, 8)}
    after = changed(before, 2)
    table = torch.cat([after["embed_tokens.weight"], torch.randn(5, 16)])[:rows]
    after = {"embed_tokens.weight": table.to(dtype), "a.weight": after["a.weight"]}
    result = run(before, after, tmp_path, rank="8", dtype="float32")
    assert {row.name for row in result.layers} == set(before)
    common = min(rows, 30)
    D = torch.zeros(30, 16, dtype=torch.float64)
    D[:common] = table[:common].to(dtype).double() - before["embed_tokens.weight"][:common]
    file = load_file(result.output / "adapter_model.safetensors")
    key = "base_model.model.embed_tokens.lora_embedding_"
    found = file[f"{key}B"].double() @ file[f"{key}A"].double()
    found = found if found.shape == D.shape else found.T  # PEFT holds that of the transpose
    row = next(row for row in result.layers if row.name == "embed_tokens.weight")
    # PEFT holds the transpose of an embedding's change.
    error = min(
        float((one - D).norm() / D.norm()) for one in (found, found.T) if one.shape == D.shape
    )
    assert error == pytest.approx(row.error, abs=1e-6)
    assert error < 0.05
    assert [one.reason for one in result.dropped] == (
        ["5 rows that the base does not have"] if rows > 30 else []
    )


@pytest.mark.parametrize("rank", ["energy:0.9", "error:0.2", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_says_the_ranks_and_sizes_that_come(
    tmp_path: Path, rank: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    before = {f"l{at}.weight": torch.randn(40, 30).to(dtype) for at in range(3)}
    step = torch.randn(40, 30) * torch.logspace(0, -3, 30)
    after = {name: (value.float() + 0.3 * step).to(dtype) for name, value in before.items()}
    options = LoraOptions(rank=rank, dtype="float32")
    base, tuned = write(tmp_path, before, after)
    plan = extract_lora(base, tuned, output=tmp_path / "out", options=options, dry_run=True)
    assert not (tmp_path / "out").exists()
    done = extract_lora(base, tuned, output=tmp_path / "out", options=options)
    assert [row.rank for row in plan.layers] == [row.rank for row in done.layers]
    assert plan.bytes == done.bytes
    for one, two in zip(plan.layers, done.layers, strict=True):
        assert rank == "2" or one.error == pytest.approx(two.error, abs=1e-5)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_the_two_sides_may_have_different_dtypes(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    torch.manual_seed(0)
    before = {"a.weight": torch.randn(64, 48).to(dtypes[0])}
    up, down = torch.randn(64, 3), torch.randn(3, 48)
    after = {"a.weight": (before["a.weight"].float() + 0.1 * up @ down).to(dtypes[1])}
    result = run(before, after, tmp_path, rank="16", dtype="float32")
    (row,) = result.layers
    assert row.rank <= (16 if dtypes[1] == torch.float32 else 3)
    D = after["a.weight"].double() - before["a.weight"].double()
    file = load_file(result.output / "adapter_model.safetensors")
    B, A = (file[f"base_model.model.a.lora_{part}.weight"].double() for part in "BA")
    assert row.error == pytest.approx(float((D - B @ A).norm() / D.norm()), abs=1e-6)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_counters_are_no_part_of_the_change(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    before = {
        "a.weight": torch.randn(8, 8),
        "bn.weight": torch.ones(8),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    after = changed(before, 2) | {"bn.num_batches_tracked": torch.tensor(90_000)}
    result = run(before, after, tmp_path, layout=layout, rank="1")
    (row,) = result.layers
    assert result.layer_error == pytest.approx(row.error)
    D, d = (after[n].double() - before[n].double() for n in ("a.weight", "bn.weight"))
    whole = math.hypot(float(D.norm()), float(d.norm()))
    lost = row.error * float(D.norm())
    lost = lost if layout == "peft" else math.hypot(lost, float(d.norm()))
    assert row.error > 0.01
    assert row.share == pytest.approx(float(D.norm()) ** 2 / whole**2)
    assert result.error == pytest.approx(lost / whole, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_changed_once(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    table = torch.randn(20, 8)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    before = {name: table.clone() for name in names}
    step = torch.randn(20, 2) @ torch.randn(2, 8)
    after = dict.fromkeys(names, table + 0.1 * step)
    for folder, state in (("base", before), ("tuned", after)):
        (tmp_path / folder).mkdir()
        apart = {name: value.clone() for name, value in state.items()}
        save_file(apart, tmp_path / folder / "model.safetensors")
        config = {"model_type": "llama", "tie_word_embeddings": tied}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    result = extract_lora(
        tmp_path / "base",
        tmp_path / "tuned",
        output=tmp_path / "out",
        options=LoraOptions(rank="2"),
    )
    assert len(result.layers) == (1 if tied else 2)
    assert result.error < 1e-5
    assert sum(row.share for row in result.layers) == pytest.approx(1.0)


def test_patterns_leave_out_by_name_and_say_the_share(tmp_path: Path) -> None:
    before = {"a.weight": torch.eye(8), "b.weight": torch.eye(8)}
    result = run(before, changed(before, 1), tmp_path, rank="1", exclude=("b.*",))
    (one,) = result.dropped
    assert one.share is not None
    assert one.share + result.layers[0].share == pytest.approx(1.0)
    assert result.error == pytest.approx(math.sqrt(one.share), rel=1e-4)


# The command.


def test_the_command_plans_writes_and_refuses(tmp_path: Path) -> None:
    before = {"a.weight": torch.eye(8), "b.bias": torch.zeros(3)}
    base, tuned = write(tmp_path, before, changed(before, 2))
    out = tmp_path / "out"
    words = ["extract", str(base), str(tuned), "-o", str(out), "-q"]
    adapted = [*words, "--as", "lora", "--max-rank", "2"]
    planned = CliRunner().invoke(app, [*adapted, "--dry-run", "--json"])
    assert json.loads(planned.stdout)["layers"][0]["rank"] == 2
    assert not out.exists()
    shown = CliRunner().invoke(app, adapted)
    assert shown.exit_code == 0, shown.stderr
    assert "of the change (as a norm) is lost" in shown.stdout
    assert (out / "adapter_config.json").is_file()
    assert CliRunner().invoke(app, adapted).exit_code == 2  # exists
    refused = CliRunner().invoke(app, [*words, "--rank", "4", "--force"])
    assert refused.exit_code == 2
    assert "--as lora" in refused.stderr
