"""The models and data that regimes are compared on, and the runs that this takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.choices.training import Settings

HOME = Path(os.environ.get("SVFTOOL_MODELS") or Path.home() / ".cache" / "svftool-models")
REFERENCE = "lora:8"
SPECTRAL = (
    "svf", "svf+scale", "svf+bias", "svf+norm", "entries:4x", "entries:4x:random",
    "entries:4x:band", "core:4x", "salt:1",
)  # fmt: skip
OTHERS = ("norm", "bias", "rows", "lora:1", "lora:2", "lora:8", "full")
HEAD = ("head",)
WITHOUT_BIASES = ("svf+bias", "bias")


@dataclass(frozen=True)
class Set:
    """A model on a data set.

    Attributes
    ----------
    name, title : str
        On the command line, and in the document.
    checkpoint : str
        Below DATA, or below the folder of models if it begins with ``~``.
    data, evaluation : str
        Below DATA; no evaluation measures with what the shots left over.
    options : mapping
        Arguments of `svftool.finetune`.
    settings : Settings
    seeds : int
    shots : tuple of int
        The rates are chosen with the first of them.
    folds : tuple of int
        Of few-shot segmentation.
    left_out : tuple of str
        Regimes that the model has nothing for.
    further : tuple of str
        Metrics that have a table of their own.
    """

    name: str
    title: str
    checkpoint: str
    data: str
    evaluation: str | None
    options: Mapping[str, Any]
    settings: Settings = field(default_factory=Settings)
    seeds: int = 5
    shots: tuple[int, ...] = (10,)
    folds: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    def checkpoint_in(self, data: Path) -> Path:
        """Where the checkpoint is."""
        inner = self.checkpoint
        return HOME / inner[1:] if inner.startswith("~") else data / inner

    def factors_in(self, work: Path) -> Path:
        """Where its factors are; sets of one checkpoint share them."""
        return work / f"factors-{Path(self.checkpoint).stem.strip('~')}"

    @property
    def regimes(self) -> tuple[str, ...]:
        """Those that are compared on it."""
        return tuple(one for one in HEAD + SPECTRAL + OTHERS if one not in self.left_out)


_SHAKESPEARE = ("text/shakespeare_train.jsonl", "text/shakespeare_eval.jsonl")
_LANGUAGE = {"task": "language", "sequence_length": 128}
_MOBILENET = ("~mobilenet_v2/mobilenet_v2-b0353104.pth", "torchvision:mobilenet_v2")
SETS = (
    Set(
        "stories",
        "Shakespeare, a Llama of 260,000 parameters",
        "checkpoints/stories260K",
        *_SHAKESPEARE,
        _LANGUAGE,
        Settings(steps=60, batch_size=4),
        left_out=HEAD + WITHOUT_BIASES,
    ),
    Set(
        "smollm2",
        "Shakespeare, SmolLM2-135M",
        "~smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        *_SHAKESPEARE,
        _LANGUAGE,
        Settings(steps=20, batch_size=4),
        seeds=3,
        shots=(10, 50),
        left_out=HEAD + WITHOUT_BIASES,
    ),
    Set(
        "banking77",
        "Customer questions (`banking77`), MiniLM",
        "~minilm",
        "text/banking77/train.csv",
        "text/banking77/test.csv",
        {"task": "text-classification"},
        shots=(5,),
    ),
    Set(
        "dtd10",
        "Textures (`dtd10`), torchvision's MobileNetV2",
        _MOBILENET[0],
        "images/dtd10",
        None,
        {"model": _MOBILENET[1], "image_size": 160, "augment": "none"},
    ),
    Set(
        "voc",
        "Few-shot segmentation of VOC, torchvision's MobileNetV2",
        _MOBILENET[0],
        "images/voc20_pairs",
        None,
        {
            "task": "few-shot-segmentation",
            "model": _MOBILENET[1],
            "image_size": 129,
            "output_stride": 16,
            "select_on": "last",
            "test_shots": (5,),
            "test_episodes": 300,
        },
        Settings(steps=150, batch_size=4),
        seeds=3,
        shots=(1,),
        folds=(0, 1, 2, 3),
        further=("miou_5shot",),
    ),
)


@dataclass(frozen=True)
class Unit:
    """A run: one regime with one seed; the first one of a regime chooses its rates, too."""

    where: str
    regime: str
    seed: int
    shots: int
    fold: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a line of the journal is known by."""
        return self.where, self.regime, self.seed, self.shots, self.fold

    @property
    def draw(self) -> tuple[Any, ...]:
        """What it is trained and measured on."""
        return self.where, self.seed, self.shots, self.fold


def units_of(one: Set) -> list[Unit]:
    """Return all runs of a set, one seed after the other."""
    return [
        Unit(one.name, regime, seed, shots, fold)
        for shots in one.shots
        for seed in range(one.seeds)
        for fold in one.folds or (None,)
        for regime in one.regimes
    ]


def first_of(one: Set, regime: str) -> Unit:
    """Return the run that chooses a regime's rates."""
    return Unit(one.name, regime, 0, one.shots[0], one.folds[0] if one.folds else None)
