"""A model: a network with its preprocessing, its classes and its architecture, from which it can be built again."""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.data.trained import TrainedOn
from fastadv.models.foreign import check_shape, check_timm, check_transformers
from fastadv.models.networks import OWN
from fastadv.names import instead
from fastadv.nn import Normalized
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits
from fastadv.ops.generator import seeded
from fastadv.preprocessing import Preprocessing

Architecture = dict[str, Any]  # JSON can hold its values; `construct` lists the kinds


@dataclass
class Model:
    """A network, the images that it takes, and the classes that it predicts.

    Attributes:
        network: from normalised images (N, C, H, W) to logits (N, classes), or to an output that has `.logits`.
        preprocessing: how a picture becomes the network's input; None where the network takes images in [0, 1].
        architecture: what `construct` needs to build the network.
        classes: a name for each logit.
        pretrained: whether the backbone's weights were trained on other data before.
        trained_on: the records of the known trainings of the weights, in their order.
    """

    network: nn.Module
    preprocessing: Preprocessing | None
    architecture: Architecture
    classes: tuple[str, ...]
    pretrained: bool
    trained_on: tuple[TrainedOn, ...] = ()

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse images of a shape that the network was not made for.

        Args:
            shape: (C, H, W) of an image.

        Raises:
            ValueError: the network takes images of another shape.
        """
        made = self.preprocessing.shape if self.preprocessing else self.architecture.get("shape")
        fixed = 3 if self.preprocessing or self.architecture.get("name") == "mlp" else 1  # others may take any size
        if made and tuple(made)[:fixed] != tuple(shape)[:fixed]:
            raise ValueError(f"the model takes images of the shape {tuple(made)}, these have {tuple(shape)}")

    @property
    def on_pixels(self) -> nn.Module:
        """The network for images in [0, 1]: it normalises them first. It shares its parameters with `network`.

        It is one and the same module until `network` or `preprocessing` is replaced.
        """
        given = self.preprocessing
        if given is None or (not any(given.mean) and all(std == 1 for std in given.std)):
            return self.network
        made: tuple[nn.Module, Preprocessing, Normalized] | None = vars(self).get("_on_pixels")
        if made is None or made[0] is not self.network or made[1] != given:
            made = self.network, given, Normalized(self.network, given.mean, given.std)
            self._on_pixels = made
        return made[2]

    @property
    def pixels(self) -> nn.Module:
        """The old name of `on_pixels`."""
        warn("Model.pixels is now Model.on_pixels", FutureWarning)
        return self.on_pixels


def construct(architecture: Architecture, count: int, *, trust_code: bool = False) -> nn.Module:
    """A new network with `count` logits and random weights. Nothing is downloaded.

    The architecture may come from a file of unknown origin. It chooses among known networks and their sizes, and cannot
    lead to other code unless `trust_code` allows it.

    Args:
        architecture: one of {"kind": "own", "name", "shape", "options"}, {"kind": "function", "path":
            "module:function", "shape"}, {"kind": "timm", "name", "options"} and {"kind": "hf", "config"}.
        count: the number of classes.
        trust_code: whether the kind "function" may import its module and call its function.

    Returns:
        The network, on the CPU.

    Raises:
        ImportError: the package of the kind is not installed.
        TypeError: the function returned something other than an nn.Module, or its output has no logits.
        ValueError: the kind, a name, an option or the function is unknown, or leads to other code; or the function's
            network has not one logit for each class, is not of float32, or computes with tensors that its state_dict()
            lacks.
    """
    kind = architecture.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of architecture {kind!r}{instead(kind, _KINDS)}")
    check_trust(architecture, trust_code)
    return _KINDS[kind](architecture, count)


def check_trust(architecture: Architecture, trust_code: bool) -> None:
    """Refuse an architecture of the kind "function", unless `trust_code`.

    Raises:
        ValueError: the architecture is of that kind.
    """
    if architecture.get("kind") == "function" and not trust_code:
        raise ValueError(
            f"the model is built by the function {architecture.get('path')!r}, and to load it is to run that code. If "
            "you trust whoever made the file, and the module of this name on your machine: --trust-code, in Python "
            "trust_code=True"
        )


def function_at(path: str) -> Callable[..., Any]:
    """The function that `path`, "module:function", names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"cannot load the model {path!r}: {error}") from error


def _own(architecture: Architecture, count: int) -> nn.Module:
    if architecture["name"] not in OWN:
        raise ValueError(f"unknown network {architecture['name']!r}{instead(architecture['name'], OWN)}")
    check_shape(architecture["shape"])
    return OWN[architecture["name"]](architecture["shape"], count, **architecture["options"])


def _function(architecture: Architecture, count: int) -> nn.Module:
    path, shape = architecture["path"], tuple(architecture["shape"])
    check_shape(shape)
    network = function_at(path)(shape, count)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{path} must return an nn.Module, it returned a {type(network).__name__}")
    try:
        logits = logits_of_noise(network, shape)
    except RuntimeError as error:
        _check_float32(path, network, error)
        raise
    if logits.shape[1] != count:
        raise ValueError(
            f"the network of {path} has {logits.shape[1]} logits for {count} classes: give it one for each class"
        )
    with seeded((torch.initial_seed() + 1) % 2**63):  # another seed, that what is not in state_dict() differs
        again = function_at(path)(shape, count)
    if _memory(network) & _memory(again):  # a training of one would go on in the other, as with a backbone in a global
        network, again = copy.deepcopy(network), copy.deepcopy(again)
    again.load_state_dict(network.state_dict())
    if not torch.allclose(logits, logits_of_noise(again, shape), equal_nan=True):
        raise ValueError(
            f"two networks of {path} with the same state_dict() have different logits, so a saved model would not be "
            "the trained one. A layer or tensor is not registered, such as one in a plain list, and would not train "
            "either: use nn.ModuleList, nn.Parameter or register_buffer"
        )
    if lost := _lost_buffers(again, shape):
        warn(
            f"training changes {', '.join(lost)} of the network of {path}, and its state_dict() lacks this: a saved "
            "model would have the values from the start, not the trained ones. Register such a buffer with "
            "persistent=True"
        )
    return network


def _memory(network: nn.Module) -> set[int]:
    """Where the network's parameters and buffers begin in memory, if they have some."""
    tensors = (t for t in (*network.parameters(), *network.buffers()) if not is_lazy(t) and t.layout == torch.strided)
    return {t.data_ptr() for t in tensors} - {0}  # 0: an empty tensor


def _check_float32(path: str, network: nn.Module, error: RuntimeError) -> None:
    """Refuse a network that fails on float32 images, and has parameters or buffers of another precision."""
    tensors = (*network.parameters(), *network.buffers())
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32}
    if dtypes:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"the network of {path} has tensors of {names}, and fails on images of float32: return a float32 network, "
            f"as .float() makes it ({error})"
        ) from error


def _lost_buffers(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The buffers that the train mode changes and state_dict() lacks. The network stays as it is.

    Two batches tell them from what is computed in the first one and stays, such as a table of positions.
    """
    if not _transient(network):
        return []
    with seeded(0), torch.no_grad(), frozen(network):
        network.train()
        try:
            network(torch.rand(2, *shape))
            first = {name: buffer.clone() for name, buffer in _transient(network).items()}
            network(torch.rand(2, *shape))
        except Exception:  # a network that trains otherwise, such as with its targets, is not judged
            return []
        return [name for name, now in _transient(network).items() if name in first and not _equal(first[name], now)]


def _transient(network: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point buffers that are registered with persistent=False."""
    return {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in getattr(module, "_non_persistent_buffers_set", ()) and buffer.is_floating_point()
    }


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def logits_of_noise(network: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The logits (1, classes) of an image of noise of the shape (C, H, W), always the same, in eval mode."""
    with seeded(0), torch.no_grad(), frozen(network):
        return find_logits(network(torch.rand(1, *shape)), 1)


def _timm(architecture: Architecture, count: int) -> nn.Module:
    name, options = architecture["name"], architecture["options"]
    check_timm(name, options)
    timm = require("timm", "timm")
    with options_of_timm(name, options):
        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=count, **options)
    return made


@contextmanager
def options_of_timm(name: str, options: dict[str, Any], advice: str = "") -> Iterator[None]:
    """Turn the errors of a model of timm's that its options do not fit, of whatever kind, into one.

    Args:
        name: of the model.
        options: of timm.create_model.
        advice: the end of the error, where there are options.

    Raises:
        ValueError: such an error.
    """
    try:
        yield
    except OSError:  # a missing file or network, which is no matter of options
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        what = str(error) or f"it raises {type(error).__name__}"
        raise ValueError(
            f"timm cannot build {name!r} with the options {options}: {what}{advice if options else ''}"
        ) from error


def _hf(architecture: Architecture, count: int) -> nn.Module:
    check_transformers(architecture["config"])
    transformers = require("transformers")
    config = transformers.AutoConfig.for_model(**architecture["config"])
    if config.num_labels != count:
        config.num_labels = count
    made: nn.Module = transformers.AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    return made


_KINDS: dict[str, Callable[[Architecture, int], nn.Module]] = {
    "own": _own,
    "function": _function,
    "timm": _timm,
    "hf": _hf,
}
