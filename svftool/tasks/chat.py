"""Conversations to tokens, by the tokenizer's chat template; what assistants say is learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from svftool.errors import DataError, MissingDependencyError, ModelError
from svftool.tasks.texts import Text

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template puts around the words of assistants, where it says so itself."""

Span = tuple[int, int]


def encode_chat(text: Text, tokenizer: Any) -> tuple[list[int], list[bool], bool]:
    """Return a conversation's tokens, which of them are learned, and whether the template tells.

    The words of assistants are those between the template's ``generation`` marks. A template
    without such marks still tells them, if the conversation up to a turn begins as the
    conversation up to the next does: what a turn adds behind the prompt for it is the turn, with
    the mark of its end. Of other templates the whole conversation is learned.

    Parameters
    ----------
    text : Text
        With `turns`.
    tokenizer : object
        One of transformers.

    Raises
    ------
    DataError
        If the template takes no such conversation.
    MissingDependencyError
        If jinja2, which templates are written for, is not installed.
    ModelError
        If the tokenizer has no chat template.
    """
    template = _template(tokenizer)
    messages = [{"role": role, "content": words} for role, words in text.turns]

    def render(count: int, **options: Any) -> Any:
        options = {"tokenize": False, **options}
        return tokenizer.apply_chat_template(messages[:count], **options)

    try:
        if _GENERATION.search(template) and getattr(tokenizer, "is_fast", False):
            marked = render(
                len(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            learned = [bool(one) for one in marked["assistant_masks"]]
            if any(learned):
                return list(marked["input_ids"]), learned, True
        whole = str(render(len(messages)))
    except ImportError:
        purpose = "a chat template"
        raise MissingDependencyError("jinja2", extra="report", purpose=purpose) from None
    except Exception as error:  # templates raise whatever their authors chose
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{text.file}: line {text.line}: the tokenizer's chat template does not take it "
            f"({words}), expected roles and an order that it knows. Mend the line or remove it"
        ) from error
    spans = _assistant_spans(text.turns, whole, render)
    ids, places = _tokens(whole, spans, tokenizer)
    if not spans:
        return ids, [True] * len(ids), False
    return ids, places, True


def _template(tokenizer: Any) -> str:
    try:
        found = tokenizer.get_chat_template()
    except (AttributeError, ValueError):
        found = None
    if not isinstance(found, str) or not found:
        raise ModelError(
            "the tokenizer has no chat template, expected one for 'messages'. Give the data as "
            "'prompt' and 'completion', or name a tokenizer that has one with --tokenizer"
        )
    return found


def _assistant_spans(
    turns: Sequence[tuple[str, str]], whole: str, render: Callable[..., Any]
) -> list[Span]:
    """Find the characters of each assistant's turn; none where the template does not tell."""
    spans = []
    for number, (role, _) in enumerate(turns):
        if role != ASSISTANT:
            continue
        try:
            before = str(render(number, add_generation_prompt=True))
            behind = str(render(number + 1))
        except Exception:  # noqa: BLE001  (a template may not take a part of a conversation)
            return []
        if not (whole.startswith(behind) and behind.startswith(before)):
            return []
        spans.append((len(before), len(behind)))
    return spans


def _tokens(whole: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenise a rendered conversation, which has its special tokens, and mark what is in spans."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        marks = [
            any(start < last and end > first for first, last in spans)
            for start, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), marks
    ids: list[int] = []
    learned: list[bool] = []
    edges = [0, *(edge for span in spans for edge in span), len(whole)]
    for number, (start, end) in enumerate(pairwise(edges)):
        part = tokenizer(whole[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids += part
        learned += [number % 2 == 1] * len(part)
    return ids, learned
