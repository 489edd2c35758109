"""A device that is not here is refused before any data is read."""

import pytest
import torch

from fastadv.devices import devices, present
from fastadv.evaluation import AutoAttack, evaluate, robust_accuracy
from fastadv.training import Trainer

MODEL = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
ABSENT = "cuda:63"


def unread():
    raise AssertionError("data was read")
    yield


USES = {
    "evaluate": lambda device: evaluate(MODEL, unread(), "fgsm", device=device),
    "robust_accuracy": lambda device: robust_accuracy(MODEL, unread(), "fgsm", device=device),
    "Trainer": lambda device: Trainer(MODEL, 0.1, device=device),
    "AutoAttack": lambda device: AutoAttack(MODEL, device=device).run_standard_evaluation(
        torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", [ABSENT, torch.device(ABSENT), "gpu"], ids=str)
def test_a_device_that_is_not_here_is_refused_first(use, device):
    with pytest.raises(ValueError, match=rf"device '{device}'.*; here are cpu"):
        USES[use](device)


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
@pytest.mark.parametrize("use", USES)
def test_of_a_cuda_device_it_is_said_why(use):
    with pytest.raises(ValueError, match="built without CUDA"):
        USES[use]("cuda")


def test_the_devices_that_are_here_pass():
    for name in devices():
        assert present(name) == present(torch.device(name)) == torch.device(name)
    assert present("cpu:0").type == "cpu"
