"""The texts of tokens, as the files beside a checkpoint give them; no tokenizer is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svftool.errors import CheckpointError
from svftool.files.folder import read_object
from svftool.files.gguf import read_gguf_header, read_gguf_texts

_MOST = 1 << 24
_SPACE = "\u2581"


def read_vocabulary(checkpoint: Path) -> list[str] | None:
    """Return the text of each token by its number.

    Parameters
    ----------
    checkpoint : Path
        A folder, a file in one, or a GGUF file, which holds the tokens itself.

    Returns
    -------
    list of str or None
        "" for numbers without a token; None where no tokenizer is there.

    Raises
    ------
    CheckpointError
        If there is one and it cannot be read.
    """
    if checkpoint.suffix == ".gguf" and checkpoint.is_file():
        header = read_gguf_header(checkpoint)
        found = read_gguf_texts(checkpoint, header, "tokenizer.ggml.tokens")
        bytewise = header.metadata.get("tokenizer.ggml.model") == "gpt2"
        return None if found is None else [_readable(text, bytewise) for text in found]
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for name, read in (("tokenizer.json", _fast), ("vocab.json", _plain), ("vocab.txt", _lines)):
        if (folder / name).is_file():
            return read(folder / name)
    return None


def _fast(path: Path) -> list[str]:
    """Read ``tokenizer.json``: the model's vocabulary and what was added to it."""
    held = read_object(path, "a tokenizer")
    model, added = held.get("model"), held.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    bytewise = any(_has_bytes(held.get(key)) for key in ("decoder", "pre_tokenizer"))
    tokens: list[tuple[Any, Any]] = []
    if isinstance(vocabulary, Mapping):
        tokens += [(number, text) for text, number in vocabulary.items()]
    elif isinstance(vocabulary, list):
        tokens += [(i, one[0]) for i, one in enumerate(vocabulary) if isinstance(one, list) and one]
    named = [one for one in added if isinstance(one, Mapping)] if isinstance(added, list) else []
    tokens = [(i, _readable(text, bytewise)) for i, text in tokens if isinstance(text, str)]
    return _placed([*tokens, *((one.get("id"), one.get("content")) for one in named)], path)


def _has_bytes(part: Any) -> bool:
    """Tell whether a part of a tokenizer, or one inside it, writes bytes as letters."""
    if not isinstance(part, Mapping):
        return False
    inner = [*(part.get("decoders") or ()), *(part.get("pretokenizers") or ())]
    return part.get("type") == "ByteLevel" or any(map(_has_bytes, inner))


def _plain(path: Path) -> list[str]:
    """Read ``vocab.json`` of GPT-2 and its like, whose tokens are bytes."""
    held = read_object(path, "tokens with their numbers")
    return _placed([(i, _readable(text, True)) for text, i in held.items()], path)


def _lines(path: Path) -> list[str]:
    """Read ``vocab.txt`` of BERT and its like, one token a line."""
    return path.read_text("utf-8", "replace").splitlines()


def _placed(tokens: Iterable[tuple[Any, Any]], path: Path) -> list[str]:
    known = {
        i: text
        for i, text in tokens
        if isinstance(text, str) and isinstance(i, int) and 0 <= i < _MOST
    }
    if not known:
        raise CheckpointError(f"{path}: no tokens in it, expected a vocabulary. Fetch it anew.")
    return [known.get(i, "") for i in range(max(known) + 1)]


def _letters() -> dict[int, int]:
    """Return the byte that each letter stands for.

    Byte-level vocabularies write bytes that are no printable letter of Latin-1 as letters from 256
    on, in their order (Radford et al., Language models are unsupervised multitask learners, 2019).
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {byte: byte for byte in printed} | {256 + i: byte for i, byte in enumerate(others)}


_BYTES = _letters()


def _readable(text: str, bytewise: bool) -> str:
    """Return a token as it stands in a text."""
    if bytewise and all(ord(letter) in _BYTES for letter in text):
        return bytes(_BYTES[ord(letter)] for letter in text).decode("utf-8", "replace")
    return text.replace(_SPACE, " ")
