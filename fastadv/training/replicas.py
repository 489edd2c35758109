"""Trains one model in several processes: equal weights at the start, and the mean of all gradients in each update."""

import torch
from torch import nn

from fastadv.nn.frozen import buffers_kept
from fastadv.nn.logits import find_logits
from fastadv.ops.generator import seeded
from fastadv.team import Team

PASSES = 16  # that look for parameters without a gradient: of layers that are skipped at random one must be skipped
SKIPPED = "find_unused_parameters"  # in the error of DistributedDataParallel where none was, and one is later


class _Logits(nn.Module):
    """A model that returns its logits alone. DistributedDataParallel would wait for the gradients of other outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return find_logits(self.model(images), len(images))


@torch.no_grad()
def share_weights(model: nn.Module, team: Team) -> None:
    """Copy the parameters and buffers of the first process to all others.

    Args:
        model: this process's model.
        team: the processes of the run; all of them call this together.

    Raises:
        ValueError: the models differ in the names, shapes or dtypes of their tensors, or have some that cannot be sent.
    """
    if team.alone:
        return
    from torch.distributed.tensor import DTensor  # it takes a second to import, and one process needs it not

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sharded = next((name for name, t in tensors.items() if isinstance(t, DTensor)), None)
    if sharded:
        raise ValueError(
            f"{sharded} is a DTensor, as fully_shard makes them, and a run has a whole model in each process: give it "
            "the model before it is sharded; TrainStep, in a loop of your own, takes a sharded one"
        )
    kinds = team.gathered([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    for rank, kind in enumerate(kinds):
        other = [name for name, *_ in {*kind} ^ {*kinds[0]}]
        if other:
            raise ValueError(
                f"process {rank} has another model than process 0, beginning with {min(other)}: give all of them the "
                "same"
            )
    for name, t in tensors.items():
        try:
            t.copy_(team.sent(t))
        except Exception as error:
            raise ValueError(
                f"{name} ({t.dtype}, {t.layout}) cannot be copied from one process to another ({error}): let the model "
                "hold a plain copy, in another dtype, or keep it as an attribute that is no buffer"
            ) from error


def replicated(model: nn.Module, images: torch.Tensor, team: Team) -> nn.Module:
    """`model` under DistributedDataParallel.

    Some parameters may get no gradient, such as DINOv2's mask token, those of another head, or in layers that are
    skipped at random. Then DistributedDataParallel must search the graph in every step, which costs time. Some backward
    passes here find out whether that is needed. They do not change the model.

    Args:
        model: the model that trains.
        images: (n, ...), floats on the model's device.
        team: the processes of the run; all of them call this together.
    """
    through = _Logits(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def leaves_some_out() -> bool:
        gradients = torch.autograd.grad(through(images).float().sum(), parameters, allow_unused=True)
        return any(gradient is None for gradient in gradients)

    with seeded(0), buffers_kept(model):
        found = any(leaves_some_out() for _ in range(PASSES))  # no more passes than until the first that does
    unused = bool(team.summed(torch.tensor(found, device=images.device).long()))
    return nn.parallel.DistributedDataParallel(through, find_unused_parameters=unused)
