"""LoRA, low-rank updates of layers, with peft (Hu et al. 2022, arXiv 2106.09685)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from fastadv import models
from fastadv._extras import require
from fastadv.attacks.checks import check_number, check_whole
from fastadv.models import Target
from fastadv.models.structure import unwrapped
from fastadv.names import instead
from fastadv.training.factors import ADAPTER, MERGES, merged, pattern
from fastadv.training.mergeable import ALONE, check_mergeable
from fastadv.training.options import Chosen, Options

_TODO = "name other layers with lora_targets= (--lora-targets)"


@contextmanager
def lora(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Add low-rank factors to layers; at the end they are merged into the layers' weights.

    The layers are those of `options.lora_targets`, or those that `fastadv.models.lora_targets` finds.

    Args:
        model: the network.
        options: `rank`, `alpha`, `lora_targets`, `example` and `heads` are used.

    Yields:
        The factors.

    Raises:
        ImportError: peft is not installed.
        TypeError: rank is no whole number, alpha no number, or lora_targets one name and no list.
        ValueError: rank or alpha is out of range; there is no such layer; or the factors of a layer cannot be merged,
            see `check_mergeable`.
    """
    targets = _targets(model, options)
    peft = require("peft")
    names = [target.name for target in targets]
    config = partial(peft.LoraConfig, r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, bias="none")
    alone = dict.fromkeys(names, config(target_modules=ALONE))
    check_mergeable(model, peft.LoraModel, alone, options.example, "LoRA", f"{_TODO}, or choose another method")
    own = {id(parameter) for parameter in model.parameters()}
    tuner = peft.LoraModel(model, {ADAPTER: config(target_modules=pattern(names))}, ADAPTER)
    factors = {name: model.get_parameter(f"{name}.lora_B.{ADAPTER}.weight") for name in names}
    for name in names:
        setattr(model.get_submodule(name), MERGES, True)
    with merged(tuner, factors, "LoRA", _TODO.capitalize()) as hold:
        fixed = sum(hold(factors[target.name], target.rows) for target in targets)
        yield Chosen([parameter for parameter in model.parameters() if id(parameter) not in own], fixed)


def _targets(model: nn.Module, options: Options) -> list[Target]:
    rank, alpha, given = options.rank, options.alpha, options.lora_targets
    check_whole("rank", rank)
    check_number("alpha", alpha)
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    if isinstance(given, str):
        raise TypeError(f"lora_targets is a list of names, got {given!r}")
    if given is None:
        if options.example is None:
            raise ValueError("LoRA finds its layers in a forward pass: pass example=, images, or name lora_targets=")
        return models.lora_targets(model, options.example, options.heads)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    prefix = unwrapped(model)[0]
    targets = [target if isinstance(target, Target) else Target(target) for target in given]
    # A layer may be called by its name in the network that is wrapped, as the head may.
    targets = [replace(each, name=prefix + each.name) if each.name not in layers else each for each in targets]
    if not targets:
        raise ValueError("lora_targets= names no layer")
    for target in targets:
        if target.name not in layers:
            name = target.name.removeprefix(prefix)
            raise ValueError(f"the model has no linear or convolutional layer {name!r}{instead(name, layers)}")
    return targets
