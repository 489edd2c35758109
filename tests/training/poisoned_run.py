"""Training runs with a value that is not finite. test_finite.py imports this file, and also runs it as a program.

    python -m torch.distributed.run --nproc_per_node 2 poisoned_run.py FOLDER

has a run for each of KINDS and poisons the second process only. Each process writes to KIND-RANK.pt in FOLDER where the
run ended, and its weights.
"""

import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from fitted import colours
from torch import nn

from fastadv.training import Trainer, TrainStep

KINDS = ("gradient", "loss", "statistics")
RANK = int(os.environ.get("RANK", 0))


def images(count, seed=1):
    return colours(count, seed, dtype=torch.float32)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


def train(model, folder, resume=False, **changes):
    options = {"attack": "fgsm-rs", "epochs": 3, "batch_size": 6, "lr": 1e-2, "probe": 0, "progress": False}
    options |= {"measure_backbone": False, "checkpoint_s": 0.0, "device": "cpu", **changes}
    Trainer(model, 8 / 255, folder=folder, resume=resume, **options).fit(images(24), images(9, 2))


@contextmanager
def poisoned(call, kind, value=float("nan")):
    """Put `value` into the gradient, the loss or the statistics after call number `call` of `TrainStep.gradients`."""
    calls, gradients = [], TrainStep.gradients

    def poisonous(step, *arguments, **options):
        result = gradients(step, *arguments, **options)
        if len(calls) == call:
            if kind == "gradient":
                [p for p in step.model.parameters() if p.grad is not None][-1].grad.view(-1)[0] = value
            elif kind == "statistics":
                step.model[1].running_var[2] = value
            else:
                result[0] = value
        calls.append(None)
        return result

    with patch.object(TrainStep, "gradients", poisonous):
        yield


def main(folder):
    for kind in KINDS:
        model = network()
        try:
            with poisoned(5 if RANK == 1 else None, kind):
                train(model, folder / kind, device=None)
        except FloatingPointError as error:
            where = re.search(r"epoch \d, batch \d", str(error))[0]
            torch.save({"where": where, "weights": model.state_dict()}, folder / f"{kind}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
