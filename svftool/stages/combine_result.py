"""What a merge of many fine-tunes did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svftool.factors.mixture import LayerChange
from svftool.merging import Clash, PairClash
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
