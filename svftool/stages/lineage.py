"""Which model comes from which: pairs of checkpoints with a p-value, and the tree of them all."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from svftool.auditing.kinship import (
    FEWEST,
    Marks,
    agreement,
    earlier,
    score,
    spectral_kinship,
    unit_axes,
    upper_tail,
)
from svftool.auditing.sources import AuditSource, open_source
from svftool.auditing.ways import is_count, is_number
from svftool.checkpoints import plain_name
from svftool.errors import CheckpointError, SvftoolError, UsageError, counted
from svftool.numerics import singular_values
from svftool.numerics.chance import log_product
from svftool.numerics.rounding import precision_of
from svftool.progress import SILENT, Progress

Relation = Literal["derived", "independent", "undecided", "not comparable"]

DERIVED = 1e-6
"""p-value below which two checkpoints are relatives."""

CHANCE = 1e-2
"""p-value from which strangers are called so, where relatives would have been found."""

FOUND = 10.0
"""Score of a copy from which a relative with half of its agreement would have been found."""

CERTAIN = 1e-9
"""p-value that names alone did not give, below which spectra or values make relatives."""

_SHARED = 0.5
_SIDE = 768
_LAYERS = 24
_READ = 24
_ALIKE = 0.5


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and how they are related.

    Attributes
    ----------
    a, b : int
        Places in the list of checkpoints.
    relation : {"derived", "independent", "undecided", "not comparable"}
    p_value : float or None
        That strangers agree so well; None where nothing could be tested.
    way : str
        What was tested: names, spectra or values; empty where nothing was.
    evidence : str
    direction : int
        -1 where `b` comes from `a`, 1 for the reverse, 0 where it cannot be told.
    reason : str
        What tells the direction.
    distance : float or None
        ``||A - B|| / sqrt(||A|| ||B||)`` over the tensors of one name and shape.
    shared : float
        Their part of the larger of the two.
    """

    a: int
    b: int
    relation: Relation
    p_value: float | None
    way: str
    evidence: str
    direction: int = 0
    reason: str = ""
    distance: float | None = None
    shared: float = 0.0


@dataclass(frozen=True)
class Branch:
    """A checkpoint in the tree.

    Attributes
    ----------
    child : int
    parent : int or None
        None for a root.
    distance : float or None
        To the parent.
    directed : bool
        Whether it is known which of the two came first.
    """

    child: int
    parent: int | None = None
    distance: float | None = None
    directed: bool = False


@dataclass(frozen=True)
class Claim:
    """A base that a checkpoint names, held against the others.

    Attributes
    ----------
    checkpoint : int
        Who claims.
    base : str
        What is named.
    found : int or None
        Which of the others that is; None where none is.
    holds : bool or None
        Whether it is a relative; None where that could not be told.
    """

    checkpoint: int
    base: str
    found: int | None
    holds: bool | None


@dataclass(frozen=True)
class Lineage:
    """What was found of all checkpoints.

    Attributes
    ----------
    paths : tuple of Path
    pairs : tuple of Pair
    tree : tuple of Branch
        Each checkpoint once, parents before their children.
    claims : tuple of Claim
    seconds : float
    """

    paths: tuple[Path, ...]
    pairs: tuple[Pair, ...]
    tree: tuple[Branch, ...]
    claims: tuple[Claim, ...]
    seconds: float = 0.0


def lineage(
    checkpoints: Sequence[str | os.PathLike[str]], *, progress: Progress = SILENT
) -> Lineage:
    """Tell which checkpoints come from one another.

    Parameters
    ----------
    checkpoints : sequence of path-like
        Two or more, in any format that holds whole weights.
    progress : Progress
        Told how far the work is.

    Raises
    ------
    UsageError
        For fewer than two.
    CheckpointError, FactorsError
        If one cannot be read, or holds a change alone.
    """
    start = time.perf_counter()
    if len(checkpoints) < 2:
        raise UsageError("lineage: one checkpoint, expected two or more. Name another.")
    with ExitStack() as stack:
        models = [
            _Model(index, stack.enter_context(_open(path)))
            for index, path in enumerate(checkpoints)
        ]
        couples = list(combinations(models, 2))
        pairs = []
        with progress.task("comparing", total=len(couples), unit="pairs") as task:
            for a, b in couples:
                pairs.append(_related(a, b))
                task.advance(1.0, detail=b.source.path.name)
        claims = tuple(_claims(models, pairs))
    tree = tuple(_tree(len(models), pairs))
    paths = tuple(model.source.path for model in models)
    return Lineage(paths, tuple(pairs), tree, claims, time.perf_counter() - start)


def _open(path: str | os.PathLike[str]) -> AuditSource:
    source = open_source(path)
    if source.kind in ("tuned", "lora"):
        source.file.__exit__(None, None, None)
        kind = "a tuned file" if source.kind == "tuned" else "an adapter"
        raise CheckpointError(
            f"{path}: {kind}, which holds a change alone, expected whole weights. Merge it first: "
            "svftool merge."
        )
    return source


class _Model:
    """A checkpoint and what has been found of it so far."""

    def __init__(self, index: int, source: AuditSource) -> None:
        self.index = index
        self.source = source
        self.names = {}
        for name, info in source.infos.items():
            if is_number(info):
                self.names[plain_name(name)] = name
        self.shapes = {plain: source.infos[name].shape for plain, name in self.names.items()}
        self.weights = {plain: s for plain, s in self.shapes.items() if len(s) >= 2}
        self.axes = unit_axes(self.weights)
        self.size = sum(math.prod(shape) for shape in self.weights.values())
        self._spectra: dict[str, Tensor] = {}
        self._marks: Marks | None = None

    def read(self, plain: str) -> Tensor:
        return self.source.read(self.names[plain])

    def spectrum(self, plain: str) -> Tensor:
        """Singular values of a weight as a matrix."""
        if plain not in self._spectra:
            matrix = self.read(plain).flatten(1)
            self._spectra[plain] = singular_values(matrix).cpu()
        return self._spectra[plain]

    def marks(self) -> Marks:
        """Look for what shows the age."""
        if self._marks is None:
            counters = {
                plain_name(name): float(self.source.read(name))
                for name, info in self.source.infos.items()
                if is_count(info) and not info.shape and _COUNTER.search(name)
            }
            zeros, digits = 0, 0
            for plain in self.weights:
                weight = self.read(plain)
                zeros += int((weight == 0).sum())
                digits = max(digits, _digits(weight))
            self._marks = Marks(counters, zeros / max(self.size, 1), digits)
        return self._marks


_COUNTER = re.compile(r"(num_batches_tracked|global_step|steps?)$")
_PRECISIONS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def _digits(weight: Tensor) -> int:
    """Return the significant digits of a weight, or those of the steps it was rounded to."""
    rows = weight.flatten(1)[:_ROWS].double()
    for digits in _WHOLE:
        for top in (rows.abs().amax(dim=1, keepdim=True), weight.abs().max().double()):
            steps = rows * ((1 << digits) - 1) / torch.where(top == 0.0, 1.0, top)
            if rows.shape[1] >= FEWEST and bool(((steps - steps.round()).abs() < 0.01).all()):
                return digits
    return _PRECISIONS.get(precision_of(weight), 24)


_ROWS = 64
_WHOLE = (1, 3, 7)


# A pair.


def _related(a: _Model, b: _Model) -> Pair:
    names = [name for name, shape in a.weights.items() if b.weights.get(name) == shape]
    both = sum(math.prod(a.weights[name]) for name in names)
    shared = both / max(a.size, b.size, 1)
    agreements, own, distance, equal = _by_name(a, b, names)
    z, most = score(agreements), score(own)
    p = upper_tail(z) if agreements else None
    way = "names" if agreements else ""
    said = f"{counted(len(agreements), 'layers')} of one name, score {z:.1f}" if way else ""
    if equal:
        p, way, said = 0.0, "names", f"all {len(names)} weights of one name are equal"
    if p is None or p >= DERIVED:
        other = _by_values(a, b, names if distance is not None and distance < _ALIKE else [])
        if other is not None:
            p, way, said = other
    relation = _relation(p, shared, most, way)
    order, reason = (0, "")
    if relation == "derived":
        order, reason = earlier(a.marks(), b.marks())
    else:
        said = said or "no weights of one name and shape, and no spectra alike"
    return Pair(a.index, b.index, relation, p, way, said, order, reason, distance, shared)


def _relation(p: float | None, shared: float, most: float, way: str) -> Relation:
    if p is not None and p < DERIVED:
        return "derived"
    if p is None or shared < _SHARED:
        return "not comparable"
    return "independent" if p >= CHANCE and most >= FOUND else "undecided"


def _by_name(
    a: _Model, b: _Model, names: Sequence[str]
) -> tuple[list[Tensor], list[Tensor], float | None, bool]:
    """Compare the weights of one name.

    Returns
    -------
    agreements, own : list of Tensor
        Of the two, and of the first with itself.
    distance : float or None
    equal : bool
        Whether all are.
    """
    agreements, own = [], []
    change = energy = others = 0.0
    axes = unit_axes({name: a.weights[name] for name in a.weights}) if names else {}
    equal = bool(names)
    for name in names:
        W, T = a.read(name), b.read(name)
        equal = equal and torch.equal(W.double(), T.double())
        if not (bool(W.isfinite().all()) and bool(T.isfinite().all())):
            continue
        energy += float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2
        others += float(torch.linalg.vector_norm(T, dtype=torch.float64)) ** 2
        change += float(torch.linalg.vector_norm(T.double() - W.double())) ** 2
        axis = axes.get(name)
        if axis is not None and b.axes.get(name) is not None:
            found = agreement(W, T, axis)
            itself = agreement(W, W, axis)
            if found is not None and itself is not None:
                agreements.append(found)
                own.append(itself)
    known = energy > 0.0 and others > 0.0
    distance = math.sqrt(change / math.sqrt(energy * others)) if known else None
    return agreements, own, distance, equal


def _by_values(a: _Model, b: _Model, settled: Sequence[str]) -> tuple[float, str, str] | None:
    """Look for relatives whose names, order or depth differ; None where there is no certain one."""
    return _by_spectra(a, b) or _by_place(a, b, settled)


def _by_spectra(a: _Model, b: _Model) -> tuple[float, str, str] | None:
    """Hold the singular values of weights of one shape against each other, whatever their names.

    Rows and columns may have been put in any order, or turned.
    """
    logs, kin = 0.0, 0
    mine = _by_shape(a)
    tested = 0
    for shape, theirs in _by_shape(b).items():
        own = mine.get(shape, [])
        for name in theirs:
            if not own or tested >= _LAYERS:
                break
            tested += 1
            S = b.spectrum(name)
            best = min(spectral_kinship(a.spectrum(other), S) for other in own)
            best = min(0.0, best + math.log(len(own)))
            logs += best
            kin += best < math.log(1e-3)
    if not tested:
        return None
    p = math.exp(log_product(logs, tested))
    if p >= CERTAIN or kin < max(1, tested // 4):
        return None
    said = f"the same singular values in {kin} of {tested} layers"
    return p, "spectra", said


def _by_shape(model: _Model) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {}
    for name, shape in model.weights.items():
        m, n = shape[0], math.prod(shape[1:])
        if 2 * FEWEST <= min(m, n) <= _SIDE:
            found.setdefault((m, n), []).append(name)
    return {shape: names[:_READ] for shape, names in found.items()}


def _by_place(a: _Model, b: _Model, settled: Sequence[str]) -> tuple[float, str, str] | None:
    """Hold weights of one shape against each other: layers may have been dropped or moved."""
    left = [name for name in b.axes if name not in settled]
    pools: dict[tuple[int, ...], list[str]] = {}
    for name in a.axes:
        pools.setdefault(a.weights[name], []).append(name)
    best: list[Tensor] = []
    tried = 0
    for name in left[:_READ]:
        candidates = pools.get(b.weights[name], [])[:_READ]
        if not candidates:
            continue
        T = b.read(name)
        found = [agreement(a.read(other), T, a.axes[other]) for other in candidates]
        known = [one for one in found if one is not None]
        if known:
            tried += 1
            best.append(max(known, key=lambda one: float(one.trace())))
    if not best:
        return None
    z, most = score(best), math.sqrt(sum(len(one) * (len(one) - 1) for one in best) / len(best))
    # The best of so many is chosen for each layer.
    p = min(1.0, upper_tail(z) * float(_READ) ** tried)
    if p >= CERTAIN or z < 0.2 * most:
        return None
    return p, "values", f"{tried} layers, with those of other names, score {z:.1f}"


# All of them.


def _tree(count: int, pairs: Sequence[Pair]) -> Iterator[Branch]:
    """Give each checkpoint the nearest of those that came before it."""
    parents = _parents(count, pairs)
    children: dict[int | None, list[Branch]] = {}
    for one in parents.values():
        children.setdefault(one.parent, []).append(one)

    def under(parent: int | None) -> Iterator[Branch]:
        for one in children.get(parent, []):
            yield one
            yield from under(one.child)

    yield from under(None)


class _Families:
    """Sets of checkpoints that are joined; each is known by one of its members."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def of(self, one: int) -> int:
        while self._above[one] != one:
            one = self._above[one]
        return one

    def join(self, child: int, parent: int) -> None:
        self._above[self.of(child)] = self.of(parent)


def _parents(count: int, pairs: Sequence[Pair]) -> dict[int, Branch]:
    """Choose for each checkpoint the nearest before it; then join what is not joined yet."""
    kin = sorted(
        (pair for pair in pairs if pair.relation == "derived"),
        key=lambda pair: (math.inf if pair.distance is None else pair.distance, pair.a, pair.b),
    )
    found: dict[int, Branch] = {}
    families = _Families(count)
    for pair in kin:
        parent, child = (pair.a, pair.b) if pair.direction < 0 else (pair.b, pair.a)
        known = pair.direction != 0 and child not in found
        if known and families.of(child) != families.of(parent):
            found[child] = Branch(child, parent, pair.distance, directed=True)
            families.join(child, parent)
    for pair in kin:
        child = pair.b if pair.b not in found else pair.a
        parent = pair.a if child == pair.b else pair.b
        if child not in found and families.of(child) != families.of(parent):
            found[child] = Branch(child, parent, pair.distance)
            families.join(child, parent)
    return {one: found.get(one, Branch(one)) for one in range(count)}


# Claims.


def _claims(models: Sequence[_Model], pairs: Sequence[Pair]) -> Iterator[Claim]:
    relations: Mapping[frozenset[int], Relation] = {
        frozenset((pair.a, pair.b)): pair.relation for pair in pairs
    }
    for model in models:
        for base in _claimed(model.source):
            last = base.rstrip("/").rpartition("/")[2].lower()
            found = next(
                (
                    other.index
                    for other in models
                    if other is not model and last in _called(other.source.path)
                ),
                None,
            )
            relation = None if found is None else relations[frozenset((model.index, found))]
            known = {"derived": True, "independent": False, "not comparable": False}
            yield Claim(model.index, base, found, None if relation is None else known.get(relation))


def _called(path: Path) -> set[str]:
    return {path.name.lower(), path.stem.lower(), path.parent.name.lower()}


def _claimed(source: AuditSource) -> list[str]:
    """Read which base a model says that it has: in its config, or at the top of its card."""
    said = []
    named = (source.config or {}).get("_name_or_path")
    if isinstance(named, str) and named:
        said.append(named)
    folder = source.path if source.path.is_dir() else source.path.parent
    try:
        text = (folder / "README.md").read_text("utf-8")[:_CARD] if source.path.is_dir() else ""
    except (OSError, UnicodeDecodeError, SvftoolError):
        text = ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if front is not None:
        said += re.findall(r"^base_model:[ \t]*['\"]?([^\s'\"]+)", front[1], re.MULTILINE)
        listed = re.search(
            r"^base_model:[ \t]*\n((?:[ \t]*-.*\n?)+)", front[1] + "\n", re.MULTILINE
        )
        if listed is not None:
            said += re.findall(r"-[ \t]*['\"]?([^\s'\"]+)", listed[1])
    return list(dict.fromkeys(said))


_CARD = 1 << 16
