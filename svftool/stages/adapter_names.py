"""By which names a new adapter calls the tensors of its base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from svftool.adapters.live_names import live_names
from svftool.checkpoints import TensorInfo
from svftool.errors import counted
from svftool.files.folder import read_config
from svftool.progress import Progress


def names_for(
    layout: str,
    infos: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    path: Path,
    changed: Collection[str],
    progress: Progress,
) -> Mapping[str, str]:
    """Return what PEFT finds tensors under, where that is not their name in the file.

    Parameters
    ----------
    layout : str
        As ``--layout`` has it. All but ``peft`` go by the names of files.
    infos : mapping of str to TensorInfo
        The base's tensors.
    config : mapping or None
        Its ``config.json``; that in the folder if None.
    path : Path
        The base, or its factors.
    changed : collection of str
        Tensors that the adapter changes.
    progress : Progress
        Told where names differ.
    """
    if layout != "peft":
        return {}
    if config is None and path.is_dir():
        config = read_config(path)
    live = live_names(infos, config)
    renamed = [name for name in changed if name in live.names]
    if renamed:
        progress.note(
            f"{counted(len(renamed), 'tensors', 'are')} named as the live model of transformers "
            f"{live.version} has them, such as {live.names[renamed[0]]} for {renamed[0]}"
        )
    inside = [name for name in changed if name in live.inside]
    if inside:
        progress.warn(
            f"{counted(len(inside), 'tensors', 'are')} a part of a larger one in transformers "
            f"{live.version}, such as {inside[0]} of {live.inside[inside[0]]}: PEFT finds them "
            "only where it knows of that"
        )
    return live.names
