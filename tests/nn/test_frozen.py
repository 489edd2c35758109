"""A model may have buffers that PyTorch does not write to: they stay as they are, and are no error."""

import pytest
import torch
from torch import nn

from fastadv.attacks import FGSM

EPS = 8 / 255
BUFFERS = {
    "quantised": lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged),
    "mkldnn": lambda: torch.rand(3).to_mkldnn(),
    "meta": lambda: torch.rand(3, device="meta"),
    "zeros without memory": lambda: torch._efficientzerotensor((3,)),
    "expanded": lambda: torch.rand(1).expand(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_nothing_writes_to(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    model.register_buffer("held", BUFFERS[kind]())
    held, statistics = model.held, model[1].running_mean.clone()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (6,))
    adv = FGSM(model, EPS, training_mode="batch_norm")(x.detach(), y)
    assert model.held is held
    assert torch.equal(model[1].running_mean, statistics)
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert torch.equal(adv, (x + EPS * x.grad.sign()).clamp(0, 1))
