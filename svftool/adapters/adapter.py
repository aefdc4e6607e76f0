"""What every adapter is, whatever its layout: changes of named tensors, formed one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from svftool.adapters.low_rank import LowRank
from svftool.adapters.peft_parameters import AdaptedParameter, WrappedModule
from svftool.checkpoints.base import Closing, TensorInfo

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Adapter(Closing):
    """An adapter open for reading.

    Attributes
    ----------
    path : Path
    layout : str
        ``peft``, ``kohya``, ``comfy`` or ``diffusers``.
    layers : mapping of str to object
        What is known of each changed weight, by its name.
    biases : mapping of str to (str, float)
        Biases that are added to: the adapter's tensor and its factor.
    whole : mapping of str to str
        Tensors that are stored whole, by the base's name.
    listed : frozenset of str
        Those of `whole` that the adapter announces, so that the base need not have them.
    rows : mapping of str to object
        Embeddings of which some rows are replaced, by the weight's name.
    wrapped : tuple of WrappedModule
        Modules of which parameters are adapted.
    unused : tuple of str
        Tensors of the adapter that are understood in no way.
    homeless : tuple of str
        Modules that the base, which `against` was given, does not have.
    base : str or None
        The base model that the adapter names.
    notes : tuple of str
        Sentences for the user.
    metadata : mapping of str to str
        Of the weight file.
    moved_base : bool
        Whether it belongs to a base that its initialisation changed.
    """

    path: Path
    layout: str
    layers: Mapping[str, Any] = _NOTHING
    biases: Mapping[str, tuple[str, float]] = _NOTHING
    whole: Mapping[str, str] = _NOTHING
    listed: frozenset[str] = frozenset()
    rows: Mapping[str, Any] = _NOTHING
    wrapped: tuple[WrappedModule, ...] = ()
    unused: tuple[str, ...] = ()
    homeless: tuple[str, ...] = ()
    base: str | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = _NOTHING

    @property
    def moved_base(self) -> bool:
        """Whether the adapter belongs to a base that its initialisation changed."""
        return False

    def against(
        self, infos: Mapping[str, TensorInfo], config: Mapping[str, Any], path: str
    ) -> Adapter:
        """Return the same adapter with its names resolved against those of a base.

        Parameters
        ----------
        infos : mapping of str to TensorInfo
            The base's tensors.
        config : mapping
            Its ``config.json``.
        path : str
            What the user called it.
        """
        return self

    @property
    @abstractmethod
    def keys(self) -> Collection[str]:
        """All tensors of the adapter's file."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of the adapter's file."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor of the adapter's file."""

    @abstractmethod
    def sides(self, name: str) -> tuple[int, int]:
        """Return the outputs and inputs of a layer, a key of `layers`, as its adapter has them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's change, as the adapter alone tells it."""

    @abstractmethod
    def bytes_of(self, name: str) -> int:
        """Return the bytes of everything that the file holds for a tensor or module."""

    @abstractmethod
    def check(self, name: str, shape: tuple[int, ...]) -> bool:
        """Hold the adapter's shapes against a tensor of the base, before any is read.

        Returns
        -------
        bool
            Whether the product of the adapter's matrices is the change's transpose.

        Raises
        ------
        CheckpointError
            If the adapter's tensors make no change of that shape.
        """

    @abstractmethod
    def change(self, name: str, weight: Tensor) -> Tensor:
        """Form the change of one weight, before any rounding.

        Parameters
        ----------
        name : str
            A key of `layers` or `biases`.
        weight : Tensor
            The base's tensor; gives the shape, and the norms that DoRA needs.

        Returns
        -------
        Tensor
            float64, of the weight's shape.
        """

    @abstractmethod
    def low_rank(self, name: str, shape: tuple[int, ...] | None = None) -> LowRank | None:
        """Return a layer's two matrices as they are stored; None where its change is no product.

        Parameters
        ----------
        name : str
            A key of `layers`.
        shape : tuple of int, optional
            Of the base's weight, where it is known.
        """

    def tokens(self, name: str, weight: Tensor) -> Tensor:
        """Return an embedding with its trained rows in place."""
        raise KeyError(name)

    def place(
        self, shapes: Mapping[str, tuple[int, ...]], model_type: str | None
    ) -> dict[str, AdaptedParameter]:
        """Tell which parameter of a wrapped module each of its pairs belongs to."""
        return {}

    def change_of(self, parameter: AdaptedParameter, expert: int = 0) -> Tensor:
        """Form the change of one matrix of an adapted parameter."""
        raise KeyError(parameter.name)
