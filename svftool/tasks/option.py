"""What an option of a task is: a field of a dataclass that also says how it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from svftool.errors import UsageError, did_you_mean

TaskName = Literal[
    "classification", "text-classification", "segmentation", "language", "few-shot-segmentation"
]


@dataclass(frozen=True, kw_only=True)
class Option:
    """How an option looks on the command line, and who else knows it.

    Attributes
    ----------
    help : str
    flag : str or None
        Such as ``--eval``; None makes it from the field's name.
    panel : str or None
        Heading in the help text.
    default : object
        The field's value where the option is not given.
    shown : str or None
        What the help shows as the default, where that is not the value itself.
    metavar : str or None
    limits : tuple of float or None
        Smallest and largest number allowed.
    type : object
        Type on the command line, where it is not the field's own.
    read : callable or None
        Makes the field's value from the flag and the text after it.
    recorded : str or None
        Key of `Task.describe` under which a tuned file holds the value. `svftool.evaluate` goes by
        it, because the same weights give the same metrics only under the same value.
    evaluate : bool
        Whether ``svftool evaluate`` has the option.
    evaluate_help, evaluate_shown : str or None
        Its wording there, where it is another.
    evaluate_as : object
        Value in `svftool.evaluate`, where it has no such option and the default would not do.
    """

    help: str
    flag: str | None = None
    panel: str | None = None
    default: Any = None
    shown: str | None = None
    metavar: str | None = None
    limits: tuple[float | None, float | None] = (None, None)
    type: Any = None
    read: Callable[[str, str], Any] | None = None
    recorded: str | None = None
    evaluate: bool = False
    evaluate_help: str | None = None
    evaluate_shown: str | None = None
    evaluate_as: Any = None

    def shown_default(self, *, evaluate: bool = False) -> str:
        """Return what the help shows as the default; empty for nothing."""
        words = self.evaluate_shown if evaluate else None
        words = self.shown if words is None else words
        if words is not None:
            return words
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return "" if self.default in (None, False) else str(self.default)


def option(default: Any, like: Option | None = None, **words: Any) -> Any:
    """Declare a field that is an option.

    Parameters
    ----------
    default : object
        Its value where it is not given.
    like : Option, optional
        An option of another task that it shares its flag with; `words` are what differs.
    words
        Attributes of `Option`.
    """
    words["default"] = default
    about = Option(**words) if like is None else replace(like, **words)
    return field(default=default, metadata={"option": about})


def read_numbers(flag: str, text: str) -> list[int]:
    """Read whole numbers separated by commas.

    Raises
    ------
    UsageError
        If one is no whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r}, expected whole numbers such as 1,5") from None


def read_counts(flag: str, text: str) -> list[int]:
    """Read numbers of examples separated by commas."""
    found = read_numbers(flag, text)
    if min(found) < 1:
        raise UsageError(f"{flag} is {min(found)}, expected at least 1")
    return found


def read_count(flag: str, text: str) -> int:
    """Read one number of examples."""
    first, *others = read_counts(flag, text)
    if others:
        raise UsageError(f"{flag} {text}: several numbers, this task takes one")
    return first


class TaskOptions:
    """What the options of all tasks share."""

    task: ClassVar[TaskName]
    """The value of ``--task``."""

    pictured: ClassVar[bool] = False
    """Whether predictions are pictures."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), choices_of(hint)
            if choices and isinstance(value, str) and value not in choices:
                raise UsageError(
                    f"{flag_of(type(self), name)} {value!r}, expected {', '.join(choices)} "
                    f"for --task {self.task}.{did_you_mean(value, choices)}"
                )


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the texts that an annotation allows: those of its ``Literal``, if it has one."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in choices_of(part))


def options_in(kind: type[TaskOptions]) -> Iterator[tuple[str, Option]]:
    """Yield the options of a task by their names in the library."""
    for one in fields(kind):  # type: ignore[arg-type]
        yield one.name, one.metadata["option"]


def flag_of(kind: type[TaskOptions], name: str) -> str:
    """Return the flag of an option, such as ``--image-size``."""
    flag = dict(options_in(kind))[name].flag
    return flag or f"--{name.replace('_', '-')}"
