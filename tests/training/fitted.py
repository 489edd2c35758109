"""What tests of training share: images to learn from, the order of a run's batches, and comparisons of weights."""

import random
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from fastadv.training.batches import Batches


def colours(count, seed, side=8, dtype=torch.uint8):
    """Noisy images (count, 3, side, side) and their labels; the class of an image is its bright channel."""
    labels = torch.arange(count) % 3
    bright = F.one_hot(labels, 3)[:, :, None, None]
    images = 0.4 * bright + 0.6 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return (255 * images if dtype == torch.uint8 else images).to(dtype), labels


def drawn(count, classes, side):
    """Fresh random images (count, 3, side, side) in float64, and labels; the seed is printed."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=generator), torch.arange(count) % classes


@contextmanager
def loaded_batches():
    """A list that gets (epoch, rows) of each part of a batch, in the order in which a run loads them."""
    order, load = [], Batches.load

    def noted(batches, part, at, repeats):
        order.append((at.epoch, part))
        return load(batches, part, at, repeats)

    with patch.object(Batches, "load", noted):
        yield order


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    """The names of the weights and buffers that differ from `before`."""
    assert list(model.state_dict()) == list(before)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def timeless(value):
    """Records without their times, whose names end in "_s"."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith("_s")}
    return [timeless(item) for item in value] if isinstance(value, list) else value
