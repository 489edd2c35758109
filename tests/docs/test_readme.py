"""README's examples run unchanged and do what README says."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import Flatten, Linear, Sequential
from torch.nn.functional import cross_entropy

from fastadv import random_init

README = Path(__file__).resolve().parents[2] / "README.md"


def examples(first):
    """The Python of README that has this line."""
    found = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if first in code]
    assert len(found) == 1
    return found[0]


def test_the_step_is_fgsm_rs():
    x, grad = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    names = {"x": x, "grad_at_start": grad}
    exec(examples("fgsm_step"), names)
    start = random_init(x, 8 / 255, seed=names["seed"])
    assert torch.equal(names["start"], start)
    expected = (x + (start + 10 / 255 * grad.sign() - x).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
    torch.testing.assert_close(names["x_adv"], expected, rtol=0, atol=1e-6)


def test_the_attack_raises_the_loss_and_the_evaluation_counts_robust_images():
    """For a linear network with two classes the worst image is known."""
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    network = Sequential(Flatten(), Linear(3 * 8 * 8, 2))
    images = torch.rand(64, 3, 8, 8)
    labels = network(normalised(images, mean, std)).argmax(1)
    names = {"model": network, "mean": mean.tolist(), "std": std.tolist(), "images": images, "labels": labels}
    exec(examples("evaluate("), names)

    model, adv, report = names["model"], names["adv"], names["report"]
    torch.testing.assert_close(model(images), network(normalised(images, mean, std)))
    assert (adv - images).abs().max() <= 8 / 255 + 1e-7
    assert cross_entropy(model(adv), labels) > cross_entropy(model(images), labels)
    towards_first = (network[1].weight[0] - network[1].weight[1]).view(3, 8, 8).sign()
    direction = towards_first * torch.where(labels == 0, -1, 1).view(-1, 1, 1, 1)
    worst = ((images + eps / 255 * direction).clamp(0, 1) for eps in (4, 8))
    robust = [(network(normalised(each, mean, std)).argmax(1) == labels).float().mean().item() for each in worst]
    assert report["clean_accuracy"] == 1
    assert report["robust_accuracy"] == pytest.approx(robust, abs=1 / 64 + 1e-6)  # rounding may change one image


def normalised(images, mean, std):
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
