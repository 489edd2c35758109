"""Finds the layers that LoRA and IA3 adapt: those that make the queries, keys and values of attention, and others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import nn

from fastadv.functional import to_float
from fastadv.models.residual import find_residuals
from fastadv.models.structure import find_heads
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen

# Names that timm and transformers give to the layers of queries, keys and values; _FUSED below makes several at once.
_TRIPLES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("projection_query", "projection_key", "projection_value"),
    ("to_q", "to_k", "to_v"),
    ("to_query", "to_key", "to_value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and keyword arguments of a module's forward

_ALONE = {name for triple in _TRIPLES for name in triple}
_FUSED = {"qkv", "qkv_proj", "to_qkv", "Wqkv", "query_key_value"}
_FUSED |= {"kv", "kv_proj", "to_kv", "qk", "qk_proj", "to_qk"}
_ADAPTS = {  # {letters: (the method that adapts them, what else a user can do)}
    "qv": ("LoRA adapts queries and values", ", or name its layers with lora_targets= (--lora-targets)"),
    "kv": ("IA3 adapts keys and values", ""),
}
ROWS = 16  # so many rows of a layer are disturbed at first; more only while two layouts or more fit what was seen
# The disturbance, for outputs of standard deviation 1. It is so large that attention is far from linear in a key.
SIZE = 30.0


@dataclass(frozen=True)
class Target:
    """A layer that LoRA or IA3 adapts.

    Attributes:
        name: the name of the layer.
        rows: the slices of its outputs that train; by default all outputs.
    """

    name: str
    rows: tuple[slice, ...] = (slice(None),)


def lora_targets(module: nn.Module, example: torch.Tensor, head: str | Sequence[str] | None = None) -> list[Target]:
    """The layers that LoRA adapts: queries and values, where there is attention.

    Only layers that run in a forward pass count. The first rule that finds any decides:

    1. Attention whose layers have the names that timm or transformers give, such as q_proj and v_proj, or query and
       value.
    2. Other attention, by its effect. Candidates are layers called qkv, kv or qk; an nn.Linear with three times as
       many outputs as inputs beside an nn.Linear with as many outputs as inputs; and three or more nn.Linear with the
       very same input tensor. One output of one token is disturbed. If it is part of a query, only that token changes.
       If it is part of a key or a value, other tokens change too, and for a value in proportion to the disturbance. Of
       a fused layer only the queries and values train, whether they lie in thirds or head by head.
    3. Without attention: every linear layer, that is nn.Linear, and nn.Conv2d of 1x1 with groups == 1. Where residual
       blocks have no linear layers outside their shortcuts and gates (squeeze-and-excitation): the convolutions of the
       blocks with groups == 1, without those of the shortcuts and gates, if there are some.

    The head is left out. So is a layer whose weight the network uses without calling the layer.

    Source: Hu et al. 2022 (arXiv 2106.09685, section 4.2).

    Args:
        module: a network, wrapped or not.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.
        head: the name of the classifier, or the names of several; None means those that `find_heads` finds.

    Returns:
        The layers, in the order of the network's modules.

    Raises:
        ValueError: there are no such layers; or it is not clear which layers make the queries and values.
    """
    heads = list(find_heads(module, head, example))
    ran, targets = _attention_targets(module, example, heads, "qv")
    if targets:
        return targets
    inside = [name for each in find_residuals(module, example, heads) for name in each.layers]
    layers = {name: module.get_submodule(name) for name in inside}
    names = [name for name, _ in module.named_modules() if name in ran]
    if not any(map(_is_linear, layers.values())):
        # Blocks of depthwise convolutions alone, as of ConvMixer, have none; their 1x1 convolutions stand between them.
        names = [name for name, layer in layers.items() if layer.groups == 1] or names
    if not names:
        raise ValueError(
            "LoRA found neither linear layers nor 1x1 convolutions before the head, nor convolutions in residual "
            "blocks: choose another method, or name its layers with lora_targets= (--lora-targets)"
        )
    return [Target(name) for name in names]


def ia3_targets(
    module: nn.Module, example: torch.Tensor, head: str | Sequence[str] | None = None
) -> tuple[list[Target], list[str]]:
    """The layers that IA3 adapts: at some it scales the outputs, at others the inputs.

    The outputs are keys and values; their layers are found as `lora_targets` finds queries and values. The inputs are
    those of the last linear layer or convolution in each residual block, such as the second layer of a transformer's
    MLP.

    Source: Liu et al. 2022 (arXiv 2205.05638, section 3.3).

    Args:
        module: a network, wrapped or not.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.
        head: the name of the classifier, or the names of several; None means those that `find_heads` finds.

    Returns:
        The layers whose outputs are scaled, and the names of the layers whose inputs are scaled.

    Raises:
        ValueError: there are no such layers; or it is not clear which layers make the keys and values.
    """
    heads = list(find_heads(module, head, example))
    outputs = _attention_targets(module, example, heads, "kv")[1]
    lasts = (each.last for each in find_residuals(module, example, heads))
    inputs = list(dict.fromkeys(name for name in lasts if name is not None))
    if not outputs and not inputs:
        raise ValueError("ia3 found neither attention nor residual blocks before the head: choose another method")
    return [target for target in outputs if target.name not in inputs], inputs


def _attention_targets(
    module: nn.Module, example: torch.Tensor, heads: Sequence[str], letters: str
) -> tuple[dict[str, nn.Module], list[Target]]:
    """(the linear layers that run before the heads, the layers of attention that make `letters`: "qv" or "kv")."""
    names = {layer: name for name, layer in module.named_modules()}
    with torch.no_grad(), frozen(module), eager():
        calls = _calls(module, example)
        linear = {names[layer]: layer for layer in calls if _is_linear(layer)}
        inside = tuple(f"{head}." for head in heads)
        ran = {name: layer for name, layer in linear.items() if not f"{name}.".startswith(inside)}
        return ran, [t for name in names.values() for t in _projections(module, name, ran, calls, letters)]


def _calls(module: nn.Module, example: torch.Tensor) -> dict[nn.Module, Call]:
    """The arguments of each module in a forward pass, in the order in which they run."""
    calls: dict[nn.Module, Call] = {}

    def note(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(called, (args, kwargs))

    modules = [each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]
    hooks = [each.register_forward_pre_hook(note, with_kwargs=True) for each in modules]
    try:
        module(to_float(example[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _is_linear(layer: nn.Module) -> bool:
    pointwise = isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1
    return pointwise or isinstance(layer, nn.Linear)


# ---------------------------------------------------------------------- attention


def _projections(
    module: nn.Module, name: str, ran: Mapping[str, nn.Module], calls: Mapping[nn.Module, Call], letters: str
) -> list[Target]:
    """The layers among the children of the module `name` that make `letters`: "q" queries, "k" keys, "v" values."""
    own: list[str] = []
    found: dict[str, str] = {}  # {name of a child that is usual for queries, keys or values: its layer}
    for key, _ in module.get_submodule(name).named_children():
        full = f"{name}.{key}" if name else key
        if isinstance(ran.get(full), nn.Linear):
            own.append(full)
        inside = [layer for layer in ran if f"{layer}.".startswith(f"{full}.")]
        if len(inside) == 1 and key in _ALONE | _FUSED:  # the child is the layer, or has it beside a norm or a pooling
            found[key] = inside[0]
    for triple in _TRIPLES:
        made = {letter: found[key] for letter, key in zip("qkv", triple, strict=True) if key in found}
        if {"q", "v"} <= made.keys():
            return [Target(made[letter]) for letter in letters if letter in made]
    fused = [full for key, full in found.items() if key in _FUSED]
    group = list(found.values()) if fused else _by_structure(own, ran, calls)
    if not group:
        return []
    while module.get_submodule(name) not in calls:  # a container such as nn.ModuleDict is never called
        name = name.rpartition(".")[0]
    caller = module.get_submodule(name)
    attention = _Attention(caller, calls[caller], [ran[full] for full in group])
    layouts = attention.layouts()
    if layouts is None or "".join(sorted("".join(layout.parts for layout in layouts))) != "kqv":
        if not fused and not attention.mixes:
            return []  # such as the parallel branches of an MLP
        who, todo = _ADAPTS[letters]
        raise ValueError(
            f"{who}, and the outputs of {', '.join(group)} are neither queries, keys and values one after the other "
            f"nor head by head: choose another method{todo}"
        )
    pairs = zip(group, layouts, strict=True)
    return [Target(full, layout.slices(letters)) for full, layout in pairs if set(layout.parts) & set(letters)]


def _by_structure(own: Sequence[str], ran: Mapping[str, Any], calls: Mapping[nn.Module, Call]) -> list[str]:
    """The layers among `own` that may be the projections of attention, by their sizes or by their common input."""
    sizes = {full: tuple(ran[full].weight.shape) for full in own}
    fused = [full for full, (out, d) in sizes.items() if out == 3 * d and (d, d) in sizes.values()]
    if fused:
        return fused
    inputs = {full: _first(*calls[ran[full]]) for full in own}
    groups = ([other for other in own if inputs[other] is inputs[full]] for full in own)
    return next((group for group in groups if len(group) >= 3), [])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    first: torch.Tensor = next(iter((*args, *kwargs.values())))
    return first


@dataclass(frozen=True)
class _Layout:
    """Which rows of a layer's weight make queries, keys and values.

    A fused layer with 12 rows and the parts "qkv" has, row by row:

        2 heads    q q k k v v q q k k v v
        1 head     q q q q k k k k v v v v

    Attributes:
        parts: the letters "q", "k" and "v" in their order within a head.
        heads: the number of heads.
        rows: the number of rows.
    """

    parts: str
    heads: int
    rows: int

    def letter(self, row: int) -> str:
        """The letter of a row: "q", "k" or "v"."""
        return self.parts[row * self.heads * len(self.parts) // self.rows % len(self.parts)]

    def slices(self, letters: str) -> tuple[slice, ...]:
        """The rows that have one of `letters`."""
        if len(self.parts) == 1:
            return (slice(None),)
        size = self.rows // (self.heads * len(self.parts))
        return tuple(slice(i, i + size) for i in range(0, self.rows, size) if self.letter(i) in letters)


def _possible(rows: int) -> Iterator[_Layout]:
    for count in (1, 2, 3):
        for heads in range(1, 1 + rows // count if count > 1 else 2):
            if rows % (heads * count) == 0:
                yield from (_Layout("".join(parts), heads, rows) for parts in permutations("qkv", count))


class _Attention:
    """Finds out what some layers of a module make, by running the module with other outputs of these layers.

    Random numbers take the place of the layers' outputs, so the weights, which may be zero, do not matter. One number
    is then disturbed. The effect is seen where tokens enter the linear layers and convolutions that follow, and where
    they leave the module.

    Args:
        module: the module that has the layers.
        call: the arguments with which it ran.
        layers: the layers that may make queries, keys and values.

    Attributes:
        mixes: whether a disturbance of one token reached another token.
    """

    def __init__(self, module: nn.Module, call: Call, layers: Sequence[nn.Module]):
        self.module, self.call, self.layers = module, call, layers
        self.generator = torch.Generator().manual_seed(0)
        self.outputs: dict[nn.Module, torch.Tensor] = {}
        self.before = self._run()
        self.mixes = False

    def layouts(self) -> list[_Layout] | None:
        """The layout of each layer; None where the effects of a layer fit no layout, or several."""
        sizes = [_tokens(self.outputs[layer], layer).shape[1] for layer in self.layers]
        orders = [torch.randperm(size, generator=self.generator).split(ROWS) for size in sizes]
        first = [self._effects(layer, order[0]) for layer, order in zip(self.layers, orders, strict=True)]
        # The first place that every layer affects, some from one token to another. Later the tokens may be pooled.
        places = list(zip(*(seen for rows in first for seen in rows.values()), strict=True))
        self.mixes = any({"k", "v"} & set(place) for place in places)
        point = next((i for i, place in enumerate(places) if "-" not in place and {"k", "v"} & set(place)), None)
        if point is None:
            return None
        found = []
        for layer, size, (_, *others), effects in zip(self.layers, sizes, orders, first, strict=True):
            possible = list(_possible(size))
            while True:
                known = {row: seen[point] for row, seen in effects.items()}
                possible = [layout for layout in possible if all(layout.letter(row) == known[row] for row in known)]
                if len(possible) < 2 or not others:
                    break
                effects = self._effects(layer, others.pop(0))
            found += possible
        return found if len(found) == len(self.layers) else None

    def _effects(self, layer: nn.Module, rows: torch.Tensor) -> dict[int, list[str]]:
        """{row: its letter, see `_letter`, at each place where tokens are seen}."""
        return {row: self._effect(layer, row) for row in rows.tolist()}

    def _effect(self, layer: nn.Module, row: int) -> list[str]:
        token = int(torch.randint(len(_tokens(self.outputs[layer], layer)), (), generator=self.generator))
        once, twice = (self._run(layer, token, row, size) for size in (SIZE, 2 * SIZE))
        return [_letter(*place) for place in zip(self.before, once, twice, strict=True)]

    def _run(
        self, disturbed: nn.Module | None = None, token: int = 0, row: int = 0, size: float = 0.0
    ) -> list[torch.Tensor]:
        """The tokens (tokens, channels) at each place where they are seen, if there are several.

        Args:
            disturbed: the layer whose output is disturbed; None for no disturbance.
            token: the number of the disturbed token.
            row: the number of the disturbed channel.
            size: the size of the disturbance.
        """
        seen = []

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_tokens(_first(args, kwargs), layer).clone())

        def replace(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            if layer not in self.outputs:
                self.outputs[layer] = torch.randn(out.shape, generator=self.generator).to(out)
            given = self.outputs[layer].clone()
            if layer is disturbed:
                last = _channels_last(given, layer)
                position = torch.unravel_index(torch.tensor(token), last.shape[:-1])
                entry: tuple[torch.Tensor | int, ...] = (*position, row)
                last[entry] += size
            return given

        looked = [m for m in self.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in self.layers]
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in looked]
        hooks += [layer.register_forward_hook(replace) for layer in self.layers]
        args, kwargs = self.call
        try:
            out = self.module(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        out = out if isinstance(out, torch.Tensor) else next((t for t in out if isinstance(t, torch.Tensor)), None)
        if out is not None and out.ndim > 1:
            seen.append(_tokens(out, self.layers[0]))
        return [tokens for tokens in seen if len(tokens) > 1]


def _channels_last(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A view of `x`, which enters or leaves `layer`, with its channels in the last dimension."""
    return x.movedim(1, -1) if isinstance(layer, nn.Conv2d) and x.ndim > 3 else x


def _tokens(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`x`, which enters or leaves `layer`, as (tokens, channels)."""
    return _channels_last(x, layer).reshape(-1, _channels_last(x, layer).shape[-1])


def _letter(before: torch.Tensor, once: torch.Tensor, twice: torch.Tensor) -> str:
    """What a row makes: "q", "k", "v", or "-" where its disturbance has no effect.

    Args:
        before: all tokens (tokens, channels) without a disturbance.
        once: the tokens after a disturbance of this row at one token.
        twice: the tokens after a disturbance twice as large.
    """
    changed = int((once != before).any(1).sum())
    if changed < 2:
        return "-q"[changed]
    once, twice = once - before, twice - before
    rounding = 0.01 + 8 * torch.finfo(before.dtype).eps  # 0.01 for TF32
    return "v" if (twice - 2 * once).abs().max() <= rounding * twice.abs().max() else "k"
