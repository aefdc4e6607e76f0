"""What PEFT warns of: left out where svftool decided it, and said in plain words otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from svftool.errors import brief

_DECIDED = (
    "fan_in_fan_out is set to",  # PEFT finds out by itself how each layer's weight lies
    "Setting `save_embedding_layers`",
    "Could not find a config file",
    "Could not identify embedding layer",
)
"""How warnings begin that ask for nothing."""

_TIED = (
    "LoRA changes one side of a weight that input and output embeddings share: 'svftool merge' "
    "takes no such adapter, because it would change both. Leave that layer out with --exclude"
)


@contextmanager
def peft_warnings() -> Iterator[list[str]]:
    """Context in which PEFT warns nobody; gives a list that holds what to say of it at the end.

    Yields
    ------
    list of str
        A sentence each.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # PEFT asks transformers' models about gradient checkpointing by a name of the past.
        warnings.simplefilter("ignore", FutureWarning)
        yield said
    for one in caught:
        text = " ".join(str(one.message).split())
        if not text.startswith(_DECIDED):
            said.append(_TIED if "tie_word_embeddings" in text else f"PEFT: {brief(text, 200)}")
    said[:] = dict.fromkeys(said)
