"""The common part of LoRA and IA3: peft's factors beside a layer's weight, which are merged into it at the end."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastadv._warnings import warn
from fastadv.nn.frozen import at_the_end
from fastadv.nn.parallel import in_shards

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner

ADAPTER = "default"  # peft's name of the factors
MERGES = "merges_for_attacks"  # the attribute of the layers that `MergedWeights` merges
HALVES = (torch.float16, torch.bfloat16)


def pattern(names: Collection[str]) -> str:
    """A pattern for exactly these names. peft would match the names of a list by their endings."""
    return "|".join(map(re.escape, names))


@contextmanager
def merged(
    tuner: "BaseTuner", factors: Mapping[str, nn.Parameter], method: str, todo: str
) -> Iterator[Callable[..., int]]:
    """Merge the factors of `tuner` into the weights at the end.

    Args:
        tuner: peft's model, with all factors.
        factors: {name of a layer: one of its factors}.
        method: the name of the method, for the messages.
        todo: the advice in the error.

    Yields:
        `_Steps.hold`, which lets only some rows of a factor train.

    Raises:
        ValueError: at the first step of an optimizer one of `factors` has no gradient, a weight is offloaded, or a
            factor that `hold` was called for was replaced; nothing was changed.

    Warns:
        UserWarning: at the end: optimizers trained other parameters of the model, and none had a factor.
    """
    for name in factors:
        _show_attributes(tuner.model.get_submodule(name))
    # In inference PyTorch's own transformer layers read the weights of their linear layers directly, without factors.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    steps = _Steps(tuner.model, factors, method, todo)
    hooks = register_optimizer_step_pre_hook(steps.before), register_optimizer_step_post_hook(steps.after)

    def put_back() -> None:
        for hook in hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        _merge(tuner, factors)

    with at_the_end(put_back):
        yield steps.hold
    if steps.of_others and not steps.of_factors:
        warn(
            f"no optimizer had {method}'s factors, so they did not train: an optimizer must be made after the model "
            "was set up, from the parameters that trainable() yields"
        )


def _show_attributes(tuned: Any) -> None:
    """Give peft's layer the attributes of the layer in it: some models read them, such as the stride of a convolution.

    MobileNetV2 of transformers does, to pad the input itself.
    """
    for name, value in vars(tuned.base_layer).items():
        if not name.startswith("_") and not hasattr(tuned, name):
            setattr(tuned, name, value)


def _merge(tuner: "BaseTuner", names: Iterable[str]) -> None:
    """Merge the factors into the layers with these names, and put the layers back into the model.

    peft's own merge_and_unload() takes whatever has an attribute `base_layer` for a layer with factors. Some networks
    have a layer of that name, such as timm's DLA.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        tuned: Any = tuner.model.get_submodule(name)
        tuned.merge()
        setattr(tuner.model.get_submodule(parent), child, tuned.get_base_layer())
    if hasattr(tuner.model, "peft_config"):  # peft notes there that the model has factors
        del tuner.model.peft_config


class _Steps:
    """Watches the steps of all optimizers.

    Attributes:
        of_factors: an optimizer that has factors made a step.
        of_others: an optimizer that has parameters of the model, but no factors, made a step.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, nn.Parameter], method: str, todo: str):
        self._network, self._factors, self._method, self._todo = model, factors, method, todo
        self._ids = {id(factor) for factor in factors.values()}
        self._model = {id(parameter) for parameter in model.parameters()}
        self.of_factors = self.of_others = False
        self._held: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []  # a factor, its held rows, its values

    def hold(self, factor: nn.Parameter, rows: Sequence[slice], dim: int = 0) -> int:
        """Let only some rows of a factor train: all others keep the values that they have now.

        Args:
            factor: a factor of LoRA or IA3.
            rows: the rows that train.
            dim: the dimension of the factor that has the rows.

        Returns:
            How many numbers of the factor do not train.
        """
        held = torch.ones(factor.shape[dim], dtype=torch.bool, device=factor.device)
        for part in rows:
            held[part] = False
        if not held.any():
            return 0
        held = held.reshape(-1, *(1,) * (factor.ndim - 1 - dim))
        factor.register_hook(lambda grad: grad.masked_fill(held.to(grad.device), 0))
        self._held.append((factor, held, factor.detach().clone()))
        return int(held.sum()) * (factor.numel() // factor.shape[dim])

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Give held rows their values again: weight decay acts without a gradient, too."""
        self._check(optimizer)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for factor, held, values in self._held:
            if id(factor) in stepped:
                factor.copy_(torch.where(held.to(factor.device), values.to(factor.device), factor))

    def before(self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Refuse the first step of the factors' optimizer where a factor has no gradient."""
        if args[1:] == () and kwargs.get("closure") is None:  # a closure has yet to compute the gradients
            self._check(optimizer)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        if self.of_factors:  # the first step is over
            return
        self._check_held()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held.isdisjoint(self._ids):
            self._check_weights()
        missing = [name for name, factor in self._factors.items() if id(factor) in held and factor.grad is None]
        if missing:
            raise ValueError(
                f"{self._method}'s factors in {', '.join(missing)} got no gradient: the model uses the weight without "
                f"calling the layer, or does not need its output. {self._todo}"
            )
        self.of_factors = not held.isdisjoint(self._ids)
        self.of_others |= not held.isdisjoint(self._model - self._ids)

    def _check_held(self) -> None:
        """Refuse factors that something has put others in the place of: their rows would no longer be held."""
        here = {id(parameter) for parameter in self._network.parameters()} if self._held else set()
        if not all(id(factor) in here for factor, _, _ in self._held):
            raise ValueError(
                f"{self._method} trains only a part of some layers' outputs, and something like fully_shard replaced "
                f"its factors, so that all of them would train: leave the model whole. {self._todo}"
            )

    def _check_weights(self) -> None:
        layers = {name: self._network.get_submodule(name) for name in self._factors}
        offloaded = [name for name, layer in layers.items() if layer.get_parameter("base_layer.weight").is_meta]
        if offloaded:
            raise ValueError(
                f"the weights of {', '.join(offloaded)} are offloaded (on the meta device between two passes), and "
                f"{self._method}'s factors could not be merged into them at the end: load the whole model"
            )


class MergedWeights:
    """The weights of LoRA's layers with the factors merged, for passes that need no gradient of a weight.

    Such a pass then costs what it does without LoRA, and the logits differ by rounding. Left alone are weights in half
    types, where the sum would round small factors away, and those that fully_shard or offloading brings for each pass,
    which would compute without the factors.

    Args:
        model: any model; nothing is done where `trainable` has not set it up for LoRA.
    """

    def __init__(self, model: nn.Module):
        layers: list[Any] = [module for module in model.modules() if getattr(module, MERGES, False)]
        weights = [] if in_shards(model) else [(layer, layer.base_layer.weight) for layer in layers]
        self._layers = [layer for layer, weight in weights if weight.dtype not in HALVES and not weight.is_meta]
        self._memory: dict[int, torch.Tensor] = {}  # a captured graph keeps its addresses

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Merge until the end; then the weights are the same memory with the same bits as before."""
        weights = [layer.base_layer.weight for layer in self._layers]
        own = [weight.data for weight in weights]

        def put_back() -> None:
            for layer, weight, data in zip(self._layers, weights, own, strict=True):
                weight.data = data
                layer.merged_adapters.clear()

        with at_the_end(put_back):
            for number, (layer, weight) in enumerate(zip(self._layers, weights, strict=True)):
                with torch.no_grad():
                    sum_of_both = torch.add(weight, layer.get_delta_weight(ADAPTER), out=self._of(number, weight))
                weight.data = sum_of_both
                layer.merged_adapters.append(ADAPTER)
            yield

    def _of(self, number: int, weight: torch.Tensor) -> torch.Tensor:
        if number not in self._memory or self._memory[number].device != weight.device:
            self._memory[number] = torch.empty_like(weight)
        return self._memory[number]
