"""What each method trains, and that it leaves every other bit alone."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fastadv.attacks import FGSM, Normalized
from fastadv.models import Target, find_head
from fastadv.training.methods import METHODS, trainable

SHAPE = (3, 32, 32)


def timm_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=48, num_heads=2, num_classes=3
    )


def hf_vit():
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config.num_labels = 3
    return transformers.ViTForImageClassification(config)


class Head(nn.Module):
    """A head with a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(self.norm(x))


def conv():
    """1x1 and depthwise convolutions, batch-norm and dropout."""
    layers = [
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.SiLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 1, bias=False),
        nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Head(),
    ]  # fmt: skip
    model = nn.Sequential(*layers)
    model.fastadv_head = "12"
    return model


NETWORKS = {"timm": timm_vit, "hf": hf_vit, "conv": conv}
HEADS = {"timm": "head", "hf": "classifier", "conv": "12"}
ADAPTED = {
    "timm": [f"blocks.{i}.attn.qkv.weight" for i in range(2)],
    "hf": [f"vit.layers.{i}.attention.{p}_proj.weight" for i in range(2) for p in "qv"],
    "conv": ["3.weight", "8.weight"],
}


def made(name):
    """A network for images in [0, 1] whose parameters are none of them zero, nor its statistics the initial ones."""
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for buffer in network.buffers():
            buffer.copy_(torch.rand_like(buffer, dtype=torch.float64) + 0.5)
    return network, Normalized(network, 0.5, 0.25)


def logits(out):
    return getattr(out, "logits", out)


def steps(model, tuning, count=10, train=True):
    """Adversarial training, by hand."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in tuning.parameters], lr=1e-2)
    attack = FGSM(model, 4 / 255)
    for _ in range(count):
        x, y = torch.rand(8, *SHAPE), torch.randint(3, (8,))
        if train:
            model.train()
        F.cross_entropy(logits(model(attack(x, y))), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model, before):
    assert list(model.state_dict()) == list(before)
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_should_train_does_and_no_other_bit_changes(name, method):
    network, model = made(name)
    before, modules, attributes = copied(network), list(network.modules()), [set(vars(m)) for m in model.modules()]
    with trainable(model, method, rank=4, example=torch.rand(1, *SHAPE)) as tuning:
        steps(model, tuning)
        during = [module.training for module in model.modules()]
    in_head = {key for key in before if key.startswith(HEADS[name] + ".")}
    parameters = dict(network.named_parameters())
    expected = {
        "full": set(before),
        "linear": in_head,
        "bias": in_head | {key for key in parameters if key.endswith(".bias")},
        "lora": in_head | set(ADAPTED[name]),
    }[method]
    assert changed(network, before) == expected
    assert any(during)
    assert list(network.modules()) == modules
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_of_a_fused_projection_the_keys_keep_their_bits():
    network, model = made("timm")
    before = copied(network)
    with trainable(model, "lora", example=torch.rand(1, *SHAPE)) as tuning:
        steps(model, tuning)
    for key in ADAPTED["timm"]:
        differs = (network.state_dict()[key] != before[key]).any(dim=1)
        assert differs.tolist() == 48 * [True] + 48 * [False] + 48 * [True]


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_lora_says_what_the_unmerged_one_said(name):
    network, model = made(name)
    before, x = copied(network), torch.rand(4, *SHAPE)
    with trainable(model, "lora", rank=4, alpha=8, example=x) as tuning:
        fresh = logits(model.eval()(x)).detach()
        steps(model, tuning)
        factors = {key: p.detach().clone() for key, p in tuning.parameters if "lora" in key}
        unmerged = logits(model.eval()(x)).detach()
    torch.testing.assert_close(logits(model.eval()(x)), unmerged, rtol=1e-5, atol=1e-5)
    assert (unmerged - fresh).abs().max() > 0.1
    if name == "hf":  # W + alpha / rank * B A, as in the paper
        for key in ADAPTED["hf"]:
            a, b = (factors[f"model.{key.removesuffix('weight')}lora_{f}.default.weight"] for f in "AB")
            torch.testing.assert_close(network.get_parameter(key).data, before[key] + 2 * b @ a)


@pytest.mark.parametrize("method", ["linear", "bias", "lora"])
def test_the_backbone_stays_in_eval_mode_and_the_head_follows(method):
    _, model = made("conv")
    head = find_head(model)[1]
    model.eval()
    inner = set(head.modules())
    with trainable(model, method, example=torch.rand(1, *SHAPE)):
        for mode in (True, False, True):
            assert model.train(mode) is model
            assert {module for module in model.modules() if module.training} == (inner if mode else set())
            FGSM(model, 0.1)(torch.rand(2, *SHAPE), torch.tensor([0, 1]))
            assert {module for module in model.modules() if module.training} == (inner if mode else set())
        model.eval()
        assert not any(module.training for module in model.modules())
        twin = copy.deepcopy(model)
        twin.train()
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def stopped(model, method, during):
    with trainable(model, method, rank=2, example=torch.rand(1, *SHAPE)) as tuning:
        during(tuning)
        raise KeyError("stop")


def test_after_an_exception_flags_are_as_they_were():
    network, model = made("conv")
    network[3].weight.requires_grad_(False)
    network[5].eval()
    model.train = own = lambda mode=True: model  # a method of the instance, as users freeze batch-norm
    flags = [module.training for module in model.modules()]

    def during(tuning):
        F.cross_entropy(model(torch.rand(4, *SHAPE)), torch.tensor([0, 1, 2, 0])).backward()
        assert any(parameter.grad is not None for _, parameter in tuning.parameters)

    for method in METHODS:
        with pytest.raises(KeyError, match="stop"):
            stopped(model, method, during)
        assert [module.training for module in model.modules()] == flags
        assert [key for key, p in network.named_parameters() if not p.requires_grad] == ["3.weight"]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model.train is own


def test_after_an_exception_lora_is_merged_too():
    network, model = made("conv")
    names, x, out = list(network.state_dict()), torch.rand(2, *SHAPE), []

    def during(tuning):
        steps(model, tuning, 2)
        out.append(model.eval()(x).detach())

    with pytest.raises(KeyError, match="stop"):
        stopped(model, "lora", during)
    assert list(network.state_dict()) == names
    torch.testing.assert_close(model.eval()(x), out[0], rtol=1e-5, atol=1e-5)


def test_full_trains_what_requires_grad():
    network, model = made("conv")
    network[0].requires_grad_(False)
    before = copied(network)
    with trainable(model, "full") as tuning:
        steps(model, tuning, 2)
    assert changed(network, before) == set(before) - {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_records_nothing_before_the_head(name):
    _, model = made(name)
    head = find_head(model)[1]
    seen = []
    with trainable(model, "linear"):
        attack = FGSM(model, 0.1)
        x, y = torch.rand(2, *SHAPE), torch.tensor([0, 1])
        adv = attack(x, y)
        for module in model.modules():
            if module not in set(head.modules()):
                module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
        head.register_forward_pre_hook(lambda module, args: seen.append((args, None)))
        out = logits(model(adv))
    assert out.requires_grad
    tensors = [t for args, value in seen for t in (*args, value) if isinstance(t, torch.Tensor) and t is not out]
    assert len(tensors) > 10
    assert not any(tensor.requires_grad for tensor in tensors)


# ---------------------------------------------------------------------- what a head alone cannot do


def accuracy(make, method, data, head_lr=1e-2, **options):
    torch.manual_seed(0)
    model = make()
    x, y = data
    with trainable(model, method, example=x[:1], **options) as tuning:
        optimizer = torch.optim.AdamW([p for _, p in tuning.parameters], lr=head_lr, weight_decay=0)
        for _ in range(40):
            F.cross_entropy(logits(model(x)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return (logits(model.eval()(x)).argmax(1) == y).float().mean().item()


def test_lora_learns_where_the_frozen_features_lack_the_class():
    """The values are zero, so nothing of the image reaches the class token: the features are constant."""

    def make():
        network = timm_vit()
        for block in network.blocks:
            with torch.no_grad():
                block.attn.qkv.weight[96:] = 0
        return network

    y = torch.arange(16) % 2
    x = (0.5 + 0.3 * (2 * y[:, None, None, None] - 1) + 0.2 * torch.rand(16, *SHAPE)).clamp(0, 1)
    assert accuracy(make, "linear", (x, y)) == 0.5
    assert accuracy(make, "lora", (x, y), rank=4) > 0.9


def test_biases_learn_where_the_frozen_features_lack_the_class():
    """Features tanh(W x) are odd in x and the class, an exclusive or, is even: no linear head on them tells it."""

    def make():
        network = nn.Sequential(nn.Flatten(), nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        nn.init.normal_(network[1].weight)
        nn.init.zeros_(network[1].bias)
        return Normalized(network, 0.5, 0.25)

    corners = torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]]).repeat(16, 1)
    x, y = corners[:, :, None, None].expand(-1, -1, 1, 1), torch.tensor([0, 1, 1, 0]).repeat(16)
    assert accuracy(make, "linear", (x, y)) <= 0.75
    assert accuracy(make, "bias", (x, y), head_lr=5e-2) > 0.95


# ---------------------------------------------------------------------- counts, state, refusals


def test_counts_are_those_of_a_hand():
    total = 8 * 27 + 8 + 16 + 16 * 8 + 16 + 16 * 9 + 16 + 32 + 16 * 16 + 32 + 16 * 3 + 3
    head = 32 + 16 * 3 + 3
    factors = 2 * (8 + 16) + 2 * (16 + 16)
    biases = 8 + 8 + 16 + 16 + 16
    counts = {"full": (total, total), "linear": (head, total), "bias": (biases + head, total)}
    counts["lora"] = (factors + head, total + factors)
    for method, expected in counts.items():
        with trainable(made("conv")[1], method, rank=2, example=torch.rand(1, *SHAPE)) as tuning:
            assert (tuning.trainable, tuning.total) == expected
    network, model = made("timm")
    total = sum(parameter.numel() for parameter in network.parameters())
    with trainable(model, "lora", rank=2, example=torch.rand(1, *SHAPE)) as tuning:
        assert tuning.trainable == 2 * 2 * (48 + 2 * 48) + 3 * 48 + 3  # of 144 outputs the 48 keys' do not train
        assert tuning.total == 2 * 2 * (48 + 144) + total


@pytest.mark.parametrize("method", METHODS)
def test_a_state_brings_back_all_that_training_changed(method):
    network, model = made("conv")
    x = torch.rand(4, *SHAPE)
    with trainable(model, method, rank=2, example=x) as tuning:
        steps(model, tuning, 1)
        state, before = tuning.state(), copied(network)
        steps(model, tuning, 2)
        assert changed(network, before)
        assert not any(value.requires_grad for value in state.values())
        tuning.load(state)
        assert not changed(network, before)
        first = next(iter(state))
        for wrong in ({}, {**state, first: torch.zeros(1)}, {**state, "more": torch.zeros(1)}):
            with pytest.raises(ValueError, match="another model or another method"):
                tuning.load(wrong)
        assert not changed(network, before)
    buffers = {key for key in state if re.search("running|tracked", key)}
    assert len(buffers) == (9 if method == "full" else 3)  # the head's are trained by every method


def test_named_layers_and_rows_are_adapted():
    network, model = made("hf")
    before = copied(network)
    targets = ["model.vit.layers.1.mlp.fc1", Target("model.vit.layers.0.mlp.fc1", (slice(0, 5),))]
    with trainable(model, "lora", lora_targets=targets) as tuning:
        steps(model, tuning, 3)
    names = [f"vit.layers.{i}.mlp.fc1.weight" for i in range(2)]
    assert changed(network, before) == {"classifier.weight", "classifier.bias", *names}
    differs = (network.state_dict()[names[0]] != before[names[0]]).any(dim=1)
    assert differs.tolist() == 5 * [True] + 59 * [False]


def test_a_name_is_a_whole_name():
    """Two layers whose names end alike: only the one that is named is adapted."""
    network = nn.Sequential()
    network.add_module("proj", nn.Linear(4, 4))
    network.add_module("deep", nn.Sequential())
    network.deep.add_module("proj", nn.Linear(4, 4))
    network.add_module("head", nn.Linear(4, 2))
    with trainable(network, "lora", lora_targets=["proj"], rank=2) as tuning:
        names = [name for name, _ in tuning.parameters]
    assert names == ["proj.lora_A.default.weight", "proj.lora_B.default.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adapter", {}, "unknown method 'adapter'; there are full, linear, bias, lora"),
        ("linear", {"head": "top"}, "no module called 'top'"),
        ("lora", {}, "pass example=, images, or name lora_targets="),
        ("lora", {"lora_targets": ["model.1"]}, r"no linear or convolutional layer 'model\.1'; there are model\.0"),
        ("lora", {"rank": 0}, "rank must be at least 1 and alpha above 0, got 0 and 16"),
        ("lora", {"alpha": float("nan")}, "alpha above 0"),
        ("lora", {"lora_targets": []}, "lora_targets= names no layer"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(method, options, message):
    _, model = made("conv")
    model.eval()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message), trainable(model, method, **options):
        pass
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_train_is_refused():
    _, model = made("conv")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"), trainable(model, "full"):
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Counting(nn.Module):
    """Puts another tensor in the place of its buffer at each call, as some models do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)
        return self.head(x)


def test_a_buffer_that_the_model_replaces_is_the_one_that_is_kept():
    model = Counting()
    with trainable(model, "full") as tuning:
        model(torch.rand(3, 2))
        state = tuning.state()
        model(torch.rand(4, 2))
        assert state["seen"] == 3
        assert tuning.tensors["seen"] is model.seen
        tuning.load(state)
    assert model.seen == 3
