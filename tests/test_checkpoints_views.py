"""Views of tensors as matrices, and the names and sizes of dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svftool.checkpoints import dtype_name, dtype_named, from_matrix, matrix_shape, to_matrix
from svftool.checkpoints.dtypes import (
    CODE_OF_DTYPE,
    DECOMPOSABLE,
    FLOAT8,
    byte_size,
    stored_shape,
    torch_shape,
)
from svftool.errors import counted

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@given(SHAPES)
def test_the_matrix_view_can_be_undone(shape: list[int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    matrix = to_matrix(tensor)
    assert matrix.shape == (shape[0], tensor.numel() // shape[0]) == matrix_shape(shape)
    assert torch.equal(from_matrix(matrix, shape), tensor)


@given(st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_the_batch_view_keeps_each_matrix(shape: list[int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    stack = to_matrix(tensor, "batch")
    assert stack.shape == tuple(shape) == matrix_shape(shape, "batch")
    assert torch.equal(from_matrix(stack, shape), tensor)


def test_rows_of_the_matrix_are_output_channels() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    assert torch.equal(to_matrix(kernel)[2], kernel[2].flatten())


def test_a_strided_tensor_has_a_view_too() -> None:
    kernel = torch.randn(2, 3, 4).permute(2, 0, 1)
    assert torch.equal(from_matrix(to_matrix(kernel), kernel.shape), kernel)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_too_few_dimensions_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"has {counted(len(shape), 'dimensions')}, a matrix needs 2"
    ):
        matrix_shape(shape)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
def test_the_batch_view_needs_three_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="view 'batch' needs 3"):
        matrix_shape(shape, "batch")


@pytest.mark.parametrize("dtype", list(CODE_OF_DTYPE), ids=dtype_name)
def test_dtype_names_can_be_undone(dtype: torch.dtype) -> None:
    assert dtype_named(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float31", "nn", "Tensor"])
def test_other_attributes_of_torch_are_no_dtypes(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a dtype"):
        dtype_named(name)


def test_only_dtypes_that_upcast_exactly_are_decomposed() -> None:
    assert {torch.float64, torch.float32, torch.float16, torch.bfloat16} < DECOMPOSABLE
    assert {torch.float8_e4m3fn, torch.float8_e5m2} < FLOAT8 < DECOMPOSABLE
    for dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.complex64, torch.int8):
        assert dtype not in DECOMPOSABLE
    for dtype in DECOMPOSABLE:
        torch.ones(2).to(dtype).to(torch.float64)


def test_packed_values_are_counted_as_the_format_does() -> None:
    dtype = torch.float4_e2m1fn_x2
    assert stored_shape(dtype, (4, 3)) == (4, 6)
    assert torch_shape("F4", (4, 6)) == (4, 3)
    assert byte_size(dtype, (4, 3)) == 12
    with pytest.raises(ValueError, match="does not fill whole bytes"):
        torch_shape("F4", (4, 5))
