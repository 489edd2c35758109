"""Where a network has its head, its blocks, and the projections that LoRA adapts.

A network may say so itself, by attributes: `fastadv_head`, the name of its classifier, and `fastadv_blocks`, the name
of the nn.ModuleList or nn.Sequential that holds its blocks. Else both are found by what timm and transformers say,
and by its structure. Names are those of `module.named_modules()`, also where `module` wraps the network (`Normalized`,
DistributedDataParallel).
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from fastadv.attacks import Normalized
from fastadv.attacks.state import frozen
from fastadv.data import to_float

_WRAPPERS = ((Normalized, "model"), (nn.parallel.DistributedDataParallel, "module"))


def unwrapped(module: nn.Module) -> tuple[str, nn.Module]:
    """The network inside the wrappers, and what its names begin with in `module`."""
    for wrapper, attribute in _WRAPPERS:
        if isinstance(module, wrapper):
            prefix, network = unwrapped(getattr(module, attribute))
            return f"{attribute}.{prefix}", network
    return "", module


# ---------------------------------------------------------------------- the head


def find_head(module: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Name and module of the classifier.

    It is the module called `name`; else what `fastadv_head` names; timm's classifier; with transformers the last
    nn.Linear that has config.num_labels outputs; else the last nn.Linear.

    Args:
        module: a network, or one wrapped.
        name: in `module`, or in the network that it wraps.

    Raises:
        ValueError: there is none, or several.
    """
    prefix, network = unwrapped(module)
    modules = dict(module.named_modules())
    name = _head_name(network) if name is None else name
    for full in (name, prefix + name):
        if full in modules:
            return full, modules[full]
    raise ValueError(f"the model has no module called {name!r}; there are {', '.join(filter(None, modules))}")


def _head_name(network: nn.Module) -> str:
    if hasattr(network, "fastadv_head"):
        return network.fastadv_head
    classifier = _timm_classifier(network)
    if isinstance(classifier, str):
        return classifier
    if classifier:
        raise ValueError(f"the model has several classifiers, {', '.join(classifier)}: name one with head=")
    linear = {key: module for key, module in network.named_modules() if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError("the model has no nn.Linear; name its classifier with head=")
    labels = getattr(getattr(network, "config", None), "num_labels", None)
    fitting = [key for key, module in linear.items() if module.out_features == labels]
    # Such as DeiT's second one, which learnt from a teacher.
    tops = {key.partition(".")[0] for key in fitting} - {getattr(network, "base_model_prefix", None)}
    if len(tops) > 1:
        raise ValueError(f"the model has several classifiers, {', '.join(sorted(tops))}: name one with head=")
    return (fitting or list(linear))[-1]


def _timm_classifier(network: nn.Module) -> str | tuple[str, ...] | None:
    config = getattr(network, "default_cfg", None) if hasattr(network, "reset_classifier") else None
    return config.get("classifier") if config else None


def new_head(network: nn.Module, count: int) -> None:
    """Give `network` a new, untrained head with `count` outputs, in place.

    Raises:
        ValueError: its head is no nn.Linear, and timm does not know how to replace it.
    """
    network = unwrapped(network)[1]
    several = isinstance(_timm_classifier(network), (tuple, list))
    head = None if several else find_head(network)[1]
    if isinstance(head, nn.Linear):
        head.out_features = count
        head.weight = nn.Parameter(head.weight.new_empty(count, head.in_features))
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.new_empty(count))
        head.reset_parameters()
    elif hasattr(network, "reset_classifier"):
        network.reset_classifier(count)
    else:
        raise ValueError(f"the head is a {type(head).__name__}: only an nn.Linear can be replaced by a new one")
    config = getattr(network, "config", None)
    for owner, attribute in ((network, "num_classes"), (network, "num_labels"), (config, "num_labels")):
        if hasattr(owner, attribute):
            setattr(owner, attribute, count)


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


# ---------------------------------------------------------------------- what LoRA adapts


@dataclass(frozen=True)
class Target:
    """A layer that LoRA adapts: its name, and the slices of its outputs that train."""

    name: str
    rows: tuple[slice, ...] = (slice(None),)


def lora_targets(module: nn.Module, example: torch.Tensor) -> list[Target]:
    """The layers that LoRA adapts (Hu et al. 2022, arXiv 2106.09685, section 4.2: queries and values).

    Found in one forward pass, by structure:

    - attention with a layer for each projection: a module with three nn.Linear children or more that take the very
      same tensor; the first is q and the third is v (an MLP's gate and up are only two);
    - attention with one layer for all: an nn.Linear with three times as many outputs as inputs, beside one with as
      many outputs as inputs; the first third of its outputs is q and the last is v;
    - where there is neither: every 1x1 convolution with groups == 1.

    The head is left out, and so is a layer whose weight is used without calling the layer.

    Args:
        module: a network, or one wrapped.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.

    Raises:
        ValueError: nothing found.
    """
    head = find_head(module)[0]
    inputs = {name: x for name, x in _inputs(module, example).items() if not f"{name}.".startswith(f"{head}.")}
    targets = [target for name, parent in module.named_modules() for target in _of_attention(name, parent, inputs)]
    if not targets:
        targets = [Target(name) for name, layer in module.named_modules() if name in inputs and _is_pointwise(layer)]
    if not targets:
        raise ValueError(
            "LoRA found neither attention nor 1x1 convolutions in the model: choose another method, or name its "
            "layers with lora_targets="
        )
    return targets


def _inputs(module: nn.Module, example: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear layer and convolution takes in a forward pass."""
    layers = {layer: name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    inputs: dict[str, torch.Tensor] = {}

    def note(layer, args):
        inputs.setdefault(layers[layer], args[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad(), frozen(module):
            module(to_float(example[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _of_attention(name: str, parent: nn.Module, inputs: dict[str, torch.Tensor]) -> list[Target]:
    children = {f"{name}.{key}" if name else key: child for key, child in parent.named_children()}
    linear = {key: child for key, child in children.items() if isinstance(child, nn.Linear) and key in inputs}
    for key in linear:
        together = [other for other in linear if inputs[other] is inputs[key]]
        if len(together) >= 3:
            return [Target(together[0]), Target(together[2])]
    sizes = {key: (layer.in_features, layer.out_features) for key, layer in linear.items()}
    return [
        Target(key, (slice(0, d), slice(2 * d, 3 * d)))
        for key, (d, out) in sizes.items()
        if out == 3 * d and (d, d) in sizes.values()
    ]


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1
