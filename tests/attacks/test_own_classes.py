"""Attack classes of others: the model sees their iterate however they write it, and no image leaves its ball unsaid."""

import pytest
import torch
from torch import nn

from fastadv.attacks import PGD, Attack
from fastadv.evaluation import evaluate
from fastadv.nn import Normalized

EPS, ALPHA = 24 / 255, 8 / 255
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def linear():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


@pytest.fixture(params=["plain", "normalised"])
def model(request):
    return linear() if request.param == "plain" else Normalized(linear(), MEAN, STD)


@pytest.fixture
def batch():
    return torch.rand(24, 3, 4, 4), torch.randint(0, 5, (24,))


def projected(adv, x, grad):
    return x + (adv + ALPHA * grad.sign() - x).clamp(-EPS, EPS)


class Own(Attack):
    steps = 3

    def start(self, slots):
        slots.adv = slots.x.clone()

    def step(self, slots, grad):
        slots.adv.copy_(projected(slots.adv, slots.x, grad).clamp(0, 1))


class Rebinding(Own):
    def step(self, slots, grad):
        slots.adv = projected(slots.adv, slots.x, grad).clamp(0, 1)


class Aliasing(Own):
    def start(self, slots):
        slots.adv = slots.x


class Chained(Own):
    def step(self, slots, grad):
        return slots.adv.copy_(projected(slots.adv, slots.x, grad).clamp(0, 1))


class Masked(PGD):
    """It changes what PGD's step has written."""

    def step(self, slots, grad):
        super().step(slots, grad)
        slots.adv[:, 0] = slots.x[:, 0]


class Returning(Own):
    def step(self, slots, grad):
        return projected(slots.adv, slots.x, grad).clamp(0, 1)


class Leaving(Own):
    def step(self, slots, grad):
        slots.adv.add_(ALPHA * grad.sign()).clamp_(0, 1)


def by_hand(model, x, y, mask=1.0, steps=3):
    adv = x.clone()
    for _ in range(steps):
        leaf = adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        adv = projected(adv, x, grad).clamp(0, 1)
        adv = x + (adv - x) * mask
    return adv


@pytest.mark.parametrize("attack", [Own, Rebinding, Aliasing, Chained])
def test_the_model_sees_the_iterate_however_it_was_written(model, batch, attack):
    x, y = batch
    before = x.clone()
    adv = attack(model, EPS)(x, y)
    torch.testing.assert_close(adv, by_hand(model, x, y), rtol=0, atol=1e-6)
    assert torch.equal(x, before)
    report = evaluate(model, (x, y), attack(model, EPS), progress=False)
    right = (model(by_hand(model, x, y)).argmax(1) == y) & (model(x).argmax(1) == y)
    assert report["robust_accuracy"] <= right.float().mean().item()  # every iterate counts


def test_it_sees_what_was_changed_after_a_step_of_ours(model, batch):
    x, y = batch
    mask = torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    adv = Masked(model, EPS, ALPHA, 3, random_start=False)(x, y)
    torch.testing.assert_close(adv, by_hand(model, x, y, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["called", "evaluated"])
def test_a_step_that_returns_its_iterate_is_refused(model, batch, way):
    attack = Returning(model, EPS)
    with pytest.raises(TypeError, match=r"Returning\.step returned a Tensor: .* into slots\.adv"):
        attack(*batch) if way == "called" else evaluate(model, (batch[0], model(batch[0]).argmax(1)), attack)


def test_a_class_that_leaves_its_ball_is_told(model, batch):
    x = batch[0]
    y = model(x).argmax(1)
    attack = Leaving(model, EPS / 3)
    with pytest.warns(UserWarning, match="24 images leave eps or"):
        attack(x, y)
    with pytest.warns(UserWarning, match="Leaving at 8/255 returned are up to .* beyond its eps"):
        report = evaluate(model, (x, y), attack, progress=False)
    (result,) = report["attacks"]
    assert result["robust_accuracy"] is None
    assert EPS / 3 < result["largest_linf"] <= EPS + 1e-6
    assert report["budgets"] == []
    within = evaluate(model, (x, y), Own(model, EPS), progress=False)
    assert within["attacks"][0]["largest_linf"] <= EPS + 1e-6
    assert within["attacks"][0]["robust_accuracy"] is not None
