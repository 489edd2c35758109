"""Where a network has its head and its blocks.

A network may say so itself, by attributes: `fastadv_head`, the name of its classifier, and `fastadv_blocks`, the name
of the nn.ModuleList or nn.Sequential that holds its blocks. Else both are found by what timm and transformers say,
and by its structure. Names are those of `module.named_modules()`, also where `module` wraps the network (`Normalized`,
DistributedDataParallel).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fastadv.functional import to_float
from fastadv.nn import Normalized
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]  # after a forward pass: the module, its arguments, its output

_WRAPPERS = ((Normalized, "model"), (nn.parallel.DistributedDataParallel, "module"))


def unwrapped(module: nn.Module) -> tuple[str, nn.Module]:
    """(what its names begin with in `module`, the network inside the wrappers): "model.", network for Normalized."""
    for wrapper, attribute in _WRAPPERS:
        if isinstance(module, wrapper):
            prefix, network = unwrapped(getattr(module, attribute))
            return f"{attribute}.{prefix}", network
    return "", module


# ---------------------------------------------------------------------- the head


def find_head(module: nn.Module, name: str | None = None, example: torch.Tensor | None = None) -> tuple[str, nn.Module]:
    """Name and module of the classifier.

    It is the module called `name`; else what `fastadv_head` names; timm's classifier; with an example the last
    nn.Linear that runs and gives the logits: they depend on its output, and on nothing else; without one, with
    transformers the last nn.Linear that has config.num_labels outputs, else the last nn.Linear.

    Args:
        module: a network, or one wrapped.
        name: in `module`, or in the network that it wraps.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.

    Returns:
        Its name in `module`, and the classifier.

    Raises:
        ValueError: there is none, or several.
    """
    prefix, network = unwrapped(module)
    if name is None:
        if example is None or _declared_heads(network):
            names = classifiers(network)
        else:
            names = (_running_head(module, example),)
        if len(names) > 1:
            raise ValueError(f"the model has several classifiers, {', '.join(names)}: name one with head=")
        name = names[0]
    modules = dict(module.named_modules())
    for full in (name, prefix + name):
        if full in modules:
            return full, modules[full]
    raise ValueError(f"the model has no module called {name!r}; there are {', '.join(filter(None, modules))}")


def classifiers(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers, by what the network says and by its structure: one, or several as DeiT-distilled has.

    Raises:
        ValueError: there is none.
    """
    network = unwrapped(network)[1]
    declared = _declared_heads(network)
    if declared:
        return declared
    linear = {key: module for key, module in network.named_modules() if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError("the model has no nn.Linear; name its classifier with head=")
    labels = getattr(getattr(network, "config", None), "num_labels", None)
    fitting = [key for key, module in linear.items() if module.out_features == labels]
    # Beside the base model there may be a second one, which learnt from a teacher.
    tops = {key.partition(".")[0]: key for key in fitting}
    tops.pop(getattr(network, "base_model_prefix", None), None)
    return tuple(tops.values()) if len(tops) > 1 else ((fitting or list(linear))[-1],)


def _declared_heads(network: nn.Module) -> tuple[str, ...]:
    if hasattr(network, "fastadv_head"):
        declared: Any = network.fastadv_head
        return (declared,)
    config = getattr(network, "default_cfg", None) if hasattr(network, "reset_classifier") else None
    names = config and config.get("classifier")
    return (names,) if isinstance(names, str) else tuple(names or ())


def _running_head(module: nn.Module, example: torch.Tensor) -> str:
    """The last nn.Linear that runs and changes the logits, if it gives them: all classes, and alone."""
    names: dict[nn.Module, str] = {
        layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    outputs: dict[nn.Module, torch.Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        outputs.pop(layer, None)  # the order is that of the last calls
        outputs[layer] = out

    x = to_float(example[:1])
    other = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    # A compiled model would not call the hooks.
    with torch.no_grad(), frozen(module), torch.compiler.set_stance("force_eager"):
        with _hooked(names, note):
            classes = find_logits(module(x), 1).shape[1]
        for layer, given in reversed(outputs.items()):
            expected = _logits(module, x, layer, given)
            if expected.equal(_logits(module, x, layer, given + torch.arange(given.shape[-1]).to(given))):
                continue  # an auxiliary output
            if given.shape[-1] == classes and expected.equal(_logits(module, other, layer, given)):
                return names[layer]
            raise ValueError(
                f"the last nn.Linear that the logits depend on is {names[layer]}, and they depend on more or are not "
                "its outputs: name the classifier, if it is another or one of several, with head="
            )
    raise ValueError("the logits depend on no nn.Linear that runs: name the classifier with head=")


def _logits(module: nn.Module, x: torch.Tensor, layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """The logits of `x` if `layer` returned `given`."""
    with _hooked([layer], lambda *_: given):
        return find_logits(module(x), 1)


@contextmanager
def _hooked(layers: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def new_head(network: nn.Module, count: int, example: torch.Tensor | None = None) -> None:
    """Give `network` a new, untrained head with `count` outputs, in place; each of its heads, where it has several.

    Args:
        network: a network, or one wrapped.
        count: number of classes.
        example: images (N, C, H, W) as it takes them, with which its head is found, see `find_head`.

    Raises:
        ValueError: its head is no nn.Linear, and timm does not know how to replace it.
    """
    network = unwrapped(network)[1]
    names = classifiers(network) if example is None else (find_head(network, None, example)[0],)
    heads = [find_head(network, name)[1] for name in names]
    linear = [head for head in heads if isinstance(head, nn.Linear)]
    reset = getattr(network, "reset_classifier", None)  # timm's
    if len(linear) == len(heads):
        for head in linear:
            _renew(head, count)
    elif reset is not None:
        reset(count)
    else:
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise ValueError(f"the head is a {kinds}: only an nn.Linear can be replaced by a new one")
    config = getattr(network, "config", None)
    for owner, attribute in ((network, "num_classes"), (network, "num_labels"), (config, "num_labels")):
        if hasattr(owner, attribute):
            setattr(owner, attribute, count)


def _renew(head: nn.Linear, count: int) -> None:
    head.out_features = count
    head.weight = nn.Parameter(head.weight.new_empty(count, head.in_features))
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.new_empty(count))
    head.reset_parameters()


# ---------------------------------------------------------------------- the blocks


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks, in order.

    They are the children of what `fastadv_blocks` names; else the longest run of children of one type in an
    nn.ModuleList or nn.Sequential, the first of equally long ones.

    Raises:
        ValueError: there is no such module, or no run of two.
    """
    prefix, network = unwrapped(module)
    modules = dict(network.named_modules())
    if hasattr(network, "fastadv_blocks"):
        holder = network.fastadv_blocks
        if holder not in modules:
            raise ValueError(f"the model has no module called {holder!r}, which its fastadv_blocks names")
        return [f"{prefix}{holder}.{key}" for key, _ in modules[holder].named_children()]
    runs = [
        [f"{prefix}{name}.{key}" if name else prefix + key for key, _ in run]
        for name, holder in modules.items()
        if isinstance(holder, (nn.ModuleList, nn.Sequential))
        for _, run in groupby(holder.named_children(), key=lambda child: type(child[1]))
    ]
    longest = max(runs, key=len, default=[])
    if len(longest) < 2:
        raise ValueError("the model has no blocks in a row: name what holds them with an attribute fastadv_blocks")
    return longest
