"""Semantic segmentation: images and maps of their pixels' classes, in two folders."""

from svftool.tasks.segmentation.task import Segmentation

__all__ = ["Segmentation"]
