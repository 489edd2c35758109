"""Modules that training adds to a network and that stay there: adapters and prompts.

Each is a submodule of a module of the network and acts by hooks of that one, so that the network's own modules and
names are as before. They hold parameters and no layers: nothing that looks for the layers of a network finds theirs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

Facts = dict[str, Any]  # for JSON: the kind of an added module, its arguments, and where it is


class Added(nn.Module):
    """A module that is added to a network. It is made of whole numbers and flags, which it keeps as attributes.

    Attributes:
        kind: its name in files.
        arguments: names of the constructor's arguments, and the least that each can be.
    """

    kind: str
    arguments: Mapping[str, int]

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Register the hooks by which it acts on what enters or leaves `module`."""
        raise NotImplementedError

    @property
    def facts(self) -> Facts:
        """Its kind and arguments, from which `add_again` makes such a module."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.arguments}}


class Adapter(Added):
    """Replaces the output u of a module by u + W_up GELU(W_down u + b_down) + b_up.

    W_up and both biases start at zero, so that the network computes what it did. W_down starts as the weight of an
    nn.Linear: were both zero, nothing would train.

    Source: Houlsby et al. 2019 (arXiv 1902.00751, section 2.1).

    Args:
        width: channels of u.
        reduced: channels between the two projections.
        channels_first: whether u is (N, width, H, W), and the projections 1x1 convolutions; else it is (..., width).
    """

    kind = "adapter"
    arguments: Mapping[str, int] = {"width": 1, "reduced": 1, "channels_first": False}

    def __init__(self, width: int, reduced: int, channels_first: bool):
        super().__init__()
        self.width, self.reduced, self.channels_first = width, reduced, channels_first
        bound = 1 / math.sqrt(width)
        self.down = nn.Parameter(torch.empty(reduced, width).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(reduced))
        self.up = nn.Parameter(torch.zeros(width, reduced))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self._project(u, self.down, self.down_bias))
        return u + self._project(hidden, self.up, self.up_bias)

    def _project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight[:, :, None, None], bias) if self.channels_first else F.linear(x, weight, bias)

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(_adapted)]


class Prompt(Added):
    """Tokens that a block of a transformer gets beside its own, and whose outputs are dropped: VPT-deep.

    They stand behind the first `prefix` tokens, such as the class token, and before the patches: with count = 2

        class token | prompt prompt | patch patch patch ...

    They have no position, and start uniform in +-sqrt(6 / (3 pixels + width)).

    Source: Jia et al. 2022 (arXiv 2203.12119, section 3.2).

    Args:
        count: number of the tokens.
        width: channels of a token.
        prefix: how many tokens there are before the patches.
        pixels: of a patch, H x W.
    """

    kind = "prompt"
    arguments: Mapping[str, int] = {"count": 1, "width": 1, "prefix": 0, "pixels": 1}

    def __init__(self, count: int, width: int, prefix: int, pixels: int):
        super().__init__()
        self.count, self.width, self.prefix, self.pixels = count, width, prefix, pixels
        bound = math.sqrt(6 / (3 * pixels + width))
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))  # so called, they do not decay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, width) to (N, T + count, width)."""
        # Not of len(x), which torch.export would make a constant of.
        return self._inserted(x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), 1)

    def without(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T + count, width) to (N, T, width): the way back."""
        return torch.cat((x[:, : self.prefix], x[:, self.prefix + self.count :]), 1)

    def unmasked(self, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        """A mask of attention in which prompts see all tokens and are seen by all.

        Args:
            mask: (N, heads, T or 1, T), bool or floats, as transformers makes them.
            tokens: T, without the prompts.

        Returns:
            (N, heads, T + count or 1, T + count).
        """
        for dim in (2, 3):
            if mask.shape[dim] == tokens:
                shape = (*mask.shape[:dim], self.count, *mask.shape[dim + 1 :])
                mask = self._inserted(mask, mask.new_full(shape, mask.dtype == torch.bool), dim)
        return mask

    def _inserted(self, x: torch.Tensor, more: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(
            (x.narrow(dim, 0, self.prefix), more, x.narrow(dim, self.prefix, x.shape[dim] - self.prefix)), dim
        )

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(_prompted, with_kwargs=True),
            module.register_forward_hook(_unprompted),
        ]


# The hooks ask the module that they are called with, so that a copy of the network has its own.


def _adapted(module: Any, args: object, out: torch.Tensor) -> Any:
    return module.fastadv_adapter(out)


def _prompted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Insert the prompts among the tokens, the block's first argument, and into 4-D masks of attention beside them."""
    prompt, values = module.fastadv_prompt, [*args, *kwargs.values()]
    tokens = values[0].shape[1]
    others = [prompt.unmasked(v, tokens) if isinstance(v, torch.Tensor) and v.ndim == 4 else v for v in values[1:]]
    values = [prompt(values[0]), *others]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _unprompted(module: Any, args: object, out: Any) -> Any:
    without = module.fastadv_prompt.without
    return (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)


KINDS: dict[str, type[Added]] = {each.kind: each for each in (Adapter, Prompt)}


def attach(module: nn.Module, place: str, added: Added) -> Callable[[], None]:
    """Add a module at the one called `place`; it has the name fastadv_adapter or fastadv_prompt there.

    Args:
        module: a network.
        place: name of one of its modules.
        added: what is added.

    Returns:
        A function that takes it away again.

    Raises:
        ValueError: there is something by that name.
    """
    owner, name = module.get_submodule(place), f"fastadv_{added.kind}"
    if hasattr(owner, name):
        raise ValueError(f"{place} has a {name} already")
    owner.add_module(name, added)
    hooks = added.hook(owner)

    def detach() -> None:
        for hook in hooks:
            hook.remove()
        delattr(owner, name)

    return detach


def added_to(module: nn.Module) -> Iterator[tuple[str, Added]]:
    """(name of the module that it is added at, added module) of each."""
    for name, each in module.named_modules():
        if isinstance(each, Added):
            yield name.rpartition(".")[0], each


def added_facts(network: nn.Module) -> list[Facts]:
    """Kind, arguments and place of each added module, for JSON and `add_again`."""
    return [{"at": place, **added.facts} for place, added in added_to(network)]


def add_again(network: nn.Module, facts: object) -> None:
    """Add such modules as `added_facts` listed, untrained.

    Args:
        network: what they are added to.
        facts: the list; it may come from a file that others made.

    Raises:
        ValueError: these are no such facts, or the network has no module of that name.
    """
    modules = dict(network.named_modules())
    for fact in facts if isinstance(facts, list) else [facts]:
        if not _is_fact(fact):
            raise ValueError(
                f"what the file says of the modules that are added to its network is damaged: {fact!r:.200}"
            )
        if fact["at"] not in modules:
            raise ValueError(
                f"the network has no module {fact['at']!r}, where the file has a module of its own: {fact['kind']}"
            )
        attach(network, fact["at"], KINDS[fact["kind"]](**{n: v for n, v in fact.items() if n not in ("at", "kind")}))


def _is_fact(fact: object) -> TypeGuard[Facts]:
    if not isinstance(fact, dict) or not isinstance(fact.get("kind"), str):
        return False
    kind = KINDS.get(fact["kind"])
    if kind is None or not isinstance(fact.get("at"), str) or fact.keys() != {"at", "kind", *kind.arguments}:
        return False
    return all(isinstance(fact[name], int) and fact[name] >= least for name, least in kind.arguments.items())
