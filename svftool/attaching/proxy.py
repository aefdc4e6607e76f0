"""What stands in for a parameter while its module runs: a tensor that the layer's operation meets.

A module keeps its class, its forward and its frozen parameter. For the time of a forward pass its
attribute is shadowed by a `Proxy`. When an operation receives it, ``F.linear`` and its like run
in factored or residual form; every other operation gets the composed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.attaching.functions import SplitLayer, region
from svftool.attaching.fusion import affine_in, mark_rectified
from svftool.attaching.spectral_step import run_change
from svftool.attaching.split_maps import (
    ConvMap,
    EmbeddingMap,
    LinearMap,
    SplitMap,
    TransposedConvMap,
)
from svftool.attaching.weight import AttachedWeight, choose_way
from svftool.errors import ModelError

Plain = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Proxy(Tensor):
    """A live weight whose singular values are trained.

    `next_norm` and `next_relu` are what follows the layer and is to be fused in, `used` whether an
    operation has met the proxy.

    Metadata (shape, dtype, device) is the base weight's. Created for one forward pass, so that the
    composed weight is formed at most once in it.
    """

    attached: AttachedWeight
    base: Tensor
    next_norm: nn.Module | None
    next_relu: nn.Module | None
    used: bool
    region: object
    _composed: Tensor | None

    @staticmethod
    def of(attached: AttachedWeight, base: Tensor, inside: object = None) -> Proxy:
        """Make the proxy of `base`, a frozen parameter, in a checkpointed region or in none."""
        self = base.detach().as_subclass(Proxy)
        self.attached, self.base = attached, base.detach()
        self.next_norm = self.next_relu = self._composed = None
        self.used, self.region = False, inside
        return self

    def meet(self) -> object:
        """Note that an operation met the proxy; return the checkpointed region it is in.

        Raises
        ------
        ModelError
            If the region would find the base's weight when it is computed again, because no module
            that the weight lies in is called inside it.
        """
        self.used = True
        here = region()
        if here is not None and here is not self.region and here != self.region:
            raise ModelError(
                f"{self.attached.layers()[0][0].name}: a checkpointed function reads the weight of "
                "a module that it does not call, expected a call of the module. Checkpoint the "
                "module, or the one that holds it."
            )
        return here

    def composed(self) -> Tensor:
        """Return the dense weight, differentiable in the singular values."""
        self.meet()
        if not torch.is_grad_enabled():
            # Nothing to keep: a later operation of the pass may need the gradient.
            return self.attached.compose(self.base) if self._composed is None else self._composed
        if self._composed is None:
            self._composed = self.attached.compose(self.base)
        return self._composed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Split the operations that can be; hand the composed weight to all others."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            handler = _HANDLERS.get(func)
            result = handler(*args, **kwargs) if handler else NotImplemented
            if result is NotImplemented:
                result = func(*_dense(args), **_dense(kwargs))
        return result


_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps",
        "is_nested", "is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "nbytes", "ndim",
        "requires_grad", "shape",
    )
) | {
    Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.numel, Tensor.size, Tensor.stride, torch.is_floating_point,
    torch.numel,
}  # fmt: skip


def _dense(value: Any) -> Any:
    if isinstance(value, Proxy):
        return value.composed()
    if isinstance(value, (list, tuple)):
        items = [_dense(item) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


def _run(
    x: Tensor,
    weight: Proxy,
    bias: Tensor | None,
    plain: Plain,
    *,
    split: SplitMap | None,
    positions: int = 0,
) -> Tensor:
    """Run a layer the cheapest way, with the norm and ReLU behind it fused in where there are."""
    if weight.meet() is not None:
        # What follows may lie outside the region, and nothing is fused when it is computed again.
        weight.next_norm = weight.next_relu = None
    way = "composed" if split is None else choose_way(weight.attached, positions)
    layer = weight.attached.single
    dtype = _compute_dtype(x, weight.base)
    affine = affine_in(weight.next_norm, dtype)
    if way == "composed" or layer is None or split is None:
        if affine is None:
            return plain(x, weight.composed(), bias)
        outer = 0 if split is None else split.outer
        return affine.mark(plain(x, affine.rows(weight.composed(), outer), affine.bias(bias)))
    dense = weight.base.to(dtype) if way == "residual" else None
    x = x.to(dtype) if x.is_floating_point() else x
    bias = None if bias is None else bias.to(dtype)
    if not layer.plain:
        weight.next_norm = weight.next_relu = None
        with torch.autocast(x.device.type, enabled=False):
            return run_change(x, layer, dense, bias, split, dtype=dtype, positions=positions)
    right, left = split.kernels(layer.U.to(dtype), layer.Vh.to(dtype))
    s = layer.delta() if way == "residual" else layer.values()
    rows = None
    if affine is not None:
        rows, bias = affine.scale, affine.bias(bias)
    # Only where nothing is left to do between the layer and the ReLU.
    relu = weight.next_relu if affine is not None or weight.next_norm is None else None
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = SplitLayer.apply(x, s, right, left, dense, bias, split, rows, relu is not None)
    y = y if affine is None else affine.mark(y)
    return y if relu is None else mark_rectified(y, relu)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:  # noqa: A002
    if not isinstance(weight, Proxy) or isinstance(input, Proxy):
        return NotImplemented
    count = input.numel() // max(1, input.shape[-1])
    return _run(input, weight, bias, F.linear, split=LinearMap(), positions=count)


def _matmul(input: Tensor, other: Any) -> Any:  # noqa: A002
    if not isinstance(other, Proxy) or isinstance(input, Proxy) or other.ndim != 2:
        return NotImplemented
    other.next_norm = other.next_relu = None  # its rows are no output channels
    count = input.numel() // max(1, input.shape[-1])
    split = LinearMap(swapped=True)
    return _run(input, other, None, split.whole, split=split, positions=count)


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:  # noqa: A002
    plain = beta == 1 and alpha == 1 and input.ndim == 1
    if not plain or not isinstance(mat2, Proxy) or isinstance(mat1, Proxy):
        return NotImplemented
    mat2.next_norm = mat2.next_relu = None
    split = LinearMap(swapped=True)
    return _run(mat1, mat2, input, split.whole, split=split, positions=mat1.shape[0])


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or not isinstance(weight, Proxy):
        return NotImplemented
    if sparse:
        return F.embedding(input, weight.composed(), padding_idx)

    def plain(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, dense, padding_idx)

    y = _run(input, weight, None, plain, split=EmbeddingMap(), positions=input.numel())
    if padding_idx is None:
        return y
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding.unsqueeze(-1), y.detach(), y)


def _conv(
    input: Tensor,  # noqa: A002
    weight: Any,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(weight, Proxy):
        return NotImplemented
    dims = weight.ndim - 2
    x, steps, spread = input, _tuple(stride, dims), _tuple(dilation, dims)
    if isinstance(padding, str):
        x, padding = _pad_same(x, weight.shape[2:], spread, padding)
    batched = x.ndim == dims + 2
    if not batched:
        weight.next_norm = weight.next_relu = None  # a view of the output would not carry the mark
    x = x if batched else x.unsqueeze(0)
    map_ = ConvMap(steps, _tuple(padding, dims), spread, groups)
    split = map_ if groups == 1 else None
    count = x.shape[0] * _outputs(x.shape[2:], weight.shape[2:], map_)
    y = _run(x, weight, bias, map_.whole, split=split, positions=count)
    return y if batched else y.squeeze(0)


def _tuple(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _pad_same(
    x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], padding: str
) -> tuple[Tensor, tuple[int, ...]]:
    totals = [
        d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, kernel, strict=True)
    ]
    if all(total % 2 == 0 for total in totals):
        return x, tuple(total // 2 for total in totals)
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides), (0,) * len(totals)


def _outputs(size: tuple[int, ...], kernel: tuple[int, ...], split: ConvMap) -> int:
    count = 1
    for extent, width, stride, pad, dilation in zip(
        size, kernel, split.stride, split.padding, split.dilation, strict=True
    ):
        count *= (extent + 2 * pad - dilation * (width - 1) - 1) // stride + 1
    return count


def _conv_transpose(
    input: Tensor,  # noqa: A002
    weight: Any,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Any:
    dims = weight.ndim - 2
    if groups != 1 or not isinstance(weight, Proxy) or input.ndim != dims + 2:
        return NotImplemented
    split = TransposedConvMap(
        _tuple(stride, dims),
        _tuple(padding, dims),
        _tuple(output_padding, dims),
        _tuple(dilation, dims),
    )
    count = input.numel() // max(1, input.shape[1])
    return _run(input, weight, bias, split.whole, split=split, positions=count)


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    cast(Any, Tensor).__matmul__: _matmul,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
}
