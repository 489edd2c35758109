"""Small runs whose files are kept in old_files, by the version of fastadv that made them.

    python old_run.py FOLDER

writes the files of the installed fastadv to FOLDER; test_old_files.py goes on from them. Images and weights are
formulas, so that they do not depend on the random numbers of a PyTorch version.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import PIL.Image
import safetensors.torch
import torch
from torch import nn

from fastadv import cli, models
from fastadv.data.splits import Split
from fastadv.data.trained import TrainedOn
from fastadv.evaluation import evaluate, queue
from fastadv.evaluation import run as evaluation_run
from fastadv.preprocessing import Preprocessing
from fastadv.training import Trainer, updates

CLASSES = ("cat", "dog", "emu")
RUNS = {
    "adamw": {"method": "full", "ema_decay": 0.9, "lp_ft": 1, "probe": 16, "max_grad_norm": 1.0, "warmup": 2},
    "sgd": {"method": "full", "optimizer": "sgd", "probe": 0, "eval_every": 2, "augment": True},
}
STEPS = {"adamw": 9, "sgd": 7}  # the steps before a run is cut; an epoch has four
DIGESTS = 7919 * torch.arange(24)
EPS = 8 / 255


class Cut(Exception):
    """Ends a run early."""


def images(count, shift=0):
    """(images, labels): uint8 (count, 3, 8, 8); each image is brighter in the channel of its label."""
    labels = torch.arange(count) % 3
    places = torch.arange(count * 192).reshape(count, 3, 8, 8) + shift
    bright = 90 * nn.functional.one_hot(labels, 3)[:, :, None, None]
    return ((places**2 // 7 + 13 * places) % 160 + bright).to(torch.uint8), labels


def filled(module):
    """The network with weights that are a formula of their positions."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_(torch.sin(1.7 * places + number) * 0.3 + (0.7 if parameter.ndim == 1 else 0))
    return module


def network():
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    made = filled(nn.Sequential(*layers))
    made.fastadv_key = "the network of old_run"  # the attributes of modules differ between versions of PyTorch
    return made


def train(name, folder=None, steps=None, epochs=3, **changes):
    """Weights and records of a run, which raises `Cut` after `steps` steps."""
    model, taken, batch = network(), [], updates.Updates.take

    def cut(self, *arguments):
        if len(taken) == steps:
            raise Cut
        taken.append(None)
        return batch(self, *arguments)

    options = {"attack": "fgsm-rs", "batch_size": 6, "lr": 0.02, "progress": False, "measure_backbone": False}
    options |= {"device": "cpu", "folder": folder, "resume": True, "checkpoint_s": 0.0, **RUNS[name], **changes}
    with patch.object(updates.Updates, "take", cut):
        records = Trainer(model, EPS, epochs=epochs, **options).fit(images(24), images(9, 5))
    return model.state_dict(), records


def poisoned(folder):
    """A run whose third loss is NaN."""
    calls = []

    def attack(x, y):
        calls.append(None)
        return x * (float("nan") if len(calls) == 3 else 1)

    Trainer(network(), EPS, attack=attack, batch_size=6, folder=folder, probe=0, progress=False, device="cpu").fit(
        images(24)
    )


def model():
    made = models.source("resnet?widths=[4,4]&blocks=1").build(CLASSES, (3, 8, 8))
    made.preprocessing = Preprocessing((8, 8), mean=(0.5,), std=(0.25,))
    made.trained_on = (TrainedOn.of(SimpleNamespace(split=Split(), digests={"train": DIGESTS})),)
    filled(made.network)
    level = logits(made).mean(0)  # without this shift the model predicts one class for all images
    with torch.no_grad():
        list(made.network.parameters())[-1].sub_(level.mul(100).round().div(100))
    return made


def logits(made):
    with torch.no_grad():
        return made.on_pixels.eval()(images(9, 5)[0] / 255)


def judged(made, path, iterations=None):
    """The report of an evaluation, which raises `Cut` after `iterations` iterations."""
    taken, iterate = [], queue.Queue.iterate

    def cut(self):
        if len(taken) == iterations:
            raise Cut
        taken.append(None)
        return iterate(self)

    with patch.object(queue.Queue, "iterate", cut), patch.object(evaluation_run, "SAVE_EVERY", 0.0):
        pixels = made.on_pixels.eval()
        return evaluate(pixels, images(24), ["fgsm", "pgd"], eps=EPS / 4, batch_size=3, state=path, progress=False)


def pictures(folder):
    folder.mkdir()
    for number, image in enumerate(images(3)[0]):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def predict(shown, weights, path):
    cli.main(["predict", str(shown), "--model", str(weights), "--device", "cpu", "--out", str(path)])


def main(folder):
    for name in RUNS:
        try:
            train(name, folder / name, STEPS[name])
        except Cut:
            weights, _ = train(name)
            safetensors.torch.save_file(weights, folder / f"{name}.safetensors")
    try:
        poisoned(folder)
    except FloatingPointError:
        shutil.rmtree(folder / "state")
        (folder / "log.jsonl").unlink()
    models.save(model(), folder / "model.safetensors")
    safetensors.torch.save_file({"logits": logits(model())}, folder / "logits.safetensors")
    try:
        judged(model(), folder / "evaluation.safetensors", 14)
    except Cut:
        (folder / "report.json").write_text(json.dumps(judged(model(), None)) + "\n")
    shown = pictures(folder / "pictures")
    predict(shown, folder / "model.safetensors", folder / "predictions.csv")
    shutil.rmtree(shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
