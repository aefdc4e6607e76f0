"""``--push-to-hub``, for commands that write a model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from svftool.cli import common
from svftool.errors import SvftoolError, UsageError
from svftool.files.folder import read_config, read_object
from svftool.files.hub_ids import hub_place, is_on_hub
from svftool.files.names import FACTORS_FILE
from svftool.files.pipeline import is_pipeline

if TYPE_CHECKING:
    from svftool.report.card import Relation

_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class PushFlags:
    """Where the output goes besides."""

    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Put the output on the Hugging Face hub, too."),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="Of --push-to-hub: a new repository is private.")
    ] = False
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Of --push-to-hub: as a pull request.")
    ] = False

    def check(self) -> None:
        """Refuse before any work what the hub would refuse at its end.

        Raises
        ------
        UsageError
            If the name is none, nobody is logged in, or there is nothing to push.
        """
        if self.push_to_hub is None:
            if self.private or self.create_pr:
                flag = "--private" if self.private else "--create-pr"
                raise UsageError(f"{flag} is an option of --push-to-hub, expected that with it")
            return
        if common.is_first_process():
            from svftool.files.hub import check_push

            check_push(self.push_to_hub)

    def push(
        self,
        output: Path,
        view: RenderableType,
        *,
        base: str | Path,
        relation: Relation,
        library: str | None = "svftool",
    ) -> None:
        """Put an output on the hub with a model card, if that was asked for.

        Parameters
        ----------
        output : Path
        view : RenderableType
            What the command showed.
        base : str or Path
            What it was made from.
        relation : {"adapter", "finetune", "merge", "quantized"}
        library : str or None
            What loads it.
        """
        if self.push_to_hub is None or not common.is_first_process():
            return
        from svftool.files.hub import push
        from svftool.report.card import Card

        card = Card(
            title=self.push_to_hub.rpartition("/")[2],
            base=base_model(base),
            relation=relation,
            library=library,
            words=common.words(),
            summary=view,
        )
        url = push(
            output,
            self.push_to_hub,
            card=card.text(),
            private=self.private,
            create_pr=self.create_pr,
        )
        common.stderr().print(f"pushed to {url}", style="dim", markup=False)


def base_model(base: str | Path) -> str | None:
    """Return the repository of a base, where anything says that it has one."""
    text = str(base)
    place = hub_place(text)
    if place is not None and is_on_hub(text):
        return place.repo
    folder = Path(base).resolve()
    try:
        if (folder / FACTORS_FILE).is_file():
            return _recorded(folder)
        if is_pipeline(folder):
            return _in_cache(folder) or _recorded_in_parts(folder)
        stated = (read_config(folder if folder.is_dir() else folder.parent) or {}).get(
            "_name_or_path"
        )
    except SvftoolError:
        return None
    found = hub_place(stated) if isinstance(stated, str) else None
    return _in_cache(folder) or (None if found is None else found.repo)


def _recorded_in_parts(folder: Path) -> str | None:
    found = {_recorded(one.parent) for one in folder.glob(f"*/{FACTORS_FILE}")}
    return found.pop() if len(found) == 1 else None


def _recorded(folder: Path) -> str | None:
    """Return the repository that factors were made from."""
    base = read_object(folder / FACTORS_FILE, "the configuration of factors").get("base")
    if not isinstance(base, dict):
        return None
    named = base.get("hub") and hub_place(str(base.get("place") or base.get("hub")))
    return named.repo if named else _in_cache(Path(str(base.get("place", ""))))


def _in_cache(path: Path) -> str | None:
    """Read the repository from a path within a cache of the hub."""
    found = next(filter(None, map(_IN_CACHE.fullmatch, path.parts)), None)
    return None if found is None else f"{found[1]}/{found[2]}"


def library_of(output: Path) -> str | None:
    """Say what loads a dense output, by its configuration."""
    if is_pipeline(output):
        return "diffusers"
    if not output.is_dir():
        return None
    if (output / "adapter_config.json").is_file():
        return "peft"
    try:
        config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "_class_name" in config:
        return "diffusers"
    if "pretrained_cfg" in config:
        return "timm"
    return "transformers" if "model_type" in config else None
