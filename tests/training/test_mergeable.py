"""LoRA and IA3 refuse, before anything trains, layers whose merged weights would not compute what was trained."""

import copy
import random
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SHAPE, logits, made
from fitted import changed, copied
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fastadv.nn import Normalized
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
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in network.named_parameters()],
        "modes": [module.training for module in network.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]),
    }


def refused(network, method, message, **options):
    before, rest = copied(network), everything(network)
    with pytest.raises(ValueError, match=message) as error, trainable(network, method, **options):
        pass
    assert not changed(network, before)
    for name, value in everything(network).items():  # parameters and modules are the same objects
        assert all(a is b or a == b for a, b in zip(value, rest[name], strict=True)), name
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_refuses_layers_that_would_compute_something_else_once_merged(kind):
    make, message = KINDS[kind]
    network = with_layer(make())
    network[4].eval()
    said = refused(network, "lora", message, lora_targets=["1", "3"], rank=4, head="6" if len(network) > 6 else None)
    assert "--lora-targets" in said
    assert "choose another method" in said


def scaled(wrap):
    """A residual network whose last convolutions, which IA3 scales, are wrapped."""
    network = made("own resnet")
    for block in network.blocks:
        block.body[3] = wrap(block.body[3])
    return network


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (parametrizations.weight_norm, r"the weight of blocks\.0\.body\.3, blocks\.1\.body\.3 is computed"),
        (lambda conv: hooked(conv, "pre_hook"), r"IA3 cannot adapt blocks\.0\.body\.3, blocks\.1\.body\.3: once"),
    ],
)
def test_ia3_refuses_them_too(wrap, message):
    refused(scaled(wrap), "ia3", message, example=torch.rand(1, *SHAPE))


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_adapters_of_peft_keeps_them(method, wrapped):
    network = made("timm vit")
    config = peft.LoraConfig(r=4, target_modules=["qkv"])
    network = peft.get_peft_model(network, config) if wrapped else peft.inject_adapter_in_model(config, network)
    options = {"example": torch.rand(1, *SHAPE), "head": "base_model.model.head" if wrapped else "head"}
    refused(network, method, "the model has adapters of peft already.* merge_and_unload", **options)
    with trainable(network, "linear", **options) as tuning:
        assert {name.rpartition(".")[2] for name, _ in tuning.parameters} == {"weight", "bias"}
    if wrapped:
        with trainable(network.merge_and_unload(), method, example=torch.rand(1, *SHAPE)):
            pass


class AlsoUsed(nn.Module):
    """Uses the weight of one layer a second time, without calling the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 3)

    def forward(self, x):
        x = self.a(x.flatten(1)).relu()
        return self.head((self.b(x).relu() @ self.b.weight).relu())


def test_weights_that_the_model_uses_elsewhere_too_are_refused():
    network, x = AlsoUsed(), torch.rand(2, 3, 4, 4)
    refused(network, "lora", "uses the weight of b without calling the layer, too", lora_targets=["a", "b"], example=x)
    with trainable(network, "lora", lora_targets=["a"], example=x):
        pass


# ---------------------------------------------------------------------- what is not refused

ACCEPTED = [(name, method, torch.float32) for name in FAMILIES for method in ("lora", "ia3")]
ACCEPTED += [
    (name, method, dtype)
    for name in ("timm vit", "own resnet")
    for method in ("lora", "ia3")
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
]
# The largest difference of the logits by rounding, as a part of the factors' effect.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@pytest.mark.parametrize(("name", "method", "dtype"), ACCEPTED)
def test_plain_families_are_accepted_and_keep_their_logits(name, method, dtype):
    network, x = made(name).to(dtype), torch.rand(2, *SHAPE, dtype=dtype)
    with trainable(network, method, rank=4, example=x) as tuning, torch.no_grad():
        start = logits(network.eval()(x))
        for key, parameter in tuning.parameters:
            if "lora_B" in key or "ia3" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
        learnt = logits(network(x))
    with torch.no_grad():
        merged = logits(network(x))
    assert (merged - learnt).abs().max() <= ROUNDING[dtype] * (learnt - start).abs().max()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(1, 1, bias=False),
        lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1), stride=2),
        lambda: nn.Conv2d(8, 8, 4, padding="same"),
        lambda: nn.Conv2d(3, 8, 7, stride=16),
    ],
)
def test_layers_of_any_size_are_accepted_whatever_their_weights(layer):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for scale in (0.0, 1e-4, 100.0):
            network = nn.Sequential(layer(), nn.Linear(1, 3)).to(dtype)
            with torch.no_grad():
                network[0].weight.mul_(scale)
            before = copied(network)
            with trainable(network, "lora", lora_targets=["0"], head="1", rank=1):
                assert network[0].base_layer.weight.dtype == dtype
            assert all((value == before[name]).all() for name, value in network.state_dict().items())


def test_the_check_leaves_the_factors_as_peft_draws_them():
    network = with_layer(linear())
    theirs, x, seed = copy.deepcopy(network), torch.rand(1, 3, 4, 4), int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    peft.LoraModel(theirs, {"default": peft.LoraConfig(r=4, target_modules=["1", "3"])}, "default")
    torch.manual_seed(seed)
    with trainable(network, "lora", lora_targets=["1", "3"], rank=4, example=x):
        assert not changed(network, copied(theirs))


class PadsItself(nn.Module):
    """It reads attributes of its layers, as MobileNetV2 of transformers does, and has a `base_layer`, as timm's DLA."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        layer = self.base_layer
        sides = [max(k - s, 0) for k, s in zip(layer.kernel_size, layer.stride, strict=True)]
        return self.fc(layer(F.pad(x, (0, sides[1], 0, sides[0]))).tanh().mean((2, 3)))


def test_a_layer_may_be_called_by_its_name_in_the_network_that_is_wrapped():
    network = with_layer(linear())
    for name in ("3", "model.3"):
        with trainable(Normalized(network, 0.5, 0.5), "lora", "5", lora_targets=[name], rank=2) as tuning:
            names = [name for name, _ in tuning.parameters]
        assert names == [f"model.3.lora_{letter}.default.weight" for letter in "AB"] + [
            "model.5.weight",
            "model.5.bias",
        ]
    with (
        pytest.raises(
            ValueError, match=r"no linear or convolutional layer '4'; there are model\.1, model\.3, model\.5"
        ),
        trainable(Normalized(network, 0.5, 0.5), "lora", "5", lora_targets=["4"]),
    ):
        pass


def test_the_names_and_attributes_of_a_networks_layers_do_not_matter():
    network, x = PadsItself(), torch.rand(2, 3, 8, 8)
    own, weight = dict(network.named_modules()), network.base_layer.weight.detach().clone()
    with trainable(network, "lora", lora_targets=["base_layer"], rank=2, alpha=3, example=x):
        down, up = (getattr(network.base_layer, f"lora_{letter}")["default"].weight for letter in "AB")
        nn.init.normal_(up)
        learnt = network(x)
    assert dict(network.named_modules()) == own
    assert not hasattr(network, "peft_config")
    torch.testing.assert_close(network(x), learnt)
    product = 3 / 2 * torch.einsum("or,rikl->oikl", up.flatten(1), down)
    torch.testing.assert_close(network.base_layer.weight, weight + product)


# ---------------------------------------------------------------------- optimizers without the factors


def test_optimizers_without_the_factors_are_told_at_the_end():
    def step(optimizer):
        F.cross_entropy(network(torch.rand(2, 3, 4, 4)), torch.tensor([0, 1])).backward()
        optimizer.step()

    for early, late, warns in (
        (["1.weight"], [], True),  # the layer's own weight, as every parameter before
        (["5.weight"], [], True),
        (["5.weight"], ["3.lora_A.default.weight", "3.lora_B.default.weight"], False),
        ([], [], False),
    ):
        network = with_layer(linear())
        others = [torch.optim.SGD([network.get_parameter(name)], lr=0.1) for name in early]
        others.append(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))  # of another model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with trainable(network, "lora", lora_targets=["3"], rank=2):
                own = [torch.optim.SGD([network.get_parameter(name) for name in late], lr=0.1)] if late else []
                for optimizer in others + own:
                    step(optimizer)
        assert [str(each.message)[:36] for each in caught] == warns * ["no optimizer had LoRA's factors, so "]
