"""Models in safetensors files, which say how to build the model again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadv._extras import require
from fastadv.data.trained import TrainedOn
from fastadv.files import check_format, write_atomically
from fastadv.models.added import add_again, added_facts
from fastadv.models.model import Model, construct
from fastadv.models.structure import find_heads, new_head, not_named, plain, warn_of_order, with_factors
from fastadv.preprocessing import Preprocessing

if TYPE_CHECKING:
    from safetensors import safe_open

FORMAT = 2  # for a network with added modules, which format 1 cannot name; other networks are still written in format 1
Facts = dict[str, Any]  # `save` writes them beside the tensors, as JSON

_KEY = "fastadv"
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


def save(model: Model, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model to a safetensors file, with everything that `load` needs.

    The file has the weights, buffers, class names, preprocessing, architecture, added modules and the records of the
    training pictures. Tied weights are written once, under their first name. An older file is replaced only when the
    new one is complete.

    Args:
        model: the model.
        path: the file.
        dtype: the dtype in which matrices and kernels are stored: torch.float16, torch.bfloat16, or None for their own.
            Vectors (norms, biases, running statistics) are few and sensitive, and keep their dtype. `load` makes
            everything float32 again.

    Raises:
        OSError: the file cannot be written.
        ValueError: another dtype; a weight that float16 cannot hold; factors of peft that are not merged; or a state
            that has more than tensors.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or None, got {dtype}")
    network = plain(model.network)
    check_storable(network)
    added = added_facts(network)
    facts = {
        "format": FORMAT if added else 1,
        "classes": list(model.classes),
        "preprocessing": model.preprocessing and model.preprocessing.to_json(),
        "architecture": model.architecture,
        "trained_on": [record.to_json() for record in model.trained_on],
    }
    if added:
        facts["added"] = added
    tensors = {name: _stored(name, value, dtype) for name, value in _untied(network.state_dict()).items()}
    # One entry: safetensors writes several in random order, and equal models would give unequal files.
    write_atomically(path, require("safetensors.torch").save(tensors, {_KEY: json.dumps(facts)}))


def check_storable(network: nn.Module) -> None:
    """Refuse a network whose state `save` cannot write.

    Raises:
        ValueError: it has factors of peft; or its state has what is no tensor, as `get_extra_state` may return.
    """
    check_no_factors(network)
    others = [name for name, value in network.state_dict().items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"the state of the model has {others[0]}, which is no tensor, and a checkpoint keeps tensors")


def check_no_factors(network: nn.Module) -> None:
    """Refuse a network with factors of peft: its weights have other names with them, and no plain network loads these.

    Raises:
        ValueError: it has such factors, as inside `fastadv.training.trainable`.
    """
    name = with_factors(network)
    if name is not None:
        raise ValueError(
            f"the network has factors of peft{name and f', such as in {name}'}, and a file of its weights would load "
            "into no plain network: write it when they are merged, as after trainable() or merge_and_unload()"
        )


def load(path: str | Path, *, classes: Sequence[str] | None = None, trust_code: bool = False) -> Model:
    """The model in a file that `save` wrote, on the CPU. The file runs no code, unless `trust_code`.

    Args:
        path: the file.
        classes: the names of the model's classes; None means the file's. If they differ from the file's, the model gets
            a new, untrained head.
        trust_code: whether a file whose architecture is a "module:function" may import that module and call the
            function. Only for files whose origin you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package of the architecture is not installed.
        ValueError: the file is no safetensors file, or `save` did not write it; its tensors do not fit its
            architecture; or its architecture is a "module:function", without `trust_code`.
    """
    facts = read_facts(path)
    if facts is None:
        raise ValueError(f"{path} does not say how its model is built: load its weights into a model of your own")
    own = tuple(facts["classes"])
    network = _built(path, facts, len(own), trust_code)
    weights, inside = _weights(path), plain(network)
    _check_fit(path, weights, inside.state_dict())
    inside.load_state_dict(weights, strict=False)
    if classes is not None and tuple(classes) != own:
        warn_of_order(str(path), own, classes)
        shape = facts["architecture"].get("shape")
        new_head(network, len(classes), None if shape is None else torch.zeros(1, *shape))
        own = tuple(classes)
    preprocessing, trained_on = preprocessing_of(facts), trained_on_of(facts)
    return Model(network, preprocessing, facts["architecture"], own, pretrained=True, trained_on=trained_on)


def load_weights(network: nn.Module, path: str | Path, *, classes: Sequence[str], head: str | None = None) -> bool:
    """Load the weights of any safetensors file into `network`, but not a head for other classes: for transfer learning.

    Args:
        network: a network of the file's architecture; its head may have another number of classes.
        path: the file; `save` need not have written it.
        classes: the names of the network's classes. The file's head is loaded if it has the same shapes, and the file
            names the same classes or none.
        head: the name of the classifier; None means those that `find_heads` finds.

    Returns:
        Whether the file's head was loaded. If not, the network keeps its own head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, or its tensors do not fit the network outside the head.
    """
    network = plain(network)
    facts, weights, own = read_facts(path), _weights(path), network.state_dict()
    if facts is not None and facts.get("added") and not added_facts(network):
        kinds = " and ".join(sorted({f"{fact['kind']}s" for fact in facts["added"]}))
        raise ValueError(f"{path} is of a network with {kinds}, and this one has none: load the file itself (--model)")
    heads = list(find_heads(network, head))
    prefixes = tuple(f"{name}." for name in (*heads, *not_named(network, heads)))
    in_head = {key for key in own if key.startswith(prefixes)}
    keep_head = (facts is None or facts["classes"] == list(classes)) and all(
        key in weights and weights[key].shape == own[key].shape for key in in_head
    )
    if not keep_head:
        weights = {key: value for key, value in weights.items() if key not in in_head}
    _check_fit(path, weights, {key: value for key, value in own.items() if keep_head or key not in in_head})
    network.load_state_dict(weights, strict=False)
    return keep_head


def read_facts(path: str | Path) -> Facts | None:
    """The facts that `save` wrote beside the tensors.

    Args:
        path: the file.

    Returns:
        "format", "classes", "preprocessing" and "architecture"; in newer files also "trained_on", for `trained_on_of`;
        in files of format 2 also "added", for `add_again`. None where `save` did not write the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, is damaged, or has a later format.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if _KEY not in metadata:
        return None
    try:
        facts: Facts = json.loads(metadata[_KEY])
        known = facts["format"]
        missing = {"classes", "preprocessing", "architecture"} - facts.keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} says unreadable things about its model: {error!r}") from error
    if known != 1:  # format 1 is read too
        check_format(str(path), known, FORMAT)
    if missing:
        raise ValueError(f"{path} does not say its model's {', '.join(sorted(missing))}")
    classes = facts["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path} says unreadable things about its model: its classes are {classes!r:.200}, not names")
    if not isinstance(facts["architecture"], dict):
        raise ValueError(f"{path} says unreadable things about its model: its architecture is no dict")
    return facts


def preprocessing_of(facts: Facts) -> Preprocessing | None:
    """The model's preprocessing, from the facts of a file; None where the model has none.

    Raises:
        ValueError: the settings are damaged.
    """
    given = facts["preprocessing"]
    try:
        return None if given is None else Preprocessing.from_json(given)
    except TypeError as error:
        raise ValueError(f"these are no settings of a preprocessing ({error}): {given}") from error


def trained_on_of(facts: Facts) -> tuple[TrainedOn, ...]:
    """The records of the pictures that the weights were trained on, from the facts of a file.

    Raises:
        ValueError: the records are damaged.
    """
    records = facts.get("trained_on", [])
    if not isinstance(records, list):
        raise ValueError(f"what the file says of its training pictures is damaged: it is no list, but {records!r:.200}")
    return tuple(map(TrainedOn.from_json, records))


def _built(path: str | Path, facts: Facts, count: int, trust_code: bool) -> nn.Module:
    architecture = facts["architecture"]
    try:
        network = construct(architecture, count, trust_code=trust_code)
        add_again(plain(network), facts.get("added", []))
        return network
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        what = f"{path} describes a model that cannot be built"
        raise ValueError(f"{what} ({type(error).__name__}: {error}): {architecture!r:.400}") from error


def _opened(path: str | Path) -> "safe_open":
    if not Path(path).is_file():
        inside = next(Path(path).glob("*.safetensors"), None)
        raise FileNotFoundError(f"no file {str(path)!r}" + (f", but a folder with {str(inside)!r}" if inside else ""))
    safetensors = require("safetensors")
    try:
        file: safe_open = safetensors.safe_open(path, framework="pt")
        return file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _weights(path: str | Path) -> dict[str, torch.Tensor]:
    with _opened(path) as file:
        try:  # a dtype newer than this PyTorch cannot be read
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (require("safetensors").SafetensorError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} holds a tensor that cannot be read: {error}") from error


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first: dict[tuple[int | str, torch.Size, tuple[int, ...]], str] = {}
    for name, value in state.items():
        # An empty tensor has no address.
        first.setdefault((value.data_ptr() or name, value.shape, value.stride()), name)
    return {name: state[name] for name in first.values()}


def _stored(name: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    value = value.detach()
    wide = value.is_floating_point() and value.itemsize > 1  # of floats in 8 bits PyTorch has no isfinite
    stored = value.to(dtype) if dtype is not None and wide and value.ndim > 1 else value
    if stored is not value and not torch.equal(stored.isfinite(), value.isfinite()):
        raise ValueError(f"{name} holds values that {dtype} cannot: store it as torch.bfloat16")
    return stored.cpu().contiguous()


def _check_fit(path: str | Path, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    # A file has tied weights once, under one of their names.
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
