"""What a user names is there, and of the right kind; asked before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from svftool.errors import CheckpointError, DataError, FactorsError
from svftool.files.hub_ids import is_on_hub
from svftool.files.names import FACTORS_FILE, is_tuned_name
from svftool.files.text_data import TEXT_TASKS, texts_in


def check_exists(text: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither here nor can be a hub id.

    Raises
    ------
    CheckpointError
        If there is no such file or folder.
    """
    place = Path(text)
    if place.exists() or is_on_hub(os.fspath(text)):
        return
    found = "a link that leads nowhere" if place.is_symlink() else "no such file or folder"
    raise CheckpointError(f"{text}: {found}, expected a checkpoint. Check the path.")


def check_factors(folder: Path) -> None:
    """Refuse a folder that holds no factors.

    Raises
    ------
    FactorsError
        If it has no ``svf_config.json``.
    """
    if not (folder / FACTORS_FILE).is_file():
        raise FactorsError(
            f"{folder}: no {FACTORS_FILE}, expected a folder written by 'svftool decompose'. "
            "Run 'svftool decompose CHECKPOINT -o FACTORS' first."
        )


def check_base(folder: Path, names: Collection[str]) -> None:
    """Refuse a base without factors where tuned files need them; adapters need none.

    Raises
    ------
    FactorsError
        If it has no factors, and nothing is named or a tuned file is.
    """
    tuned = (is_tuned_name(Path(re.sub(r"@[^@]*$", "", name))) for name in names)
    if not names or any(tuned) or not folder.exists():
        check_factors(folder)


def check_tuned_exist(names: Iterable[str]) -> None:
    """Refuse tuned files that are not there; each may carry a weight, ``FILE@0.5``.

    Raises
    ------
    FactorsError
        If one is missing.
    """
    for name in names:
        path = name if Path(name).exists() else name.rpartition("@")[0] or name
        if not Path(path).exists():
            raise FactorsError(
                f"{path}: no such file, expected a tuned file of 'svftool finetune'. "
                "Check the path."
            )


def check_data(path: Path, task: str = "language") -> None:
    """Refuse data that is not there, and texts for a task on images.

    Parameters
    ----------
    path : Path
    task : str
        The value of ``--task``.

    Raises
    ------
    DataError
        If there is no such file or folder, or it holds what another task takes.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder, expected a data set. Check the path.")
    found = None if task in TEXT_TASKS else texts_in(path)
    if found is not None:
        raise DataError(
            f"{path}: {found.what}, expected images for --task {task}. {found.way_out}."
        )
