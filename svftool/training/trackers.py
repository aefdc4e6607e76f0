"""Trackers of experiments, as accelerate knows them: TensorBoard, Weights & Biases and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from svftool.checkpoints import write_errors
from svftool.errors import MissingDependencyError, UsageError, no_such

PROJECT = "svftool"
"""What the runs are gathered under, where a tracker has projects."""

OPTION = "--log-with"


@dataclass(frozen=True)
class Trackers:
    """Which trackers follow the runs of a comparison.

    Attributes
    ----------
    names : sequence of str
        Accelerate's names, such as ``tensorboard``; none by default.
    folder : Path or None
        Where those that write files put them.
    """

    names: Sequence[str] = ()
    folder: Path | None = None

    def check(self) -> None:
        """Find out before training whether all of them can be used.

        Raises
        ------
        UsageError
            If accelerate knows no tracker of a name.
        MissingDependencyError
            If the package of one, or accelerate, is not installed.
        """
        for name in self.names:
            _tracker_class(name, self.folder)

    def open(self, run: str, facts: Mapping[str, Any]) -> Logbook:
        """Begin a run in each of them.

        Parameters
        ----------
        run : str
            Name of the run; of its folder, where a tracker writes one.
        facts : mapping of str to object
            Plain values that say what is run.
        """
        return Logbook([_start(name, self.folder, run, facts) for name in self.names])


class Logbook:
    """Curves of one run, told to each of its trackers.

    Parameters
    ----------
    trackers : sequence of accelerate.tracking.GeneralTracker
        Started ones.
    """

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = trackers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _tracker_class(name: str, folder: Path | None) -> Any:
    try:
        from accelerate import PartialState, tracking
    except ImportError:
        raise MissingDependencyError("accelerate", extra="train", purpose=OPTION) from None
    known = tracking.LOGGER_TYPE_TO_CLASS
    if name not in known:
        raise UsageError(no_such(OPTION, name, sorted(known)))
    # Accelerate's trackers, and what it says of missing ones, ask it which process they are in.
    PartialState()
    if not tracking.filter_trackers([name], folder):
        extra = "train" if name == "tensorboard" else None
        raise MissingDependencyError(name, extra=extra, purpose=f"{OPTION} {name}")
    return known[name]


def _start(name: str, folder: Path | None, run: str, facts: Mapping[str, Any]) -> Any:
    kind = _tracker_class(name, folder)
    if folder is not None:
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    tracker = kind(**_arguments(kind, name, folder, run))
    try:
        tracker.start()
        # TensorBoard would show them as one more run, with a name of its own.
        if name != "tensorboard":
            tracker.store_init_configuration(dict(facts))
    except Exception as error:
        # Each has errors of its own: no key, no server, no project of that name.
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{OPTION} {name}: {line}, expected a tracker that starts. Set it up, or leave it out"
        ) from error
    return tracker


def _arguments(kind: Any, name: str, folder: Path | None, run: str) -> dict[str, Any]:
    """Say where a tracker keeps a run, and what it calls it: each has words of its own."""
    place = None if folder is None else str(folder)
    known: dict[str, dict[str, Any]] = {
        "wandb": {"run_name": PROJECT, "name": run, "dir": place},
        "trackio": {"run_name": PROJECT, "name": run},
        "swanlab": {"run_name": PROJECT, "experiment_name": run, "logdir": place},
        "clearml": {"run_name": PROJECT, "task_name": run},
        "mlflow": {"experiment_name": PROJECT, "run_name": run},
        "comet_ml": {"run_name": PROJECT},
        "dvclive": {"dir": None if folder is None else str(folder / run)},
    }
    if name in known:
        return known[name]
    return {"run_name": run, **({"logging_dir": place} if kind.requires_logging_directory else {})}
