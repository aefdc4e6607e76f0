"""Responses of singular directions to an image, as one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from svftool.report.drawing import SAME_BYTES, require_matplotlib, save
from svftool.report.text import safe
from svftool.stages.feature_maps import DirectionMap, FeatureMaps


def save_feature_maps(result: FeatureMaps, path: Path, *, kind: str) -> None:
    """Draw each direction's response before and after training, and their difference.

    Parameters
    ----------
    result : FeatureMaps
    path : Path
        Where to write.
    kind : {"png", "svg", "pdf"}

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    mpl = require_matplotlib()
    from matplotlib.figure import Figure

    rows = len(result.maps)
    with mpl.rc_context({**SAME_BYTES, "font.size": 7}):
        figure = Figure(figsize=(6.4, 0.95 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, 4, squeeze=False)
        for row, one in zip(axes, result.maps, strict=True):
            _draw(row, result, one)
        for axis, title in zip(axes[0], ("image", "before", "after", "difference"), strict=True):
            axis.set_title(title)
        save(figure, path, kind=kind, dpi=150)


def caption(one: DirectionMap) -> str:
    """Say in three lines which direction this is and how it moved."""
    change = f"{100 * (one.S / one.S_base - 1):+.1f} %" if one.S_base else "from 0"
    return (
        f"{safe(one.layer)}\n{one.index}, moved {one.moved}\n"
        f"S {one.S_base:.3g} to {one.S:.3g} ({change})"
    )


def _draw(axes: Any, result: FeatureMaps, one: DirectionMap) -> None:
    before, after = one.before.numpy(), one.after.numpy()
    limits = [max(float(np.abs(value).max()), 1e-12) for value in (before, after, after - before)]
    limits[0] = limits[1] = max(limits[:2])
    axes[0].imshow(result.picture.permute(1, 2, 0).numpy())
    axes[0].set_ylabel(caption(one), rotation=0, ha="right", va="center")
    for axis, value, limit in zip(axes[1:], (before, after, after - before), limits, strict=True):
        axis.imshow(value, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis in axes[2:]:
        axis.figure.colorbar(axis.images[0], ax=axis, shrink=0.9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
