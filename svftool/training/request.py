"""What a comparison was asked for, held against what is asked for now, by the options as typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from svftool.tasks.option import flag_of, options_in
from svftool.tasks.options import TASKS

_CODE = "the code of --model"
_FLAGS = {
    "regimes": "--regime",
    "seeds": "--seed and --seeds: the seeds",
    "include": "--train-layers",
    "clip": "--clip-grad",
    "code": _CODE,
    "base": "the base",
    "factors": "the factors",
    "processes": "the number of processes",
    "threads": "the number of threads",
}
_LONGEST = 60
_NOTHING = "not given"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say what two requests do not share: each option, what it was and what it is.

    Parameters
    ----------
    before, now : mapping
        What a comparison is asked for, as plain values. Files are given by name with what tells
        that they have changed.

    Examples
    --------
    >>> list(differences({"lr": None, "lr_of": {}}, {"lr": 0.1, "lr_of": {"svf": 0.5}}))
    ['--lr was not given, now 0.1,svf=0.5']
    """
    old, new = _as_typed(before), _as_typed(now)
    if old.get("--model") != new.get("--model"):
        old.pop(_CODE, None), new.pop(_CODE, None)
    for flag in dict.fromkeys([*old, *new]):
        yield from _difference(flag, old.get(flag), new.get(flag))


def _as_typed(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a request by their flags."""
    plain = dict(request)
    rates, common = plain.pop("lr_of", None) or {}, plain.pop("lr", None)
    every = [] if common is None else [f"{common:g}"]
    plain["lr"] = [*every, *(f"{name}={rate:g}" for name, rate in rates.items())]
    if "clip" in plain:
        plain["clip"] = plain["clip"] or 0
    if isinstance(plain.get("model"), list):
        plain["model"], plain["code"] = plain["model"]
    options, kind = plain.pop("options", None) or {}, TASKS.get(str(plain.get("task")))
    found = {_FLAGS.get(name, f"--{_dashed(name)}"): value for name, value in plain.items()}
    flags = {} if kind is None else {name: flag_of(kind, name) for name, _ in options_in(kind)}
    return found | {flags.get(name, f"--{_dashed(name)}"): value for name, value in options.items()}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _difference(flag: str, before: Any, now: Any) -> Iterator[str]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                change = "is gone" if name not in now else "has changed"
                yield f"{flag}: {name} {change if name in before else 'is new'}"
        return
    if flag in {"the base", "the factors"}:  # fingerprints say nothing to a reader
        yield f"{flag} {'has' if flag == 'the base' else 'have'} changed"
        return
    was = "were" if flag.endswith("seeds") else "was"
    yield f"{flag} {was} {_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    """Write a value as it is typed."""
    if value is None or value == []:
        return _NOTHING
    if isinstance(value, dict):
        return "given"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
