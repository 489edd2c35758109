"""The training benchmarks: the predicted cost of a step, and the crops of their pictures."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from fastadv import data
from fastadv.data.pictures import read

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "training")]
bench_step, photographs = map(importlib.import_module, ("bench_step", "photographs"))

SECONDS = {"F + Bx": 2.0, "F + B": 3.0, "optimiser": 0.5}


def test_a_step_costs_its_gradients_of_the_images_and_one_update():
    assert bench_step.expected(SECONDS, 0) == 3.5
    assert bench_step.expected(SECONDS, 7) == 17.5
    steps = {"none": 3.5, "fgsm": 5.5, "fgsm-rs": 11.0, "pgd": 22.0}
    found = bench_step.figures(SECONDS | steps)
    assert found["over_parts"] == pytest.approx({"none": 1, "fgsm": 1, "fgsm-rs": 2, "pgd": 22 / 17.5})
    assert found["fgsm_over_standard"] == pytest.approx(5.5 / 3.5)
    assert found["pgd_over_fgsm"] == pytest.approx(4)


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
