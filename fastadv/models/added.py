"""Modules that training adds to a network for good: adapters and prompts.

An added module becomes a submodule of one of the network's modules, and acts by hooks of that module. So the network's
own modules keep their names. An added module has parameters but no layers, such as nn.Linear: code that looks for the
network's layers does not find it.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

Facts = dict[str, Any]  # of an added module, for JSON: its kind, its arguments, and the module that it is added to


class Added(nn.Module):
    """A module that is added to a network. Its constructor takes whole numbers and flags, and keeps them as attributes.

    Attributes:
        kind: the name of the class in files.
        arguments: {argument of the constructor: its least value}.
    """

    kind: str
    arguments: Mapping[str, int]

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Register the hooks that let this module change the input or the output of `module`."""
        raise NotImplementedError

    @property
    def facts(self) -> Facts:
        """The kind and the arguments, from which `add_again` makes an untrained module of this sort."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.arguments}}


class Adapter(Added):
    """Replaces the output u of a module by u + W_up GELU(W_down u + b_down) + b_up.

    W_up and both biases start at zero, so the network computes the same as before. W_down starts as the weight of an
    nn.Linear does: if it were zero too, all gradients would be zero and nothing would train.

    Source: Houlsby et al. 2019 (arXiv 1902.00751, section 2.1).

    Args:
        width: channels of u.
        reduced: channels between the two projections.
        channels_first: True where u is (N, width, H, W), and the projections are 1x1 convolutions; False where u is
            (..., width).
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
    """Trained tokens that a block of a transformer gets beside its own: VPT-deep. Their outputs are dropped.

    They stand after the first `prefix` tokens, such as the class token, and before the patches. With count = 2:

        class token | prompt prompt | patch patch patch ...

    They have no position embedding. They start uniform in +-sqrt(6 / (3 pixels + width)).

    Source: Jia et al. 2022 (arXiv 2203.12119, section 3.2).

    Args:
        count: the number of prompts.
        width: the channels of a token.
        prefix: the number of tokens before the patches.
        pixels: the pixels of a patch, H x W.
    """

    kind = "prompt"
    arguments: Mapping[str, int] = {"count": 1, "width": 1, "prefix": 0, "pixels": 1}

    def __init__(self, count: int, width: int, prefix: int, pixels: int):
        super().__init__()
        self.count, self.width, self.prefix, self.pixels = count, width, prefix, pixels
        bound = math.sqrt(6 / (3 * pixels + width))
        # Their name keeps them from weight decay, see `fastadv.training.optimizers`.
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Insert the prompts: (N, T, width) becomes (N, T + count, width)."""
        # x.shape[0] and not len(x): torch.export would make a constant of len(x).
        return self._inserted(x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), 1)

    def without(self, x: torch.Tensor) -> torch.Tensor:
        """Remove the prompts: (N, T + count, width) becomes (N, T, width)."""
        return torch.cat((x[:, : self.prefix], x[:, self.prefix + self.count :]), 1)

    def unmasked(self, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        """The attention mask with the prompts: they attend to all tokens, and all tokens attend to them.

        Args:
            mask: (N, heads, T or 1, T), bool (True: attend) or floats (0: attend), as transformers makes them.
            tokens: T, the number of tokens without the prompts.

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


# The hooks look the added module up in the module that they are called with. So they work in a copy of the network too.


def _adapted(module: Any, args: object, out: torch.Tensor) -> Any:
    return module.fastadv_adapter(out)


def _prompted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Insert the prompts into a block's first argument, the tokens, and into its other arguments that are 4-D masks."""
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
    """Add a module to a network: as the submodule fastadv_adapter or fastadv_prompt of the module called `place`.

    Args:
        module: the network.
        place: the name of one of its modules.
        added: the module to add.

    Returns:
        A function that removes it again.

    Raises:
        ValueError: the module called `place` has a submodule of that name already.
    """
    owner, name = module.get_submodule(place), f"fastadv_{added.kind}"
    if hasattr(owner, name):
        raise ValueError(f"{place} has a {name} already")
    owner.add_module(name, added)
    hooks = added.hook(owner)
    _compile_anew()

    def detach() -> None:
        for hook in hooks:
            hook.remove()
        delattr(owner, name)
        _compile_anew()

    return detach


def weight_in(module: nn.Module, place: str) -> torch.Tensor:
    """A parameter whose device and dtype suit what is added to the network in its module called `place`.

    It is the first real one there, or in the network where there is none: others are indices, quantised or complex.
    """
    near = module.get_submodule(place).parameters()
    return next(parameter for parameter in (*near, *module.parameters()) if parameter.is_floating_point())


def _compile_anew() -> None:
    """Forget what torch.compile has made: it does not look at hooks, and would go on without the new ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def added_to(module: nn.Module) -> Iterator[tuple[str, Added]]:
    """The modules that were added to a network: (name of the module that has it, added module)."""
    for name, each in module.named_modules():
        if isinstance(each, Added):
            yield name.rpartition(".")[0], each


def added_facts(network: nn.Module) -> list[Facts]:
    """The kind, arguments and place of each added module, for JSON and `add_again`."""
    return [{"at": place, **added.facts} for place, added in added_to(network)]


def add_again(network: nn.Module, facts: object) -> None:
    """Add the modules that `added_facts` listed, untrained.

    Args:
        network: the network to add them to.
        facts: the list. It may come from a file of unknown origin, so every entry is checked.

    Raises:
        ValueError: an entry is damaged, or names a module that the network does not have.
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
