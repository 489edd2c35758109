"""Models by name, or yours; their weights as safetensors files."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastadv._extras import require


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Three linear layers of 256 units, for small images such as the digits."""
    pixels = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def conv(shape: Sequence[int], classes: int) -> nn.Module:
    """Three convolutions with batch-norm and one dropout, for images of 16x16 and more."""
    channels, layers = shape[0], []
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


MODELS = {"mlp": mlp, "conv": conv}


def build(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """A new model from images (N, *shape) to logits (N, classes).

    Args:
        name: a key of MODELS, or "module:function" for your own: `function(shape, classes)` returns it.
        shape: (C, H, W) of an image.
        classes: number of classes.

    Raises:
        ValueError: unknown name, or no such module or function.
        TypeError: the function returned something else than an nn.Module.
    """
    factory = MODELS.get(name) or _function(name)
    model = factory(shape, classes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must return an nn.Module, it returned a {type(model).__name__}")
    return model


def _function(path: str):
    module, colon, function = path.partition(":")
    if not colon:
        raise ValueError(f"unknown model {path!r}; there are {', '.join(MODELS)}, or your own as module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"cannot load the model {path!r}: {error}") from error


def find_head(model: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Name and module of the classifier: the module called `name`, else the last nn.Linear.

    Raises:
        ValueError: there is none.
    """
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        raise ValueError(f"the model has no module called {name!r}; there are {', '.join(filter(None, modules))}")
    linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
    if name is None and not linear:
        raise ValueError("the model has no nn.Linear; name its classifier with head=")
    name = linear[-1] if name is None else name
    return name, modules[name]


def save(model: nn.Module, path: str | Path, *, classes: Sequence[str]) -> None:
    """Write the weights and buffers of `model`, and the names of its classes, to a safetensors file."""
    # One entry: safetensors writes several in random order, and equal models would give unequal files.
    metadata = {"classes": json.dumps(list(classes))}
    require("safetensors.torch").save_model(model, str(path), metadata)


def load(model: nn.Module, path: str | Path, *, classes: Sequence[str], head: str | None = None) -> bool:
    """Load a safetensors file into `model`; a head for other classes is left out, as transfer needs it.

    Args:
        model: of the file's architecture; its head may have another number of classes.
        path: the file; one that `save` did not write need not name its classes.
        classes: names of the model's classes; the file's head is kept if its names are equal (or
            missing) and its shapes are.
        head: name of the classifier; None means the last nn.Linear.

    Returns:
        Whether the file's head was kept. If not, the model keeps the head that it had.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, or its tensors do not fit outside the head.
    """
    weights, names = _read(Path(path))
    own = model.state_dict()
    prefix = find_head(model, head)[0] + "."
    in_head = {key for key in own if key.startswith(prefix)}
    keep_head = (names is None or names == list(classes)) and all(
        key in weights and weights[key].shape == own[key].shape for key in in_head
    )
    if not keep_head:
        weights = {key: value for key, value in weights.items() if key not in in_head}
    _check_fit(path, weights, {key: value for key, value in own.items() if keep_head or key not in in_head})
    model.load_state_dict(weights, strict=False)
    return keep_head


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            classes = json.loads(metadata["classes"]) if "classes" in metadata else None
            return {name: file.get_tensor(name) for name in names}, classes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _check_fit(path: str | Path, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    # A file holds tied weights once, under one of their names.
    present = {own[key].data_ptr() for key in weights if key in own}
    problems = [f"{key} is missing" for key in own if key not in weights and own[key].data_ptr() not in present]
    problems += [f"{key} is not in the model" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
