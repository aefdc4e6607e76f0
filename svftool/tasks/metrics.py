"""Metrics of classification, counted over batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from svftool.errors import MissingDependencyError


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
