"""On which regimes an option acts that says what of the spectrum is trained, or how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svftool.choices.regimes import Regime
from svftool.errors import UsageError, shortlist


@dataclass(frozen=True)
class _Reach:
    """Where one option acts: its flag, the regimes by name, and whether a regime is among them."""

    flag: str
    names: str
    acts: Callable[[Regime], bool]


def _on_layers(regime: Regime) -> bool:
    return regime.spectral is not None or regime.lora is not None


def _on_entries(regime: Regime) -> bool:
    one = regime.spectral
    return one is not None and (one.values or one.entries is not None or one.core is not None)


def _on_values(regime: Regime) -> bool:
    return regime.spectral is not None and regime.spectral.values


_LAYERS = "those of the singular basis and lora:SIZE"
_ENTRIES = "svf, svf+scale, salt:SIZE, entries:SIZE and core:SIZE"
_REACH = {
    "include": _Reach("--train-layers", _LAYERS, _on_layers),
    "exclude": _Reach("--exclude", _LAYERS, _on_layers),
    "parametrisation": _Reach("--parametrisation", _ENTRIES, _on_entries),
    "nonnegative": _Reach("--nonnegative", _ENTRIES, _on_entries),
    "train_rank": _Reach("--train-rank", "svf, svf+scale and salt:SIZE", _on_values),
}
_USUAL: tuple[object, ...] = (None, False, "scale", (), [])
"""Values that ask for nothing beside what is done anyway."""


def acting(regime: Regime, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some options that act on a regime.

    Examples
    --------
    >>> from svftool.choices.regimes import parse_regime
    >>> acting(parse_regime("core:8"), {"train_rank": "top:4", "nonnegative": True})
    {'nonnegative': True}
    """
    return {name: value for name, value in options.items() if _REACH[name].acts(regime)}


def check_acting(regimes: Iterable[Regime], options: Mapping[str, Any]) -> None:
    """Refuse options that act on none of the regimes that are trained.

    Parameters
    ----------
    regimes : iterable of Regime
    options : mapping
        Some of ``include``, ``exclude``, ``parametrisation``, ``nonnegative``, ``train_rank``, as
        `svftool.attach` takes them.

    Raises
    ------
    UsageError
        Names the option, and the regimes that it acts on.
    """
    trained = list(regimes)
    for name, value in options.items():
        reach = _REACH[name]
        if value not in _USUAL and not any(reach.acts(one) for one in trained):
            raise UsageError(
                f"{reach.flag} has no meaning for --regime "
                f"{shortlist([one.name for one in trained])}, only for {reach.names}. Leave it out"
            )
