"""Specs that name the networks of few-shot segmentation by their former place still work."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("svftool.few_shot.paper_networks"), name)
