"""Texts to blocks of tokens, each token of which is predicted once, and blocks to batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svftool.errors import MissingDependencyError, ModelError, brief, system_fault
from svftool.files.side_files import TOKENIZERS
from svftool.tasks.chat import encode_chat
from svftool.tasks.texts import Text

LONGEST_DEFAULT = 1024
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_NO_LIMIT = 10**9
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Block:
    """A stretch of one text that the model sees at once.

    Attributes
    ----------
    ids : (T,) int64 Tensor
        Tokens.
    targets : (T,) bool Tensor
        Which of them are predicted from those before; never the first.
    text : int
        The text's place in its list.
    """

    ids: Tensor
    targets: Tensor
    text: int


class Placed(Protocol):
    """What stands in a line of a file."""

    @property
    def file(self) -> Path:
        """The file."""

    @property
    def line(self) -> int:
        """Which line, from 1."""


def load_tokenizer(
    place: str | os.PathLike[str] | None,
    *,
    trust_remote_code: bool = False,
    task: str = "language",
) -> Any:
    """Load the tokenizer of a folder in transformers' layout, or of a GGUF file.

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.
    ModelError
        If there is none.
    """
    try:
        import transformers
    except ImportError:
        purpose = f"task {task}"
        raise MissingDependencyError("transformers", extra="language", purpose=purpose) from None
    hint = "Name the folder of the model's tokenizer with --tokenizer"
    if place is None:
        raise ModelError(f"no tokenizer is known for the model. {hint}")
    path = Path(place)
    blocks = {"gguf_file": path.name} if path.suffix == ".gguf" and path.is_file() else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            os.fspath(path.parent if blocks else place),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **blocks,
        )
    except Exception as error:
        system_fault(error, place)
        raise ModelError(f"{place}: {_no_tokenizer(path, error)}. {hint}") from error
    # Without files of its own a class of transformers may come up with an empty vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{place}: the tokenizer is empty, expected tokenizer.json. {hint}")
    return tokenizer


def _no_tokenizer(place: Path, error: Exception) -> str:
    """Say why there is no tokenizer at a place: no file of one, or what transformers made of it."""
    if not place.exists():
        return "no such file or folder, expected a tokenizer"
    if place.is_dir() and not any((place / name).is_file() for name in TOKENIZERS):
        return f"no tokenizer, expected {', '.join(TOKENIZERS[:2])} or another file of one there"
    reason = " ".join(str(error).split())[:_LONGEST_REASON]
    return (
        f"no tokenizer ({type(error).__name__}: {reason}), expected tokenizer.json beside the "
        "weights"
    )


def length_limit(config: Mapping[str, Any], tokenizer: Any) -> int | None:
    """Longest sequence that a model takes by its ``config.json`` and its tokenizer, if they say.

    Raises
    ------
    ModelError
        If what they say is no length.
    """
    nested = config.get("text_config")
    sources = [config, nested] if isinstance(nested, Mapping) else [config]
    said = [(key, source[key]) for source in sources for key in _LIMITS if key in source]
    said.append(("model_max_length", getattr(tokenizer, "model_max_length", None)))
    for key, value in said:
        if isinstance(value, bool) or not isinstance(value, int | float | None) or value == 1:
            raise ModelError(
                f"{key} is {brief(value)}, expected how many tokens the model takes, two or more. "
                "Repair config.json or the tokenizer's."
            )
    limits = [int(value) for _, value in said if value is not None and 0 < value < _NO_LIMIT]
    return min(limits, default=None)


def vocabulary(model: nn.Module) -> int | None:
    """Return the rows of a model's input embedding, where it says which that is."""
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return None
    try:
        weight = getattr(getter(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return len(weight) if isinstance(weight, Tensor) else None


def padding_within(padding: int, known: int | None) -> tuple[int, list[str]]:
    """Return a padding token that has an embedding, and what is said of it."""
    if known is None or 0 <= padding < known:
        return padding, []
    return 0, [
        f"the tokenizer pads with token {padding}, the model has embeddings for {known}: padded "
        "with token 0, which is masked as any padding is"
    ]


def refuse_unknown(
    texts: Sequence[Placed], blocks: Sequence[Block], tokenizer: Any, known: int | None
) -> None:
    """Refuse tokens that have no embedding.

    Raises
    ------
    ModelError
        Names the first, and where its text stands.
    """
    for block in blocks if known is not None else ():
        largest = int(block.ids.max())
        if known is not None and largest >= known:
            text = texts[block.text]
            token = tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"{text.file}: line {text.line}: token {largest} ({token!r}), the model has "
                f"embeddings for {known}. Name its own tokenizer with --tokenizer"
            )


def encode(text: Text, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return a text's tokens, and whether each belongs to what is learned.

    Prompt and completion are tokenised as one string, as a model that writes the completion would
    see them; a token that reaches into the completion belongs to it. A completion ends with the
    tokenizer's end-of-sequence token; a text does not, because it may be cut from a longer one.
    Of conversations see `svftool.tasks.chat.encode_chat`.
    """
    if text.turns:
        return encode_chat(text, tokenizer)[:2]
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text.prompt + text.body, return_offsets_mapping=True, verbose=False)
        ids = list(found["input_ids"])
        learned = [end > len(text.prompt) for _, end in found["offset_mapping"]]
    else:
        ids = list(tokenizer(text.prompt, verbose=False)["input_ids"])
        body = tokenizer(text.body, add_special_tokens=False, verbose=False)["input_ids"]
        learned = [False] * len(ids) + [True] * len(body)
        ids += body
    end = getattr(tokenizer, "eos_token_id", None)
    if text.complete and end is not None:
        if ids and ids[-1] == end:
            learned[-1] = True
        else:
            ids.append(end)
            learned.append(True)
    return ids, learned


def dropped(learned: Sequence[bool], length: int) -> int:
    """Return how many tokens `cut` drops at the beginning of a long prompt.

    Examples
    --------
    >>> dropped([False] * 6 + [True] * 2, 4), dropped([False] + [True] * 7, 4)
    (4, 0)
    """
    first = learned.index(True) if True in learned else len(learned)
    return max(0, min(len(learned) - length, first - 1))


def refuse_misfit(tokenizer: Any, known: int | None) -> None:
    """Refuse a tokenizer that is made for more tokens than the model has embeddings for.

    Tokens that were added to it later, for padding say, may be beyond: a text that holds one is
    refused by `refuse_unknown`.

    Raises
    ------
    ModelError
        If its own vocabulary is larger.
    """
    try:
        size = getattr(tokenizer, "vocab_size", None)
    except NotImplementedError:
        size = None
    if known is not None and isinstance(size, int) and size > known:
        raise ModelError(
            f"the tokenizer is made for {size} tokens, the model has embeddings for {known}. Name "
            "the model's own tokenizer with --tokenizer"
        )


def cut(ids: Sequence[int], learned: Sequence[bool], length: int, text: int) -> list[Block]:
    """Cut a text's tokens to blocks of at most `length`.

    A long prompt first loses its beginning, so that the completion, or as much of it as fits, is
    seen with the prompt's end. What is still too long is cut in blocks that overlap by one token,
    so that every token but the text's first is predicted once. Blocks in which nothing is learned
    are left out.

    Parameters
    ----------
    ids : sequence of int
    learned : sequence of bool
        Which tokens are learned.
    length : int
        At least 2.
    text : int
        Kept in the blocks.

    Examples
    --------
    >>> [block.ids.tolist() for block in cut([1, 2, 3, 4, 5], [True] * 5, 3, 0)]
    [[1, 2, 3], [3, 4, 5]]
    """
    drop = dropped(learned, length)
    tokens = torch.tensor(ids[drop:], dtype=torch.int64)
    wanted = torch.tensor(learned[drop:], dtype=torch.bool)
    blocks = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        targets = wanted[start : start + length].clone()
        targets[:1] = False
        if bool(targets.any()):
            blocks.append(Block(tokens[start : start + length].clone(), targets, text))
    return blocks


def collate(blocks: Sequence[Block], padding: int) -> dict[str, Tensor]:
    """Pad blocks on the right to the longest.

    Returns
    -------
    dict of str to Tensor
        ``input_ids`` and ``attention_mask``, (N, T) int64; ``targets``, (N, T) bool.
    """
    longest = max(len(block.ids) for block in blocks)
    ids = torch.full((len(blocks), longest), padding, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, block in enumerate(blocks):
        count = len(block.ids)
        ids[row, :count], mask[row, :count] = block.ids, 1
        targets[row, :count] = block.targets
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def by_length(blocks: Sequence[Block], tokens: int) -> Iterator[list[int]]:
    """Group the blocks' positions to batches of similar length, of at most so many tokens padded.

    Examples
    --------
    >>> blocks = [cut([1] * n, [True] * n, 99, 0)[0] for n in (2, 9, 3)]
    >>> list(by_length(blocks, 9))
    [[1], [2, 0]]
    """
    group: list[int] = []
    for position in sorted(range(len(blocks)), key=lambda i: (-len(blocks[i].ids), i)):
        if group and (len(group) + 1) * len(blocks[group[0]].ids) > tokens:
            yield group
            group = []
        group.append(position)
    if group:
        yield group
