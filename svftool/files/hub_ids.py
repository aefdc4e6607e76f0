"""Ids of the Hugging Face hub, told from paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from svftool.files.names import WEIGHT_SUFFIXES

_PART = r"[A-Za-z0-9][\w.-]*"

_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<folder>{_PART}(?:/{_PART})*))?")

_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


@dataclass(frozen=True)
class HubPlace:
    """What a hub id names: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, ``OWNER/NAME/SUBFOLDER``.

    Attributes
    ----------
    repo : str
    folder : str
        Within the repository; empty for the whole.
    revision : str or None
        A branch, a tag, a commit, or ``refs/pr/N``.
    """

    repo: str
    folder: str = ""
    revision: str | None = None


def hub_place(text: str) -> HubPlace | None:
    """Read a hub id; None where it is none.

    Examples
    --------
    >>> hub_place("owner/name/unet@refs/pr/1")
    HubPlace(repo='owner/name', folder='unet', revision='refs/pr/1')
    """
    name, mark, revision = text.partition("@")
    found = _HUB_ID.fullmatch(name)
    if found is None or name.endswith(WEIGHT_SUFFIXES):
        return None
    if (mark or revision) and not _REVISION.fullmatch(revision):
        return None
    return HubPlace(found["repo"], found["folder"] or "", revision or None)


def looks_like_hub_id(text: str) -> bool:
    """Tell whether `text` can be a repository on the hub, or a folder of one; no weight file.

    Examples
    --------
    >>> looks_like_hub_id("timm/resnet18.a1_in1k"), looks_like_hub_id("folder/model.safetensors")
    (True, False)
    """
    return hub_place(text) is not None


def is_on_hub(text: str) -> bool:
    """Tell whether a name can only be on the hub: an id, and no place within anything here."""
    first = Path(text.partition("/")[0])
    return looks_like_hub_id(text) and not os.path.lexists(text) and not os.path.lexists(first)
