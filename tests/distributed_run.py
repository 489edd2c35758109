"""Training as one of several processes, or as the only one: run by test_distributed.py as a program.

    python -m torch.distributed.run --nproc_per_node 2 distributed_run.py compare FOLDER
    python distributed_run.py compare FOLDER
    ... distributed_run.py interrupted FOLDER [STEPS]

`compare` trains every case of CASES and writes CASE-PROCESSES-RANK.pt to FOLDER: weights, and what the records say.
`interrupted` trains in FOLDER; the last process gets a SIGTERM of its own after STEPS steps.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from fastadv.training import Trainer
from fastadv.training.step import Step

torch.set_num_threads(1)
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def images(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    bright = nn.functional.one_hot(labels, 3)[:, :, None, None]
    return (0.4 * bright + 0.6 * torch.rand(count, 3, 8, 8, generator=generator)).to(dtype), labels


def network(norm, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), norm(), nn.SiLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(128, 3)]
    model = nn.Sequential(*layers).to(dtype)
    for buffer in model.buffers():  # statistics that are not those of any batch
        buffer.copy_(torch.rand_like(buffer, dtype=torch.float64) + 0.5)
    return model


def layer_norm():
    return nn.GroupNorm(1, 8)


def batch_norm():
    return nn.BatchNorm2d(8)


# Ten steps an epoch and five epochs; 157 images make batches of 15 and 16, which two processes cut into 7, 8 and 8, 8.
CASES = {
    "full": (layer_norm, torch.float64, {"method": "full"}),
    "bias": (batch_norm, torch.float64, {"method": "bias", "accumulate": 2, "clip": 0.5}),
    "linear": (batch_norm, torch.float64, {"method": "linear", "optimizer": "sgd", "clean_weight": 0.3}),
    "head start": (batch_norm, torch.float64, {"method": "bias", "head_start": 2, "epochs": 3, "average": 0.9}),
    "float32": (layer_norm, torch.float32, {"method": "full"}),
}


def train(norm, dtype, changes, **options):
    model = network(norm, dtype)
    settings = {"attack": "fgsm-rs", "epochs": 5, "batch_size": 16, "lr": 1e-2, "augment": True, "eval_every": 2}
    settings |= {"probe": 32, "measure_backbone": False, "progress": False, **changes}
    trainer = Trainer(model, 16 / 255, **settings, **options)
    return model, trainer.fit(images(157, 1, dtype), images(33, 2, dtype))


def compare(folder):
    for name, case in CASES.items():
        model, records = train(*case)
        result = {"weights": model.state_dict(), "records": records, "processes": PROCESSES}
        torch.save(result, folder / f"{name}-{PROCESSES}-{RANK}.pt")
    # Batch-norm in train mode: each process has other statistics, and all must do the same nevertheless.
    model, records = train(batch_norm, torch.float32, {"method": "full", "on_overfitting": "stop"}, **eager(folder))
    torch.save({"records": records}, folder / f"statistics-{PROCESSES}-{RANK}.pt")


def eager(folder):
    """A checkpoint is always due, by the clock of the first process alone."""
    return {"folder": folder / f"statistics-{PROCESSES}", "checkpoint_s": 0.0 if RANK == 0 else 1e9}


def interrupted(folder, steps):
    taken, apply = [], Step.apply

    def counted(step):
        apply(step)
        taken.append(None)
        if len(taken) == steps and RANK == PROCESSES - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Step.apply = counted
    try:
        train(*CASES["full"], folder=folder / "run", resume=True)
    finally:
        (folder / f"steps-{PROCESSES}-{RANK}").write_text(str(len(taken)))


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        compare(Path(sys.argv[2]))
    else:
        interrupted(Path(sys.argv[2]), int(sys.argv[3]))
