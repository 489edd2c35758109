"""Copies are told from other models, also where PyTorch compares no values of some buffers."""

import pytest
import torch
from torch import nn

from fastadv.nn.kinship import are_equal

BUFFERS = {
    "none": lambda: None,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "meta": lambda: torch.rand(3, device="meta"),
    "lazy": nn.UninitializedBuffer,
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_copy_is_equal_and_another_model_is_not(kind):
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        each.register_buffer("held", BUFFERS[kind]())
    assert are_equal(model, other)
    held, other.held = other.held, torch.rand(2)
    assert not are_equal(model, other)
    other.held = held
    with torch.no_grad():
        other.weight[0, 0] += 1
    assert not are_equal(model, other)
