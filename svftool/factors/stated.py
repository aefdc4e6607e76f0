"""What a tuned file says of its training, and how a merge hands it on.

A number measured on weights depends on settings that are not in the weights: the length of a
sequence, the size of a picture, the order of the classes. So they go wherever the weights go.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from svftool.factors.tuned import TunedFile

MERGED_KEY = "svftool_merged"
"""Key of the metadata of a dense checkpoint under which a merge hands on what was stated."""

_VERSION = 1
_DIGEST_BYTES = 8
_MOST_DIGESTS = 2048


@dataclass(frozen=True)
class Support:
    """The examples that were trained on, known again by their bytes.

    Of many examples those with the smallest digests stand for all: 16 KB at most.

    Attributes
    ----------
    examples : int
        How many there were.
    digests : frozenset of bytes
        The first eight bytes of their SHA-256.
    """

    examples: int
    digests: frozenset[bytes]

    @classmethod
    def of(cls, contents: Iterable[bytes]) -> Self:
        """Digest the contents of examples."""
        found = digests_of(contents)
        return cls(len(found), frozenset(sorted(set(found))[:_MOST_DIGESTS]))

    @property
    def sha256(self) -> str:
        """Hash of the digests, whatever the order of the examples."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()

    def count(self, contents: Iterable[bytes]) -> int:
        """Count the examples that are among these; no more, where some stand for all."""
        return sum(digest in self.digests for digest in digests_of(contents))

    def __or__(self, other: Support) -> Support:
        """Return the examples of both."""
        digests = sorted(self.digests | other.digests)[:_MOST_DIGESTS]
        return Support(self.examples + other.examples, frozenset(digests))

    def to_plain(self) -> dict[str, Any]:
        """Return it as values that JSON holds."""
        packed = base64.b64encode(b"".join(sorted(self.digests))).decode()
        return {"examples": self.examples, "digests": packed}

    @classmethod
    def from_plain(cls, value: Any) -> Self | None:
        """Read back what `to_plain` gave; None for anything else."""
        try:
            packed = base64.b64decode(value["digests"], validate=True)
            step = _DIGEST_BYTES
            parts = [packed[at : at + step] for at in range(0, len(packed), step)]
            return cls(int(value["examples"]), frozenset(parts))
        except (KeyError, TypeError, ValueError):
            return None


def digests_of(contents: Iterable[bytes]) -> list[bytes]:
    """Return the first eight bytes of the SHA-256 of each."""
    return [hashlib.sha256(one).digest()[:_DIGEST_BYTES] for one in contents]


@dataclass(frozen=True)
class Stated:
    """What weights say of how they were trained.

    Attributes
    ----------
    task : str or None
        What they were trained for.
    classes : tuple of str or None
        Class names in the order of the head's outputs.
    training : mapping
        Summary of the training; ``data`` holds what the task said of its settings.
    unlike : mapping of str to list
        Settings in which the files of a mixture differ, with their values; none of them is kept.
    """

    task: str | None = None
    classes: tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    unlike: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def support(self) -> Support | None:
        """The examples that were trained on, where they are known."""
        return Support.from_plain(self.training.get("support"))

    @property
    def data(self) -> Mapping[str, Any]:
        """What the task said of its data and settings."""
        found = self.training.get("data")
        return found if isinstance(found, Mapping) else {}

    def to_text(self) -> str:
        """Return it as the metadata of a checkpoint."""
        facts = {
            "schema_version": _VERSION,
            "task": self.task,
            "classes": None if self.classes is None else list(self.classes),
            "training": dict(self.training),
        }
        return json.dumps(facts, sort_keys=True)


def stated_by(mixed: Sequence[tuple[TunedFile, float]]) -> Stated:
    """Gather what tuned files agree on, and what they were.

    Parameters
    ----------
    mixed : sequence of (TunedFile, float)
        The files and their weights. One alone, with weight 1, is handed on as it is.
    """
    files = [one for one, _ in mixed]
    if len(mixed) == 1 and mixed[0][1] == 1.0:
        return Stated(files[0].task, files[0].classes, dict(files[0].training))
    known = [one.training["data"] for one in files if isinstance(one.training.get("data"), Mapping)]
    named = list(dict.fromkeys(name for data in known for name in data))
    values = {name: [data[name] for data in known if name in data] for name in named}
    unlike = {name: of for name, of in values.items() if any(one != of[0] for one in of)}
    data = {name: of[0] for name, of in values.items() if name not in unlike}
    training: dict[str, Any] = {"mixture": [_part(one, weight) for one, weight in mixed]}
    for name in ("regime", "seed"):
        found = [one.training[name] for one in files if name in one.training]
        if found and all(one == found[0] for one in found):
            training[name] = found[0]
    if data:
        training["data"] = data
    support = [Support.from_plain(one.training.get("support")) for one in files]
    seen = [one for one in support if one is not None]
    if seen:
        training["support"] = functools.reduce(operator.or_, seen).to_plain()
    tasks = {one.task for one in files if one.task is not None}
    classes = {one.classes for one in files if one.classes is not None}
    return Stated(
        tasks.pop() if len(tasks) == 1 else None,
        classes.pop() if len(classes) == 1 else None,
        training,
        unlike,
    )


def _part(tuned: TunedFile, weight: float) -> dict[str, Any]:
    """Name a file of a mixture by what does not change where it lies."""
    return {
        "file": tuned.path.name,
        "weight": weight,
        "sha256": hashlib.sha256(tuned.path.read_bytes()).hexdigest(),
        **{name: tuned.training[name] for name in ("regime", "seed") if name in tuned.training},
    }


def read_stated(metadata: Mapping[str, str]) -> Stated | None:
    """Return what a merge handed on in a checkpoint's metadata; None where it is not understood."""
    try:
        facts = json.loads(metadata[MERGED_KEY])
        if facts["schema_version"] != _VERSION:
            return None
        classes = facts["classes"]
        return Stated(
            facts["task"],
            None if classes is None else tuple(map(str, classes)),
            dict(facts["training"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
