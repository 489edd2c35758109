"""Fine-tuning methods: they choose the parameters that train, everything or the head and a few others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastadv._warnings import warn
from fastadv.models import Target
from fastadv.models.structure import find_heads, not_named
from fastadv.names import instead
from fastadv.nn.frozen import at_the_end, flags_kept, is_writable
from fastadv.nn.parallel import in_shards
from fastadv.training.adapter import adapter
from fastadv.training.bias import bias
from fastadv.training.ia3 import ia3
from fastadv.training.lora import lora
from fastadv.training.norm import norm
from fastadv.training.options import Chosen, Options
from fastadv.training.prompt import prompt
from fastadv.training.ties import place

Method = Callable[[nn.Module, Options], AbstractContextManager[Chosen]]


@contextmanager
def linear(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Choose nothing beside the head."""
    yield Chosen()


# A method chooses parameters that train beside the head, or adds some to the model. With "full" everything trains.
METHODS: dict[str, Method | None] = {
    "full": None,
    "linear": linear,
    "bias": bias,
    "lora": lora,
    "adapter": adapter,
    "prompt": prompt,
    "ia3": ia3,
    "norm": norm,
}
ADDING = frozenset({"lora", "adapter", "prompt", "ia3"})  # the methods that add parameters to the model
LEARNING_RATE = 1e-3
LEARNING_RATES = {"linear": 1e-2, "bias": 3e-3}
"""Peak learning rates of methods for AdamW; that of the others is LEARNING_RATE."""
TIMES = {"adamw": 1, "sgd": 10}  # an optimizer's peak learning rate is so many times AdamW's


def learning_rate(method: str, optimizer: str) -> float:
    """The peak learning rate of a method where none is given: of full fine-tuning 0.001, with SGD 0.01."""
    return TIMES[optimizer] * LEARNING_RATES.get(method, LEARNING_RATE)


class Tuning:
    """The parameters that train, and the buffers that training changes, inside `trainable`.

    Args:
        model: the model, with flags and modes set for training.
        fixed: how many numbers do not train although their parameter requires grad.

    Attributes:
        parameters: (name, parameter) for each parameter that trains.
        total: how many numbers all parameters have, with those that the method added.
        trainable: how many of these numbers train.

    Raises:
        ValueError: nothing trains.
    """

    def __init__(self, model: nn.Module, fixed: int):
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires grad: there is nothing to train")
        self.trainable = sum(parameter.numel() for _, parameter in self.parameters) - fixed
        self.total = sum(parameter.numel() for parameter in model.parameters())
        # Those of a frozen backbone too: a layer may write to its buffers in eval mode. The owner and the key are kept,
        # not the tensor: a model may assign another tensor to a buffer.
        owners = ((name, *name.rpartition(".")[::2]) for name, held in model.named_buffers() if is_writable(held))
        modules: dict[str, Any] = dict(model.named_modules())  # get_submodule() refuses TorchScript
        self._buffers: dict[str, tuple[dict[str, Any], str]] = {
            name: (modules[owner]._buffers, key) for name, owner, key in owners
        }

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers, by name, but for those that PyTorch cannot write to, such as expanded ones."""
        return {name: held[key] for name, (held, key) in self._buffers.items()}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that training can change, by name: the parameters that train, and `buffers`."""
        return dict(self.parameters) | self.buffers

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of `tensors` on the host: the steps need the device's memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load a state.

        Args:
            state: a state that `state()` returned. Buffers that it lacks stay as they are: checkpoints of earlier
                versions have none of a frozen backbone.

        Raises:
            ValueError: it is the state of another model or method; nothing was changed.
        """
        shapes = {name: parameter.shape for name, parameter in self.parameters}
        saved = {name: tensor for name, tensor in state.items() if name not in self._buffers}
        if {name: tensor.shape for name, tensor in saved.items()} != shapes:
            raise ValueError("the state is of another model or another method: its names or shapes differ")
        with torch.no_grad():
            for name, parameter in self.parameters:
                parameter.copy_(saved[name])
            self.put_buffers({name: tensor for name, tensor in state.items() if name in self._buffers})

    def put_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write these values, by name, into buffers; one of another shape, as of a buffer that grows, replaces its."""
        for name, value in values.items():
            held, key = self._buffers[name]
            if held[key].shape == value.shape:
                held[key].copy_(value)
            else:
                held[key] = value.to(held[key], copy=True)


@contextmanager
def trainable(
    model: nn.Module,
    method: str,
    head: str | None = None,
    rank: int = 16,
    alpha: float = 16,
    lora_targets: Sequence[str | Target] | None = None,
    example: torch.Tensor | None = None,
    adapter_reduction: int | None = None,
    prompt_tokens: int | None = None,
) -> Iterator[Tuning]:
    """Set `model` up for a fine-tuning method until the end. It begins without gradients.

    - "full": the model is in train mode, and every parameter that requires grad trains.
    - "linear": the head trains. Nothing before it requires grad: an update has no backward pass through the backbone.
    - "bias": every bias trains, such as `bias`, `in_proj_bias`, `q_bias` and `bias_ih_l0`, and the head (BitFit: Ben
      Zaken et al. 2022, arXiv 2106.10199).
    - "lora": a low-rank update of some layers, and the head (Hu et al. 2022, arXiv 2106.09685).
    - "adapter": a bottleneck after the last branch of each residual block, and the head (Houlsby et al. 2019, arXiv
      1902.00751, as `fastadv.models.Adapter`).
    - "prompt": more tokens in each block of a plain vision transformer, and the head (VPT-deep: Jia et al.
      2022, arXiv 2203.12119, as `fastadv.models.Prompt`).
    - "ia3": vectors that scale keys, values and the input of the last layer of each residual block, and the head (Liu
      et al. 2022, arXiv 2205.05638).
    - "norm": weights and biases of the normalisation layers, and the head.

    Where the head shares a weight with a layer of the backbone (tied weights), that weight trains: it is one parameter,
    or two over the same memory.
    With every method but "full" the backbone stays in eval mode, also after `model.train()`, so that batch-norm's
    buffers do not change. Only the head follows `model.train()`.

    At the end, also after an error, LoRA's and IA3's updates are merged into the weights, every flag is as before, the
    gradients are gone, and the model has its own modules and names again. Adapters and prompts stay: they are modules
    of the model from now on, and train when it is set up for the same method again.

    Args:
        model: the model, which is trained in place.
        method: a key of METHODS.
        head: the name of the classifier; None means the one that `fastadv.models.find_head` finds, or all where the
            logits are a mean of several, as in a distilled DeiT.
        rank: the rank of LoRA's factors.
        alpha: for LoRA: an update is alpha / rank times the product of its two factors.
        lora_targets: the names of the layers (nn.Linear, nn.Conv2d) that LoRA adapts, or `Target`s; None means the
            layers that `fastadv.models.lora_targets` finds.
        example: images (N, C, H, W) as the model takes them. The model is run on them to find the head and the layers,
            and to see that it does not use the weight of a layer of LoRA or IA3 without calling the layer.
        adapter_reduction: the width of a layer divided by the width of its adapter; None means 8.
        prompt_tokens: the number of prompts in a block; None means 10.

    Yields:
        The parameters that train.

    Raises:
        ImportError: the method is "lora" or "ia3", and peft, of the `train` extra, is not installed.
        TypeError: rank, adapter_reduction or prompt_tokens is no whole number, alpha no number, or lora_targets one
            name and no list.
        ValueError: the method is unknown; it adds parameters and the model is sharded by fully_shard; there is no such
            head or layer; LoRA's or IA3's update of a layer could not be merged, see `fastadv.training.mergeable`; the
            model has no place for an adapter or a prompt, or nothing that the method trains; or a number is out of
            range. At the first step of an optimizer, before it changes anything: the factors of LoRA or IA3 in a layer
            got no gradient.

    Warns:
        UserWarning: `head` names one of several classifiers. At the end: optimizers trained the model, but none had
            LoRA's or IA3's factors. An optimizer that was made before the model was set up has none.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{instead(method, METHODS)}")
    choose = METHODS[method]
    if method in ADDING and in_shards(model):
        raise ValueError(
            f"the model is sharded by fully_shard already, and {method} adds parameters, which would differ between "
            "processes: set the whole model up, and shard it within trainable()"
        )
    heads = {} if choose is None and head is None else find_heads(model, head, example)
    left = [] if choose is None else not_named(model, heads)
    if left:
        warn(
            f"the logits depend on {' and '.join(left)} too, and head= names {' and '.join(heads)} alone: the other "
            "stays as it is, untrained if it is new. To train all of them leave head= (--head) away"
        )
    with ExitStack() as stack:
        stack.enter_context(flags_kept(model))
        fixed = 0
        if choose is not None:
            options = Options(tuple(heads), example, rank, alpha, lora_targets, adapter_reduction, prompt_tokens)
            chosen = stack.enter_context(choose(model, options))
            fixed = chosen.fixed
            stack.enter_context(_heads_follow_mode(model, heads))
            # By their place, because a tied parameter has several names.
            own = (parameter for classifier in heads.values() for parameter in classifier.parameters())
            trains = {place(parameter) for parameter in (*own, *chosen.parameters)}
            for parameter in model.parameters():
                parameter.requires_grad_(place(parameter) in trains)
        model.train()
        tuning = Tuning(model, fixed)
        _drop_gradients(model)  # of what came before: updates add to them
        stack.callback(_drop_gradients, model)
        yield tuning


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def _heads_follow_mode(model: nn.Module, heads: Iterable[str]) -> Iterator[None]:
    """Until the end, `model.train(mode)` acts on the heads alone; the other modules stay in eval mode."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        for module in self.modules():
            module.training = False
        modules = dict(self.named_modules())  # get_submodule() refuses TorchScript
        for head in heads:
            modules[head].train(mode)
        return self

    before = vars(model).get("train")
    # A bound method: a deep copy of the model gets one that is bound to the copy.
    model.train = MethodType(train, model)  # type: ignore[method-assign]

    def put_back() -> None:
        del model.train
        if before is not None:
            model.train = before  # type: ignore[method-assign]

    with at_the_end(put_back):
        yield
