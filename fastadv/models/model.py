"""A network together with what is needed to use it and to build it again."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fastadv._extras import require
from fastadv.data.trained import TrainedOn
from fastadv.models.foreign import check_shape, check_timm, check_transformers
from fastadv.models.networks import OWN
from fastadv.nn import Normalized
from fastadv.preprocessing import Preprocessing


@dataclass
class Model:
    """A network and what it takes and says.

    Attributes:
        network: from normalised images (N, C, H, W) to logits (N, classes), or to an output that holds `.logits`.
        preprocessing: what it takes; None: images in [0, 1] of any size that it can.
        architecture: for `construct`; only what JSON knows.
        classes: name of each logit.
        pretrained: whether the backbone's weights were learnt on other data before.
        trained_on: what is known of the pictures that its weights were learnt on, one training after the other.
    """

    network: nn.Module
    preprocessing: Preprocessing | None
    architecture: dict
    classes: tuple[str, ...]
    pretrained: bool
    trained_on: tuple[TrainedOn, ...] = ()

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse images (C, H, W) other than the network was made for.

        Raises:
            ValueError: it takes others.
        """
        made = self.preprocessing.shape if self.preprocessing else self.architecture.get("shape")
        fixed = 3 if self.preprocessing or self.architecture.get("name") == "mlp" else 1  # others may take any size
        if made and tuple(made)[:fixed] != tuple(shape)[:fixed]:
            raise ValueError(f"the model takes images of the shape {tuple(made)}, these have {tuple(shape)}")

    @cached_property
    def on_pixels(self) -> nn.Module:
        """The network for images in [0, 1]: it normalises them first. The same parameters."""
        given = self.preprocessing
        if given is None or (not any(given.mean) and all(std == 1 for std in given.std)):
            return self.network
        return Normalized(self.network, given.mean, given.std)

    @property
    def pixels(self) -> nn.Module:
        """What `on_pixels` was called before."""
        warnings.warn("Model.pixels is now Model.on_pixels", FutureWarning, stacklevel=2)
        return self.on_pixels


def construct(architecture: dict, count: int, *, trust_code: bool = False) -> nn.Module:
    """A new network with `count` logits and random weights. Nothing is downloaded.

    The architecture may come from a file that others made: it chooses among networks and their sizes, and leads to no
    code, unless `trust_code` lets it import a module.

    Args:
        architecture: {"kind": "own", "name", "shape", "options"}, {"kind": "function", "path": "module:function",
            "shape"}, {"kind": "timm", "name", "options"} or {"kind": "hf", "config"}.
        count: number of classes.
        trust_code: whether the kind "function" may import its module and call its function.

    Raises:
        ImportError: its package is not installed.
        TypeError: the function returned something else than an nn.Module.
        ValueError: unknown kind, name, option or function, or one that leads to code.
    """
    kind = architecture.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of architecture {kind!r}; there are {', '.join(_KINDS)}")
    check_trust(architecture, trust_code)
    return _KINDS[kind](architecture, count)


def check_trust(architecture: dict, trust_code: bool) -> None:
    """Refuse an architecture that is a function of a module, unless `trust_code`.

    Raises:
        ValueError: it is one.
    """
    if architecture.get("kind") == "function" and not trust_code:
        raise ValueError(
            f"the model is built by the function {architecture.get('path')!r}, and to load it is to run that code. If "
            "you trust whoever made the file, and the module that is found under this name: --trust-code, in Python "
            "trust_code=True"
        )


def function_at(path: str) -> Callable:
    """The function called "module:function".

    Raises:
        ValueError: there is none.
    """
    module, _, function = path.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"cannot load the model {path!r}: {error}") from error


def _own(architecture, count):
    if architecture["name"] not in OWN:
        raise ValueError(f"unknown network {architecture['name']!r}; there are {', '.join(OWN)}")
    check_shape(architecture["shape"])
    return OWN[architecture["name"]](architecture["shape"], count, **architecture["options"])


def _function(architecture, count):
    path, shape = architecture["path"], architecture["shape"]
    check_shape(shape)
    network = function_at(path)(tuple(shape), count)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{path} must return an nn.Module, it returned a {type(network).__name__}")
    return network


def _timm(architecture, count):
    name, options = architecture["name"], architecture["options"]
    check_timm(name, options)
    try:
        return require("timm", "timm").create_model(name, pretrained=False, num_classes=count, **options)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {name!r} with the options {options}: {error}") from error


def _hf(architecture, count):
    check_transformers(architecture["config"])
    transformers = require("transformers")
    config = transformers.AutoConfig.for_model(**architecture["config"])
    if config.num_labels != count:
        config.num_labels = count
    return transformers.AutoModelForImageClassification.from_config(config).float()


_KINDS = {"own": _own, "function": _function, "timm": _timm, "hf": _hf}
