"""What a task gives to the training loop: the protocol that every kind of data is behind.

A task knows its data, its loss and its metrics, and nothing of optimisers, schedules or regimes.
The loop knows nothing of labels, masks or text. A new task is one module that offers `Task` and
`Draw`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from svftool.errors import ModelError
from svftool.processes import Processes
from svftool.progress import SILENT, Progress

Part = Literal["query", "held_out"]


CHOOSE_SIZE = ". Choose the size with --image-size"

_FORWARD = (
    RuntimeError, TypeError, ValueError, LookupError, AssertionError, ArithmeticError,
)  # fmt: skip


@contextmanager
def forward_errors(inputs: str, way_out: str = "") -> Iterator[None]:
    """Raise ModelError for what a model raises that does not take its inputs.

    Parameters
    ----------
    inputs : str
        What it was given, such as ``images of 32 x 32``.
    way_out : str
        What else to try.

    Raises
    ------
    ModelError
        With the first line of the model's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FORWARD as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"the model does not take {inputs}: {text}{way_out}") from error


@dataclass(frozen=True)
class TaskMetric:
    """A number that `Draw.evaluate` gives.

    Attributes
    ----------
    name : str
        Its key in the results, such as ``accuracy``.
    higher_is_better : bool
        Its direction.
    """

    name: str
    higher_is_better: bool

    def better(self, value: float, than: float) -> bool:
        """Whether `value` is a better result than `than`."""
        return value > than if self.higher_is_better else value < than


@dataclass(frozen=True)
class Prepared:
    """A model that fits a task's data, before anything is attached.

    Attributes
    ----------
    model : nn.Module
        The model given, or a wrapper that holds it as ``backbone``.
    head : str or None
        Name of the module that is trained in every regime; None where there is none.
    new_head : bool
        The head is not the checkpoint's: it was made for this data.
    layers : tuple of str
        Globs of the tensors whose singular values or adapters the task trains by default; all of
        them if empty.
    head_rate : float
        What the default learning rate of the head is multiplied by: a head whose start is as good
        as the examples can make it had better move little.
    begin : callable or None
        Gives the new head first weights without any example; None where that takes examples.
    beside : tuple of nn.Module
        Frozen modules that the loss uses and `model` does not hold. Where several processes
        prepare, they go on with those of the first.
    said : tuple of str
        What the user should be told of it, a sentence each.
    facts : mapping
        Plain values that say how it was prepared, for results and the tuned file.
    """

    model: nn.Module
    head: str | None = None
    new_head: bool = False
    layers: tuple[str, ...] = ()
    head_rate: float = 1.0
    begin: Callable[[], None] | None = None
    beside: tuple[nn.Module, ...] = ()
    said: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Draw(Protocol):
    """The data of one seed: a support set to train on, and a query set to measure with."""

    @property
    def size(self) -> int:
        """Training examples in one epoch."""

    @property
    def held_out(self) -> int:
        """Support examples kept from training to choose the best weights by; 0 for none."""

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Fit a freshly loaded model to the data: a new head, say.

        Without `start` the new head gets no first weights from the data: they are loaded.
        """

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order in which one epoch goes through the examples: (size,) integers."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
        """Load the examples at `indices`; all randomness comes from `generator`."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model on a batch that is on the model's device: a 0-d tensor."""

    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Measure the model, in evaluation mode, by every metric; by none on an empty part."""


@runtime_checkable
class Subdivides(Protocol):
    """What a `Draw` offers besides, whose support set can be split to choose settings by."""

    def subdivide(self, count: int, seed: int) -> Sequence[Draw]:
        """Return draws within the support set: each trains on a part and measures with the rest.

        The query set of this draw is in none of them. Empty where there is nothing to split.
        """


@runtime_checkable
class JudgesExamples(Protocol):
    """What a `Draw` offers besides, that tells how well a model knows each example of one class."""

    @property
    def a_class(self) -> float:
        """Examples to train on, over the classes."""

    def judged(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of every example, (N,) float32, and whether it is right, bool.

        Always in the same order.
        """


@runtime_checkable
class Steady(Protocol):
    """What a `Draw` offers besides, whose examples may look the same in every epoch."""

    @property
    def steady(self) -> bool:
        """Whether an example's rows in the tensors of a batch depend on its index alone."""


@runtime_checkable
class Counts(Protocol):
    """What a `Draw` offers besides, whose loss is a mean over more than its examples.

    Several processes that share a batch weigh their losses by it, so that the mean is that of the
    whole batch.
    """

    def terms(self, batch: Any) -> int:
        """Count what the loss of a batch is the mean of: tokens that are predicted, say."""


@runtime_checkable
class Smooths(Protocol):
    """What a `Draw` offers besides, whose labels can be smoothed in training."""

    def smoothed_loss(self, model: nn.Module, batch: Any, smoothing: float) -> Tensor:
        """Compute the loss with a share `smoothing` of each label dealt out over all classes."""


@runtime_checkable
class SharesBatches(Protocol):
    """What a `Draw` offers besides, whose batches are no plain stacks of examples.

    Of other batches each of several processes takes the rows of every tensor.
    """

    def share(self, batch: Any, rows: slice) -> Any:
        """Take the examples of a batch that are at `rows` of its indices."""


@runtime_checkable
class MeasuresTogether(Protocol):
    """What a `Draw` offers besides, whose metrics several processes can measure a share each of.

    Of others the first process measures everything, while the rest wait.
    """

    def measure(
        self, model: nn.Module, part: Part, *, processes: Processes, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Measure as `Draw.evaluate` does; every process is here, and all get the metrics."""


@runtime_checkable
class Predicts(Protocol):
    """What a `Draw` offers besides, that can say what the model makes of each example."""

    def predictions(self, model: nn.Module, part: Part, folder: Path) -> Iterator[dict[str, Any]]:
        """Return one row of plain values an example; pictures are written to `folder`."""


@runtime_checkable
class Sized(Protocol):
    """What a `Draw` offers besides, that says how much it measures with."""

    @property
    def measured(self) -> int:
        """Examples in the query set."""


@runtime_checkable
class HasContents(Protocol):
    """What a `Draw` offers besides, whose examples can be known again by their bytes."""

    def contents(self, part: Literal["support", "query"]) -> Iterator[bytes]:
        """Read what stands for each example: a picture's file, a text's words.

        The support set is all that was drawn, what is held out of it too.
        """


@runtime_checkable
class Illustrated(Protocol):
    """What a `Draw` offers besides, that can show predictions as pictures."""

    def illustrate(self, model: nn.Module, name: str) -> None:
        """Write pictures of what a run of this name predicts, where they were asked for."""


def device_of(model: nn.Module) -> torch.device:
    """Device that a model's parameters are on."""
    return next(model.parameters()).device


class Task(Protocol):
    """One kind of data with its loss and metrics."""

    @property
    def name(self) -> str:
        """The value of ``--task``."""

    @property
    def primary(self) -> TaskMetric:
        """The metric that summaries, and selection on a held-out part, go by."""

    @property
    def shots(self) -> int | None:
        """Examples a class in the support set; None for all of them."""

    @property
    def facts(self) -> Mapping[str, int]:
        """What tells it from the other tasks of one comparison, such as its fold."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the head's outputs; None where there are none."""

    def describe(self) -> dict[str, Any]:
        """Plain values that say what was trained on, for the tuned file; no paths."""

    def draw(self, seed: int) -> Draw:
        """Draw the support and query sets of one seed; the same seed gives the same sets."""


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and mappings to `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
