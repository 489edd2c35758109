"""What a model's name may say, and where a pretrained or own network would silently be another one."""

import copy
import functools
import json
import sys
import types
import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
from families import processor_of
from PIL import Image
from torch import nn

from fastadv import models
from fastadv.models import sources

SHAPE = (3, 32, 32)
NAMES = tuple("abcdefghijkl")  # 12, so that "10" and "11" come before "2" among strings
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "image_size": 32,
    "patch_size": 16,
}
PVT = {
    "image_size": 32,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "num_attention_heads": [1] * 4,
    "sequence_reduction_ratios": [1] * 4,
    "mlp_ratios": [1] * 4,
}


def rewritten(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers with a ViT for 12 classes, and no image processor yet."""
    config = transformers.ViTConfig(**VIT)
    config.id2label = dict(enumerate(NAMES))
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


def said(function, *args):
    """What the function returns, and the texts of its warnings about fastadv."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(each.message) for each in caught if each.filename == __file__]


# ---------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet?widths=8", r"resnet's widths must be a list of integers .* such as widths=\[64, 64, 128\], got 8"),
        ("resnet?widths=[8,2.5]", r"resnet's widths must be a list of integers above 0, .* got \[8, 2\.5\]"),
        ("resnet?widths=[]", "resnet's widths must be a list of integers"),
        ("resnet?blocks=x", "resnet's blocks must be an integer above 0, such as blocks=2, got 'x'"),
        ("resnet?blocks=2.5", r"resnet's blocks must be an integer .* got 2\.5"),
        ("resnet?blocks=true", "resnet's blocks must be an integer .* got True"),
        ("resnet?blocks=[2]", r"resnet's blocks must be an integer .* got \[2\]"),
        ("resnet?blocks=0", "resnet's blocks must be an integer above 0"),
        ("hf:", "'hf:' does not say which model: write hf:NAME_OR_FOLDER"),
        ("timm:", "'timm:' does not say which model: write timm:NAME"),
    ],
)
def test_values_and_names_that_cannot_be_are_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.source(name)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("mode", "does"),
    [("squash", "timm squashes it"), ("border", "timm adds borders to it"), ("center", None), (None, None)],
)
def test_timms_other_crops_are_said(monkeypatch, mode, does):
    config = timm.get_pretrained_cfg("resnet18")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    monkeypatch.setattr(config, "crop_mode", mode)
    _, texts = said(models.source, "timm:resnet18")
    assert len(texts) == bool(does)
    for text in texts:
        assert does in text
        assert f"224x224, timm squashes it (crop_mode {mode})" in text or mode == "border"
    assert said(models.source, "timm:resnet18?pretrained=false")[1] == []  # nothing was trained on the other crop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("global_pool=7", "has no attribute 'lower'"),
        ("output_stride=3", "it raises AssertionError"),
        ("global_pool=", "cannot be multiplied"),  # timm makes this network, and it takes no image
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_options_that_do_not_fit_timms_model_are_refused(monkeypatch, options, message, pretrained):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **given: create(name, **given))  # no download
    with pytest.raises(ValueError, match=f"timm cannot build 'resnet10t' with the options .*{message}") as error:
        models.source(f"timm:resnet10t?{options}&pretrained={str(pretrained).lower()}").build("ab")
    if pretrained and options != "global_pool=":
        assert "try pretrained=false" in str(error.value)


# ---------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        ("EfficientNet", {"size": {"height": 32, "width": 32}}, "include_top=True"),
        (
            "EfficientNet",
            {"size": {"height": 32, "width": 32}, "include_top": False, "rescale_offset": True},
            "rescale_offset=True",
        ),
        ("MobileViT", {}, "do_flip_channel_order=True"),
        ("ViT", {"do_resize": False}, "do_resize=False"),
        ("Levit", {}, "another size or crop"),
        ("PoolFormer", {}, "another size or crop"),
        ("ConvNext", {"size": {"shortest_edge": 384}}, "another size or crop"),
    ],
)
def test_an_image_processor_with_other_steps_is_named(folder, kind, settings, steps):
    processor_of(folder, kind, **settings)
    _, [text] = said(models.source, f"hf:{folder}")
    assert f"the {kind}ImageProcessor" in text
    assert steps in text
    assert "other inputs than it was trained on" in text


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {}),
        ("ViT", {"size": {"height": 31, "width": 47}, "resample": 1}),
        ("ViT", {"size": {"height": 300, "width": 300}, "resample": 0}),
        ("ViT", {"do_normalize": False, "do_rescale": True, "rescale_factor": 2 / 255}),
        ("Beit", {}),
        ("DeiT", {}),
        ("Siglip", {}),
        ("CLIP", {}),
        ("Pvt", {}),
        ("DINOv3ViT", {}),
        ("Bit", {}),
        ("MobileNetV1", {}),
        ("MobileNetV2", {}),
        ("TextNet", {}),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("EfficientNet", {"include_top": False}),
        ("MobileViT", {"do_flip_channel_order": False, "size": {"shortest_edge": 288}}),
    ],
)
def test_an_image_processor_that_fastadv_repeats_says_nothing(folder, kind, settings):
    processor_of(folder, kind, **settings)
    source, texts = said(models.source, f"hf:{folder}")
    assert texts == []
    # A constant picture is its colour, whatever its sizes are: the model's input is the processor's.
    colour = np.array([40, 90, 200], np.uint8)
    picture = Image.fromarray(np.tile(colour, (50, 50, 1)))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0].mean((1, 2))
    given = source.preprocessing
    got = (given.apply(picture).mean((1, 2)) / 255 - given.mean) / given.std
    assert got == pytest.approx(expected.numpy(), abs=0.02)


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        ("EfficientNet", {}, "include_top=True"),
        ("MobileViT", {}, "do_flip_channel_order=True"),
        ("ViT", {"do_resize": False}, "do_resize=False"),
        ("ViT", {}, None),
    ],
)
def test_where_the_processor_does_not_run_its_known_steps_are_said(folder, monkeypatch, kind, settings, steps):
    def lacks(*_, **__):
        raise ImportError("torchvision is missing")

    processor_of(folder, kind, **settings)
    processor = type(transformers.AutoImageProcessor.from_pretrained(folder))
    monkeypatch.setattr(processor, "__call__", lacks)
    _, texts = said(models.source, f"hf:{folder}")
    assert len(texts) == bool(steps)
    assert all(f"does not do ({steps})" in text for text in texts)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), (0.5, [0.25] * 3), (0, 0.5)])
def test_one_mean_stands_for_all_channels(folder, mean, std):
    processor_of(folder, image_mean=mean, image_std=std, size={"height": 32, "width": 32})
    source, texts = said(models.source, f"hf:{folder}")
    assert source.preprocessing.mean == pytest.approx((mean,) * 3)
    assert source.preprocessing.std == pytest.approx((0.5 if mean == 0 else 0.25,) * 3)
    assert texts == []


def test_labels_go_by_their_numbers(folder):
    processor_of(folder, size={"height": 32, "width": 32})
    by_text = dict(sorted((str(i), name) for i, name in enumerate(NAMES)))
    assert tuple(by_text.values()) != NAMES
    rewritten(folder / "config.json", id2label=by_text)
    trained = transformers.ViTForImageClassification.from_pretrained(folder).classifier.weight
    kept = models.source(f"hf:{folder}").build(NAMES).network.classifier.weight
    assert torch.equal(kept, trained)
    with pytest.warns(UserWarning, match="has these classes in another order or spelling"):
        new = models.source(f"hf:{folder}").build(tuple(by_text.values())).network.classifier.weight
    assert not torch.equal(new, trained)


def test_a_configuration_without_labels_gets_a_new_head(tmp_path):
    transformers.PvtForImageClassification(transformers.PvtConfig(**PVT)).save_pretrained(tmp_path)
    rewritten(tmp_path / "config.json", id2label=None)
    processor_of(tmp_path, "Pvt", size={"height": 32, "width": 32})
    model = models.source(f"hf:{tmp_path}").build("abcde")
    assert model.on_pixels.eval()(torch.rand(2, *SHAPE)).logits.shape == (2, 5)


def test_labels_with_gaps_fit_no_classes():
    assert sources._labels({"1": "b", "0": "a"}) == ("a", "b")
    assert sources._labels({0: "a", 2: "b"}) == ("a", None)
    assert sources._labels(None) == ()


# ---------------------------------------------------------------------- your own


class Centred(nn.Module):
    """Subtracts a running mean; the buffer `fixed` is constant, and `table` made by the first pass."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=persistent)
        self.register_buffer("fixed", torch.ones(1), persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.table = torch.ones(3, 1, 1)
        if self.training:
            self.mean.lerp_(x.mean((0, 2, 3))[:, None, None], 0.1)
        return (x - self.mean) * self.fixed * self.table


def centred(persistent, shape, classes):
    head = nn.Linear(torch.Size(shape).numel(), classes)
    nn.init.zeros_(head.weight)  # logits alone would not tell
    return nn.Sequential(Centred(persistent), nn.Flatten(), nn.Dropout(), head)


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_networks")
    monkeypatch.setitem(sys.modules, "own_networks", module)
    return module


def test_a_buffer_that_trains_and_is_not_saved_is_named(own):
    own.net = functools.partial(centred, False)
    _, [text] = said(models.source("own_networks:net").build, "ab", SHAPE)
    assert "training changes 0.mean of the network of own_networks:net" in text
    assert "persistent=True" in text


def test_buffers_that_are_saved_or_constant_say_nothing(own):
    own.net = functools.partial(centred, True)
    assert said(models.source("own_networks:net").build, "ab", SHAPE)[1] == []


def test_a_network_that_needs_more_than_images_in_train_mode_is_taken(own):
    class Demanding(Centred):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return super().forward(x).flatten(1)[:, :2]

    own.net = lambda shape, classes: Demanding(False)
    assert said(models.source("own_networks:net").build, "ab", SHAPE)[1] == []


def test_the_look_at_training_leaves_the_network_as_it_was(own):
    one = centred(False, SHAPE, 2)
    one[0].eval()
    own.net = lambda shape, classes: copy.deepcopy(one)
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    network = said(models.source("own_networks:net").build, "ab", SHAPE)[0].network
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in one] == [False, True, True, True]
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(parameter.requires_grad for parameter in network.parameters())


def one_network(network):
    return lambda shape, classes: network


def one_backbone(network):
    return lambda shape, classes: nn.Sequential(network[:2], nn.Linear(4, classes))


def one_tensor(network):
    def make(shape, classes):
        made = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, classes))
        made[1].weight = nn.Parameter(network[1].weight.data)  # another parameter over the same numbers
        return made

    return make


@pytest.mark.parametrize("kept", [one_network, one_backbone, one_tensor])
def test_models_of_one_function_share_no_weights(own, tmp_path, kept):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    weight, own.net = network[1].weight.detach().clone(), kept(network)
    source = models.source("own_networks:net")
    first = source.build("ab", (3, 2, 2))
    nn.init.zeros_(next(p for p in first.network.parameters() if p.shape == weight.shape))
    models.save(first, tmp_path / "first.safetensors")
    second = source.build("ab", (3, 2, 2))  # begins as the function makes it, not as the first one ended
    assert any(torch.equal(p, weight) for p in second.network.parameters())
    assert torch.equal(network[1].weight, weight)
    loaded = models.load(tmp_path / "first.safetensors", trust_code=True)
    images = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(loaded.network(images), first.network(images))
    assert any(torch.equal(p, weight) for p in second.network.parameters())


def test_a_lazy_network_is_taken(own):
    own.net = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, classes))
    assert models.source("own_networks:net").build("ab", SHAPE).network[1].weight.shape == (4, 3 * 32 * 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_refused(own, dtype):
    own.net = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"own_networks:net has tensors of {name}.*return a float32 network"):
        models.source("own_networks:net").build("ab", SHAPE)


def test_a_network_that_converts_its_images_itself_is_taken(own):
    class Double(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1).double())

    own.net = lambda shape, classes: Double(torch.Size(shape).numel(), classes).double()
    assert models.source("own_networks:net").build("ab", SHAPE).network.weight.dtype == torch.float64


def test_other_errors_of_a_network_of_ones_own_stay(own):
    own.net = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(7, classes))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        models.source("own_networks:net").build("ab", SHAPE)
