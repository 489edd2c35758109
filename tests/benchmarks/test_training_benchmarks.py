"""The training benchmarks: the predicted cost of a step, and the crops of their pictures."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastadv import data
from fastadv.data.pictures import read

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "training")]
bench_step, photographs, zeros = map(importlib.import_module, ("bench_step", "photographs", "zeros"))

SECONDS = {"F + Bx": 2.0, "F + B": 3.0, "optimiser": 0.5}


def test_a_step_costs_its_gradients_of_the_images_and_one_update():
    assert bench_step.expected(SECONDS, 0) == 3.5
    assert bench_step.expected(SECONDS, 7) == 17.5
    steps = {"none": 3.5, "fgsm": 5.5, "fgsm-rs": 11.0, "pgd": 22.0}
    found = bench_step.figures(SECONDS | steps)
    assert found["over_parts"] == pytest.approx({"none": 1, "fgsm": 1, "fgsm-rs": 2, "pgd": 22 / 17.5})
    assert found["fgsm_over_standard"] == pytest.approx(5.5 / 3.5)
    assert found["pgd_over_fgsm"] == pytest.approx(4)


class Upper(nn.Module):
    """Sees the upper half of an image, so that the gradient of the lower one is 0."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3 * 2 * 4, 3), []

    def forward(self, x):
        if self.layer.weight.requires_grad:  # an update: the attack's passes freeze the model
            self.seen.append(x.detach().clone())
        return self.layer(x[:, :, :2].flatten(1))


@pytest.mark.parametrize(("rule", "sign"), [("negative", -1), ("positive", 1)])
def test_gradients_of_zero_are_counted_and_become_the_sign_of_the_rule(rule, sign, monkeypatch):
    monkeypatch.setattr(zeros, "SETTINGS", zeros.SETTINGS | {"epochs": 2, "batch_size": 60, "lr": 1e-9})
    data = SimpleNamespace(x_train=torch.rand(60, 3, 4, 4), y_train=torch.arange(60) % 3)
    data.x_test, data.y_test = data.x_train[:9], data.y_train[:9]
    model = Upper()
    found = zeros.trained(model, data, rule)
    assert (found["rule"], found["zeros"], found["samples_of_zeros"]) == (rule, 0.5, 0.0)
    lower = [x[:, :, 2:] for x in model.seen if len(x) == 60]
    moved = (sign * zeros.EPS + data.x_train[:, :, 2:]).clamp(0, 1)
    assert any(x.sum().item() == pytest.approx(moved.sum().item(), abs=1e-3) for x in lower)


def test_the_pictures_are_the_places_they_say_and_test_crops_lie_beside_the_training_crops(tmp_path):
    photographs.main([str(tmp_path), "--train=31", "--test=7", f"--seed={np.random.default_rng().integers(1000)}"])
    sources, edges, sideways = photographs.pictures(), {}, 0
    for path in tmp_path.glob("*/*/*"):
        y, x = map(int, path.stem.split("-"))
        part, name = path.parts[-3:-1]
        picture = read(path)
        crop = sources[name].crop((x, y, x + 96, y + 96))
        if picture.convert("L").convert("RGB").tobytes() == picture.tobytes():
            crop = crop.convert("L")
        difference = np.abs(np.asarray(picture, float) - np.asarray(crop.convert("RGB"), float)).mean()
        assert difference < (9 if path.suffix == ".jpg" else 1e-9)
        edges.setdefault((name, part), []).append((x, x + 96))
        sideways += photographs.Image.open(path).getexif().get(photographs.ORIENTATION) == 6
    for name in sources:
        assert max(end for _, end in edges[name, "train"]) <= min(start for start, _ in edges[name, "test"])
    assert sideways == 4 * (6 + 2)
    loaded = data.load(tmp_path, validation=0)
    assert loaded.classes == ("china", "flower", "portrait", "relief")
    assert loaded.x_train.shape == (4 * 31, 3, 96, 96)
    assert loaded.x_test.shape == (4 * 7, 3, 96, 96)
