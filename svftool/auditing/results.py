"""What an audit found, as plain numbers: rows, comparisons, trajectories."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from svftool.auditing.directional import Directions, Leading
from svftool.auditing.evidence import Evidence
from svftool.auditing.formulas import Value
from svftool.auditing.metrics import METRICS, Measured
from svftool.auditing.pair import Array, norm_ratio
from svftool.auditing.verdicts import STILL, Verdict
from svftool.checkpoints import View
from svftool.choices.metrics import metric_key

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Curves:
    """The spectra of a row, for views; a batch gives the mean over its matrices.

    Attributes
    ----------
    base : (k,) ndarray
        Singular values of the base, non-increasing.
    tuned : (k,) ndarray or None
        Of the fine-tune.
    along : (k,) ndarray or None
        Change along each singular direction of the base, ``diag(U' D V)``.
    """

    base: Array
    tuned: Array | None = None
    along: Array | None = None


@dataclass(frozen=True)
class Row:
    """One tensor of a comparison.

    Attributes
    ----------
    name : str
        In the base.
    tuned_name : str or None
        In the fine-tune, where it differs.
    view : {"matrix", "batch"} or None
        How it is seen; None for what is no matrix.
    matrix : tuple of int or None
        ``(m, n)`` or ``(E, m, n)``; None for what is no matrix, or where it is not known.
    shape : tuple of int
        Of the tensor; empty where it is not known.
    dtype : tuple of str
        Of the base and of the fine-tune.
    measured : Measured
        The metrics.
    verdict : Verdict or None
        None where nothing was compared.
    evidence : Evidence or None
        What the verdict rests on.
    curves : Curves or None
        Of matrices.
    by_bytes : bool
        Whether bytes were compared, not numbers: such a row has no metrics.
    leading : tuple of Leading
        Leading directions of the change, one a matrix, where they were asked for.
    """

    name: str
    view: View | None = None
    matrix: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    tuned_name: str | None = None
    measured: Measured = field(default_factory=Measured)
    verdict: Verdict | None = None
    evidence: Evidence | None = None
    curves: Curves | None = None
    by_bytes: bool = False
    leading: tuple[Leading, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor was looked at as a matrix."""
        return self.view is not None

    @property
    def changed(self) -> bool:
        """Whether the tensor changed by more than rounding."""
        return self.verdict is not None and self.verdict.name not in STILL

    @property
    def rounding_floor(self) -> Value:
        """Relative norm of the rounding noise to expect."""
        found = self.evidence
        if found is None or found.noise is None or found.base_energy == 0.0:
            return None
        return math.sqrt(found.noise.energy / found.base_energy)

    @property
    def change_rank(self) -> Value:
        """Rank of the change above its rounding noise."""
        found = self.evidence
        return None if found is None or found.rank is None else float(found.rank)

    def value(self, name: str) -> Value:
        """Look a number up by name.

        Parameters
        ----------
        name : str
            A metric, ``rounding_floor`` or ``change_rank``; of a metric of one spectrum also
            ``METRIC.base``, ``METRIC.tuned`` (meant by the plain name too) and ``METRIC.change``,
            the relative difference.
        """
        metric, _, side = metric_key(name).partition(".")
        if metric == "rounding_floor":
            return self.rounding_floor
        if metric == "change_rank":
            return self.change_rank
        if METRICS[metric].of_pair is not None:
            return self.measured.change.get(metric)
        base, tuned = self.measured.base.get(metric), self.measured.tuned.get(metric)
        if side == "base":
            return base
        if side in ("tuned", ""):
            return tuned if tuned is not None or side == "tuned" else base
        if base is None or tuned is None or base == tuned == 0.0:
            return None
        return abs(tuned - base) / abs(base) if base else math.inf

    @property
    def infinite(self) -> tuple[str, ...]:
        """Metrics of the change that are infinite, as where zeros became something."""
        found = self.measured.change.items()
        return tuple(name for name, value in found if value is not None and math.isinf(value))


@dataclass(frozen=True)
class Unread:
    """A tensor of which the metrics say nothing, and why.

    Attributes
    ----------
    name : str
    reason : str
    wanted : bool
        False where the user left it out by a pattern.
    shapes : tuple of (tuple of int or None)
        Of the base's tensor and of the fine-tune's; None where there is none, or it is not known.
    """

    name: str
    reason: str
    wanted: bool = True
    shapes: tuple[Shape | None, Shape | None] = (None, None)

    @property
    def in_two_shapes(self) -> bool:
        """Whether both sides have it, in two shapes: then both lists of unmatched tensors do."""
        return self.reason.startswith("shape ")


@dataclass(frozen=True)
class Coverage:
    """What a verdict on the whole covers.

    Attributes
    ----------
    compared : int
        Tensors compared, as numbers or byte for byte.
    not_compared : tuple of Unread
        The others of both sides; what both have in two shapes is here once.
    """

    compared: int
    not_compared: tuple[Unread, ...]

    @property
    def total(self) -> int:
        """All tensors of both sides, a matched one counted once."""
        return self.compared + len(self.not_compared)


@dataclass(frozen=True)
class Comparison:
    """A base and one fine-tune, or a base alone.

    Attributes
    ----------
    base : Path
        The base.
    tuned : Path or None
        The fine-tune.
    kinds : tuple of str
        The forms of both: checkpoint, factors, tuned, lora.
    rows : tuple of Row
        One a matched tensor, in the base's order.
    unmatched_base, unmatched_tuned : tuple of Unread
        Tensors that only one side has, or whose shapes differ.
    left_out : tuple of Unread
        Matched tensors that are not compared as numbers, such as packed integers.
    codes : tuple of Row
        Those of them that were compared byte for byte.
    verdict : Verdict or None
        For the whole; None for a base alone, unless it is broken.
    totals : tuple of int
        Tensors of the base and of the fine-tune.
    notes : tuple of str
        What was found and dropped on the way.
    screened : bool
        Whether nothing was decomposed.
    directions : Directions or None
        What the leading directions of the changes say, where they were asked for.
    """

    base: Path
    tuned: Path | None
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]
    unmatched_base: tuple[Unread, ...] = ()
    unmatched_tuned: tuple[Unread, ...] = ()
    left_out: tuple[Unread, ...] = ()
    codes: tuple[Row, ...] = ()
    verdict: Verdict | None = None
    totals: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    screened: bool = False
    directions: Directions | None = None

    @property
    def matrices(self) -> tuple[Row, ...]:
        """Rows that were looked at as matrices."""
        return tuple(row for row in self.rows if row.is_matrix)

    @property
    def coverage(self) -> Coverage:
        """What was compared, and what was not."""
        done = {row.name for row in self.codes}
        return Coverage(
            len(self.rows) + len(self.codes),
            (
                *(one for one in self.left_out if one.name not in done),
                *self.unmatched_base,
                *(one for one in self.unmatched_tuned if not one.in_two_shapes),
            ),
        )

    def counts(self) -> Mapping[str, int]:
        """How many matrices have each verdict, the most frequent first."""
        found = Counter(row.verdict.name for row in self.matrices if row.verdict is not None)
        return dict(found.most_common())

    def total(self, name: str) -> Value:
        """Return ``weight_drift`` or ``svf_share`` of all matrices as one block matrix."""
        found = [row.evidence for row in self.matrices if row.evidence is not None]
        top = max((one.exponent for one in found), default=0)
        changes = [_scaled(one.change_energy, one.exponent - top) for one in found]
        change = sum(changes)
        if name == "weight_drift":
            base = sum(_scaled(one.base_energy, one.exponent - top) for one in found)
            return norm_ratio(change, base) if found else None
        known = [
            one.svf_share * energy
            for one, energy in zip(found, changes, strict=True)
            if one.svf_share is not None
        ]
        return sum(known) / change if change > 0.0 and known else None

    def parts(self) -> Mapping[str, float]:
        """Return each matrix's part of the whole change, by name: ``||D_i||^2 / sum ||D||^2``.

        Drift says how much a matrix changed against itself, so that one of two rows may lead. The
        parts say where the checkpoint changed: they sum to 1, and the squared norm of a block
        matrix is the sum of those of its blocks. Empty where nothing changed, or not finitely.
        """
        found = [(row.name, row.evidence) for row in self.matrices if row.evidence is not None]
        top = max((one.exponent for _, one in found), default=0)
        energies = [_scaled(one.change_energy, one.exponent - top) for _, one in found]
        whole = math.fsum(energies)
        if not 0.0 < whole < math.inf:
            return {}
        return {name: energy / whole for (name, _), energy in zip(found, energies, strict=True)}

    def by_part(self) -> list[Row]:
        """Sort the matrices by their part of the whole change; by drift where it has none."""
        parts = self.parts()

        def key(row: Row) -> tuple[float, float]:
            return -parts.get(row.name, 0.0), -(row.value("weight_drift") or 0.0)

        return sorted(self.matrices, key=key)

    def median(self, name: str, among: Container[str] | None = None) -> Value:
        """Return the median of a metric over the matrices that have it.

        Parameters
        ----------
        name : str
            Of the metric.
        among : container of str, optional
            Names of the matrices to look at; all by default.
        """
        rows = (row for row in self.matrices if among is None or row.name in among)
        values = sorted(value for row in rows if (value := row.value(name)) is not None)
        middle = len(values) // 2
        if not values:
            return None
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2.0


def _scaled(energy: float, exponent: int) -> float:
    """Return a sum of squares of entries times a power of two, at most one."""
    return math.ldexp(energy, 2 * exponent)


@dataclass(frozen=True)
class Trajectory:
    """Drift over a series of fine-tunes of one base, in the order given.

    Attributes
    ----------
    checkpoints : tuple of Path
    metrics : mapping of str to tuple
        Medians over `matrices`, by metric, one a checkpoint.
    layers : mapping of str to tuple
        Weight drift of each matrix, one a checkpoint; None where it has no counterpart.
    monotone : bool
        Whether the median weight drift never falls, by more than rounding.
    matrices : tuple of str
        Those that any of the series changed by more than rounding, and that all of them were
        compared in; the medians of all checkpoints are over these, so that like is beside like.
    """

    checkpoints: tuple[Path, ...]
    metrics: Mapping[str, tuple[Value, ...]]
    layers: Mapping[str, tuple[Value, ...]]
    monotone: bool
    matrices: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditResult:
    """All comparisons of one call, in the order of the fine-tunes.

    Attributes
    ----------
    comparisons : tuple of Comparison
    metrics : tuple of str
        What was computed.
    trajectory : Trajectory or None
        Of two fine-tunes or more.
    seconds : float
    """

    comparisons: tuple[Comparison, ...]
    metrics: tuple[str, ...]
    trajectory: Trajectory | None = None
    seconds: float = 0.0


def trajectory_of(comparisons: tuple[Comparison, ...]) -> Trajectory | None:
    """Line up the comparisons of a series; None for fewer than two."""
    tuned = [one.tuned for one in comparisons if one.tuned is not None]
    if len(tuned) < 2:
        return None
    names = dict.fromkeys(row.name for one in comparisons for row in one.matrices)
    values = [{row.name: row.value("weight_drift") for row in one.matrices} for one in comparisons]
    among = _changed_in_any(comparisons)
    medians = {
        name: tuple(one.median(name, set(among)) for one in comparisons)
        for name in ("weight_drift", "relative_drift", "svf_share", "intruders")
    }
    drift = [value for value in medians["weight_drift"] if value is not None]
    return Trajectory(
        tuple(tuned),
        medians,
        {name: tuple(found.get(name) for found in values) for name in names},
        monotone=all(after >= before * (1.0 - 1e-6) for before, after in pairwise(drift)),
        matrices=among,
    )


def _changed_in_any(comparisons: tuple[Comparison, ...]) -> tuple[str, ...]:
    """List the matrices that all have and any changed; where there are none, those that all have.

    A merged checkpoint holds every matrix and an adapter only those that it changes: over these
    the two have the same medians.
    """
    counts = Counter(row.name for one in comparisons for row in one.matrices)
    shared = [name for name, count in counts.items() if count == len(comparisons)] or [*counts]
    changed = {row.name for one in comparisons for row in one.matrices if row.changed}
    return tuple(name for name in shared if name in changed) or tuple(shared)
