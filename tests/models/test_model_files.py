"""Files of models that would be lost, mixed up or not written, and networks that are compiled or scripted."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from families import processor_of
from torch import nn

from fastadv import models
from fastadv.commands import finetune
from fastadv.models.networks import resnet
from fastadv.preprocessing import Preprocessing
from fastadv.training import trainable
from fastadv.training.resume import unsaved

transformers = pytest.importorskip("transformers")


def vit(classes=("a", "b", "c")):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    config.num_labels = len(classes)
    config.problem_type = "multi_label_classification"
    network = transformers.ViTForImageClassification(config).eval()
    given = Preprocessing((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    return models.Model(network, given, {"kind": "hf", "config": config.to_dict()}, tuple(classes), pretrained=True)


def small(classes, network=None):
    architecture = {"kind": "own", "name": "resnet", "shape": [3, 8, 8], "options": {"widths": [8, 8], "blocks": 1}}
    network = network or resnet((3, 8, 8), len(classes), widths=(8, 8), blocks=1)
    return models.Model(network, None, architecture, tuple(classes), pretrained=False)


def test_a_folder_of_transformers_takes_no_checkpoint_s_place(tmp_path):
    models.save(small("ab"), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.safetensors is a checkpoint of fastadv"):
        models.export(vit(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"exported as a folder, or to a file \.pt2"):
        models.export(vit(), tmp_path / "x.onnx")
    for _ in range(2):  # an export may be written again
        models.export(vit(), tmp_path / "v1.5")
        models.export(vit(), tmp_path / "vit.exported")


@pytest.mark.parametrize("name", ["adapter_config.json", "processor_config.json"])
def test_a_folder_with_files_that_would_hide_the_export_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=rf"has the {name} of another model.* choose a new folder"):
        models.export(vit(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_export_says_that_its_processor_makes_no_grey_pictures(tmp_path):
    model = vit()
    model.preprocessing = Preprocessing((16, 16), 1, (0.5,), (0.5,))
    with pytest.warns(UserWarning, match=r"takes grey pictures, and no image processor of transformers makes these"):
        models.export(model, tmp_path / "e")


def test_an_exported_pipeline_says_what_the_softmax_says(tmp_path):
    """A config for several labels would make it take a sigmoid."""
    model = vit()
    models.export(model, tmp_path / "e")
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "e").eval()
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        found = network(images, labels=labels)
    by_hand = nn.functional.cross_entropy(model.network(images).logits, labels)
    assert found.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_types_is_what_transformers_makes_of_it_in_float32(tmp_path, dtype):
    """Swinv2 computes a table of positions, which is in no file."""
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    kind, folder = transformers.AutoModelForImageClassification, tmp_path / "half"
    kind.from_config(transformers.Swinv2Config(**sizes, num_labels=3)).to(dtype).save_pretrained(folder)
    processor_of(folder, size={"height": 16, "width": 16})
    model, images = models.source(f"hf:{folder}").build(["LABEL_0", "LABEL_1", "LABEL_2"]), torch.rand(2, 3, 16, 16)
    expected = kind.from_pretrained(folder, dtype=torch.float32).eval()(images).logits
    models.save(model, tmp_path / "m.safetensors")
    for network in (model.network, models.load(tmp_path / "m.safetensors").network):
        assert torch.equal(network.eval()(images).logits, expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_layer_with_as_many_outputs_as_labels_is_no_second_classifier(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    config.num_labels = 16
    network = transformers.AutoModelForImageClassification.from_config(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    models.new_head(network, 16)
    after = network.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
def test_a_program_refuses_images_of_another_type(tmp_path, dtype):
    """Pixels of [0, 255] gave logits of a picture that is white all over."""
    models.export(small("ab"), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    with pytest.raises(RuntimeError, match="dtype mismatch"):
        program(torch.randint(0, 2, (2, 3, 8, 8)).to(dtype))


def test_a_program_of_images_of_an_unknown_shape_is_refused(tmp_path):
    network, given = nn.Linear(2, 2), {"kind": "timm", "name": "resnet18", "options": {}}
    with pytest.raises(ValueError, match="images of one shape, and this model has no preprocessing that says it"):
        models.export(models.Model(network, None, given, ("a", "b"), pretrained=False), tmp_path / "m.pt2")


@pytest.mark.parametrize(("classes", "told"), [("cba", True), ("ABC", True), ("abd", False), ("abc", False)])
def test_a_head_that_is_lost_to_the_order_of_its_classes_is_told(tmp_path, recwarn, classes, told):
    models.save(small("abc"), tmp_path / "m.safetensors")
    models.load(tmp_path / "m.safetensors", classes=list(classes))
    assert any("in another order or spelling, a, b, c" in str(each.message) for each in recwarn) == told


class Extra(nn.Module):
    """A network with a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 2)

    def forward(self, x):
        return self.head(x.flatten(1))

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def test_a_state_that_no_checkpoint_can_keep_is_refused_before_training(tmp_path):
    model = small("ab", Extra())
    for call in (
        lambda: models.save(model, tmp_path / "m.safetensors"),
        lambda: finetune.build(
            SimpleNamespace(seed=0, init=None),
            SimpleNamespace(build=lambda classes, shape: model),
            SimpleNamespace(classes=("a", "b"), shape=(3, 8, 8)),
        ),
    ):
        with pytest.raises(ValueError, match=r"the state of the model has _extra_state, which is no tensor"):
            call()


def test_a_file_of_factors_that_are_not_merged_is_not_written(tmp_path):
    model, images = small("ab"), torch.rand(2, 3, 8, 8)
    with trainable(model.network, "lora", example=images, rank=2) as tuning:
        for name, parameter in tuning.parameters:
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        for write in (models.save, models.export):
            with pytest.raises(ValueError, match=r"has factors of peft, such as in blocks.*write it when they are"):
                write(model, tmp_path / "m.safetensors")
        models.export(model, tmp_path / "m.pt2")  # a program has no names of weights
        expected = model.network(images)
    assert not (tmp_path / "m.safetensors").exists()
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-3, atol=1e-3)
    models.save(model, tmp_path / "m.safetensors")


# ---------------------------------------------------------------------- compiled and scripted networks

RUNNERS = {"compile": lambda network: torch.compile(network, backend="eager"), "DataParallel": nn.DataParallel}


@pytest.mark.parametrize("runner", RUNNERS)
def test_files_have_the_network_itself_not_what_runs_it(tmp_path, runner):
    model = small("ab")
    network, model.network = model.network, RUNNERS[runner](model.network)
    with trainable(model.network, "adapter", "head", example=torch.rand(1, 3, 8, 8)) as tuning:
        for _, parameter in tuning.parameters:
            nn.init.normal_(parameter)
    images = torch.rand(2, 3, 8, 8)
    network.eval()
    models.save(model, tmp_path / "m.safetensors")
    loaded = models.load(tmp_path / "m.safetensors").network.eval()
    torch.testing.assert_close(loaded(images), network(images))
    models.export(model, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(images), network(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_plain_state_has_the_networks_own_names(tmp_path, runner):
    model = small("ab")
    network, model.network = model.network, RUNNERS[runner](model.network)
    models.export(model, tmp_path / "plain.pt")
    small("ab").network.load_state_dict(torch.load(tmp_path / "plain.pt"))
    other = small("ab")
    other.network = RUNNERS[runner](other.network)
    models.save(model, tmp_path / "m.safetensors")
    assert models.load_weights(other.network, tmp_path / "m.safetensors", classes="ab")
    for mine, theirs in zip(network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("method", ["linear", "adapter"])
def test_a_function_may_return_a_network_with_what_runs_it(tmp_path, monkeypatch, runner, method):
    """Its files have the plain network's names, and load into a network that the function makes."""
    module, images = ModuleType("running"), torch.rand(2, 3, 8, 8)
    module.make = lambda shape, classes: RUNNERS[runner](resnet(shape, classes, widths=(8, 8), blocks=1))
    monkeypatch.setitem(sys.modules, "running", module)
    model = models.source("running:make").build("abc", (3, 8, 8))
    with trainable(model.network, method, example=images) as tuning:
        for _, parameter in tuning.parameters:
            nn.init.normal_(parameter)
    models.save(model, tmp_path / "m.safetensors")
    loaded = models.load(tmp_path / "m.safetensors", trust_code=True).network
    assert torch.equal(loaded.eval()(images), model.network.eval()(images))


class Residual(nn.Module):
    """A block with an inner branch, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.b(nn.functional.gelu(self.a(self.norm(x))))


def test_a_compiled_network_has_the_adapters_that_it_gets():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), Residual(), Residual(), nn.Linear(16, 3)).eval()
    compiled, x = torch.compile(network, backend="eager"), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        before = compiled(x)
    with trainable(compiled, "adapter", example=x[:1]) as tuning, torch.no_grad():
        for name, parameter in tuning.parameters:
            if "fastadv_adapter" in name:
                parameter.normal_()
    network.eval()
    with torch.no_grad():
        after = compiled(x)
        torch.testing.assert_close(after, network(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after, before, atol=1e-3)


def test_the_declared_head_of_a_compiled_network_is_found():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 8))
    network.fastadv_head = "1"
    name, head = models.find_head(torch.compile(network, backend="eager"))
    assert (name, head) == ("_orig_mod.1", network[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_looked_at_for_state():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    buffers = {name: sign for name, sign in unsaved(network, None).items() if name.startswith("the buffer")}
    found = unsaved(torch.jit.script(network), None)
    assert len(buffers) == 3
    assert {name.partition(" of ")[0] for name in buffers} <= {name.partition(" of ")[0] for name in found}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_trains():
    network = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    for method, trains in (("linear", ["3.weight", "3.bias"]), ("bias", ["1.bias", "2.bias", "3.weight", "3.bias"])):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with trainable(network, method, "3") as tuning:
            network.train()
            network(torch.rand(4, 3, 2, 2)).square().sum().backward()
            torch.optim.SGD([parameter for _, parameter in tuning.parameters], lr=0.1).step()
        assert [name for name in before if not torch.equal(before[name], network.state_dict()[name])] == trains
    with trainable(network, "full") as tuning:
        assert len(tuning.parameters) == 6
        assert len(tuning.buffers) == 3
