"""LoRA and IA3 refuse, before anything trains, layers whose merged weights would not compute what was trained."""

import copy
import random
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, HEADS, SHAPE, logits, made
from fitted import changed, copied
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fastadv.training.methods import trainable


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


class LargestOne(nn.Linear):
    """Its weight has an effect of its own only once it is large."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True).clamp(min=1))


class OtherArguments(nn.Conv2d):
    """peft cannot make its factors: they are layers of the same class."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)


class Counting(nn.Linear):
    """Changes a buffer in each call."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x).relu()


def hooked(layer, hook):
    getattr(layer, f"register_forward_{hook}")(
        {"hook": lambda m, args, out: out.relu(), "pre_hook": lambda m, args: args[0] ** 2}[hook]
    )
    return layer


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        return weight_norm(layer)


def linear():
    return nn.Linear(8, 8)


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


COMPUTED = "the weight of 3 is computed from other tensors"
OTHER = "LoRA cannot adapt 3: once its factors are merged"
KINDS = {
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), COMPUTED),
    "weight_norm": (lambda: parametrizations.weight_norm(conv()), COMPUTED),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), COMPUTED),
    "old spectral_norm": (lambda: spectral_norm(conv()), COMPUTED),
    "old weight_norm": (lambda: old_weight_norm(linear()), COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), COMPUTED),
    "hook": (lambda: hooked(linear(), "hook"), OTHER),
    "pre-hook": (lambda: hooked(conv(), "pre_hook"), OTHER),
    "cosine": (lambda: Cosine(8, 8), OTHER),
    "norm of at most 1": (lambda: LargestOne(8, 8), OTHER),
    "counting": (lambda: Counting(8, 8), OTHER),
    "StdConv2d": (lambda: StdConv2d(8, 8, 3, padding=1), OTHER),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(8, 8, 3, padding=1), OTHER),
    "other arguments": (lambda: OtherArguments(8), OTHER),
    "circular": (lambda: conv(padding_mode="circular"), OTHER),
    "reflect": (lambda: conv(padding_mode="reflect"), OTHER),
    "groups": (lambda: conv(groups=2), OTHER),
    "depthwise": (lambda: conv(groups=8), OTHER),
    "dilation": (lambda: conv(dilation=2), OTHER),
    "dilation of the same size": (lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2), OTHER),
}


def with_layer(layer):
    """A network whose module 3 is the layer, and another plain one, 1."""
    image = isinstance(layer, nn.Conv2d)
    first = [nn.Identity(), nn.Conv2d(3, 8, 3)] if image else [nn.Flatten(), nn.Linear(48, 8)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if image else []
    return nn.Sequential(*first, nn.Tanh(), layer, nn.BatchNorm2d(8) if image else nn.Dropout(), *last, nn.Linear(8, 3))


def everything(network):
    """What a refusal must leave as it is, beside weights and buffers."""
    numpy = np.random.get_state()  # noqa: NPY002
    return {
        "modules": list(network.named_modules()),
        "parameters": [(name, p, p.data_ptr(), p.requires_grad) for name, p in network.named_parameters()],
        "modes": [module.training for module in network.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]),
    }


def refused(network, method, message, **options):
    before, rest = copied(network), everything(network)
    with pytest.raises(ValueError, match=message) as error, trainable(network, method, **options):
        pass
    assert not changed(network, before)
    for name, value in everything(network).items():
        # By identity where there are tensors.
        assert all(a is b or a == b for a, b in zip(value, rest[name], strict=True) if name != "parameters"), name
    assert all(a[1] is b[1] and a[2:] == b[2:] for a, b in zip(everything(network)["parameters"], rest["parameters"]))
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_refuses_layers_that_would_compute_something_else_once_merged(kind):
    make, message = KINDS[kind]
    network = with_layer(make())
    network[4].eval()
    said = refused(network, "lora", message, lora_targets=["1", "3"], rank=4, head="6" if len(network) > 6 else None)
    assert "--lora-targets" in said
    assert "choose another method" in said
