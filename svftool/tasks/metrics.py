"""Metrics that are counted over batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass
class ClassificationCount:
    """Running accuracy and mean cross-entropy.

    Examples
    --------
    >>> import torch
    >>> count = ClassificationCount()
    >>> count.add(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    >>> count.result()["accuracy"]
    0.5
    """

    correct: int = 0
    loss: float = 0.0
    seen: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        logits : (N, C) Tensor
        labels : (N,) int64 Tensor
        """
        logits = logits.float()
        self.correct += int((logits.argmax(1) == labels).sum())
        self.loss += float(cross_entropy(logits, labels, reduction="sum"))
        self.seen += len(labels)

    def result(self) -> dict[str, float]:
        """Accuracy as a fraction, and the mean loss in nats."""
        return {"accuracy": self.correct / self.seen, "loss": self.loss / self.seen}
