"""Attacks under one calling convention, and models to attack, for the tests of attacks."""

import random

import pytest
import torch
from torch import nn

from fastadv.attacks import APGD, APGDL2, BIM, FFGSM, FGSM, MIFGSM, NFGSM, PGD, PGDL2, TPGD, ZeroGrad

EPS = 8 / 255
L2_EPS = 0.5
STEPS = 3
CLASSES = 5
N = 6

ATTACKS = {
    "FGSM": lambda model, **o: FGSM(model, EPS, **o),
    "FFGSM": lambda model, **o: FFGSM(model, EPS, 1.25 * EPS, **o),
    "NFGSM": lambda model, **o: NFGSM(model, EPS, **o),
    "ZeroGrad": lambda model, **o: ZeroGrad(model, EPS, **o),
    "PGD": lambda model, **o: PGD(model, EPS, EPS / 2, STEPS, **o),
    "BIM": lambda model, **o: BIM(model, EPS, EPS / 2, STEPS, **o),
    "MIFGSM": lambda model, **o: MIFGSM(model, EPS, EPS / 2, STEPS, **o),
    "TPGD": lambda model, **o: TPGD(model, EPS, EPS / 2, STEPS, **o),
    "PGDL2": lambda model, **o: PGDL2(model, L2_EPS, L2_EPS / 2, STEPS, **o),
    "APGD": lambda model, **o: APGD(model, EPS, STEPS, **o),
    "APGDL2": lambda model, **o: APGDL2(model, L2_EPS, STEPS, **o),
}
RANDOM = ("FFGSM", "NFGSM", "ZeroGrad", "PGD", "TPGD", "PGDL2", "APGD", "APGDL2")  # they start at random
IN_L2 = ("PGDL2", "APGDL2")
TO_CORNERS = ("APGD",)  # it may reach the same corner of the ball from every start
SINGLE_STEP = ("FGSM", "FFGSM", "NFGSM", "ZeroGrad")
every_attack = pytest.mark.parametrize("name", ATTACKS)
short_steps = pytest.mark.filterwarnings("ignore:steps = .*less than eps")  # where the edge is not wanted


def steps_of(name):
    return 1 if name in SINGLE_STEP else STEPS


def fresh_seed():
    """Set a new seed at every run; pytest shows it where a test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    return seed


class Net(nn.Module):
    """A smooth network: no gradient is zero by accident. It has batch-norm, dropout and a count of its calls."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6 * 4, classes)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        with torch.no_grad():
            self.head.weight.mul_(3)

    def forward(self, x):
        self.hidden += 1
        features = nn.functional.avg_pool2d(self.norm(self.conv(x)).tanh(), 2)
        return self.head(self.drop(features.flatten(1)))


def batch_of(n=N, dtype=torch.float32, classes=CLASSES, size=6):
    return torch.rand(n, 3, size, size, dtype=dtype), torch.randint(classes, (n,))


def distances(name, adv, images):
    """The distance of each sample from its image, in the attack's norm."""
    delta = (adv.double() - images.double()).flatten(1)
    return delta.norm(dim=1) if name in IN_L2 else delta.abs().amax(1)


def radius(name):
    return L2_EPS if name in IN_L2 else 3 * EPS if name == "NFGSM" else EPS


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def batch():
    return batch_of(dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """Run with one thread: such small models are slower with two, above all beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fresh_seed()
    yield
    torch.set_num_threads(threads)
