"""What transformers calls the tensors of a GGUF file, and how it turns their entries around."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svftool.errors import brief
from svftool.files.gguf import GGUFHeader, gguf_parts, list_length, write_outline

Shape = tuple[int, ...]

_REFUSALS = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, OSError,
)  # fmt: skip
"""What transformers raises for architectures and metadata that it does not know."""

_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


@dataclass(frozen=True)
class Naming:
    """Names of tensors, and what each is made of.

    Attributes
    ----------
    sources : mapping of str to tuple of str
        Names in the file from which a tensor is made, by its own name.
    shapes : mapping of str to tuple of int
        Of the tensors that are not as the file has them.
    note : str
        What the user should know.
    process : callable or None
        transformers' way to turn one tensor of the file; None leaves them as they are.
    keys : mapping of str to str
        transformers' names by those of the file.
    config : mapping or None
        The configuration of transformers' model.
    """

    sources: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    note: str = ""
    process: Callable[..., Any] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def make(self, name: str, values: Callable[[str], Tensor]) -> Tensor:
        """Make a tensor of those of the file.

        Parameters
        ----------
        name : str
            A key of `sources`.
        values : callable
            Gives a tensor of the file by its name there.
        """
        if self.process is None:
            return values(self.sources[name][0])
        made: dict[str, Tensor] = {}
        for source in self.sources[name]:
            result = self.process(
                weights=values(source).numpy(),
                name=source,
                tensor_key_mapping=self.keys,
                parsed_parameters={"tensors": made},
            )
            if result.name in self.keys:
                made[self.keys[result.name]] = torch.from_numpy(np.array(result.weights))
        return made[name]


def naming(path: Path, header: GGUFHeader) -> Naming:
    """Name the tensors of a file as transformers does, or as the file does where it cannot.

    Parameters
    ----------
    path : Path
    header : GGUFHeader
        Of this file.
    """
    own = {one.name: (one.name,) for one in header.entries}
    architecture = header.metadata.get("general.architecture")
    try:
        library = import_module("transformers.modeling_gguf_pytorch_utils")
        import_module("gguf")
    except ImportError:
        why = "transformers and gguf are not installed"
        return Naming(own, note=f"{path.name}: {why}; tensors keep the names of the file")
    try:
        found = _as_transformers(path, header, library)
    except _REFUSALS as error:
        why = f"transformers cannot name the tensors of {architecture!r} ({brief(str(error))})"
        return Naming(own, note=f"{path.name}: {why}; they keep the names of the file")
    if not found.sources:
        return Naming(own, note=f"{path.name}: tensors keep the names of the file")
    return found


def _as_transformers(path: Path, header: GGUFHeader, library: Any) -> Naming:
    config = gguf_config(path, header)
    architecture = header.metadata.get("general.architecture")
    kind = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)
    processor = kind(config=config)
    model = _model(config)
    with _one_name_map():
        keys = library.get_gguf_hf_weights_map(model, processor)
    sources: dict[str, tuple[str, ...]] = {}
    for one in header.entries:
        name = keys.get(one.name) or keys.get(one.name.removesuffix(".weight"))
        if name is not None:
            sources[name] = (*sources.get(name, ()), one.name)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config = {**config, "architectures": [type(model).__name__]}
    return Naming(sources, shapes, "", processor.process, keys, config)


def gguf_config(path: Path, header: GGUFHeader) -> dict[str, Any]:
    """Return the configuration that transformers makes of a file's metadata.

    Parameters
    ----------
    path : Path
        The file, or the first of its parts.
    header : GGUFHeader
        Of this file.
    """
    library = import_module("transformers.modeling_gguf_pytorch_utils")
    with tempfile.TemporaryDirectory() as folder, _no_warnings(library.logger):
        outline = Path(folder) / path.name
        write_outline(gguf_parts(path), outline)
        config: dict[str, Any] = library.load_gguf_checkpoint(str(outline))["config"]
    tokens = list_length(header.metadata.get("tokenizer.ggml.tokens"))
    if "vocab_size" not in config and tokens is not None:
        config["vocab_size"] = tokens
    return config


@contextmanager
def _no_warnings(logger: logging.Logger) -> Iterator[None]:
    """Keep a library's warnings of what the outline lacks off the terminal."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _one_name_map() -> Iterator[None]:
    """Keep the names of an architecture, which are made anew for every module of a model."""
    package: Any = import_module("gguf")
    before = package.get_tensor_name_map
    package.get_tensor_name_map = functools.cache(before)
    try:
        yield
    finally:
        package.get_tensor_name_map = before


def _model(config: Mapping[str, Any]) -> Any:
    """Build the model without any memory for its weights: its names and shapes are wanted."""
    transformers = import_module("transformers")
    stated = dict(config)
    made = transformers.AutoConfig.for_model(stated.pop("model_type"), **stated)
    for name in _MODELS:
        kind = getattr(transformers, name)
        if type(made) in kind._model_mapping:
            with torch.device("meta"):
                return kind.from_config(made)
    raise ValueError(f"no model for {type(made).__name__}")
