"""Attacks as captured CUDA graphs: the eager attack's bits from the same seeds, fresh noise at each replay."""

import gc

import pytest
import torch
from gpus import needs_gpu
from torch import nn

from fastadv.attacks import FFGSM, FGSM, MIFGSM, NFGSM, PGD, Normalized

pytestmark = needs_gpu

EPS = 8 / 255
ATTACKS = {"fgsm": FGSM, "ffgsm": FFGSM, "nfgsm": NFGSM, "pgd": PGD, "mifgsm": MIFGSM}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return body.cuda().eval()


def batch(n=6):
    return torch.rand(n, 3, 8, 8, device="cuda"), torch.arange(n, device="cuda") % 5


@pytest.fixture(autouse=True)
def one_order():
    """Use the same kernels with and without a graph: only then are the bits equal."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@every_attack
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
def test_graph_equals_eager_bit_for_bit(model, attack, normalized):
    attacked = Normalized(model, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)) if normalized else model
    eager, graph = attack(attacked, EPS), attack(attacked, EPS, graph=True)
    for n, seed in ((6, 1), (6, 2), (4, 1), (6, torch.arange(6, device="cuda"))):
        images, labels = batch(n)
        assert torch.equal(graph(images, labels, seed=seed), eager(images, labels, seed=seed))


@pytest.mark.parametrize("attack", [FFGSM, PGD], ids=["ffgsm", "pgd"])
def test_noise_is_fresh_at_each_replay(model, attack):
    images, labels = batch()
    graph = attack(model, EPS, graph=True)
    first = graph(images, labels)
    assert not torch.equal(first, graph(images, labels))
    torch.manual_seed(5)
    again = graph(images, labels)
    torch.manual_seed(5)
    assert torch.equal(again, graph(images, labels))


def test_graph_sees_new_weights(model):
    images, labels = batch()
    graph = PGD(model, EPS, graph=True)
    graph(images, labels, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert torch.equal(graph(images, labels, seed=1), PGD(model, EPS)(images, labels, seed=1))


def test_buffers_that_a_graph_writes_to_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, 5)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return self.head(x.flatten(1))

    counting = Counting().cuda()
    graph = PGD(counting, EPS, graph=True)
    for _ in range(2):  # the first call captures, the second only replays
        graph(*batch())
        assert int(counting.calls) == 0


@every_attack
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_host_waits_for_the_device_only_at_the_end(model, attack, graph, monkeypatch):
    images, labels = batch()
    attacked = attack(model, EPS, graph=graph)
    attacked(images, labels, seed=1)
    monkeypatch.setattr(attacked, "_report", lambda: None)  # its one read comes after the loop
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attacked(images, labels, seed=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_garbage_does_not_end_a_capture(model):
    """An attack with a graph is in a reference cycle; the garbage collector must not free a graph during a capture."""
    images, labels = batch()
    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for _ in range(4):
            PGD(model, EPS, graph=True)(images, labels)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
