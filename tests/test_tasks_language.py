"""Language modelling as a task: reading, tokens and blocks, masked loss, metrics, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import WORDS, write_model, write_texts, write_tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from svftool.cli import app
from svftool.errors import DataError, ModelError, UsageError
from svftool.tasks.base import Counts, Predicts
from svftool.tasks.language import Language, _enable_checkpointing
from svftool.tasks.texts import Text, list_texts
from svftool.tasks.tokens import by_length, collate, cut, encode, load_tokenizer

pytest.importorskip("transformers")

VERSES = [{"text": f"{word} is {word}." * 3} for word in ("one", "two", "six", "ten", "red", "sea")]
PAIRS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two", "six")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def model(folder: Path) -> Any:
    """Return the small model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_both_forms_are_read_from_a_folder_of_files(tmp_path: Path) -> None:
    write_texts(tmp_path / "b.jsonl", [*PAIRS, {"text": "x", "more": 1}])
    write_texts(tmp_path / "a.jsonl", VERSES)
    texts = list_texts(tmp_path)
    assert [(text.file.name, text.line) for text in texts[5:8]] == [
        ("a.jsonl", 6),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    assert (texts[6].prompt, texts[6].body, texts[6].complete) == ("say one:", " one", True)
    assert (texts[-1].prompt, texts[-1].body, texts[-1].complete) == ("", "x", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": " "}', "line 2: 'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"prompt": "a"}', r"line 2: no 'completion' \(it has prompt\)"),
        ('{"completion": "a"}', r"line 2: no 'prompt'"),
        ('{"body": "a"}', r"line 2: no 'text' \(it has body\)"),
        ('{"text": 3}', "line 2: 'text' is a number, not a string"),
        ('["a"]', "line 2: a list, not an object"),
        ('{"text": ', "line 2: no JSON"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl: {message}.*'prompt' and 'completion'"):
        list_texts(file)


def test_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: not found, expected a JSONL or CSV file"):
        list_texts(tmp_path / "absent")
    with pytest.raises(DataError, match="no texts"):
        list_texts(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x\.jsonl: .*JSONL in UTF-8"):
        list_texts(tmp_path)


def test_a_completion_is_learned_with_its_end_and_a_prompt_is_not(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids, learned = encode(Text("ab", "cd", True, Path("x"), 1), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "b", "c", "d", "</s>"]
    assert learned == [False, False, False, True, True, True]
    ids, learned = encode(Text("", "cd", False, Path("x"), 1), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "c", "d"]
    assert learned == [False, True, True]


def test_a_tokenizer_without_offsets_gives_the_same(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)

    class Slow:
        is_fast = False
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    text = Text("ab", "cd", True, Path("x"), 1)
    assert encode(text, Slow()) == encode(text, tokenizer)


@given(
    prompt=st.integers(0, 12),
    body=st.integers(1, 30),
    length=st.integers(2, 9),
    start=st.booleans(),
)
def test_every_learned_token_is_predicted_once(
    prompt: int, body: int, length: int, start: bool
) -> None:
    count = prompt + body + start
    learned = [False] * (prompt + start) + [True] * body
    blocks = cut(list(range(count)), learned, length, 7)
    predicted = [
        i for b in blocks for i, t in zip(b.ids.tolist(), b.targets.tolist(), strict=True) if t
    ]
    first = max(prompt + start, 1)
    assert predicted == list(range(first, count))
    for block in blocks:
        assert 2 <= len(block.ids) <= length
        assert block.text == 7
        assert not block.targets[0]
        ids = block.ids.tolist()
        assert ids == list(range(ids[0], ids[0] + len(ids)))


def test_a_long_prompt_loses_its_beginning() -> None:
    (block,) = cut([1, 2, 3, 4, 5, 6], [False] * 4 + [True] * 2, 4, 0)
    assert block.ids.tolist() == [3, 4, 5, 6]
    assert block.targets.tolist() == [False, False, True, True]


def test_batches_are_padded_on_the_right() -> None:
    blocks = [cut([5] * n, [True] * n, 9, 0)[0] for n in (2, 4)]
    batch = collate(blocks, 9)
    assert batch["input_ids"].tolist() == [[5, 5, 9, 9], [5, 5, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["targets"].tolist() == [[False, True, False, False], [False, True, True, True]]
    assert sorted(i for group in by_length(blocks, 4) for i in group) == [0, 1]


def language(folder: Path, tmp_path: Path, rows: list[Any], **options: Any) -> Language:
    data = write_texts(tmp_path / "data.jsonl", rows)
    return Language(data, **{"tokenizer": folder, "shots": 2, **options})


def reference(model: nn.Module, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    """Sum of losses of one example and its number of tokens, alone and without padding."""
    head, body = row.get("prompt", ""), row.get("completion", row.get("text", ""))
    ids = tokenizer(head + body)["input_ids"] + ([2] if "prompt" in row else [])
    skip = len(tokenizer(head)["input_ids"]) if head else 1
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    wanted = torch.tensor(ids)
    return float(cross_entropy(logits[skip - 1 : -1], wanted[skip:], reduction="sum")), len(
        ids
    ) - skip


@pytest.mark.parametrize("rows", [VERSES, PAIRS], ids=["texts", "prompts"])
def test_loss_and_metrics_are_those_of_each_text_alone(
    folder: Path, tmp_path: Path, model: Any, rows: list[Any]
) -> None:
    task = language(folder, tmp_path, rows, evaluation=write_texts(tmp_path / "e.jsonl", rows))
    draw = task.draw(0)
    sums = [reference(model, task.tokenizer, row) for row in rows]
    mean = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    metrics = draw.evaluate(model)
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert 0 <= metrics["accuracy"] <= 1
    found = list(draw.predictions(model))
    assert [(row["line"], row["tokens"]) for row in found] == [
        (line, count) for line, (_, count) in enumerate(sums, 1)
    ]
    assert found[0]["loss"] == pytest.approx(sums[0][0] / sums[0][1], rel=1e-5)
    chosen = language(folder, tmp_path, rows, shots=len(rows), evaluation=tmp_path / "e.jsonl")
    batch = chosen.draw(0).batch(torch.arange(len(rows)), torch.Generator())
    assert float(draw.loss(model, batch).detach()) == pytest.approx(mean, rel=1e-5)
    assert draw.terms(batch) == sum(count for _, count in sums)
    assert isinstance(draw, Counts)
    assert isinstance(draw, Predicts)


def test_perplexity_is_that_of_torchmetrics(folder: Path, tmp_path: Path, model: Any) -> None:
    text = pytest.importorskip("torchmetrics.text")
    draw = language(folder, tmp_path, VERSES).draw(0)
    batch = draw.batch(torch.arange(draw.size), torch.Generator())
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["input_ids"].masked_fill(~batch["targets"], -100)
    perplexity = text.Perplexity(ignore_index=-100)(logits[:, :-1].detach(), targets[:, 1:])
    assert math.exp(float(draw.loss(model, batch).detach())) == pytest.approx(
        float(perplexity), rel=1e-4
    )


def test_accuracy_counts_the_right_tokens(folder: Path, tmp_path: Path) -> None:
    class Next(nn.Module):
        """Predicts that each letter repeats."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return nn.functional.one_hot(input_ids, len(WORDS)) * 9.0 * self.weight

    rows = [{"text": "aaab"}, {"text": "abab"}]
    task = language(folder, tmp_path, rows, evaluation=write_texts(tmp_path / "e.jsonl", rows))
    metrics = task.draw(0).evaluate(Next())
    assert metrics["accuracy"] == 2 / 8


def test_texts_longer_than_the_length_are_cut(folder: Path, tmp_path: Path, model: Any) -> None:
    config = {"max_position_embeddings": 64}
    whole = language(folder, tmp_path, VERSES, config=config)
    short = language(folder, tmp_path, VERSES, sequence_length=8)
    assert whole.length == 64
    assert len(short.support.blocks) > len(whole.support.blocks) == len(VERSES)
    assert short.describe()["blocks"] == len(short.support.blocks)
    tokens = [sum(int(b.targets.sum()) for b in t.support.blocks) for t in (whole, short)]
    assert tokens[0] == tokens[1]
    assert short.draw(0).size > whole.draw(0).size == 2
    assert short.draw(0).evaluate(model)["perplexity"] > 1


def test_a_text_that_is_measured_alone_is_counted_once(
    folder: Path, tmp_path: Path, model: Any
) -> None:
    data = write_texts(tmp_path / "d.jsonl", VERSES)
    options = {"evaluation": data, "shots": None, "sequence_length": 8}
    draw = language(folder, tmp_path, VERSES, **options).draw(0)
    assert "12 of 12 texts are longer" in " ".join(draw.prepare(model).said)
    assert "6 of 6 texts are longer" in " ".join(draw.prepare(model, start=False).said)


def test_draws_depend_on_the_seed_and_do_not_overlap(folder: Path, tmp_path: Path) -> None:
    task = language(folder, tmp_path, VERSES, shots=4, hold_out=0.25)
    draw = task.draw(0)
    assert (draw.size, draw.held_out) == (3, 1)
    seen = [
        {block.text for block in part.blocks} for part in (draw._support, *draw._parts.values())
    ]
    assert set().union(*seen) == set(range(6))
    assert sum(map(len, seen)) == 6
    draws = {tuple(b.text for b in task.draw(seed)._support.blocks) for seed in range(6)}
    assert len(draws) > 1


def test_folds_split_the_support_set_by_texts(folder: Path, tmp_path: Path) -> None:
    rows = [row + " " + row if isinstance(row, str) else row for row in VERSES]
    task = language(folder, tmp_path, rows, shots=4, sequence_length=4)
    draw = task.draw(0)
    support = {block.text for block in draw._support.blocks}
    assert draw.size > len(support) == 4
    folds = draw.subdivide(2, seed=0)
    left = [{block.text for block in fold._parts["query"].blocks} for fold in folds]
    assert left[0] | left[1] == support
    assert [len(one) for one in left] == [2, 2]
    for fold, texts in zip(folds, left, strict=True):
        assert {block.text for block in fold._support.blocks} == support - texts
    assert language(folder, tmp_path, rows, shots=1).draw(0).subdivide(2, seed=0) == []


def test_checkpointing_changes_no_gradient(folder: Path, tmp_path: Path, model: Any) -> None:
    gradients, layers = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    for checkpointing in (False, True):
        draw = language(folder, tmp_path, VERSES, gradient_checkpointing=checkpointing).draw(0)
        prepared = draw.prepare(model)
        assert (prepared.model, prepared.head, prepared.new_head) == (model, None, False)
        model.train()
        model.zero_grad()
        draw.loss(model, draw.batch(torch.arange(2), torch.Generator())).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    # Once to check the model, once to train; then the same with one forward pass more.
    assert len(layers) == 2 + 3
    with pytest.raises(ModelError, match="Linear has no gradient checkpointing"):
        _enable_checkpointing(nn.Linear(2, 2))


def test_tokens_that_the_model_does_not_have_are_named(
    folder: Path, tmp_path: Path, model: Any
) -> None:
    other = write_tokenizer(tmp_path / "other", [*WORDS[:20], *"ABCDEFGHIJKLMN", *WORDS[20:]])
    draw = language(other, tmp_path, VERSES).draw(0)
    with pytest.raises(ModelError, match=r"data\.jsonl: line \d: token \d\d \(.*--tokenizer"):
        draw.prepare(model)


@pytest.mark.parametrize("padding", [len(WORDS), 10**6, -1])
def test_padding_without_an_embedding_is_said_and_changes_nothing(
    padding: int, folder: Path, tmp_path: Path, model: Any
) -> None:
    task = language(folder, tmp_path, VERSES)
    expected = task.draw(0).evaluate(model)
    task.padding = padding
    draw = task.draw(0)
    said = draw.prepare(model).said
    assert len(said) == 1
    assert f"pads with token {padding}, the model has embeddings for {len(WORDS)}" in said[0]
    assert draw.evaluate(model) == pytest.approx(expected, rel=1e-6)
    assert task.draw(1).prepare(model).said == ()


def test_a_model_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(len(WORDS), 4)

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return self.embed(input_ids).mean(1)

    draw = language(folder, tmp_path, VERSES).draw(0)
    with pytest.raises(ModelError, match=r"returns \(1, 4\).*causal language model"):
        draw.prepare(Pooled())
    with pytest.raises(ModelError, match="does not take tokens"):
        draw.prepare(nn.Linear(2, 2))


def test_a_tokenizer_that_is_not_there_is_said(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data.jsonl", VERSES)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for place in (tmp_path / "empty", None):
        with pytest.raises(ModelError, match=r"okenizer.*--tokenizer"):
            Language(data, tokenizer=place, shots=2)


def test_options_that_do_not_fit_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--shots K.*--eval"):
        language(folder, tmp_path, VERSES, shots=None)
    with pytest.raises(DataError, match="6 texts, expected at least 7 for 7 shots"):
        language(folder, tmp_path, VERSES, shots=7)
    with pytest.raises(DataError, match="leave none to measure with"):
        language(folder, tmp_path, VERSES, shots=6).draw(0)
    with pytest.raises(UsageError, match="--sequence-length is 1"):
        language(folder, tmp_path, VERSES, sequence_length=1)
    with pytest.raises(UsageError, match="the model takes 64 tokens at most"):
        language(
            folder,
            tmp_path,
            VERSES,
            sequence_length=65,
            config={"text_config": {"max_position_embeddings": 64}},
        )
    bare = write_tokenizer(tmp_path / "bare", start=False)
    with pytest.raises(DataError, match=r"data\.jsonl: line 1: 1 token, expected two or more"):
        language(bare, tmp_path, [{"text": "a"}, *VERSES])


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_trains_and_merges(folder: Path, tmp_path: Path) -> None:
    factors, runs = tmp_path / "factors", tmp_path / "runs"
    assert run("decompose", folder, "-o", factors, "-q").exit_code == 0
    data = write_texts(tmp_path / "data.jsonl", VERSES)
    common = ["--task", "language", "--data", data, "--eval", data]
    options = ["--steps", 30, "--batch-size", 4, "--lr", 0.03, "--train-layers", "*mlp*"]
    result = run(
        "finetune", factors, "-o", runs, *common, *options, "--regime", "svf,full", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    svf, full = found["runs"]
    assert svf["trainable_parameters"] == 2 * 3 * 16
    for item in (svf, full):
        assert item["metrics"]["after"]["perplexity"] < item["metrics"]["before"]["perplexity"]
    merged = tmp_path / "merged"
    assert run("merge", factors, svf["output"], "-o", merged).exit_code == 0
    from transformers import AutoModelForCausalLM

    for place, item in ((merged, svf), (Path(full["output"]), full)):
        draw = Language(data, tokenizer=folder, evaluation=data).draw(0)
        again = draw.evaluate(AutoModelForCausalLM.from_pretrained(place).eval())
        after = item["metrics"]["after"]["perplexity"]
        assert again["perplexity"] == pytest.approx(after, rel=1e-4)
    wrong = run("finetune", factors, "-o", tmp_path / "no", *common, "--regime", "head")
    assert wrong.exit_code == 7
    wrong = run("finetune", factors, "-o", tmp_path / "no", *common, "--classes", data)
    assert wrong.exit_code == 2
    assert "--classes has no meaning for --task language" in wrong.stderr


def test_a_tied_output_layer_is_trained_on_request(folder: Path, tmp_path: Path) -> None:
    factors, tuned, merged = (tmp_path / name for name in ("factors", "t.svf.safetensors", "m"))
    assert run("decompose", folder, "-o", factors, "-q").exit_code == 0
    data = write_texts(tmp_path / "data.jsonl", VERSES)
    common = ["--task", "language", "--data", data, "--eval", data, "--json"]
    options = ["--steps", 10, "--regime", "head", "--head-name", "lm_head", "--head-lr", 0.01]
    result = run("finetune", factors, "-o", tuned, *common, *options)
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)["runs"][0]["metrics"]
    assert metrics["after"]["perplexity"] < 0.8 * metrics["before"]["perplexity"]
    assert run("merge", factors, tuned, "-o", merged).exit_code == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = Language(data, tokenizer=folder, evaluation=data).draw(0).evaluate(model)
    assert again["perplexity"] == pytest.approx(metrics["after"]["perplexity"], rel=1e-4)


def test_saved_data_sets_hold_texts_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    texts = list_texts(tmp_path / "saved")
    assert [(text.prompt, text.body) for text in texts] == [
        (row["prompt"], row["completion"]) for row in PAIRS
    ]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_lora_trains_a_language_model_too(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    factors, adapter = tmp_path / "factors", tmp_path / "adapter"
    assert run("decompose", folder, "-o", factors, "-q").exit_code == 0
    data = write_texts(tmp_path / "data.jsonl", PAIRS)
    options = ["--steps", 5, "--regime", "lora:2", "--gradient-checkpointing", "--lr", 0.01]
    common = ["--task", "language", "--data", data, "--eval", data, "--json"]
    result = run("finetune", factors, "-o", adapter, *common, *options)
    assert result.exit_code == 0, result.stderr
    after = json.loads(result.stdout)["runs"][0]["metrics"]["after"]["perplexity"]
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    draw = Language(data, tokenizer=folder, evaluation=data).draw(0)
    assert draw.evaluate(model)["perplexity"] == pytest.approx(after, rel=1e-4)
