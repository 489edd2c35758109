"""Models of normalised images are attacked in [0, 1]."""

import pytest
import torch
from attacked import ATTACKS, Net, batch_of, distances, every_attack, radius
from attacked import net as net
from attacked import one_thread as one_thread
from torch import nn

from fastadv.attacks import Normalized
from fastadv.functional import Normalization

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Plain(nn.Module):
    """A model whose normalisation is an ordinary layer, as users write it."""

    def __init__(self, model, mean=MEAN, std=STD):
        super().__init__()
        self.model = model
        self.register_buffer("shift", torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1))

    def forward(self, x):
        return self.model((x - self.shift) / self.scale)


@every_attack
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"chunk": 4}, {"targeted": "least_likely", "loss": "ce"}])
def test_attack_equals_the_one_through_a_layer(net, name, options):
    images, labels = batch_of(6, torch.float64)
    seeds = torch.arange(6)
    ours = ATTACKS[name](Normalized(net, MEAN, STD), **options)(images, labels, seed=seeds)
    theirs = ATTACKS[name](Plain(net), **options)(images, labels, seed=seeds)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert bool((distances(name, ours, images) <= radius(name) * (1 + 1e-9)).all())
    assert 0 <= ours.min()
    assert ours.max() <= 1


@every_attack
def test_from_images_that_were_given(net, name):
    images, labels = batch_of(6, torch.float64)
    start = (images + 0.01).clamp(0, 1)
    ours = ATTACKS[name](Normalized(net, MEAN, STD))(images, labels, x_init=start)
    theirs = ATTACKS[name](Plain(net))(images, labels, x_init=start)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@every_attack
def test_the_model_sees_the_normalised_iterate(net, name):
    images, labels = batch_of(6, torch.float64)
    seen, normalization = [], Normalization(MEAN, STD)
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    attack = ATTACKS[name](Normalized(net, MEAN, STD))
    adv = attack(images, labels, seed=3)
    back = [x * torch.tensor(STD).double()[:, None, None] + torch.tensor(MEAN).double()[:, None, None] for x in seen]
    for x in back:
        assert bool((distances(name, x, images) <= radius(name) + 1e-6).all())
    again = Normalized(net, MEAN, STD)(adv)
    assert torch.equal(again, net(normalization(adv)))


@every_attack
def test_uint8_images(name):
    codes, labels = torch.randint(256, (6, 3, 6, 6), dtype=torch.uint8), torch.arange(6) % 5
    attack = ATTACKS[name](Normalized(Net().eval(), MEAN, STD))
    assert torch.equal(attack(codes, labels, seed=1), attack(codes.float() / 255, labels, seed=1))


def test_a_model_that_normalises_already_warns():
    class Normalize(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.std = MEAN, STD

        def forward(self, x):
            return x

    with pytest.warns(UserWarning, match="seems to normalise"):
        Normalized(nn.Sequential(Normalize(), nn.Flatten()), MEAN, STD)
    layer = Normalize()
    with pytest.warns(UserWarning, match="seems to normalise its input already, in a Normalize"):
        Normalized(lambda x: layer(x).flatten(1), MEAN, STD)
