"""Methods that make one change of many: their names, their parameters, and weights of inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from svftool.errors import UsageError, did_you_mean, no_such

Heads = Literal["concat", "first", "drop"]
"""What becomes of output heads whose rows stand for different classes."""


@dataclass(frozen=True)
class Parameter:
    """A number that a method takes.

    Attributes
    ----------
    default : float or None
        None where it follows from the number of inputs.
    low, high : float
        The range, ends included.
    whole : bool
        Only whole numbers.
    what : str
        What it is, for the help.
    """

    default: float | None
    low: float
    high: float
    what: str
    whole: bool = False

    def parse(self, name: str, text: str) -> float:
        """Read a value.

        Raises
        ------
        UsageError
            If it is no number or out of range.
        """
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise UsageError(
                f"--method: {name} is {text!r}, expected {kind} from {self.low:g} to {self.high:g}"
            )
        return value


@dataclass(frozen=True)
class MergeMethod:
    """What is known of a method without computing anything.

    Attributes
    ----------
    what : str
        In a few words, for the help.
    parameters : mapping of str to Parameter
    least : int
        Inputs that it needs.
    most : int or None
        Inputs that it takes.
    matrices : bool
        It is defined for matrices; other tensors are averaged.
    """

    what: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    least: int = 1
    most: int | None = None
    matrices: bool = False


_SCALE = Parameter(1.0, -100.0, 100.0, "factor of the merged change")
_DENSITY = Parameter(0.2, 1e-6, 1.0, "share of entries kept, the largest")
_KEPT = Parameter(0.1, 1e-6, 1.0, "share of entries kept, at random")
_SEED = Parameter(0.0, 0.0, 2.0**53, "of the random choice", whole=True)

METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod("the weighted sum (task arithmetic)"),
    "slerp": MergeMethod(
        "along the arc between two changes",
        {"t": Parameter(0.5, 0.0, 1.0, "place on the arc")},
        least=2,
        most=2,
    ),
    "ties": MergeMethod("trim, elect signs, average those that agree", {"density": _DENSITY}),
    "dare-linear": MergeMethod("drop at random, rescale, sum", {"density": _KEPT, "seed": _SEED}),
    "dare-ties": MergeMethod(
        "drop at random, rescale, elect signs", {"density": _KEPT, "seed": _SEED}
    ),
    "breadcrumbs": MergeMethod(
        "leave out the smallest and the largest entries, sum",
        {
            "bottom": Parameter(0.85, 0.0, 1.0, "share left out below"),
            "top": Parameter(0.007, 0.0, 1.0, "share left out above"),
        },
    ),
    "model-stock": MergeMethod("the mean, as far as the inputs agree", least=2),
    "consensus-ta": MergeMethod(
        "the sum where enough inputs rely on it",
        {
            "lambda": Parameter(0.4, 0.0, 100.0, "how much an entry must stand out"),
            "agree": Parameter(2.0, 1.0, 1000.0, "inputs that must rely on it", whole=True),
        },
        least=2,
    ),
    "tsv": MergeMethod("leading directions of each, made orthogonal (TSV-M)", matrices=True),
    "iso-c": MergeMethod("the sum with all singular values equal", matrices=True),
    "iso-cts": MergeMethod(
        "iso-c with directions of each input beside the common ones",
        {"common": Parameter(0.8, 0.0, 1.0, "share of common directions")},
        matrices=True,
    ),
    "knots-ties": MergeMethod(
        "ties in the common singular basis", {"density": _DENSITY}, matrices=True
    ),
    "svc": MergeMethod(
        "the sum with over-counted singular values set right",
        {"alpha": Parameter(None, 1e-6, 1.0, "1 only lowers them; 1/inputs by default")},
        matrices=True,
    ),
}
"""The methods by name, in the order of the help; all take ``scale`` too."""

AUTO = "auto"
_AUTO = MergeMethod("tsv of dense weights; linear:scale=0.4 where an input holds changes alone")
_OF_WEIGHTS, _OF_CHANGES = "tsv", "linear:scale=0.4"
"""The best of each kind in ``docs/results.md``, where five fine-tunes of a network are merged."""


@dataclass(frozen=True)
class MergeSpec:
    """A method with its parameters.

    Attributes
    ----------
    name : str
    values : mapping of str to float
        Those that have a value; ``scale`` is always there.
    """

    name: str
    values: Mapping[str, float]

    @property
    def method(self) -> MergeMethod:
        """What is known of the method."""
        return _AUTO if self.name == AUTO else METHODS[self.name]

    @property
    def scale(self) -> float:
        """Factor of the merged change."""
        return self.values["scale"]

    def suited(self, *, dense: bool) -> MergeSpec:
        """Return what ``auto`` stands for; any other method as it is.

        Parameters
        ----------
        dense : bool
            Every input holds weights; adapters and tuned files hold changes.

        Examples
        --------
        >>> spec = parse_method("auto:scale=0.5")
        >>> str(spec.suited(dense=True)), str(spec.suited(dense=False))
        ('tsv:scale=0.5', 'linear:scale=0.2')
        """
        if self.name != AUTO:
            return self
        found = parse_method(_OF_WEIGHTS if dense else _OF_CHANGES)
        return MergeSpec(found.name, {**found.values, "scale": found.scale * self.scale})

    def check_count(self, inputs: int) -> None:
        """Refuse a number of inputs that the method does not take.

        Raises
        ------
        UsageError
        """
        least, most = self.method.least, self.method.most
        if inputs < least or (most is not None and inputs > most):
            expected = f"exactly {least}" if least == most else f"{least} or more"
            raise UsageError(
                f"--method {self.name}: {inputs} input{'s' * (inputs != 1)}, expected {expected}. "
                "Name others, or choose another method."
            )

    def __str__(self) -> str:
        shown = [f"{key}={value:g}" for key, value in self.values.items() if key != "scale"]
        shown += [f"scale={self.scale:g}"] if self.scale != 1.0 else []
        return f"{self.name}:{','.join(shown)}" if shown else self.name


def parse_method(text: str) -> MergeSpec:
    """Read ``NAME`` or ``NAME:PARAMETER=VALUE,...``.

    Raises
    ------
    UsageError
        If there is no such method or parameter, or a value is out of range.

    Examples
    --------
    >>> str(parse_method("ties:density=0.5"))
    'ties:density=0.5'
    >>> str(parse_method("tsv"))
    'tsv'
    """
    name, colon, rest = text.strip().partition(":")
    methods = {**METHODS, AUTO: _AUTO}
    if name not in methods:
        raise UsageError(no_such("--method", name, methods))
    known = {**methods[name].parameters, "scale": _SCALE}
    values = {key: one.default for key, one in known.items() if one.default is not None}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise UsageError(
                f"--method {name}: {part!r}, expected one of "
                f"{', '.join(f'{one}=NUMBER' for one in known)}.{did_you_mean(key, known)}"
            )
        values[key] = known[key].parse(key, value)
    if values.get("bottom", 0.0) + values.get("top", 0.0) >= 1.0:
        raise UsageError(f"--method {name}: bottom and top leave nothing, expected a sum below 1")
    return MergeSpec(name, values)


def described_methods() -> str:
    """Return the methods with their parameters, for the help."""
    named = [f"{name}{_parameters(one)}" for name, one in METHODS.items()]
    return "; ".join([*named, f"{AUTO} ({_AUTO.what})"])


def _parameters(method: MergeMethod) -> str:
    shown = [
        f"{key}={'1/inputs' if one.default is None else format(one.default, 'g')}"
        for key, one in method.parameters.items()
    ]
    return f" ({', '.join(shown)})" if shown else ""


def parse_weighted(
    given: str | os.PathLike[str] | tuple[str | os.PathLike[str], float],
) -> tuple[Path, float]:
    """Split what is given as a path, ``PATH@WEIGHT``, or a pair of both.

    Raises
    ------
    UsageError
        If the weight is no number.

    Examples
    --------
    >>> parse_weighted("birds.safetensors@0.5")[1]
    0.5
    """
    if isinstance(given, tuple):
        path, weight = given
        return Path(path), float(weight)
    text = os.fspath(given)
    before, separator, after = text.rpartition("@")
    if not separator or os.path.exists(text):  # noqa: PTH110
        return Path(text), 1.0
    try:
        return Path(before), float(after)
    except ValueError:
        raise UsageError(
            f"{text}: weight {after!r}, expected a number such as in {before}@0.5"
        ) from None


def check_weight(path: Path, weight: float) -> None:
    """Refuse a weight that is NaN or infinite.

    Raises
    ------
    UsageError
    """
    if not math.isfinite(weight):
        raise UsageError(
            f"{path}: weight {weight}, expected a finite number such as in {path.name}@0.5"
        )


# Weights that data choose.

UNWEIGHED = ("few-shot-segmentation",)
"""Tasks that choose no weights: their model is more than what is merged."""

LEAST_TRIALS = 2


def usual_trials(inputs: int) -> int:
    """Return how many weights are tried by default: about two rounds of the search.

    Examples
    --------
    >>> usual_trials(3)
    16
    """
    return 4 * inputs + 4


def check_weighing(task: str | None, trials: int | None, tasks: Iterable[str]) -> None:
    """Refuse a task that chooses no weights, and a number of trials that tries nothing.

    Parameters
    ----------
    task : str or None
        None where none was named.
    trials : int or None
    tasks : iterable of str
        All there are.

    Raises
    ------
    UsageError
    """
    known = [one for one in tasks if one not in UNWEIGHED]
    if task is None:
        raise UsageError(f"--weights-from: no --task, expected one of {', '.join(known)}")
    if task in UNWEIGHED:
        raise UsageError(
            f"--weights-from: --task {task} has a model that is more than what is merged, expected "
            f"one of {', '.join(known)}. Give weights as FILE@0.5."
        )
    if task not in known:
        raise UsageError(no_such("--task", task, known))
    if trials is not None and trials < LEAST_TRIALS:
        raise UsageError(
            f"--weight-trials is {trials}, expected {LEAST_TRIALS} or more: the first one is of "
            "the weights given"
        )
