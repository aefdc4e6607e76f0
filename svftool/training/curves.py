"""Curves of a run: values at steps, thinned so that a long run is no longer than a short one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Curve = tuple[tuple[int, float], ...]
"""(step, value) pairs in ascending order of steps."""

LONGEST = 512


class Curves:
    """Named curves that are written while a run goes on."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._stride: dict[str, int] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """Record a value; of a long curve every second point goes, and then every second new one.

        Examples
        --------
        >>> curves = Curves()
        >>> for step in range(2000):
        ...     curves.add("loss", step, 0.5)
        >>> len(curves.result()["loss"]) <= LONGEST, curves.result()["loss"][1]
        (True, (4, 0.5))
        """
        points = self._points.setdefault(name, [])
        stride = self._stride.setdefault(name, 1)
        if stride > 1 and step % stride:
            return
        points.append((step, value))
        if len(points) > LONGEST:
            self._stride[name] = 2 * stride
            points[:] = [point for point in points if point[0] % (2 * stride) == 0]

    def result(self) -> dict[str, Curve]:
        """Give the curves by name."""
        return {name: tuple(points) for name, points in self._points.items()}

    def state(self) -> dict[str, Any]:
        """Give what `restore` needs, as plain values."""
        return {name: [self._stride[name], points] for name, points in self._points.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self._stride = {name: int(stride) for name, (stride, _) in state.items()}
        self._points = {
            name: [(int(step), float(value)) for step, value in points]
            for name, (_, points) in state.items()
        }


def read_curves(value: Mapping[str, list[list[float]]]) -> dict[str, Curve]:
    """Read curves back from JSON, where pairs have become lists."""
    return {
        name: tuple((int(step), float(number)) for step, number in points)
        for name, points in value.items()
    }
