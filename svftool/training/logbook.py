"""Training curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from svftool.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Logbook:
    """Curves of one run, written below a folder; without a folder it writes nothing.

    Parameters
    ----------
    folder : Path or None
        Where TensorBoard looks.
    run : str
        Name of the sub-folder.

    Raises
    ------
    MissingDependencyError
        If a folder is given and tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, run: str) -> None:
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError(
                "tensorboard", extra="train", purpose="--log-dir"
            ) from None
        self._writer = SummaryWriter(str(folder / run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
