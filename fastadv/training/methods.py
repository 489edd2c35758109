"""What trains: everything, the head alone, the biases too, or low-rank updates (LoRA)."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastadv import models
from fastadv._extras import require
from fastadv.attacks.state import at_the_end, flags_kept
from fastadv.models import Target, find_head

METHODS = ("full", "linear", "bias", "lora")


class Tuning:
    """What trains while `trainable` is in force.

    Attributes:
        parameters: (name, parameter) of each that trains.
        total: how many numbers the parameters of the model hold, LoRA's factors included.
        trainable: how many of them train.
        buffers: of what is in train mode, by name.
        tensors: all that training can change, by name: what trains, and `buffers`.
    """

    def __init__(self, model: nn.Module, buffers: Iterable[str], fixed: int):
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires grad: there is nothing to train")
        self.trainable = sum(parameter.numel() for _, parameter in self.parameters) - fixed
        self.total = sum(parameter.numel() for parameter in model.parameters())
        # By owner: a model may put another tensor in the place of a buffer.
        owners = ((name, *name.rpartition(".")[::2]) for name in buffers)
        self._buffers = {name: (model.get_submodule(owner)._buffers, key) for name, owner, key in owners}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: held[key] for name, (held, key) in self._buffers.items()}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.parameters) | self.buffers

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of `tensors` in the host's memory: the device's is for the steps."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to `state`.

        Raises:
            ValueError: it is the state of another model or method; nothing was changed.
        """
        tensors = self.tensors
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise ValueError("the state is of another model or another method: its names or shapes differ")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])


@contextmanager
def trainable(
    model: nn.Module,
    method: str,
    head: str | None = None,
    rank: int = 16,
    alpha: float = 16,
    lora_targets: Sequence[str | Target] | None = None,
    example: torch.Tensor | None = None,
) -> Iterator[Tuning]:
    """Set `model` up for `method`, until the end.

    - "full": the model is in train mode and every parameter that requires grad trains.
    - "linear": the head trains. Nothing before it requires grad, so an update runs no backward through the backbone.
    - "bias": every bias trains, such as `bias`, `in_proj_bias`, `q_bias` and `bias_ih_l0`, and the head (BitFit: Ben
      Zaken et al. 2022, arXiv 2106.10199).
    - "lora": a low-rank update of some layers, and the head (Hu et al. 2022, arXiv 2106.09685).

    A weight of the head that a layer before it has too (tied weights) trains: it is one parameter. With every method
    but "full" the backbone stays in eval mode, also after `model.train()`, so that batch-norm's buffers keep their
    bits; the head alone follows the mode.

    At the end, whatever happens, LoRA's updates are merged into the weights, every flag is as it was, no parameter
    that trained has a gradient, and the model has its own modules and names again.

    Args:
        model: trained in place.
        method: one of METHODS.
        head: name of the classifier; None means `fastadv.models.find_head`'s.
        rank, alpha: of LoRA: an update is alpha / rank times the product of factors of that rank.
        lora_targets: names of the layers (nn.Linear, nn.Conv2d) that LoRA adapts, or `Target`s; None means those
            that `fastadv.models.lora_targets` finds.
        example: images (N, C, H, W) as the model takes them, to find the head and those layers by running it.

    Raises:
        ImportError: "lora" without peft, of the `train` extra.
        ValueError: unknown method, no such head or layer, a layer for LoRA whose weight another one has too, nothing
            that trains, or a number out of range; and at the first step of an optimizer, before it changes anything,
            a layer for LoRA whose factors got no gradient.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    head, classifier = (None, None) if method == "full" else find_head(model, head, example)
    targets = _targets(model, rank, alpha, lora_targets, example, head) if method == "lora" else []
    own = {id(parameter) for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(flags_kept(model))
        fixed = stack.enter_context(_adapted(model, targets, rank, alpha)) if targets else 0
        if head is not None:
            stack.enter_context(_head_follows_mode(model, head))
            # By identity: a tied parameter has several names.
            named = list(model.named_parameters(remove_duplicate=False))
            chosen = {id(parameter) for parameter in classifier.parameters()}
            chosen |= {id(parameter) for name, parameter in named if method == "bias" and _is_bias(name)}
            for _, parameter in named:
                parameter.requires_grad_(id(parameter) in chosen or id(parameter) not in own)
        model.train()
        buffers = [name for name, _ in model.named_buffers() if head is None or _within(name, head)]
        tuning = Tuning(model, buffers, fixed)
        stack.callback(_drop_gradients, tuning)
        yield tuning


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _is_bias(name: str) -> bool:
    """Not a table of biases that are added to attention."""
    words = name.rpartition(".")[2].split("_")
    return "bias" in (words[0], words[-1])


def _drop_gradients(tuning: Tuning) -> None:
    for _, parameter in tuning.parameters:
        parameter.grad = None


@contextmanager
def _head_follows_mode(model: nn.Module, head: str) -> Iterator[None]:
    """`model.train(mode)` reaches the head alone; the rest is in eval mode."""

    def train(self, mode=True):
        for module in self.modules():
            module.training = False
        self.get_submodule(head).train(mode)
        return self

    before = vars(model).get("train")
    model.train = MethodType(train, model)  # bound, so that a deep copy's is its own

    def put_back():
        del model.train
        if before is not None:
            model.train = before

    with at_the_end(put_back):
        yield


# ---------------------------------------------------------------------- LoRA


def _targets(model, rank, alpha, given, example, head) -> list[Target]:
    targets = _chosen_targets(model, rank, alpha, given, example, head)
    # Each place that holds a weight, be it by a layer of its own or by one layer that is held twice.
    held = [(name, key, child) for name, module in model.named_modules() for key, child in module._modules.items()]
    places = defaultdict(list)
    for name, key, child in [("", "", model), *held]:
        for parameter in () if child is None else child.parameters(recurse=False):
            places[id(parameter)].append(f"{name}.{key}".lstrip("."))
    for target in targets:
        shared = places[id(model.get_submodule(target.name).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(shared)} have one weight (tied weights), and LoRA would change it for all of them: "
                "name other layers with lora_targets= (--lora-targets), or choose another method"
            )
    return targets


def _chosen_targets(model, rank, alpha, given, example, head) -> list[Target]:
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank must be at least 1 and alpha above 0, got {rank} and {alpha}")
    if given is None:
        if example is None:
            raise ValueError("LoRA finds its layers in a forward pass: pass example=, images, or name lora_targets=")
        return models.lora_targets(model, example, head)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    targets = [target if isinstance(target, Target) else Target(target) for target in given]
    if not targets:
        raise ValueError("lora_targets= names no layer")
    for target in targets:
        if target.name not in layers:
            raise ValueError(
                f"the model has no linear or convolutional layer {target.name!r}; there are {', '.join(layers)}"
            )
    return targets


@contextmanager
def _adapted(model: nn.Module, targets: Sequence[Target], rank: int, alpha: float) -> Iterator[int]:
    """LoRA's factors in `targets`; yields how many of their numbers do not train. They are merged at the end."""
    peft = require("peft")
    names = "|".join(re.escape(target.name) for target in targets)  # a pattern is matched whole, a list by endings
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    tuner = peft.LoraModel(model, {"default": config}, "default")
    # PyTorch's own layers of a transformer read the weights of their linear layers in inference: not the factors.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    factors = {target.name: model.get_submodule(target.name).lora_B["default"].weight for target in targets}
    first_step = register_optimizer_step_pre_hook(partial(_check_reached, factors))

    def put_back():
        first_step.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        tuner.merge_and_unload(progressbar=False)

    with at_the_end(put_back):
        yield sum(_hold(factors[target.name], target.rows) for target in targets)


def _check_reached(factors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, *_) -> None:
    """Before the first step of their optimizer: all of them must have a gradient."""
    if not factors:  # this was not the first step
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, factor in factors.items() if id(factor) in held and factor.grad is None]
    if missing:
        raise ValueError(
            f"LoRA's factors in {', '.join(missing)} got no gradient: the model uses the weight without calling the "
            "layer, or does not need its output. Name other layers with lora_targets= (--lora-targets)"
        )
    if any(id(factor) in held for factor in factors.values()):
        factors.clear()


def _hold(factor: nn.Parameter, rows: Sequence[slice]) -> int:
    """Keep all but `rows` of a factor, which starts at zero, there: their gradient is zero. Returns their count."""
    held = torch.ones(len(factor), dtype=torch.bool, device=factor.device)
    for part in rows:
        held[part] = False
    if not held.any():
        return 0
    held = held.reshape(-1, *(1,) * (factor.ndim - 1))
    factor.register_hook(lambda grad: grad.masked_fill(held.to(grad.device), 0))
    return int(held.sum()) * factor[0].numel()
