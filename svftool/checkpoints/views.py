"""How a tensor of any rank is seen as one matrix, or as a stack of matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from svftool.errors import counted

View = Literal["matrix", "batch"]


def matrix_shape(shape: Sequence[int], view: View = "matrix") -> tuple[int, ...]:
    """Return the shape that a tensor of `shape` has under `view`.

    Parameters
    ----------
    shape : sequence of int
        Shape as in the file.
    view : {"matrix", "batch"}
        ``matrix`` joins all dimensions but the first; ``batch`` takes a 3-D tensor as one matrix
        for each index of its first dimension.

    Returns
    -------
    tuple of int
        ``(m, n)`` for ``matrix``, ``(E, m, n)`` for ``batch``.

    Raises
    ------
    ValueError
        If the shape has fewer than two dimensions, or is not 3-D for ``batch``.

    Examples
    --------
    >>> matrix_shape((64, 3, 7, 7))
    (64, 147)
    >>> matrix_shape((8, 16, 32), "batch")
    (8, 16, 32)
    """
    if view == "batch":
        if len(shape) != 3:
            raise ValueError(
                f"shape {tuple(shape)} has {counted(len(shape), 'dimensions')}, "
                "view 'batch' needs 3"
            )
        return tuple(shape)
    if len(shape) < 2:
        raise ValueError(
            f"shape {tuple(shape)} has {counted(len(shape), 'dimensions')}, "
            "a matrix needs 2 or more"
        )
    return shape[0], math.prod(shape[1:])


def to_matrix(tensor: Tensor, view: View = "matrix") -> Tensor:
    """Return `tensor` under `view`, sharing memory where its strides allow it.

    Parameters
    ----------
    tensor : Tensor
        Two or more dimensions; exactly three for ``batch``.
    view : {"matrix", "batch"}
        See `matrix_shape`.

    Returns
    -------
    (m, n) or (E, m, n) Tensor
        Same dtype and device.
    """
    return tensor.reshape(matrix_shape(tensor.shape, view))


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `matrix` in the shape of the file: the inverse of `to_matrix` for either view.

    Parameters
    ----------
    matrix : (m, n) or (E, m, n) Tensor
        As given out by `to_matrix`, or rebuilt from factors.
    shape : sequence of int
        Shape of the tensor in the file.
    """
    return matrix.reshape(tuple(shape))
