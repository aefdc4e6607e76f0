"""Layers that have another number in the fine-tune: moved, turned round, or some left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from svftool.auditing.likeness import FAR, NEAR, SAME
from svftool.checkpoints import TensorInfo, plain_name
from svftool.errors import counted, shortlist

Numbers = Callable[[str, bool], Tensor | None]
"""Some numbers of a tensor of the base, or of the fine-tune where True; always the same places."""

_Series = dict[str, dict[str, str]]

_LAYERS = 256
_CHECKED = 4
_SMALL = 1 << 16


def renumbered(
    mine: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    theirs: Mapping[str, str],
    tuned: Mapping[str, TensorInfo],
    numbers: Numbers,
) -> tuple[dict[str, str], list[str], set[str]]:
    """Give layers of the fine-tune the numbers of those of the base that hold their values.

    Returns
    -------
    renamed : dict of str to str
        `theirs` under those numbers.
    said : list of str
        What was renumbered, as sentences.
    turned : set of str
        Tensors of series in which a later layer of the base comes earlier.
    """
    ours, others = _all_series(mine), _all_series(theirs)
    renamed, said, turned = dict(theirs), [], set()
    for prefix, other in _series_pairs(ours, others):
        one = ours[prefix]
        shape = {tail: base[mine[name]] for layer in one.values() for tail, name in layer.items()}
        rival = {
            tail: tuned[theirs[name]]
            for layer in others[other].values()
            for tail, name in layer.items()
        }
        tail = _telling(one, others[other], shape, rival)
        if tail is None:
            continue
        first = {i: mine[layer[tail]] for i, layer in one.items() if tail in layer}
        second = {i: theirs[layer[tail]] for i, layer in others[other].items() if tail in layer}
        order = _order(first, second, shape[tail].numel, numbers)
        if not order:
            continue
        path = [int(order[index]) for index in sorted(order, key=int)]
        if path != sorted(path):
            turned |= {theirs[name] for layer in others[other].values() for name in layer.values()}
        # What holds no layer of the base gets a number that no layer of it has.
        renamed |= {
            _at(name, other, order.get(index, f"{index}'")): renamed.pop(name)
            for index, layer in others[other].items()
            for name in layer.values()
        }
        changes = [f"{index} for {order[index]}" for index in order if order[index] != index]
        said.append(
            f"{counted(len(order), 'layers')} of {other.rstrip('.')} matched in another order: "
            f"{shortlist(changes, 4)}"
        )
    return renamed, said, turned


def _all_series(names: Iterable[str]) -> dict[str, _Series]:
    """Return names by what stands before their first number, the number, and what follows."""
    found: dict[str, _Series] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if at is not None:
            prefix = "".join(f"{part}." for part in parts[:at])
            tail = plain_name(".".join(parts[at + 1 :]))
            found.setdefault(prefix, {}).setdefault(parts[at], {})[tail] = name
    return found


def _series_pairs(
    ours: Mapping[str, _Series], others: Mapping[str, _Series]
) -> Iterator[tuple[str, str]]:
    """Yield the series of both sides that correspond by their prefix, or else by what they hold."""
    plain: dict[str, list[str]] = defaultdict(list)
    for prefix in others:
        plain[plain_name(f"{prefix}x")].append(prefix)
    left, used = [], set()
    for prefix in ours:
        same = [prefix] if prefix in others else plain.get(plain_name(f"{prefix}x"), [])
        if len(same) == 1:
            used.add(same[0])
            yield prefix, same[0]
        else:
            left.append(prefix)
    held: dict[frozenset[str], list[str]] = defaultdict(list)
    for prefix in others:
        if prefix not in used:
            held[_tails(others[prefix])].append(prefix)
    for prefix in left:
        alike = held.get(_tails(ours[prefix]), [])
        if len(alike) == 1 and sum(_tails(ours[p]) == _tails(ours[prefix]) for p in left) == 1:
            yield prefix, alike[0]


def _tails(series: _Series) -> frozenset[str]:
    return frozenset(tail for layer in series.values() for tail in layer)


def _telling(
    one: _Series,
    other: _Series,
    shapes: Mapping[str, TensorInfo],
    rivals: Mapping[str, TensorInfo],
) -> str | None:
    """Return the smallest matrix that most layers of both sides have."""
    if not 1 < len(one) <= _LAYERS or len(other) > _LAYERS:
        return None
    counts = Counter(tail for layer in (*one.values(), *other.values()) for tail in layer)
    fit = [
        (-counts[tail], info.numel, tail)
        for tail, info in shapes.items()
        if tail in rivals
        and rivals[tail].shape == info.shape
        and len(info.shape) > 1
        and info.numel >= 16
    ]
    return min(fit)[2] if fit else None


def _order(
    first: Mapping[str, str], second: Mapping[str, str], size: int, numbers: Numbers
) -> dict[str, str]:
    """Return the base's number of each layer of the fine-tune; empty where all have their own."""
    common = sorted(first.keys() & second.keys(), key=int)
    step = 1 if size <= _SMALL else max(1, len(common) // _CHECKED)
    checked = {*common[::step], *common[-1:]}
    read: dict[tuple[str, bool], Tensor | None] = {}

    def unit(name: str, side: bool) -> Tensor | None:
        if (name, side) not in read:
            read[name, side] = numbers(name, side)
        return read[name, side]

    def stays(index: str) -> bool:
        a, b = unit(first[index], False), unit(second[index], True)
        return a is None or b is None or len(a) != len(b) or abs(float(a @ b)) >= FAR

    if common and all(stays(index) for index in checked):
        return {}
    rows = {i: v for i, name in first.items() if (v := unit(name, False)) is not None}
    columns = {i: v for i, name in second.items() if (v := unit(name, True)) is not None}
    if not rows or not columns or len({len(v) for v in (*rows.values(), *columns.values())}) > 1:
        return {}
    cosines = (torch.stack(list(columns.values())) @ torch.stack(list(rows.values())).T).abs()
    mine, found = list(rows), {}
    for index, near in zip(columns, cosines, strict=True):
        best = int(near.argmax())
        # A tie is no order, and neither is a layer that two of the fine-tune came from.
        rivals = (near >= near[best] - SAME).sum() + (cosines[:, best] >= near[best] - SAME).sum()
        if near[best] >= NEAR and rivals == 2:
            found[index] = mine[best]
    return found if any(index != other for index, other in found.items()) else {}


def _at(name: str, prefix: str, number: str) -> str:
    rest = name.removeprefix(prefix).partition(".")[2]
    return f"{prefix}{number}.{rest}"
