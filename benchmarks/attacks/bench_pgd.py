"""PGD-10 beside torchattacks and a loop that calls `backward()`: time, and the memory that autograd holds."""

import time

import pytest
import timing
import torch
from cases import DEVICE
from contenders import compiled, contenders
from networks import NETWORKS, example

pytestmark = pytest.mark.benchmark(timer=timing.clock)

STEPS = 10


def reading(call, images, labels):
    def read():
        start = time.perf_counter()
        call(images, labels)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return read


def pytest_generate_tests(metafunc):
    quick = float(metafunc.config.getoption("benchmark_max_time")) == 0
    compiles = metafunc.function is test_pgd_compiled
    metafunc.parametrize("network", ("conv",) if quick and compiles else NETWORKS)


def test_pgd(network, measure):
    compare(network, measure, contenders)


def test_pgd_compiled(network, measure):
    compare(network, measure, compiled)


def compare(network, measure, contenders):
    model, images, labels = example(network, measure.quick)
    steps = 2 if measure.quick else STEPS
    readings = {name: reading(attack, images, labels) for name, attack in contenders(model, steps, DEVICE).items()}
    for read in readings.values():
        read()
    seconds = measure(readings, first="fastadv")
    median = timing.medians(seconds)
    best = min((name for name in median if name.startswith("fastadv")), key=median.get)
    measure.record(
        kind="attack",
        attack=f"PGD-{steps}",
        network=network,
        batch=len(images),
        backend=DEVICE.type,
        median_seconds=median,
        relative_iqr=timing.spreads(seconds),
        best=best,
        speedup_over={name: value / median["fastadv"] for name, value in median.items()},
        best_speedup_over={name: value / median[best] for name, value in median.items()},
    )


class Held:
    """Measures the most bytes that autograd holds for a backward pass, each storage once, with and without weights."""

    def __init__(self, model):
        self.weights = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()
        }
        self.now, self.activations = {}, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.activations = max(self.activations, sum(self.now.values()))
        return t


def test_memory(network, measure):
    """Measures one step of each contender: more steps hold no more memory."""
    model, images, labels = example(network, measure.quick)
    held, readings = {}, {}
    for name, attack in contenders(model, 1, DEVICE).items():
        with Held(model) as counted:
            attack(images, labels)
        weights = sum(counted.weights.values())
        held[name] = {"activations": counted.activations, "with_weights": counted.activations + weights}
        readings[name] = reading(attack, images, labels)
    seconds = measure(readings, first="fastadv")
    measure.record(
        kind="memory",
        network=network,
        batch=len(images),
        backend=DEVICE.type,
        held_bytes=held,
        median_seconds=timing.medians(seconds),
    )
