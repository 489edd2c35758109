"""Finds the head and the blocks of a network.

A network may name them itself, in two attributes: `fastadv_head` is the name of its classifier, and `fastadv_blocks` is
the name of the nn.ModuleList or nn.Sequential that has its blocks. Else they are found by the conventions of timm and
transformers, and by the network's structure. Names are those of `module.named_modules()`, also where `module` wraps the
network (`Normalized`, torch.compile, DataParallel).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeGuard

import torch
from torch import nn

from fastadv._warnings import warn
from fastadv.functional import to_float
from fastadv.names import instead
from fastadv.nn import Normalized
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]  # called after a forward pass with (module, arguments, output)

_RUNNERS = (  # wrappers that run a network in another way, and compute the same
    (nn.parallel.DistributedDataParallel, "module"),
    (nn.DataParallel, "module"),
    (nn.Module, "_orig_mod"),  # what torch.compile returns; its own class is slow to import
)
_WRAPPERS = ((Normalized, "model"), *_RUNNERS)


def unwrapped(module: nn.Module, wrappers: Iterable[tuple[type, str]] = _WRAPPERS) -> tuple[str, nn.Module]:
    """(the prefix of the network's names in `module`, the network): for Normalized ("model.", the inner network)."""
    for wrapper, attribute in wrappers:
        if isinstance(module, wrapper) and attribute in module._modules:
            prefix, network = unwrapped(getattr(module, attribute), wrappers)
            return f"{attribute}.{prefix}", network
    return "", module


def plain(network: nn.Module) -> nn.Module:
    """The network whose state files have: without torch.compile, DataParallel and DistributedDataParallel."""
    return unwrapped(network, _RUNNERS)[1]


def with_factors(network: nn.Module) -> str | None:
    """The name of a module that has factors of peft, such as LoRA's; None where there is none."""
    peft = sys.modules.get("peft")  # whoever made such a module has imported it
    kinds = (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer) if peft else ()
    return next((name for name, module in network.named_modules() if isinstance(module, kinds)), None)


# ---------------------------------------------------------------------- the head


def find_head(module: nn.Module, name: str | None = None, example: torch.Tensor | None = None) -> tuple[str, nn.Module]:
    """The name and the module of the classifier. The first rule that applies decides:

    1. The module called `name`.
    2. The module that `fastadv_head` names, or timm's default_cfg.
    3. With an example: the last nn.Linear that runs and on whose output alone the logits depend.
    4. Without an example: for transformers the last nn.Linear with config.num_labels outputs, else the last nn.Linear.

    Args:
        module: a network, wrapped or not.
        name: the classifier's name in `module`, or in the network that it wraps.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.

    Returns:
        (its name in `module`, the classifier).

    Raises:
        ValueError: there is no classifier, or there are several.
    """
    found = find_heads(module, name, example)
    if len(found) > 1:
        raise ValueError(f"the model has several classifiers, {', '.join(found)}: name one with head= (--head)")
    return next(iter(found.items()))


def find_heads(
    module: nn.Module, names: str | Sequence[str] | None = None, example: torch.Tensor | None = None
) -> dict[str, nn.Module]:
    """The classifiers by their names in `module`: that of `find_head`, or all where the logits are a mean of several.

    A distilled DeiT has two.

    Args:
        module: as for `find_head`.
        names: the classifier's name or names.
        example: as for `find_head`.

    Raises:
        ValueError: there is no classifier.
    """
    prefix, network = unwrapped(module)
    if names is None:
        names = _known_or_running(module, network, example)
        if not names:
            raise ValueError("the model has no nn.Linear; name its classifier with head= (--head)")
    modules, found = dict(module.named_modules()), {}
    for name in (names,) if isinstance(names, str) else names:
        full = next((full for full in (name, prefix + name) if full in modules), None)
        if full is None:
            raise ValueError(f"the model has no module called {name!r}{instead(name, filter(None, modules))}")
        found[full] = modules[full]
    return found


def not_named(module: nn.Module, heads: Iterable[str]) -> list[str]:
    """The classifiers that the logits depend on too, where `heads` are some of those that `classifiers` finds."""
    prefix, network = unwrapped(module)
    known = [prefix + name for name in classifiers(network)]
    return [name for name in known if name not in heads] if set(heads) & set(known) else []


def classifiers(network: nn.Module) -> tuple[str, ...]:
    """The names of the classifiers without running the network: rules 2 and 4 of `find_head`.

    Most networks have one; without an nn.Linear there is none. Some have several, such as a distilled DeiT, which
    averages two.

    Args:
        network: a network, wrapped or not.
    """
    network = unwrapped(network)[1]
    declared = _declared_heads(network)
    if declared:
        return declared
    linear = {key: module for key, module in network.named_modules() if isinstance(module, nn.Linear)}
    labels = getattr(getattr(network, "config", None), "num_labels", None)
    fitting = [key for key, module in linear.items() if module.out_features == labels]
    # A distilled model has a second classifier, which was trained on a teacher's outputs.
    tops = {key.partition(".")[0]: key for key in fitting}
    tops.pop(getattr(network, "base_model_prefix", None), None)
    backbones = [top for top in tops if any(isinstance(m, nn.ModuleList) for m in network.get_submodule(top).modules())]
    for top in backbones:  # a layer of it may have as many outputs as there are labels; CLIP's has another name
        del tops[top]
    return tuple(tops.values()) if len(tops) > 1 else tuple((fitting or list(linear))[-1:])


def _declared_heads(network: nn.Module) -> tuple[str, ...]:
    if hasattr(network, "fastadv_head"):
        declared: Any = network.fastadv_head
        return (declared,)
    config = getattr(network, "default_cfg", None) if hasattr(network, "reset_classifier") else None
    names = config and config.get("classifier")
    return (names,) if isinstance(names, str) else tuple(names or ())


def _known_or_running(module: nn.Module, network: nn.Module, example: torch.Tensor | None) -> tuple[str, ...]:
    known = classifiers(network)
    if example is None or _declared_heads(network):
        return known
    try:
        return (_running_head(module, example),)
    except ValueError:
        if len(known) > 1:
            return known
        raise


def _running_head(module: nn.Module, example: torch.Tensor) -> str:
    """The last nn.Linear that changes the logits, if it has one output a class and they depend on nothing else."""
    names: dict[nn.Module, str] = {
        layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    outputs: dict[nn.Module, torch.Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        outputs.pop(layer, None)  # a layer that is called twice counts where it is called last
        outputs[layer] = out

    x = to_float(example[:1])
    # A compiled model would not call the hooks.
    with torch.no_grad(), frozen(module), eager():
        with _hooked(names, note):
            classes = find_logits(module(x), 1).shape[1]
        for layer, given in reversed(outputs.items()):
            expected = _logits(module, x, layer, given)
            if expected.equal(_logits(module, x, layer, given + torch.arange(given.shape[-1]).to(given))):
                continue  # this layer makes an auxiliary output
            if given.shape[-1] == classes and gives_logits_alone(module, layer, x):
                return names[layer]
            raise ValueError(
                f"the last nn.Linear that the logits depend on is {names[layer]}, and they depend on more or are not "
                "its outputs: name the classifier, if it is another or one of several, with head= (--head)"
            )
    raise ValueError("the logits depend on no nn.Linear that runs: name the classifier with head= (--head)")


def gives_logits_alone(module: nn.Module, layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the logits depend on what `layer` returns, and on nothing else of an image. Call it without gradients.

    Args:
        module: a network in eval mode, whose logits are found without torch.compile.
        layer: a module of it that runs, such as its head.
        x: one image (1, C, H, W), as floats.
    """
    outputs: list[torch.Tensor] = []
    with _hooked([layer], lambda _, args, out: outputs.append(out)):
        expected = find_logits(module(x), 1)
    return expected.equal(_logits(module, other_image(x), layer, outputs[-1]))


def other_image(x: torch.Tensor) -> torch.Tensor:
    """An image like `x` with other pixels everywhere. Random ones would not do: `x` may be drawn with the same seed."""
    far = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) / 2 + 0.25
    return (x + far) % 1


def _logits(module: nn.Module, x: torch.Tensor, layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """The logits of `x` that the model returns where `given` takes the place of the output of `layer`."""
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


def warn_of_order(where: str, own: Sequence[str | None], classes: Sequence[str]) -> None:
    """Warn where a trained head is lost although `where` has these classes, in another order or spelling."""
    names = [name for name in own if name is not None]
    if sorted(map(str.casefold, names)) == sorted(map(str.casefold, classes)):
        warn(
            f"{where} has these classes in another order or spelling, {', '.join(names)}: the model gets a new, "
            "untrained head. To keep the head name the classes as it does"
        )


def new_head(network: nn.Module, count: int, example: torch.Tensor | None = None) -> None:
    """Replace the head of `network`, in place, by a new, untrained one; where it has several heads, all of them.

    Args:
        network: a network, wrapped or not.
        count: the number of classes.
        example: images (N, C, H, W) as the network takes them, for `find_head`.

    Raises:
        ValueError: the head is no nn.Linear, or one whose weight is computed from others, as weight_norm does, and timm
            cannot replace it either.
    """
    network = unwrapped(network)[1]
    heads = list(find_heads(network, None, example).values())
    linear = [head for head in heads if is_plain(head)]
    reset = getattr(network, "reset_classifier", None)  # timm's
    if len(linear) == len(heads):
        for head in linear:
            _renew(head, count)
    elif reset is not None:
        reset(count)
    else:
        kinds = ", ".join(type(head).__name__ for head in heads)
        raise ValueError(
            f"the head is a {kinds}: only an nn.Linear whose weight is a parameter (no weight_norm or the like) can be "
            "replaced by a new one"
        )
    config = getattr(network, "config", None)
    for owner, attribute in ((network, "num_classes"), (network, "num_labels"), (config, "num_labels")):
        if hasattr(owner, attribute):
            setattr(owner, attribute, count)


def is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an nn.Linear whose weight is a parameter, not computed from others."""
    return isinstance(head, nn.Linear) and "weight" in head._parameters


def _renew(head: nn.Linear, count: int) -> None:
    head.out_features = count
    head.weight = nn.Parameter(head.weight.new_empty(count, head.in_features))
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.new_empty(count))
    head.reset_parameters()


# ---------------------------------------------------------------------- the blocks


def find_blocks(module: nn.Module) -> list[str]:
    """The names of the blocks, in order.

    The blocks are the children of the module that `fastadv_blocks` names. Without that attribute they are the longest
    run of children of the same type in an nn.ModuleList or nn.Sequential; of equally long runs, the first one.

    Args:
        module: a network, wrapped or not.

    Raises:
        ValueError: there is no module of that name, or no run of two.
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
