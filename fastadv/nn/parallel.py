"""Tells models that are parallel, and calls one under DistributedDataParallel without waiting for other processes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel


@contextmanager
def alone(model: AnyModel) -> Iterator[None]:
    """Until the end, each DistributedDataParallel in `model` just calls its module.

    Otherwise every call would wait for the other processes, which may have nothing to evaluate.

    Args:
        model: an `nn.Module`, or any other callable, whose modules `as_module` finds.
    """
    modules = as_module(model).modules()
    waiting = [vars(module) for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
    before = [attributes.get("forward") for attributes in waiting]
    for attributes in waiting:
        attributes["forward"] = attributes["_modules"]["module"].__call__
    try:
        yield
    finally:
        for attributes, forward in zip(waiting, before, strict=True):
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward


def one_process(model: AnyModel) -> AnyModel:
    """The module inside a DistributedDataParallel, whose calls do not wait for other processes; else `model` itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def in_shards(model: nn.Module) -> bool:
    """Whether fully_shard gathers weights of the model for each pass, and lets go of them after it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it takes a second to import, and who shards has done it
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
