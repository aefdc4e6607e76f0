"""Conversations: what of them is learned, and what a template, or a file, may not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language import WORDS, write_model, write_texts, write_tokenizer

from svftool.errors import DataError, ModelError
from svftool.tasks.chat import encode_chat
from svftool.tasks.language import Language
from svftool.tasks.texts import Text, list_texts
from svftool.tasks.tokens import encode, load_tokenizer, refuse_misfit

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '.' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '.' }}{% endif %}{% endfor %}"
)
COUNTED = "{{ 'abc'[messages | length - 1] }}" + PLAIN
REFUSING = "{{ raise_exception('roles must alternate') }}"

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "six?"},
    {"role": "assistant", "content": "ten"},
]


def chat(messages: list[dict[str, str]]) -> Text:
    turns = tuple((one["role"], one["content"]) for one in messages)
    return Text("", "", False, Path("a.jsonl"), 3, turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """Return a tokenizer of single characters without a template."""
    return load_tokenizer(folder)


class Slow:
    """A tokenizer that does not know where its tokens come from."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *texts: str, **options: Any) -> Any:
        return self._inner(*texts, **options)


def learned(text: Text, tokenizer: Any) -> tuple[str, str, bool]:
    """Return the words of all tokens, and of those that are learned."""
    ids, marks, told = encode_chat(text, tokenizer)
    words = tokenizer.convert_ids_to_tokens(ids)
    picked = [word if mark else "|" for word, mark in zip(words, marks, strict=True)]
    return "".join(words), "".join(picked), told


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by its prompts", "by its marks"])
def test_the_words_of_the_assistant_are_learned(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    whole, picked, told = learned(chat(CHAT), tokenizer)
    assert told
    assert whole == "user: one.assistant: two.user: six?.assistant: ten."
    assert [part for part in picked.split("|") if part] == ["two.", "ten."]
    assert encode(chat(CHAT), tokenizer) == encode_chat(chat(CHAT), tokenizer)[:2]
    slow = Slow(tokenizer)
    if template is PLAIN:
        assert encode_chat(chat(CHAT), slow) == encode_chat(chat(CHAT), tokenizer)


def test_where_the_template_does_not_tell_all_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = COUNTED
    whole, picked, told = learned(chat(CHAT), tokenizer)
    assert (picked, told) == (whole, False)


def test_a_conversation_that_no_template_takes_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no chat template, expected one for 'messages'"):
        encode_chat(chat(CHAT), tokenizer)
    tokenizer.chat_template = REFUSING
    with pytest.raises(DataError, match=r"a.jsonl: line 3: .*\(roles must alternate\)"):
        encode_chat(chat(CHAT), tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' is a string, not a list"),
        ([], "'messages' is empty"),
        (["hello"], "message 1 is a string, not an object"),
        ([*CHAT, {"content": "x"}], "message 5: no 'role'"),
        ([{"role": "assistant", "content": ["x"]}], "message 1: 'content' is a list, not a string"),
        (CHAT[:1], "no message of the role 'assistant'"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "no message of the role 'assistant'"),
    ],
)
def test_messages_that_are_none_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    data = write_texts(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(DataError, match=message) as caught:
        list_texts(data)
    assert "line 2: " in str(caught.value)
    assert "'messages' in each line" in str(caught.value)


def task_of(folder: Path, data: Path, template: str | None, **options: Any) -> Language:
    place = data.parent / "tokenizer"
    write_tokenizer(place)
    if template is not None:
        config = place / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    return Language(data, tokenizer=place, evaluation="none", **options)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (PLAIN, "2 conversations by the tokenizer's chat template: the assistant's turns alone"),
        (COUNTED, "does not tell the assistant's turns in 2 of 2 conversations: all of their"),
    ],
)
def test_what_is_learned_is_said_and_trained(
    folder: Path, tmp_path: Path, template: str, said: str
) -> None:
    from transformers import AutoModelForCausalLM

    data = write_texts(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    draw = task_of(folder, data, template).draw(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [one for one in draw.prepare(model).said if said in one]
    batch = draw.batch(torch.arange(2), torch.Generator())
    expected = 12 if template is PLAIN else int(batch["attention_mask"].sum()) - 2
    assert draw.terms(batch) == expected
    assert len({*draw.contents("support")}) == 2
    draw.loss(model, batch).backward()
    assert float(model.get_input_embeddings().weight.grad.abs().max()) > 0


def test_what_is_cut_is_counted_and_said(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = [
        {"text": "abc " * 9},
        {"prompt": "abc " * 9, "completion": "x"},
        {"text": "abc"},
        {"messages": CHAT},
    ]
    data = write_texts(tmp_path / "d.jsonl", rows)
    draw = task_of(folder, data, PLAIN, sequence_length=16).draw(0)
    said = draw.prepare(AutoModelForCausalLM.from_pretrained(folder)).said
    assert any("2 of 4 texts are longer than the 16 tokens" in one for one in said)
    assert any("2 of 4 prompts are too long for 16 tokens" in one for one in said)
    assert all(len(block.ids) <= 16 for block in draw._support.blocks)
    whole = task_of(folder, data, PLAIN, sequence_length=64).draw(0)
    said = whole.prepare(AutoModelForCausalLM.from_pretrained(folder)).said
    assert not any("longer" in one or "too long" in one for one in said)


def test_a_tokenizer_for_more_tokens_than_the_model_has_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    # The texts hold none of the tokens that the model lacks.
    write_tokenizer(tmp_path / "large", [*WORDS, *map(str, range(10))])
    task = Language(
        write_texts(tmp_path / "d.jsonl", [{"text": "abc"}, {"text": "abd"}]),
        tokenizer=tmp_path / "large",
        evaluation="none",
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = f"made for {len(WORDS) + 10} tokens, the model has embeddings for {len(WORDS)}"
    with pytest.raises(ModelError, match=expected):
        task.draw(0).prepare(model)
    refuse_misfit(task.tokenizer, None)
    added = load_tokenizer(folder)
    added.add_special_tokens({"pad_token": "<pad>"})
    refuse_misfit(added, len(WORDS))
