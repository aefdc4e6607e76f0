"""The model card of what is put on the Hugging Face hub: what it is, of what, by which command."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, RenderableType

from svftool.files.hub import hub_package
from svftool.report.text import safe
from svftool.version import __version__

Relation = Literal["adapter", "finetune", "merge", "quantized"]
WIDTH = 96


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes
    ----------
    title : str
    base : str or None
        The repository of the base; None where it is not known to be on the hub.
    relation : {"adapter", "finetune", "merge", "quantized"}
        To the base, in the hub's words.
    library : str or None
        What loads the files.
    words : sequence of str
        The command.
    summary : RenderableType
        What the command showed.
    """

    title: str
    base: str | None
    relation: Relation
    library: str | None
    words: Sequence[str]
    summary: RenderableType

    def text(self) -> str:
        """Return the card, its metadata at the head."""
        hub = hub_package("a model card")
        about = {} if self.base is None else {"base_model_relation": self.relation}
        data = hub.ModelCardData(
            base_model=self.base, library_name=self.library, tags=["svftool"], **about
        )
        command = shlex.join(["svftool", *map(_plain, self.words)])
        return (
            f"---\n{data.to_yaml()}\n---\n\n# {safe(self.title)}\n\n"
            f"Made by svftool {__version__}"
            + (f" from [{self.base}](https://huggingface.co/{self.base})" if self.base else "")
            + f":\n\n```bash\n{safe(command)}\n```\n\n```text\n{_drawn(self.summary)}\n```\n"
        )


def _plain(word: str) -> str:
    """Return a word of the command without the folders of this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def _drawn(view: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())
