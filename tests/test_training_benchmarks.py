"""The arithmetic of the training benchmarks: what a step should cost, means over seeds, resumption, the pictures."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv import data, models
from fastadv.attacks import PGD
from fastadv.data.pictures import read
from fastadv.evaluation import evaluate, robust_accuracy
from fastadv.training import Trainer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "training")]
bench_step, transfer, photographs = map(importlib.import_module, ("bench_step", "transfer", "photographs"))

SECONDS = {"F + Bx": 2.0, "F + B": 3.0, "optimiser": 0.5}


def test_a_step_costs_its_gradients_of_the_images_and_one_update():
    assert bench_step.expected(SECONDS, 0) == 3.5
    assert bench_step.expected(SECONDS, 7) == 17.5
    steps = {"none": 3.5, "fgsm": 5.5, "fgsm-rs": 11.0, "pgd": 22.0}
    found = bench_step.figures(SECONDS | steps)
    assert found["over_parts"] == pytest.approx({"none": 1, "fgsm": 1, "fgsm-rs": 2, "pgd": 22 / 17.5})
    assert found["fgsm_over_standard"] == pytest.approx(5.5 / 3.5)
    assert found["pgd_over_fgsm"] == pytest.approx(4)


def rows(rng, method, attack, count=3):
    facts = {"method": method, "attack": attack, "trainable": 7, "alarms": 1}
    measured = ("clean_accuracy", "robust_accuracy", "train_s")
    return [facts | {"seed": seed} | {name: rng.random() for name in measured} for seed in range(count)]


def test_the_table_has_means_and_spreads_over_seeds():
    rng = np.random.default_rng()
    fgsm, pgd = (rows(rng, "linear", attack) for attack in ("fgsm", "pgd"))
    # As they come: seed after seed, and one run of another method.
    mixed = [row for pair in zip(fgsm, pgd, strict=True) for row in pair] + rows(rng, "full", "pgd", count=1)
    found = {(row["method"], row["attack"]): row for row in transfer.summary(mixed)}
    assert found.keys() == {("linear", "fgsm"), ("linear", "pgd"), ("full", "pgd")}
    for name in ("clean_accuracy", "robust_accuracy"):
        values = [row[name] for row in pgd]
        want = {"mean": sum(values) / 3, "spread": statistics.stdev(values)}
        assert found["linear", "pgd"][name] == pytest.approx(want)
    times = [sum(row["train_s"] for row in group) for group in (fgsm, pgd)]
    assert found["linear", "pgd"]["time_over_fgsm"] == pytest.approx(times[1] / times[0])
    assert found["linear", "fgsm"]["alarms"] == 3
    alone = found["full", "pgd"]
    assert alone["clean_accuracy"]["spread"] is None
    assert alone["time_over_fgsm"] is None


RUN = ("--data=digits", "--model=mlp", "--classes=5-9", "--attacks=fgsm", "--eps=32", "--epochs=2", "--device=cpu")
RUN += ("--train-limit=64", "--val-limit=32", "--test-limit=40")


def test_finished_runs_are_kept_and_the_others_follow(tmp_path, capsys):
    out = tmp_path / "runs.json"
    transfer.main([*RUN, "--methods=linear", "--seeds=1", f"--out={out}"])
    (first,) = json.loads(out.read_text())["rows"]
    transfer.main([*RUN, "--methods=linear,full", "--seeds=2", f"--out={out}"])
    found = json.loads(out.read_text())
    # With its own seconds: it was not trained again.
    assert found["rows"][0] == first
    runs = [(row["method"], row["attack"], row["seed"]) for row in found["rows"]]
    assert runs == [("linear", "fgsm", 0), ("full", "fgsm", 0), ("linear", "fgsm", 1), ("full", "fgsm", 1)]
    assert [row["trainable"] for row in found["rows"]] == 2 * [256 * 5 + 5, (64 + 1 + 256 + 1) * 256 + 256 * 5 + 5]
    assert "linear, fgsm, seed 0: done already" in capsys.readouterr().out
    assert found["summary"] == transfer.summary(found["rows"])
    with pytest.raises(SystemExit):
        transfer.main([*RUN, "--epochs=3", f"--out={out}"])
    assert "has runs with another epochs: choose another --out" in capsys.readouterr().err
    assert json.loads(out.read_text()) == found


def test_a_run_is_the_trainers_on_the_limited_images():
    args = transfer.parser().parse_args([*RUN, "--test-limit=200", "--lr-linear=0.03", "--autoattack=30", "--out=x"])
    digits, source = data.load("digits", classes=[5, 6, 7, 8, 9]), models.source("mlp")
    row = transfer.run(args, source, digits, "linear", "pgd", seed=3)

    def first(part, count):
        return [t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))[:count]] for t in part]

    torch.manual_seed(3)
    model = source.build(digits.classes, digits.shape).on_pixels
    settings = {"attack": "pgd", "method": "linear", "epochs": 2, "batch_size": 128, "lr": 0.03, "seed": 3}
    test = first(digits.test, 200)
    Trainer(model, 32 / 255, device="cpu", **settings).fit(first(digits.train, 64), first(digits.val, 32))
    found = robust_accuracy(model, test, PGD(model, 32 / 255, 8 / 255, 10), seed=3)
    assert {name: row[name] for name in found} == found
    few = tuple(part[:30] for part in test)
    names = {"PGD-10": "pgd-10", "PMA": "pma", "AutoAttack": "autoattack"}
    left = torch.ones(30, dtype=torch.bool)
    assert row["judged"]["accuracy"]["clean"] == evaluate(model, few, "fgsm", eps=32 / 255)["clean_accuracy"]
    for name, attack in names.items():
        left &= torch.tensor(evaluate(model, few, attack, eps=32 / 255, seed=3)["budgets"][0]["robust"])
        assert row["judged"]["accuracy"][name] == left.double().mean()
    assert row["judged"]["verdicts"].count("robust") == left.sum()


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
