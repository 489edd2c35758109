"""The parameters that each method trains; no other bit changes."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from families import logits
from fitted import changed, copied
from torch import nn
from torch.nn.utils import parametrize

from fastadv.attacks import FGSM, Normalized
from fastadv.models import Target, find_head, lora_targets
from fastadv.training import Trainer
from fastadv.training.methods import trainable
from fastadv.training.optimizers import optimizer_of
from fastadv.training.settings import Settings

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


METHODS = ("full", "linear", "bias", "lora", "norm")  # they fit any network; test_tuning.py has the others
NETWORKS = {"timm": timm_vit, "hf": hf_vit, "conv": conv}
HEADS = {"timm": "head", "hf": "classifier", "conv": "12"}
ADAPTED = {
    "timm": [f"blocks.{i}.attn.qkv.weight" for i in range(2)],
    "hf": [f"vit.layers.{i}.attention.{p}_proj.weight" for i in range(2) for p in "qv"],
    "conv": ["3.weight", "8.weight"],
}


NORMS = {
    "timm": re.compile(r"norm\d?\."),
    "hf": re.compile(r"layernorm"),
    "conv": re.compile(r"^[16]\."),
}


def made(name):
    """A network for images in [0, 1] without a zero parameter, and with statistics other than the initial ones."""
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for buffer in network.buffers():
            buffer.copy_(torch.rand_like(buffer, dtype=torch.float64) + 0.5)
    return network, Normalized(network, 0.5, 0.25)


def steps(model, tuning, count=10, train=True):
    """`count` steps of adversarial training by hand."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in tuning.parameters], lr=1e-2)
    attack = FGSM(model, 4 / 255)
    for _ in range(count):
        x, y = torch.rand(8, *SHAPE), torch.randint(3, (8,))
        if train:
            model.train()
        F.cross_entropy(logits(model(attack(x, y))), y).backward()
        optimizer.step()
        optimizer.zero_grad()


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
        "norm": in_head | {key for key in parameters if NORMS[name].search(key)},
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
    assert (unmerged - fresh).abs().max() > 1e-3  # a hundred times the tolerance above
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
    model.train = own = lambda mode=True: model  # users freeze batch-norm by such a method of the instance
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
    """The attention's values are zero, so nothing of the image reaches the class token: the features are constant."""

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
    """Features tanh(W x) are odd in x, and the class, an exclusive or, is even: no linear head on them can learn it."""

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
        # 48 of the 144 outputs are keys, which do not train.
        assert tuning.trainable == 2 * 2 * (48 + 2 * 48) + 3 * 48 + 3
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
    assert {key for key, _ in model.named_buffers()} <= set(state)  # a layer may write to its own in eval mode, too


def test_a_state_of_an_earlier_version_has_no_buffers_of_the_backbone():
    network, model = made("conv")
    with trainable(model, "linear") as tuning:
        state = {name: tensor + 1 for name, tensor in tuning.state().items() if name.startswith("model.12.")}
        before = copied(network)
        tuning.load(state)
    assert changed(network, before) == {key for key in before if key.startswith("12.")}


@pytest.mark.parametrize("method", METHODS)
def test_training_begins_and_ends_without_gradients(method):
    """The caller's own passes may have left some, also in what does not train."""
    network, model = made("conv")
    fresh, x, y = copy.deepcopy(model), torch.rand(4, *SHAPE), torch.randint(3, (4,))
    F.cross_entropy(model.eval()(x), y).backward()
    for each in (fresh, model):
        torch.manual_seed(0)
        with trainable(each, method, rank=2, example=x) as tuning:
            each.eval()
            F.cross_entropy(each(x), y).backward()
            each.gradients = [parameter.grad for _, parameter in tuning.parameters]
    assert all(torch.equal(*pair) for pair in zip(fresh.gradients, model.gradients, strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


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
    """Two layers whose names have the same ending: only the named one is adapted."""
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
        ("half", {}, "unknown method 'half'; there are full, linear, bias, lora, adapter, prompt, ia3, norm"),
        ("linear", {"head": "top"}, "no module called 'top'"),
        ("lora", {}, "pass example=, images, or name lora_targets="),
        ("lora", {"lora_targets": ["model.1"]}, r"no linear or convolutional layer 'model\.1'; there are model\.0"),
        ("lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("lora", {"rank": 2.5}, "rank must be a whole number, got 2.5"),
        ("lora", {"rank": "8"}, "rank must be a whole number, got '8'"),
        ("lora", {"alpha": 0}, "alpha must be above 0, got 0"),
        ("lora", {"alpha": float("nan")}, "alpha must be finite"),
        ("lora", {"lora_targets": []}, "lora_targets= names no layer"),
        ("lora", {"lora_targets": "model.0"}, "lora_targets is a list of names, got 'model.0'"),
        ("adapter", {"adapter_reduction": 2.5}, "adapter_reduction must be a whole number, got 2.5"),
        ("prompt", {"prompt_tokens": 2.5}, "prompt_tokens must be a whole number, got 2.5"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(method, options, message):
    _, model = made("conv")
    model.eval()
    names = list(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message), trainable(model, method, **options):
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
    """Assigns another tensor to its buffer in each call, as some models do."""

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


# ---------------------------------------------------------------------- named layers train


class Tokens(nn.Module):
    """16 tokens of 24 channels through `body`, then a classifier."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 24, 8, 8), body, nn.Linear(24, 3)

    def forward(self, images):
        tokens = self.body(self.stem(images).flatten(2).transpose(1, 2))
        return self.head((tokens[0] if isinstance(tokens, tuple) else tokens).mean(1))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, tokens):
        return super().forward(tokens, tokens, tokens)


def hf(kind, **options):
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    size |= {"image_size": 32, "patch_size": 8}
    config = transformers.AutoConfig.for_model(kind, **(options or size))
    config.num_labels = 3
    return transformers.AutoModelForImageClassification.from_config(config)


VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2,), num_heads=(2,)
    ),
    "timm beit": lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2),
    "timm convnext": lambda: timm.create_model("convnext_tiny", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)),
    "timm coatnet": lambda: Tokens(timm.models.maxxvit.AttentionCl(24, dim_head=6)),
    "hf clip": lambda: hf("clip", vision_config=VISION | {"image_size": 32, "patch_size": 8}),
    "hf siglip": lambda: hf("siglip", vision_config=VISION | {"image_size": 32, "patch_size": 8}),
    "hf dinov2": lambda: hf("dinov2"),
    "hf swin": lambda: hf(
        "swin", image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "torch": lambda: Tokens(nn.TransformerEncoderLayer(24, 2, 32, activation="gelu", batch_first=True)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_changes_the_rows_that_it_found_and_the_head_in_every_family(name):
    network, x = FAMILIES[name](), torch.rand(4, *SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():  # parameters that start at zero would stop every gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    targets = lora_targets(network, x)
    head = find_head(network, None, x)[0]
    before = copied(network)
    with trainable(network, "lora", rank=2, example=x) as tuning:
        steps(network, tuning, 2)
        network.eval()
        learnt = logits(network(x))
        with torch.no_grad():
            torch.testing.assert_close(logits(network(x)), learnt)  # without gradients PyTorch uses other kernels
    names = {f"{target.name}.weight" for target in targets}
    assert changed(network, before) == names | {key for key in before if key.startswith(f"{head}.")}
    for target in targets:
        key = f"{target.name}.weight"
        expected = torch.zeros(len(before[key]), dtype=torch.bool)
        for rows in target.rows:
            expected[rows] = True
        assert torch.equal((network.state_dict()[key] != before[key]).flatten(1).any(1), expected)
    torch.testing.assert_close(logits(network.eval()(x)), learnt, rtol=1e-4, atol=1e-5)


class UsedWithoutACall(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.called, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.called(F.linear(images.flatten(1), self.qkv.weight).relu()))


@pytest.mark.parametrize(
    ("network", "named", "unreached"),
    [
        (UsedWithoutACall(), ["called", "qkv"], "qkv"),
        (Tokens(SelfAttention(24, 2, batch_first=True)), ["body.out_proj"], r"body\.out_proj"),
    ],
)
def test_factors_without_a_gradient_are_refused_at_the_first_step(network, named, unreached):
    images, before = torch.rand(4, 3, 2, 2) if named[0] == "called" else torch.rand(4, *SHAPE), copied(network)

    def step():
        with trainable(network, "lora", rank=2, lora_targets=named) as tuning:
            optimizer = torch.optim.SGD([p for _, p in tuning.parameters], lr=1.0)
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()  # steps of other optimizers are not checked
            for _ in range(2):
                F.cross_entropy(network(images), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.step()

    with pytest.raises(ValueError, match=rf"LoRA's factors in {unreached} got no gradient: .* --lora-targets|\(--lora"):
        step()
    assert not changed(network, before)


def tied_weights():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    network[3].weight = network[1].weight
    return network


def tied_memory():
    network = tied_weights()
    network[3] = nn.Linear(4, 4)
    network[3].weight.data = network[1].weight.data
    return network


def one_layer_twice():
    network = tied_weights()
    network[3] = network[1]
    return network


@pytest.mark.parametrize("make", [tied_weights, tied_memory, one_layer_twice])
@pytest.mark.parametrize("named", [["1"], None])
def test_weights_that_another_layer_has_too_are_refused(make, named):
    network = make()
    before = copied(network)
    with (
        pytest.raises(ValueError, match=r"1 and 3 have one weight \(tied weights\).*--lora-targets"),
        trainable(network, "lora", lora_targets=named, example=torch.rand(1, 1, 2, 2)),
    ):
        pass
    assert not changed(network, before)


def test_another_name_of_what_holds_a_layer_is_no_tie():
    network = hf_vit()
    network.blocks = network.vit.layers
    with trainable(network, "lora", rank=2, example=torch.rand(1, *SHAPE)) as tuning:
        steps(network, tuning, 1)
        learnt = logits(network.eval()(torch.ones(1, *SHAPE))).detach()
    torch.testing.assert_close(logits(network.eval()(torch.ones(1, *SHAPE))), learnt, rtol=1e-4, atol=1e-5)


def test_a_head_tied_to_a_layer_before_it_trains():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[3].weight = network[1].weight
    for method, others in (("linear", set()), ("bias", {"1.bias"})):
        with trainable(network, method) as tuning:
            assert {name for name, _ in tuning.parameters} == {"1.weight", "3.bias"} | others
            assert tuning.trainable == 20 + 4 * len(others)


def test_a_head_over_the_memory_of_a_layer_before_it_trains_as_if_it_were_one_parameter():
    one, two = (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double() for _ in range(2))
    two.load_state_dict(one.state_dict())
    one[3].weight = one[1].weight
    two[1].weight.data, two[3].weight.data = (one[1].weight.detach().clone(),) * 2
    x, y = torch.rand(8, 1, 2, 2, dtype=torch.float64), torch.randint(4, (8,))
    for network in (one, two):
        with trainable(network, "linear") as tuning:
            optimizer = torch.optim.SGD([parameter for _, parameter in tuning.parameters], lr=0.1)
            for _ in range(3):
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value)


def test_every_bias_trains():
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    attention, rnn = SelfAttention(24, 2, batch_first=True, add_bias_kv=True), nn.LSTM(24, 24, batch_first=True)
    expected = {
        "attention": ["in_proj_bias", "out_proj.bias", "bias_k", "bias_v"],
        "rnn": ["bias_ih_l0", "bias_hh_l0"],
        "beit": ["attn.q_bias", "attn.v_bias", "attn.proj.bias"],
    }
    for network, prefix, names in (
        (Tokens(attention), "body.", expected["attention"]),
        (Tokens(rnn), "body.", expected["rnn"]),
        (beit, "blocks.0.", expected["beit"]),
    ):
        before = copied(network)
        with trainable(network, "bias") as tuning:
            steps(network, tuning, 2)
        differ = changed(network, before)
        assert {prefix + name for name in names} <= differ
        assert {key for key in differ if "bias" not in key} == {"head.weight"}
        assert not any("table" in key for key in differ)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_what_a_bias_or_the_weight_of_a_norm_is_computed_from_trains():
    network = Tokens(nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)))
    for layer, name in ((network.body[0], "bias"), (network.body[1], "weight")):
        parametrize.register_parametrization(layer, name, Doubled())
    trains = {}
    for method in ("bias", "norm"):
        with trainable(network, method) as tuning:
            trains[method] = {name for name, _ in tuning.parameters if "body" in name}
    assert trains == {
        "bias": {"body.0.parametrizations.bias.original", "body.1.bias"},
        "norm": {"body.1.parametrizations.weight.original", "body.1.bias"},
    }


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier, self.auxiliary = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, images):
        x = self.body(images.flatten(1)).relu()
        return {"logits": self.classifier(x), "auxiliary": self.auxiliary(x)}


def test_the_head_that_trains_is_the_one_that_gives_the_logits():
    network, images = Auxiliary(), torch.rand(2, 3, 2, 2)
    with trainable(network, "linear", example=images) as tuning:
        assert [name for name, _ in tuning.parameters] == ["classifier.weight", "classifier.bias"]
    with trainable(network, "lora", example=images, rank=2) as tuning:
        adapted = {name.partition(".lora")[0] for name, _ in tuning.parameters if "lora" in name}
    assert adapted == {"body", "auxiliary"}


# ---------------------------------------------------------------------- two classifiers


def distilled(name):
    if name == "deit":
        return timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3
        )
    if name == "transformers":
        small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.DeiTConfig(**small, image_size=32, num_labels=3)
        return transformers.DeiTForImageClassificationWithTeacher(config)
    sizes = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8}
    return timm.create_model("levit_128s", img_size=64, num_classes=3, **sizes)


TWO_HEADS = {
    "deit": ("head.", "head_dist."),
    "levit": ("head.linear.", "head_dist.linear."),
    "transformers": ("cls_classifier.", "distillation_classifier."),
}


@pytest.mark.parametrize("method", ["full", "linear"])
@pytest.mark.parametrize("name", TWO_HEADS)
def test_both_classifiers_of_a_distilled_network_train(name, method):
    """Its logits are their mean: one that stayed new would be half of them."""
    side = 64 if name == "levit" else 32
    data = torch.rand(8, 3, side, side), torch.arange(8) % 3
    network = distilled(name)
    before = copied(network)
    options = {"epochs": 1, "batch_size": 4, "probe": 0, "progress": False, "device": "cpu"}
    trainer = Trainer(network, 4 / 255, method=method, measure_backbone=name == "deit", **options)
    if name == "deit":
        with pytest.warns(UserWarning, match="is not measured: the model has several classifiers, head"):
            assert trainer.fit(data)[0]["backbone"]["clean_accuracy"] is None
    else:
        trainer.fit(data)
    differ = changed(network, before)
    trained = tuple({key for key in differ if key.startswith(head)} for head in TWO_HEADS[name])
    assert all(trained)
    assert method == "full" or differ == trained[0] | trained[1]


def test_of_two_classifiers_one_that_is_named_trains_alone_and_that_is_told():
    network = distilled("deit")
    options = {"rank": 2, "example": torch.rand(1, 3, 32, 32)}
    said = pytest.warns(UserWarning, match="depend on head too, and head= names head_dist alone")
    with said, trainable(network, "lora", "head_dist", **options) as tuning:
        names = {key.partition(".lora")[0] for key, _ in tuning.parameters}
    assert names == {"head_dist.weight", "head_dist.bias", "blocks.0.attn.qkv"}
    with trainable(network, "lora", **options) as tuning:
        assert names | {"head.weight", "head.bias"} == {key.partition(".lora")[0] for key, _ in tuning.parameters}


@pytest.mark.parametrize("method", ["full", "linear"])
def test_a_head_that_is_not_there_is_refused_also_where_everything_trains(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="nosuch"), trainable(model, method, head="nosuch"):
        pass


# ---------------------------------------------------------------------- weight decay


class Decaying(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.norm, self.attention = nn.LayerNorm((4, 2)), nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.position_embedding, self.words = nn.Embedding(5, 4), nn.Embedding(5, 4)
        for name in ("pos_embed", "cls_token", "register_tokens", "class_embedding", "relative_position_bias_table"):
            setattr(self, name, nn.Parameter(torch.ones(1, 2, 4)))
        self.tied, self.scale, self.projection = self.linear.weight, nn.Parameter(torch.ones(2, 2)), nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"scale", "projection.*"}


DECAY = {"conv.weight", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight", "words.weight"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: Normalized(net, 0.5, 0.5)])
def test_weights_decay_and_nothing_else(optimizer, wrap):
    network = Decaying()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = wrap(network)
    settings = Settings(optimizer=optimizer, lr=0.5, weight_decay=0.1)
    stepping = optimizer_of(model, [(name, p) for name, p in model.named_parameters()], settings)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepping.step()
    decaying = {id(network.get_parameter(name)) for name in DECAY}
    for name, parameter in network.named_parameters():
        decay = 0.5 * 0.1 * (1.9 if optimizer == "sgd" else 1)  # Nesterov momentum: the first step is 1.9 times as long
        factor = 1 - decay if id(parameter) in decaying else 1
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("make", [lambda: distilled("levit"), FAMILIES["timm swin"], FAMILIES["timm beit"]])
def test_what_a_network_of_timm_lists_does_not_decay(make):
    network = make()
    settings = Settings(weight_decay=0.1)
    groups = optimizer_of(network, list(network.named_parameters()), settings).param_groups
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    listed = {name for name in network.no_weight_decay() if name in dict(network.named_parameters())}
    expected = {name for name, p in network.named_parameters() if p.ndim > 1} - listed
    assert {name for name, p in network.named_parameters() if id(p) in decaying} == {
        name for name in expected if "table" not in name
    }
