"""What a merge of many fine-tunes is told, beside its inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svftool.choices.merging import Heads


@dataclass(frozen=True, kw_only=True)
class WeightsFrom:
    """Labelled examples that choose the weights of the inputs.

    Attributes
    ----------
    data : path-like
        Two examples or more, other ones than the result is tested on.
    task : str
        Kind of data and loss, as for `svftool.evaluate`; not ``few-shot-segmentation``.
    trials : int or None
        Weights that are tried, the start included; by default ``4 * inputs + 4``.
    model : str
        See `svftool.models.build_model`.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``: where the model runs.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    options : mapping
        The task's own, such as ``image_size``.
    """

    data: str | os.PathLike[str]
    task: str
    trials: int | None = None
    model: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How many fine-tunes are made one.

    Attributes
    ----------
    method : str
        Such as ``"tsv"`` or ``"ties:density=0.2"``.
    heads : {"concat", "first", "drop"} or None
        What becomes of output heads of different classes: all rows, those of the first input that
        has one, or the base's. They are refused by default.
    other_base : bool
        Whether an input may be all but unrelated to the base.
    base : path-like or None
        Where the base of factors is, if not at its recorded place.
    max_shard_size : str or None
        Reshard, such as ``"5GB"``.
    dtype : str or None
        ``"float32"``, ``"bfloat16"`` or ``"float16"``: what floating numbers are written in.
    allow_overflow : bool
        Clip values that their dtype cannot hold.
    verify : bool
        Read the result again and compare every tensor with what was computed.
    weights : WeightsFrom or None
        Examples that choose the weights; those of the inputs are the start then.
    """

    method: str = "linear"
    heads: Heads | None = None
    other_base: bool = False
    base: str | os.PathLike[str] | None = None
    max_shard_size: str | None = None
    dtype: str | None = None
    allow_overflow: bool = False
    verify: bool = False
    weights: WeightsFrom | None = None
