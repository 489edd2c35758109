"""Adapters (Houlsby et al. 2019, arXiv 1902.00751): one after the last branch of each residual block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv._warnings import warn
from fastadv.attacks.checks import check_whole
from fastadv.models.added import Adapter, added_to, attach, weight_in
from fastadv.models.residual import find_residuals
from fastadv.training.options import Chosen, Options

REDUCTION = 8  # the width of a layer divided by the width of its adapter


@contextmanager
def adapter(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Put an adapter on the output of each block's last branch, before the sum: x + adapter(branch(x)).

    In a transformer that is the output of the MLP; in a block of convolutions it is the output of the body. The
    adapters stay in the model. A model that has adapters already gets no new ones: its own train.

    Args:
        model: the network.
        options: `adapter_reduction`, `example` and `heads` are used.

    Yields:
        The adapters' parameters.

    Warns:
        UserWarning: some residual blocks have no place for an adapter.

    Raises:
        TypeError: the reduction is no whole number.
        ValueError: there is no residual block; the model has adapters of another reduction; or the reduction is below
            1.
    """
    reduction = options.adapter_reduction
    if reduction is not None:
        check_whole("adapter_reduction", reduction)
    present = [each for _, each in added_to(model) if isinstance(each, Adapter)]
    wrong = [each for each in present if reduction is not None and each.reduced != max(1, each.width // reduction)]
    if wrong:
        raise ValueError(
            f"the model has adapters already, of {wrong[0].reduced} channels for {wrong[0].width}, and "
            f"adapter_reduction={reduction} means others: leave it out (--adapter-reduction) to train these"
        )
    added = present or _add(model, options, reduction or REDUCTION)
    yield Chosen([parameter for each in added for parameter in each.parameters()])


def _add(model: nn.Module, options: Options, reduction: int) -> list[Adapter]:
    example = options.images("adapter finds its places")
    residuals = find_residuals(model, example, options.heads)
    places = {each.place: each for each in residuals if each.place is not None}
    none = "the module that gives such an output is called elsewhere, too, or returns a tuple"
    if not places:
        why = none if residuals else "it has none"
        raise ValueError(
            "adapter works on residual blocks, such as those of ViT, Swin, ConvNeXt and ResNet, where the output of a "
            f"module is added to its input, and before the model's head {why}. Choose another method"
        )
    if without := [each.block for each in residuals if each.place is None]:
        warn(f"the blocks {', '.join(without)} get no adapter: {none}")
    added = []
    for place, each in places.items():
        adapter = Adapter(each.width, max(1, each.width // reduction), each.channels_first)
        added.append(adapter.to(weight_in(model, each.block)))
        attach(model, place, adapter)
    return added
