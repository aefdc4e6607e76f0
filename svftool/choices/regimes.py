"""Regimes by name: what is trained beside the head, and how many numbers that is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from svftool.errors import UsageError, no_such

NAMES = (
    "head, svf, svf+scale, svf+bias, svf+norm, entries:SIZE[:gradient|random|band], core:SIZE, "
    "salt:SIZE, rows, bias, norm, lora:SIZE, full"
)
Choice = Literal["gradient", "random", "band"]
"""Which entries of M are trained: those of the largest gradient, any, or the nearest diagonals."""

_BESIDE = frozenset({"scale", "bias", "norm"})
_SIZED = ("entries", "core", "salt")
_SPECTRAL = frozenset({"svf", "rows", *_SIZED})
_SIZE = re.compile(r"(?P<count>[1-9]\d{0,8})|(?P<times>\d{1,6}(\.\d{1,6})?)x")


@dataclass(frozen=True)
class Size:
    """How many: a number, or a multiple of what ``svf`` trains.

    Attributes
    ----------
    count : int or None
    times : float or None
        Exactly one of the two is given.
    """

    count: int | None = None
    times: float | None = None

    def __str__(self) -> str:
        return f"{self.count}" if self.times is None else f"{self.times:g}x"

    def of(self, k: int) -> int:
        """Return how many numbers that is in a layer of `k` singular values."""
        return round((self.times or 0.0) * k) if self.count is None else self.count


@dataclass(frozen=True)
class LayerNumbers:
    """What one matrix of a layer trains.

    Attributes
    ----------
    values : int
        Singular values.
    rows, columns : int
        Scales of rows and of columns.
    entries : int
        Entries of M in ``U M Vh``; a core's are the square of its side.
    remainder : int
        Rank of the low-rank remainder.
    width : int
        Numbers that a rank takes, m + n.
    """

    values: int = 0
    rows: int = 0
    columns: int = 0
    entries: int = 0
    remainder: int = 0
    width: int = 0

    @property
    def side(self) -> int:
        """Side of a core."""
        return math.isqrt(self.entries)

    @property
    def count(self) -> int:
        """All of them together."""
        return self.values + self.rows + self.columns + self.entries + self.remainder * self.width


@dataclass(frozen=True)
class Spectral:
    """What is trained of ``diag(row) U M Vh diag(col) + B A``, in every layer.

    Attributes
    ----------
    values : bool
        The singular values, the diagonal of M.
    rows, columns : bool
        A scale of each row, of each column.
    entries : Size or None
        How many entries of M a matrix; on the diagonal they change singular values.
    choice : {"gradient", "random", "band"}
        Which entries.
    core : Size or None
        The block of M over the largest singular values, by its side.
    remainder : Size or None
        Rank of ``B A``.
    """

    values: bool = True
    rows: bool = False
    columns: bool = False
    entries: Size | None = None
    choice: Choice = "gradient"
    core: Size | None = None
    remainder: Size | None = None

    @property
    def plain(self) -> bool:
        """Whether the singular values alone are trained."""
        return self == Spectral()

    def of(self, m: int, n: int, k: int) -> LayerNumbers:
        """Return what an m x n matrix of `k` singular values trains: never more than it has.

        Entries and cores end at ``k^2``. Scales, and ranks of a remainder, are left out where all
        together would be more than ``m n``.

        Examples
        --------
        >>> parse_regime("core:1x").spectral.of(64, 64, 64).side
        8
        >>> parse_regime("salt:4").spectral.of(64, 32, 32).count
        416
        """
        found = self._wanted(m, n, k)
        entries = min(found.entries, k * k)
        room = m * n - entries - found.values
        scales = found.rows + found.columns <= room
        rows, columns = (found.rows, found.columns) if scales else (0, 0)
        fits = max(0, room - rows - columns) // (m + n)
        return LayerNumbers(found.values, rows, columns, entries, min(found.remainder, fits), m + n)

    def _wanted(self, m: int, n: int, k: int) -> LayerNumbers:
        values = k if self.values else 0
        entries = 0 if self.entries is None else max(1, self.entries.of(k))
        if self.core is not None:
            side = self.core.count or max(1, round(math.sqrt((self.core.times or 0.0) * k)))
            entries = side * side
        rank = 0
        if self.remainder is not None:
            nearest = round(((self.remainder.times or 0.0) - 1.0) * k / (m + n))
            rank = self.remainder.count or max(1, nearest)
        return LayerNumbers(
            values, m if self.rows else 0, n if self.columns else 0, entries, rank, m + n
        )

    def exceeds(self, m: int, n: int, k: int) -> bool:
        """Whether a matrix has fewer numbers than are asked for."""
        found, wanted = self.of(m, n, k), self._wanted(m, n, k)
        return found.entries < wanted.entries or found.remainder < wanted.remainder


@dataclass(frozen=True)
class Regime:
    """What is trained beside the head.

    Attributes
    ----------
    name : str
        As given on the command line.
    parts : frozenset of str
        What the name is made of, without sizes: some of ``svf``, ``scale``, ``entries``, ``core``,
        ``salt``, ``rows``, ``bias``, ``norm``; empty for ``head``, ``lora`` and ``full``.
    lora : Size or None
        Rank of the adapters.
    full : bool
        Everything.
    spectral : Spectral or None
        What is trained in the singular basis.
    """

    name: str
    parts: frozenset[str] = frozenset()
    lora: Size | None = None
    full: bool = False
    spectral: Spectral | None = None

    def same(self, other: Regime) -> bool:
        """Whether both train the same, however they are spelt.

        Examples
        --------
        >>> parse_regime("svf+bias").same(parse_regime("bias+svf"))
        True
        """
        return replace(self, name="") == replace(other, name="")


def parse_regime(text: str) -> Regime:
    """Read the name of a regime.

    Raises
    ------
    UsageError
        If there is no such regime.

    Examples
    --------
    >>> sorted(parse_regime("svf+bias").parts), str(parse_regime("lora:8").lora)
    (['bias', 'svf'], '8')
    >>> parse_regime("entries:4x:band").spectral.choice
    'band'
    """
    name = text.strip()
    if name in ("head", "full"):
        return Regime(name, full=name == "full")
    if name.partition(":")[0] == "lora":
        return Regime(name, lora=_size(text, name.partition(":")[2]))
    given = [part.partition(":") for part in name.split("+")]
    parts = [part for part, _, _ in given]
    of_basis = [part for part in parts if part in _SPECTRAL]
    known = set(parts) <= _BESIDE | _SPECTRAL and len(set(parts)) == len(parts)
    wrong = [part for part, colon, _ in given if bool(colon) != (part in _SIZED)]
    if not known or wrong or len(of_basis) > 1 or ("scale" in parts and not of_basis):
        raise _none_such(text)
    sizes = {part: size for part, _, size in given}
    spectral = _spectral(text, of_basis[0], sizes[of_basis[0]]) if of_basis else None
    if spectral is not None and "scale" in parts:
        if spectral.rows:
            raise _none_such(text)
        spectral = _scaled(spectral)
    return Regime(name, parts=frozenset(parts), spectral=spectral)


def _none_such(text: str) -> UsageError:
    sizes = "SIZE is a number such as 8, or a multiple of svf's numbers such as 4x"
    return UsageError(f"{no_such('regime', text, NAMES.split(', '))} {sizes}")


def _scaled(one: Spectral) -> Spectral:
    return Spectral(one.values, True, True, one.entries, one.choice, one.core, one.remainder)


def _spectral(text: str, part: str, size: str) -> Spectral:
    if part == "svf":
        return Spectral()
    if part == "rows":
        return Spectral(values=False, rows=True)
    if part == "core":
        return Spectral(values=False, core=_size(text, size))
    if part == "salt":
        return Spectral(remainder=_size(text, size))
    count, colon, choice = size.partition(":")
    if colon and choice not in get_args(Choice):
        raise UsageError(no_such("choice of entries", choice, get_args(Choice)))
    entries = _size(text, count)
    if choice == "random":
        return Spectral(values=False, entries=entries, choice="random")
    if choice == "band":
        return Spectral(values=False, entries=entries, choice="band")
    return Spectral(values=False, entries=entries)


def _size(text: str, size: str) -> Size:
    match = _SIZE.fullmatch(size)
    if match is None or (match["times"] is not None and float(match["times"]) <= 0.0):
        raise _none_such(text)
    if match["count"] is not None:
        return Size(count=int(match["count"]))
    return Size(times=float(match["times"]))


Matrices = Sequence[tuple[int, int, int, int]]
"""How many, m, n and k of the matrices of each layer."""


def check_sizes(regime: Regime, matrices: Matrices) -> None:
    """Refuse a regime that asks every layer for more numbers than it has.

    A layer that has fewer, beside others that have as many, trains what it has; see `Spectral.of`.

    Raises
    ------
    UsageError
        If no layer has as many.
    """
    if not matrices:
        return
    one = regime.spectral
    if regime.lora is not None:
        _check_rank(regime, regime.lora, matrices)
    if one is None or not all(one.exceeds(m, n, k) for _, m, n, k in matrices):
        return
    _, m, n, k = max(matrices, key=lambda found: (found[3], found[1] * found[2]))
    most = one.of(m, n, k)
    way_out = "Give a smaller size"
    if one.remainder is not None and not most.remainder:
        way_out = "Choose another regime"
    found = f"a remainder of rank {most.remainder}"
    if one.remainder is None:
        found = f"a core of side {most.side}" if one.core else f"{most.entries:,} entries"
    raise UsageError(
        f"regime {regime.name}: more numbers than any layer has; the largest, {m} x {n} of rank "
        f"{k}, takes {found}, expected no more. {way_out}."
    )


def _check_rank(regime: Regime, size: Size, matrices: Matrices) -> None:
    _, m, n, _ = max(matrices, key=lambda found: (min(found[1:3]), found[1] * found[2]))
    rank = lora_rank(size, matrices)
    if rank > min(m, n):
        raise UsageError(
            f"regime {regime.name}: rank {rank:,}, more than any layer has; the largest, {m} x "
            f"{n}, has {min(m, n)}, expected no more. Give a smaller size."
        )


def lora_rank(size: Size, matrices: Matrices) -> int:
    """Return the rank of adapters: of a multiple, the one whose numbers come nearest to it.

    Examples
    --------
    >>> lora_rank(Size(times=4.0), [(1, 64, 64, 64)])
    2
    """
    if size.count is not None:
        return size.count
    values = sum(count * k for count, _, _, k in matrices)
    thin = sum(count * (m + n) for count, m, n, _ in matrices)
    return max(1, round((size.times or 0.0) * values / max(1, thin)))


def say_size(regime: Regime, matrices: Matrices) -> str:
    """Say how many numbers a multiple came to, where that is another one; empty otherwise.

    Examples
    --------
    >>> say_size(parse_regime("lora:1x"), [(1, 64, 64, 64)])
    'lora:1x: rank 1, 128 numbers, 2 times those of svf'
    """
    one = regime.spectral
    sized = None if one is None else one.entries or one.core or one.remainder
    size = regime.lora if one is None else sized
    values = sum(count * k for count, _, _, k in matrices)
    if size is None or size.times is None or not values:
        return ""
    if one is None:
        rank = lora_rank(size, matrices)
        total, found = rank * sum(count * (m + n) for count, m, n, _ in matrices), f"rank {rank}, "
    else:
        total, found = sum(e * one.of(m, n, k).count for e, m, n, k in matrices), ""
    if abs(total / values - size.times) <= 0.01 * size.times:
        return ""
    return f"{regime.name}: {found}{total:,} numbers, {total / values:.3g} times those of svf"


FORMS = "svf, svf+scale, entries:SIZE[:band], core:SIZE, salt:SIZE, rows, best[:SIZE]"
"""What a dense change can be brought into as a tuned file."""

BEST = 4.0
"""Numbers that ``best`` may take, as a multiple of svf's."""


@dataclass(frozen=True)
class Form:
    """What a dense change is brought into.

    Attributes
    ----------
    name : str
        As given.
    regimes : tuple of Regime
        The one, or those among which the best is looked for.
    times : float or None
        How many numbers the best may have, as a multiple of svf's.
    """

    name: str
    regimes: tuple[Regime, ...]
    times: float | None = None


def parse_form(text: str) -> Form:
    """Read what a dense change is to be brought into.

    Raises
    ------
    UsageError
        If there is no such form.

    Examples
    --------
    >>> [one.name for one in parse_form("best:2x").regimes]
    ['svf', 'rows', 'svf+scale', 'entries:2x', 'core:2x', 'salt:2x']
    """
    name = text.strip()
    first, colon, size = name.partition(":")
    if first == "best":
        match = _SIZE.fullmatch(size) if colon else None
        times = BEST if not colon else float(match["times"] or 0.0) if match else 0.0
        if times < 1.0:
            raise UsageError(
                f"--as {text}: size {size!r}, expected a multiple of svf's numbers such as best:4x"
            )
        names = ("svf", "rows", "svf+scale", *(f"{part}:{times:g}x" for part in _SIZED))
        return Form(name, tuple(parse_regime(one) for one in names), times)
    try:
        regime = parse_regime(name)
    except UsageError:
        regime = Regime(name)
    one = regime.spectral
    alone = regime.parts <= _SPECTRAL or regime.parts == {"svf", "scale"}
    if one is None or not alone or one.choice == "random":
        raise UsageError(no_such("--as", text, (*FORMS.split(", "), "lora", "exact")))
    return Form(name, (regime,))
