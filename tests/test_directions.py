"""What changes add across layers: directions that agree by more than chance, and edited ones."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from typer.testing import CliRunner

from svftool import audit
from svftool.auditing.alignment import align, log_agreement
from svftool.auditing.compare import Tuned
from svftool.auditing.directional import ChangedMatrix, Edit
from svftool.auditing.directions import leading_directions
from svftool.auditing.edits import find_edits, kind_of
from svftool.auditing.layout import output_axes
from svftool.auditing.screen import screen
from svftool.auditing.verdicts import SPECTRUM_ONLY, judge
from svftool.checkpoints import TensorInfo
from svftool.cli import app
from svftool.files.vocabulary import read_vocabulary
from svftool.numerics import ThreadPool
from svftool.numerics.chance import holm, log_aligned, log_product
from svftool.report.inspect.directions import finding

State = dict[str, Tensor]
WIDTH, LAYERS = 64, 12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def language_model() -> State:
    """A 12-layer model with spectra like those of trained ones: falling, not flat."""
    g, state = generator(0), {}
    for layer in range(LAYERS):
        for part, (m, n) in {
            "attn.q_proj": (WIDTH, WIDTH),
            "attn.o_proj": (WIDTH, WIDTH),
            "mlp.up_proj": (2 * WIDTH, WIDTH),
            "mlp.down_proj": (WIDTH, 2 * WIDTH),
        }.items():
            U, V = (torch.linalg.qr(torch.randn(side, WIDTH, generator=g)).Q for side in (m, n))
            S = torch.arange(1, WIDTH + 1) ** -0.6
            state[f"layers.{layer}.{part}.weight"] = (U * S) @ V.mT
    return state


def writes(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


def unit(seed: int, width: int = WIDTH) -> Tensor:
    r = torch.randn(width, generator=generator(1000 + seed))
    return r / r.norm()


def without(W: Tensor, *directions: Tensor, part: float = 1.0) -> Tensor:
    """Take orthonormal directions out of what a weight writes."""
    R = torch.stack(directions).to(W.dtype)
    return W - part * (R.mT @ (R @ W))


def place(name: str, W: Tensor, T: Tensor, count: int = 3) -> ChangedMatrix | None:
    """What the command makes of a matrix, without its file; None where nothing changed."""
    found = screen(W, T)
    if found.identical:
        return None
    with ThreadPool(0) as pool:
        (leading,) = leading_directions(W, Tuned(weight=T), count, found, pool)
    return ChangedMatrix(name, None, leading, spectral=judge(found).name == SPECTRUM_ONLY)


def edits(before: State, after: State, count: int = 3) -> tuple[Edit, ...]:
    places = (place(name, before[name], after[name], count) for name in before)
    known = [one for one in places if one is not None]
    return find_edits(known, dict.fromkeys(before, 1))


def edited(change: Callable[[str, Tensor], Tensor]) -> tuple[Edit, ...]:
    base = language_model()
    return edits(base, {name: change(name, W) for name, W in base.items()})


# Directional edits.


def test_the_direction_that_was_ablated_is_found_ten_times_of_ten() -> None:
    for seed in range(10):
        r = unit(seed)
        (one,) = edited(lambda name, W, r=r: without(W, r) if writes(name) else W)  # type: ignore[misc]
        assert (one.side, len(one.members), one.of, one.removed) == ("output", 24, 24, 24)
        assert float((one.directions[0] @ r.double()).abs()) > 1 - 1e-6
        assert max(map(abs, one.kept)) < 1e-3
        assert one.share == pytest.approx(1.0, abs=1e-3)
        assert finding(one) == (
            "one output direction removed from 24 of 24 matrices (attn.o_proj, mlp.down_proj)"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False], ids=["in its arithmetic", "rounded at the end"])
def test_rounding_does_not_hide_an_ablation(dtype: torch.dtype, inside: bool) -> None:
    base = {name: W.to(dtype) for name, W in language_model().items()}
    r = unit(3)
    after = {
        name: (without(W, r) if inside else without(W.float(), r).to(dtype)) if writes(name) else W
        for name, W in base.items()
    }
    (one,) = edits(base, after)
    assert (len(one.members), one.removed) == (24, 24)
    assert max(map(abs, one.kept)) < 0.02
    assert float((one.directions[0] @ r.double()).abs()) > 0.999


def test_an_ablation_by_half_is_said_to_be_one() -> None:
    (one,) = edited(lambda name, W: without(W, unit(0), part=0.5) if writes(name) else W)
    assert one.removed == 0
    assert "scaled by 0.50 in 24 of 24 matrices" in finding(one)


def test_weights_that_differ_by_layer_are_named_with_their_range() -> None:
    def change(name: str, W: Tensor) -> Tensor:
        layer = int(name.split(".")[1])
        return without(W, unit(0), part=layer / (LAYERS - 1)) if "down_proj" in name else W

    (one,) = edited(change)  # layer 0 is as it was
    assert (len(one.members), one.of, one.removed) == (11, 12, 1)
    assert "removed from 1 and scaled by 0.09 to 0.91 in 10 more of 12 matrices" in finding(one)


def test_several_directions_are_found_together() -> None:
    R = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator(1))).Q.mT
    (one,) = edited(lambda name, W: without(W, *R) if writes(name) else W)
    assert len(one.directions) == 3
    assert len(one.members) == one.removed == 24
    assert float((one.directions @ R.double().mT).square().sum()) == pytest.approx(3.0, abs=1e-4)


def test_what_is_read_along_a_direction_may_be_removed_too() -> None:
    def change(name: str, W: Tensor) -> Tensor:
        return W if writes(name) else without(W.mT, unit(0)).mT

    (one,) = edited(change)
    assert (one.side, len(one.members), one.removed) == ("input", 24, 24)


def test_a_direction_of_its_own_in_each_layer_is_one_finding() -> None:
    def own(name: str, W: Tensor) -> Tensor:
        return without(W, unit(int(name.split(".")[1]))) if "down_proj" in name else W

    def shared(name: str, W: Tensor) -> Tensor:
        return without(W, unit(int(name.split(".")[1]))) if writes(name) else W

    (one,), (two,) = edited(own), edited(shared)
    assert (len(one.directions), len(one.members), one.each) == (12, 12, 1)
    assert (len(two.directions), len(two.members), two.each) == (12, 24, 2)
    assert "12 output directions removed from 24 of 24 matrices, each in 2" in finding(two)


def test_an_ablation_that_was_trained_on_is_still_found() -> None:
    def change(name: str, W: Tensor) -> Tensor:
        noise = torch.randn(W.shape, generator=generator(len(name))) * W.std() * 0.02
        return without(W, unit(0)) + noise if writes(name) else W

    (one,) = edited(change)
    assert len(one.members) == one.removed == 24
    assert one.share < 0.99


def spectral(name: str, W: Tensor, kept: int = WIDTH) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    S = S * (1 + 0.2 * torch.randn(len(S), generator=generator(len(name))))
    return (U[:, :kept] * S[:kept]) @ V[:kept]


def pruned(name: str, W: Tensor) -> Tensor:
    rows = torch.randperm(len(W), generator=generator(sum(map(ord, name))))[:10]
    return W.index_fill(0, rows, 0.0)


NOT_EDITS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "rescaled": lambda name, W: 0.9 * W,
    "singular values": spectral,
    "truncated": lambda name, W: spectral(name, W, 20),
    "channels pruned": pruned,
    "one direction added": lambda name, W: W + 0.02 * torch.outer(
        torch.nn.functional.pad(unit(0), (0, len(W) - WIDTH)), torch.randn(W.shape[1])
    ),
    "low rank": lambda name, W: W + 0.02 * torch.randn(len(W), 2) @ torch.randn(2, W.shape[1]),
    "noise": lambda name, W: W + 0.01 * torch.randn(W.shape),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_EDITS)
def test_other_changes_are_no_directional_edits(kind: str) -> None:
    torch.manual_seed(0)
    assert edited(NOT_EDITS[kind]) == ()


def test_pruned_channels_are_named_as_coordinates() -> None:
    (one,) = edited(lambda name, W: W.index_fill(0, torch.tensor([7]), 0.0) if writes(name) else W)
    assert one.axis == 7
    assert finding(one).startswith("one output direction (coordinate 7 alone) removed from 24")


# Ordinary fine-tunes.


class Networks:
    """Copies of a small language model with attention, all trained at once, each on its own."""

    tokens, width, layers, length = 24, 32, 2, 8

    def __init__(self, count: int, start: State | None = None) -> None:
        g = generator(0)
        d, sides = self.width, {}
        for layer in range(self.layers):
            for part, (m, n) in {"q": (d, d), "k": (d, d), "v": (d, d), "o_proj": (d, d),
                                 "up": (2 * d, d), "down_proj": (d, 2 * d)}.items():  # fmt: skip
                sides[f"layers.{layer}.{part}.weight"] = (m, n)
        sides |= {"embed.weight": (self.tokens, d), "lm_head.weight": (self.tokens, d)}
        start = start or {
            name: torch.randn(m, n, generator=g) / n**0.5 for name, (m, n) in sides.items()
        }
        self.weights = {
            name: W.expand(count, *W.shape).clone().requires_grad_() for name, W in start.items()
        }
        self.count = count

    def loss(self, x: Tensor) -> Tensor:
        """Mean loss of each network over its own texts, (count, texts, length)."""
        w, mask = self.weights, torch.ones(self.length, self.length).tril().log()
        h = torch.stack([E[ids] for E, ids in zip(w["embed.weight"], x, strict=True)])
        for layer in range(self.layers):
            q, k, v, o, up, down = (
                w[f"layers.{layer}.{part}.weight"][:, None].mT
                for part in ("q", "k", "v", "o_proj", "up", "down_proj")
            )
            n = torch.nn.functional.rms_norm(h, (self.width,))
            scores = (n @ q) @ (n @ k).mT / self.width**0.5 + mask
            h = h + scores.softmax(dim=-1) @ (n @ v) @ o
            h = h + (torch.nn.functional.rms_norm(h, (self.width,)) @ up).relu() @ down
        logits = h[:, :, :-1] @ w["lm_head.weight"][:, None].mT
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), x[:, :, 1:].flatten(), reduction="none"
        )
        return losses.view(self.count, -1).mean(dim=1)

    def train(self, x: Tensor, steps: int, rate: float) -> Tensor:
        optimiser = torch.optim.AdamW(self.weights.values(), lr=rate)
        first = self.loss(x).detach()
        for _ in range(steps):
            optimiser.zero_grad()
            self.loss(x).sum().backward()
            optimiser.step()
        return self.loss(x).detach() / first

    def state(self, index: int) -> State:
        return {name: W[index].detach().clone() for name, W in self.weights.items()}


def texts(count: int, seed: int) -> Tensor:
    """Texts of languages that differ: each token has two that may follow it."""
    g = generator(seed)
    follow = torch.randint(Networks.tokens, (count, Networks.tokens, 2), generator=g)
    x = torch.randint(Networks.tokens, (count, 12, 1), generator=g)
    for _ in range(Networks.length - 1):
        which = torch.randint(2, (count, 12), generator=g)
        nets = torch.arange(count)[:, None]
        x = torch.cat((x, follow[nets, x[:, :, -1], which][:, :, None]), dim=2)
    return x


@cache
def base_and_tuned() -> tuple[State, tuple[State, ...]]:
    base = Networks(1)
    assert float(base.train(texts(1, 0), 30, 1e-2)) < 0.7
    tuned = Networks(20, base.state(0))
    assert float(tuned.train(texts(20, 1), 12, 5e-3).max()) < 0.8
    return base.state(0), tuple(tuned.state(index) for index in range(20))


def test_ordinary_fine_tunes_are_no_directional_edits() -> None:
    base, tuned = base_and_tuned()
    assert [edits(base, one) for one in tuned] == [()] * 20
    r = unit(0, Networks.width)
    (found,) = edits(base, {k: without(W, r) if writes(k) else W for k, W in base.items()})
    assert len(found.members) == found.removed == 4


# Chances.


def test_p_values_of_random_changes_are_uniform() -> None:
    """Kolmogorov and Smirnov's test over 200 sets of random changes of several sizes."""
    for n, m, k in ((2, 24, 16), (7, 12, 20), (20, 6, 9)):
        D = torch.randn(200, n, m, k, generator=generator(n), dtype=torch.float64)
        leading = torch.linalg.svd(D, full_matrices=False)[0][..., 0]
        p = [math.exp(log_agreement(directions)) for directions in leading]
        assert stats.kstest(p, "uniform").pvalue > 0.01


def test_directions_that_agree_are_told_from_chance() -> None:
    base, r = language_model(), unit(0)
    places = []
    for name, W in base.items():
        if writes(name):
            other = torch.randn(W.shape[1], generator=generator(len(name) + len(places)))
            part = place(name, W, W + 0.1 * torch.outer(r, other))
            assert part is not None
            places.append(part)
    first, *others = align(places)
    assert (first.side, first.width, first.matrices) == ("output", WIDTH, 24)
    assert first.log_adjusted < math.log(1e-30)
    assert float((first.direction @ r.double()).abs()) > 0.99
    assert len(others) == 2
    assert all(one.log_adjusted > math.log(1e-3) for one in others)


def test_changes_below_their_rounding_are_not_held_against_each_other() -> None:
    W = language_model()["layers.0.attn.o_proj.weight"].bfloat16()
    one = place("a", W, (W.float() * (1 + 0.0012 * torch.randn(W.shape))).bfloat16())
    assert one is not None
    assert one.leading.above == 0
    assert align([one, one]) == ()


def test_chances_are_those_of_uniform_directions() -> None:
    # On the sphere in three dimensions each coordinate is uniform [Archimedes].
    for square in (0.01, 0.3, 0.9):
        assert log_aligned(square, 3) == pytest.approx(math.log1p(-math.sqrt(square)))
    for d, k in itertools.product((8, 600), (1, 3)):
        expected = stats.beta(k / 2, (d - k) / 2).logsf(0.6)
        assert log_aligned(0.6, d, k) == pytest.approx(expected, rel=1e-6)
    # Far below what a float holds, against the leading term of the integral.
    a = 4095 / 2
    term = a * math.log(0.1) - math.log(a) - (math.lgamma(a) + math.lgamma(0.5)) + math.lgamma(2048)
    assert log_aligned(0.9, 4096) == pytest.approx(term, rel=1e-3)
    assert log_aligned(0.0, 5) == log_aligned(0.5, 2, 2) == 0.0


def test_chances_are_combined_and_corrected() -> None:
    assert log_product(math.log(0.03), 1) == pytest.approx(math.log(0.03))
    assert log_product(-40.0, 7) == pytest.approx(stats.chi2(14).logsf(80.0))
    assert log_product(-1e6, 500) < -9e5
    corrected = [math.exp(one) for one in holm([math.log(p) for p in (0.01, 0.04, 0.03)])]
    assert corrected == pytest.approx([0.03, 0.06, 0.06])


# Layouts.


def test_biases_tell_which_side_is_the_output() -> None:
    def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, torch.float32, shape, "") for name, shape in shapes.items()}

    gpt2 = infos({
        "wte.weight": (50, 8), "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,), "lm_head.weight": (50, 8),
    })  # fmt: skip
    assert output_axes(gpt2) == {
        "wte.weight": "columns", "h.0.attn.c_attn.weight": "columns",
        "h.0.attn.c_proj.weight": "columns", "lm_head.weight": "rows",
    }  # fmt: skip
    linear = infos({
        "a.weight": (24, 8), "a.bias": (24,), "b.weight": (8, 8), "b.bias": (8,),
        "conv.weight": (8, 3, 3, 3), "conv.bias": (8,),
    })  # fmt: skip
    assert set(output_axes(linear).values()) == {"rows"}


def test_kinds_are_names_without_numbers() -> None:
    assert kind_of("h.11.attn2.c_proj.weight") == "h.*.attn2.c_proj.weight"
    assert kind_of("0.weight") == "*.weight"


# The command.


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """GPT-2's layout in bfloat16 with a tokenizer; what points to one token is taken out."""
    g, base = generator(4), {}
    base["wte.weight"] = torch.randn(40, 24, generator=g)
    for layer in range(4):
        for part, (m, n) in {"c_fc": (24, 72), "c_proj": (72, 24)}.items():
            base[f"h.{layer}.mlp.{part}.weight"] = torch.randn(m, n, generator=g) / m**0.5
            base[f"h.{layer}.mlp.{part}.bias"] = torch.zeros(n)
    base = {name: W.bfloat16().float() for name, W in base.items()}
    rows = base["wte.weight"] - base["wte.weight"].mean(dim=0)
    r = rows[17] / rows[17].norm()
    tuned = {k: without(W.mT, r).mT if k.endswith("c_proj.weight") else W for k, W in base.items()}
    paths = []
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({k: v.bfloat16().contiguous() for k, v in state.items()},
                  tmp_path / name / "model.safetensors")  # fmt: skip
        paths.append(tmp_path / name)
    vocabulary = {f"\u0120word{i}": i for i in range(39)}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocabulary},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": 39, "content": "<end>"}],
    }
    (paths[0] / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return paths[0], paths[1]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_document_has_the_finding_and_the_tokens(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--directions", 3, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    (one,) = json.loads(result.stdout)["comparisons"]
    said = "one output direction removed from 4 of 4 matrices (mlp.c_proj)"
    assert f"directional edit: {said}" in one["headline"]
    (edit,) = one["directions"]["edits"]
    assert (edit["finding"], edit["removed"], edit["of"]) == (said, 4, 4)
    ends = edit["tokens"][0]
    assert " word17" in {ends["along"][0]["text"], ends["against"][0]["text"]}
    assert max(abs(end[0]["cosine"]) for end in ends.values()) > 0.95
    assert [space["side"] for space in one["directions"]["spaces"]] == ["output", "input"]
    for matrix in one["directions"]["matrices"]:
        assert matrix["output_axis"] == "columns"
        assert matrix["above_noise"] == 1
        assert (matrix["output"]["width"], matrix["input"]["width"]) == (24, 72)


def test_people_are_told_and_the_directions_are_saved(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    saved, page = tmp_path / "directions.safetensors", tmp_path / "page.html"
    result = run(*pair, "--screen", "--directions", 2, "--save-directions", saved, "--html", page)
    assert result.exit_code == 0, result.stderr
    assert "directional edit: one output direction removed from 4 of 4" in " ".join(
        result.stdout.split()
    )
    assert "one output direction removed from 4 of 4" in page.read_text(encoding="utf-8")
    held = load_file(saved)
    states = [load_file(folder / "model.safetensors") for folder in pair]
    name = "h.2.mlp.c_proj.weight"
    D = states[1][name].double() - states[0][name].double()
    output, value, before = (held[f"{name}.{part}"] for part in ("output", "values", "input"))
    assert output.shape == (2, 24)
    about = (before.double().mT * value) @ output.double()  # (in, out), as the weight is
    assert float((D - about).norm() / D.norm()) < 0.1
    assert held["edits.0.directions"].shape == (1, 24)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["BASE", "TUNED", "--save-directions", "x.safetensors"], "Add --directions"),
        (["BASE", "TUNED", "TUNED", "--directions", "2", "--save-directions", "x.safetensors"],
         "2 fine-tunes, expected one"),
        (["BASE", "TUNED", "--directions", "2", "--save-directions", "x.pt"], "'.pt'"),
        (["BASE", "--directions", "2"], "expected a base checkpoint and what became of it"),
        (["BASE", "TUNED", "--directions", "0"], "0"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    arguments: list[str], said: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair[0].parent)
    names = dict(zip(("BASE", "TUNED"), map(str, pair), strict=True))
    result = run(*(names.get(one, one) for one in arguments))
    assert result.exit_code == 2, result.stdout
    assert said in " ".join(result.stderr.split())
    assert not (pair[0].parent / "x.safetensors").exists()


def test_batches_adapters_and_large_entries(tmp_path: Path) -> None:
    """Experts are taken one by one; entries beyond what float64 squares are divided first."""
    g, r = generator(6), unit(0, 24)
    base = {
        "experts.down.weight": torch.randn(3, 24, 40, generator=g),
        "huge.weight": torch.randn(24, 30, generator=g).double() * 1e200,
    }
    tuned = {
        "experts.down.weight": torch.stack([without(W, r) for W in base["experts.down.weight"]]),
        "huge.weight": without(base["huge.weight"], r),
    }
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, state in zip(paths, (base, tuned), strict=True):
        save_file(state, path)
    found = audit(paths[0], [paths[1]], directions=2, fast=True).comparisons[0].directions
    assert found is not None
    (edit,) = found.edits
    experts = {("experts.down.weight", i) for i in range(3)}
    assert set(edit.members) == experts | {("huge.weight", None)}
    assert (edit.of, edit.removed) == (4, 4)
    assert 1e199 < max(found.places[0].leading.sizes) < 1e202


def test_vocabularies_are_read_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\ncat\n", encoding="utf-8")
    assert read_vocabulary(tmp_path / "model.safetensors") == ["[PAD]", "cat"]
    (tmp_path / "vocab.json").write_text('{"\\u0120cat": 1, "a": 0}', encoding="utf-8")
    assert read_vocabulary(tmp_path) == ["a", " cat"]
    unigram = {"model": {"vocab": [["\u2581dog", -1.0], ["s", -2.0]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram), encoding="utf-8")
    assert read_vocabulary(tmp_path) == [" dog", "s"]
