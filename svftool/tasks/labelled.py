"""What the tasks with one class an example share: their heads, their training, their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svftool.errors import DataError, MissingDependencyError, ModelError, shortlist
from svftool.models import find_head
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Part, Prepared, device_of
from svftool.tasks.class_names import natural_order, order_warning
from svftool.tasks.heads import (
    MOST_JUDGED,
    CosineHead,
    are_telling,
    head_inputs,
    head_rows,
    keep_rows,
    logits_of,
    new_head,
    pool,
    require_module,
    set_head,
    start_head,
    try_head,
)
from svftool.tasks.options import ClassifierOptions
from svftool.tasks.splits import balanced_order, left_out, others

# Metrics, counted over batches.


class ClassificationCount:
    """Running confusion matrix and mean cross-entropy.

    Parameters
    ----------
    classes : int
        Number of classes.

    Examples
    --------
    >>> import torch
    >>> count = ClassificationCount(2)
    >>> count.add(torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0, 1]))
    >>> result = count.result()
    >>> round(result["accuracy"], 3), result["class_accuracy"]
    (0.667, 0.5)
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._confusion: Any = None
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        logits : (N, C) Tensor
        labels : (N,) int64 Tensor
        """
        if self._confusion is None:
            self._confusion = _confusion_matrix(self._classes).to(labels.device)
        logits = logits.float()
        self._confusion.update(logits.argmax(1), labels)
        self._loss += float(cross_entropy(logits, labels, reduction="sum"))

    def macro_f1(self) -> float:
        """Return the mean of the F1 scores over the classes that occur or were predicted.

        Of class c it is ``2 TP / (2 TP + FP + FN)``, with the counts of the confusion matrix.
        """
        counts = self._confusion.compute().double()
        both = counts.sum(1) + counts.sum(0)
        return float((2 * counts.diagonal()[both > 0] / both[both > 0]).mean())

    def result(self) -> dict[str, float]:
        """Accuracy, its mean over the classes that occur, and the mean loss in nats."""
        counts = self._confusion.compute().double()
        of_class, right = counts.sum(1), counts.diagonal()
        occurs = of_class > 0
        return {
            "accuracy": float(right.sum() / of_class.sum()),
            "class_accuracy": float((right[occurs] / of_class[occurs]).mean()),
            "loss": self._loss / float(of_class.sum()),
        }


def _confusion_matrix(classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError:
        purpose = "measuring accuracy"
        raise MissingDependencyError("torchmetrics", extra="vision", purpose=purpose) from None
    # One process measures while the others wait: torchmetrics would wait for them in turn.
    return MulticlassConfusionMatrix(classes, sync_on_compute=False)


# Heads.

SINGLE_EXAMPLE_RATE = 0.1
"""Share of the head's learning rate where each class has one example, which is its class mean."""


@dataclass(frozen=True)
class OfHead:
    """What the checkpoint's head is to the data's classes, by their names.

    Attributes
    ----------
    classes : tuple of str
        The task's classes, in the order of the head's outputs where these are known.
    relation : {"unknown", "given", "same", "part", "other"}
        ``part`` keeps the outputs `rows`; ``other`` classes need a new head.
    rows : tuple of int
        The head's output for each class.
    outputs : int
        How many the head has by its names.
    """

    classes: tuple[str, ...]
    relation: Literal["unknown", "given", "same", "part", "other"] = "unknown"
    rows: tuple[int, ...] = ()
    outputs: int = 0


def of_head(
    names: tuple[str, ...],
    head: Sequence[str] | None,
    options: ClassifierOptions,
    *,
    whole: bool,
) -> OfHead:
    """Hold the names of the data's classes against those of the checkpoint's head.

    Parameters
    ----------
    names : tuple of str
        The data's, or those given.
    head : sequence of str or None
        What the outputs of the checkpoint's head are, where it says.
    options : ClassifierOptions
        Whether the classes were given, and whether a new head is wanted.
    whole : bool
        Keep all of the head's classes where the data has a part of them.
    """
    if options.classes is not None:
        return OfHead(names, "given")
    if head is None or options.head == "new":
        return OfHead(names)
    rows = head_rows(names, head)
    if rows is None:
        if not (are_telling(names) and are_telling(head)):
            return OfHead(names)
        # Measured with the head as it is, they are refused as classes that it does not know.
        return OfHead(tuple(head) if whole else names, "other")
    known = dict(zip(rows, names, strict=True))
    if whole or len(rows) == len(head):
        whole_names = [known.get(row, name) for row, name in enumerate(head)]
        return OfHead(tuple(whole_names), "same", outputs=len(head))
    kept = sorted(rows)
    return OfHead(tuple(known[row] for row in kept), "part", tuple(kept), len(head))


class LabelledExamples(Protocol):
    """Labelled examples: which of those that were listed, and their classes."""

    @property
    def labels(self) -> Tensor:
        """Classes by number: (N,) int64."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batches(self, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """Yield what the model takes and the labels, in any order, but always the same."""


class ClassifierSetting(Protocol):
    """What all draws of one task share."""

    @property
    def options(self) -> ClassifierOptions:
        """The task's options."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the head's outputs."""

    @property
    def of_head(self) -> OfHead:
        """What the checkpoint's head is to the classes."""


E = TypeVar("E", bound="Divisible")
S = TypeVar("S", bound=ClassifierSetting)


class Divisible(LabelledExamples, Protocol):
    """Examples of which a part can be taken."""

    def at(self: E, positions: Sequence[int]) -> E:
        """Return the examples at these positions as examples of their own."""


@dataclass(frozen=True)
class _HeadChoice:
    """Whether the checkpoint's head stays, which of its outputs do, and what is said of it."""

    kept: bool
    said: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()


D = TypeVar("D", bound="ClassifierDraw[Any, Any]")


class ClassifierDraw(Generic[E, S]):
    """Support, held-out and query examples of one seed.

    The checkpoint's head is judged by the examples `judge`, by default the support set. `seed`
    chooses random weights of a head.
    """

    unit: ClassVar[str] = "examples"
    """What the examples are, for messages."""

    def __init__(
        self,
        task: S,
        support: E,
        held_out: E,
        query: E,
        *,
        judge: E | None = None,
        seed: int = 0,
    ) -> None:
        self._task = task
        self._seed = seed
        self._support = support
        self._judge = support if judge is None else judge
        self._parts = {"held_out": held_out, "query": query}

    @property
    def size(self) -> int:
        """Examples to train on."""
        return len(self._support)

    @property
    def held_out(self) -> int:
        """Examples held out of the support set."""
        return len(self._parts["held_out"])

    @property
    def measured(self) -> int:
        """Examples to measure with."""
        return len(self._parts["query"])

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, or make one: from the class means of its features, by default.

        With ``auto`` the names of the classes decide. Where the head's are not known, or say
        nothing, one of as many outputs is kept unless it is at chance on the support set. Without
        `start` the new head is left without weights, and no head is tried.

        Raises
        ------
        ModelError
            If the model does not take the examples, or ``keep`` meets another number of classes.
        """
        task, head = self._task, self._head_of(model)
        outputs = self._outputs(model)
        choice = self._choose(model, head, outputs, start=start)
        if choice.kept and head is not None:
            return Prepared(model, head, said=choice.said, facts={**choice.facts, "head": "keep"})
        if task.options.head == "keep":
            raise ModelError(
                f"the checkpoint's head has {outputs} outputs, the data {len(task.classes)} "
                "classes. Use --head new, or give the head's class names in order with --classes"
            )
        old = None if head is None else model.get_submodule(head)
        model, head = self._new_head(model, head, outputs)
        kept = start and choice.rows and keep_rows(model.get_submodule(head), old, choice.rows)
        if start and not kept:
            self._start_head(model, head)
        named = task.options.head_init == "names"
        return Prepared(
            model,
            head,
            new_head=True,
            head_rate=self._head_rate(),
            said=choice.said,
            facts={**choice.facts, "head": "new"},
            begin=partial(self._start_head, model, head) if named else None,
        )

    # What a kind of data may do in its own way.

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the logits of a batch of examples, (N, classes)."""
        return logits_of(model(inputs))

    def _outputs(self, model: nn.Module) -> int:
        """Return how many outputs a bare model has, or features where it has no head.

        Raises
        ------
        ModelError
            If it does not take the examples.
        """
        raise NotImplementedError

    def _head_of(self, model: nn.Module) -> str | None:
        name = self._task.options.head_name
        if name is None:
            return find_head(model)
        require_module(model, name)
        return name

    def _new_head(self, model: nn.Module, head: str | None, features: int) -> tuple[nn.Module, str]:
        classes, kind = len(self._task.classes), self._task.options.head_type
        return new_head(model, head, classes, features, kind=kind)

    def _start_head(self, model: nn.Module, head: str) -> None:
        """Give a new head its first weights."""
        start = self._task.options.head_init
        if start == "means":
            self._start_from_means(model, head)
        elif start == "names":
            self._start_from_names(model, head)
        else:
            self._start_at_random(model.get_submodule(head))

    def _start_from_names(self, model: nn.Module, head: str) -> None:
        """Start a head from what the model makes of the classes' names."""
        raise NotImplementedError

    def _start_at_random(self, head: nn.Module) -> None:
        weight = head.get_parameter("weight")
        shape = (weight.shape[0], weight[0].numel())  # of a pointwise convolution too
        generator = torch.Generator().manual_seed(self._seed)
        drawn = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        if isinstance(head, CosineHead):
            with torch.no_grad():
                head.weight.copy_(drawn)
        else:
            set_head(head, drawn.to(weight))

    def _head_rate(self) -> float:
        if self._task.options.head_init != "means":
            return 1.0
        single = int(torch.bincount(self._support.labels).max()) == 1
        return SINGLE_EXAMPLE_RATE if single else 1.0

    def _of_head_input(self, features: Tensor, inputs: Any) -> Tensor:
        """Pool what a head sees of a batch to (N, F)."""
        return pool(features)

    def _metrics(self, count: ClassificationCount) -> dict[str, float]:
        return count.result()

    def _choose(
        self, model: nn.Module, head: str | None, outputs: int, *, start: bool
    ) -> _HeadChoice:
        """Decide whether the checkpoint's head stays."""
        task = self._task
        relation, wanted = task.of_head.relation, task.options.head
        fits = head is not None and outputs == len(task.classes)
        if wanted != "auto" or head is None:
            return _HeadChoice(kept=fits and wanted != "new")
        if relation == "part" and outputs == task.of_head.outputs:
            note = f"the checkpoint's head knows these {len(task.classes)} classes and others: "
            return _HeadChoice(
                False,
                (note + f"{len(task.classes)} of its {outputs} outputs are kept",),
                rows=task.of_head.rows,
            )
        if not fits or relation in {"given", "same"} or not start:
            said = order_warning(task.classes) if fits and relation == "unknown" else None
            return _HeadChoice(fits, () if said is None else (said,))
        if relation == "other":
            note = f"the checkpoint's head is for other classes than {shortlist(task.classes, 4)}"
            return _HeadChoice(False, (f"{note}: a new head takes its place",))
        return self._tried(model)

    @torch.inference_mode()
    def _tried(self, model: nn.Module) -> _HeadChoice:
        """Keep a head of as many outputs unless it is at chance on the support set."""
        judge, classes = self._judge, self._task.classes
        judge = judge.at(range(0, len(judge), -(-len(judge) // MOST_JUDGED)))
        batches = judge.batches(device_of(model))
        results = [(pool(self.run(model, inputs)).argmax(1), labels) for inputs, labels in batches]
        found, labels = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
        trial = try_head(found, labels, len(classes))
        facts, order = {"head_trial": trial.plain()}, order_warning(classes)
        of = f"{trial.right} of {trial.images} support {self.unit}"
        if not trial.decidable:
            note = (
                f"the checkpoint's head is kept for its {len(classes)} outputs: {of} are right, "
                "too few to tell whether it is for these classes. Decide with --head keep or new"
            )
            return _HeadChoice(True, (note, *([] if order is None else [order])), facts)
        if not trial.at_chance:
            return _HeadChoice(True, () if order is None else (order,), facts)
        note = (
            f"the checkpoint's head finds the class of {of} ({trial.right / trial.images:.1%}), "
            f"as chance does ({trial.chance:.1%}): a new head takes its place. Keep it with --head "
            "keep, or give the order of its classes with --classes"
        )
        return _HeadChoice(False, (note, *self._in_order(found, labels, order)), facts)

    def _in_order(self, found: Tensor, labels: Tensor, order: str | None) -> list[str]:
        """Say where a head that is at chance is right in the order of the classes' numbers."""
        classes = self._task.classes
        if order is None:
            return []
        places = torch.tensor([natural_order(classes).index(name) for name in classes])
        trial = try_head(found, places[labels], len(classes))
        return [] if trial.at_chance else [order]

    def _start_from_means(self, model: nn.Module, head: str) -> None:
        classes, labels = self._task.classes, self._support.labels
        empty = [name for i, name in enumerate(classes) if not bool((labels == i).any())]
        if empty:
            raise DataError(
                f"no {self.unit} of class {shortlist(empty)}, expected some of each for a new head"
            )
        seen = list[Tensor]()
        features = self._features(model, head, self._support.batches(device_of(model)), seen)
        start_head(model.get_submodule(head), features.clone(), torch.cat(seen), len(classes))

    @torch.inference_mode()
    def _features(
        self,
        model: nn.Module,
        head: str,
        batches: Iterator[tuple[Any, Tensor]],
        seen: list[Tensor],
    ) -> Tensor:
        """Return what the head sees, (N, F), and add the labels in the same order to `seen`."""

        def inputs() -> Iterator[Any]:
            for batch, labels in batches:
                seen.append(labels)
                yield batch

        return head_inputs(model, head, inputs(), run=self.run, reduce=self._of_head_input)

    def subdivide(self: D, count: int, seed: int) -> list[D]:
        """Split the support set, every class alike; see `svftool.tasks.base.Subdivides`."""
        support, held_out = self._support, self._parts["held_out"]
        return [
            type(self)(
                self._task,
                support.at(others(fold, self.size)),
                held_out,
                support.at(fold),
                judge=self._judge,
                seed=self._seed,
            )
            for fold in left_out(support.labels.tolist(), count, seed=seed)
        ]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle the support set; with balanced sampling draw as many of each class."""
        if self._task.options.sampling == "balanced":
            return balanced_order(self._support.labels, generator)
        return torch.randperm(self.size, generator=generator)

    def terms(self, batch: tuple[Any, Tensor]) -> int:
        """Examples that a batch's loss is the mean over."""
        return len(batch[1])

    def loss(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        return self.smoothed_loss(model, batch, 0.0)

    def smoothed_loss(
        self, model: nn.Module, batch: tuple[Any, Tensor], smoothing: float
    ) -> Tensor:
        """Mean cross-entropy of a batch to smoothed labels."""
        inputs, labels = batch
        logits = self.run(model, inputs).float()
        return cross_entropy(logits, labels, label_smoothing=smoothing)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Accuracy, its mean over classes, and mean cross-entropy; nothing of no examples."""
        if not len(self._parts[part]):
            return {}
        examples, count = self._parts[part], ClassificationCount(len(self._task.classes))
        with progress.task("evaluate", total=len(examples), unit=self.unit) as bar:
            for logits, labels in self.logits(model, part):
                count.add(logits, labels)
                bar.advance(len(labels))
        return self._metrics(count)

    @torch.inference_mode()
    def logits(self, model: nn.Module, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and labels, batch by batch."""
        model.eval()
        for inputs, labels in self._parts[part].batches(device_of(model)):
            yield self.run(model, inputs), labels

    @property
    def a_class(self) -> float:
        """Examples to train on, over the classes; see `svftool.tasks.base.JudgesExamples`."""
        return self.size / len(self._task.classes)

    def judged(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of every example, (N,), and whether its class is found."""
        losses, right = [], []
        for logits, labels in self.logits(model, part):
            losses.append(cross_entropy(logits.float(), labels, reduction="none"))
            right.append(logits.argmax(1) == labels)
        return torch.cat(losses), torch.cat(right)

    @torch.inference_mode()
    def found(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
        """Yield each example's class, the one that the model finds, and how sure it is of it.

        In the order of the logits and labels in `batches`.
        """
        names = self._task.classes
        for logits, labels in batches:
            sure, found = logits.float().softmax(1).max(1)
            for label, other, probability in zip(
                labels.tolist(), found.tolist(), sure.tolist(), strict=True
            ):
                yield {
                    "label": names[label],
                    "prediction": names[other],
                    "probability": probability,
                }
