"""Published mIoU of the hosts with a frozen backbone and with singular-value fine-tuning.

From tables 1 and 2 of Y. Sun et al., Singular Value Fine-tuning: Few-shot Segmentation requires
Few-parameters Fine-tuning, NeurIPS 2022 (arXiv 2206.06122): training images that hold novel classes
are removed, 1,000 test episodes, models chosen on novel classes. The rows of BAM with a frozen
backbone are those of BAM's own paper.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table, in fractions.

    Attributes
    ----------
    method : str
        Such as ``PFENet + SVF``.
    folds : tuple of float
        mIoU of each fold.
    mean : float
        Of the four, as printed.
    """

    method: str
    folds: tuple[float, float, float, float]
    mean: float


def published_rows(
    dataset: str, backbone: str | None, shots: int, host: str, *, start: str | None = None
) -> tuple[PublishedRow, ...]:
    """Look up the rows of a setting: frozen backbone and SVF; none where nothing is published.

    Parameters
    ----------
    dataset : str
        ``pascal-5i`` or ``coco-20i``.
    backbone : str or None
        ``ResNet-50`` or ``VGG-16``.
    shots : int
        1 or 5.
    host : str
        ``baseline``, ``pfenet`` or ``bam``.
    start : str or None
        How the baseline starts; nothing is published of one that starts as the nearest prototype.
    """
    if start == "nearest":
        return ()
    found = _PERCENT.get((dataset, backbone or "", shots, host), ())
    name = _NAMES.get(host, host)
    return tuple(
        PublishedRow(method, (a / 100, b / 100, c / 100, d / 100), mean / 100)
        for method, (a, b, c, d, mean) in zip((name, f"{name} + SVF"), found, strict=False)
    )


_NAMES = {"baseline": "baseline", "pfenet": "PFENet", "bam": "BAM"}
_Percent = tuple[float, float, float, float, float]
_PERCENT: dict[tuple[str, str, int, str], tuple[_Percent, _Percent]] = {
    ("pascal-5i", "VGG-16", 1, "baseline"): (
        (57.48, 66.72, 62.66, 53.72, 60.15),
        (63.07, 68.40, 65.81, 54.28, 62.89),
    ),
    ("pascal-5i", "VGG-16", 1, "pfenet"): (
        (61.91, 70.34, 63.77, 57.38, 63.35),
        (63.43, 71.40, 64.18, 58.30, 64.33),
    ),
    ("pascal-5i", "VGG-16", 1, "bam"): (
        (63.18, 70.77, 66.14, 57.53, 64.41),
        (64.09, 71.07, 66.79, 57.54, 64.87),
    ),
    ("pascal-5i", "VGG-16", 5, "baseline"): (
        (62.98, 70.57, 68.62, 59.60, 65.44),
        (68.52, 72.15, 69.08, 63.59, 68.34),
    ),
    ("pascal-5i", "VGG-16", 5, "pfenet"): (
        (67.73, 72.82, 69.31, 67.59, 69.36),
        (69.11, 73.67, 69.13, 67.30, 69.80),
    ),
    ("pascal-5i", "VGG-16", 5, "bam"): (
        (67.36, 73.05, 70.61, 64.00, 68.76),
        (67.75, 74.11, 70.99, 63.57, 69.11),
    ),
    ("pascal-5i", "ResNet-50", 1, "baseline"): (
        (65.60, 70.28, 64.12, 60.27, 65.07),
        (67.42, 71.57, 67.99, 61.57, 67.14),
    ),
    ("pascal-5i", "ResNet-50", 1, "pfenet"): (
        (66.61, 72.55, 65.33, 60.91, 66.35),
        (69.27, 73.55, 67.49, 62.30, 68.15),
    ),
    ("pascal-5i", "ResNet-50", 1, "bam"): (
        (68.97, 73.59, 67.55, 61.13, 67.81),
        (69.38, 74.51, 68.80, 63.09, 68.95),
    ),
    ("pascal-5i", "ResNet-50", 5, "baseline"): (
        (69.89, 74.16, 67.87, 65.73, 69.41),
        (70.37, 75.06, 71.08, 69.16, 71.42),
    ),
    ("pascal-5i", "ResNet-50", 5, "pfenet"): (
        (70.93, 75.32, 69.60, 68.96, 71.20),
        (71.82, 74.92, 70.97, 69.58, 71.82),
    ),
    ("pascal-5i", "ResNet-50", 5, "bam"): (
        (70.59, 75.05, 70.79, 67.20, 70.91),
        (72.05, 76.17, 71.97, 68.91, 72.28),
    ),
    ("coco-20i", "VGG-16", 1, "baseline"): (
        (37.56, 37.73, 38.78, 35.66, 37.43),
        (39.32, 39.64, 38.63, 35.45, 38.26),
    ),
    ("coco-20i", "VGG-16", 1, "pfenet"): (
        (41.03, 44.22, 43.74, 38.90, 41.97),
        (42.68, 44.90, 42.60, 38.79, 42.24),
    ),
    ("coco-20i", "VGG-16", 1, "bam"): (
        (38.96, 47.04, 46.41, 41.57, 43.50),
        (40.21, 46.62, 46.23, 41.97, 43.76),
    ),
    ("coco-20i", "VGG-16", 5, "baseline"): (
        (43.07, 49.42, 44.38, 46.38, 45.81),
        (46.48, 50.72, 45.79, 45.63, 47.16),
    ),
    ("coco-20i", "VGG-16", 5, "pfenet"): (
        (48.66, 48.26, 45.49, 51.02, 48.36),
        (49.02, 53.71, 47.59, 47.63, 49.49),
    ),
    ("coco-20i", "VGG-16", 5, "bam"): (
        (47.02, 52.62, 48.59, 49.11, 49.34),
        (45.05, 53.59, 48.35, 49.28, 49.07),
    ),
    ("coco-20i", "ResNet-50", 1, "baseline"): (
        (38.91, 46.07, 42.67, 39.71, 41.84),
        (44.22, 46.38, 42.65, 41.65, 43.72),
    ),
    ("coco-20i", "ResNet-50", 1, "pfenet"): (
        (44.93, 50.32, 44.68, 44.26, 46.05),
        (46.88, 50.86, 47.69, 46.64, 48.02),
    ),
    ("coco-20i", "ResNet-50", 1, "bam"): (
        (43.41, 50.59, 47.49, 43.42, 46.23),
        (46.87, 53.80, 48.43, 44.78, 48.47),
    ),
    ("coco-20i", "ResNet-50", 5, "baseline"): (
        (50.35, 56.78, 49.61, 50.96, 51.93),
        (51.47, 57.48, 50.33, 52.29, 52.89),
    ),
    ("coco-20i", "ResNet-50", 5, "pfenet"): (
        (52.29, 59.34, 51.50, 53.53, 54.17),
        (52.72, 58.14, 52.52, 54.15, 54.38),
    ),
    ("coco-20i", "ResNet-50", 5, "bam"): (
        (49.26, 54.20, 51.63, 49.55, 51.16),
        (52.25, 57.83, 51.97, 53.41, 53.87),
    ),
}
