"""Models by name or path: what they hold, and what is refused."""

import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from fastadv import models


@pytest.mark.parametrize(("name", "shape"), [("mlp", (1, 8, 8)), ("conv", (3, 32, 32)), ("conv", (1, 16, 16))])
def test_models_by_name_make_logits(name, shape):
    assert models.build(name, shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


def test_own_model_by_path(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
        "def nothing(shape, classes):\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.build("own_net:net", (1, 2, 2), 3)[1].weight.shape == (3, 4)
    with pytest.raises(TypeError, match=r"must return an nn\.Module, it returned a NoneType"):
        models.build("own_net:nothing", (1, 2, 2), 3)
    for name, message in (
        ("own_net:absent", "absent"),
        ("no_such_module:net", "no_such_module"),
        ("rmlp", "mlp, conv"),
    ):
        with pytest.raises(ValueError, match=message):
            models.build(name, (1, 2, 2), 3)
    sys.modules.pop("own_net")


def test_head_is_the_last_linear_or_the_one_named():
    model = models.build("mlp", (1, 8, 8), 5)
    assert models.find_head(model) == ("5", model[5])
    assert models.find_head(model, "3") == ("3", model[3])
    with pytest.raises(ValueError, match="no module called 'head'"):
        models.find_head(model, "head")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        models.find_head(nn.Conv2d(1, 1, 1))


def saved(path, classes="abcde", name="conv"):
    model = models.build(name, (3, 32, 32), len(classes))
    for value in model.buffers():
        value.copy_(torch.rand_like(value, dtype=torch.float64))
    models.save(model, path, classes=classes)
    return model


def test_weights_and_buffers_come_back_bit_for_bit(tmp_path):
    model = saved(tmp_path / "a.safetensors")
    other = models.build("conv", (3, 32, 32), 5)
    assert models.load(other, tmp_path / "a.safetensors", classes="abcde")
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("classes", ["fghij", "fgh"], ids=["as many", "fewer"])
def test_head_for_other_classes_is_not_loaded(tmp_path, classes):
    model = saved(tmp_path / "a.safetensors")
    other = models.build("conv", (3, 32, 32), len(classes))
    head = other[-1].weight.clone()
    assert not models.load(other, tmp_path / "a.safetensors", classes=classes)
    assert torch.equal(other[-1].weight, head)
    for key, value in list(model.state_dict().items())[:-2]:
        assert torch.equal(value, other.state_dict()[key]), key


def test_file_without_class_names_keeps_a_head_that_fits(tmp_path):
    model = models.build("mlp", (1, 8, 8), 5)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert models.load(models.build("mlp", (1, 8, 8), 5), tmp_path / "a.safetensors", classes="abcde")


def test_tied_weights_are_saved_once_and_come_back(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    models.save(model, tmp_path / "a.safetensors", classes="ab")
    models.load(other, tmp_path / "a.safetensors", classes="ab")
    assert torch.equal(model[1].weight, other[1].weight)


def test_files_that_do_not_fit_are_refused_and_load_nothing(tmp_path):
    saved(tmp_path / "conv.safetensors")
    model = models.build("mlp", (3, 32, 32), 5)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit the model: 3\.bias is missing"):
        models.load(model, tmp_path / "conv.safetensors", classes="abcde")
    wide = models.build("mlp", (3, 16, 16), 5)
    models.save(wide, tmp_path / "wide.safetensors", classes="abcde")
    with pytest.raises(ValueError, match=r"1\.weight is \(256, 768\), the model's \(256, 3072\)"):
        models.load(model, tmp_path / "wide.safetensors", classes="abcde")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        models.load(model, tmp_path / "text.safetensors", classes="abcde")
    with pytest.raises(FileNotFoundError, match="absent"):
        models.load(model, tmp_path / "absent.safetensors", classes="abcde")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
