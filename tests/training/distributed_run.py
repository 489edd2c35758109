"""Training as one of two processes. test_distributed.py runs it as a program, and itself trains as a single process.

    python -m torch.distributed.run --nproc_per_node 2 distributed_run.py compare FOLDER
    python -m torch.distributed.run --nproc_per_node 2 distributed_run.py interrupted FOLDER STEPS

`compare` trains every case of CASES, and then one in which the processes see different things; it writes CASE-RANK.pt
to FOLDER. `interrupted` trains in FOLDER until the last process gets a SIGTERM, after STEPS steps;
steps-RANK in FOLDER has a byte for each step.
"""

import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from fitted import colours
from torch import nn

from fastadv.training import Monitor, Trainer, judge, stages
from fastadv.training.step import TrainStep

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", 0))


def network(norm, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), norm(), nn.SiLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(128, 3)]
    model = nn.Sequential(*layers).to(dtype)
    for buffer in model.buffers():  # no batch has these statistics
        buffer.copy_(torch.rand_like(buffer, dtype=torch.float64) + 0.5)
    return model


def layer_norm():
    return nn.GroupNorm(1, 8)


def batch_norm():
    return nn.BatchNorm2d(8)


def with_a_token():
    """A model with a token for masked images, as some transformers have; the training here does not use it."""
    layer = layer_norm()
    layer.mask_token = nn.Parameter(torch.ones(4))
    return layer


# Ten steps an epoch and five epochs; 157 images make batches of 15 and 16, which two processes cut into 7, 8 and 8, 8.
CASES = {
    "full": (layer_norm, torch.float64, {"method": "full"}),
    "bias": (batch_norm, torch.float64, {"method": "bias", "grad_accum_steps": 2, "max_grad_norm": 0.5}),
    "linear": (batch_norm, torch.float64, {"method": "linear", "optimizer": "sgd", "clean_weight": 0.3}),
    "lp-ft": (batch_norm, torch.float64, {"method": "bias", "lp_ft": 2, "epochs": 3, "ema_decay": 0.9}),
    "unused": (with_a_token, torch.float64, {"method": "full", "grad_accum_steps": 2}),
    "signs": (layer_norm, torch.float64, {"attack": "stale", "refresh": 4, "grad_accum_steps": 2}),
    "signs by price": (batch_norm, torch.float64, {"attack": "stale", "price": 1.5, "method": "bias"}),
    "float32": (layer_norm, torch.float32, {"method": "full"}),
}


def train(norm, dtype, changes, **options):
    model = network(norm, dtype)
    settings = {"attack": "fgsm-rs", "epochs": 5, "batch_size": 16, "lr": 1e-2, "augment": True, "eval_every": 2}
    settings |= {"probe": 32, "measure_backbone": False, "progress": False, **changes}
    trainer = Trainer(model, 16 / 255, **settings, **options)
    with judged_images(model) as judged:
        records = trainer.fit(colours(157, 1, dtype=dtype), colours(33, 2, dtype=dtype))
    return model, records, len(judged)


@contextmanager
def judged_images(model):
    """A list that gets an entry for each image of a forward pass in an evaluation."""
    judged, before = [], (judge.robust_accuracy, judge.evaluate)

    def counted(function):
        def call(*arguments, **options):
            hook = model.register_forward_pre_hook(lambda module, args: judged.extend([None] * len(args[0])))
            try:
                return function(*arguments, **options)
            finally:
                hook.remove()

        return call

    judge.robust_accuracy, judge.evaluate = map(counted, before)
    try:
        yield judged
    finally:
        judge.robust_accuracy, judge.evaluate = before


def compare(folder):
    for name, case in CASES.items():
        shared = {"folder": folder / f"run-{name}"} if case[2].get("attack") == "stale" else {}
        model, records, judged = train(*case, **shared)
        save(folder, name, {"weights": model.state_dict(), "records": records, "judged": judged})
    stages.Monitor = OneSided
    options = {"folder": folder / "run", "checkpoint_s": 0.0 if RANK == 0 else 1e9}
    settings = {"method": "full", "on_catastrophic_overfitting": "stop"}
    _, records, _ = train(batch_norm, torch.float32, settings, **options)
    save(folder, "disagreement", {"records": records})


class OneSided(Monitor):
    """A monitor that raises an alarm at the third check, in the first process only."""

    checks = 0

    def check(self):
        self.checks += 1
        return replace(super().check(), alarm="fire" if self.checks == 3 and RANK == 0 else None)


def save(folder, name, result):
    torch.save(result, folder / f"{name}-{RANK}.pt")


def interrupted(folder, steps):
    apply, path = TrainStep.apply, folder / f"steps-{RANK}"

    def counted(step):
        apply(step)
        with open(path, "ab") as file:
            file.write(b".")
        if path.stat().st_size == steps and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainStep.apply = counted
    train(*CASES["full"], folder=folder)


if __name__ == "__main__":
    program, folder, *steps = sys.argv[1:]
    (compare if program == "compare" else interrupted)(Path(folder), *map(int, steps))
