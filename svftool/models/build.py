"""Build the model that a spec names, load a checkpoint into it, strictly, and find its head."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.choices.models import FORMS, read_model
from svftool.errors import MissingDependencyError, ModelError
from svftool.files.names import real
from svftool.models.load import MisfitError, build_within, load_weights
from svftool.models.pretrained import load_transformers
from svftool.models.propose import proposals
from svftool.models.timm_options import timm_options

if TYPE_CHECKING:
    from collections.abc import Iterator
from svftool.checkpoints import TensorInfo, output_heads

# Find the module of a model that turns features into class scores.


def find_head(model: nn.Module) -> str | None:
    """Return the name of a model's head: a linear layer or a pointwise convolution.

    timm's models say which it is; in others it goes by the names of their layers, as the default
    selection of ``decompose`` does.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    str or None
        Name of the module; None where the model has no head.
    """
    told = _told_by_timm(model)
    if told is not None:
        return told
    infos = [
        TensorInfo(name, parameter.dtype, tuple(parameter.shape), "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    heads = output_heads(infos)
    modules = [info.name.removesuffix(".weight") for info in infos if info.name in heads]
    kept = [name for name in modules if _is_classifier(model.get_submodule(name))]
    return kept[-1] if kept else None


def _told_by_timm(model: nn.Module) -> str | None:
    told = getattr(model, "get_classifier", None)
    if not callable(told):
        return None
    head = told()
    found = [name for name, module in model.named_modules() if module is head]
    return found[0] if found and isinstance(head, nn.Module) and _is_classifier(head) else None


def _is_classifier(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)


def build_model(
    spec: str,
    *,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Build the model that a spec names and give it a checkpoint's weights.

    Parameters
    ----------
    spec : str
        ``auto`` (the checkpoint's ``config.json`` names a transformers or timm model),
        ``timm:NAME``, ``torchvision:NAME``, ``FILE.py:FACTORY`` or
        ``package.module:FACTORY``, where the factory is called without arguments.
    checkpoint : Checkpoint
        The weights.
    dtype : torch.dtype or None
        Of the model's floating tensors; None takes the checkpoint's.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    strict : bool
        Whether model and checkpoint must hold the same tensors. Otherwise a factory's head takes
        as many outputs as the checkpoint's has, and the checkpoint may hold more than the model,
        except one that transformers loads.

    Returns
    -------
    nn.Module
        On the CPU, in evaluation mode.

    Raises
    ------
    ModelError
        If the spec names no model, or model and checkpoint differ: missing, unexpected and
        misshapen tensors are counted, and a model that fits is named where one is found.
    MissingDependencyError
        If the library that the spec names is not installed.
    """
    try:
        return _build(spec, checkpoint, dtype, trust_remote_code, strict).eval()
    except MisfitError as error:
        raise ModelError(f"{error}{_advice(checkpoint)}") from error


def _advice(checkpoint: Checkpoint) -> str:
    """Name models whose tensors are the checkpoint's; nothing where none is found."""
    found = proposals(
        checkpoint,
        {
            "timm": lambda name, weights: _build_timm(name, weights, {}),
            "torchvision": _build_torchvision,
        },
    )
    return f" Its tensors are those of {' and '.join(found)}." if found else ""


def _build(
    spec: str,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    strict: bool,
) -> nn.Module:
    if spec == "auto":
        return _build_auto(checkpoint, dtype, trust_remote_code, strict)
    source, name = read_model(spec)
    if source == "timm":
        model = _build_timm(name, checkpoint, {})
    elif source == "torchvision":
        model = _build_torchvision(name, checkpoint)
    else:
        model = _call_factory(source, name)
        if not strict:
            _follow_head(model, checkpoint)
    return load_weights(model, checkpoint, dtype=dtype, strict=strict)


def is_read_whole(spec: str, checkpoint: Checkpoint) -> bool:
    """Whether a library reads the checkpoint's tensors, and none can be left without a place.

    transformers renames, stacks and leaves out on purpose as it loads; what it has no place for is
    refused then, whatever ``strict`` says.
    """
    return spec == "auto" and "architecture" not in (checkpoint.config or {})


def _build_auto(
    checkpoint: Checkpoint, dtype: torch.dtype | None, trust_remote_code: bool, strict: bool
) -> nn.Module:
    config = checkpoint.config or {}
    if "architecture" in config:
        model = _build_timm(config["architecture"], checkpoint, config)
        return load_weights(model, checkpoint, dtype=dtype, strict=strict)
    if "model_type" in config or "architectures" in config:
        return load_transformers(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    raise ModelError(
        f"{checkpoint.path}: no config.json that names a model, expected one for --model auto. "
        f"Name the model with --model: {FORMS}.{_advice(checkpoint)}"
    )


def _build_timm(name: Any, checkpoint: Checkpoint, config: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingDependencyError("timm", extra="vision", purpose=f"the model {name}") from None
    options = timm_options(name, checkpoint, config)

    def create(**classes: int) -> nn.Module:
        merged = {**options, **classes}
        with _explained(f"timm has no model {name!r} like this"):
            return build_within(
                lambda: timm.create_model(name, pretrained=False, **merged), checkpoint
            )

    return _with_classes(create, checkpoint)


def _build_torchvision(name: str, checkpoint: Checkpoint) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        purpose = f"the model {name}"
        raise MissingDependencyError("torchvision", extra="vision", purpose=purpose) from None
    with _explained(f"torchvision has no model {name!r}"):
        builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if "aux_loss" in inspect.signature(builder).parameters:
        options["aux_loss"] = any("aux_classifier." in tensor for tensor in checkpoint.infos)

    def create(**classes: int) -> nn.Module:
        with _explained(f"torchvision has no model {name!r} like this"):
            return build_within(lambda: builder(**options, **classes), checkpoint)

    return _with_classes(create, checkpoint)


def _with_classes(create: Callable[..., nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """Build a model with as many classes as the checkpoint's head has."""
    model = create()
    head = find_head(model)
    if head is None:
        return model
    info = checkpoint.infos.get(f"{checkpoint.prefix}{head}.weight")
    if info is None:
        no_head = not any(
            tensor.startswith(checkpoint.prefix + head) for tensor in checkpoint.infos
        )
        return create(num_classes=0) if no_head and hasattr(model, "get_classifier") else model
    rows = model.get_submodule(head).get_parameter("weight").shape[0]
    classes = info.shape[0] if info.shape else rows
    return model if classes == rows else create(num_classes=classes)


def _follow_head(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model's head as many outputs as the checkpoint's has."""
    head = find_head(model)
    info = checkpoint.infos.get(f"{checkpoint.prefix}{head}.weight")
    if head is None or info is None or not info.shape:
        return
    module = model.get_submodule(head)
    rows = module.get_parameter("weight").shape[0]
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == rows:
            fresh = parameter.new_empty(info.shape[0], *parameter.shape[1:])
            setattr(module, name, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
    for size in ("out_features", "out_channels"):
        if hasattr(module, size):
            setattr(module, size, info.shape[0])


def _call_factory(source: str, name: str) -> nn.Module:
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        offered = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))[:10])
        raise ModelError(f"{source}: no factory {name!r}, it has {offered}.")
    with _explained(f"{source}:{name} failed"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source}:{name} returned {type(model).__name__}, expected an nn.Module.")
    return model


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise ModelError(f"{path}: no such file, expected Python code with a model factory.")
    key = f"svftool_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path}: not importable, expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Registered, and its folder on the path, so that dataclasses, pickling and imports of
    # neighbouring files work as in a script.
    sys.modules[key] = module
    sys.path.insert(0, str(real(path).parent))
    try:
        with _explained(f"{path} failed to import"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(real(path).parent))
    return module


def _import_module(name: str) -> object:
    with _explained(f"module {name!r} failed to import"):
        return importlib.import_module(name)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises into an error that says where."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{what} ({type(error).__name__}: {text}). Expected {FORMS}.") from error
