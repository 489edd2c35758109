"""Where an adversarial training step's time goes: the attack's passes, the step kernel, the update's passes, the rest.

FGSM-RS in bfloat16 where there is a GPU, as the trainer does it, its parts one after the other between two clocks.
"""

import contextlib
import time

import pytest
import timing
import torch
import torch.nn.functional as F
from bench_pgd import attacked
from cases import DEVICE

import fastadv

pytestmark = pytest.mark.benchmark(timer=timing.clock)

EPS, ALPHA = 8 / 255, 10 / 255


class Stopwatch:
    """Seconds between its laps: of the device where there is one."""

    def __init__(self):
        self.marks = []

    def lap(self, name):
        if DEVICE.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))

    def seconds(self):
        if DEVICE.type == "cpu":
            return {name: now - before for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False)}
        torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: before.elapsed_time(now) * 1e-3 for (_, before), (name, now) in pairs}


def autocast():
    return torch.autocast("cuda", torch.bfloat16) if DEVICE.type == "cuda" else contextlib.nullcontext()


def training_step(model, optimizer, images, labels, seed):
    """One step; the seconds of its parts."""
    watch = Stopwatch()
    watch.lap("start")
    start = fastadv.random_init(images, EPS, seed=seed).requires_grad_()
    watch.lap("random start")
    model.requires_grad_(False)
    with autocast():
        loss = F.cross_entropy(model(start), labels, reduction="sum")
    watch.lap("attack: forward")
    (grad,) = torch.autograd.grad(loss, start)
    watch.lap("attack: backward")
    x_adv = fastadv.fgsm_step(images, grad, EPS, alpha=ALPHA, noise=EPS, seed=seed)
    watch.lap("step kernel")
    model.requires_grad_(True)
    with autocast():
        loss = F.cross_entropy(model(x_adv), labels)
    watch.lap("update: forward")
    loss.backward()
    watch.lap("update: backward")
    optimizer.step()
    optimizer.zero_grad()
    watch.lap("update")
    return watch.seconds()


@pytest.mark.parametrize("network", ["resnet18"])
def test_training_step(network, measure):
    model, images, labels = attacked(network, measure.quick)
    if DEVICE.type == "cuda":
        images, labels = images.repeat(8, 1, 1, 1), labels.repeat(8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    steps = [training_step(model, optimizer, images, labels, seed) for seed in range(3 if measure.quick else 20)]
    parts = {name: [step[name] for step in steps[1:]] for name in steps[0]}
    total = [sum(step.values()) for step in steps[1:]]
    readings = iter(total * 1000)
    measure({"step": lambda: next(readings)}, first="step")
    median = timing.medians(parts)
    measure.record(
        kind="training",
        network=network,
        batch=len(images),
        backend=DEVICE.type,
        median_seconds=median,
        relative_iqr=timing.spreads({"step": total}),
        kernels_share=(median["step kernel"] + median["random start"]) / sum(median.values()),
    )
