"""How many gradients of stored signs are exactly 0, and what the rule for these zeros changes.

    python benchmarks/training/zeros.py DATA/cifar10 benchmarks/results/zeros-cpu.json

A stored sign is one bit, so that a gradient of 0 counts as negative. The embedded backbone is fine-tuned along stored
signs with that rule and with the opposite one, from the same seed; the settings are those of price.yaml.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import facts

from fastadv import models
from fastadv.data import load
from fastadv.evaluation import evaluate
from fastadv.training import Trainer
from fastadv.training.fast.stale import Stale

EPS, SETTINGS = 8 / 255, {"epochs": 8, "batch_size": 128, "lr": 1e-3, "probe": 0}
TRAIN, TEST = 3000, 512
RULES = {"negative": lambda gradient: gradient, "positive": lambda gradient: gradient.where(gradient != 0, 1.0)}


def backbone(classes):
    """The embedded backbone with a new head, always the same."""
    torch.manual_seed(0)
    return models.source("robust-resnet").build(classes, (3, 32, 32)).on_pixels


def trained(model, data, rule):
    """Accuracies after training, the share of zeros, and that of samples whose gradient is 0 everywhere."""
    entries, samples, seen = [], [], Stale.seen

    def counted(self, gradient):
        zero = (gradient == 0).flatten(1)
        entries.append(zero.float().mean(1))
        samples.append(zero.all(1))
        seen(self, RULES[rule](gradient))

    with patch.object(Stale, "seen", counted):
        trainer = Trainer(model, EPS, attack="stale", device="cpu", measure_backbone=False, progress=False, **SETTINGS)
        trainer.fit((data.x_train[:TRAIN], data.y_train[:TRAIN]))
    test = data.x_test[:TEST], data.y_test[:TEST]
    report = evaluate(model, test, attacks=("pma",), eps=EPS, progress=False)
    return {
        "rule": rule,
        "zeros": torch.cat(entries).double().mean().item(),
        "samples_of_zeros": torch.cat(samples).double().mean().item(),
        "clean_accuracy": report["clean_accuracy"],
        "robust_accuracy": report["robust_accuracy"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="a folder of parquet files, images of 32x32")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    data = load(args.data, classes=[range(6, 10)])
    rows = [trained(backbone(data.classes), data, rule) for rule in RULES]
    result = {"part": "zeros", "environment": facts(), "settings": SETTINGS | {"eps": EPS}, "rules": rows}
    result |= {"train_images": TRAIN, "test_images": TEST}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
