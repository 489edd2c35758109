"""Whether two models are one: which weights they have, and what is wrapped around them."""

from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.nn.normalized import Normalized

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def bare(model: AnyModel) -> AnyModel:
    """The model without what changes none of its outputs: torch.compile, DistributedDataParallel and their like."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif type(model) is nn.Sequential and len(model) == 1:
            model = model[0]
        elif hasattr(model, "_orig_mod"):  # under torch.compile
            model = model._orig_mod
        else:
            return model


def is_another(model: AnyModel, other: AnyModel) -> bool:
    """Whether both are modules with weights, and have none of them in common, or each has some of its own.

    Two heads on one backbone make two models. Buffers alone make none: two wrappers may each hold the same mean.
    """
    modules = [as_module(bare(each)) for each in (model, other)]
    here, there = ({id(tensor) for tensor in (*each.parameters(), *each.buffers())} for each in modules)
    if not (here and there):
        return False
    mine, theirs = ({id(parameter) for parameter in each.parameters()} for each in modules)
    return not here & there or (not mine <= theirs and not theirs <= mine)


def is_part(model: AnyModel, other: AnyModel) -> bool:
    """Whether one of the models is within the other, and more is computed there: it is normalised, or in a row."""
    model, other = bare(model), bare(other)
    return model is not other and (_is_within(model, other) or _is_within(other, model))


def _is_within(part: AnyModel, whole: AnyModel) -> bool:
    around = (
        each
        for each in as_module(whole).modules()
        if isinstance(each, Normalized) or (isinstance(each, nn.Sequential) and len(each) > 1)
    )
    return any(each is not part and any(inner is part for inner in as_module(each).modules()) for each in around)
