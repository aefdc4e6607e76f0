"""The whole loop on an embedded network and data set, by the functions that the commands call."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from svftool.choices.training import SafeguardChoice
from svftool.errors import MissingDependencyError, UsageError
from svftool.progress import SILENT, Progress
from svftool.stages import demo_net
from svftool.stages.audit import audit
from svftool.stages.decompose import decompose
from svftool.stages.finetune import finetune
from svftool.stages.merge import merge
from svftool.tasks.classification import Classification
from svftool.tasks.views import Augment
from svftool.training import Settings, train

MARKER = ".svftool-demo"
SEEN, UNSEEN = range(6), range(6, 10)
PIXELS = 16
BASE_SHOTS, SHOTS, SEEDS = 120, 5, 3
REGIMES = ("head", "svf", "full")
AUGMENT: Augment = "none"
SAFEGUARD: SafeguardChoice = "never"
"""The regimes are compared where their training ends."""
"""A digit that is flipped is another character."""


@dataclass(frozen=True)
class Pretrained:
    """The base that the demo makes for itself.

    Attributes
    ----------
    checkpoint : Path
        Its weights.
    classes : tuple of str
        What it was trained on.
    images : int
        How many images it was trained on.
    accuracy : float
        On other images of those classes.
    parameters : int
        Numbers in the network.
    seconds : float
        Wall time of training.
    """

    checkpoint: Path
    classes: tuple[str, ...]
    images: int
    accuracy: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class DemoStep:
    """One step of the demo.

    Attributes
    ----------
    name : str
        ``pretrain``, or the command that the step stands for.
    command : tuple of str
        The command line that does the same, word by word; empty for ``pretrain``.
    result : object
        What the stage returned.
    """

    name: str
    command: tuple[str, ...]
    result: Any


def demo(folder: Path, *, force: bool = False, progress: Progress = SILENT) -> Iterator[DemoStep]:
    """Train a small network on some digits, then tune it for digits that it has not seen.

    Parameters
    ----------
    folder : Path
        Where everything is written.
    force : bool
        Replace the folder of an earlier demo.
    progress : Progress
        Told how far the work is.

    Yields
    ------
    DemoStep
        Each step when it is done.

    Raises
    ------
    UsageError
        If the folder is not empty and may not be replaced.
    MissingDependencyError
        If scikit-learn, which brings the digits, is not installed.
    """
    digits, labels = _load_digits()
    _clear(folder, force=force)
    write_pictures(folder / "seen", digits, labels, SEEN)
    write_pictures(folder / "unseen", digits, labels, UNSEEN)
    (folder / "digits_net.py").write_text(inspect.getsource(demo_net), encoding="utf-8")
    yield DemoStep("pretrain", (), pretrain(folder, progress=progress))
    yield from _tune(folder, progress)


def _tune(folder: Path, progress: Progress) -> Iterator[DemoStep]:
    base, factors, runs = folder / "digits.safetensors", folder / "factors", folder / "runs"
    model = f"{folder / 'digits_net.py'}:digits_net"
    decomposed = decompose(base, factors, progress=progress)
    yield _step("decompose", [base, "-o", factors], decomposed)
    tuned = finetune(
        factors,
        data=folder / "unseen",
        output=runs,
        model=model,
        shots=SHOTS,
        seeds=SEEDS,
        regimes=REGIMES,
        settings=Settings(safeguard=SAFEGUARD),
        augment=AUGMENT,
        progress=progress,
    )
    options = ["--data", folder / "unseen", "--model", model, "--shots", SHOTS, "--seeds", SEEDS]
    options += ["--regime", ",".join(REGIMES), "--augment", AUGMENT]
    options += ["--safeguard", SAFEGUARD]
    yield _step("finetune", [factors, "-o", runs, *options], tuned)
    expert, merged = runs / "svf-seed0.svf.safetensors", folder / "merged.safetensors"
    result = merge(factors, [expert], output=merged, verify=True, progress=progress)
    yield _step("merge", [factors, expert, "-o", merged, "--verify"], result)
    others = [merged, runs / "full-seed0.safetensors"]
    yield _step("inspect", [base, *others], audit(base, others, progress=progress))


def _step(name: str, arguments: Sequence[object], result: object) -> DemoStep:
    return DemoStep(name, ("svftool", name, *map(str, arguments)), result)


def pretrain(folder: Path, *, progress: Progress = SILENT) -> Pretrained:
    """Train the base on the images in ``seen`` and save it as ``digits.safetensors``."""
    torch.manual_seed(0)
    model = demo_net.digits_net()
    task = Classification(folder / "seen", shots=BASE_SHOTS, head="keep", augment="none")
    draw = task.draw(0)
    outcome = train(
        model,
        {"backbone": list(model.parameters())},
        draw,
        Settings(epochs=10, batch_size=32, lr=5e-3),
        seed=0,
        metric=task.primary,
        label="training a base on digits 0 to 5",
        progress=progress,
    )
    checkpoint = folder / "digits.safetensors"
    save_file(model.state_dict(), checkpoint, metadata={"format": "pt"})
    return Pretrained(
        checkpoint=checkpoint,
        classes=task.classes,
        images=draw.size,
        accuracy=draw.evaluate(model)["accuracy"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=outcome.seconds,
    )


def _load_digits() -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("sklearn", extra="demo", purpose="svftool demo") from None
    digits = load_digits()
    return digits.images, digits.target


def write_pictures(folder: Path, images: Any, labels: Any, digits: Sequence[int]) -> None:
    """Write the images of some digits as PNG files, one folder a digit.

    Parameters
    ----------
    folder : Path
        Where the class folders go.
    images : (N, 8, 8) ndarray
        Values from 0 to 16.
    labels : (N,) ndarray
        The digit of each image.
    digits : sequence of int
        Which to write.
    """
    from PIL import Image

    for digit in digits:
        place = folder / str(digit)
        place.mkdir(parents=True)
        for index, pixels in enumerate(images[labels == digit]):
            picture = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
            picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(
                place / f"{index:03d}.png"
            )


def _clear(folder: Path, *, force: bool) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise UsageError(f"{folder}: holds other files, expected a new folder for the demo")
        if not force:
            raise UsageError(f"{folder}: holds an earlier demo. Replace it with --force")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
