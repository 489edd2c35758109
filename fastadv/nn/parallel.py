"""A model under DistributedDataParallel that one process of several may call."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.nn.logits import AnyModel


@contextmanager
def alone(model: AnyModel) -> Iterator[None]:
    """Each DistributedDataParallel in `model` calls its module and does no more, until the end.

    Otherwise each call of it waits for the other processes, which may have nothing to evaluate.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
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
    """The module under DistributedDataParallel, whose calls wait for the other processes; any other model as it is."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
