"""Copies are told from other models by all that they compute with."""

import copy

import pytest
import torch
from torch import nn

from fastadv.evaluation.identity import are_equal


class Stepped(nn.Module):
    """A layer with a plain attribute, which changes what it computes and is in no state dict."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.layer = levels, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x if self.levels is None else (x * self.levels).round() / self.levels)


def grown(model):
    with torch.no_grad():
        model.layer.weight[0, 0] += 1


CHANGES = {
    "weights": grown,
    "an attribute": lambda model: setattr(model, "levels", None),
    "a buffer": lambda model: model.register_buffer("held", torch.zeros(2)),
    "a hook": lambda model: model.register_forward_hook(lambda module, args, output: 2 * output),
    "its forward": lambda model: setattr(model, "forward", model.layer.forward),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_copy_is_equal_until_it_computes_something_else(change):
    model = Stepped(torch.randint(2, 9, ()).item())
    other = copy.deepcopy(model).train(not model.training)
    assert are_equal(model, other)
    assert are_equal(nn.Sequential(model), torch.compile(other, backend="eager"))
    change(other)
    assert not are_equal(model, other)


UNREADABLE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "meta": lambda: torch.rand(3, device="meta"),
    "lazy": nn.UninitializedBuffer,
}


@pytest.mark.parametrize("held", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_compared_is_not_called_equal(held):
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    assert are_equal(model, other)
    for each in (model, other):
        each.register_buffer("held", held())
    assert not are_equal(model, other)
