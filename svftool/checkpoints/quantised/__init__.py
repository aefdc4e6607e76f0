"""Quantised storage, read as the numbers that it stands for.

One module a family of formats says which tensors belong together and what they stand for; `view`
shows a checkpoint whose tensors are these numbers. What is not understood stays as it is: codes.
"""

from svftool.checkpoints.quantised.view import QuantisedCheckpoint, understood

__all__ = ["QuantisedCheckpoint", "understood"]
