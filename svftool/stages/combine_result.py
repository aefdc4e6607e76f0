"""What a merge of many fine-tunes did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.factors.mixture import LayerChange
from svftool.factors.stated import Support
from svftool.merging import Clash, PairClash
from svftool.merging.weights import Gain
from svftool.stages.merge_layers import MergedLayer


@dataclass(frozen=True)
class CombinedInput:
    """One fine-tune of the result.

    Attributes
    ----------
    path : Path
    weight : float
    kind : str
        ``checkpoint``, ``factors``, ``tuned`` or ``lora``.
    changed : int
        Tensors that it changes.
    relative_change, cosine : float
        ``|W' - W| / |W|`` and the cosine of W' and W over the matrices that it speaks of.
    missing : tuple of str
        Tensors of the base that it does not have.
    extra : mapping of str to int
        What it has beside them and was left out, with bytes.
    """

    path: Path
    weight: float
    kind: str
    changed: int
    relative_change: float
    cosine: float
    missing: tuple[str, ...] = ()
    extra: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Interference:
    """How the inputs clash, before the method and after.

    Attributes
    ----------
    before, after : Clash or None
        Means over layers, weighted by their entries; of the changes as they are, with their sum,
        and of what each contributes to the merged change. None where no layer has two inputs.
    layers : tuple of MergedLayer
        Those with two inputs or more, in the base's order.
    pairs : tuple of PairClash
        Means over the layers that both inputs change, before.
    """

    before: Clash | None
    after: Clash | None
    layers: tuple[MergedLayer, ...]
    pairs: tuple[PairClash, ...]


@dataclass(frozen=True)
class WeightScore:
    """How good weights are on the data.

    Attributes
    ----------
    weights : tuple of float
        Of the inputs, in the order given.
    loss : float
        The task's mean loss.
    metric : float or None
        Its primary metric, where it was measured.
    """

    weights: tuple[float, ...]
    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class WeightChoice:
    """Weights that data chose.

    Attributes
    ----------
    data : Path
    task : str
    metric : str
        Name of the task's primary metric.
    support : Support
        The examples, known again by their bytes.
    parts : int
        In how many parts they were measured.
    start, chosen, best : WeightScore
        The weights given; those taken; those of the lowest loss, which are the ones taken, or were
        no better on examples that had no say, or make the metric worse.
    gain : Gain
        By how much the loss is lower than the start's on parts that had no say in the choice.
    without : tuple of Gain or None
        By how much the loss rises without each input, the others' weights as chosen; None where it
        takes no part, or nothing would be left.
    tried : tuple of WeightScore
        In their order, the start first.
    """

    data: Path
    task: str
    metric: str
    support: Support
    parts: int
    start: WeightScore
    chosen: WeightScore
    best: WeightScore
    gain: Gain
    without: tuple[Gain | None, ...]
    tried: tuple[WeightScore, ...]

    @property
    def kept(self) -> bool:
        """Whether the weights given were kept."""
        return self.chosen.weights == self.start.weights

    @property
    def worse(self) -> bool:
        """Whether the weights given were kept because the best make the metric worse."""
        return self.kept and self.gain.mean > self.gain.error

    @property
    def recipe(self) -> dict[str, Any]:
        """What the result's metadata say of it."""
        return {
            "task": self.task,
            "examples": self.support.examples,
            "sha256": self.support.sha256,
            "start": list(self.start.weights),
            "trials": len(self.tried),
            "loss": [self.start.loss, self.chosen.loss],
        }


@dataclass(frozen=True)
class CombineResult:
    """What `combine` did.

    Attributes
    ----------
    output : Path
    method : str
        With its parameters.
    inputs : tuple of CombinedInput
    layers : tuple of LayerChange
        Every merged matrix, in the base's order.
    interference : Interference
    ways : mapping of str to mapping of str to int
        How many tensors that are no matrices were merged in which way, by the reason.
    heads : mapping of str to str
        What became of each tensor of a head that was not merged as a change.
    unchanged : int
        Tensors of the base that kept their bytes.
    added : tuple of str
    replaced : tuple of str
    verified : bool or None
    clipped : mapping of str to int
    dropped : mapping of str to int
        What the base holds and the output does not, with bytes.
    weights : WeightChoice or None
        How data chose the weights.
    """

    output: Path
    method: str
    inputs: tuple[CombinedInput, ...]
    layers: tuple[LayerChange, ...]
    interference: Interference
    ways: Mapping[str, Mapping[str, int]]
    heads: Mapping[str, str]
    unchanged: int
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    verified: bool | None
    clipped: Mapping[str, int]
    dropped: Mapping[str, int]
    weights: WeightChoice | None = None
