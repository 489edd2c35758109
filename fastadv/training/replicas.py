"""A model that several processes train: the same weights at the start, and the mean of all gradients in each update."""

import torch
from torch import nn

from fastadv.nn.frozen import buffers_kept
from fastadv.nn.logits import find_logits
from fastadv.ops.generator import seeded
from fastadv.team import Team


class _Logits(nn.Module):
    """The logits alone: DistributedDataParallel waits for the gradient of whatever else a model returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return find_logits(self.model(images), len(images))


@torch.no_grad()
def share_weights(model: nn.Module, team: Team) -> None:
    """Give every process the first one's parameters and buffers.

    Raises:
        ValueError: the models of the processes are not the same, apart from their numbers.
    """
    if team.alone:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kinds = team.gathered([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    for rank, kind in enumerate(kinds):
        other = [name for name, *_ in {*kind} ^ {*kinds[0]}]
        if other:
            raise ValueError(
                f"process {rank} has another model than process 0, beginning with {min(other)}: give all of them the "
                "same"
            )
    for t in tensors.values():
        t.copy_(team.sent(t))


def replicated(model: nn.Module, images: torch.Tensor, team: Team) -> nn.Module:
    """`model` under DistributedDataParallel, which gets whether a parameter that trains may get no gradient.

    To look for such parameters in every step costs a walk through the graph. So one backward pass says whether there
    are any, such as DINOv2's mask token, or parameters that only another head uses. The model is left as it was found.

    Args:
        model: which trains.
        images: (n, ...), floats on the model's device.
        team: the processes of the run.
    """
    through = _Logits(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with seeded(0), buffers_kept(model):
        gradients = torch.autograd.grad(through(images).float().sum(), parameters, allow_unused=True)
    missing = torch.tensor([gradient is None for gradient in gradients], device=images.device)
    unused = bool(team.summed(missing.any().long()))
    return nn.parallel.DistributedDataParallel(through, find_unused_parameters=unused)
