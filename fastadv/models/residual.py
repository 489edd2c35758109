"""Finds the residual blocks of a network by running it: a block adds a branch to the branch's own input."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from fastadv.functional import to_float
from fastadv.models.added import Added
from fastadv.models.structure import find_heads
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits

_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Residual:
    """The last residual sum of a block: skip + branch.

    Attributes:
        block: the name of the module that computes the sum.
        place: the name of the module whose output is the branch, as it enters the sum; None where that module is also
            called elsewhere, as one DropPath for several branches is, or returns a tuple that has the branch.
        width: the channels of the branch.
        channels_first: whether the channels are dimension 1, as for convolutions; else they are the last dimension.
        layers: the names of the block's linear layers and convolutions, in the order in which they run, without those
            of a shortcut and of a gate, which see one vector for an image, as in squeeze-and-excitation.
        last: the last of these layers whose output has as many numbers as the branch; None where there is none.
    """

    block: str
    place: str | None
    width: int
    channels_first: bool
    layers: tuple[str, ...]
    last: str | None


def find_residuals(module: nn.Module, example: torch.Tensor, head: str | Sequence[str] | None = None) -> list[Residual]:
    """The last residual sum of each block, in the order in which the blocks run. For a transformer's block: the MLP's.

    A sum is residual if both addends depend on the image and have the same shape. The addend that took more operations
    is the branch, and the other one is the skip. Left out are sums in the head, sums that the logits do not depend on,
    and sums whose branch no module returns.

    Args:
        module: a network, wrapped or not.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.
        head: the name of the classifier, or the names of several; None means those that `find_heads` finds.

    Raises:
        ValueError: there is no such head.
    """
    heads = find_heads(module, head, example)
    x = to_float(example[:1]).clone().requires_grad_()
    with frozen(module), torch.enable_grad(), eager():
        trace = _Trace(module, heads)
        with trace.watching(), trace:
            logits = find_logits(module(x), 1)
        return list(trace.residuals(_operations(logits)))


@dataclass(frozen=True)
class _Sum:
    skip: torch.Tensor
    branch: torch.Tensor
    result: torch.Tensor
    givers: tuple[str, ...]  # modules that returned the branch, the innermost first
    shortcut: tuple[str, ...]  # modules of the block that returned the skip
    ran: int  # how many layers had run before the sum


class _Trace(TorchFunctionMode):
    """Records which modules run, what they return, and which tensors are added."""

    def __init__(self, module: nn.Module, heads: Iterable[str]):
        super().__init__()
        self.module, self.heads = module, list(heads)
        self.names = {each: name for name, each in module.named_modules() if not _is_aside(each)}
        self.running: list[str] = []
        self.calls: Counter[str] = Counter()
        # (name, numbers in its output, of one pixel or token), in the order in which they ran
        self.layers: list[tuple[str, int, int]] = []
        self.given: dict[int, list[str]] = {}  # {id of a tensor: modules that returned it}
        self.tuples: set[str] = set()  # modules that returned one
        self.tensors: list[torch.Tensor] = []  # kept alive: the id of a freed tensor could come again
        self.sums: dict[tuple[str, str], _Sum] = {}

    def watching(self) -> ExitStack:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(self.names[module])
            self.calls[self.names[module]] += 1

        def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            name = self.running.pop()
            if isinstance(module, _LAYERS):
                width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                self.layers.append((name, out.numel(), width))
            if isinstance(out, tuple):
                self.tuples.add(name)
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.given.setdefault(id(tensor), []).append(name)
                    self.tensors.append(tensor)

        stack = ExitStack()
        for module in self.names:
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        return stack

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_sum = getattr(function, "__name__", "") in ("add", "add_") and not kwargs and len(args) == 2
        ordered = self._skip_and_branch(*args) if is_sum else None  # before the sum, which may be in place
        result = function(*args, **(kwargs or {}))
        if ordered is not None:
            self._note(*ordered, result)
        return result

    def _skip_and_branch(self, *addends: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not all(isinstance(each, torch.Tensor) and each.requires_grad for each in addends):
            return None
        if addends[0].shape != addends[1].shape or not self.running:
            return None
        skip, branch = sorted(addends, key=lambda each: len(_operations(each)))
        return skip, branch

    def _note(self, skip: torch.Tensor, branch: torch.Tensor, result: torch.Tensor) -> None:
        block = self.running[-1]
        givers, shortcut = (
            tuple(name for name in self.given.get(id(each), ()) if name != block and _is_within(name, block))
            for each in (branch, skip)
        )
        if givers and not any(_is_within(name, head) for name in (block, *givers, *shortcut) for head in self.heads):
            # One module may compute the sums of many blocks, if each block is an nn.ModuleList, which has no forward.
            self.sums[block, givers[-1].rpartition(".")[0]] = _Sum(
                skip, branch, result, givers, shortcut, len(self.layers)
            )

    def residuals(self, operations: set[Node]) -> Iterator[Residual]:
        """The residual sums that the logits depend on: those among `operations`."""
        modules = dict(self.module.named_modules())
        sums = [(parent, each) for (block, parent), each in self.sums.items() if not self._goes_on(block, each)]
        used = Counter(name for _, each in sums for name in each.givers)
        for parent, each in sums:
            if each.branch.grad_fn not in operations:
                continue
            first = each.givers[0]
            around = [name for name in each.givers if _is_within(first, name) and self.calls[name] == used[name]]
            # Not an nn.Sequential: a submodule that is added to one would run as its last step.
            places = [n for n in around if n not in self.tuples and not isinstance(modules[n], nn.Sequential)]
            shape = each.branch.shape
            own = [
                (name, size, width)
                for name, size, width in self.layers[: each.ran]
                if _is_within(name, parent) and not any(_is_within(name, other) for other in each.shortcut)
            ]
            convolutions = (modules[name] for name, *_ in own if isinstance(modules[name], nn.Conv2d))
            # There may be as many rows as channels: what an nn.Linear returns has its channels last all the same.
            as_image = len(shape) == 4 and not isinstance(modules[first], nn.Linear)
            first_dim = as_image and any(layer.out_channels == shape[1] for layer in convolutions)
            channels = shape[1 if first_dim else -1]
            last = next((name for name, size, _ in reversed(own) if size == each.branch.numel()), None)
            # Of a branch that is one vector, which of its linear layers make a gate cannot be told.
            if each.branch.numel() == channels:
                spatial = [name for name, *_ in own if max(getattr(modules[name], "kernel_size", (1,))) > 1]
                layers = spatial or [name for name, *_ in own]
            else:
                layers = [name for name, size, width in own if size > width]
            place = places[-1] if places else None
            yield Residual(parent, place, channels, first_dim, tuple(dict.fromkeys(layers)), last)

    def _goes_on(self, block: str, each: _Sum) -> bool:
        """Whether a submodule of the block adds to this sum, and the block returns that: then this is not its last sum.

        The layers of CvT and MobileViT in transformers do so with their MLP.
        """
        inner = (other for (name, _), other in self.sums.items() if name != block and _is_within(name, block))
        return any(later.skip is each.result and block in self.given.get(id(later.result), ()) for later in inner)


def _is_aside(module: nn.Module) -> bool:
    return isinstance(module, (Added, torch.jit.ScriptModule))


def _is_within(name: str, module: str) -> bool:
    return not module or f"{name}.".startswith(f"{module}.")


def _operations(tensor: torch.Tensor) -> set[Node]:
    """The operations, of those that depend on the image, from which `tensor` was computed."""
    seen: set[Node] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen
