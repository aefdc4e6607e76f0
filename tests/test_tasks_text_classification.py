"""Text classification: reading, cutting, heads, metrics, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import WORDS, bert, colours, write_table, write_words
from torch import nn

import svftool
from svftool.errors import DataError, ModelError, SvftoolError, UsageError
from svftool.files.given import check_data
from svftool.progress import Silent
from svftool.stages.catalogue import ModelFacts, make_tasks
from svftool.tasks.class_names import readable
from svftool.tasks.labelled import ClassificationCount
from svftool.tasks.text_classification import TextClassification
from svftool.tasks.text_encoders import TextClassifier, stored_pooling, text_features
from svftool.tasks.texts import list_labelled
from svftool.training import Settings


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a data set."""
    folder = tmp_path_factory.mktemp("texts")
    write_words(folder / "model")
    write_table(folder / "data.csv", colours())
    return folder


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def task(work: Path, data: Path | None = None, **options: Any) -> TextClassification:
    options.setdefault("shots", 2)
    return TextClassification(data or work / "data.csv", folder=work / "model", **options)


# Reading.


@pytest.mark.parametrize(
    ("names", "row", "options"),
    [
        ("text,category", ["a", "x"], {}),
        ("category,text", ["x", "a"], {}),
        ("Text,Intent", ["a", "x"], {}),
        ("id,text,label", ["7", "a", "x"], {}),
        ("question,intent", ["a", "x"], {"text": "question"}),
        ("question,intent", ["a", "x"], {"label": "Intent"}),
        ("text,label,topic", ["a", "y", "x"], {"label": "topic"}),
        ("label,text,question", ["x", "b", "a"], {"text": "question"}),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_columns_are_found(
    tmp_path: Path, suffix: str, names: str, row: list[str], options: dict[str, str]
) -> None:
    file = tmp_path / f"d.{suffix}"
    if suffix == "jsonl":
        file.write_text(json.dumps(dict(zip(names.split(","), row, strict=True))) + "\n")
    else:
        write_table(file, [row], names)
    (found,) = list_labelled(file, **options)
    assert (found.text, found.label) == ("a", "x")
    assert (found.file, found.line) == (file, 1 if suffix == "jsonl" else 2)


def test_numbers_are_names_and_commas_stand_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a, b", "label": 3}\n\n{"text": "c", "label": " x "}\n')
    assert [(one.text, one.label) for one in list_labelled(file)] == [("a, b", "3"), ("c", "x")]
    table = write_table(tmp_path / "d.csv", [["a, b", "x"]])
    assert list_labelled(table)[0].text == "a, b"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", "where is it,card\nwhat fee,fee\n", r"columns 'where is it', 'card'.*row of nam"),
        ("d.csv", "text\na\n", r"columns 'text'.*expected 'text' and one of classes"),
        ("d.csv", "text,a,b\nx,y,z\n", r"columns 'text', 'a', 'b'.*--label-column"),
        ("d.csv", "text,label\n,x\n", r"line 2: 'text' is empty"),
        ("d.csv", "text,label\n  ,x\nb,\n", r"line 2: 'text' is empty, line 3: 'label' is empty"),
        ("d.csv", "text,label\na\n", r"line 2: 'label' is missing"),
        ("d.csv", "text,label\nhello, world,x\n", r"line 2: 3 cells for 2 columns .*quotes"),
        ("d.csv", "text,Text ,label\na,b,x\n", r"two columns or more are named 'text', expected"),
        ("d.csv", "text,label\n", r"no texts"),
        ("d.csv", "", r"no texts"),
        ("d.jsonl", '{"text": 3, "label": "x"}', r"line 1: 'text' is a number"),
        ("d.jsonl", '{"text": "a", "label": ["x"]}', r"line 1: 'label' is a list"),
        ("d.jsonl", '{"text": "a", "label": null}', r"line 1: 'label' is null"),
        ("d.jsonl", '{"text": "a", "label": "\\ud800"}', r"half a surrogate"),
        ("d.jsonl", "[]", r"line 1: a list, not an object"),
        ("d.jsonl", "text,label\n", r"line 1: no JSON"),
    ],
)
def test_broken_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        list_labelled(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("flag", ["text", "label"])
def test_a_column_that_is_not_there_is_named(work: Path, flag: str) -> None:
    with pytest.raises(DataError, match=rf"--{flag}-column 'topic' is no column.*'category'"):
        list_labelled(work / "data.csv", **{flag: "topic"})


LABELLED = {
    "a.csv": "text,category\na,x\n",
    "b.csv": "id,text,label\n1,a,x\n",
    "c.tsv": "text\tintent\na\tx\n",
    "d.jsonl": '{"text": "a", "label": "x"}\n',
}


@pytest.mark.parametrize("name", LABELLED)
def test_texts_with_classes_are_pointed_to_the_task(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LABELLED[name])
    with pytest.raises(DataError, match="Add --task text-classification"):
        check_data(tmp_path / name, "classification")
    check_data(tmp_path / name, "text-classification")


# The task.


@pytest.mark.parametrize(
    ("rows", "options", "error", "said"),
    [
        (
            [["red", "x"], ["lost", "x"]],
            {},
            DataError,
            r"d\.csv: 1 class, expected two or more \(x\)",
        ),
        (colours(), {"shots": 9}, DataError, r"has 4 texts, expected at least 9"),
        (colours(), {"shots": 4}, DataError, r"every one of the texts"),
        (colours(), {"hold_out": 0.2}, UsageError, r"--hold-out 0.2 holds out none of the texts"),
        (
            colours(),
            {"text_column": "X", "label_column": "x "},
            UsageError,
            r"--text-column and --label-column both name 'x '",
        ),
        (colours(), {"shots": None}, UsageError, r"all texts would be trained on"),
        (colours(), {"max_length": 2}, UsageError, r"--max-length is 2, expected at least 3"),
        (colours(), {"pooling": "max"}, UsageError, r"--pooling 'max', expected mean, cls"),
        (colours(), {"head_init": "zero"}, UsageError, r"--head-init 'zero', expected means,"),
    ],
)
def test_what_cannot_be_trained_on(
    work: Path, tmp_path: Path, rows: Any, options: Any, error: type[SvftoolError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        task(work, write_table(tmp_path / "d.csv", rows), **options).draw(0)
    assert "\n" not in str(caught.value)


def test_a_text_of_two_classes_is_said(work: Path, tmp_path: Path) -> None:
    assert task(work).said == ()
    rows = [*colours(), ["where is it", "fee"], ["where is it", "card"], ["where is it", "fee"]]
    data = write_table(tmp_path / "d.csv", rows)
    last = len(rows) + 1
    (said,) = task(work, data, shots=1).said
    assert f"more: 1, such as {data}: line {last - 2} (fee) and {data}: line {last - 1}" in said
    progress, facts = Told(), ModelFacts(folder=work / "model")
    make_tasks("text-classification", data, facts, {"shots": 1}, progress=progress)
    assert progress.warnings == [said]


def test_a_class_of_the_evaluation_alone_is_refused(work: Path, tmp_path: Path) -> None:
    other = write_table(tmp_path / "test.csv", [["red card", "red_thing"], ["fee", "fees"]])
    with pytest.raises(DataError, match=r"test.csv: unknown class fees, expected one of blue"):
        task(work, evaluation=other)


def test_a_length_beyond_the_model_is_refused(work: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-length is 13, the model takes 12 tokens"):
        task(work, config={"max_position_embeddings": 12}, max_length=13)
    assert task(work, config={"max_position_embeddings": 12}).encoding.length == 12


def test_long_texts_are_cut_counted_and_said(work: Path, tmp_path: Path) -> None:
    rows = [*colours(), ["red " * 40, "red_thing"], ["where " * 11, "blue_thing"]]
    made = task(work, write_table(tmp_path / "d.csv", rows), config={"max_position_embeddings": 12})
    draw = made.draw(0)
    prepared = draw.prepare(bert())
    assert "2 of 14 texts are longer than 12 tokens" in " ".join(prepared.said)
    both = task(work, tmp_path / "d.csv", shots=None, evaluation=tmp_path / "d.csv", max_length=12)
    measured = both.draw(0).prepare(bert(), start=False)
    assert "2 of 14 texts are longer than 12 tokens" in " ".join(measured.said)
    blocks = made._texts.blocks
    assert max(len(block.ids) for block in blocks) == 12
    assert all(block.ids[-1] == WORDS.index("[SEP]") for block in blocks)
    assert not draw.evaluate(prepared.model).keys() ^ {
        "accuracy", "macro_f1", "class_accuracy", "loss"
    }  # fmt: skip


def test_positions_that_the_model_lacks_are_one_line(work: Path, tmp_path: Path) -> None:
    data = write_table(tmp_path / "d.csv", [*colours(), ["red " * 40, "red_thing"]])
    with pytest.raises(ModelError, match=r"does not take texts of 42 tokens.*--max-length"):
        task(work, data).draw(0).prepare(bert())


def test_a_tokenizer_that_does_not_fit(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"data.csv: line \d+: token \d+ .*embeddings for 6"):
        task(work).draw(0).prepare(bert(vocabulary=6))
    small = write_words(tmp_path / "small", WORDS[:5])
    said = task(work, tokenizer=small).draw(0).prepare(bert()).said
    assert any("unknown to the tokenizer" in one for one in said)
    with pytest.raises(ModelError, match=r"no tokenizer, expected tokenizer.json, .*--tokenizer"):
        task(work, tokenizer=tmp_path)
    with pytest.raises(ModelError, match=r"nowhere: no such file or folder, .*--tokenizer"):
        task(work, tokenizer=tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"no tokenizer \(\w+: .+\), expected .*--tokenizer"
    ) as found:
        task(work, tokenizer=tmp_path)
    assert "\n" not in str(found.value)


# Features and heads.


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_features_are_those_of_each_text_alone(work: Path, pooling: Any) -> None:
    model, made = bert(), task(work, pooling=pooling)
    words = ["red card", "where is my lost green card", "fee"]
    blocks, _ = made.encoding.encode(words)
    with torch.inference_mode():
        together = text_features(model, **made.encoding.batch(blocks), pooling=pooling)
        alone = [model(block.ids[None]).last_hidden_state[0] for block in blocks]
    expected = torch.stack([one[0] if pooling == "cls" else one.mean(0) for one in alone])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


def test_pooling_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    assert stored_pooling(tmp_path) is None
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    for content, expected in [
        ('{"pooling_mode_cls_token": true}', "cls"),
        ('{"pooling_mode_mean_tokens": true}', "mean"),
        ("[]", None),
        ("{", None),
    ]:
        file.write_text(content)
        assert stored_pooling(tmp_path) == expected


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("head_type", ["linear", "cosine"])
def test_a_bare_encoder_gets_a_head_of_class_means(work: Path, kind: str, head_type: str) -> None:
    draw = task(work, shots=3, head_type=head_type).draw(0)
    prepared = draw.prepare(bert(kind))
    assert isinstance(prepared.model, TextClassifier)
    assert (prepared.head, prepared.new_head) == ("head", True)
    features, labels = [], []
    with torch.inference_mode():
        for batch, classes in draw._support.batches(torch.device("cpu")):
            features.append(text_features(prepared.model.backbone, **batch, pooling="mean"))
            labels.append(classes)
    unit = nn.functional.normalize(torch.cat(features), dim=1)
    known = torch.cat(labels)
    means = torch.stack([unit[known == c].mean(0) for c in range(3)])
    weight = prepared.model.get_parameter("head.weight")
    cosine = nn.functional.cosine_similarity(weight, means)
    torch.testing.assert_close(cosine, torch.ones(3), rtol=1e-4, atol=1e-4)


def test_a_head_of_names_needs_no_text_of_a_class(work: Path, tmp_path: Path) -> None:
    rows = [row for row in colours() if row[1] != "blue_thing"]
    classes = ["red_thing", "green_thing", "blue_thing"]
    data = write_table(tmp_path / "d.csv", rows)
    draw = task(work, data, head_init="names", classes=classes).draw(0)
    for start in (True, False):
        prepared = draw.prepare(bert(), start=start)
        assert prepared.begin is not None
        if not start:
            prepared.begin()
        blocks, _ = draw._task.encoding.encode([readable(name) for name in classes])
        batch = draw._task.encoding.batch(blocks)
        with torch.inference_mode():
            found = text_features(prepared.model.backbone, **batch, pooling="mean")
        weight = prepared.model.get_parameter("head.weight")
        cosine = nn.functional.cosine_similarity(weight, found)
        torch.testing.assert_close(cosine, torch.ones(3), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="no texts of class blue_thing"):
        task(work, data, classes=classes).draw(0).prepare(bert())


@pytest.mark.parametrize("head_type", ["linear", "cosine"])
def test_a_random_head_goes_by_the_seed(work: Path, head_type: str) -> None:
    made = task(work, head_init="random", head_type=head_type)
    one, same, other = (
        made.draw(seed).prepare(bert()).model.get_parameter("head.weight") for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_head_of_a_classifier_is_kept_or_replaced(work: Path) -> None:
    names = ("blue thing", "green thing", "red thing")
    kept = task(work, head_classes=names).draw(0)
    model = bert("BertForSequenceClassification", num_labels=3)
    before = model.classifier.weight.clone()
    prepared = kept.prepare(model)
    assert (prepared.head, prepared.new_head) == ("classifier", False)
    assert torch.equal(prepared.model.get_parameter("classifier.weight"), before)
    other = bert("BertForSequenceClassification", num_labels=5)
    prepared = task(work).draw(0).prepare(other)
    assert (prepared.head, prepared.new_head) == ("classifier", True)
    assert prepared.model.get_parameter("classifier.weight").shape == (3, 16)
    with pytest.raises(ModelError, match=r"has 5 outputs, the data 3 classes"):
        task(work, head="keep").draw(0).prepare(bert("BertForSequenceClassification", num_labels=5))


def test_pooling_is_said_to_do_nothing_for_a_classifier(work: Path) -> None:
    draw = task(work, pooling="cls").draw(0)
    said = "--pooling does nothing here"
    classifier = bert("BertForSequenceClassification", num_labels=5)
    assert any(said in one for one in draw.prepare(classifier).said)
    assert not any(said in one for one in draw.prepare(bert()).said)
    # What is evaluated brings the pooling that was recorded, asked for or not.
    assert not any(said in one for one in draw.prepare(classifier, start=False).said)


def test_rows_come_in_order_whatever_the_batches(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "svftool.tasks.encoded_texts"
    monkeypatch.setattr(f"{module}.tokens_at_once", lambda device: 14)
    monkeypatch.setattr(f"{module}.WINDOW", 4)
    draw = task(work).draw(0)
    model = draw.prepare(bert()).model.eval()
    examples = draw._parts["query"]
    rows = list(draw.predictions(model))
    assert [row["line"] for row in rows] == [examples.texts.texts[i].line for i in examples.indices]
    for position, row in enumerate(rows):
        with torch.inference_mode():
            logits = model(**examples.take([position]))[0]
        assert row["prediction"] == draw._task.classes[int(logits.argmax())]
        assert row["label"] == draw._task.classes[int(examples.labels[position])]
        assert row["probability"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)
    right = [row["label"] == row["prediction"] for row in rows]
    assert draw.evaluate(model)["accuracy"] == pytest.approx(np.mean(right))


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels, found = generator.integers(0, 4, 50), generator.integers(0, 5, 50)
    count = ClassificationCount(6)
    count.add(torch.eye(6)[torch.tensor(found)], torch.tensor(labels))
    expected = metrics.f1_score(labels, found, average="macro")
    assert count.macro_f1() == pytest.approx(expected)


def test_names_are_read_as_words() -> None:
    assert readable("Refund_not_showing_up") == "Refund not showing up"
    assert readable("__") == "__"


# All commands on one model.


@pytest.fixture(scope="module")
def tuned(work: Path) -> Path:
    """Factors and a tuned file."""
    bert().save_pretrained(work / "model")
    svftool.decompose(work / "model", work / "factors")
    svftool.finetune(
        work / "factors",
        data=work / "data.csv",
        output=work / "t.svf.safetensors",
        task="text-classification",
        shots=2,
        settings=Settings(steps=3),
    )
    return work


def test_evaluate_gives_the_numbers_of_finetune(tuned: Path) -> None:
    found = svftool.evaluate(
        tuned / "factors",
        data=tuned / "data.csv",
        tuned=tuned / "t.svf.safetensors",
        task="text-classification",
        shots=2,
        predictions=tuned / "rows.jsonl",
    )
    assert found.runs[0].metrics.keys() == {"accuracy", "macro_f1", "class_accuracy", "loss"}
    rows = [json.loads(line) for line in (tuned / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert found.settings["tokenizer"].value == str(tuned / "model")
    (tuned / "new.txt").write_text("\n".join(text for text, _ in colours()))
    new = svftool.predict(tuned / "factors", tuned / "new.txt", tuned=tuned / "t.svf.safetensors")
    assert new.task == "text-classification"
    lines = {row["line"] - 1: row["prediction"] for row in rows}
    assert {line: new.rows[line - 1]["prediction"] for line in lines} == lines


def test_names_alone_make_a_classifier(tuned: Path) -> None:
    found = svftool.evaluate(
        tuned / "model", data=tuned / "data.csv", task="text-classification", head_init="names"
    )
    assert 0.0 <= found.runs[0].metrics["accuracy"] <= 1.0
    with pytest.raises(ModelError, match="no head for the data's 3 classes"):
        svftool.evaluate(tuned / "model", data=tuned / "data.csv", task="text-classification")


def test_predict_refuses_options_of_other_tasks(tuned: Path) -> None:
    with pytest.raises(UsageError, match=r"--image-size has no meaning for --task text-class"):
        svftool.predict(
            tuned / "factors",
            tuned / "data.csv",
            tuned=tuned / "t.svf.safetensors",
            image_size=32,
        )
