"""Checks before training that factors can be merged into the layers' weights: the model must compute the same then."""

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadv.functional import to_float
from fastadv.models.added import added_to
from fastadv.models.structure import with_factors
from fastadv.nn.eager import eager
from fastadv.nn.frozen import at_the_end, frozen
from fastadv.nn.logits import find_logits
from fastadv.ops.generator import seeded
from fastadv.training.factors import ADAPTER
from fastadv.training.ties import place

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

ALONE = "layer"  # the name of the layer that is checked alone


def check_mergeable(
    model: nn.Module,
    tuner: type["BaseTuner"],
    configs: Mapping[str, "PeftConfig"],
    example: torch.Tensor | None,
    method: str,
    todo: str,
) -> None:
    """Refuse layers whose factors would do something else once they are merged into the weight.

    Afterwards every weight, buffer, mode and random generator is as before.

    Args:
        model: the network.
        tuner: peft's class of the method.
        configs: {name of a layer: peft's configuration for a model that has only this layer, called ALONE}.
        example: images (N, C, H, W) as the model takes them; None: nothing tells whether the model uses a weight
            without calling its layer.
        method: the name of the method, for the errors.
        todo: the advice in the errors.

    Raises:
        ValueError: the model has adapters of peft already; a layer has no weight of its own, or an adapter on its
            output; it does not compute the same with random factors before and after they are merged; or the model
            uses its weight elsewhere, too.
    """
    _check_no_adapters(model, method)
    layers = {name: model.get_submodule(name) for name in configs}
    _check_weights(model, layers, method, todo)
    errors: list[Exception] = []
    changed = [name for name, layer in layers.items() if not _merges(layer, tuner, configs[name], errors)]
    if changed:
        said = f" ({errors[0]})" if errors else ""
        raise ValueError(
            f"{method} cannot adapt {', '.join(changed)}: once its factors are merged into the weight, such a layer "
            "would compute something else than in training, as it does where it has hooks, a forward of its own, "
            f"groups, dilation or a padding other than zeros: {todo}{said}"
        ) from next(iter(errors), None)
    elsewhere = [] if example is None else _used_elsewhere(model, layers, example)
    if elsewhere:
        raise ValueError(
            f"the model uses the weight of {', '.join(elsewhere)} without calling the layer, too, where {method}'s "
            f"factors have no effect until they are merged: {todo}"
        )


def _check_no_adapters(model: nn.Module, method: str) -> None:
    """Refuse a model with peft's layers: merging takes all of them, and not those of `method` alone."""
    found = with_factors(model)
    if found is not None:
        raise ValueError(
            f"the model has adapters of peft already{found and f', such as in {found}'}, and {method} would merge them "
            "with its own: merge them first, with merge_and_unload() of peft's model, or choose another method"
        )


def _check_weights(model: nn.Module, layers: Mapping[str, nn.Module], method: str, todo: str) -> None:
    """Refuse layers without a weight that is theirs alone, and those that have an adapter on their output."""
    # A weight may be in several places: two layers may share one, and one layer may be in two places.
    held = [(name, key, child) for name, module in model.named_modules() for key, child in module._modules.items()]
    places: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name, key, child in [("", "", model), *held]:
        for parameter in () if child is None else child.parameters(recurse=False):
            places[place(parameter)].append(f"{name}.{key}".lstrip("."))
    computed = [name for name, layer in layers.items() if "weight" not in layer._parameters]
    if computed:
        raise ValueError(
            f"the weight of {', '.join(computed)} is computed from other tensors, such as by spectral_norm, "
            f"weight_norm or pruning, and what {method} merges into it would be lost: {todo}"
        )
    for layer in layers.values():
        shared = places[place(layer.get_parameter("weight"))]
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(shared)} have one weight (tied weights), and {method} would change it for all of them: "
                f"{todo}"
            )
    adapted = {place for place, _ in added_to(model)} & set(layers)
    if adapted:
        raise ValueError(
            f"{', '.join(sorted(adapted))} has an adapter: {method}'s factors would act after it in training, and "
            f"before it once they are merged into the weight: {todo}"
        )


def _merges(layer: nn.Module, tuner: type["BaseTuner"], config: "PeftConfig", errors: list[Exception]) -> bool:
    """Whether the layer computes the same before and after random factors are merged into its weight.

    An error of peft, or of the layer with its factors, means no, and is appended to `errors`.
    """
    alone = nn.ModuleDict({ALONE: layer})  # peft replaces the layer in this container, and not in the model
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        seeded(0),
        frozen(layer),
        _in_float64(layer),
    ):
        warnings.simplefilter("ignore")  # training itself will warn
        x = torch.randn(_input_shape(layer)).to(layer.get_parameter("weight"))
        try:
            without = layer(x)
            tuner(alone, {ADAPTER: config}, ADAPTER)
            tuned: Any = alone[ALONE]
            for key, factor in tuned.named_parameters():
                if not key.startswith("base_layer."):
                    factor.copy_(torch.randn(factor.shape))
            trained = tuned(x)
            tuned.merge()
            merged = tuned(x)
        except Exception as error:
            errors.append(error)
            return False
    differs, effect = ((each - trained).abs().max() for each in (merged, without))
    return bool(differs <= 1e-3 * effect)


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        height, width = (2 * d * k + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        return 2, layer.in_channels, height, width
    assert isinstance(layer, nn.Linear)
    return 8, layer.in_features


@contextmanager
def _in_float64(layer: nn.Module) -> Iterator[None]:
    """Let a frozen layer compute with copies in float64 until the end: without rounding, and a merge writes to them."""
    own = [(parameter, parameter.data) for parameter in layer.parameters()]

    def put_back() -> None:
        for parameter, data in own:
            parameter.data = data

    with at_the_end(put_back):
        for parameter, data in own:
            parameter.data = data.to(torch.float64, copy=True)
        for module in layer.modules():
            for name, buffer in module._buffers.items():  # `frozen` puts them back
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()
        yield


def _used_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], example: torch.Tensor) -> list[str]:
    """The layers whose weight has an effect on the logits although no gradient flows through the layers' outputs."""

    def cut(layer: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return out.detach()

    weights = [layer.get_parameter("weight") for layer in layers.values()]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), eager():
        hooks = [layer.register_forward_hook(cut) for layer in layers.values()]
        try:
            for weight in weights:
                weight.requires_grad_()
            images = to_float(example[:1])
            logits = find_logits(model(images), len(images))
            if not logits.requires_grad:
                return []
            grads = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
    return [name for name, grad in zip(layers, grads, strict=True) if grad is not None]
