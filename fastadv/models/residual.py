"""The residual blocks of a network, found by running it: where a sum adds a branch to what it began from."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from fastadv.functional import to_float
from fastadv.models.added import Added
from fastadv.models.structure import find_head
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits

_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Residual:
    """The last residual sum of a block.

    Attributes:
        block: name of the module that adds.
        place: name of the module whose output is the branch, as it enters the sum.
        width: channels of the branch.
        channels_first: whether they are dimension 1, as convolutions have them; else they are the last one.
        layers: names of the linear layers and convolutions of the block, in the order in which they run; those of a
            shortcut are left out.
        last: the last one of these that gives as many numbers as the branch has; None where there is none.
    """

    block: str
    place: str
    width: int
    channels_first: bool
    layers: tuple[str, ...]
    last: str | None


def find_residuals(module: nn.Module, example: torch.Tensor, head: str | None = None) -> list[Residual]:
    """The last residual sum of each block, in the order in which they run: of a transformer's block that of its MLP.

    A sum is residual where both addends depend on the image and have one shape. The branch is the addend that took
    more operations, the other one is the skip. Sums whose branch no module returns, or one that is called elsewhere
    too, are left out, and so are those in the head and those that the logits do not depend on.

    Args:
        module: a network, or one wrapped.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.
        head: name of the classifier; None means `find_head`'s.

    Raises:
        ValueError: there is no such head.
    """
    head = find_head(module, head, example)[0]
    x = to_float(example[:1]).clone().requires_grad_()
    with frozen(module), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        trace = _Trace(module, head)
        with trace.watching(), trace:
            logits = find_logits(module(x), 1)
        return list(trace.residuals(_operations(logits)))


@dataclass(frozen=True)
class _Sum:
    branch: torch.Tensor
    givers: tuple[str, ...]  # of the branch, the innermost first
    shortcut: tuple[str, ...]  # modules of the block that gave the other addend
    ran: int  # how many layers had run


class _Trace(TorchFunctionMode):
    """Which modules run, what they return, and what is added."""

    def __init__(self, module: nn.Module, head: str):
        super().__init__()
        self.module, self.head = module, head
        self.names = {each: name for name, each in module.named_modules() if not _is_aside(each)}
        self.running: list[str] = []
        self.calls: Counter[str] = Counter()
        self.layers: list[tuple[str, int]] = []  # in the order in which they ran, with the size of what they gave
        self.given: dict[int, list[str]] = {}  # by identity of a tensor
        self.tensors: list[torch.Tensor] = []  # alive, so that no identity comes twice
        self.sums: dict[tuple[str, str], _Sum] = {}

    def watching(self) -> ExitStack:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.running.append(self.names[module])
            self.calls[self.names[module]] += 1

        def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            name = self.running.pop()
            if isinstance(module, _LAYERS):
                self.layers.append((name, out.numel()))
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
        if getattr(function, "__name__", "") in ("add", "add_") and not kwargs and len(args) == 2:
            self._note(*args)
        return function(*args, **(kwargs or {}))

    def _note(self, *addends: Any) -> None:
        if not all(isinstance(each, torch.Tensor) and each.requires_grad for each in addends):
            return
        if addends[0].shape != addends[1].shape or not self.running:
            return
        block = self.running[-1]
        skip, branch = sorted(addends, key=lambda each: len(_operations(each)))
        givers, shortcut = (
            tuple(name for name in self.given.get(id(each), ()) if name != block and _is_within(name, block))
            for each in (branch, skip)
        )
        if givers and not any(_is_within(name, self.head) for name in (block, *givers, *shortcut)):
            # One module may run many blocks, each of them an nn.ModuleList without a forward of its own.
            self.sums[block, givers[-1].rpartition(".")[0]] = _Sum(branch, givers, shortcut, len(self.layers))

    def residuals(self, operations: set[Node]) -> Iterator[Residual]:
        """The sums among the `operations` that gave the logits."""
        modules = dict(self.module.named_modules())
        used = Counter(name for each in self.sums.values() for name in each.givers)
        for (_, parent), each in self.sums.items():
            if each.branch.grad_fn not in operations:
                continue
            first = each.givers[0]
            around = [name for name in each.givers if _is_within(first, name) and self.calls[name] == used[name]]
            # The submodules of an nn.Sequential run one after the other: it cannot have one that does not.
            places = [name for name in around if not isinstance(modules[name], nn.Sequential)]
            if places:
                shape = each.branch.shape
                own = [
                    (name, size)
                    for name, size in self.layers[: each.ran]
                    if _is_within(name, parent) and not any(_is_within(name, other) for other in each.shortcut)
                ]
                convolutions = (modules[name] for name, _ in own if isinstance(modules[name], nn.Conv2d))
                first_dim = len(shape) == 4 and any(layer.out_channels == shape[1] for layer in convolutions)
                last = next((name for name, size in reversed(own) if size == each.branch.numel()), None)
                layers = tuple(dict.fromkeys(name for name, _ in own))
                yield Residual(parent, places[-1], shape[1 if first_dim else -1], first_dim, layers, last)


def _is_aside(module: nn.Module) -> bool:
    return isinstance(module, (Added, torch.jit.ScriptModule))


def _is_within(name: str, module: str) -> bool:
    return not module or f"{name}.".startswith(f"{module}.")


def _operations(tensor: torch.Tensor) -> set[Node]:
    """The operations that gave `tensor` and depend on the image."""
    seen: set[Node] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen
