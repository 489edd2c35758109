"""Adapters and prompts: their places, their arithmetic, and the files that keep them."""

import json
import math
import subprocess
import sys

import pytest
import safetensors
import torch
import torch.nn.functional as F
from families import FAMILIES, OTHERS, PLAIN, PREFIX, SHAPE, logits, made
from fitted import colours, copied, same
from PIL import Image
from torch import nn

from fastadv import cli, models
from fastadv.attacks import Normalized
from fastadv.models import Model
from fastadv.models.added import Adapter, Prompt, added_facts, added_to
from fastadv.models.residual import find_residuals
from fastadv.models.structure import find_heads
from fastadv.models.tokens import find_tokens
from fastadv.preprocessing import Preprocessing
from fastadv.training import Trainer, trainable
from fastadv.training.optimizers import optimizer_of
from fastadv.training.settings import Settings
from fastadv.training.step import TrainStep

ADDING = [("adapter", "own resnet"), ("prompt", "hf vit")]


def with_added(name, method, **options):
    """A network with the modules that the method adds; none of their parameters is zero."""
    network = made(name)
    with trainable(network, method, example=torch.rand(1, *SHAPE), **options):
        pass
    for _, added in added_to(network):
        for parameter in added.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network


# ---------------------------------------------------------------------- places

SUMS = {  # (a module, whether it returns or takes the residual sum, the number of this residual block)
    "timm vit": ("blocks.1", "out", 1),
    "timm dinov2": ("blocks.1", "out", 1),
    "timm swin": ("layers.0.blocks.1", "out", 1),
    "timm convnext": ("stages.1.blocks.0", "out", 1),
    "timm resnet": ("layer1.1.act2", "in", 1),
    "hf vit": ("vit.layers.1", "out", 1),
    "hf clip": ("vision_model.encoder.layers.1", "out", 1),
    "hf siglip": ("vision_model.encoder.layers.1", "out", 1),
    "hf dinov2": ("dinov2.encoder.layer.1", "out", 1),
    "hf swin": ("swin.encoder.layers.1.blocks.0", "out", 1),
    "hf convnext": ("convnext.encoder.stages.1.layers.0", "out", 1),
    "hf resnet": ("resnet.encoder.stages.1.layers.0.activation", "in", 1),
    "torchvision resnet": ("layer2.0.relu", "in", 1),
    "own resnet": ("blocks.1.act", "in", 1),
}
COUNT = {"timm convnext": 4, "timm resnet": 8, "hf convnext": 4, "hf resnet": 3, "torchvision resnet": 4}


@pytest.mark.parametrize("name", SUMS)
def test_an_adapter_comes_right_before_the_residual_sum(name):
    """A change of the output at the adapter's place changes the residual sum by the same amount."""
    network, x = made(name).double(), torch.rand(2, *SHAPE, dtype=torch.float64)
    residuals = find_residuals(network, x)
    assert len(residuals) == COUNT.get(name, 2)
    holder, side, number = SUMS[name]
    seen, delta = [], []

    def note(module, args, out=None):
        out = args[0] if out is None else out
        seen.append((out[0] if isinstance(out, tuple) else out).clone())

    def disturb(module, args, out):
        delta.append(torch.randn_like(out))
        return out + delta[0]

    module = network.get_submodule(holder)
    module.register_forward_pre_hook(note) if side == "in" else module.register_forward_hook(note)
    with torch.no_grad():
        network(x)
        once = seen[-1]
        network.get_submodule(residuals[number].place).register_forward_hook(disturb)
        network(x)
    torch.testing.assert_close(seen[-1] - once, delta[0].reshape(once.shape), rtol=1e-6, atol=1e-8)
    width = residuals[number].width
    assert delta[0].shape[1 if residuals[number].channels_first else -1] == width


@pytest.mark.parametrize("name", PLAIN)
def test_prompts_stand_before_the_patches(name):
    network, x = made(name), torch.rand(1, *SHAPE)
    found = find_tokens(network, x)
    assert (found.prefix, found.width, found.pixels, len(found.blocks)) == (PREFIX.get(name, 1), 24, 64, 2)
    given = []
    first, last = (network.get_submodule(found.blocks[i]) for i in (0, -1))
    for layer in (first, last):
        layer.register_forward_pre_hook(lambda layer, args: given.append(args[0]), prepend=True)
    with torch.no_grad():
        network(x)
        without = given[0]
        with trainable(network, "prompt", example=x, prompt_tokens=3):
            inside = []
            norm = next(module for module in first.modules() if isinstance(module, nn.LayerNorm))
            norm.register_forward_pre_hook(lambda layer, args: inside.append(args[0]))
            network(x)
    assert torch.equal(without, given[-2])  # the tokens that enter the first block
    assert without.shape == given[-1].shape  # a block returns no prompts
    prompts = [added for _, added in added_to(network)]
    tokens = prompts[0].tokens
    expected = torch.cat((without[:, : found.prefix], tokens[None], without[:, found.prefix :]), 1)
    assert torch.equal(inside[-1], expected)
    bound = math.sqrt(6 / (3 * 64 + 24))
    every = torch.cat([each.tokens.flatten() for each in prompts])
    assert bound > every.abs().max() > 0.9 * bound
    assert abs(every.std() - bound / math.sqrt(3)) < 0.2 * bound


def test_every_example_shows_the_patches():
    network = made("timm vit")
    for seed in range(3):  # those that a caller would take, too
        x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
        assert find_tokens(network, x).prefix == 1


class Folded(nn.Module):
    """Transformer blocks in one stage of a network, on tokens of a part of each image, as in MobileViT."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        x = self.stem(images).unflatten(3, (-1, 2)).permute(0, 4, 2, 3, 1)  # (N, 2, 8, 4, 8)
        tokens = x.flatten(0, 1).flatten(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.unflatten(0, (len(images), 2)).mean((1, 2)))


def test_prompts_are_refused_where_the_tokens_are_of_a_part_of_an_image():
    network = Folded()
    with (
        pytest.raises(ValueError, match=r"prompt works on plain vision transformers .*do not all take and return"),
        trainable(network, "prompt", "head", example=torch.rand(1, *SHAPE)),
    ):
        pass


@pytest.mark.parametrize("name", OTHERS)
def test_prompts_are_refused_elsewhere_and_change_nothing(name):
    network = made(name)
    names = list(network.state_dict())
    with (
        pytest.raises(
            ValueError, match=r"prompt works on plain vision transformers .*Choose another method, such as a"
        ),
        trainable(network, "prompt", example=torch.rand(1, *SHAPE)),
    ):
        pass
    assert list(network.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_adapters_are_refused_where_nothing_is_residual():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with (
        pytest.raises(
            ValueError, match="adapter works on residual blocks, such as those of ViT, Swin, ConvNeXt and Re"
        ),
        trainable(network, "adapter", example=torch.rand(1, 3, 2, 2)),
    ):
        pass
    assert not list(added_to(network))


class Depthwise(nn.Module):
    """A branch of images (N, H, W, width) with a depthwise convolution, as in MambaOut."""

    def __init__(self, width):
        super().__init__()
        self.depthwise, self.last = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Linear(width, width)

    def forward(self, x):
        return self.last(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Paired(Depthwise):
    """Returns something else beside the branch, as attention returns its weights."""

    def forward(self, x):
        return super().forward(x), x


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        out = self.branch(x)
        return x + (out[0] if isinstance(out, tuple) else out)


class Attended(nn.Module):
    """nn.MultiheadAttention calls none of its layers."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2)

    def forward(self, x):
        tokens = x.flatten(1, 2)
        return (tokens + self.inner(tokens, tokens, tokens)[0]).reshape(x.shape)


def rows(width, *blocks):
    """A network whose blocks get images (N, 4, 4, width)."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = nn.Conv2d(3, width, 8, 8), nn.Sequential(*blocks), nn.Linear(width, 3)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

    return Rows()


@pytest.mark.parametrize("width", [4, 6])
def test_adapters_find_the_channels_also_of_images_with_as_many_rows(width):
    found = find_residuals(rows(width, Block(Depthwise(width))), torch.rand(1, *SHAPE))
    assert [(each.place, each.width, each.channels_first) for each in found] == [("blocks.0.branch", width, False)]


def test_adapters_act_on_what_is_returned_alone():
    network, x = rows(8, Block(Paired(8)), Block(Depthwise(8))), torch.rand(2, *SHAPE)
    with trainable(network, "adapter", example=x):
        network(x)
    assert {place for place, _ in added_to(network)} == {"blocks.0.branch.last", "blocks.1.branch"}
    network = rows(8, Attended(8))
    with (
        pytest.raises(ValueError, match=r"called elsewhere, too, or returns a tuple\. Choose another method"),
        trainable(network, "adapter", example=x),
    ):
        pass
    assert not list(added_to(network))


class Shared(Block):
    """Two branches go through one module, as through the DropPath of SwiftFormer in transformers."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, width))
        self.other, self.drop = nn.Linear(width, width), nn.Identity()

    def forward(self, x):
        x = x + self.drop(2 * self.other(x))
        return x + self.drop(2 * self.branch(x))


def test_blocks_without_a_place_for_an_adapter_are_told():
    network, x = rows(8, Shared(8), Block(Depthwise(8))), torch.rand(2, *SHAPE)
    with (
        pytest.warns(UserWarning, match=r"the blocks blocks\.0 get no adapter: the module .* is called elsewhere"),
        trainable(network, "adapter", example=x),
    ):
        assert {place for place, _ in added_to(network)} == {"blocks.1.branch"}


class Adds(nn.Module):
    """Adds its branch to another tensor, as the output of a CvT's MLP does."""

    def __init__(self, width):
        super().__init__()
        self.last = nn.Linear(width, width)

    def forward(self, hidden, x):
        return self.last(hidden) + x


class Twice(Block):
    """Its first sum is its own, and its last one that of a submodule."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, width))
        self.output = Adds(width)

    def forward(self, x):
        x = super().forward(x)
        return self.output(x.relu(), x)


def test_a_sum_that_a_submodule_goes_on_with_is_not_the_last_of_its_block():
    found = find_residuals(rows(8, Twice(8), Twice(8)), torch.rand(1, *SHAPE))
    lasts = ["blocks.0.output.last", "blocks.1.output.last"]
    assert [each.place for each in found] == [each.last for each in found] == lasts


@pytest.mark.parametrize("first", [torch.arange(3), torch.ones(1, dtype=torch.complex64), torch.ones(1).double()])
@pytest.mark.parametrize(("method", "name"), ADDING)
def test_what_is_added_has_the_dtype_of_its_block(method, name, first):
    """The network's first parameter is of another dtype, such as indices or a temperature."""
    network, x = nn.Module(), torch.rand(2, *SHAPE)
    network.first, network.inner = nn.Parameter(first, requires_grad=False), made(name)
    network.forward = lambda images: network.inner(images)
    with trainable(network, method, example=x):
        network(x)
    added = [parameter for _, each in added_to(network) for parameter in each.parameters()]
    assert {parameter.dtype for parameter in added} == {torch.float32}


def test_modules_that_the_logits_do_not_need_get_no_adapter():
    assert all(
        "vision_model.head" not in each.place for each in find_residuals(made("hf siglip"), torch.rand(1, *SHAPE))
    )


# ---------------------------------------------------------------------- arithmetic


def attention(x, block, heads):
    n, t, d = x.shape
    q, k, v = (
        (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).view(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    )
    scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // heads), -1)
    return (scores @ v).transpose(1, 2).reshape(n, t, d) @ block.attn.proj.weight.T + block.attn.proj.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def normed(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def vit_by_hand(network, images):
    """timm's ViT in plain operations, with new prompts in each block as in VPT-deep's paper."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    kernel, count = network.patch_embed.proj, 0
    x = patches @ kernel.weight.flatten(1).T + kernel.bias
    x = torch.cat((network.cls_token.expand(len(x), -1, -1), x), 1) + network.pos_embed
    for block in network.blocks:
        if hasattr(block, "fastadv_prompt"):
            tokens = block.fastadv_prompt.tokens.expand(len(x), -1, -1)
            x = torch.cat((x[:, :1], tokens, x[:, 1 + count :]), 1)
            count = tokens.shape[1]
        x = x + attention(normed(x, block.norm1), block, 2)
        u = normed(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        u = gelu(u) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        if hasattr(block.mlp, "fastadv_adapter"):
            a = block.mlp.fastadv_adapter
            u = u + gelu(u @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
        x = x + u
    return normed(x[:, 0], network.norm) @ network.head.weight.T + network.head.bias


def resnet_by_hand(network, images):
    x = network.stem(images)
    for block in network.blocks:
        a = block.body[4].fastadv_adapter
        # The layers of the body one after the other, without the hook that calls the adapter.
        u = x
        for layer in block.body:
            forward = layer._forward_hooks.copy()
            layer._forward_hooks.clear()
            u = layer(u)
            layer._forward_hooks.update(forward)
        hidden = gelu(torch.einsum("nchw,rc->nrhw", u, a.down) + a.down_bias[:, None, None])
        u = u + torch.einsum("nrhw,cr->nchw", hidden, a.up) + a.up_bias[:, None, None]
        x = F.silu(u + block.skip(x))
    return x.mean((2, 3)) @ network.head.weight.T + network.head.bias


@pytest.mark.parametrize(
    ("name", "method", "by_hand"),
    [
        ("timm vit", "adapter", vit_by_hand),
        ("timm vit", "prompt", vit_by_hand),
        ("own resnet", "adapter", resnet_by_hand),
    ],
)
def test_the_logits_are_those_of_a_hand(name, method, by_hand):
    network = with_added(name, method).double()
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        found, expected = network(images), by_hand(network, images)
        for _, added in added_to(network):  # the added modules change the logits by far more than the tolerance
            for parameter in added.parameters():
                parameter.neg_()
        assert (network(images) - found).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["timm vit", "timm convnext", "own resnet"])
def test_new_adapters_leave_every_bit_of_the_logits(name):
    network, x = made(name), torch.rand(2, *SHAPE)
    with torch.no_grad():
        before = logits(network(x))
        with trainable(network, "adapter", example=x, adapter_reduction=4):
            assert torch.equal(logits(network.eval()(x)), before)
    for _, added in added_to(network):
        assert added.reduced == added.width // 4
        assert 1 / math.sqrt(added.width) >= added.down.abs().max() > 0.5 / math.sqrt(added.width)


def test_masks_of_attention_let_prompts_be_seen():
    """transformers' eager attention gets a mask where there is padding, and always under torch.export."""
    prompt, tokens = Prompt(2, 4, 1, 16), 5
    seen = torch.rand(3, 1, tokens, tokens) < 0.5
    wide = prompt.unmasked(seen, tokens)
    kept = [0, 3, 4, 5, 6]
    assert torch.equal(wide[:, :, kept][..., kept], seen)
    assert wide[:, :, 1:3].all()
    assert wide[..., 1:3].all()
    added = prompt.unmasked(torch.full((1, 1, 1, tokens), -1.0), tokens)
    assert added.flatten().tolist() == [-1, 0, 0, -1, -1, -1, -1]


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_prompt_tokens_and_ia3s_vectors_do_not_decay(optimizer):
    settings = Settings(optimizer=optimizer, lr=0.1, weight_decay=0.5)
    for method, still in (("prompt", "tokens"), ("adapter", "bias"), ("ia3", "ia3_l")):
        network = made("timm vit")
        with trainable(network, method, example=torch.rand(1, *SHAPE)) as tuning:
            before = tuning.state()
            stepping = optimizer_of(network, tuning.parameters, settings)
            for _, parameter in tuning.parameters:
                parameter.grad = torch.zeros_like(parameter)
            stepping.step()
            same = {name for name, t in tuning.tensors.items() if torch.equal(t, before[name])}
        zeros = {name for name, t in before.items() if not t.any()}
        assert same - zeros == {name for name in before if still in name or name.endswith("bias")} - zeros


def test_what_a_model_has_trains_on_and_other_numbers_are_refused():
    for method, option, message in (
        ("adapter", {"adapter_reduction": 4}, "of 3 channels for 24, and adapter_reduction=4 means others"),
        ("prompt", {"prompt_tokens": 4}, "prompts of 10 tokens already, and prompt_tokens=4 means others"),
    ):
        network = with_added("timm vit", method)
        before = copied(network)
        with (
            pytest.raises(ValueError, match=message),
            trainable(network, method, example=torch.rand(1, *SHAPE), **option),
        ):
            pass
        with trainable(network, method, example=torch.rand(1, *SHAPE)) as tuning:
            names = {name for name, _ in tuning.parameters}
        assert {name for name in before if "fastadv" in name} < names
        assert list(network.state_dict()) == list(before)
        with trainable(network, "linear", example=torch.rand(1, *SHAPE)) as tuning:
            assert {name for name, _ in tuning.parameters} == {"head.weight", "head.bias"}


def test_layers_with_an_adapter_get_no_factors():
    """LoRA's factors would act after the adapter in training, and before it once they are merged into the weight."""
    network = made("own resnet")
    residual = find_residuals(network, torch.rand(1, *SHAPE))[0]
    models.added.attach(network, residual.last, Adapter(residual.width, 2, True))
    for method in ("lora", "ia3"):
        with (
            pytest.raises(ValueError, match=f"{residual.last} has an adapter"),
            trainable(network, method, example=torch.rand(1, *SHAPE)),
        ):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 5}, "prompt_tokens belongs to the method prompt, and the method is full"),
        (
            {"method": "prompt", "adapter_reduction": 5},
            "adapter_reduction belongs to the method adapter, and .* prompt",
        ),
        ({"method": "prompt", "prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"method": "adapter", "adapter_reduction": 0}, "adapter_reduction must be at least 1"),
    ],
)
def test_settings_that_nothing_heeds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(nn.Linear(2, 2), 0.1, **settings)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("method", "name"), ADDING)
def test_a_run_that_is_cut_goes_on_to_the_same_bits(method, name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    start = copied(made(name))
    settings = {"method": method, "epochs": 2, "batch_size": 8, "lr": 1e-2, "lp_ft": 1, "checkpoint_s": 0.0}
    settings |= {"adapter_reduction": 4} if method == "adapter" else {"prompt_tokens": 3}

    def train(folder):
        network = FAMILIES[name]()
        network.load_state_dict(start)
        options = {"folder": folder, "resume": True, "probe": 8, "progress": False, "device": "cpu"}
        options |= {"measure_backbone": False}
        parts = colours(24, 1, side=32), colours(3, 2, side=32)
        Trainer(Normalized(network, 0.5, 0.25), 4 / 255, **options, **settings).fit(*parts)
        return network.state_dict()

    whole, apply, taken = train(tmp_path / "whole"), TrainStep.apply, []

    def cut(step):
        taken.append(None)
        if len(taken) in (5, 9):
            raise Stopped
        apply(step)

    monkeypatch.setattr(TrainStep, "apply", cut)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(tmp_path / "cut")
    found = train(tmp_path / "cut")
    assert list(found) == list(whole)
    assert same(found, whole)
    assert any("fastadv" in key for key in whole)


# ---------------------------------------------------------------------- files

ARCHITECTURES = {
    "own resnet": {"kind": "own", "name": "resnet", "shape": SHAPE, "options": {"widths": [8, 8, 16], "blocks": 1}},
    "timm vit": {
        "kind": "timm",
        "name": "vit_tiny_patch16_224",
        "options": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
    },
}


def a_model(name, method):
    network = with_added(name, method)
    preprocessing = Preprocessing((32, 32), 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 1.0)
    architecture = ARCHITECTURES.get(name) or {"kind": "hf", "config": json.loads(network.config.to_json_string(False))}
    return Model(network, preprocessing, architecture, ("a", "b", "c"), True)


@pytest.mark.parametrize(("method", "name"), [("adapter", "own resnet"), ("adapter", "timm vit"), ("prompt", "hf vit")])
def test_saved_and_loaded_they_give_the_same_bits(method, name, tmp_path):
    model, x = a_model(name, method), torch.rand(3, *SHAPE)
    models.save(model, tmp_path / "m.safetensors")
    again = models.load(tmp_path / "m.safetensors")
    assert added_facts(again.network) == added_facts(model.network) != []
    with torch.no_grad():
        assert torch.equal(logits(again.on_pixels.eval()(x)), logits(model.on_pixels.eval()(x)))
    built = models.source(str(tmp_path / "m.safetensors")).build(("x", "y"))  # for other classes
    assert all(head.out_features == 2 for head in find_heads(built.network, None, x).values())
    assert added_facts(built.network) == added_facts(model.network)
    other = made(name)
    with pytest.raises(
        ValueError, match=f"is of a network with {method}s, and this one has none: load the file itself"
    ):
        models.load_weights(other, tmp_path / "m.safetensors", classes=model.classes)


def test_only_a_file_with_added_modules_has_the_new_format(tmp_path):
    model = a_model("own resnet", "adapter")
    plain = Model(made("own resnet"), None, ARCHITECTURES["own resnet"], ("a", "b", "c"), True)
    for each, number in ((model, 2), (plain, 1)):
        models.save(each, tmp_path / "m.safetensors")
        with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["fastadv"])
        assert facts["format"] == number
        assert ("added" in facts) == (number == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": "blocks.9"}, "the network has no module 'blocks.9', where the file has"),
        ({"kind": "module:function"}, "of the modules that are added to its network is damaged"),
        ({"width": 0}, "of the modules that are added to its network is damaged"),
        ({"width": "8"}, "of the modules that are added to its network is damaged"),
        ({"reduced": 5}, "does not fit the model"),
        ({"more": 1}, "of the modules that are added to its network is damaged"),
    ],
)
def test_a_file_that_says_wrong_things_of_them_is_refused(change, message, tmp_path):
    model = a_model("own resnet", "adapter")
    models.save(model, tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fastadv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts["added"][0] |= change
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", {"fastadv": json.dumps(facts)})
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "m.safetensors")


ALONE = """
import sys
for name in ("fastadv", "timm", "transformers"):
    sys.modules[name] = None  # to import it is an error
import torch
classes = {"classes.json": ""}
images = torch.load(sys.argv[1] + "/images.pt")
for path in sys.argv[2:]:
    program = torch.export.load(path, extra_files=classes).module()
    assert classes["classes.json"] == '["a", "b", "c"]'
    torch.save([program(images[:n]) for n in (1, 4)], path + ".logits")
"""


def test_an_exported_program_needs_nothing_but_torch(tmp_path):
    x, expected = torch.rand(4, *SHAPE), {}
    for method, name in ADDING:
        model, path = a_model(name, method), str(tmp_path / f"{method}.pt2")
        model.network.train()
        flags = [module.training for module in model.network.modules()]
        models.export(model, path)
        assert [module.training for module in model.network.modules()] == flags
        for ending in ("m", "m.pt", "m.safetensors"):
            with pytest.raises(ValueError, match=rf"the network has {method}s, .* a file \.pt2"):
                models.export(model, tmp_path / ending)
        with torch.no_grad():
            expected[path] = logits(model.on_pixels.eval()(x))
    torch.save(x, tmp_path / "images.pt")
    program = [sys.executable, "-c", ALONE, str(tmp_path), *expected]
    subprocess.run(program, check=True, cwd=tmp_path, env={"PYTHONPATH": ""})
    for path, found in expected.items():
        one, four = torch.load(path + ".logits")
        torch.testing.assert_close(four, found, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, found[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["adapter", "prompt"])
def test_the_commands_take_a_checkpoint_that_has_them(method, tmp_path):
    network = "resnet?widths=[8,8,16]&blocks=1"
    if method == "prompt":
        network = "timm:vit_tiny_patch16_224?img_size=8&patch_size=4&depth=2&embed_dim=16&num_heads=2&pretrained=false"
        network += "&in_chans=1"
    path, digits = str(tmp_path / "a" / "model.safetensors"), ["--data", "digits", "--eps", "8", "--classes"]
    finetune = ["finetune", "--method", method, "--epochs", "1", "--probe", "0", *digits]
    cli.main([*finetune, "0,1", "--model", network, "--out", str(tmp_path / "a")])
    cli.main([*finetune, "2,3", "--model", path, "--out", str(tmp_path / "b")])
    if method == "prompt":  # this network knows its picture size
        cli.main(["evaluate", *digits, "0,1", "--model", path, "--attacks", "fgsm", "--out", str(tmp_path / "e")])
        cli.main(["export", path, str(tmp_path / "m.pt2")])
        Image.new("L", (8, 8)).save(tmp_path / "x.png")
        cli.main(["predict", "--model", path, "--out", str(tmp_path / "p.json"), str(tmp_path / "x.png")])
        said = torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(1, 1, 8, 8)).softmax(1)
        (picture,) = json.loads((tmp_path / "p.json").read_text())
        assert list(picture["probabilities"].values()) == pytest.approx(said[0].tolist(), rel=1e-4)
    facts = [added_facts(models.load(tmp_path / run / "model.safetensors").network) for run in "ab"]
    assert facts[0] == facts[1] != []
