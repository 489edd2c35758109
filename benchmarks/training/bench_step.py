"""A step of adversarial training beside the sum of its parts, for every method and attack.

An attack with K steps takes K forward passes and K backward passes to the images (F + Bx). The update takes a forward
pass and a backward pass to the parameters that train (F + B), then the optimiser. No step can cost less than the sum.
The ratio to the sum shows what the trainer adds: random starts, steps of the attack, flags that are set and put back.
On a GPU the passes are in bfloat16.

Ratios are of lower quartiles. Other work on the machine only ever adds time, and a few per cent matter here. Minima
would not do: the fastest of a few long readings is never as lucky as the sum of the fastest short ones.
"""

import time
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import timing
import torch
import torch.nn.functional as F
from cases import DEVICE
from networks import example

from fastadv.attacks import create_attack
from fastadv.functional import sample_seeds
from fastadv.nn.frozen import flags_kept
from fastadv.training.methods import trainable
from fastadv.training.step import TrainStep

pytestmark = pytest.mark.benchmark(timer=timing.clock)

EPS = 8 / 255
ATTACKS = {"none": 0, "fgsm": 1, "fgsm-rs": 1, "pgd": 7}  # {attack: how many gradients of the images it computes}
AUTOCAST = torch.bfloat16 if DEVICE.type == "cuda" else None
# With a single thread it is the processor's time, which does not count other work on the machine.
CLOCK = time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def pytest_generate_tests(metafunc):
    quick = float(metafunc.config.getoption("benchmark_max_time")) == 0
    networks, methods = (
        (("vit",), ("full", "lora")) if quick else (("resnet18", "vit"), ("full", "linear", "bias", "lora"))
    )
    metafunc.parametrize("network", networks)
    metafunc.parametrize("method", methods)


def expected(seconds, gradients):
    """The sum of the parts of a step whose attack computes this number of gradients of the images."""
    return gradients * seconds["F + Bx"] + seconds["F + B"] + seconds["optimiser"]


def figures(seconds):
    """The ratios of a report, from the seconds of every step and every part."""
    return {
        "over_parts": {attack: seconds[attack] / expected(seconds, gradients) for attack, gradients in ATTACKS.items()},
        "fgsm_over_standard": seconds["fgsm"] / seconds["none"],
        "pgd_over_fgsm": seconds["pgd"] / seconds["fgsm"],
    }


def reading(call, prepared=nullcontext):
    """A function that times one call and returns its seconds, without the time to set up and to clean up."""

    def now():
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return CLOCK()

    def read():
        with prepared():
            start = now()
            call()
            return now() - start

    return read


def parts(model, optimizer, images, labels):
    """{name of a part, written by hand: a function that times it}."""

    @contextmanager
    def attacked():
        with flags_kept(model):
            model.eval().requires_grad_(False)
            yield

    @contextmanager
    def without_gradients():
        yield
        optimizer.zero_grad()

    def with_gradients():  # a backward pass leaves them outside of the caches
        loss(images).backward()
        return nullcontext()

    def loss(x):
        with torch.autocast(DEVICE.type, AUTOCAST) if AUTOCAST else nullcontext():
            return F.cross_entropy(model(x), labels)

    def to_images():
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(loss(leaf), leaf)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return {
        "F + Bx": reading(to_images, attacked),
        "F + B": reading(lambda: loss(images).backward(), without_gradients),
        "optimiser": reading(update, with_gradients),
    }


def steps(model, optimizer, images, labels):
    """{name of an attack: a function that times a whole step}."""
    seeds = sample_seeds(0, torch.arange(len(images), device=DEVICE))

    def step(name):
        attack = None if name == "none" else create_attack(name, model, EPS, autocast=AUTOCAST)
        return TrainStep(model, attack, optimizer, autocast=AUTOCAST)

    def call(step):
        step.gradients(images, labels, seeds)
        step.apply()

    return {name: reading(partial(call, step(name))) for name in ATTACKS}


def test_training_step(network, method, measure):
    model, images, labels = example(network, measure.quick)
    if DEVICE.type == "cuda":
        images, labels = images.repeat(8, 1, 1, 1), labels.repeat(8)
    else:
        images, labels = images[:8], labels[:8]  # small, so that a fixed cost shows
    with trainable(model, method, example=images) as tuning:
        optimizer = torch.optim.AdamW([parameter for _, parameter in tuning.parameters], 1e-5)
        given = (model, optimizer, images, labels)
        seconds = measure(parts(*given) | steps(*given), first="fgsm")
    quartiles = {name: float(np.quantile(values, 0.25)) for name, values in seconds.items()}
    measure.record(
        kind="training cost",
        network=network,
        method=method,
        batch=len(images),
        backend=DEVICE.type,
        trainable=tuning.trainable,
        quartile_seconds=quartiles,
        median_seconds=timing.medians(seconds),
        relative_iqr=timing.spreads(seconds),
        **figures(quartiles),
    )
