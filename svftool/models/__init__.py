"""A model spec and a checkpoint -> a live model with exactly the checkpoint's weights."""

from svftool.models.build import build_model, find_head, is_read_whole
from svftool.models.load import keep_vectors, load_weights
from svftool.models.preprocessing import (
    DEFAULT_PREPROCESSING,
    Preprocessing,
    find_preprocessing,
    normalise,
)

__all__ = [
    "DEFAULT_PREPROCESSING",
    "Preprocessing",
    "build_model",
    "find_head",
    "find_preprocessing",
    "is_read_whole",
    "keep_vectors",
    "load_weights",
    "normalise",
]
